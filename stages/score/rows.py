"""The scores of all systems row by row, computed on all cores."""

import csv
import io
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeAlias

import numpy as np

from stages.core.jsonl import parse_line
from stages.core.progress import ProgressBar
from stages.score.baselines import Baselines, TrainingAnswer, answer_of
from stages.score.calls import parse_calls
from stages.score.intervals import Floats
from stages.score.metrics import METRICS, RowScores, forget_texts, is_chinese, no_scores, score_answer
from stages.score.predictions import PredictedRow, PredictedRows, Prediction, RowLines, line_at
from stages.score.systems import MODELS, SYSTEMS
from stages.score.workers import run_tasks

Integers: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]
Flags: TypeAlias = np.ndarray[Any, np.dtype[np.bool_]]

CHUNK_ROWS = 50
"""Rows that one task scores."""
MIN_ROWS = 1000
"""With fewer rows, starting worker processes takes longer than it saves."""
TABLE_CHARACTERS = 2000
"""Longer texts are cut in the table of all rows; data/predictions has them whole."""
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")
"""A spreadsheet takes a text that begins so for a formula, also one in quotes."""
TABLE_COLUMNS = (
    *("id", "source", "question", "reference", "base", "fine_tuned"),
    *(f"{name}_{metric}" for name in ("base", "fine_tuned") for metric in METRICS),
)


class RowFacts(NamedTuple):
    """What the report counts of a row."""

    file: str
    """The source file."""
    chinese: bool
    """Whether the question or the reference has a Chinese character."""
    chinese_reference: bool
    thinking: tuple[bool, bool, bool]
    """Whether there is thinking in the reference, the base model's answer and the fine-tuned model's."""
    thinking_cut: bool
    """Whether any of the three never ends."""
    unread_calls: bool
    """Whether the row has tools, but its calls could not be read from the reference."""


class Scores(NamedTuple):
    """The scores of all rows."""

    values: Floats
    """(rows, systems, metrics) In the order of SYSTEMS and METRICS; NaN where the metric does not apply to the row."""
    chinese: Flags
    """(rows,) Whether the question or the reference has a Chinese character."""
    files: Integers
    """(rows,) The position of the source file in `file_names`."""
    file_names: list[str]
    thinking: dict[str, int] | None
    """The rows with thinking in the reference and in each model's answer; None if there is none at all."""
    unread_calls: int
    """The rows with tools whose calls could not be read from the reference."""
    chinese_references: bool
    """Whether any reference has a Chinese character."""

    def of(self, system: str, metric: str) -> Floats:
        """(rows,) One metric of one system."""
        values: Floats = self.values[:, list(SYSTEMS).index(system), list(METRICS).index(metric)]
        return values


class ChunkTask(NamedTuple):
    """Some test rows, not yet parsed."""

    rows: list[RowLines]
    nearest: list[bytes]
    """For each row, the line of the training example with the nearest prompt; empty without baselines."""


class Chunk(NamedTuple):
    """The scores of the rows of a ChunkTask."""

    values: Floats
    """(rows, systems, metrics)"""
    facts: list[RowFacts]
    table: str
    """The lines of the table."""


def score_rows(rows: PredictedRows, baselines: Baselines | None, *, train: Path, table: Path) -> Scores:
    """Scores the answers of both models and of both baselines to each row.

    Args:
        rows: What both models answered.
        baselines: Where the answers of the baselines stand; None if there are none.
        train: data/examples/train.jsonl.
        table: Gets each row with the scores of both models, as CSV. Texts that begin as a formula does (FORMULA_STARTS)
            get an apostrophe before them.
    """
    most_frequent = None
    if baselines:
        with train.open("rb") as file:
            most_frequent = _training_answer(line_at(file, baselines.most_frequent))
    values, chinese = np.empty((len(rows), len(SYSTEMS), len(METRICS))), np.empty(len(rows), bool)
    files, numbers = np.empty(len(rows), np.int64), dict[str, int]()
    counts, done = Counter[str](), 0
    tasks = _tasks(rows, baselines, train)
    chunks = run_tasks(_score_chunk, tasks, shared=most_frequent, alone=len(rows) < MIN_ROWS)
    with table.open("w", encoding="utf-8-sig", newline="") as out, ProgressBar("score", len(rows)) as bar:
        _table_writer(out).writerow(TABLE_COLUMNS)
        for chunk in chunks:
            values[done : done + len(chunk.values)] = chunk.values
            for facts in chunk.facts:
                chinese[done], files[done] = facts.chinese, numbers.setdefault(facts.file, len(numbers))
                counts.update(name for name, thinks in zip(("reference", *MODELS), facts.thinking, strict=True) if thinks)
                counts.update(name for name in ("thinking_cut", "unread_calls", "chinese_reference") if getattr(facts, name))
                done += 1
            out.write(chunk.table)
            bar.update(len(chunk.values))
    thinking = {name: counts[name] for name in ("reference", *MODELS)}
    if not any(thinking.values()) and not counts["thinking_cut"]:  # in a run without thinking its metrics say nothing
        values[:, :, [list(METRICS).index(metric) for metric in ("thinking", "thinking_cut")]] = np.nan
    return Scores(
        values,
        chinese,
        files,
        list(numbers),
        thinking if any(thinking.values()) else None,
        counts["unread_calls"],
        bool(counts["chinese_reference"]),
    )


