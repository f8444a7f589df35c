"""Reads data/examples in chunks of lines, and encodes one chunk into an Arrow batch and its counts."""

from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from stages.core.jsonl import parse_line
from stages.core.problem import Rejection
from stages.core.tokens import IGNORE, PROMPTS, TRAINING, decode_answer
from stages.encode.masks_page import MarkedRow
from stages.encode.rows import RowMaker, TokenRow

SPLITS = ("train", "validation", "test")
ROWS_PER_CHUNK = 500
"""Rows that are encoded together and form one batch of the Arrow file, whatever the number of processes."""
PREVIEW_ROWS = 12
"""Training rows on the masks page."""
COUNTED = ("tokens_cut", "without_stop", "prompt_mismatch", "double_bos", "special_text", "unknown")
"""Fields of TokenRow that are summed over the rows."""


class ChunkTask(NamedTuple):
    """Consecutive lines of one split, not yet parsed."""

    split: str
    lines: list[bytes]
    preview: int
    """The number of rows to show on the masks page."""


class Chunk(NamedTuple):
    """The encoded rows of a ChunkTask."""

    split: str
    rows: int
    """Rows read: encoded and rejected."""
    batch: pa.RecordBatch
    rejected: list[dict[str, Any]]
    counts: Counter[str]
    first: dict[str, str]
    """For each count, the source of the first row that it counts."""
    lengths: np.ndarray[Any, np.dtype[np.int32]]
    """(encoded rows,) Tokens of each row."""
    preview: list[MarkedRow]


def count_rows(examples: Path) -> int:
    """The number of rows of all splits."""
    return sum(_count_lines(examples / f"{split}.jsonl") for split in SPLITS)


def read_tasks(examples: Path) -> Iterator[ChunkTask]:
    """All rows of all splits, in order."""
    for split in SPLITS:
        with (examples / f"{split}.jsonl").open("rb") as file:
            preview = PREVIEW_ROWS if split == "train" else 0
            while lines := list(islice(file, ROWS_PER_CHUNK)):
                yield ChunkTask(split, lines, preview)
                preview = 0


def encode_chunk(maker: RowMaker, task: ChunkTask) -> Chunk:
    """Encodes the rows of a task. Raises FastTokenizerMismatch."""
    examples = [parse_line(line) for line in task.lines]
    rejected: list[dict[str, Any]] = []
    rows: list[TokenRow] = []
    sources: list[str] = []
    first: dict[str, str] = {}
    for example, row in zip(examples, maker.rows(examples), strict=True):
        if isinstance(row, Rejection):
            entry = {"id": example["id"], "source": example["source"], "split": task.split}
            rejected.append(entry | {"reason": row.reason, "detail": row.detail})
            first.setdefault(row.reason, f"{example['source']}: {row.detail}")
        else:
            rows.append(row)
            sources.append(example["source"])
    counts = Counter(entry["reason"] for entry in rejected)
    counts["label_tokens"] = sum(end - start for row in rows for start, end in row.label_ranges)
    counts["rows_cut"] = sum(row.tokens_cut > 0 for row in rows)
    for name in COUNTED:
        values = [getattr(row, name) for row in rows]
        counts[name] = sum(values)
        if counts[name]:
            first[name] = next(source for source, value in zip(sources, values, strict=True) if value)
    return Chunk(
        split=task.split,
        rows=len(task.lines),
        batch=prompt_batch(maker, rows) if task.split == "test" else _training_batch(rows),
        rejected=rejected,
        counts=counts,
        first=first,
        lengths=np.array([len(row.ids) for row in rows], dtype=np.int32),
        preview=[(row.id, _marked_pieces(maker, row)) for row in rows[: task.preview]],
    )


def prompt_batch(maker: RowMaker, rows: list[TokenRow]) -> pa.RecordBatch:
    """The prompts of the rows, in the schema PROMPTS."""
    columns = [
        {
            "id": row.id,
            "prompt": maker.encoder.decode(row.ids[: row.prompt_length]),
            "prompt_ids": row.ids[: row.prompt_length],
            "reference": decode_answer(maker.encoder.tokenizer, _reference_ids(maker, row)) if row.reference else "",
        }
        for row in rows
    ]
    return pa.RecordBatch.from_pylist(columns, schema=PROMPTS)


def _reference_ids(maker: RowMaker, row: TokenRow) -> list[int]:
    """The tokens of the last answer, without its stop token and what the template writes after it."""
    ids: list[int] = row.ids[row.prompt_length :].tolist()
    stops = set(maker.stop_token_ids)
    end = next((place for place in reversed(range(len(ids))) if ids[place] in stops), len(ids))
    return ids[:end]


def _training_batch(rows: list[TokenRow]) -> pa.RecordBatch:
    lengths = np.array([0, *(len(row.ids) for row in rows)], dtype=np.int32)
    offsets = np.cumsum(lengths, dtype=np.int32)
    ids = np.concatenate([np.array([], dtype=np.int32), *(row.ids for row in rows)])
    labels = np.full_like(ids, IGNORE)
    for offset, row in zip(offsets.tolist(), rows, strict=False):
        for start, end in row.label_ranges:
            labels[offset + start : offset + end] = ids[offset + start : offset + end]
    return pa.RecordBatch.from_arrays(
        [
            pa.array([row.id for row in rows], pa.string()),
            pa.ListArray.from_arrays(pa.array(offsets), pa.array(ids), type=pa.list_(pa.int32())),
            pa.ListArray.from_arrays(pa.array(offsets), pa.array(labels), type=pa.list_(pa.int32())),
        ],
        schema=TRAINING,
    )


def _marked_pieces(maker: RowMaker, row: TokenRow) -> list[tuple[str, bool]]:
    """The row's text in pieces, each with whether it is in the loss."""
    pieces, at = [], 0
    for start, end in row.label_ranges:
        pieces += [(maker.encoder.decode(row.ids[at:start]), False), (maker.encoder.decode(row.ids[start:end]), True)]
        at = end
    return [*pieces, (maker.encoder.decode(row.ids[at:]), False)]


def _count_lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(1 for _ in file)
