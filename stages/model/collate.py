"""Rows of tokens as tensors: padded, or laid end to end so that no work is done on padding; and the rows of a step."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from stages.core.tokens import IGNORE


def collate_padded(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The rows side by side, padded on the right.

    Returns:
        input_ids, attention_mask and labels, each (rows, longest row) in int64, as Transformers' models take them; places
        and targets as in `_targets`.
    """
    labels = pad_sequence([_long(row["labels"]) for row in rows], batch_first=True, padding_value=IGNORE)
    ids = pad_sequence([_long(row["input_ids"]) for row in rows], batch_first=True)
    mask = pad_sequence([torch.ones(len(row["input_ids"]), dtype=torch.long) for row in rows], batch_first=True)
    starts = [number * ids.shape[1] for number in range(len(rows))]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, **_targets(rows, starts)}


def collate_padding_free(rows: Sequence[dict[str, Any]], multiple: int = 1) -> dict[str, Any]:
    """The rows end to end; every row's first label must be -100: no token of another row predicts it.

    Args:
        multiple: A last row of zeros makes the tokens a multiple of this.

    Returns:
        input_ids and position_ids, each (1, tokens) in int64; position 0 begins a row. row_lengths, a list. places and
        targets as in `_targets`.
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
        **_targets(rows, starts),
    }


def _targets(rows: Sequence[dict[str, Any]], starts: Sequence[int]) -> dict[str, torch.Tensor]:
    """targets (labels,): the tokens that are learned, row by row. places (labels,): where the token before each stands.

    Places count through the batch, its rows one after the other. Found here and not on the GPU, which would have to wait.
    """
    learned = [np.flatnonzero(np.asarray(row["labels"])[1:] != IGNORE) for row in rows]
    places = [start + found for start, found in zip(starts, learned, strict=True)]
    targets = [np.asarray(row["labels"])[found + 1] for row, found in zip(rows, learned, strict=True)]
    return {"target_positions": _long(np.concatenate(places)), "targets": _long(np.concatenate(targets))}


def _long(values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.long)
