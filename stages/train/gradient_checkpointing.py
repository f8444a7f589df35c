"""The blocks that a model is a stack of, and which of them are computed twice to save memory."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint


def decoder_blocks(model: Any) -> list[torch.nn.Module]:
    """The blocks of a model with an adapter: Transformers knows their classes, or it is the longest list of modules."""
    base = model.get_base_model()
    kinds = set(base._no_split_modules or ())
    found = [module for module in base.modules() if type(module).__name__ in kinds]
    lists = [list(module) for module in base.modules() if isinstance(module, torch.nn.ModuleList)]
    return found or max(lists, key=lambda layers: sum(p.numel() for layer in layers for p in layer.parameters()))


def checkpoint_blocks(model: Any, count: int) -> None:
    """Lets the first `count` blocks keep their input alone, and compute the rest again on the way back."""
    for number, block in enumerate(decoder_blocks(model)):
        forward = getattr(block.forward, "keeps_all", block.forward)
        block.forward = _twice(forward) if number < count else forward


def _twice(forward: Callable[..., Any]) -> Callable[..., Any]:
    def computed_twice(*inputs: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*inputs, **named)
        return checkpoint(partial(forward, **named), *inputs, use_reentrant=False)

    computed_twice.keeps_all = forward  # type: ignore[attr-defined]
    return computed_twice
