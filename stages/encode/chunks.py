"""Reads data/examples in chunks of lines, and encodes one chunk into Arrow batches and its counts."""

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from stages.core.jsonl import parse_line
from stages.core.problem import Rejection
from stages.core.tokens import IGNORE, PROMPTS, TRAINING, decode_answer
from stages.encode.previews import Preview, Previews
from stages.encode.rows import RowMaker, TokenRow, TooLong

SPLITS = ("train", "validation", "test")
ROWS_PER_CHUNK = 500
"""Rows that are encoded together and form one batch of the Arrow file, whatever the number of processes."""
COUNTED = ("without_stop", "prompt_mismatch", "double_bos", "unknown")
"""Fields of TokenRow that are summed over the rows, and whose first rows are named."""
counted_of = attrgetter(*COUNTED)
REASON = "rejected: "
"""Before a reason in the names of counts."""
MIN_SAMPLED = 10_000
"""With fewer rows, encoding all of them takes a second or two, and no sample is looked at before."""
SAMPLE, SAMPLE_SHARE = 1000, 50
"""The sample has this many rows, but at most one row in SAMPLE_SHARE, so that it costs less than 2 % of the run."""


class ChunkTask(NamedTuple):
    """Lines of one split, not yet parsed."""

    split: str
    lines: list[bytes]


class Chunk(NamedTuple):
    """The encoded rows of a ChunkTask."""

    split: str
    rows: int
    """Lines read. Each is a conversation or a raw text, of which one or several rows are encoded or rejected."""
    batch: pa.RecordBatch
    text: pa.RecordBatch
    """The rows of raw text of the test split. Nothing is generated for them."""
    rejected: list[dict[str, Any]]
    """The lines of rejected.jsonl."""
    counts: Counter[str]
    """Sums over the rows, and numbers of conversations, also by reason of those with a rejected row."""
    first: dict[str, list[str]]
    """For each count, the first rows that it counts: "source", or "source: what was found"."""
    lengths: np.ndarray[Any, np.dtype[np.int32]]
    """(token rows,) Tokens of each row."""
    too_long: list[int]
    """Tokens of the longest row of each conversation that has one that is rejected for its length."""
    previews: list[Preview]
    """The first training rows of each kind."""


def count_rows(examples: Path) -> dict[str, int]:
    """The number of rows of each split."""
    return {split: _count_lines(examples / f"{split}.jsonl") for split in SPLITS}


def read_tasks(examples: Path) -> Iterator[ChunkTask]:
    """All rows of all splits, in order."""
    for split in SPLITS:
        with (examples / f"{split}.jsonl").open("rb") as file:
            while lines := list(islice(file, ROWS_PER_CHUNK)):
                yield ChunkTask(split, lines)


