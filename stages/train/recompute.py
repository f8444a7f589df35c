"""Cheap activations that are computed again in the backward pass instead of being kept.

A norm's output or a gated activation takes as much memory as a large product's input, and costs next to nothing to compute
again from what is kept anyway. The tensor carries the recipe; the LoRA layers (lora_layers.py) save the recipe's inputs.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch


class Recipe(NamedTuple):
    """How to compute a tensor again."""

    function: Callable[..., torch.Tensor]
    inputs: tuple[torch.Tensor, ...]


def remember(result: torch.Tensor, function: Callable[..., torch.Tensor], inputs: tuple[torch.Tensor, ...]) -> None:
    """Attaches a recipe to a tensor."""
    result.recipe = Recipe(function, inputs)  # type: ignore[attr-defined]


def recall(recipe: Recipe) -> torch.Tensor:
    """The tensor that a recipe makes. The last one is remembered, since several layers read the same."""
    known = _Last.recipe
    if known is None or not _same(known, recipe):
        _Last.recipe, _Last.value = recipe, recipe.function(*recipe.inputs)
    assert _Last.value is not None
    return _Last.value


def forget() -> None:
    """Gives back the memory of the last recalled tensor."""
    _Last.recipe = _Last.value = None


class _Last:
    """Holds the inputs too, so no other tensor can take their place in memory while they are compared by it."""

    recipe: Recipe | None = None
    value: torch.Tensor | None = None


def _same(one: Recipe, other: Recipe) -> bool:
    return one.function is other.function and all(
        a.data_ptr() == b.data_ptr() and a.shape == b.shape for a, b in zip(one.inputs, other.inputs, strict=True)
    )
