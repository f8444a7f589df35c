"""Logits for the labelled tokens only; the output head skips all other positions."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from stages.model.padding_free import RowLayout


@contextmanager
def modify_head_input(head: torch.nn.Module, change: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Within the block, the output head gets change(hidden states); hidden states are (rows, tokens, hidden size)."""
    hook = head.register_forward_pre_hook(lambda _, inputs: (change(inputs[0]), *inputs[1:]))
    try:
        yield
    finally:
        hook.remove()


def label_logits(
    model: Any, batch: Mapping[str, Any], head: torch.nn.Module | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The model's logits for every labelled token of a batch.

    Position t predicts token t + 1, so the logits for a label come from the position before it. The hidden states of all
    other positions are dropped before the output head; for short answers it is most of the head's work and memory.

    Args:
        model: A causal language model, with or without an adapter.
        batch: From `collate_padded`, or from `collate_padding_free` if `enable_padding_free` has prepared the model.
        head: The model's output head; needed if `model` is a wrapper, as DistributedDataParallel, without
            get_output_embeddings.

    Returns:
        logits (labels, vocabulary) and the labels (labels,), row by row.
    """
    tokens = batch["input_ids"].shape[1]
    with modify_head_input(
        head or model.get_output_embeddings(), lambda hidden: select_positions(hidden, tokens, batch["target_positions"])
    ):
        logits = forward(model, batch).logits
    return logits, batch["targets"]


def forward(model: Any, batch: Mapping[str, Any]) -> Any:
    """The model's output for a batch as in `label_logits`."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch}
    if "row_lengths" in batch:
        inputs["row_layout"] = RowLayout(batch["row_lengths"])
    return model(**inputs, use_cache=False)


def select_positions(hidden: torch.Tensor, tokens: int, positions: torch.Tensor) -> torch.Tensor:
    """The hidden states (positions, hidden size) at some positions of a batch.

    Args:
        hidden: (rows, virtual tokens + tokens, hidden size). An adapter may put virtual tokens before each row, so the
            last `tokens` count.
        positions: (positions,) in int64, counted through the batch row by row, without the virtual tokens.
    """
    # The layers of a model may be on several devices, and the positions are on that of the first one.
    return hidden[:, -tokens:].flatten(0, 1).index_select(0, positions.to(hidden.device))
