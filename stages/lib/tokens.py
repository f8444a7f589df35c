"""The Arrow files of data/tokens: what `encode` writes, and `train`, `merge` and `generate` read.

An IPC stream with an explicit schema and a fixed number of rows a batch, so the same rows are the same bytes.
`datasets.save_to_disk` would add a fingerprint that changes with the code and the date (huggingface/datasets#7982).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

ROWS_PER_BATCH = 1000

TRAINING = pa.schema([("id", pa.string()), ("input_ids", pa.list_(pa.int32())), ("labels", pa.list_(pa.int32()))])
"""A row to learn from. `labels` has the length of `input_ids`, -100 where nothing is learned."""

PROMPTS = pa.schema(
    [("id", pa.string()), ("prompt", pa.string()), ("prompt_ids", pa.list_(pa.int32())), ("reference", pa.string())]
)
"""A prompt to answer: its text, its tokens (the start of the very row that training would see) and the right answer."""


def write_tokens(path: Path, schema: pa.Schema, rows: Sequence[dict[str, Any]], stop_token_ids: Sequence[int] = ()) -> None:
    """Writes `rows` in the order given. `stop_token_ids`, the tokens that end an answer, travel with the schema."""
    metadata = {"stop_token_ids": " ".join(map(str, stop_token_ids))}
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema.with_metadata(metadata)) as stream:
        for start in range(0, len(rows), ROWS_PER_BATCH):
            stream.write_batch(pa.RecordBatch.from_pylist(list(rows[start : start + ROWS_PER_BATCH]), schema=schema))


def read_tokens(path: Path) -> pa.Table:
    """The table, mapped into memory and not copied."""
    with pa.memory_map(str(path)) as file:
        return pa.ipc.open_stream(file).read_all()


def stop_token_ids(table: pa.Table) -> list[int]:
    """The tokens that end an answer, as `encode` found them behind the answers of the template."""
    return [int(token) for token in table.schema.metadata[b"stop_token_ids"].split()]
