"""The rows of an optimizer step as micro-batches of tensors."""

from collections.abc import Sequence
from typing import Any

import torch

from stages.core.tokens import IGNORE
from stages.model.collate import collate_padded, collate_padding_free
from stages.train.batches import split


class StepCollator:
    """The data collator. The Trainer's batch is one optimizer step of a process, which is split into micro-batches here."""

    def __init__(self, rows: int, *, padding_free: bool, pad_to_multiple_of: int) -> None:
        """Args:
        rows: The maximum number of rows in a micro-batch, while `tokens` is None.
        padding_free: Whether rows are concatenated instead of padded.
        pad_to_multiple_of: A padding-free micro-batch gets a multiple of this number of tokens.
        """
        self.rows, self.padding_free, self.pad_to_multiple_of = rows, padding_free, pad_to_multiple_of
        self.tokens: int | None = None
        """The maximum number of tokens in a micro-batch, once it is chosen."""

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Returns:
        micro_batches, a list; and labels (1 + labelled tokens,), which the Trainer counts to divide the loss. Some of its
        versions leave out the first label, so that is one that never counts.
        """
        slices = split([len(row["input_ids"]) for row in rows], self.rows, self.tokens, padded=not self.padding_free)
        micro_batches = [self.micro_batch(rows[each]) for each in slices]
        labels = torch.cat([torch.tensor([IGNORE]), *(batch["targets"] for batch in micro_batches)])
        return {"micro_batches": micro_batches, "labels": labels}

    def micro_batch(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Rows as in stages/model/collate.py, and their ids."""
        batch = collate_padding_free(rows, self.pad_to_multiple_of) if self.padding_free else collate_padded(rows)
        return {**batch, "ids": [row["id"] for row in rows]}
