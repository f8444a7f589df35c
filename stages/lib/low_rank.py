"""LoRA layers that compute as little as they can: forward it is one matrix product, as without LoRA.

A layer computes W x + s B A x. PEFT does that in three products and three passes over the result. Here the product is added
to the weight first, W' = W + s B A, once an optimizer step, since A and B do not change in between; then every micro-batch
does W' x forward and W'ᵀ dy backward. The gradients of A and B are PEFT's:

    dB = s dyᵀ (x Aᵀ)        dA = s (dy B)ᵀ x

W' is summed in float32 and rounded once. A weight that lies on bfloat16's grid would swallow a small product whole, each
time. 4-bit weights lie off it (a table's value times a float32 scale), so they are unpacked to float32 and rounded after the
sum; they are exactly the merged weights. Weights that were bfloat16 from the start get the low-rank product beside
(`_Beside`), and so do those that are multiplied in FP8 (`_Fp8`).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import bitsandbytes as bnb
import torch
from torch.nn.functional import linear

from stages.lib import four_bit
from stages.lib.fused import Recipe, compiled, recall


class LowRank:
    """The fast LoRA layers of one model, and whether their summed weights are still right."""

    def __init__(self, adapted: Any, *, fp8: bool = False) -> None:
        """Replaces the forward of every layer that it can compute; the others stay PEFT's.

        Args:
            adapted: A model with an adapter.
            fp8: Whether frozen weights are multiplied in FP8.
        """
        self.step = 0
        layers = {name: layer for name, layer in adapted.named_modules() if hasattr(layer, "lora_A")}
        self.layers = {name: layer for name, layer in layers.items() if _why_not(layer) is None}
        self.left_out = sorted({reason for layer in layers.values() if (reason := _why_not(layer))})
        """Why the other layers stay as they are."""
        groups = [[_freeze(self.layers[name], self, fp8=fp8) for name in names] for names in _siblings(adapted, self.layers)]
        self.frozen = [frozen for group in groups for frozen in group]
        for group in groups:
            shared = _Shared(group)
            for number, frozen in enumerate(group):
                frozen.layer.forward = shared.forward_of(number)
        self.keep(True)

    @property
    def unpacked_bytes(self) -> int:
        """What kept weights take."""
        return sum(math.prod(frozen.shape) * frozen.dtype.itemsize for frozen in self.frozen if frozen.summed)

    def keep(self, yes: bool) -> None:
        """Whether summed weights are kept from one use to the next; else each use makes them, in memory shared by all."""
        for frozen in self.frozen:
            frozen.keep, frozen.kept, frozen.made_at = yes, None, -1

    def changed(self) -> None:
        """To be called whenever A or B has changed."""
        self.step += 1


def _why_not(layer: Any) -> str | None:
    base = layer.get_base_layer()
    if not isinstance(base, torch.nn.Linear) or isinstance(base, bnb.nn.Linear8bitLt):
        return f"{type(base).__name__} layers"
    if list(layer.active_adapters) != ["default"] or layer.lora_variant:
        return "DoRA"
    if not isinstance(layer.lora_dropout["default"], torch.nn.Identity):
        return "lora_dropout"
    if layer.lora_bias["default"]:
        return "lora_bias"
    return None


def _siblings(adapted: Any, layers: dict[str, Any]) -> list[list[str]]:
    """The names of the layers, those together that read the very same tensor in the same module, as a trial shows."""
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
        adapted(input_ids=torch.tensor([[5, 6, 7]], device=adapted.device), use_cache=False)
    for handle in handles:
        handle.remove()
    together = [names for names in seen.values() if len(set(names)) == len(names)]
    once = {name for names in together for name in names}
    if len(once) != sum(map(len, together)):
        together, once = [], set()  # a layer that is used twice
    return together + [[name] for name in layers if name not in once]


class _Frozen:
    """The weight of a layer, ready to multiply with."""

    summed = True
    """Whether it has the low-rank product in it."""

    def __init__(self, layer: Any, owner: LowRank) -> None:
        self.layer, self.base, self.owner, self.keep = layer, layer.get_base_layer(), owner, False
        self.down, self.up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        self.scale: float = layer.scaling["default"]
        self.made_at = -1
        self.kept: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.base.out_features, self.base.in_features

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.base.weight.dtype
        return dtype

    def operand(self, x: torch.Tensor) -> Any:
        """What `product` takes for x (tokens, in); the same for all that read the same."""
        return x

    def product(self, x: Any) -> torch.Tensor:
        """W x + bias, (tokens, out)"""
        return linear(x, self.weight(), self.base.bias)

    def product_back(self, grad: torch.Tensor, total: torch.Tensor | None) -> torch.Tensor:
        """Wᵀ dy, (tokens, in), added to `total`."""
        return grad @ self.weight() if total is None else total.addmm_(grad, self.weight())

    def weight(self) -> torch.Tensor:
        """(out, in)"""
        if not self.keep:
            return self.make(_scratch(self.shape, self.dtype, self.up.device))
        if self.kept is None:
            self.kept = torch.empty(self.shape, dtype=self.dtype, device=self.up.device)
        if self.made_at != self.owner.step:
            self.made_at = self.owner.step
            self.make(self.kept)
        return self.kept

    def make(self, out: torch.Tensor) -> torch.Tensor:
        """Writes the weight into `out`."""
        return torch.addmm(self.base.weight, self.up.detach(), self.down.detach(), alpha=self.scale, out=out)


class _Packed(_Frozen):
    """4 bits a weight."""

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.base.compute_dtype
        return dtype

    def make(self, out: torch.Tensor) -> torch.Tensor:
        return four_bit.unpack_sum(self.base, self.up.detach(), self.down.detach(), self.scale, out)


class _Beside(_Frozen):
    """A weight in 16 bits, which is used as it is."""

    summed = False

    def weight(self) -> torch.Tensor:
        weight: torch.Tensor = self.base.weight
        return weight


class _Fp8(_Frozen):
    """A weight that is multiplied in FP8 (e4m3), with a scale for each row of either factor; half the time of bfloat16.

    It is held twice, by rows and by columns, since the hardware sums along memory alone: forward over the inputs, backward
    over the outputs.
    """

    summed = False

    def __init__(self, layer: Any, owner: LowRank) -> None:
        super().__init__(layer, owner)
        base = self.base.weight
        weight = bnb.functional.dequantize_4bit(base.data, base.quant_state) if hasattr(base, "quant_state") else base.data
        self.rows = _to_fp8(weight)
        self.columns = _to_fp8(weight.t().contiguous())

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16

    def operand(self, x: torch.Tensor) -> Any:
        return _quickly_to_fp8(x)

    def product(self, x: Any) -> torch.Tensor:
        return _scaled(x, self.rows, self.base.bias)

    def product_back(self, grad: torch.Tensor, total: torch.Tensor | None) -> torch.Tensor:
        out = _scaled(_quickly_to_fp8(grad), self.columns)
        return out if total is None else total.add_(out)


FP8 = torch.float8_e4m3fn


def _to_fp8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x (rows, columns) in e4m3, and each row's scale (rows, 1) in float32, by which it is to be multiplied."""
    scale = x.abs().amax(1, keepdim=True).float().clamp_min(1e-12) / torch.finfo(FP8).max
    return (x.float() / scale).to(FP8), scale


