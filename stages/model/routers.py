"""Finds the layers that choose experts, which stay as they are: neither quantized nor adapted.

A router that is trained, or rounded to 4 bits, sends tokens to other experts than those that were trained for them. Most
are parameters of a class of their own; Gemma 4, Hunyuan and others have a linear layer. It is found by what it does.
"""

from collections.abc import Iterator
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from stages.model.experts import Experts, find_experts
from stages.model.probe import TRIAL_ERRORS, probe_ids

CHOOSES = "it chooses the experts"
GATE = "it gates a shared expert"


def find_routers(model: Any) -> dict[str, str]:
    """The names of the linear layers beside the experts that choose or gate them, each with what it does.

    A router has as many outputs as there are experts, and a gate has one. Where the experts stand beside the attention, as
    in Gemma 4, what a router returns must change which experts get a token, but not the token. That is tried, unless the
    model is on the meta device.

    Args:
        model: Without an adapter.
    """
    found: dict[str, str] = {}
    tried: dict[tuple[str, ...], bool] = {}
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear | Conv1D)}
    for experts, count in _groups(model):
        block = f"{experts.name.rpartition('.')[0]}."
        for name, layer in layers.items():
            if not name.startswith(block) or name.startswith(f"{experts.name}."):
                continue
            outputs = layer.nf if isinstance(layer, Conv1D) else layer.out_features
            if outputs == 1:
                found[name] = GATE
            elif outputs == count:
                kind = tuple(part for part in name.split(".") if not part.isdigit())
                if kind not in tried:  # the same layer of another block does the same
                    in_decoder_layer = block.removesuffix(".").rpartition(".")[2].isdigit()
                    tried[kind] = not in_decoder_layer or _changes_the_choice(model, layer, experts)
                if tried[kind]:
                    found[name] = CHOOSES
    return found


def _groups(model: Any) -> Iterator[tuple[Experts, int]]:
    """Modules with the weights of experts, or lists of experts, with the number of experts."""
    for experts in find_experts(model):
        yield experts, next(iter(experts.shapes.values()))[0]
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.ModuleList) and name.endswith("experts") and len(module) > 1:
            yield Experts(name, module, module, {}), len(module)


def _changes_the_choice(model: Any, layer: Any, experts: Experts) -> bool:
    """Whether other outputs of a layer change what the experts get, but not the tokens. True if it cannot be tried."""
    if any(parameter.is_meta for parameter in layer.parameters()) or isinstance(experts.module, torch.nn.ModuleList):
        return True
    try:
        before = _inputs(model, experts)
        hook = layer.register_forward_hook(lambda _, __, output: -output)
        try:
            after = _inputs(model, experts)
        finally:
            hook.remove()
    except TRIAL_ERRORS:
        return True
    if not before or len(before) != len(after):
        return True
    return torch.equal(before[0], after[0]) and not all(map(torch.equal, before[1:], after[1:]))


def _inputs(model: Any, experts: Experts) -> list[torch.Tensor]:
    """The tensors that the experts get in a trial run: the tokens, then which experts and with what weights."""
    seen: list[torch.Tensor] = []

    def record(_: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        seen.extend(each.clone() for each in (*inputs, *named.values()) if isinstance(each, torch.Tensor))

    hook = experts.outer.register_forward_pre_hook(record, with_kwargs=True)
    try:
        with torch.no_grad():
            model(input_ids=probe_ids(model), use_cache=False)
    finally:
        hook.remove()
    return seen
