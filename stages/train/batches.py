"""Which rows form a batch: the micro-batches of an optimizer step, the order of training rows, the validation batches."""

import random
from array import array
from collections.abc import Iterator, Sequence
from itertools import chain, repeat

import numpy as np
import torch


def split(lengths: Sequence[int], rows: int, tokens: int | None = None, *, padded: bool = False) -> list[slice]:
    """Splits the rows of an optimizer step, in their order, into micro-batches of similar size.

    Args:
        lengths: Tokens of each row.
        rows: The maximum number of rows in a micro-batch; used if `tokens` is None.
        tokens: The maximum number of tokens in a micro-batch; a longer row becomes a micro-batch by itself.
        padded: Whether the rows are padded to the longest of their micro-batch, so that padding counts as tokens.
    """
    if tokens is None:
        return [slice(start, start + rows) for start in range(0, len(lengths), rows)]
    # Padding-free: parts of equal size, not full ones followed by a small rest.
    share = tokens if padded else sum(lengths) / -(-sum(lengths) // tokens)
    cuts, before = [0], 0
    for number, length in enumerate(lengths):
        count = number + 1 - cuts[-1]
        size = count * max(lengths[cuts[-1] : number + 1]) if padded else sum(lengths[cuts[-1] : number + 1])
        if count > 1 and (size > tokens or (not padded and before + length / 2 > share * len(cuts))):
            cuts.append(number)
        before += length
    return [slice(start, end) for start, end in zip(cuts, [*cuts[1:], len(lengths)], strict=True)]


class Shuffled(torch.utils.data.Sampler[int]):
    """Every row once per epoch, in an order that depends only on `seed` and the epoch; then the empty row, `fill` times.

    So a resumed run sees the same rows as an uninterrupted one. Rows are not grouped by length: where the length depends on
    the answer, a batch of similar rows would teach only that answer (exact match on the sample fell from 87 % to 66 %).
    """

    def __init__(self, count: int, seed: int, fill: int = 0) -> None:
        self.count, self.seed, self.fill, self.epoch = count, seed, fill, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count + self.fill

    def __iter__(self) -> Iterator[int]:
        order = array("q", range(self.count))  # a list would take five times the memory
        random.Random(f"{self.seed} {self.epoch}").shuffle(order)
        return chain(order, repeat(self.count, self.fill))


def validation_batches(lengths: Sequence[int], rows: int, *, process: int, processes: int) -> Iterator[list[int]]:
    """The row numbers of each validation batch of one process; rows of similar length are in one batch.

    Every process gets the same number of batches, because with FSDP all must take part in every forward pass. A process
    without rows left gets the empty row (number `len(lengths)`), which has no label.

    Args:
        lengths: Tokens of each row.
        rows: Rows in a batch.
        process: This process.
        processes: How many there are.
    """
    order = np.argsort(np.asarray(lengths), kind="stable")
    all_rows = rows * processes
    for start in range(process * rows, -(-len(order) // all_rows) * all_rows, all_rows):
        yield order[start : start + rows].tolist() or [len(lengths)]
