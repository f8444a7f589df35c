"""Compares the answers of the base and of the merged model with the right ones, beside baselines that keep them honest."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jinja2
from pydantic import Field
from rich.console import Console
from rich.table import Table

from stages.core.jsonl import read_json, read_jsonl, write_json
from stages.core.output import Done, fresh_file
from stages.core.params import Section
from stages.core.problem import Problem
from stages.score.intervals import Interval, bootstrap
from stages.score.judge import Judge, judge_rows
from stages.score.metrics import METRICS, bleu_signature, is_chinese, score_answer
from stages.score.nearest import NearestPrompt

SYSTEMS = {
    "base": "base model",
    "most_frequent": "most frequent training answer",
    "nearest": "answer of the nearest training prompt",
    "merged": "fine-tuned model",
}
SHORT = {"base": "base", "most_frequent": "frequent", "nearest": "nearest", "merged": "fine-tuned"}
"""The same in few letters, for the plot."""
PRINTED = ("exact_match", "valid_json", "json_field_f1", "chrf")
"""What the table at the end of a run shows; the report has all."""
MODELS = ("base", "merged")
SHOWN_GROUPS = 20
"""Source files with the most rows that the report breaks the scores down by."""
PAGE = Path(__file__).with_name("report.html.jinja")


class Params(Section):
    """How sure the intervals are."""

    bootstrap_resamples: int = Field(gt=0)
    """How often the test rows are drawn again for an interval; more is smoother and slower."""
    judge_url: str
    """Root of an OpenAI-compatible endpoint that compares the answers of base and fine-tuned model; "": no judge."""
    judge_model: str
    """The endpoint's name for the model that judges."""
    judge_rows: int = Field(gt=0)
    """Test rows that are judged, the first ones; two questions each."""


def score(
    params: Params,
    *,
    examples: Path,
    base_predictions: Path,
    merged_predictions: Path,
    base_extra: Path,
    merged_extra: Path,
    reports: Path,
    metrics: Path,
    bars: Path,
    page: Path,
) -> Done:
    """Scores data/predictions of `base` and `merged` over the same test rows, with 95 % intervals.

    `base_prompts` and `merged_prompts` are the answers to data/prompts.json, which are shown and have no score.

    `examples` gives the training rows for two baselines: the most frequent answer, and the answer of the nearest prompt.
    `reports` is the folder of the earlier stages' reports; their few figures that matter join the scores in `metrics`, the
    one file that `dvc exp show` reads. `bars` gets the scores for a plot, `page` the report, made with `template`.

    Raises Problem if the two files of predictions are not answers to the same test rows.
    """
    prompts = read_json(reports / "encode.json")["test_rows"]
    rows = _rows(base_predictions, merged_predictions, examples, prompts)
    further = _further(base_extra, merged_extra)
    scores = {
        system: [score_answer(row["reference"], row["answers"][system], row["finish"].get(system)) for row in rows]
        for system in SYSTEMS
    }
    summary = {
        system: {metric: _interval([each[metric] for each in scores[system]], params) for metric in METRICS}
        for system in SYSTEMS
    }
    # Row by row, so that what is hard for both does not blur the difference.
    gains = {
        other: {metric: _gain(scores["merged"], scores[other], metric, params) for metric in METRICS}
        for other in SYSTEMS
        if other != "merged"
    }
    groups = _groups(rows, scores, params)
    judged = None
    if params.judge_url:
        judged = _interval(judge_rows(Judge(params.judge_url, params.judge_model), rows[: params.judge_rows]), params)
    stages = {stage: read_json(reports / f"{stage}.json") for stage in ("ingest", "encode", "train", "merge")}
    with fresh_file(metrics) as file:
        write_json(file, _metrics(stages, summary))
    with fresh_file(bars) as file:
        file.write_text(_bars(summary), encoding="utf-8", newline="\n")
    with fresh_file(page) as file:
        page_text = _page(reports, stages, summary, gains, groups, rows, scores, further, params, judged)
        file.write_text(page_text, encoding="utf-8", newline="\n")
    _print(summary, gains, len(rows))
    return Done(f"{len(rows):,} test rows; open {page}")


