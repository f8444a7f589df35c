"""LoRA layers that need one matrix product in the forward pass, like a layer without LoRA.

A LoRA layer computes y = W x + s B A x. PEFT does this in three products and three passes over the result. Here the delta
weight is added to the weight first, W' = W + s B A, once per optimizer step, since A and B do not change in between. Each
micro-batch then computes W' x in the forward pass and W'ᵀ dy in the backward pass. The gradients of A and B are PEFT's:

    dA = s (dy B)ᵀ x        dB = s dyᵀ (x Aᵀ)

W' is summed in float32 and rounded once. If W is already rounded to bfloat16, rounding W' would lose a small delta weight,
in every step. 4-bit weights are not bfloat16 values (each is a table entry times a float32 scale): they are dequantized to
float32 and rounded after the sum. Merging calls the same functions (`add_lora`, and `add_lora_to_4bit` with its GPU kernel),
so W' is the merged weight. For weights stored in bfloat16 (`_SeparateProduct`) or multiplied in FP8 (`_Fp8Weight`), the LoRA
product is computed separately and added to W x.
"""
# ruff: noqa: N803, N806 (lora_A and lora_B are PEFT's names)

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain, islice
from typing import Any, ClassVar

import bitsandbytes as bnb
import torch
from peft.tuners.lora.layer import ParamWrapper
from torch.nn.functional import linear

from stages.core.problem import Problem
from stages.model import four_bit
from stages.model.adapter import PEFT_PREFIX
from stages.model.lora import add_lora
from stages.model.probe import TRIAL_ERRORS, reason_of
from stages.model.shared_inputs import group_by_input, share_computation
from stages.train.fp8 import fits, matmul, quantize_rows
from stages.train.recompute import Recipe, Recompute
from stages.train.trial import try_training, why_different


