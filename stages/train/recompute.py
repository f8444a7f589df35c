"""Recomputes cheap activations in the backward pass instead of keeping them in memory.

The output of a norm or of a gated activation takes as much memory as the input of a large matrix product, and costs little
to recompute from tensors that are kept anyway. The compiled elementwise parts of a model (stages/model/compile.py) call
`Recompute.remember` with each such output; the LoRA layers (lora_layers.py) then save the inputs of its recipe instead.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.utils.weak import WeakIdKeyDictionary


class Recipe(NamedTuple):
    """How to recompute a tensor: function(*inputs)."""

    function: Callable[..., torch.Tensor]
    inputs: tuple[torch.Tensor, ...]


class Recompute:
    """The recipes of a model's cheap activations, and the tensor that was recomputed last.

    A recipe is kept as long as its tensor, and no longer.
    """

    def __init__(self) -> None:
        self._recipes: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._last: tuple[Recipe, torch.Tensor] | None = None

    def remember(
        self, result: torch.Tensor, function: Callable[..., torch.Tensor], inputs: tuple[torch.Tensor, ...]
    ) -> None:
        """Records that `result` is function(*inputs)."""
        self._recipes[result] = Recipe(function, inputs)

    def recipe_of(self, tensor: torch.Tensor) -> Recipe | None:
        """How to recompute `tensor`; None if it has no recipe and must be kept."""
        recipe: Recipe | None = self._recipes.get(tensor)  # type: ignore[no-untyped-call]
        return recipe

    def recall(self, recipe: Recipe) -> torch.Tensor:
        """The tensor of a recipe.

        The last one is kept, since several layers have the same input and ask for it one after the other.
        """
        if self._last is None or not _is_same(self._last[0], recipe):
            # The last tensor must be freed before the next one is computed.
            self._last = None
            self._last = recipe, recipe.function(*recipe.inputs)
        return self._last[1]

    def clear(self) -> None:
        """Frees the last recomputed tensor, at the end of a step."""
        self._last = None


def _is_same(one: Recipe, other: Recipe) -> bool:
    """Whether two recipes have the same function and inputs.

    Inputs that went through `save_for_backward` come back as other Python objects, so their addresses are compared. `_last`
    holds its inputs, so no other tensor can have been given their memory.
    """
    return one.function is other.function and all(
        a.data_ptr() == b.data_ptr() and a.shape == b.shape for a, b in zip(one.inputs, other.inputs, strict=True)
    )