def _rows(base: Path, merged: Path, examples: Path, prompts: int) -> list[dict[str, Any]]:
    """A row for each test prompt: the prompt as people read it, the right answer, and the answer of each system.

    Raises Problem if the answers are not those to the `prompts` prompts that `encode` made of the test rows.
    """
    answers = {"base": _by_id(base), "merged": _by_id(merged)}
    tests = {row["id"]: row for row in read_jsonl(examples / "test.jsonl")}
    problems = []
    for system, path in (("base", base), ("merged", merged)):
        foreign = sorted(set(answers[system]) - set(tests))
        if foreign:
            problems.append(f"{path}: {len(foreign)} rows are no test rows, the first {foreign[0]}; generate again")
        if len(answers[system]) < prompts:
            problems.append(f"{path}: {len(answers[system])} rows, but there are {prompts} test prompts; generate again")
    differing = sorted(set(answers["base"]) ^ set(answers["merged"]))
    if differing:
        problems.append(
            f"{base} and {merged}: {len(differing)} rows stand in one alone, the first {differing[0]}; generate again"
        )
    both = set(answers["base"]) & set(answers["merged"])
    edited = sorted(id for id in both if answers["base"][id]["reference"] != answers["merged"][id]["reference"])
    if edited:
        problems.append(
            f"{base} and {merged}: {len(edited)} rows differ in `reference`, the first {edited[0]}; generate again"
        )
    if problems:
        raise Problem(*problems)
    train = read_jsonl(examples / "train.jsonl")
    frequent = Counter(row["messages"][-1]["content"] for row in train).most_common(1)[0][0]
    nearest = NearestPrompt([_question(row) for row in train])
    rows = []
    for id, answer in answers["merged"].items():
        question = _question(tests[id])
        neighbour = train[nearest.find(question)]
        rows.append(
            {
                "id": id,
                "source": tests[id]["source"],
                "question": question,
                "reference": answer["reference"],
                "neighbour": _question(neighbour),
                "finish": {"base": answers["base"][id]["finish_reason"], "merged": answer["finish_reason"]},
                "answers": {
                    "base": answers["base"][id]["answer"],
                    "most_frequent": frequent,
                    "nearest": neighbour["messages"][-1]["content"],
                    "merged": answer["answer"],
                },
            }
        )
    return rows


def _further(base: Path, merged: Path) -> list[dict[str, Any]]:
    """The further prompts with both answers. Raises Problem if the two files are not answers to the same."""
    found = [_by_id(base), _by_id(merged)]
    if found[0].keys() != found[1].keys():
        raise Problem(f"{base} and {merged}: not the same prompts; generate again")
    return [
        {
            "question": row["prompt"],
            "base": found[0][id]["answer"],
            "merged": row["answer"],
            "stopped": row["finish_reason"] == "stop",
        }
        for id, row in found[1].items()
    ]


def _by_id(path: Path) -> dict[str, dict[str, Any]]:
    return {row["id"]: row for row in read_jsonl(path)}


def _question(row: dict[str, Any]) -> str:
    return "\n".join(message["content"] for message in row["messages"][:-1])


# All answers


def _gain(
    better: list[dict[str, float | None]], worse: list[dict[str, float | None]], metric: str, params: Params
) -> Interval | None:
    pairs = [(a[metric], b[metric]) for a, b in zip(better, worse, strict=True)]
    return _interval([a - b for a, b in pairs if a is not None and b is not None], params)


def _groups(
    rows: list[dict[str, Any]], scores: dict[str, list[dict[str, float | None]]], params: Params
) -> dict[str, dict[str, Any]]:
    """Rows, and the models' exact match and ROUGE-L, by language and by source file, where there are several."""
    languages = _members("Chinese" if is_chinese(row["question"] + row["reference"]) else "other" for row in rows)
    files = _members(row["source"].rpartition(":")[0] for row in rows)
    files = dict(sorted(files.items(), key=lambda item: -len(item[1]))[:SHOWN_GROUPS])
    return {
        name: {
            "rows": len(numbers),
            **{
                f"{system}_{metric}": _interval([scores[system][number][metric] for number in numbers], params)
                for system in MODELS
                for metric in ("exact_match", "rouge_l")
            },
        }
        for name, numbers in (languages | files).items()
    }


def _members(names: Iterable[str]) -> dict[str, list[int]]:
    """The numbers of the rows of each name; nothing if all have the same."""
    members: dict[str, list[int]] = {}
    for number, name in enumerate(names):
        members.setdefault(name, []).append(number)
    return members if len(members) > 1 else {}


