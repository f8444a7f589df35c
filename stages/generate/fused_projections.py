"""One product for linear layers that read the same input."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.functional import linear

from stages.model.shared_inputs import group_by_input, share_computation


def fuse_projections(model: Any) -> None:
    """Lays the weights of linear layers that read the same end to end, so that one product does for all of them.

    The layers keep their weights, as views of the whole. For few tokens at a time, where a product is as fast as its
    weights are read, small weights are read at a fraction of the rate of large ones. Outputs are parts of the whole too; a
    model that cannot go on with those is left as it was.
    """
    layers = {name: layer for name, layer in model.named_modules() if type(layer) is torch.nn.Linear}
    joined: list[torch.nn.Module] = []
    for names in group_by_input(model, layers):
        group = [layers[name] for name in names]
        biases = [layer.bias for layer in group]
        if len(group) > 1 and (None not in biases or not any(bias is not None for bias in biases)):
            share_computation(group, _joined(group))
            joined += group
    try:
        with torch.no_grad():
            model(input_ids=torch.tensor([[5, 6, 7]], device=model.device), use_cache=False)
    except RuntimeError:
        for layer in joined:
            del layer.forward


def _joined(layers: Sequence[torch.nn.Linear]) -> Callable[[torch.Tensor], Sequence[torch.Tensor]]:
    sizes = [layer.out_features for layer in layers]
    weight = torch.cat([layer.weight.data for layer in layers])
    bias = torch.cat([layer.bias.data for layer in layers]) if layers[0].bias is not None else None
    for layer, part in zip(layers, torch.split(weight, sizes), strict=True):
        layer.weight.data = part

    def compute(x: torch.Tensor) -> Sequence[torch.Tensor]:
        outputs: Sequence[torch.Tensor] = torch.split(linear(x, weight, bias), sizes, -1)
        return outputs

    return compute
