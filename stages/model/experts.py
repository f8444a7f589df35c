"""Experts of mixture-of-experts layers: parameters of three dimensions, in 16 bits or quantized, with or without LoRA.

Transformers keeps a matrix of all experts of a layer as one parameter (experts, out, in), or (experts, in, out) where the
module says `is_transposed`, as that of gpt-oss. bitsandbytes' layers hold linear layers alone, so a quantized parameter is
kept here as its bytes, under its own name, beside `PackedExperts` with its scales. While the module's forward method runs,
the name stands for the weights in full (`ExpertsForward`).

PEFT adapts such a parameter with `target_parameters`: a `ParamWrapper` around the module for each of its parameters, with
lora_A and lora_B of all experts in one matrix each. W' = W + s B A is summed in float32 and rounded once, by `write_sum`,
which merging calls too: the merged weight is the one that was trained. PEFT's own forward is never used: it would sum in
16 bits, and with a parametrization of bitsandbytes it adds the delta weight once more in each call (PEFT 0.21).
"""
# ruff: noqa: N803, N806 (lora_A and lora_B are PEFT's names)

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import bitsandbytes as bnb
import torch
from peft.tuners.lora.layer import ParamWrapper

CHUNK_WEIGHTS = 1 << 26
"""Weights that are quantized, or summed in float32, at a time; whole experts, at least one."""
PACKED = "packed_experts"
"""The attribute of a module that holds the `PackedExperts` of its quantized parameters, by name."""


# The modules of a model


class Experts(NamedTuple):
    """A module with the weights of all experts of a layer."""

    name: str
    """Its full name in the base model, "model.layers.0.mlp.experts"."""
    module: Any
    """Without PEFT's wrappers."""
    outer: Any
    """The outermost of PEFT's wrappers, which the model calls; `module` if there is none."""
    wrappers: dict[str, Any]
    """PEFT's wrappers by the name of the parameter that they adapt."""

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """The shapes (experts, ...) of its parameters by their own name, in the module's order."""
        return expert_shapes(self.module)

    @property
    def transposed(self) -> bool:
        """Whether the weights are (experts, in, out). PEFT looks at the same attribute."""
        return bool(getattr(self.module, "is_transposed", False))


def find_experts(model: Any) -> list[Experts]:
    """All modules with experts' weights, of a model with or without an adapter."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    found, inner = [], set()
    for name, outer in base.named_modules():
        if id(outer) in inner:
            continue
        module, wrappers = outer, {}
        while isinstance(module, ParamWrapper):
            wrappers[module.parameter_name] = module
            module = module.base_layer
            inner.add(id(module))
        if expert_shapes(module):
            found.append(Experts(name, module, outer, wrappers))
    return found


def expert_shapes(module: Any) -> dict[str, torch.Size]:
    """The shapes of the parameters of a module that hold the weights of experts, by their own name.

    They are those with three dimensions of which the first is the module's number of experts. Convolutions and the gates of
    recurrent layers have three dimensions too.
    """
    packed = getattr(module, PACKED, {})
    count = getattr(module, "num_experts", None)
    return {
        name: packed[name].shape if name in packed else parameter.shape
        for name, parameter in module._parameters.items()
        if name in packed or (parameter is not None and parameter.dim() == 3 and parameter.shape[0] == count)
    }


def expert_parameters(model: Any) -> dict[str, torch.Size]:
    """The shapes of all experts' parameters by their full name, "model.layers.0.mlp.experts.down_proj", in order."""
    return {f"{each.name}.{name}": shape for each in find_experts(model) for name, shape in each.shapes.items()}


# Quantization


