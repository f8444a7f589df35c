"""What a training quantizes, adapts and leaves alone, in lines for the start."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch

from stages.model.adapter import Adapter, adapted_parameters, unsuitable_layers
from stages.model.architecture import outside_language_model
from stages.model.experts import expert_parameters, expert_shapes, find_experts, is_packed
from stages.model.placement import gigabytes
from stages.model.quantize import DequantizedLinear, Quantization, Quantized, bits_per_weight
from stages.model.routers import find_routers

FEW = 0.5
"""Below this share of quantized weights, a line says what is not quantized."""
NAMED = 3
"""The maximum number of kinds of weights that the line names."""


def describe_weights(quantized: Quantized, adapted: Any, *, settings: Quantization, wanted: Adapter) -> str:
    """How many weights there are, in which form, in how much memory, and how many are trained: one line.

    "30.5 B weights: 29.9 B in nf4 (16 GB), 0.6 B in bfloat16 (1.2 GB: embeddings, norms, routers); adapter: r 16 on 192
    layers and 96 parameters of experts, 850 M weights trained"

    Args:
        quantized: The base model. `adapted` has changed it.
        adapted: The same with the adapter.
        settings: How it was to be quantized.
        wanted: The adapter.
    """
    sizes = _quantized_sizes(quantized)
    rest, memory = _other_weights(quantized)
    done = sum(sizes.values())
    dtype = str(adapted.dtype).removeprefix("torch.")
    parts = []
    if done:
        parts.append(f"{_count(done)} in {settings.quantization} ({gigabytes(_held_bytes(quantized, sizes, settings))})")
    if rest:
        kinds = f": {', '.join(kind for kind, _ in rest.most_common(NAMED))}" if done else ""
        parts.append(f"{_count(rest.total())} in {dtype} ({gigabytes(memory)}{kinds})")
    trained = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    how: str = wanted.method
    if wanted.method == "lora":
        experts = len(adapted_parameters(adapted))
        layers = sum(hasattr(module, "lora_A") for module in adapted.modules()) - experts
        how = f"r {wanted.r} on {layers} layers" + (f" and {experts} parameters of experts" if experts else "")
    return f"{_count(done + rest.total())} weights: {', '.join(parts)}; adapter: {how}, {_count(trained)} weights trained"


def describe_gaps(quantized: Quantized, settings: Quantization, wanted: Adapter) -> Iterator[str]:
    """Lines for what a user would not expect of these settings; none for most models.

    Args:
        quantized: The base model, without an adapter yet.
        settings: How it was to be quantized.
        wanted: The adapter.
    """
    model = quantized.model
    if settings.quantization != "none":
        sizes = _unquantized_sizes(quantized)
        done = sum(_quantized_sizes(quantized).values())
        share = done / max(1, done + sizes.total())
        if share < FEW:
            largest = ", ".join(name for name, _ in sizes.most_common(3))
            yield f"{share:.0%} of the weights of the layers are quantized; not quantized: {largest}"
    if quantized.experts and settings.quantization == "int8":
        yield "the weights of experts are in 8 bits; the inputs of their products are not, as those of linear layers are"
    outside = sorted({name.removeprefix("model.").partition(".")[0] for name in outside_language_model(model)})
    if outside:
        yield f"only the language model is quantized and adapted, not {', '.join(outside)}"
    if wanted.method != "lora":
        return
    experts = expert_parameters(model)
    if experts and not wanted.target_parameters:
        more = sum(wanted.r * shape[0] * sum(shape[1:]) for shape in experts.values())
        size = sum(shape.numel() for shape in experts.values())
        yield (
            f"{_count(size)} weights of experts get no adapter; train.target_parameters: all-experts would train "
            f"{_count(more)} weights more"
        )
    if wanted.target_modules == "all-linear":
        unsuitable, routers = unsuitable_layers(model), find_routers(model)
        reasons = {(name.rpartition(".")[2], reason) for name, reason in unsuitable.items()}
        reasons |= {(".".join(_kind(name)[-2:]), reason) for name, reason in routers.items() if name not in unsuitable}
        for name, reason in sorted(reasons):
            yield f"{name} gets no adapter: {reason}"


def _count(number: int) -> str:
    """30.5 B, 850 M, 12 k"""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            value = number / size
            return f"{value:.1f} {unit}" if value < 99.95 else f"{value:.0f} {unit}"
    return str(number)


def _quantized_sizes(quantized: Quantized) -> dict[str, int]:
    """The numbers of weights, by the name of the layer or parameter."""
    layers = {name: _base_layer(quantized.model, name) for name in quantized.layers}
    shapes = expert_parameters(quantized.model)
    return {name: layer.in_features * layer.out_features for name, layer in layers.items()} | {
        name: shapes[name].numel() for name in quantized.experts
    }


def _base_layer(model: Any, name: str) -> Any:
    layer = model.get_submodule(name)
    return getattr(layer, "base_layer", layer)


def _held_bytes(quantized: Quantized, sizes: dict[str, int], settings: Quantization) -> float:
    """The memory of the quantized weights with their scales; on the CPU linear layers are dequantized."""
    bits = bits_per_weight(settings)
    found = 0.0
    for name, size in sizes.items():
        layer = None if name in quantized.experts else _base_layer(quantized.model, name)
        found += layer.weight.nbytes if isinstance(layer, DequantizedLinear) else size * bits / 8
    return found


def _other_weights(quantized: Quantized) -> tuple[Counter[str], int]:
    """The number of the frozen weights that are not quantized, by kind, and their bytes."""
    model = quantized.model
    done = {id(_base_layer(model, name)) for name in quantized.layers}
    outside = {id(_base_layer(model, name)) for name in outside_language_model(model)}
    routers = _router_modules(model)
    head = model.get_output_embeddings()
    head, seen = getattr(head, "base_layer", head), set()
    sizes: Counter[str] = Counter()
    memory = 0
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            is_weight = id(module) not in done or name == "bias"
            if parameter.requires_grad or not is_weight or is_packed(module, name) or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            memory += parameter.nbytes
            if isinstance(module, torch.nn.Embedding) or module is head:
                kind = "embeddings" if isinstance(module, torch.nn.Embedding) else "output head"
            elif id(module) in outside:
                kind = "vision or audio tower"
            elif id(module) in routers:
                kind = "routers"
            elif name in expert_shapes(module):
                kind = "experts"
            else:
                kind = "norms and biases" if parameter.dim() < 2 else "other layers"
            sizes[kind] += parameter.numel()
    return sizes, memory


def _router_modules(model: Any) -> set[int]:
    """The ids of the modules that choose experts: linear layers, and those with a matrix of a row for each expert."""
    found = set()
    for experts in find_experts(model):
        count = next(iter(experts.shapes.values()))[0]
        block = model.get_submodule(experts.name.rpartition(".")[0])
        for module in block.modules():
            if module is experts.outer or module is experts.module or hasattr(module, "lora_A"):
                continue
            shapes = [tuple(p.shape) for p in module._parameters.values() if p is not None and p.dim() == 2]
            if shapes and all(shape[0] in (1, count) for shape in shapes):
                found.add(id(module))
    return found


def _unquantized_sizes(quantized: Quantized) -> Counter[str]:
    """The numbers of weights in all matrices that are not quantized, embeddings and output head left out, by kind of layer.

    A kind is named by the last parts of a parameter's name, "experts.down_proj".
    """
    model, done = quantized.model, {*quantized.experts, *(f"{name}.weight" for name in quantized.layers)}
    head = model.get_output_embeddings()
    sizes: Counter[str] = Counter()
    for name, module in model.named_modules():
        if module is head or isinstance(module, torch.nn.Embedding):
            continue
        for parameter_name, parameter in module.named_parameters(recurse=False):
            full = f"{name}.{parameter_name}"
            if parameter.dim() > 1 and full not in done:
                sizes[".".join(_kind(full)[-2:])] += parameter.numel()
    return sizes


def _kind(name: str) -> list[str]:
    return [part for part in name.removesuffix(".weight").split(".") if not part.isdigit()]
