"""Loads the base model with its linear layers quantized to 4 or 8 bits by bitsandbytes."""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import bitsandbytes as bnb
import torch
from transformers import BitsAndBytesConfig, integrations
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from stages.core.params import Section, bad_param
from stages.core.problem import Problem
from stages.model.architecture import computes_linear, load_pretrained, outside_language_model, skeleton
from stages.model.base_weights import BaseWeights
from stages.model.device import DtypeName, assert_on, pick_device, pick_dtype
from stages.model.expert_quantizer import quantized_experts
from stages.model.experts import PackedExperts, describe_experts, expert_parameters, find_experts, install, pack, write_sum
from stages.model.placement import (
    ONE_GPU,
    SPREAD,
    Memory,
    Placement,
    free_memory,
    gigabytes,
    plan_placement,
    weight_bytes,
)
from stages.model.routers import find_routers


class Quantization(Section):
    """How the frozen weights are stored. The names are those of Transformers' BitsAndBytesConfig."""

    quantization: Literal["nf4", "fp4", "int8", "none"]
    """nf4, fp4: 4 bits per weight (Dettmers et al. 2023); int8: 8 bits (LLM.int8, Dettmers et al. 2022); none: as is. The
    experts of mixture-of-experts layers are quantized too; with int8 their weights alone, not the inputs."""
    bnb_4bit_use_double_quant: bool
    """4 bits: quantize the scales too, which saves 0.4 bits per weight at hardly any error."""
    llm_int8_threshold: float
    """int8: input values above this are multiplied in 16 bits."""
    llm_int8_skip_modules: list[str]
    """Linear layers, or modules of experts, that are not quantized, by name or last part of the name, with 4 bits too. The
    output head never is."""
    dtype: DtypeName
    """The dtype of matrix products and of all weights that are not quantized."""


class Quantized(NamedTuple):
    """A quantized model, and what `merge` has to know of its layers."""

    model: Any
    layers: list[str]
    """The names of the quantized linear layers, sorted."""
    transposed: list[str]
    """The names of all layers, quantized or not, whose weights the base's files store as (in, out): GPT-2's Conv1D."""
    experts: list[str]
    """The full names of the quantized parameters with the weights of experts, in the model's order."""


class DequantizedLinear(torch.nn.Linear):
    """A linear layer whose 4-bit weight was dequantized when the model was loaded; see `_dequantize_4bit_layers`."""

    source_cls: type[torch.nn.Module]
    """The layer's class in the model without quantization, under the name that Transformers gives it."""


def load_quantized(base: Path, settings: Quantization, *, on_cpu: bool = False, one_gpu: bool = False) -> Quantized:
    """Loads the base model in evaluation mode, quantized, with all weights frozen.

    Args:
        base: The model's folder, models/base.
        settings: How to quantize it.
        on_cpu: Keep the quantized weights in main memory, for a model that one GPU cannot hold (FSDP).
        one_gpu: The model must be on this process's device, as training needs it. Otherwise it is spread over all GPUs if
            one does not hold it, and a line says so; inputs belong on `model.device`.

    Raises Problem if a layer of llm_int8_skip_modules is not in the model, or if the GPUs have too little memory.
    """
    device = pick_device()
    dtype = pick_dtype(settings.dtype, device)
    BaseWeights(base).check_shapes()
    placement = None if on_cpu or one_gpu else _spread(base, settings)
    try:
        storage = dtype if on_cpu else torch.uint8
        with _quantized_on(device), _own_linear_classes_quantized(), _experts_quantized_on(device, settings, storage):
            model = load_pretrained(
                base,
                dtype=dtype,
                device_map={"": "cpu"} if on_cpu else placement.device_map if placement else {"": device},
                **_make_config(base, settings, dtype=dtype, on_cpu=on_cpu),
            )
    except torch.OutOfMemoryError:
        raise Problem(
            f"{base}: the model does not fit into the memory of {device} with train.quantization {settings.quantization}; "
            "use nf4, train.fsdp with several GPUs, or a GPU with more memory"
        ) from None
    layers = sorted(
        name for name, layer in model.named_modules() if isinstance(layer, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt)
    )
    for layer in model.modules():
        if isinstance(layer, bnb.nn.Linear4bit):
            # On a CPU with avx512_bf16 its first call would repack the weights into a format that nothing else can read.
            layer.support_avx512bf16_for_cpu = False
    if not on_cpu and not placement:
        assert_on(model, device)
    if device.type == "cpu" and not on_cpu:
        _dequantize_4bit_layers(model)
    install(model)
    model.requires_grad_(False)
    transposed = sorted(name for name, layer in model.named_modules() if is_transposed(layer))
    experts = [each["name"] for each in describe_experts(model) if each["quantized"]]
    return Quantized(model.eval(), layers, transposed, experts)


def _experts_quantized_on(
    device: torch.device, settings: Quantization, storage: torch.dtype
) -> AbstractContextManager[None]:
    """As `_quantized_on`, for experts."""
    return quantized_experts(
        settings.quantization, double_quant=settings.bnb_4bit_use_double_quant, device=device, storage=storage
    )