def read_sample(examples: Path, rows: dict[str, int]) -> list[ChunkTask]:
    """A sample of the rows of all splits: one row from each of equal parts, so that sorted files are covered too.

    It is a random row of its part, with a fixed seed, so that rows which alternate are covered too. Empty if there are too
    few rows for a sample to save time.
    """
    total = sum(rows.values())
    if total <= MIN_SAMPLED:
        return []
    size = min(SAMPLE, total // SAMPLE_SHARE)
    rng = random.Random(0)
    chosen = iter([number * total // size + rng.randrange(total // size) for number in range(size)])
    wanted, start, tasks = next(chosen), 0, []
    for split in SPLITS:
        lines = []
        with (examples / f"{split}.jsonl").open("rb") as file:
            for number, line in enumerate(file, start):
                if number == wanted:
                    lines.append(line)
                    wanted = next(chosen, -1)
        start += rows[split]
        tasks += [ChunkTask(split, lines[at : at + ROWS_PER_CHUNK]) for at in range(0, len(lines), ROWS_PER_CHUNK)]
    return tasks


def encode_chunk(maker: RowMaker, task: ChunkTask) -> Chunk:
    """Encodes the rows of a task. Raises FastTokenizerMismatch."""
    examples = [parse_line(line) for line in task.lines]
    rejected: list[dict[str, Any]] = []
    rows: list[TokenRow] = []
    counts: Counter[str] = Counter()
    first = FirstRows()
    too_long: list[int] = []
    conversations: list[list[TokenRow]] = []
    previews = Previews()
    for example, found in zip(examples, maker.rows(examples, task.split), strict=True):
        encoded = [row for row in found if isinstance(row, TokenRow)]
        if len(encoded) < len(found):
            rejected += _reject(example, task.split, found, counts, first, too_long)
        if encoded:
            rows += encoded
            conversations.append(encoded)
            if task.split == "train":
                previews.add(example, encoded)
    _count_conversations(conversations, counts, first)
    for row in rows:
        values = counted_of(row)
        if any(values):  # seldom; this loop runs once for every row
            for name, value in zip(COUNTED, values, strict=True):
                counts[name] += value
                if value:
                    first.add(name, row.source)
    counts["label_tokens"] += sum(end - start for row in rows for start, end in row.label_ranges)
    counts["tokens_cut"] += sum(row.tokens_cut for row in rows)
    counts["rows_cut"] += sum(row.tokens_cut > 0 for row in rows)
    text = [row for row in rows if row.format == "text"] if task.split == "test" else []
    prompts = [row for row in rows if row.format != "text"] if task.split == "test" else []
    return Chunk(
        split=task.split,
        rows=len(task.lines),
        batch=prompt_batch(maker, prompts) if task.split == "test" else _training_batch(rows),
        text=_training_batch(text),
        rejected=rejected,
        counts=counts,
        first=first.by_name,
        lengths=np.array([len(row.ids) for row in rows], dtype=np.int32),
        too_long=too_long,
        previews=list(previews),
    )


class FirstRows:
    """For each count, the first few rows that it counts."""

    NAMED = 3

    def __init__(self) -> None:
        self.by_name: dict[str, list[str]] = {}

    def add(self, name: str, *rows: str) -> None:
        """Adds rows, unless there are enough or a row of the same source is there."""
        named = self.by_name.setdefault(name, [])
        for row in rows:
            if len(named) < self.NAMED and _source(row) not in map(_source, named):
                named.append(row)


def _source(row: str) -> str:
    return row.partition(": ")[0]


def _reject(
    example: dict[str, Any],
    split: str,
    found: Sequence[TokenRow | Rejection],
    counts: Counter[str],
    first: FirstRows,
    too_long: list[int],
) -> list[dict[str, Any]]:
    """Counts the rejected rows of a conversation, once for each reason, and returns them as they are written."""
    entries = []
    for number, rejection in enumerate(found, 1):
        if isinstance(rejection, Rejection):
            name = example["id"] if len(found) == 1 else f"{example['id']}.{number}"  # as TokenRow.id
            entry = {"id": name, "source": example["source"], "split": split}
            entries.append(entry | {"reason": rejection.reason, "detail": rejection.detail})
            first.add(rejection.reason, f"{example['source']}: {rejection.detail}")
    counts["rejected"] += 1
    counts.update({f"{REASON}{entry['reason']}" for entry in entries})
    longest = max((row.tokens for row in found if isinstance(row, TooLong)), default=0)
    too_long += [longest] if longest else []
    return entries


def _count_conversations(conversations: Sequence[list[TokenRow]], counts: Counter[str], first: FirstRows) -> None:
    """Counts what is counted once for a conversation, however many rows it became."""
    first_rows = [rows[0] for rows in conversations]
    counts["conversations"] += len(first_rows)
    counts.update({f"format {name}": count for name, count in Counter(row.format for row in first_rows).items()})
    counts["with_thinking"] += sum(row.thinking for row in first_rows)
    counts["with_tools"] += sum(row.tools for row in first_rows)
    counts["tools_left_out"] += sum(row.tools_left_out for row in first_rows)
    for rows in conversations:
        row = rows[0]
        if row.split_answers == 1 and not row.tokens_cut and not row.special_text:  # most of them
            continue
        counts["special_text"] += any(each.special_text for each in rows)
        if any(each.tokens_cut for each in rows):
            counts["conversations_cut"] += 1
            first.add("conversations_cut", row.source)
        if row.split_answers > 1:
            counts["rows_per_answer"] += 1
            lengths = [len(each.ids) for each in rows]
            counts["extra_rows"] += len(rows) - 1
            counts["extra_tokens"] += sum(lengths) - max(lengths)


def prompt_batch(maker: RowMaker, rows: Sequence[TokenRow]) -> pa.RecordBatch:
    """The prompts of the rows, in the schema PROMPTS."""
    columns = [
        {
            "id": row.id,
            "prompt": maker.encoder.decode(row.ids[: row.prompt_length]),
            "prompt_ids": row.ids[: row.prompt_length],
            "reference": decode_answer(maker.encoder.tokenizer, row.ids[row.prompt_length : row.answer_end].tolist()),
        }
        for row in rows
    ]
    return pa.RecordBatch.from_pylist(columns, schema=PROMPTS)


def _training_batch(rows: Sequence[TokenRow]) -> pa.RecordBatch:
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


def _count_lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(1 for _ in file)
