"""The loss of one model on raw text, a window at a time: what `score` makes the perplexity of."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from stages.core.problem import Problem
from stages.core.tokens import IGNORE
from stages.model.collate import collate_padded
from stages.model.logits import is_head_last, label_hidden_states, logits_of

MAX_LOGITS = 1 << 27
"""Logits that are in memory at a time: 512 MiB in float32."""
MAX_BATCH_TOKENS = 8192
"""The most tokens in one batch, padding included, unless a single window is longer."""


def make_batches(lengths: Sequence[int], *, batch_size: int) -> list[list[int]]:
    """The windows in batches of similar length, shortest first, as indices.

    They depend only on the windows and the batch size, so that a run in several processes or a resumed one gives the same
    bytes.

    Args:
        lengths: Tokens of each window.
        batch_size: The most windows in a batch.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: lengths[index]):
        fits = batches and (len(batches[-1]) + 1) * lengths[index] <= MAX_BATCH_TOKENS
        if fits and len(batches[-1]) < batch_size:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def window_losses(model: Any, windows: Sequence[dict[str, Any]]) -> list[float]:
    """The summed loss of each window in nats: its tokens' losses in float32, added up in float64.

    The batch is padded on the right, where no token of a causal model looks. It is split in two if memory runs out.

    Args:
        model: In evaluation mode.
        windows: {"id", "input_ids", "labels"} each, as from `TokenRows`.

    Raises Problem if a single window does not fit into memory, or if a loss is not a number.
    """
    try:
        losses = _batch_losses(model, windows)
    except torch.OutOfMemoryError:
        if len(windows) == 1:
            raise Problem(
                f"out of memory on a single window of raw text, {windows[0]['id']} with {len(windows[0]['input_ids'])} "
                "tokens; lower encode.max_length, or use a GPU with more memory"
            ) from None
    else:
        for window, loss in zip(windows, losses, strict=True):
            if not np.isfinite(loss):
                raise Problem(f"the loss on raw text, {window['id']}, is {loss}; set generate.dtype to float32 or bfloat16")
        return losses
    torch.cuda.empty_cache()  # after the except block, which holds the failed call's tensors
    half = len(windows) // 2
    return [*window_losses(model, windows[:half]), *window_losses(model, windows[half:])]


def _batch_losses(model: Any, windows: Sequence[dict[str, Any]]) -> list[float]:
    batch = {name: tensor.to(model.device) for name, tensor in collate_padded(windows).items()}
    losses = [part.cpu().numpy() for part in _token_losses(model, batch)]
    per_token = np.concatenate([np.zeros(0, np.float32), *losses]).astype(np.float64)
    ends = np.cumsum([0, *map(count_labels, windows)])
    return [float(per_token[start:end].sum()) for start, end in pairwise(ends.tolist())]


def count_labels(window: dict[str, Any]) -> int:
    """The tokens of a window that have a loss; nothing predicts the first one."""
    return int(np.count_nonzero(np.asarray(window["labels"])[1:] != IGNORE))


def _token_losses(model: Any, batch: dict[str, Any]) -> Iterator[torch.Tensor]:
    """The losses (labels,) in float32, in chunks.

    The model runs once, and its hidden states before the output head are kept.
    """
    with torch.no_grad():
        hidden, targets = label_hidden_states(model, batch), batch["targets"]
        head = model.get_output_embeddings()
        size = max(1, MAX_LOGITS // head.weight.shape[0])
        # To find out takes a pass through the model, as a chunk does if its logits are not the head's alone.
        head_is_last = len(targets) > size and is_head_last(model, head)
        for start in range(0, len(targets), size):
            part = hidden[start : start + size]
            logits = head(part) if head_is_last else logits_of(model, part)
            yield cross_entropy(logits.float(), targets[start : start + size].to(logits.device), reduction="none")