def _make_config(base: Path, settings: Quantization, *, dtype: torch.dtype, on_cpu: bool) -> dict[str, BitsAndBytesConfig]:
    """The argument `quantization_config` of `from_pretrained`, if there is one.

    Raises Problem if a layer of llm_int8_skip_modules is not in the model.
    """
    if settings.quantization == "none":
        return {}
    skipped = _skipped_modules(skeleton(base, torch.float32), settings)
    if settings.quantization == "int8":
        config = BitsAndBytesConfig(
            load_in_8bit=True, llm_int8_threshold=settings.llm_int8_threshold, llm_int8_skip_modules=skipped
        )
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=settings.quantization,
            bnb_4bit_use_double_quant=settings.bnb_4bit_use_double_quant,
            bnb_4bit_compute_dtype=dtype,
            # FSDP shards and gathers weights of a floating-point dtype; the bits are the same.
            bnb_4bit_quant_storage=dtype if on_cpu else torch.uint8,
            llm_int8_skip_modules=skipped,
        )
    return {"quantization_config": config}


@contextmanager
def _own_linear_classes_quantized() -> Iterator[None]:
    """Within the block, Transformers quantizes linear layers of a model's own classes too, if they compute what nn.Linear
    does.

    It replaces layers whose class is exactly nn.Linear, and leaves Falcon's FalconLinear in 16 bits without a word.
    """
    replace = integrations.replace_with_bnb_linear

    def replace_all(model: Any, *given: Any, **named: Any) -> Any:
        for module in model.modules():
            if _is_quantizable(module) and not isinstance(module, Conv1D):
                module.__class__ = torch.nn.Linear
        return replace(model, *given, **named)

    integrations.replace_with_bnb_linear = replace_all
    try:
        yield
    finally:
        integrations.replace_with_bnb_linear = replace


def _is_quantizable(module: Any) -> bool:
    return isinstance(module, torch.nn.Linear | Conv1D) and computes_linear(module)


@contextmanager
def _quantized_on(device: torch.device) -> Iterator[None]:
    """Within the block, 4-bit weights that go to main memory are quantized on `device`, if it is a GPU.

    bitsandbytes would quantize them on the CPU, which takes many minutes for a large model, and rounds the means of the
    scales otherwise than the GPU, on which `merge` quantizes them again.
    """
    quantize = bnb.nn.Params4bit._quantize
    if device.type == "cuda":
        bnb.nn.Params4bit._quantize = lambda weight, target: quantize(weight, device).to(target)
    try:
        yield
    finally:
        bnb.nn.Params4bit._quantize = quantize


def _spread(base: Path, settings: Quantization) -> Placement | None:
    """How to spread the quantized model over several GPUs, with a line that says it; None if one device is enough.

    Raises Problem if the GPUs together do not hold it. Weights in main memory are no way out: bitsandbytes would keep them
    unquantized there, which is another model than the one that was trained.
    """
    memory, device = free_memory(), pick_device()
    dtype = pick_dtype(settings.dtype, device)
    if len(memory.gpus) < 2 or weight_bytes(base, dtype) <= ONE_GPU * memory.gpus[device.index]:
        return None
    model = skeleton(base, dtype)
    placement = plan_placement(model, memory, quantized=quantized_bits(model, settings))
    if placement.total_bytes <= SPREAD * memory.gpus[device.index]:
        return None
    if placement.gpu_bytes < placement.total_bytes:
        raise Problem(
            f"{base}: the model that was trained, in train.quantization {settings.quantization}, has "
            f"{gigabytes(placement.total_bytes)} of weights, which the GPUs together must hold; free on them: "
            f"{' + '.join(map(gigabytes, memory.gpus.values()))}; use more GPUs, or train with nf4"
        )
    print(f"{base}, {settings.quantization}: {placement.describe()}", flush=True)
    return placement


def quantized_bits(model: Any, settings: Quantization) -> dict[str, float]:
    """The bits that each quantized weight takes, scales included, by parameter name.

    Args:
        model: The base on the meta device.
        settings: How it is quantized.
    """
    if settings.quantization == "none":
        return {}
    bits = bits_per_weight(settings)
    skipped = _skipped_modules(model, settings)
    weights = {
        f"{name}.weight": bits
        for name, layer in model.named_modules()
        if _is_quantizable(layer) and should_convert_module(name, skipped)
    }
    experts = [name for name in expert_parameters(model) if should_convert_module(name.rpartition(".")[0], skipped)]
    return weights | dict.fromkeys(experts, bits)


def bits_per_weight(settings: Quantization) -> float:
    """The bits of a quantized weight, with its part of the scales.

    bitsandbytes has a scale in float32 for 64 weights of 4 bits; double quantization stores it in 8 bits.
    """
    return 8.0 if settings.quantization == "int8" else 4.127 if settings.bnb_4bit_use_double_quant else 4.5


def quantized_bytes(base: Path, settings: Quantization) -> int:
    """Bytes of the quantized model's weights, scales included."""
    dtype = pick_dtype(settings.dtype, pick_device())
    model = skeleton(base, dtype)
    return plan_placement(model, Memory({}, 1 << 62), quantized=quantized_bits(model, settings)).total_bytes