def _quickly_to_fp8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return (compiled(_to_fp8) if x.is_cuda else _to_fp8)(x)


def _scaled(x: tuple[torch.Tensor, torch.Tensor], y: tuple[torch.Tensor, torch.Tensor], bias: Any = None) -> torch.Tensor:
    """x yᵀ in bfloat16."""
    if not x[0].is_cuda:  # the same rounding, for tests
        return linear(x[0].float() * x[1], y[0].float() * y[1], bias).to(torch.bfloat16)
    return torch._scaled_mm(
        x[0], y[0].t(), scale_a=x[1], scale_b=y[1].t(), bias=bias, out_dtype=torch.bfloat16, use_fast_accum=True
    )


def fp8_works(device: torch.device) -> bool:
    """Whether the card multiplies in FP8 with a scale for each row."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def _freeze(layer: Any, owner: LowRank, *, fp8: bool) -> _Frozen:
    base = layer.get_base_layer()
    if fp8 and base.in_features % 16 == 0 and base.out_features % 16 == 0:
        return _Fp8(layer, owner)
    if isinstance(base, bnb.nn.Linear4bit):
        return _Packed(layer, owner)
    return _Frozen(layer, owner) if base.weight.dtype == torch.float32 else _Beside(layer, owner)


def _scratch(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Memory that every layer uses in turn; products on one stream come one after the other."""
    size = math.prod(shape)
    if _Scratch.memory is None or _Scratch.memory.numel() < size or _Scratch.memory.dtype != dtype:
        _Scratch.memory = torch.empty(size, dtype=dtype, device=device)
    return _Scratch.memory[:size].view(shape)


