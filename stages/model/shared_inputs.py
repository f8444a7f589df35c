"""Layers that read the very same tensor, as q, k and v do: the first that is called computes them all."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch


def group_by_input(model: Any, layers: Mapping[str, torch.nn.Module]) -> list[list[str]]:
    """The names of the layers, those together that read the same tensor in the same module, as a trial shows."""
    seen: dict[tuple[str, int], list[str]] = {}
    inputs, handles = [], []

    def note(name: str) -> Callable[..., None]:
        def hook(_: Any, given: Sequence[torch.Tensor]) -> None:
            inputs.append(given[0])  # as long as it lives, no other tensor has its id
            seen.setdefault((name.rpartition(".")[0], id(given[0])), []).append(name)

        return hook

    for name, layer in layers.items():
        handles.append(layer.register_forward_pre_hook(note(name)))
    with torch.no_grad():
        model(input_ids=torch.tensor([[5, 6, 7]], device=model.device), use_cache=False)
    for handle in handles:
        handle.remove()
    together = [names for names in seen.values() if len(set(names)) == len(names)]
    once = {name for names in together for name in names}
    if len(once) != sum(map(len, together)):
        together, once = [], set()  # a layer that is used twice
    return together + [[name] for name in layers if name not in once]


def share_computation(layers: Sequence[torch.nn.Module], compute: Callable[[torch.Tensor], Sequence[torch.Tensor]]) -> None:
    """Replaces the layers' forward: `compute` takes their input and returns the output of each."""
    outputs = _Outputs(compute)
    for number, layer in enumerate(layers):
        layer.forward = outputs.forward_of(number)


class _Outputs:
    """Those that are still to be fetched."""

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
