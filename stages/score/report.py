"""The report of one run: a single HTML file that needs no network, and stays small whatever the number of rows."""

import csv
import hashlib
import heapq
import html
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from stages.score.groups import Groups
from stages.score.intervals import Interval
from stages.score.judge import JudgeResult
from stages.score.metrics import METRICS, bleu_signature
from stages.score.perplexity import Perplexity
from stages.score.predictions import PredictedRow, Prediction, Predictions
from stages.score.rows import Scores
from stages.score.systems import SYSTEMS
from stages.score.table import Counts

TEMPLATE = Path(__file__).with_name("report.html.jinja")
MAX_ROWS = 500
"""With more test rows, the page shows only the SHOWN ones of each kind."""
SHOWN = {"worst": 200, "best": 100, "random": 200}
SHOWN_PROMPTS = 50
"""The first of data/prompts.json."""
SHOWN_REASONS = 30
"""The most frequent reasons for rejected rows, of each stage."""
MAX_TEXT_BYTES, MAX_CHARACTERS, MIN_CHARACTERS = 3_500_000, 10_000, 100
"""Longer texts are cut: those longer than MAX_CHARACTERS, or fewer, so that all together fit into these bytes."""
CURVE_PARTS = 200
"""A curve with more points is drawn by the first, lowest, highest and last point of each part, as M4 (Jugel et al. 2014)."""

Point = tuple[float, float]


class ShownRow(NamedTuple):
    """A row of the page."""

    row: PredictedRow
    kind: str
    """A key of SHOWN; "" if all rows are shown."""
    right: bool


def render_report(
    reports: Path,
    stages: Mapping[str, Any],
    *,
    predictions: Predictions,
    scores: Scores,
    summary: Mapping[str, Mapping[str, Interval | None]],
    differences: Mapping[str, Mapping[str, Interval | None]],
    groups: Groups,
    judged: JudgeResult | None,
    perplexity: Perplexity | None,
    counts: Counts,
    files: Mapping[str, str],
) -> str:
    """The report as HTML; the rows with the worst answers of the fine-tuned model come first.

    Args:
        reports: The folder with the loss curves and the histogram of the lengths.
        stages: Stage → its report, for ingest, encode, train and merge.
        scores: The scores of each row.
        summary: System → metric → mean over the rows.
        differences: Other system → metric → fine-tuned model minus that system, paired by row.
        counts: What the scores are of.
        files: Where what the page leaves out stands: "rows", "answers" and "extra".
    """
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    rows = choose_shown(predictions, scores)
    extra = predictions.extra[:SHOWN_PROMPTS]
    reasons = {stage: stages[stage]["rejected_by_reason"] for stage in ("ingest", "encode")}
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        stages=stages,
        systems=SYSTEMS,
        metrics={metric: meaning for metric, meaning in METRICS.items() if summary["merged"][metric]},
        summary=summary,
        differences=differences,
        bleu_signature=bleu_signature(chinese=scores.chinese_references) if rows else "",
        thinking=scores.thinking,
        unread_calls=scores.unread_calls,
        perplexity=perplexity,
        groups=groups,
        judged=judged,
        counts=counts,
        row_total=len(predictions.rows),
        rows=rows,
        shown=SHOWN if len(predictions.rows) > MAX_ROWS else {},
        extra=extra,
        extra_total=len(predictions.extra),
        files=files,
        limit=fit_texts([*_texts_of_rows(rows), *_texts_of_prompts(extra)]),
        reasons={stage: sorted(found.items(), key=lambda item: -item[1]) for stage, found in reasons.items()},
        shown_reasons=SHOWN_REASONS,
        train_curve=thin(_read_curve(reports / "loss" / "train.csv")),
        validation_curve=thin(_read_curve(reports / "loss" / "validation.csv")),
        lengths=thin(_read_histogram(reports / "lengths.csv")),
    )


def choose_shown(predictions: Predictions, scores: Scores) -> list[ShownRow]:
    """The rows of the page, from the worst answer of the fine-tuned model to the best.

    The choice is stable: among equal rows, and for the random ones, the sha256 of the ids decides.
    """
    ids, right = predictions.rows.ids, scores.of("merged", "exact_match") == 1
    digests = [hashlib.sha256(id.encode()).digest() for id in ids]
    ranks = list(zip(right.tolist(), scores.of("merged", "chrf").tolist(), digests, strict=True))
    kinds = dict.fromkeys(range(len(ids)), "")
    if len(ids) > MAX_ROWS:
        kinds = dict.fromkeys(heapq.nsmallest(SHOWN["worst"], range(len(ids)), key=ranks.__getitem__), "worst")
        kinds |= dict.fromkeys(heapq.nlargest(SHOWN["best"], range(len(ids)), key=ranks.__getitem__), "best")
        others = (number for number in range(len(ids)) if number not in kinds)
        kinds |= dict.fromkeys(heapq.nsmallest(SHOWN["random"], others, key=digests.__getitem__), "random")
    numbers = sorted(kinds, key=ranks.__getitem__)
    rows = (lines.parse() for lines in predictions.rows.lines(numbers))
    return [ShownRow(row, kinds[number], bool(right[number])) for number, row in zip(numbers, rows, strict=True)]


def fit_texts(texts: Sequence[str]) -> int:
    """The number of characters at which texts are cut, so that all together take at most MAX_TEXT_BYTES of the page."""
    limit = MAX_CHARACTERS
    while limit > MIN_CHARACTERS and sum(len(html.escape(text[:limit]).encode()) for text in texts) > MAX_TEXT_BYTES:
        limit = max(MIN_CHARACTERS, limit * 4 // 5)
    return limit


def thin(points: Sequence[Point]) -> list[Point]:
    """Points that draw the same line as many points do, without those that are no numbers."""
    finite = [point for point in points if math.isfinite(point[1])]
    if len(finite) <= 4 * CURVE_PARTS:
        return finite
    found = list[Point]()
    for at in range(CURVE_PARTS):
        part = finite[at * len(finite) // CURVE_PARTS : (at + 1) * len(finite) // CURVE_PARTS]
        found += sorted({part[0], min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1]), part[-1]})
    return found


def _texts_of_rows(rows: Sequence[ShownRow]) -> list[str]:
    parts = [part for shown in rows for part in (shown.row.reference, shown.row.base.split, shown.row.merged.split)]
    return [*(shown.row.question for shown in rows), *(text for part in parts for text in (part.thinking, part.answer))]


def _texts_of_prompts(extra: Sequence[tuple[Prediction, Prediction]]) -> list[str]:
    parts = [part for pair in extra for part in (pair[0].split, pair[1].split)]
    return [*(merged.prompt for _, merged in extra), *(text for part in parts for text in (part.thinking, part.answer))]


def _read_curve(path: Path) -> list[tuple[float, float]]:
    """(optimizer step, loss per token)."""
    with path.open(encoding="utf-8", newline="") as file:
        return [(float(row["step"]), float(row["loss"])) for row in csv.DictReader(file)]


def _read_histogram(path: Path) -> list[tuple[float, float]]:
    """(upper end of the range of lengths in tokens, number of rows)."""
    with path.open(encoding="utf-8", newline="") as file:
        return [(float(row["tokens"].split("-")[1]), float(row["rows"])) for row in csv.DictReader(file)]
