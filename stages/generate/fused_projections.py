"""Fuses linear layers that share an input, as q, k and v do, into one matrix product."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.functional import linear

from stages.model.probe import TRIAL_ERRORS, logits_match, probe_ids, reason_of
from stages.model.shared_inputs import group_by_input, share_computation


def fuse_projections(model: Any) -> str:
    """Concatenates the weights of linear layers that share an input, in place; the layers' own weights become views.

    With few tokens a matrix product takes as long as reading its weights, and small matrices are read at a fraction of
    the bandwidth of large ones. Each layer's output becomes a slice of the fused output. Some models cannot use such a
    slice, because they call `view` on it. A trial run detects this, and the layers then keep their own forward.

    Returns:
        "" if the projections are fused, otherwise the reason why not.
    """
    ids = probe_ids(model)
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
    layers = {name: layer for name, layer in model.named_modules() if type(layer) is torch.nn.Linear}
    groups = [[layers[name] for name in names] for names in group_by_input(model, layers)]
    fused = [group for group in groups if len(group) > 1 and _same_bias(group)]
    for group in fused:
        share_computation(group, _fused_linear(group))
    try:
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits
        reason = "" if logits_match(logits, expected) else "its logits differ"
    except TRIAL_ERRORS as error:
        reason = reason_of(error)
    if reason:
        for layer in (layer for group in fused for layer in group):
            del layer.forward  # set by share_computation; the class's own forward is in effect again
    return reason


def _same_bias(layers: Sequence[torch.nn.Linear]) -> bool:
    """Whether all of the layers have a bias, or none has."""
    return len({layer.bias is None for layer in layers}) == 1


def _fused_linear(layers: Sequence[torch.nn.Linear]) -> Callable[[torch.Tensor], Sequence[torch.Tensor]]:
    """A function from the layers' input (..., in features) to the output of each, (..., out features)."""
    sizes = [layer.out_features for layer in layers]
    weight = torch.cat([layer.weight.data for layer in layers])
    bias = torch.cat([layer.bias.data for layer in layers]) if layers[0].bias is not None else None
    for layer, part in zip(layers, torch.split(weight, sizes), strict=True):
        layer.weight.data = part  # frees the layer's former weight

    def compute(x: torch.Tensor) -> Sequence[torch.Tensor]:
        outputs: Sequence[torch.Tensor] = torch.split(linear(x, weight, bias), sizes, -1)
        return outputs

    return compute