def is_transposed(layer: Any) -> bool:
    """Whether the base's files store the layer's weight as (in, out), as GPT-2's Conv1D does, before quantization too."""
    return issubclass(getattr(layer, "source_cls", type(layer)), Conv1D)


def _skipped_modules(model: Any, settings: Quantization) -> list[str]:
    """The modules that are not quantized, sorted: those of llm_int8_skip_modules, the output head and weights that are tied,
    as Transformers has it, all that is not part of the language model, and routers.

    Raises Problem with all names of llm_int8_skip_modules that the model does not have.
    """
    linear = [name for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear | Conv1D)]
    linear += [each.name for each in find_experts(model)]
    problems = [
        bad_param(
            "train.llm_int8_skip_modules",
            f"the model has no linear layer {wanted!r}; its linear layers are {', '.join(ends_of(linear))}",
        )
        for wanted in settings.llm_int8_skip_modules
        if not any(name == wanted or name.endswith(f".{wanted}") for name in linear)
    ]
    if problems:
        raise Problem(*problems)
    kept = get_keys_to_not_convert(model) or ()
    return sorted({*kept, *settings.llm_int8_skip_modules, *outside_language_model(model), *find_routers(model)})


def ends_of(names: Iterable[str]) -> list[str]:
    """The last parts of the names without duplicates, sorted: what a user writes into target_modules."""
    return sorted({name.rpartition(".")[2] for name in names})


def set_weight(model: Any, name: str, *, weight: torch.Tensor, settings: Quantization) -> None:
    """Replaces a layer's weight, and quantizes the new one as the old one was.

    Args:
        model: From `load_quantized`, with or without an adapter.
        name: The layer's full name, with `.base_layer` at the end if it has an adapter.
        weight: (out, in), also for a Conv1D.
        settings: How the model is quantized.
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
    elif isinstance(layer, DequantizedLinear):
        layer.weight.data = round_trip(weight, settings).to(layer.weight)
    else:
        layer.weight.data = (weight.T if isinstance(layer, Conv1D) else weight).to(layer.weight)


def round_trip(weight: torch.Tensor, settings: Quantization) -> torch.Tensor:
    """Quantizes and dequantizes a linear layer's weight with bitsandbytes' functions, as a quantized layer does.

    Args:
        weight: (out, in). For experts, (experts, out, in) or (experts, in, out), see `pack_experts`.
        settings: How the model is quantized.

    Returns:
        The same shape in float32, on this process's device; of linear layers with values of settings.dtype.
    """
    if settings.quantization == "none":
        return _rounded(weight, settings).float()
    if weight.dim() == 3:
        data, packed = pack_experts(weight, settings)
        return write_sum(packed.chunks(data), None, out=torch.empty(weight.shape, device=data.device))
    if settings.quantization == "int8":
        quantized, scales, _ = bnb.functional.int8_vectorwise_quant(_rounded(weight, settings).half())
        product: torch.Tensor = quantized.float() * scales.float().view(-1, 1) / 127
        return product
    dequantized: torch.Tensor = bnb.functional.dequantize_4bit(*quantize_4bit(weight, settings))
    return dequantized.float()


def quantize_4bit(weight: torch.Tensor, settings: Quantization) -> tuple[torch.Tensor, Any]:
    """A linear layer's weight (out, in) in 4 bits, packed, and its quantization state, on this process's device."""
    packed, state = bnb.functional.quantize_4bit(
        _rounded(weight, settings),
        quant_type=settings.quantization,
        compress_statistics=settings.bnb_4bit_use_double_quant,
    )
    return packed, state


def pack_experts(weight: torch.Tensor, settings: Quantization) -> tuple[torch.Tensor, PackedExperts]:
    """The weights (experts, ...) of a parameter quantized on this process's device, as the loaded model has them.

    Returns:
        The bytes, and how to read them.
    """
    weight = _rounded(weight, settings)
    double_quant = settings.bnb_4bit_use_double_quant
    return pack(weight, settings.quantization, double_quant=double_quant, device=weight.device)


def _rounded(weight: torch.Tensor, settings: Quantization) -> torch.Tensor:
    """The weight on this process's device, in the model's dtype."""
    device = pick_device()
    return weight.to(device, pick_dtype(settings.dtype, device))


def _dequantize_4bit_layers(model: Any) -> None:
    """Replaces the 4-bit layers of a model on the CPU by ordinary linear layers with the dequantized weights.

    On the CPU bitsandbytes dequantizes a layer's weight at every call, and then multiplies as an ordinary layer does. If it
    is done once, the results are identical to the bit, training takes a fifth less time, and main memory has room for it.
    """
    for name, layer in list(model.named_modules()):
        if isinstance(layer, bnb.nn.Linear4bit):
            weight = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            linear = DequantizedLinear(layer.in_features, layer.out_features, bias=False, device="meta")
            linear.source_cls = layer.source_cls
            linear.weight = torch.nn.Parameter(weight.to(layer.compute_dtype), requires_grad=False)
            linear.bias = layer.bias
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, linear)