class LoraLayers:
    """The fast LoRA layers of one model, and what they share."""

    def __init__(self, adapted: Any, *, fp8: bool, keep_dequantized: bool, recompute: Recompute) -> None:
        """Replaces the forward method of every LoRA layer that is supported here; the others keep PEFT's.

        If the model then computes other logits or gradients in a trial run, all layers keep PEFT's. Raises Problem if the
        trial run fails before.

        Args:
            adapted: A model with a LoRA adapter.
            fp8: Whether to multiply with frozen weights in FP8 during training.
            keep_dequantized: See the method of this name.
            recompute: The recipes of the model's cheap activations. Call its `clear` after each step.
        """
        self.recompute, self._fp8 = recompute, fp8
        self.lora_version = 0
        """Counts the changes of lora_A and lora_B; see `invalidate`."""
        self._scratch: torch.Tensor | None = None
        modules = {
            name: module
            for name, module in adapted.named_modules()
            if hasattr(module, "lora_A") and not isinstance(module, ParamWrapper)  # those are in expert_layers.py
        }
        reasons = {name: _why_unsupported(module) for name, module in modules.items()}
        self.skipped = sorted({reason for reason in reasons.values() if reason})
        """Why layers keep PEFT's forward method; empty if none does."""
        supported = {name: module for name, module in modules.items() if not reasons[name]}
        self.layers: dict[str, _FastLayer] = {}
        """By the name of the module in `adapted`."""
        try:
            expected = try_training(adapted) if supported else None
        except TRIAL_ERRORS as error:
            raise Problem(
                f"the base model cannot be trained: its own code fails: {reason_of(error)}; fetch another base"
            ) from error
        for names in group_by_input(adapted, supported):
            group = _make_fast([supported[name] for name in names], self, in_fp8=fp8)
            share_computation([layer.module for layer in group], partial(_forward, group, recompute))
            self.layers.update(zip(names, group, strict=True))
        reason = why_different(adapted, expected, in_fp8=fp8) if expected else ""
        recompute.clear()
        if reason:
            for layer in self.layers.values():
                del layer.module.forward  # the class's own is in effect again
            self.layers, self.skipped = {}, [*self.skipped, f"all of this model, because {reason}"]
        self.keep_dequantized(keep_dequantized)  # not before the trial, which may not take as much memory

    @property
    def summed_in_float32(self) -> list[str]:
        """The layers whose weight in training is the float32 sum W + s B A of a 4-bit weight W, rounded once.

        Sorted; named as in the base model, "model.layers.0.mlp.up_proj".
        """
        return self._base_names(lambda layer: isinstance(layer, _Summed4BitWeight))

    @property
    def without_fp8(self) -> list[str]:
        """The layers that do not use FP8 although it is turned on, because their shape does not fit. Named as above."""
        return self._base_names(lambda layer: self._fp8 and not isinstance(layer, _Fp8Weight))

    def _base_names(self, is_wanted: "Callable[[_FastLayer], bool]") -> list[str]:
        return sorted(name.removeprefix(PEFT_PREFIX) for name, layer in self.layers.items() if is_wanted(layer))

    @property
    def dequantized_bytes(self) -> int:
        """The memory that the weights W' take if they are kept."""
        summed = [layer for layer in self.layers.values() if layer.includes_lora]
        return sum(math.prod(layer.shape) * layer.dtype.itemsize for layer in summed)

    def keep_dequantized(self, keep: bool) -> None:
        """Keeps the weights W' until A and B change; otherwise each use computes them again, in memory that layers share."""
        for layer in self.layers.values():
            if isinstance(layer, _SummedWeight):
                layer.keep, layer.kept, layer.kept_version = keep, None, -1

    def invalidate(self) -> None:
        """Marks the kept weights W' as outdated. Must be called after every change of lora_A or lora_B."""
        self.lora_version += 1

    def scratch(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Memory for a weight W' that is used once. All layers share it: on one stream, products run one after the other."""
        size = math.prod(shape)
        if self._scratch is None or self._scratch.numel() < size or self._scratch.dtype != dtype:
            self._scratch = torch.empty(size, dtype=dtype, device=device)
        return self._scratch[:size].view(shape)


def _why_unsupported(module: Any) -> str | None:
    base = module.get_base_layer()
    if not isinstance(base, torch.nn.Linear) or isinstance(base, bnb.nn.Linear8bitLt):
        return f"{type(base).__name__} layers"
    if list(module.active_adapters) != ["default"] or module.lora_variant:
        return "DoRA"
    if not isinstance(module.lora_dropout["default"], torch.nn.Identity):
        return "lora_dropout"
    if module.lora_bias["default"]:
        return "lora_bias"
    return None


# Layers, by the kind of their frozen weight


class _FastLayer:
    """One LoRA layer: its frozen weight W, and how to multiply with it."""

    includes_lora: ClassVar[bool] = False
    """Whether the products are those of W' = W + s B A. If not, `_LoraProducts` adds the product of s B A."""

    def __init__(self, module: Any, owner: LoraLayers) -> None:
        self.module, self.base, self.owner = module, module.get_base_layer(), owner
        self.lora_A, self.lora_B = module.lora_A["default"].weight, module.lora_B["default"].weight
        self.scaling: float = module.scaling["default"]

    @property
    def for_validation(self) -> "_FastLayer":
        """The layer to use where no gradients are computed."""
        return self

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)"""
        return self.base.out_features, self.base.in_features

    @property
    def dtype(self) -> torch.dtype:
        """Of the inputs and results of the products."""
        dtype: torch.dtype = self.base.weight.dtype
        return dtype

    def weight(self) -> torch.Tensor:
        """The matrix to multiply with, (out, in)."""
        weight: torch.Tensor = self.base.weight
        return weight

    def prepare_input(self, x: torch.Tensor) -> Any:
        """Converts x (tokens, in) for `multiply`, once for all layers that share the input."""
        return x

    def multiply(self, x: Any) -> torch.Tensor:
        """x Wᵀ + bias, (tokens, out)."""
        return linear(x, self.weight(), self.base.bias)

    def multiply_transposed(self, grad: torch.Tensor, total: torch.Tensor | None) -> torch.Tensor:
        """total + dy W, (tokens, in); a `total` that is given is changed in place."""
        return grad @ self.weight() if total is None else total.addmm_(grad, self.weight())


class _SeparateProduct(_FastLayer):
    """A weight in 16 bits. It is used as it is, and the LoRA product is computed separately."""


class _SummedWeight(_FastLayer):
    """A weight in float32, to which the delta weight is added."""

    includes_lora = True

    def __init__(self, module: Any, owner: LoraLayers) -> None:
        super().__init__(module, owner)
        self.keep = False
        self.kept: torch.Tensor | None = None
        self.kept_version = -1

    def weight(self) -> torch.Tensor:
        """W' = W + s B A, (out, in)."""
        if not self.keep:
            return self.write_sum(self.owner.scratch(self.shape, self.dtype, self.lora_B.device))
        if self.kept is None:
            self.kept = torch.empty(self.shape, dtype=self.dtype, device=self.lora_B.device)
        if self.kept_version != self.owner.lora_version:
            self.kept_version = self.owner.lora_version
            self.write_sum(self.kept)
        return self.kept

    def write_sum(self, out: torch.Tensor) -> torch.Tensor:
        """Writes W' into `out` and returns it."""
        return add_lora(self.base.weight, self.lora_A.detach(), self.lora_B.detach(), scaling=self.scaling, out=out)


