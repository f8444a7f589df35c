"""Scores the answers of the base model and of the fine-tuned model against the references, and against two baselines."""

import csv
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from stages.core.jsonl import read_json, write_json
from stages.core.output import Done, fresh_file
from stages.core.params import Section
from stages.score.baselines import find_baselines
from stages.score.groups import score_groups
from stages.score.intervals import RESAMPLES, Interval, mean_intervals
from stages.score.judge import judge_rows
from stages.score.metrics import HEADLINE, METRICS
from stages.score.perplexity import Perplexity, measure_perplexity
from stages.score.predictions import Predictions, read_predictions
from stages.score.report import render_report
from stages.score.rows import Scores, score_rows
from stages.score.systems import MODELS, SHORT_NAMES, SYSTEMS
from stages.score.table import Counts, count_of, print_table


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
    rows: Path,
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
        rows: Gets every test row with its scores, as CSV for a spreadsheet.

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
    train = examples / "train.jsonl"
    with (
        fresh_file(rows) as table_file,
        fresh_file(metrics) as metrics_file,
        fresh_file(bars) as bars_file,
        fresh_file(page) as page_file,
    ):
        baselines = find_baselines(train, predictions.rows.questions())
        scores = score_rows(predictions.rows, baselines, train=train, table=table_file)
        summary, differences = summarize(scores)
        groups = score_groups(scores)
        perplexity = measure_perplexity(predictions.text_losses)
        judged = None
        if params.judge_url and predictions.rows:
            judged = judge_rows(predictions.rows[: params.judge_rows], url=params.judge_url, model=params.judge_model)
        counts = count_scored(predictions, stages["encode"], perplexity)
        write_json(metrics_file, run_metrics(stages, summary, perplexity))
        write_plot_scores(bars_file, summary, perplexity)
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
            counts=counts,
            files={
                "rows": f"{rows}",
                "answers": f"{base_predictions} and {merged_predictions}",
                "extra": f"{base_extra} and {merged_extra}",
            },
        )
        page_file.write_text(report, encoding="utf-8", newline="\n")
    print_table(summary, differences, counts=counts, perplexity=perplexity)
    return Done(f"{' and '.join(filter(None, counts)) or 'no test rows'}; open {page}")


def count_scored(predictions: Predictions, encoded: Mapping[str, Any], perplexity: Perplexity | None) -> Counts:
    """What the scores are of; `generate` may have answered only some of the test prompts, and read some of the raw texts."""
    count, all_windows = len(predictions.rows), len(predictions.text_losses["merged"]) >= encoded["test_text_windows"]
    texts = perplexity.documents if perplexity else 0
    return Counts(
        rows=f"{count_of(count, encoded['test_rows'])} test rows" if count else "",
        texts=f"{count_of(texts, texts if all_windows else predictions.texts)} raw texts" if texts else "",
    )


def summarize(
    scores: Scores,
) -> tuple[dict[str, dict[str, Interval | None]], dict[str, dict[str, Interval | None]]]:
    """System → metric → mean; and other system → metric → the mean of fine-tuned model minus that system, row by row.

    Pairing the rows takes out what makes a row hard for both systems, so the interval is narrower than that of two means.
    """
    others = [system for system in SYSTEMS if system != "merged"]
    columns = [scores.of(system, metric) for system in SYSTEMS for metric in METRICS]
    columns += [scores.of("merged", metric) - scores.of(other, metric) for other in others for metric in METRICS]
    intervals = iter(mean_intervals(np.stack(columns, 1), "intervals"))
    summary = {system: {metric: next(intervals) for metric in METRICS} for system in SYSTEMS}
    return summary, {other: {metric: next(intervals) for metric in METRICS} for other in others}


def run_metrics(
    stages: Mapping[str, Any], summary: Mapping[str, Mapping[str, Interval | None]], perplexity: Perplexity | None
) -> dict[str, Any]:
    """The few figures that distinguish runs: em_ is exact match in percent, calls_ the share of rows with exact calls.

    quantization_cost is by how much quantizing the base raised its loss before the training, in nats per token.
    """
    cost = (stages["merge"]["quantization_cost"] or {}).get("cost")
    exact_match = {system: summary[system]["exact_match"] for system in SYSTEMS}
    calls = {system: summary[system]["call_exact"] for system in MODELS}
    return {
        "rows": stages["train"]["rows"],
        "tokens": stages["train"]["tokens"],
        "loss_base": _four_digits(stages["train"]["validation_loss_before"]),
        "loss": _four_digits(stages["train"]["validation_loss"]),
        "merge_kl": _four_digits(stages["merge"]["mean_kl"]),
        **({} if cost is None else {"quantization_cost": _four_digits(cost)}),
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
