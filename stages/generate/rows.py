"""What is answered and measured: at most generate.max_predict_samples test prompts and documents of raw text.

The rows stay in the memory-mapped files of `encode`, and are read where they are needed.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from stages.core.tokens import PROMPTS, TokenRows, choose_rows, largest_id, read_ids, read_tokens, stop_token_ids

WINDOWS_PER_DOCUMENT = 4
"""Windows of raw text that are measured for each document that may be, on average. A book has thousands of them."""

Numbers: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]


class PromptRows(Sequence[dict[str, Any]]):
    """Prompts, read from the memory-mapped file on access; only their lengths are kept in memory."""

    def __init__(self, table: pa.Table, numbers: Numbers) -> None:
        """`numbers`: the indices of the rows in the table."""
        self._table, self._numbers = table, numbers
        lengths = pc.list_value_length(table["prompt_ids"]).to_numpy()
        self.lengths: np.ndarray[Any, np.dtype[np.int32]] = lengths.astype(np.int32)[numbers]
        """(rows,) Tokens of each prompt."""

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...

    @overload
    def __getitem__(self, index: slice) -> "PromptRows": ...

    def __getitem__(self, index: int | slice) -> "dict[str, Any] | PromptRows":
        """{"id", "prompt", "prompt_ids", "reference"} of a row; or some of the rows."""
        if isinstance(index, slice):
            return PromptRows(self._table, self._numbers[index])
        number = int(self._numbers[index])
        return {name: self._table[name][number].as_py() for name in PROMPTS.names}

    @property
    def largest_id(self) -> int:
        """The largest token id of all prompts of the table; -1 without tokens."""
        return largest_id(self._table["prompt_ids"])

    def select(self, indices: Numbers) -> "PromptRows":
        """The rows of these indices, in this order."""
        return PromptRows(self._table, self._numbers[indices])


class Rows(NamedTuple):
    """What `encode` wrote for this stage, as far as it is used."""

    prompts: PromptRows
    """The test prompts to answer, then all extra ones."""
    test_count: int
    """The number of test prompts to answer."""
    all_test_count: int
    """The number of test prompts in the file."""
    stop_tokens: list[int]
    """The tokens that end an answer in the chat template."""
    windows: TokenRows
    """The windows of raw text to measure."""
    all_windows_count: int
    """The number of windows in the file."""


def read_rows(test_prompts: Path, extra_prompts: Path, test_text: Path, *, at_most: int) -> Rows:
    """Opens the files of `encode` and chooses rows by the hash of their ids, so that every model answers the same ones.

    Args:
        test_prompts: The prompts of the test split.
        extra_prompts: Those of data/prompts.json, which are all answered.
        test_text: The windows of raw text of the test split.
        at_most: The number of test prompts, and of documents of raw text; 0: all.
    """
    test, extra, text = map(read_tokens, (test_prompts, extra_prompts, test_text))
    chosen = np.array(choose_rows(read_ids(test), at_most), np.int64)
    numbers = np.concatenate([chosen, np.arange(len(test), len(test) + len(extra))])
    prompts = PromptRows(pa.concat_tables([test, extra]), numbers)
    windows = TokenRows(text, choose_windows(text, at_most) if at_most else None)
    return Rows(prompts, len(chosen), len(test), stop_token_ids(test), windows, len(text))


def choose_windows(text: pa.Table, at_most: int) -> list[int]:
    """The windows of at most `at_most` documents, and not more than WINDOWS_PER_DOCUMENT times as many windows.

    Of a document that is chosen all windows are, unless that would be too many: then windows are chosen among them.
    """
    documents = list(dict.fromkeys(map(document_of, read_ids(text))))
    chosen = {documents[index] for index in choose_rows(documents, at_most)}
    # A long book has millions of windows, so no list is made of their ids.
    numbers = np.fromiter((index for index, id in enumerate(read_ids(text)) if document_of(id) in chosen), np.int64)
    ids = (id for id in read_ids(text) if document_of(id) in chosen)
    return [int(numbers[place]) for place in choose_rows(ids, WINDOWS_PER_DOCUMENT * at_most)]


def document_of(window: str) -> str:
    """The id of a window's document: "<document>", or "<document>.<n>" if it has several windows."""
    document, _, number = window.rpartition(".")
    return document if document and number.isdigit() else window
