"""The Arrow files of data/tokens: what `encode` writes, and `train`, `merge` and `generate` read.

An IPC stream with an explicit schema, written in batches that depend on the rows alone: the same rows are the same bytes.
`datasets.save_to_disk` would add a fingerprint that changes with the code and the date (huggingface/datasets#7982).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

IGNORE = -100
"""The label that the loss leaves out (PyTorch's `ignore_index`)."""

TRAINING = pa.schema([("id", pa.string()), ("input_ids", pa.list_(pa.int32())), ("labels", pa.list_(pa.int32()))])
"""A row to learn from. `labels` has the length of `input_ids`, -100 where nothing is learned."""

PROMPTS = pa.schema(
    [("id", pa.string()), ("prompt", pa.string()), ("prompt_ids", pa.list_(pa.int32())), ("reference", pa.string())]
)
"""A prompt to answer: its text, its tokens (the start of the very row that training would see) and the right answer."""


@contextmanager
def open_tokens(path: Path, schema: pa.Schema, stop_token_ids: Sequence[int]) -> Iterator[Any]:
    """A stream to write batches of `schema` into. `stop_token_ids`, which end an answer, travel with the schema."""
    metadata = {"stop_token_ids": " ".join(map(str, stop_token_ids))}
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema.with_metadata(metadata)) as stream:
        yield stream


def read_tokens(path: Path) -> pa.Table:
    """The table, mapped into memory and not copied."""
    with pa.memory_map(str(path)) as file:
        return pa.ipc.open_stream(file).read_all()


def stop_token_ids(table: pa.Table) -> list[int]:
    """The tokens that end an answer, as `encode` found them behind the answers of the template."""
    return [int(token) for token in table.schema.metadata[b"stop_token_ids"].split()]


class TokenRows:
    """The rows of a training table, read from the mapped file as they are asked for; memory holds their lengths alone.

    Behind the last row stands an empty one: a token without a label, by which a batch that falls short is filled up.
    """

    def __init__(self, table: pa.Table) -> None:
        self._table = table
        lengths = pc.list_value_length(table["input_ids"])
        self.lengths: np.ndarray[Any, np.dtype[np.int32]] = lengths.to_numpy().astype(np.int32)
        """(rows,) Tokens of each row."""

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """{"id", "input_ids" (tokens,), "labels" (tokens,)}, the arrays in int32 and not to be written into."""
        if index == len(self):
            return {"id": "", "input_ids": np.array([0], np.int32), "labels": np.array([IGNORE], np.int32)}
        row = {name: self._table[name][index] for name in ("input_ids", "labels")}
        arrays = {name: scalar.values.to_numpy(zero_copy_only=True) for name, scalar in row.items()}
        return {"id": self._table["id"][index].as_py(), **arrays}

    @property
    def label_tokens(self) -> int:
        """Tokens of all rows that are learned."""
        flat = (chunk.flatten() for chunk in self._table["labels"].chunks)
        return sum(int(np.count_nonzero(labels.to_numpy() != IGNORE)) for labels in flat)
