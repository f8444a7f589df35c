"""What a training leaves alone: weights that are not quantized, and layers without an adapter."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch

from stages.model.adapter import Adapter, unsuitable_layers
from stages.model.architecture import outside_language_model
from stages.model.quantize import Quantization, Quantized

FEW = 0.5
"""Below this share of quantized weights, a line says what is not quantized."""


def describe_gaps(quantized: Quantized, settings: Quantization, wanted: Adapter) -> Iterator[str]:
    """Lines for what a user would not expect of these settings; none for most models.

    Args:
        quantized: The base model, without an adapter yet.
        settings: How it was to be quantized.
        wanted: The adapter.
    """
    if settings.quantization != "none":
        sizes = _unquantized_sizes(quantized)
        done = _quantized_size(quantized)
        share = done / max(1, done + sizes.total())
        if share < FEW:
            largest = ", ".join(name for name, _ in sizes.most_common(3))
            yield f"{share:.0%} of the weights of the layers are quantized; not quantized: {largest}"
    outside = sorted({name.removeprefix("model.").partition(".")[0] for name in outside_language_model(quantized.model)})
    if outside:
        yield f"only the language model is quantized and adapted, not {', '.join(outside)}"
    if wanted.method == "lora" and wanted.target_modules == "all-linear":
        reasons = {(name.rpartition(".")[2], reason) for name, reason in unsuitable_layers(quantized.model).items()}
        for name, reason in sorted(reasons):
            yield f"{name} gets no adapter: {reason}"


def _quantized_size(quantized: Quantized) -> int:
    layers: list[Any] = [quantized.model.get_submodule(name) for name in quantized.layers]
    return sum(layer.in_features * layer.out_features for layer in layers)


def _unquantized_sizes(quantized: Quantized) -> Counter[str]:
    """The numbers of weights in all matrices that are not quantized, embeddings and output head left out, by kind of layer.

    A kind is named by the last parts of a parameter's name, "experts.down_proj".
    """
    model, layers = quantized.model, set(quantized.layers)
    head = model.get_output_embeddings()
    sizes: Counter[str] = Counter()
    for name, module in model.named_modules():
        if name in layers or module is head or isinstance(module, torch.nn.Embedding):
            continue
        for parameter_name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() > 1:
                parts = [
                    part for part in f"{name}.{parameter_name}".removesuffix(".weight").split(".") if not part.isdigit()
                ]
                sizes[".".join(parts[-2:])] += parameter.numel()
    return sizes