def _interval(values: Sequence[float | None], params: Params) -> Interval | None:
    known = [value for value in values if value is not None]
    return bootstrap(known, params.bootstrap_resamples) if known else None


def _metrics(stages: dict[str, Any], summary: dict[str, dict[str, Interval | None]]) -> dict[str, Any]:
    """The handful of figures that tell runs apart; exact match in percent."""
    exact = {system: summary[system]["exact_match"] for system in SYSTEMS}
    return {
        "rows": stages["train"]["rows"],
        "tokens": stages["train"]["tokens"],
        "loss_base": _short(stages["train"]["validation_loss_before"]),
        "loss": _short(stages["train"]["validation_loss"]),
        "merge_kl": _short(stages["merge"]["mean_kl"]),
        **{f"em_{system}": round(100 * interval.mean, 1) for system, interval in exact.items() if interval},
    }


def _short(value: float) -> float:
    """Four significant digits: `dvc exp show` prints no more, and the last bits are no news."""
    return value if value == 0 or not math.isfinite(value) else float(f"{value:.4g}")


def _bars(summary: dict[str, dict[str, Interval | None]]) -> str:
    lines = [
        f"{metric}: {SHORT[system]},{100 * interval.mean:.2f}"
        for system, metrics in summary.items()
        for metric, interval in metrics.items()
        if interval and metric in PRINTED
    ]
    return "score,percent\n" + "".join(f"{line}\n" for line in lines)


def _page(
    reports: Path,
    stages: dict[str, Any],
    summary: dict[str, dict[str, Interval | None]],
    gains: dict[str, dict[str, Interval | None]],
    groups: dict[str, dict[str, Any]],
    rows: list[dict[str, Any]],
    scores: dict[str, list[dict[str, float | None]]],
    further: list[dict[str, Any]],
    params: Params,
    judged: Interval | None,
) -> str:
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    sides = [row | {"scores": {system: scores[system][number] for system in SYSTEMS}} for number, row in enumerate(rows)]
    sides.sort(key=lambda row: (row["scores"]["merged"]["exact_match"], row["scores"]["merged"]["chrf"]))
    return environment.from_string(PAGE.read_text(encoding="utf-8")).render(
        systems=SYSTEMS,
        metrics={metric: meaning for metric, meaning in METRICS.items() if summary["merged"][metric]},
        signature=bleu_signature([row["reference"] for row in rows]),
        groups=groups,
        further=further,
        params=params,
        judged=judged,
        summary=summary,
        gains=gains,
        stages=stages,
        rows=sides,
        train_curve=_curve(reports / "loss" / "train.csv"),
        validation_curve=_curve(reports / "loss" / "validation.csv"),
        lengths=_bins(reports / "lengths.csv"),
    )


def _curve(path: Path) -> list[tuple[float, float]]:
    lines = path.read_text(encoding="utf-8").splitlines()[1:]
    return [(float(x), float(y)) for x, y in (line.split(",") for line in lines)]


def _bins(path: Path) -> list[tuple[float, float]]:
    """The histogram as (longest length of the range, rows)."""
    lines = path.read_text(encoding="utf-8").splitlines()[1:]
    return [(float(range_.split("-")[1]), float(rows)) for range_, rows in (line.split(",") for line in lines)]


def _print(summary: dict[str, dict[str, Interval | None]], gains: dict[str, dict[str, Interval | None]], count: int) -> None:
    metrics = [metric for metric in PRINTED if summary["merged"][metric]]
    table = Table(title=f"{count} test rows, mean and 95 % interval, in percent")
    table.add_column("")
    for metric in metrics:
        table.add_column(metric, justify="right")
    for system, name in SYSTEMS.items():
        table.add_row(name, *(_cell(summary[system][metric]) for metric in metrics))
    console = Console(width=120)
    console.print(table)
    for other, gain in gains.items():
        console.print(f"exact match, fine-tuned minus {SYSTEMS[other]}: {_cell(gain['exact_match'])} points")


def _cell(interval: Interval | None) -> str:
    return "" if interval is None else f"{100 * interval.mean:.1f} ({100 * interval.low:.1f} to {100 * interval.high:.1f})"
