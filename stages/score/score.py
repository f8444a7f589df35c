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
from stages.score.baselines import TrainingAnswer, answer_of, most_frequent_answer, nearest_answers
from stages.score.calls import parse_calls
from stages.score.groups import score_groups
from stages.score.intervals import RESAMPLES, Interval, mean_interval
from stages.score.judge import judge_rows
from stages.score.metrics import HEADLINE, METRICS, RowScores, no_scores, score_answer
from stages.score.perplexity import Perplexity, measure_perplexity
from stages.score.predictions import PredictedRow, Prediction, read_predictions
from stages.score.report import render_report
from stages.score.systems import MODELS, SHORT_NAMES, SYSTEMS
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
    base_text: Path,
    merged_text: Path,
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
        base_text: Losses of the base model on the raw text of the test split; may be empty.
        merged_text: Losses of the fine-tuned model on the same text.
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
        {"base": base_text, "merged": merged_text},
        test_examples=examples / "test.jsonl",
        test_rows=stages["encode"]["test_rows"],
    )
    rows = predictions.rows
    scores = score_rows(rows, baseline_answers(rows, examples / "train.jsonl"))
    perplexity = measure_perplexity(predictions.text_losses)
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
    if params.judge_url and rows:
        judged = judge_rows(rows[: params.judge_rows], url=params.judge_url, model=params.judge_model)
    with fresh_file(metrics) as file:
        write_json(file, run_metrics(stages, summary, perplexity))
    with fresh_file(bars) as file:
        write_plot_scores(file, summary, perplexity)
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
            perplexity=perplexity,
        )
        file.write_text(report, encoding="utf-8", newline="\n")
    print_table(summary, differences, row_count=len(rows), perplexity=perplexity)
    counted = [f"{len(rows):,} test rows"] if rows else []
    if perplexity:
        counted.append(f"{perplexity.documents:,} raw texts")
    return Done(f"{' and '.join(counted) or 'no test rows'}; open {page}")


def baseline_answers(rows: Sequence[PredictedRow], train: Path) -> dict[str, list[TrainingAnswer]]:
    """Baseline → its answer to each row; empty if there are no conversations to take one from."""
    examples = [example for example in read_jsonl(train) if "messages" in example] if rows else []
    if not examples:
        return {}
    return {
        "most_frequent": [most_frequent_answer(examples)] * len(rows),
        "nearest": nearest_answers(examples, [row.question for row in rows]),
    }


def score_rows(
    rows: Sequence[PredictedRow], baselines: Mapping[str, Sequence[TrainingAnswer]]
) -> dict[str, list[RowScores]]:
    """System → the scores of its answer to each row."""
    # In a run without thinking the metrics of thinking say nothing.
    thinks = any(part.thinking or part.cut for row in rows for part in (row.reference, row.base.split, row.merged.split))
    scores: dict[str, list[RowScores]] = {system: [] for system in SYSTEMS}
    for number, row in enumerate(progress(rows, "score", total=len(rows))):
        predicted = {"base": row.base, "merged": row.merged}
        for system in SYSTEMS:
            if system in predicted:
                found = score_prediction(row, predicted[system], thinks=thinks)
            elif system in baselines:
                found = score_baseline(row, baselines[system][number])
            else:
                found = no_scores()
            scores[system].append(found)
    return scores


def score_prediction(row: PredictedRow, prediction: Prediction, *, thinks: bool) -> RowScores:
    """The scores of a model's answer."""
    answer = prediction.split.answer
    return score_answer(
        row.reference.answer,
        answer,
        finish_reason=prediction.finish_reason,
        calls=None if row.wanted_calls is None else (row.wanted_calls, parse_calls(answer)),
        thinking=prediction.split if thinks else None,
    )


def score_baseline(row: PredictedRow, answer: TrainingAnswer) -> RowScores:
    """The scores of a training answer. One that says the same as the reference is written as the template writes that."""
    text = row.reference.answer if answer.text.strip() == answer_of(row.message).text.strip() else answer.text
    calls = None if row.wanted_calls is None else (row.wanted_calls, answer.calls)
    return score_answer(row.reference.answer, text, finish_reason=None, calls=calls)


def paired_difference(scores: Sequence[RowScores], others: Sequence[RowScores], *, metric: str) -> Interval | None:
    """The mean difference of a metric between two systems, row by row.

    Pairing the rows takes out what makes a row hard for both systems, so the interval is narrower than that of two means.
    """
    pairs = [(row[metric], other[metric]) for row, other in zip(scores, others, strict=True)]
    return mean_interval(a - b for a, b in pairs if a is not None and b is not None)


def run_metrics(
    stages: Mapping[str, Any], summary: Mapping[str, Mapping[str, Interval | None]], perplexity: Perplexity | None
) -> dict[str, Any]:
    """The few figures that distinguish runs: em_ is exact match in percent, calls_ the share of rows with exact calls."""
    exact_match = {system: summary[system]["exact_match"] for system in SYSTEMS}
    calls = {system: summary[system]["call_exact"] for system in MODELS}
    return {
        "rows": stages["train"]["rows"],
        "tokens": stages["train"]["tokens"],
        "loss_base": _four_digits(stages["train"]["validation_loss_before"]),
        "loss": _four_digits(stages["train"]["validation_loss"]),
        "merge_kl": _four_digits(stages["merge"]["mean_kl"]),
        **{f"em_{system}": round(100 * interval.mean, 1) for system, interval in exact_match.items() if interval},
        **{f"calls_{system}": round(100 * interval.mean, 1) for system, interval in calls.items() if interval},
        **(
            {
                "perplexity_base": _four_digits(perplexity.base.mean),
                "perplexity": _four_digits(perplexity.merged.mean),
            }
            if perplexity
            else {}
        ),
    }


def _four_digits(value: float) -> float:
    """Four significant digits, as many as `dvc exp show` prints."""
    return value if value == 0 or not math.isfinite(value) else float(f"{value:.4g}")


def write_plot_scores(
    path: Path, summary: Mapping[str, Mapping[str, Interval | None]], perplexity: Perplexity | None
) -> None:
    """Writes the means of the headline metrics as CSV, one bar of the plot per line, in percent.

    A perplexity is no percentage; its bars show that of each model as a share of the base model's.
    """
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["score", "percent"])
        for system, metrics in summary.items():
            for metric, interval in metrics.items():
                if interval and metric in HEADLINE:
                    writer.writerow([f"{metric}: {SHORT_NAMES[system]}", f"{100 * interval.mean:.2f}"])
        if perplexity:
            for system, share in (("base", 1.0), ("merged", perplexity.ratio.mean)):
                writer.writerow([f"perplexity relative to base: {SHORT_NAMES[system]}", f"{100 * share:.2f}"])
