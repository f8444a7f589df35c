"""Next-token cross-entropy over the labelled tokens, and the logits at those tokens alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from stages.lib.labels import IGNORE


def label_logits(model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """What the model says where something is learned.

    Position t predicts token t + 1, so the logits for a label come from the position before it. The hidden states of all
    other positions are left out before the output head, which for short answers is the larger part of its work and memory.

    Args:
        model: A causal language model, with or without an adapter.
        batch: From `pad`, or from `flatten` for a model that `use_flat_rows` has prepared.

    Returns:
        logits (labels, vocabulary) and the labels (labels,), row by row.
    """
    targets = batch["labels"][:, 1:]
    learned = targets != IGNORE
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch}
    with _only(model.get_output_embeddings(), learned):
        logits = model(**inputs, use_cache=False).logits
    return logits, targets[learned]


def next_token_loss(logits: torch.Tensor, labels: torch.Tensor, num_items: torch.Tensor | int) -> torch.Tensor:
    """The summed cross-entropy over `num_items`: the labels of the whole optimizer step, not of this micro-batch.

    So rows of unequal length weigh the same whatever batch they fall into. Computed in float32.

    Args:
        logits: (labels, vocabulary)
        labels: (labels,)
    """
    return cross_entropy(logits.float(), labels, reduction="sum") / num_items


@contextmanager
def _only(head: torch.nn.Module, learned: torch.Tensor) -> Iterator[None]:
    """While it holds, the output head sees the hidden states at `learned` (rows, tokens - 1) and no others."""
    hook = head.register_forward_pre_hook(lambda _, inputs: (inputs[0][:, :-1][learned], *inputs[1:]))
    try:
        yield
    finally:
        hook.remove()
