"""The Arrow files of data/tokens: what `encode` writes, and `train`, `merge` and `generate` read.

They are IPC streams with an explicit schema. The batches depend only on the rows, so the same rows give the same bytes;
`datasets.save_to_disk` would add a fingerprint that changes with the code and the date (huggingface/datasets#7982).
"""

import hashlib
import heapq
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from stages.core.problem import Problem

IGNORE = -100
"""The label of a token that is not in the loss (PyTorch's `ignore_index`)."""

TRAINING = pa.schema([("id", pa.string()), ("input_ids", pa.list_(pa.int32())), ("labels", pa.list_(pa.int32()))])
"""A row to train on. `labels` has the length of `input_ids`, and is -100 for tokens that are not in the loss."""

PROMPTS = pa.schema(
    [("id", pa.string()), ("prompt", pa.string()), ("prompt_ids", pa.list_(pa.int32())), ("reference", pa.string())]
)
"""A prompt to answer: its text, its tokens (how a training row with this prompt starts) and the reference answer.

`reference` is what `decode_answer` makes of the answer's tokens, as `generate` writes the answers of the models."""


SCHEMAS = (TRAINING, PROMPTS)


@contextmanager
def open_tokens(path: Path, schema: pa.Schema, stop_token_ids: Sequence[int]) -> Iterator[Any]:
    """A stream to write batches of `schema` into. The schema's metadata holds `stop_token_ids`, which end an answer."""
    metadata = {"stop_token_ids": " ".join(map(str, stop_token_ids))}
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema.with_metadata(metadata)) as stream:
        yield stream