class _Summed4BitWeight(_SummedWeight):
    """A weight in 4 bits, which is dequantized to float32 before the delta weight is added."""

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.base.compute_dtype
        return dtype

    def write_sum(self, out: torch.Tensor) -> torch.Tensor:
        lora_A, lora_B = self.lora_A.detach(), self.lora_B.detach()
        return four_bit.dequantize_and_add_lora(self.base, out, lora_A=lora_A, lora_B=lora_B, scaling=self.scaling)


class _Fp8Weight(_FastLayer):
    """A weight that is multiplied in FP8 during training.

    It is stored twice, with a scale per row and with a scale per column: the scale must be constant along the dimension that
    a product sums over, which is the inputs in the forward pass and the outputs in the backward pass.
    """

    def __init__(self, module: Any, owner: LoraLayers) -> None:
        super().__init__(module, owner)
        base = self.base.weight
        weight = bnb.functional.dequantize_4bit(base.data, base.quant_state) if hasattr(base, "quant_state") else base.data
        self.rows, self.columns = quantize_rows(weight), quantize_rows(weight.t())
        self._unquantized = _layer_class(self.base)(module, owner)

    @property
    def for_validation(self) -> _FastLayer:
        """Without FP8: validation must measure the model that `merge` writes."""
        return self._unquantized

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16

    def prepare_input(self, x: torch.Tensor) -> Any:
        return quantize_rows(x)

    def multiply(self, x: Any) -> torch.Tensor:
        return matmul(x, self.rows, self.base.bias)

    def multiply_transposed(self, grad: torch.Tensor, total: torch.Tensor | None) -> torch.Tensor:
        out = matmul(quantize_rows(grad), self.columns)
        return out if total is None else total.add_(out)


def _make_fast(modules: Sequence[Any], owner: LoraLayers, *, in_fp8: bool) -> list[_FastLayer]:
    """The fast layers of modules that share an input.

    They also share what `prepare_input` makes of it, so either all of them use FP8 or none.
    """
    if in_fp8 and all(fits(module.get_base_layer()) for module in modules):
        return [_Fp8Weight(module, owner) for module in modules]
    return [_layer_class(module.get_base_layer())(module, owner) for module in modules]


def _layer_class(base: torch.nn.Linear) -> type[_FastLayer]:
    if isinstance(base, bnb.nn.Linear4bit):
        return _Summed4BitWeight
    return _SummedWeight if base.weight.dtype == torch.float32 else _SeparateProduct


# Forward and backward