class PackedExperts:
    """How to read a quantized parameter. Its bytes are a parameter of the module, so that they are moved and sharded."""

    def __init__(self, shape: torch.Size, dtype: torch.dtype, scales: list[Any]) -> None:
        """Args:
        shape: (experts, out, in) or (experts, in, out).
        dtype: That of matrix products.
        scales: Of each chunk of experts: bitsandbytes' QuantState with 4 bits, with 8 bits a float32 tensor of (rows, 1).
        """
        self.shape, self.dtype, self._scales = shape, dtype, scales

    def chunks(self, data: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        """The dequantized weights in float32, a few experts at a time, with the numbers of these experts.

        Args:
            data: The module's parameter, of any dtype that holds the bytes.
        """
        start, flat = 0, data.detach().reshape(-1).view(torch.uint8)
        for part, scales in zip(chunks_of(self.shape), self._scales, strict=True):
            shape = torch.Size((part.stop - part.start, *self.shape[1:]))
            size = shape.numel() if isinstance(scales, torch.Tensor) else -(-shape.numel() // 2)
            yield part, self._dequantize(flat[start : start + size], scales, shape)
            start += size

    def _dequantize(self, packed: torch.Tensor, scales: Any, shape: torch.Size) -> torch.Tensor:
        if isinstance(scales, torch.Tensor):
            rows = packed.view(torch.int8).view(-1, shape[-1]).float()
            return rows.mul_(scales.to(rows.device) / 127).view(shape)
        if scales.absmax.device != packed.device:  # the model was moved
            scales.to(packed.device)
        state = copy.copy(scales)
        state.dtype = torch.float32
        weight: torch.Tensor = bnb.functional.dequantize_4bit(packed.view(-1, 1), state)
        return weight


def chunks_of(shape: torch.Size) -> Iterator[slice]:
    """The numbers of the experts in chunks of at most CHUNK_WEIGHTS weights."""
    count = max(1, CHUNK_WEIGHTS // shape[1:].numel())
    for start in range(0, shape[0], count):
        yield slice(start, min(start + count, shape[0]))


def pack(
    weight: torch.Tensor, quantization: str, *, double_quant: bool, device: torch.device
) -> tuple[torch.Tensor, PackedExperts]:
    """Quantizes a parameter chunk by chunk: with NF4 or FP4 in blocks of 64, with int8 by the last dimension.

    The 8-bit weights are those of LLM.int8; the inputs of the products are not quantized.

    Args:
        weight: (experts, ...) in the dtype of matrix products, on any device.
        quantization: nf4, fp4 or int8.
        double_quant: 4 bits: whether the scales are quantized too.
        device: Where to quantize. The means of the scales are rounded otherwise on another kind of device.

    Returns:
        The bytes as (bytes, 1) on the device of `weight`, and how to read them.
    """
    data, scales = [], []
    for part in chunks_of(weight.shape):
        chunk = weight[part].to(device).contiguous()
        if quantization == "int8":
            rows, largest, _ = bnb.functional.int8_vectorwise_quant(chunk.half().view(-1, chunk.shape[-1]))
            packed, scale = rows.view(torch.uint8), largest.float().view(-1, 1)
        else:
            packed, scale = bnb.functional.quantize_4bit(
                chunk, quant_type=quantization, compress_statistics=double_quant, quant_storage=torch.uint8
            )
        data.append(packed.reshape(-1, 1).to(weight.device))
        scales.append(scale.to(weight.device) if isinstance(scale, torch.Tensor) else _moved(scale, weight.device))
    return torch.cat(data), PackedExperts(weight.shape, weight.dtype, scales)


def _moved(state: Any, device: torch.device) -> Any:
    state.to(device)
    return state


def put_packed(module: Any, name: str, *, data: torch.Tensor, packed: PackedExperts) -> None:
    """Replaces a parameter of a module by a quantized one."""
    vars(module).setdefault(PACKED, {})[name] = packed
    module._parameters[name] = torch.nn.Parameter(data, requires_grad=False)


def is_packed(module: Any, name: str) -> bool:
    """Whether a module's parameter is quantized."""
    return name in getattr(module, PACKED, {})


def describe_experts(model: Any) -> list[dict[str, Any]]:
    """What `merge` must know of each parameter of experts, in the model's order, for training.json.

    "name", its full name; "transposed", whether it is (experts, in, out); "quantized"; "adapted".
    """
    return [
        {
            "name": f"{experts.name}.{name}",
            "transposed": experts.transposed,
            "quantized": is_packed(experts.module, name),
            "adapted": name in experts.wrappers,
        }
        for experts in find_experts(model)
        for name in experts.shapes
    ]


# LoRA


class Factors(NamedTuple):
    """The delta weights of all experts are scaling · left right."""

    left: torch.Tensor
    """(experts, out, r); (experts, in, r) if the weights are transposed."""
    right: torch.Tensor
    """(experts, r, in); (experts, r, out) if the weights are transposed."""
    scaling: float


def factors_of(lora_A: torch.Tensor, lora_B: torch.Tensor, *, experts: int, transposed: bool, scaling: float) -> Factors:
    """The matrices of the single experts, which PEFT keeps in one.

    Args:
        lora_A: (experts r, in), expert after expert.
        lora_B: (out, r experts): column k experts + e is column k of expert e.
        experts: Their number.
        transposed: Whether the weights are (experts, in, out).
        scaling: Of the delta weight.
    """
    each_A = lora_A.reshape(experts, -1, lora_A.shape[-1])
    each_B = lora_B.reshape(lora_B.shape[0], -1, experts).permute(2, 0, 1)
    if transposed:
        return Factors(each_A.transpose(1, 2), each_B.transpose(1, 2), scaling)
    return Factors(each_B, each_A, scaling)


def wrapper_factors(experts: Experts, name: str) -> Factors | None:
    """Those of a parameter in an adapted model; None if it has no adapter, or if the adapter is turned off."""
    wrapper = experts.wrappers.get(name)
    if wrapper is None or wrapper.disable_adapters:
        return None
    return factors_of(
        wrapper.lora_A["default"].weight,
        wrapper.lora_B["default"].weight,
        experts=experts.shapes[name][0],
        transposed=experts.transposed,
        scaling=wrapper.scaling["default"],
    )


# The sum


def weight_chunks(weight: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """The weights (experts, ...) in float32, a few experts at a time, with the numbers of these experts."""
    for part in chunks_of(weight.shape):
        yield part, weight[part].detach().float()


def read_chunks(module: Any, name: str) -> Iterator[tuple[slice, torch.Tensor]]:
    """As `weight_chunks`, for a parameter of a module, dequantized if it is quantized."""
    # Not by getattr: the name may stand for the dequantized weights just now. Sharded weights are here once gathered.
    data = module._parameters[name]
    return getattr(module, PACKED)[name].chunks(data) if is_packed(module, name) else weight_chunks(data)


def write_sum(chunks: Iterable[tuple[slice, torch.Tensor]], factors: Factors | None, *, out: torch.Tensor) -> torch.Tensor:
    """Writes W + scaling · left right of all experts into `out`, summed in float32 and rounded once. Returns `out`.

    Args:
        chunks: W in float32, by the numbers of the experts.
        factors: In float32; None for W itself.
        out: (experts, ...) in the dtype to round to.
    """
    for part, weight in chunks:
        if factors is not None:
            left, right = factors.left[part].detach(), factors.right[part].detach()
            out[part].copy_(torch.baddbmm(weight, left, right, alpha=factors.scaling))
        else:
            out[part].copy_(weight)
    return out


class _Sum(torch.autograd.Function):
    """W + scaling · left right, with gradients for the factors."""

    @staticmethod
    def forward(
        ctx: Any, experts: Experts, name: str, left: torch.Tensor, right: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        ctx.save_for_backward(left, right)
        ctx.scaling = scaling
        out = _empty(experts, name, left.device)
        return write_sum(read_chunks(experts.module, name), Factors(left, right, scaling), out=out)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        left, right = ctx.saved_tensors
        grad = grad.float()
        left_grad = torch.bmm(grad, right.transpose(1, 2)).mul_(ctx.scaling)
        right_grad = torch.bmm(left.transpose(1, 2), grad).mul_(ctx.scaling)
        return None, None, left_grad, right_grad, None


def product_dtype(experts: Experts, name: str) -> torch.dtype:
    """The dtype of matrix products with a parameter."""
    dtype: torch.dtype = (
        getattr(experts.module, PACKED)[name].dtype
        if is_packed(experts.module, name)
        else experts.module._parameters[name].dtype
    )
    return dtype


def _empty(experts: Experts, name: str, device: torch.device) -> torch.Tensor:
    return torch.empty(experts.shapes[name], dtype=product_dtype(experts, name), device=device)


def expert_weight(experts: Experts, name: str) -> torch.Tensor:
    """The weights (experts, ...) that the model computes with, with the delta weights, in the dtype of products."""
    factors, device = wrapper_factors(experts, name), experts.module._parameters[name].device
    with torch.autocast(device.type, enabled=False):
        if factors is not None:
            summed: torch.Tensor = _Sum.apply(experts, name, factors.left, factors.right, factors.scaling)  # type: ignore[no-untyped-call]
            return summed
        return write_sum(read_chunks(experts.module, name), None, out=_empty(experts, name, device))


# Forward


class ExpertsForward:
    """Takes the place of the forward method of a module with quantized or adapted experts.

    The class's own method computes, with weights in full, which autograd keeps for the backward pass. Training replaces it
    by something that does not (stages/train/expert_layers.py).
    """

    def __init__(self, experts: Experts) -> None:
        self.experts = experts

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """What the class's own method returns."""
        experts = self.experts
        weights = {
            name: expert_weight(experts, name)
            for name in experts.shapes
            if name in experts.wrappers or is_packed(experts.module, name)
        }
        with shadowed(experts.module, weights):
            return type(experts.module).forward(experts.module, *inputs, **named)


def install(model: Any) -> None:
    """Makes a model compute with its quantized and adapted experts; again after an adapter was added."""
    for experts in find_experts(model):
        if experts.wrappers or getattr(experts.module, PACKED, {}):
            experts.outer.forward = ExpertsForward(experts)


@contextmanager
def shadowed(module: Any, tensors: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Within the block, these names of a module's parameters stand for other tensors."""
    vars(module).update(tensors)
    try:
        yield
    finally:
        for name in tensors:
            vars(module).pop(name, None)


@contextmanager
def as_float32(model: Any) -> Iterator[None]:
    """Within the block, experts' parameters look as if they were not quantized, and in float32, to code that asks for them.

    PEFT makes lora_A and lora_B for their shape, in their dtype and on their device.
    """
    with ExitStack() as stack:
        for experts in find_experts(model):
            device = next(iter(experts.module._parameters.values())).device
            looks = {name: torch.empty((), device=device).expand(shape) for name, shape in experts.shapes.items()}
            stack.enter_context(shadowed(experts.module, looks))
        yield
