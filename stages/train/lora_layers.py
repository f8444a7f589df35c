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
from collections.abc import Sequence
from functools import partial
from typing import Any

import bitsandbytes as bnb
import torch
from torch.nn.functional import linear

from stages.model.shared_inputs import group_by_input, share_computation
from stages.train import four_bit, fp8
from stages.train.recompute import Recipe, Recompute


class LoraLayers:
    """The fast LoRA layers of one model, and whether their summed weights are still right."""

    def __init__(self, adapted: Any, *, fp8: bool, keep_dequantized: bool, recompute: Recompute) -> None:
        """Replaces the forward of every layer that it can compute; the others stay PEFT's.

        Args:
            adapted: A model with an adapter.
            fp8: Whether frozen weights are multiplied in FP8.
            keep_dequantized: As in the method of this name.
            recompute: Has the recipes of the model's cheap activations; `clear` it after each step.
        """
        self.step = 0
        self.recompute = recompute
        self._memory: torch.Tensor | None = None
        layers = {name: layer for name, layer in adapted.named_modules() if hasattr(layer, "lora_A")}
        self.layers = {name: layer for name, layer in layers.items() if _why_not(layer) is None}
        self.skipped = sorted({reason for layer in layers.values() if (reason := _why_not(layer))})
        """Why the other layers stay as they are."""
        named = group_by_input(adapted, self.layers)
        groups = [_freeze([self.layers[name] for name in names], self, in_fp8=fp8) for names in named]
        self.frozen = [frozen for group in groups for frozen in group]
        self.summed_in_float32 = sorted(
            name.removeprefix("base_model.model.")
            for names, group in zip(named, groups, strict=True)
            for name, frozen in zip(names, group, strict=True)
            if isinstance(frozen, _Packed)
        )
        """The layers, as the base model names them, whose training weight is the rounded float32 sum of a 4-bit weight."""
        for group in groups:
            share_computation([frozen.layer for frozen in group], partial(_products, group, recompute))
        self.keep_dequantized(keep_dequantized)

    @property
    def dequantized_bytes(self) -> int:
        """What kept weights take."""
        return sum(math.prod(frozen.shape) * frozen.dtype.itemsize for frozen in self.frozen if frozen.summed)

    def keep_dequantized(self, yes: bool) -> None:
        """Whether summed weights are kept from one use to the next; else each use makes them, in memory shared by all."""
        for frozen in self.frozen:
            frozen.keep, frozen.kept, frozen.made_at = yes, None, -1

    def invalidate(self) -> None:
        """To be called whenever A or B has changed."""
        self.step += 1

    def scratch(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Memory that every layer uses in turn; products on one stream come one after the other."""
        size = math.prod(shape)
        if self._memory is None or self._memory.numel() < size or self._memory.dtype != dtype:
            self._memory = torch.empty(size, dtype=dtype, device=device)
        return self._memory[:size].view(shape)


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


class _Frozen:
    """The weight of a layer, ready to multiply with."""

    summed = True
    """Whether it has the low-rank product in it."""

    def __init__(self, layer: Any, owner: LoraLayers) -> None:
        self.layer, self.base, self.owner, self.keep = layer, layer.get_base_layer(), owner, False
        self.down, self.up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        self.scale: float = layer.scaling["default"]
        self.made_at = -1
        self.kept: torch.Tensor | None = None

    @property
    def exact(self) -> "_Frozen":
        """What computes the layer where nothing is learned."""
        return self

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
            return self.make(self.owner.scratch(self.shape, self.dtype, self.up.device))
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
    """A weight that is multiplied in FP8.

    It is held twice, by rows and by columns, since the hardware sums along memory alone: forward over the inputs, backward
    over the outputs.
    """

    summed = False

    def __init__(self, layer: Any, owner: LoraLayers) -> None:
        super().__init__(layer, owner)
        base = self.base.weight
        weight = bnb.functional.dequantize_4bit(base.data, base.quant_state) if hasattr(base, "quant_state") else base.data
        self.rows, self.columns = fp8.to_fp8(weight), fp8.to_fp8(weight.t())
        self._exact = _kind(self.base)(layer, owner)

    @property
    def exact(self) -> _Frozen:
        """Not in FP8: validation is to measure the model that `merge` makes."""
        return self._exact

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16

    def operand(self, x: torch.Tensor) -> Any:
        return fp8.to_fp8(x)

    def product(self, x: Any) -> torch.Tensor:
        return fp8.product(x, self.rows, self.base.bias)

    def product_back(self, grad: torch.Tensor, total: torch.Tensor | None) -> torch.Tensor:
        out = fp8.product(fp8.to_fp8(grad), self.columns)
        return out if total is None else total.add_(out)


def _freeze(layers: Sequence[Any], owner: LoraLayers, *, in_fp8: bool) -> list[_Frozen]:
    """For layers that read the same: they share what is made of it, so they are all in FP8 or none is."""
    if in_fp8 and all(fp8.fits(layer.get_base_layer()) for layer in layers):
        return [_Fp8(layer, owner) for layer in layers]
    return [_kind(layer.get_base_layer())(layer, owner) for layer in layers]


def _kind(base: torch.nn.Linear) -> type[_Frozen]:
    if isinstance(base, bnb.nn.Linear4bit):
        return _Packed
    return _Frozen if base.weight.dtype == torch.float32 else _Beside


def _products(members: Sequence["_Frozen"], recompute: Recompute, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    if not torch.is_grad_enabled():
        members = [member.exact for member in members]
    factors = [factor for member in members for factor in (member.down, member.up)]
    outs: tuple[torch.Tensor, ...] = _Products.apply(x, members, recompute, *factors)  # type: ignore[no-untyped-call]
    return outs


class _Products(torch.autograd.Function):
    """Layers that read the same, forward and back; x (..., in) to (..., out) each."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, members: Sequence[_Frozen], recompute: Recompute, *factors: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        outs, lows = [], []
        with torch.autocast(x.device.type, enabled=False):
            flat = x.reshape(-1, x.shape[-1]).to(members[0].dtype)
            if any(not member.summed for member in members):
                lows = [_low(flat, factors[::2])]
            operand = members[0].operand(flat)
            for number, member in enumerate(members):
                out = member.product(operand)
                if not member.summed:
                    low = torch.split(lows[0], _ranks(factors), 1)[number]
                    out.addmm_(low, member.up.to(flat.dtype).t(), alpha=member.scale)
                outs.append(out.view(*x.shape[:-1], -1))
        recipe = recompute.recipe_of(x)
        ctx.recompute = recompute
        ctx.function, ctx.shape, ctx.members = recipe and recipe.function, x.shape, members
        ctx.sources = len(recipe.inputs) if recipe else 1
        ctx.save_for_backward(*factors, *(recipe.inputs if recipe else (x,)), *lows)
        return tuple(outs)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        members = ctx.members
        saved, count = ctx.saved_tensors, 2 * len(members)
        factors, sources, lows = saved[:count], saved[count : count + ctx.sources], saved[count + ctx.sources :]
        x = ctx.recompute.recall(Recipe(ctx.function, sources)) if ctx.function else sources[0]
        dtype = members[0].dtype
        x = x.reshape(-1, x.shape[-1]).to(dtype)
        flat = [grad.reshape(-1, grad.shape[-1]) for grad in grads]
        ranks = _ranks(factors)
        # x is read once for all of them, forward and back.
        each_low = torch.split(lows[0] if lows else _low(x, factors[::2]), ranks, 1)
        grad_low = torch.cat([grad @ up.to(dtype) for grad, up in zip(flat, factors[1::2], strict=True)], 1)
        grad_downs = torch.split(grad_low.t() @ x, ranks)
        found: list[torch.Tensor | None] = []
        for member, grad, low, grad_down in zip(members, flat, each_low, grad_downs, strict=True):
            found.append(grad_down.to(member.down.dtype).mul(member.scale))
            found.append((grad.t() @ low).to(member.up.dtype).mul(member.scale))
        if not ctx.needs_input_grad[0]:
            return None, None, None, *found
        total: torch.Tensor | None = None
        for member, grad, down, low in zip(members, flat, factors[::2], torch.split(grad_low, ranks, 1), strict=True):
            total = member.product_back(grad, total)
            if not member.summed:
                total.addmm_(low, down.to(dtype), alpha=member.scale)
        return total.view(ctx.shape) if total is not None else None, None, None, *found


def _ranks(factors: Sequence[torch.Tensor]) -> list[int]:
    return [len(down) for down in factors[::2]]


def _low(x: torch.Tensor, downs: Sequence[torch.Tensor]) -> torch.Tensor:
    """x Aᵀ of every layer, (tokens, all ranks)."""
    return linear(x, torch.cat(list(downs)).to(x.dtype))