class _Scratch:
    memory: torch.Tensor | None = None


class _Shared:
    """Layers that read the same: the first that is called computes them all."""

    def __init__(self, members: Sequence[_Frozen]) -> None:
        self.members = members
        self.x: torch.Tensor | None = None
        self.outs: dict[int, torch.Tensor] = {}

    def forward_of(self, number: int) -> Callable[..., torch.Tensor]:
        def forward(x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            if self.x is not x or number not in self.outs:
                factors = [factor for member in self.members for factor in (member.down, member.up)]
                outs = _Products.apply(x, self.members, *factors)  # type: ignore[no-untyped-call]
                self.x, self.outs = x, dict(enumerate(outs))
            out = self.outs.pop(number)
            if not self.outs:
                self.x = None
            return out

        return forward


class _Products(torch.autograd.Function):
    """Layers that read the same, forward and back; x (..., in) to (..., out) each."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, members: Sequence[_Frozen], *factors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        outs = []
        with torch.autocast(x.device.type, enabled=False):
            flat = x.reshape(-1, x.shape[-1]).to(members[0].dtype)
            operand = members[0].operand(flat)
            for member in members:
                out = member.product(operand)
                if not member.summed:
                    low = linear(flat, member.down.to(flat.dtype))
                    out.addmm_(low, member.up.to(flat.dtype).t(), alpha=member.scale)
                outs.append(out.view(*x.shape[:-1], -1))
        recipe: Recipe | None = getattr(x, "recipe", None)
        ctx.function, ctx.shape, ctx.members = recipe and recipe.function, x.shape, members
        ctx.save_for_backward(*factors, *(recipe.sources if recipe else (x,)))
        return tuple(outs)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        members = ctx.members
        saved = ctx.saved_tensors
        factors, sources = saved[: 2 * len(members)], saved[2 * len(members) :]
        x = recall(Recipe(ctx.function, sources)) if ctx.function else sources[0]
        dtype = members[0].dtype
        x = x.reshape(-1, x.shape[-1]).to(dtype)
        flat = [grad.reshape(-1, grad.shape[-1]) for grad in grads]
        downs, ups = ([factor.to(dtype) for factor in factors[start::2]] for start in (0, 1))
        ranks = [down.shape[0] for down in downs]
        # x is read once for all of them, forward and back.
        lows = torch.split(linear(x, torch.cat(downs)), ranks, 1)  # (tokens, r) each
        grad_low = torch.cat([grad @ up for grad, up in zip(flat, ups, strict=True)], 1)
        grad_downs = torch.split(grad_low.t() @ x, ranks)
        found: list[torch.Tensor | None] = []
        for member, grad, low, grad_down in zip(members, flat, lows, grad_downs, strict=True):
            found.append(grad_down.to(member.down.dtype).mul(member.scale))
            found.append((grad.t() @ low).to(member.up.dtype).mul(member.scale))
        if not ctx.needs_input_grad[0]:
            return None, None, *found
        total: torch.Tensor | None = None
        for member, grad, down, low in zip(members, flat, downs, torch.split(grad_low, ranks, 1), strict=True):
            total = member.product_back(grad, total)
            if not member.summed:
                total.addmm_(low, down, alpha=member.scale)
        return total.view(ctx.shape) if total is not None else None, None, *found
