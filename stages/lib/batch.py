"""Rows of tokens as padded tensors, and the order in which training sees them."""

import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from stages.lib.mask import IGNORE

WINDOW = 16
"""Batches within which rows are sorted by length: little padding, and still a random order over the epoch."""


def pad(rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """input_ids, attention_mask and labels of the rows, each (rows, longest row), padded on the right."""
    width = max(len(row["input_ids"]) for row in rows)

    def fill(field: str, value: int) -> torch.Tensor:
        return torch.tensor([[*row[field], *[value] * (width - len(row[field]))] for row in rows])

    mask = [[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in rows]
    return {"input_ids": fill("input_ids", 0), "attention_mask": torch.tensor(mask), "labels": fill("labels", IGNORE)}


class ShuffledByLength(torch.utils.data.Sampler[int]):
    """Every row once an epoch: shuffled, then sorted by length within windows of `WINDOW` batches, batches shuffled.

    The order follows from `seed` and the epoch alone, so a resumed run sees the rows that it would have seen.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        rng = random.Random(f"{self.seed} {self.epoch}")
        order = list(range(len(self.lengths)))
        rng.shuffle(order)
        window = WINDOW * self.batch_size
        batches: list[list[int]] = []
        for start in range(0, len(order), window):
            rows = sorted(order[start : start + window], key=lambda row: self.lengths[row])
            batches += [rows[at : at + self.batch_size] for at in range(0, len(rows), self.batch_size)]
        # A batch that is not full must stay last: the data loader cuts the order into batches again.
        full = [batch for batch in batches if len(batch) == self.batch_size]
        rng.shuffle(full)
        rest = [row for batch in batches if len(batch) < self.batch_size for row in batch]
        return iter([row for batch in full for row in batch] + rest)
