"""The base model as it is trained: its linear layers rounded to 4 or 8 bits by bitsandbytes."""

from pathlib import Path
from typing import Any, Literal, NamedTuple

import bitsandbytes as bnb
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from stages.lib.device import DtypeName, pick_device, pick_dtype
from stages.lib.jsonl import read_json
from stages.lib.params import Section


class Quantization(Section):
    """How the frozen weights are held. bitsandbytes' names."""

    quantization: Literal["nf4", "fp4", "int8", "none"]
    """nf4 and fp4: 4 bits a weight; int8: 8 bits (LLM.int8); none: as they are."""
    bnb_4bit_use_double_quant: bool
    """Whether the 4-bit scales are quantized too: 0.4 bits less a weight, for hardly any error."""
    llm_int8_threshold: float
    """int8: inputs larger than this are multiplied in 16 bits."""
    dtype: DtypeName
    """The type of products and of all that is not quantized."""


class Quantized(NamedTuple):
    """A loaded model, and the names of the linear layers whose weights are rounded."""

    model: Any
    layers: list[str]


def load_quantized(base: Path, settings: Quantization) -> Quantized:
    """The base model on this machine's device, quantized as `settings` say, in evaluation mode, all weights frozen."""
    device = pick_device()
    dtype = pick_dtype(settings.dtype, device)
    config = None
    if settings.quantization in ("nf4", "fp4"):
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=settings.quantization,
            bnb_4bit_use_double_quant=settings.bnb_4bit_use_double_quant,
            bnb_4bit_compute_dtype=dtype,
        )
    elif settings.quantization == "int8":
        config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=settings.llm_int8_threshold)
    model = AutoModelForCausalLM.from_pretrained(
        base,
        dtype=dtype,
        device_map={"": device},
        quantization_config=config,
        trust_remote_code=read_json(base / "manifest.json")["trust_remote_code"],
        use_safetensors=True,
    )
    kinds = (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)
    layers = sorted(name for name, layer in model.named_modules() if isinstance(layer, kinds))
    if device.type == "cpu":
        _unpack_4bit(model)
    model.requires_grad_(False)
    return Quantized(model.eval(), layers)


def round_trip(weight: torch.Tensor, settings: Quantization) -> torch.Tensor:
    """A linear layer's weight as the quantized model multiplies with it, in float32 on this machine's device.

    The same calls as bitsandbytes' layers make, on the same type and device, so the same rounding.
    """
    device = pick_device()
    weight = weight.to(device, pick_dtype(settings.dtype, device))
    if settings.quantization == "none":
        return weight.float()
    if settings.quantization == "int8":
        rounded, scales, _ = bnb.functional.int8_vectorwise_quant(weight.half())
        product: torch.Tensor = rounded.float() * scales.float().view(-1, 1) / 127
        return product
    packed, state = bnb.functional.quantize_4bit(
        weight, quant_type=settings.quantization, compress_statistics=settings.bnb_4bit_use_double_quant
    )
    unpacked: torch.Tensor = bnb.functional.dequantize_4bit(packed, state)
    return unpacked.float()


def _unpack_4bit(model: torch.nn.Module) -> None:
    """Puts the rounded weights back into ordinary linear layers.

    On the CPU bitsandbytes unpacks a layer at every use and then multiplies as an ordinary layer does: unpacked once, the
    numbers are the same to the bit, training is a fifth faster, and main memory has room for the weights.
    """
    for name, layer in list(model.named_modules()):
        if isinstance(layer, bnb.nn.Linear4bit):
            weight = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            plain = torch.nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
            plain.weight = torch.nn.Parameter(weight.to(layer.compute_dtype), requires_grad=False)
            plain.bias = layer.bias
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, plain)