def score_prediction(row: PredictedRow, prediction: Prediction) -> RowScores:
    """The scores of a model's answer."""
    answer = prediction.split.answer
    return score_answer(
        row.reference.answer,
        answer,
        finish_reason=prediction.finish_reason,
        calls=None if row.wanted_calls is None else (row.wanted_calls, parse_calls(answer)),
        thinking=prediction.split,
    )


def score_baseline(row: PredictedRow, answer: TrainingAnswer) -> RowScores:
    """The scores of a training answer. One that says the same as the reference is written as the template writes that."""
    text = row.reference.answer if answer.text.strip() == answer_of(row.message).text.strip() else answer.text
    calls = None if row.wanted_calls is None else (row.wanted_calls, answer.calls)
    return score_answer(row.reference.answer, text, finish_reason=None, calls=calls)


def _tasks(rows: PredictedRows, baselines: Baselines | None, train: Path) -> Iterator[ChunkTask]:
    lines, done = rows.lines(), 0
    with train.open("rb") as file:
        while chunk := list(islice(lines, CHUNK_ROWS)):
            places = baselines.nearest[done : done + len(chunk)].tolist() if baselines else []
            yield ChunkTask(chunk, [line_at(file, place) for place in places])
            done += len(chunk)


def _score_chunk(most_frequent: TrainingAnswer | None, task: ChunkTask) -> Chunk:
    values = np.empty((len(task.rows), len(SYSTEMS), len(METRICS)))
    facts, table = [], io.StringIO()
    writer = _table_writer(table)
    for number, lines in enumerate(task.rows):
        row = lines.parse()
        scores = {"base": score_prediction(row, row.base), "merged": score_prediction(row, row.merged)}
        if most_frequent and task.nearest:
            scores["most_frequent"] = score_baseline(row, most_frequent)
            scores["nearest"] = score_baseline(row, _training_answer(task.nearest[number]))
        for at, system in enumerate(SYSTEMS):
            found = scores.get(system) or no_scores()
            values[number, at] = [np.nan if value is None else value for value in found.values()]
        facts.append(_facts_of(row))
        texts = (row.question, row.reference.answer, row.base.split.answer, row.merged.split.answer)
        figures = ("" if value is None else f"{value:.4g}" for model in MODELS for value in scores[model].values())
        writer.writerow([*map(_no_formula, (lines.id, row.source, *map(_cut, texts))), *figures])
    forget_texts()
    return Chunk(values, facts, table.getvalue())


def _facts_of(row: PredictedRow) -> RowFacts:
    parts = (row.reference, row.base.split, row.merged.split)
    return RowFacts(
        file=row.source.rpartition(":")[0],
        chinese=is_chinese(row.question + row.reference.answer),
        chinese_reference=is_chinese(row.reference.answer),
        thinking=(bool(parts[0].thinking), bool(parts[1].thinking), bool(parts[2].thinking)),
        thinking_cut=any(part.cut for part in parts),
        unread_calls=row.has_tools and row.wanted_calls is None,
    )


def _table_writer(file: IO[str]) -> Any:
    # A lone "\r" ends a line for readers, and csv does not quote a text for it unless the line terminator has it.
    return csv.writer(file, lineterminator="\n", quoting=csv.QUOTE_ALL)


def _no_formula(text: str) -> str:
    return f"'{text}" if text.startswith(FORMULA_STARTS) else text


def _cut(text: str) -> str:
    left_out = len(text) - TABLE_CHARACTERS
    return text if left_out <= 0 else f"{text[:TABLE_CHARACTERS]} … {left_out:,} more characters"


def _training_answer(line: bytes) -> TrainingAnswer:
    return answer_of(parse_line(line)["messages"][-1])