def _forward(layers: Sequence[_FastLayer], recompute: Recompute, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The outputs of layers that share the input x."""
    if not torch.is_grad_enabled():
        layers = [layer.for_validation for layer in layers]
    lora_As, lora_Bs = [layer.lora_A for layer in layers], [layer.lora_B for layer in layers]
    # Autograd computes gradients only for tensors that are arguments of their own.
    outs: tuple[torch.Tensor, ...] = _LoraProducts.apply(x, layers, recompute, *lora_As, *lora_Bs)  # type: ignore[no-untyped-call]
    return outs


class _LoraProducts(torch.autograd.Function):
    """LoRA layers that share their input x (..., in): returns y (..., out) of each.

    With x (tokens, in), y and dy (tokens, out), W (out, in), A (r, in), B (out, r) and the scaling s, a layer computes

        y = x W'ᵀ + bias       dx = dy W'                  with W' = W + s B A (`_SummedWeight`)
        y = x Wᵀ + bias + s (x Aᵀ) Bᵀ       dx = dy W + s (dy B) A       otherwise
        dA = s (dy B)ᵀ x       dB = s dyᵀ (x Aᵀ)

    and dx is the sum over the layers. x Aᵀ of all layers is one product, (tokens, sum of r), and so are their dA.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, layers: Sequence[_FastLayer], recompute: Recompute, *lora_weights: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """`lora_weights`: lora_A of every layer, then lora_B of every layer."""
        lora_As, lora_Bs = _split(lora_weights, [len(layers), len(layers)])
        with torch.autocast(x.device.type, enabled=False):
            outs, x_A = _outputs(layers, _as_matrix(x).to(layers[0].dtype), lora_As=lora_As, lora_Bs=lora_Bs)
        # If x can be recomputed, the inputs of its recipe are saved instead; they are in memory anyway.
        recipe = recompute.recipe_of(x)
        inputs = recipe.inputs if recipe else (x,)
        ctx.layers, ctx.shape, ctx.recompute, ctx.function = layers, x.shape, recompute, recipe and recipe.function
        groups = lora_As, lora_Bs, inputs, () if x_A is None else (x_A,)
        ctx.counts = [len(group) for group in groups]
        ctx.save_for_backward(*chain(*groups))
        # Not `view`: the model could not change an output in place, as Falcon does.
        return tuple(torch.ops.aten._unsafe_view(out, [*x.shape[:-1], out.shape[-1]]) for out in outs)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """`grads`: dy of every layer. Returns a gradient for each argument of `forward`."""
        layers = ctx.layers
        lora_As, lora_Bs, inputs, saved_x_A = _split(ctx.saved_tensors, ctx.counts)
        x = ctx.recompute.recall(Recipe(ctx.function, inputs)) if ctx.function else inputs[0]
        dtype, ranks = layers[0].dtype, _ranks(lora_As)
        x = _as_matrix(x).to(dtype)
        dys = [_as_matrix(grad) for grad in grads]
        x_A = saved_x_A[0] if saved_x_A else _project(x, lora_As)
        dy_B = torch.cat([dy @ lora_B.to(dtype) for dy, lora_B in zip(dys, lora_Bs, strict=True)], 1)
        dAs = [
            dA.to(layer.lora_A.dtype).mul(layer.scaling)
            for layer, dA in zip(layers, torch.split(dy_B.t() @ x, ranks), strict=True)
        ]
        dBs = [
            (dy.t() @ part).to(layer.lora_B.dtype).mul(layer.scaling)
            for layer, dy, part in zip(layers, dys, torch.split(x_A, ranks, 1), strict=True)
        ]
        if not ctx.needs_input_grad[0]:
            return None, None, None, *dAs, *dBs
        dx = _input_gradient(layers, dys, lora_As=lora_As, dy_Bs=torch.split(dy_B, ranks, 1))
        return dx.view(ctx.shape), None, None, *dAs, *dBs


def _outputs(
    layers: Sequence[_FastLayer],
    x: torch.Tensor,
    *,
    lora_As: Sequence[torch.Tensor],
    lora_Bs: Sequence[torch.Tensor],
) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """y (tokens, out) of each layer for x (tokens, in); and x Aᵀ of all layers, None if no layer needs it for y."""
    x_A = None if all(layer.includes_lora for layer in layers) else _project(x, lora_As)
    prepared = layers[0].prepare_input(x)
    outs = []
    for number, (layer, lora_B) in enumerate(zip(layers, lora_Bs, strict=True)):
        out = layer.multiply(prepared)
        if x_A is not None and not layer.includes_lora:
            part = torch.split(x_A, _ranks(lora_As), 1)[number]
            out.addmm_(part, lora_B.to(x.dtype).t(), alpha=layer.scaling)
        outs.append(out)
    return outs, x_A


def _input_gradient(
    layers: Sequence[_FastLayer],
    dys: Sequence[torch.Tensor],
    *,
    lora_As: Sequence[torch.Tensor],
    dy_Bs: Sequence[torch.Tensor],
) -> torch.Tensor:
    """dx (tokens, in), summed over the layers.

    Args:
        dys: dy of each layer, (tokens, out).
        lora_As: A of each layer, (r, in).
        dy_Bs: dy B of each layer, (tokens, r).
    """
    dx: torch.Tensor | None = None
    for layer, dy, lora_A, dy_B in zip(layers, dys, lora_As, dy_Bs, strict=True):
        dx = layer.multiply_transposed(dy, dx)
        if not layer.includes_lora:
            dx.addmm_(dy_B, lora_A.to(dy_B.dtype), alpha=layer.scaling)
    assert dx is not None  # there is at least one layer
    return dx


def _project(x: torch.Tensor, lora_As: Sequence[torch.Tensor]) -> torch.Tensor:
    """x Aᵀ of every layer, side by side: (tokens, sum of r)."""
    return linear(x, torch.cat(list(lora_As)).to(x.dtype))


def _ranks(lora_As: Sequence[torch.Tensor]) -> list[int]:
    return [len(lora_A) for lora_A in lora_As]


def _as_matrix(x: torch.Tensor) -> torch.Tensor:
    """(..., features) as (tokens, features)."""
    return x.reshape(-1, x.shape[-1])


def _split(tensors: Sequence[torch.Tensor], counts: Sequence[int]) -> list[tuple[torch.Tensor, ...]]:
    """The tensors in groups of `counts`, in order."""
    rest = iter(tensors)
    return [tuple(islice(rest, count)) for count in counts]
