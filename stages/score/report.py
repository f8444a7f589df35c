"""The report of one run: a single HTML file that needs no network."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from stages.score.intervals import Interval
from stages.score.judge import JudgeResult
from stages.score.metrics import METRICS, RowScores, bleu_signature
from stages.score.perplexity import Perplexity
from stages.score.predictions import PredictedRow, Predictions
from stages.score.systems import SYSTEMS

TEMPLATE = Path(__file__).with_name("report.html.jinja")


def render_report(
    reports: Path,
    stages: Mapping[str, Any],
    *,
    predictions: Predictions,
    scores: Mapping[str, Sequence[RowScores]],
    summary: Mapping[str, Mapping[str, Interval | None]],
    differences: Mapping[str, Mapping[str, Interval | None]],
    groups: Mapping[str, Mapping[str, Any]],
    judged: JudgeResult | None,
    perplexity: Perplexity | None,
) -> str:
    """The report as HTML; the rows with the worst answers of the fine-tuned model come first.

    Args:
        reports: The folder with the loss curves and the histogram of the lengths.
        stages: Stage → its report, for ingest, encode, train and merge.
        scores: System → the scores of each row.
        summary: System → metric → mean over the rows.
        differences: Other system → metric → fine-tuned model minus that system, paired by row.
        groups: What `score_groups` returns.
    """
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    rows = list(zip(predictions.rows, scores["merged"], strict=True))
    rows.sort(key=lambda pair: (pair[1]["exact_match"], pair[1]["chrf"]))
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        stages=stages,
        systems=SYSTEMS,
        metrics={metric: meaning for metric, meaning in METRICS.items() if summary["merged"][metric]},
        summary=summary,
        differences=differences,
        bleu_signature=bleu_signature([row.reference.answer for row in predictions.rows]) if rows else "",
        thinking=_thinking_counts(predictions.rows),
        unread_calls=sum(row.has_tools and row.wanted_calls is None for row in predictions.rows),
        perplexity=perplexity,
        groups=groups,
        judged=judged,
        rows=rows,
        extra=predictions.extra,
        train_curve=_read_curve(reports / "loss" / "train.csv"),
        validation_curve=_read_curve(reports / "loss" / "validation.csv"),
        lengths=_read_histogram(reports / "lengths.csv"),
    )


def _thinking_counts(rows: Sequence[PredictedRow]) -> dict[str, int] | None:
    """The rows with thinking in the reference and in each model's answer; None if there is none at all."""
    counts = {
        "reference": sum(bool(row.reference.thinking) for row in rows),
        "base": sum(bool(row.base.split.thinking) for row in rows),
        "merged": sum(bool(row.merged.split.thinking) for row in rows),
    }
    return counts if any(counts.values()) else None


def _read_curve(path: Path) -> list[tuple[float, float]]:
    """(optimizer step, loss per token)."""
    with path.open(encoding="utf-8", newline="") as file:
        return [(float(row["step"]), float(row["loss"])) for row in csv.DictReader(file)]


def _read_histogram(path: Path) -> list[tuple[float, float]]:
    """(upper end of the range of lengths in tokens, number of rows)."""
    with path.open(encoding="utf-8", newline="") as file:
        return [(float(row["tokens"].split("-")[1]), float(row["rows"])) for row in csv.DictReader(file)]
