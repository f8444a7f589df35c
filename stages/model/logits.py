"""Logits for the labelled tokens only; the output head skips all other positions."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from stages.model.padding_free import RowLayout
from stages.model.probe import probe_ids


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


def label_hidden_states(model: Any, batch: Mapping[str, Any], head: torch.nn.Module | None = None) -> torch.Tensor:
    """What the output head gets for every labelled token of a batch; its own logits are computed for one position only.

    Args:
        model: As for `label_logits`, as the other arguments.

    Returns:
        (labels, hidden size), row by row, on the device on which the hidden states arrive at the head.
    """
    tokens, kept = batch["input_ids"].shape[1], []

    def keep(hidden: torch.Tensor) -> torch.Tensor:
        kept.append(select_positions(hidden, tokens, batch["target_positions"]))
        return hidden[:1, :1]

    with modify_head_input(head or model.get_output_embeddings(), keep):
        forward(model, batch)
    return kept[0]


def logits_of(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    """The model's logits (labels, vocabulary) for hidden states (labels, hidden size) from `label_hidden_states`.

    The model runs on a few tokens, with the hidden states in place of what its head would get. That includes what some
    models do after the head, such as capping the logits.
    """
    with modify_head_input(model.get_output_embeddings(), lambda _: hidden.unsqueeze(0)):
        logits: torch.Tensor = forward(model, {"input_ids": probe_ids(model)}).logits[0]
    return logits


def is_head_last(model: Any, head: torch.nn.Module) -> bool:
    """Whether a model's logits are exactly head(hidden states); found by running the model on a few tokens."""
    inputs = []
    handle = head.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    try:
        with torch.no_grad():
            logits = forward(model, {"input_ids": probe_ids(model)}).logits
    finally:
        handle.remove()
    if len(inputs) != 1:
        return False
    with torch.no_grad():
        return torch.equal(head(inputs[0]).to(logits), logits)


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
