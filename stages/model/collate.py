"""Data collators: token rows to a padded batch, or to a padding-free one in which the rows are concatenated."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from stages.core.tokens import IGNORE


def collate_padded(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A batch padded on the right.

    Args:
        rows: Each with "input_ids" and "labels", (tokens,) both.

    Returns:
        input_ids, attention_mask and labels, each (rows, tokens of the longest row) in int64, as Transformers' models take
        them; target_positions and targets as in `_find_targets`.
    """
    labels = pad_sequence([_long(row["labels"]) for row in rows], batch_first=True, padding_value=IGNORE)
    ids = pad_sequence([_long(row["input_ids"]) for row in rows], batch_first=True)
    mask = pad_sequence([torch.ones(len(row["input_ids"]), dtype=torch.long) for row in rows], batch_first=True)
    starts = [number * ids.shape[1] for number in range(len(rows))]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, **_find_targets(rows, starts)}


def collate_padding_free(rows: Sequence[dict[str, Any]], multiple: int = 1) -> dict[str, Any]:
    """A padding-free batch: the rows concatenated. The first label of every row must be -100, as nothing predicts it.

    Args:
        rows: Each with "input_ids" and "labels", (tokens,) both.
        multiple: A last row of zeros is added so that the number of tokens is a multiple of this.

    Returns:
        input_ids and position_ids, each (1, tokens) in int64; each row's positions start at 0. row_lengths, a list of int
        for `RowLayout`. target_positions and targets as in `_find_targets`.
    """
    lengths = [len(row["input_ids"]) for row in rows]
    starts = np.cumsum([0, *lengths[:-1]]).tolist()
    ids = [_long(row["input_ids"]) for row in rows]
    rest = -sum(lengths) % multiple
    if rest:
        lengths.append(rest)
        ids.append(torch.zeros(rest, dtype=torch.long))
    return {
        "input_ids": torch.cat(ids).unsqueeze(0),
        "position_ids": torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0),
        "row_lengths": lengths,
        **_find_targets(rows, starts),
    }


def _find_targets(rows: Sequence[dict[str, Any]], starts: Sequence[int]) -> dict[str, torch.Tensor]:
    """The labelled tokens of a batch. Found on the CPU: the CPU would have to wait for the GPU to count them.

    Args:
        rows: The rows of the batch.
        starts: The position in the batch of each row's first token; a batch (rows, tokens) is counted row by row.

    Returns:
        targets (labels,) in int64: the labelled tokens, row by row. target_positions (labels,) in int64: the position in
        the batch of the token before each, whose logits predict it.
    """
    predicting = [np.flatnonzero(np.asarray(row["labels"])[1:] != IGNORE) for row in rows]
    positions = [start + found for start, found in zip(starts, predicting, strict=True)]
    targets = [np.asarray(row["labels"])[found + 1] for row, found in zip(rows, predicting, strict=True)]
    return {"target_positions": _long(np.concatenate(positions)), "targets": _long(np.concatenate(targets))}


def _long(values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.long)
