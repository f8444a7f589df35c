"""A model's output head, which need not make logits where nobody wants them."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from stages.model.padding_free import expect


@contextmanager
def modify_head_input(head: torch.nn.Module, change: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """While it holds, the head gets what `change` makes of the hidden states (rows, tokens, size)."""
    hook = head.register_forward_pre_hook(lambda _, inputs: (change(inputs[0]), *inputs[1:]))
    try:
        yield
    finally:
        hook.remove()


def label_logits(
    model: Any, batch: Mapping[str, Any], head: torch.nn.Module | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the model says where something is learned.

    Position t predicts token t + 1, so the logits for a label come from the position before it. The hidden states of all
    other positions are left out before the output head, which for short answers is the larger part of its work and memory.

    Args:
        model: A causal language model, with or without an adapter.
        batch: From `pad`, or from `flatten` for a model that `enable_padding_free` has prepared.
        head: The model's output head; needed where `model` is wrapped for several processes and does not tell.

    Returns:
        logits (labels, vocabulary) and the labels (labels,), row by row.
    """
    tokens = batch["input_ids"].shape[1]
    # An adapter may have put virtual tokens before each row, so a row's states are counted from its end.
    with modify_head_input(
        head or model.get_output_embeddings(), lambda hidden: select_positions(hidden, tokens, batch["target_positions"])
    ):
        logits = forward(model, batch).logits
    return logits, batch["targets"]


def forward(model: Any, batch: Mapping[str, Any]) -> Any:
    if "row_lengths" in batch:
        expect(batch["position_ids"], batch["row_lengths"])
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch}
    return model(**inputs, use_cache=False)


def select_positions(hidden: torch.Tensor, tokens: int, places: torch.Tensor) -> torch.Tensor:
    return hidden[:, -tokens:].flatten(0, 1).index_select(0, places)
