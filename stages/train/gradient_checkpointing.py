"""Gradient checkpointing (Chen et al. 2016) of some of a model's decoder layers, called blocks here."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint


def decoder_blocks(model: Any) -> list[torch.nn.Module]:
    """The decoder layers of a model with an adapter, in order.

    Their classes are those in `_no_split_modules` of Transformers; for a model without it, the ModuleList with the
    most parameters. Those of a vision or audio tower do not count, and of two blocks that contain each other the outer.
    """
    base = model.get_base_model()
    decoder = base.get_decoder()
    if decoder is base.get_output_embeddings():  # ModernBERT's head is named decoder
        decoder = base
    names = set(base._no_split_modules or ())
    found = [module for module in decoder.modules() if type(module).__name__ in names and module is not decoder]
    nested = {id(inner) for module in found for inner in module.modules() if inner is not module}
    blocks = [module for module in found if id(module) not in nested]
    lists = [list(module) for module in decoder.modules() if isinstance(module, torch.nn.ModuleList)]
    return blocks or max(lists, key=lambda layers: sum(p.numel() for layer in layers for p in layer.parameters()))


def checkpoint_blocks(model: Any, count: int) -> None:
    """Turns gradient checkpointing on in the first `count` blocks, and off in the others.

    A block with it keeps only its input in the forward pass, and recomputes its activations in the backward pass.
    """
    for number, block in enumerate(decoder_blocks(model)):
        forward = block.forward
        if isinstance(forward, _CheckpointedForward):
            forward = forward.original
        block.forward = _CheckpointedForward(forward) if number < count else forward


def is_checkpointed(block: torch.nn.Module) -> bool:
    """Whether gradient checkpointing is on in a block."""
    return isinstance(block.forward, _CheckpointedForward)


class _CheckpointedForward:
    """Takes the place of a block's forward."""

    def __init__(self, original: Callable[..., Any]) -> None:
        self.original = original

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.original(*inputs, **named)
        return checkpoint(partial(self.original, **named), *inputs, use_reentrant=False)
