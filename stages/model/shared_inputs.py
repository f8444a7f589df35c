"""Layers that share an input, as the query, key and value projections of attention do."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from stages.model.probe import probe_ids


def group_by_input(model: Any, layers: Mapping[str, torch.nn.Module]) -> list[list[str]]:
    """Groups the names of layers whose input is the same tensor, and that belong to the same parent module.

    Found by running the model once on a few tokens. A layer that shares its input with no other, or that the run does not
    call, forms a group by itself. If a layer is called several times, nothing is grouped.
    """
    groups: dict[tuple[str, int], list[str]] = {}
    inputs = []  # keeps the inputs alive: the id of a freed tensor could be given to another one

    def record(name: str) -> Callable[..., None]:
        def hook(_: Any, arguments: Sequence[torch.Tensor]) -> None:
            if arguments:
                inputs.append(arguments[0])
                groups.setdefault((name.rpartition(".")[0], id(arguments[0])), []).append(name)

        return hook

    handles = [layer.register_forward_pre_hook(record(name)) for name, layer in layers.items()]
    try:
        with torch.no_grad():
            model(input_ids=probe_ids(model), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    shared = [names for names in groups.values() if len(set(names)) == len(names)]
    grouped = {name for names in shared for name in names}
    if len(grouped) != sum(map(len, shared)):  # a layer was called several times
        shared, grouped = [], set()
    return shared + [[name] for name in layers if name not in grouped]


def share_computation(layers: Sequence[torch.nn.Module], compute: Callable[[torch.Tensor], Sequence[torch.Tensor]]) -> None:
    """Replaces the forward method of layers that share an input: the first one that is called computes all outputs.

    Args:
        compute: Takes the input and returns the output of each layer.
    """
    outputs = _SharedOutputs(compute)
    for number, layer in enumerate(layers):
        layer.forward = outputs.forward_of(number)


class _SharedOutputs:
    """The outputs for the current input that no layer has returned yet."""

    def __init__(self, compute: Callable[[torch.Tensor], Sequence[torch.Tensor]]) -> None:
        self.compute = compute
        self.x: torch.Tensor | None = None
        self.outputs: dict[int, torch.Tensor] = {}

    def forward_of(self, number: int) -> Callable[..., torch.Tensor]:
        def forward(x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            if self.x is not x or number not in self.outputs:
                self.x, self.outputs = x, dict(enumerate(self.compute(x)))
            output = self.outputs.pop(number)
            if not self.outputs:
                self.x = None
            return output

        return forward
