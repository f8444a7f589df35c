"""The base model as it is trained: its linear layers rounded to 4 or 8 bits by bitsandbytes."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import bitsandbytes as bnb
import torch
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert

from stages.core.jsonl import read_json
from stages.core.params import Section
from stages.core.problem import Problem
from stages.model.device import DtypeName, pick_device, pick_dtype


class Quantization(Section):
    """How the frozen weights are held. bitsandbytes' names."""

    quantization: Literal["nf4", "fp4", "int8", "none"]
    """nf4 and fp4: 4 bits a weight; int8: 8 bits (LLM.int8); none: as they are."""
    bnb_4bit_use_double_quant: bool
    """Whether the 4-bit scales are quantized too: 0.4 bits less a weight, for hardly any error."""
    llm_int8_threshold: float
    """int8: inputs larger than this are multiplied in 16 bits."""
    llm_int8_skip_modules: list[str]
    """Linear layers, by name or its end, that stay as they are, in 4 bits too; the output head always does."""
    dtype: DtypeName
    """The type of products and of all that is not quantized."""


class Quantized(NamedTuple):
    """A loaded model, and the names of the linear layers whose weights are rounded."""

    model: Any
    layers: list[str]
    transposed: list[str]
    """Layers, rounded or not, whose weights the base's files have as (in, out)."""


def load_quantized(base: Path, settings: Quantization, *, in_main_memory: bool = False) -> Quantized:
    """The base model on this machine's device, quantized as `settings` say, in evaluation mode, all weights frozen.

    `in_main_memory`: it stays there, packed, for a GPU that would not hold it.
    """
    device = pick_device()
    dtype = pick_dtype(settings.dtype, device)
    trust = read_json(base / "manifest.json")["trust_remote_code"]
    skipped = _skipped(base, settings, trust_remote_code=trust)
    config = None
    if settings.quantization in ("nf4", "fp4"):
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=settings.quantization,
            bnb_4bit_use_double_quant=settings.bnb_4bit_use_double_quant,
            bnb_4bit_compute_dtype=dtype,
            # What FSDP parts and gathers is best of a floating-point type; the bits are the same.
            bnb_4bit_quant_storage=dtype if in_main_memory else torch.uint8,
            llm_int8_skip_modules=skipped,
        )
    elif settings.quantization == "int8":
        config = BitsAndBytesConfig(
            load_in_8bit=True, llm_int8_threshold=settings.llm_int8_threshold, llm_int8_skip_modules=skipped
        )
    model = AutoModelForCausalLM.from_pretrained(
        base,
        dtype=dtype,
        device_map={"": "cpu" if in_main_memory else device},
        quantization_config=config,
        trust_remote_code=trust,
        use_safetensors=True,
    )
    kinds = (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)
    layers = sorted(name for name, layer in model.named_modules() if isinstance(layer, kinds))
    for layer in model.modules():
        if isinstance(layer, bnb.nn.Linear4bit):
            # On a CPU with avx512_bf16 its first use would lay the weights out in a way that nothing else can read.
            layer.support_avx512bf16_for_cpu = False
    if device.type == "cpu" and not in_main_memory:
        _unpack_4bit(model)
    model.requires_grad_(False)
    return Quantized(model.eval(), layers, sorted(name for name, layer in model.named_modules() if is_transposed(layer)))


def is_transposed(layer: Any) -> bool:
    """Whether the base's files have the layer's weight as (in, out): GPT-2's Conv1D, also where bitsandbytes turned it."""
    return issubclass(getattr(layer, "source_cls", type(layer)), Conv1D)


def _skipped(base: Path, settings: Quantization, *, trust_remote_code: bool) -> list[str] | None:
    """The layers that are not quantized: those of the settings, and those that Transformers leaves out if none is named.

    Raises Problem if the model has no layer of a name.
    """
    if not settings.llm_int8_skip_modules or settings.quantization == "none":
        return None
    config = AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    linear = [name for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear | Conv1D)]
    problems = [
        f"params.yaml: train.llm_int8_skip_modules: {wanted!r} is no linear layer; there are {', '.join(ends_of(linear))}"
        for wanted in settings.llm_int8_skip_modules
        if not any(name == wanted or name.endswith(f".{wanted}") for name in linear)
    ]
    if problems:
        raise Problem(*problems)
    return sorted({*get_keys_to_not_convert(model), *settings.llm_int8_skip_modules})


def ends_of(names: Iterable[str]) -> list[str]:
    """The last parts of the names, once each: what a person writes into target_modules."""
    return sorted({name.rpartition(".")[2] for name in names})


def set_weight(model: Any, name: str, weight: torch.Tensor, settings: Quantization) -> None:
    """Gives the layer `name`, or the one inside its adapter (`.base_layer`), another weight, rounded as its own was.

    `weight` is (out, in), also for a Conv1D.
    """
    layer = model.get_submodule(name)
    if isinstance(layer, bnb.nn.Linear4bit):
        old = layer.weight
        layer.weight = bnb.nn.Params4bit(
            weight.to("cpu", layer.compute_dtype),
            requires_grad=False,
            quant_type=settings.quantization,
            compress_statistics=settings.bnb_4bit_use_double_quant,
            quant_storage=old.quant_storage,
            module=layer,
        ).to(old.device)
    elif isinstance(layer, bnb.nn.Linear8bitLt):
        device = layer.weight.device
        layer.weight = bnb.nn.Int8Params(weight.to("cpu", torch.float16), requires_grad=False, has_fp16_weights=False).to(
            device
        )
    elif name.removesuffix(".base_layer") in getattr(model, "unpacked_layers", ()):
        layer.weight.data = round_trip(weight, settings).to(layer.weight)
    else:
        layer.weight.data = (weight.T if isinstance(layer, Conv1D) else weight).to(layer.weight)


def round_trip(weight: torch.Tensor, settings: Quantization) -> torch.Tensor:
    """A linear layer's weight (out, in) as the quantized model multiplies with it, in float32 on this machine's device.

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


def _unpack_4bit(model: Any) -> None:
    """Puts the rounded weights back into ordinary linear layers.

    On the CPU bitsandbytes unpacks a layer at every use and then multiplies as an ordinary layer does: unpacked once, the
    numbers are the same to the bit, training is a fifth faster, and main memory has room for the weights.
    """
    model.unpacked_layers = set()
    for name, layer in list(model.named_modules()):
        if isinstance(layer, bnb.nn.Linear4bit):
            model.unpacked_layers.add(name)
            weight = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            plain: Any = torch.nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
            plain.source_cls = layer.source_cls
            plain.weight = torch.nn.Parameter(weight.to(layer.compute_dtype), requires_grad=False)
            plain.bias = layer.bias
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, plain)
