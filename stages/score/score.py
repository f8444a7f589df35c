"""Scores the answers of the base model and of the fine-tuned model against the references, and against two baselines."""

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from stages.core.jsonl import read_json, read_jsonl, write_json
from stages.core.output import Done, fresh_file
from stages.core.params import Section
from stages.core.progress import progress
from stages.score.baselines import most_frequent_answer, nearest_answers
from stages.score.groups import score_groups
from stages.score.intervals import RESAMPLES, Interval, mean_interval
from stages.score.judge import judge_rows
from stages.score.metrics import HEADLINE, METRICS, RowScores, score_answer
from stages.score.predictions import PredictedRow, read_predictions
from stages.score.report import render_report
from stages.score.systems import SHORT_NAMES, SYSTEMS
from stages.score.table import print_table


class Params(Section):
    """The optional judge."""

    judge_url: str = Field(pattern=r"^(https?://\S+)?$")
    """Root of an OpenAI-compatible endpoint that compares the answers of base and fine-tuned model; "": no judge."""
    judge_model: str
    """The endpoint's name for the model that judges."""
    judge_rows: int = Field(gt=0)
    """Number of test rows to judge, from the first; two questions for each."""

    removed: ClassVar[Mapping[str, str]] = {
        "bootstrap_resamples": f"delete this line, the intervals always use {RESAMPLES} resamples"
    }


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
    """Scores the answers of both models to the test prompts, with 95 % intervals.

    Args:
        examples: The folder of `ingest`; its training rows give the answers of the two baselines.
        base_predictions: Answers of the base model to the test prompts.
        merged_predictions: Answers of the fine-tuned model.
        base_extra: Answers of the base model to data/prompts.json, which the report shows without a score.
        merged_extra: Answers of the fine-tuned model to the same prompts.
        reports: The folder with the reports of the earlier stages.
        metrics: Gets the few figures that `dvc exp show` compares runs by.
        bars: Gets the headline scores for DVC's plot.
        page: Gets the report.

    Raises Problem if a file of predictions is damaged, or if the files do not answer the same prompts.
    """
    stages = {stage: read_json(reports / f"{stage}.json") for stage in ("ingest", "encode", "train", "merge")}
    predictions = read_predictions(
        {"base": base_predictions, "merged": merged_predictions},
        {"base": base_extra, "merged": merged_extra},
        test_examples=examples / "test.jsonl",
        test_rows=stages["encode"]["test_rows"],
    )
    rows = predictions.rows
    train_examples = read_jsonl(examples / "train.jsonl")
    answers = {
        "base": [row.base.answer for row in rows],
        "most_frequent": [most_frequent_answer(train_examples)] * len(rows),
        "nearest": nearest_answers(train_examples, [row.question for row in rows]),
        "merged": [row.merged.answer for row in rows],
    }
    scores = score_rows(rows, answers)
    summary = {
        system: {metric: mean_interval(row[metric] for row in scores[system]) for metric in METRICS} for system in SYSTEMS
    }
    differences = {
        other: {metric: paired_difference(scores["merged"], scores[other], metric=metric) for metric in METRICS}
        for other in SYSTEMS
        if other != "merged"
    }
    groups = score_groups(rows, scores)
    judged = None
    if params.judge_url:
        judged = judge_rows(rows[: params.judge_rows], url=params.judge_url, model=params.judge_model)
    with fresh_file(metrics) as file:
        write_json(file, run_metrics(stages, summary))
    with fresh_file(bars) as file:
        write_plot_scores(file, summary)
    with fresh_file(page) as file:
        report = render_report(
            reports,
            stages,
            predictions=predictions,
            scores=scores,
            summary=summary,
            differences=differences,
            groups=groups,
            judged=judged,
        )
        file.write_text(report, encoding="utf-8", newline="\n")
    print_table(summary, differences, row_count=len(rows))
    return Done(f"{len(rows):,} test rows; open {page}")


def score_rows(rows: Sequence[PredictedRow], answers: Mapping[str, Sequence[str]]) -> dict[str, list[RowScores]]:
    """System → the scores of its answer to each row."""
    scores: dict[str, list[RowScores]] = {system: [] for system in SYSTEMS}
    for number, row in enumerate(progress(rows, "score", total=len(rows))):
        finish_reasons = {"base": row.base.finish_reason, "merged": row.merged.finish_reason}
        for system in SYSTEMS:
            found = score_answer(row.reference, answers[system][number], finish_reason=finish_reasons.get(system))
            scores[system].append(found)
    return scores


def paired_difference(scores: Sequence[RowScores], others: Sequence[RowScores], *, metric: str) -> Interval | None:
    """The mean difference of a metric between two systems, row by row.

    Pairing the rows takes out what makes a row hard for both systems, so the interval is narrower than that of two means.
    """
    pairs = [(row[metric], other[metric]) for row, other in zip(scores, others, strict=True)]
    return mean_interval(a - b for a, b in pairs if a is not None and b is not None)


def run_metrics(stages: Mapping[str, Any], summary: Mapping[str, Mapping[str, Interval | None]]) -> dict[str, Any]:
    """The few figures that distinguish runs; em_ is exact match in percent."""
    exact_match = {system: summary[system]["exact_match"] for system in SYSTEMS}
    return {
        "rows": stages["train"]["rows"],
        "tokens": stages["train"]["tokens"],
        "loss_base": _four_digits(stages["train"]["validation_loss_before"]),
        "loss": _four_digits(stages["train"]["validation_loss"]),
        "merge_kl": _four_digits(stages["merge"]["mean_kl"]),
        **{f"em_{system}": round(100 * interval.mean, 1) for system, interval in exact_match.items() if interval},
    }


def _four_digits(value: float) -> float:
    """Four significant digits, as many as `dvc exp show` prints."""
    return value if value == 0 or not math.isfinite(value) else float(f"{value:.4g}")


def write_plot_scores(path: Path, summary: Mapping[str, Mapping[str, Interval | None]]) -> None:
    """Writes the means of the headline metrics as CSV, one bar of the plot per line, in percent."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["score", "percent"])
        for system, metrics in summary.items():
            for metric, interval in metrics.items():
                if interval and metric in HEADLINE:
                    writer.writerow([f"{metric}: {SHORT_NAMES[system]}", f"{100 * interval.mean:.2f}"])