def read_tokens(path: Path) -> pa.Table:
    """The table, memory-mapped and not copied. Raises Problem if the file is damaged or not from `encode`.

    Arrow has no checksums: the lists are checked against their offsets, and labels against tokens, by length.
    """
    try:
        with pa.memory_map(str(path)) as file:
            table = pa.ipc.open_stream(file).read_all()
        table.validate(full=True)
        wrong = _shape_problem(table)
    except (pa.ArrowException, OSError, ValueError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        wrong = " ".join(str(error).split())
    if wrong:
        raise Problem(f"{path}: not a complete Arrow file: {wrong}; run dvc repro encode")
    return table


def _shape_problem(table: pa.Table) -> str:
    """What `encode` did not write, "" if all is as it writes it."""
    if not any(table.schema.equals(schema) for schema in SCHEMAS):
        return f"its columns are {', '.join(table.schema.names)}, not those of data/tokens"
    stops = (table.schema.metadata or {}).get(b"stop_token_ids")
    if stops is None or not all(word.isdigit() for word in stops.split()):
        return "it does not name the stop tokens"
    if any(column.null_count for column in table.columns):
        return "it has rows without a value"
    lists = [table[name] for name in ("input_ids", "labels", "prompt_ids") if name in table.schema.names]
    if any(chunk.values.null_count for column in lists for chunk in column.chunks):
        return "it has tokens without a value"
    if any(pc.min(chunk.flatten()).as_py() < 0 for chunk in lists[0].chunks if len(chunk.flatten())):
        return "it has token ids below 0"
    lengths = [pc.list_value_length(column) for column in lists]
    if any(not each.equals(lengths[0]) for each in lengths[1:]):
        return "a row has other numbers of tokens and of labels"
    return ""


def stop_token_ids(table: pa.Table) -> list[int]:
    """The tokens that end an answer, as `encode` found them after the answers in the rendered template."""
    return [int(token) for token in table.schema.metadata[b"stop_token_ids"].split()]


def decode_answer(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of an answer's tokens. References and answers of models go through it, so that equal tokens are equal texts.

    Special tokens stay in the text, since thinking and tool calls are marked by them; only padding and EOS tokens at the
    end are left out. A space that SentencePiece puts before the first word is dropped or kept by the tokenizer, on both
    sides alike.

    Args:
        tokenizer: A fast or slow tokenizer of Transformers.
        ids: Without the stop token.
    """
    ends = {tokenizer.pad_token_id, tokenizer.eos_token_id}
    tokens = list(map(int, ids))
    while tokens and tokens[-1] in ends:
        tokens.pop()
    if tokenizer.is_fast:
        return _decode(tokenizer, tokens)
    # Slow tokenizers hand special tokens to SentencePiece, which drops them or makes " ⁇ " of them.
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    pieces = ((is_special, list(piece)) for is_special, piece in groupby(tokens, key=special.__contains__))
    return "".join(
        "".join(tokenizer.convert_ids_to_tokens(piece)) if is_special else _decode(tokenizer, piece)
        for is_special, piece in pieces
    )


def _decode(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def choose_rows(ids: Iterable[str], count: int) -> list[int]:
    """The indices of at most `count` rows, in their order; of all rows if `count` is 0.

    The rows are those whose ids have the smallest sha256. So the choice is random with respect to content and order, the
    same in every stage and run, and stable: among more rows, a chosen row is replaced only by a new one.
    """
    if count == 0:
        return [index for index, _ in enumerate(ids)]
    smallest = heapq.nsmallest(count, enumerate(ids), key=lambda row: hashlib.sha256(row[1].encode()).digest())
    return sorted(index for index, _ in smallest)


def read_ids(table: pa.Table) -> Iterator[str]:
    """The ids of the rows of a table, a batch at a time."""
    return chain.from_iterable(chunk.to_pylist() for chunk in table["id"].chunks)


class TokenRows:
    """Rows of a training table, read from the memory-mapped file on access; only their lengths are kept in memory.

    The index len(rows) gives a row of one token without a label, to fill up a batch that has too few rows.
    """

    def __init__(self, table: pa.Table, chosen: Sequence[int] | None = None) -> None:
        """`chosen`: the indices of these rows in the table; None: all."""
        self._table, self._chosen = table, chosen
        lengths = pc.list_value_length(table["input_ids"]).to_numpy().astype(np.int32)
        self.lengths: np.ndarray[Any, np.dtype[np.int32]] = lengths if chosen is None else lengths[chosen]
        """(rows,) Tokens of each row."""

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """{"id", "input_ids" (tokens,), "labels" (tokens,)}, as read-only int32 arrays."""
        if index == len(self):
            return {"id": "", "input_ids": np.array([0], np.int32), "labels": np.array([IGNORE], np.int32)}
        place = index if self._chosen is None else self._chosen[index]
        row = {name: self._table[name][place] for name in ("input_ids", "labels")}
        arrays = {name: scalar.values.to_numpy(zero_copy_only=True) for name, scalar in row.items()}
        return {"id": self._table["id"][place].as_py(), **arrays}

    @property
    def label_tokens(self) -> int:
        """The number of tokens with a label, in all rows."""
        return int(self.label_counts.sum())

    @property
    def label_counts(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """(rows,) The tokens of each row with a label."""
        counts = [np.zeros(0, np.int64)]
        for chunk in self._table["labels"].chunks:
            ends = np.cumsum(pc.list_value_length(chunk).to_numpy(), dtype=np.int64)
            labelled = np.cumsum(np.append(False, chunk.flatten().to_numpy() != IGNORE))[np.append(0, ends)]
            counts.append(np.diff(labelled))
        found = np.concatenate(counts)
        return found if self._chosen is None else found[self._chosen]

    @property
    def largest_id(self) -> int:
        """The largest token id of all rows of the table; -1 without tokens."""
        return largest_id(self._table["input_ids"])


def largest_id(column: pa.ChunkedArray) -> int:
    """The largest token id in a column of lists of token ids; -1 if there is none."""
    return max((pc.max(ids).as_py() for ids in (chunk.flatten() for chunk in column.chunks) if len(ids)), default=-1)
