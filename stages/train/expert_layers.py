"""Experts that keep neither their dequantized weights nor all of their activations for the backward pass.

For x of each token, the weights p of the chosen experts and an activation g, a layer of experts computes

    h = x W1'ᵀ + b1        a = g(h)        y = a W2'ᵀ + b2        out = sum of p y over the experts of a token

with W' = W + s B A for each expert. Transformers' way is to have all W' of a layer as a tensor, which autograd keeps: 1.2 GB
for each layer of Qwen3-30B-A3B. Here rows are sorted by expert, and W' is written into memory that all layers share, in the
forward pass and again in the backward pass. What is kept is x, which expert gets it, and h. With P = diag(p), and for each
expert the rows that it gets:

    dy = P dout        G = dout W2'        dp = <G, a> + <dout, b2>        da = P G        dh = g'(h) da        dx = dh W1'
    dA = s (dy B)ᵀ x        dB = s dyᵀ (x Aᵀ)        of W1 with dh and x, of W2 with dy and a

so y is not needed. W' is the sum that merging computes (`write_sum`). For weights that are in 16 bits and not quantized the
delta weight would be lost in a sum: then the product of B A is computed by itself and added, as in lora_layers.py.
"""
# ruff: noqa: N806 (lora_A and lora_B are PEFT's names)

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn.functional import grouped_mm, pad
from torch.utils.checkpoint import checkpoint

from stages.model.experts import (
    Experts,
    ExpertsForward,
    factors_of,
    find_experts,
    is_packed,
    product_dtype,
    read_chunks,
    write_sum,
)
from stages.model.probe import TRIAL_ERRORS, logits_match, reason_of
from stages.train.fsdp import gathered

TRIAL_TOKENS = 5
"""Tokens of a trial run, each of which goes to two experts."""
ALIGNED = 8
"""PyTorch's grouped products need rows of a multiple of 16 bytes: so many values of 16 bits."""


class ExpertLayers:
    """The fast experts of one model, and the memory that they share."""

    def __init__(self, model: Any) -> None:
        """Replaces the forward method of every module of experts that are quantized or adapted.

        A module that is not supported here, or that then computes something else for a few tokens, keeps its own forward
        method, but computes it again in the backward pass: what autograd would keep are the weights of all experts.

        Args:
            model: With or without an adapter, which need not be on its experts.
        """
        self._scratch: torch.Tensor | None = None
        self.layers: dict[str, _FastExperts] = {}
        """By the name of the module in the base model."""
        reasons, tried = set(), dict[tuple[Any, ...], str]()
        for experts in find_experts(model):
            slow = vars(experts.outer).get("forward")
            if not isinstance(slow, ExpertsForward):
                continue
            kind = (type(experts.module), *experts.shapes.items(), *experts.wrappers)
            reason = _why_unsupported(experts)
            if not reason:
                fast = _FastExperts(experts, self)
                if kind not in tried:
                    with gathered(model, experts.name):
                        tried[kind] = _why_different(fast, slow)
                reason = tried[kind]
            if reason:
                reasons.add(f"{type(experts.module).__name__}, {reason}")
                experts.outer.forward = _RecomputedForward(slow)
            else:
                experts.outer.forward = self.layers[experts.name] = fast
        self.skipped = sorted(reasons)
        """Which experts keep a slower forward method, and why; empty if none does."""

    def scratch(self, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Memory for the weights of a layer's experts that are used once. On one stream, layers run one after the other."""
        size = shape.numel()
        if self._scratch is None or self._scratch.numel() < size or self._scratch.dtype != dtype:
            self._scratch = None  # it is freed before the new one is allocated
            self._scratch = torch.empty(size, dtype=dtype, device=device)
        return self._scratch[:size].view(shape)


class _RecomputedForward:
    """A forward method of experts that keeps nothing but its inputs for the backward pass."""

    def __init__(self, forward: ExpertsForward) -> None:
        self.forward = forward

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.forward(*inputs, **named)
        return checkpoint(self.forward, *inputs, use_reentrant=False, **named)


def _why_unsupported(experts: Experts) -> str:
    """Why the class of a module of experts is not supported; "" if it is."""
    module = experts.module
    by_transformers = hasattr(module, "has_post_expert_norm")  # set by use_experts_implementation, as has_gate is
    if not by_transformers or len(experts.shapes) != 2 or list(experts.shapes)[1] != "down_proj":
        return "which have code of their own"
    return "which have a norm after each expert" if module.has_post_expert_norm else ""


def _why_different(fast: "_FastExperts", slow: ExpertsForward) -> str:
    """Why fast experts do not compute what the module's own code does, in a trial run of a few tokens; "" if they do."""
    try:
        found, expected = _try_experts(fast, slow.experts), _try_experts(slow, slow.experts)
    except TRIAL_ERRORS as error:
        return reason_of(error)
    dtype = product_dtype(slow.experts, next(iter(slow.experts.shapes)))  # gradients in float32 are no more exact
    same = all(logits_match(one.to(dtype), other.to(dtype)) for one, other in zip(found, expected, strict=True))
    return "" if same else "which compute something else than their config says"


def _try_experts(forward: Callable[..., torch.Tensor], experts: Experts) -> list[torch.Tensor]:
    """The output of a module of experts for a few tokens, and the gradients of its inputs and of its adapter."""
    first, second = experts.shapes
    width, count = experts.shapes[second][2 if experts.transposed else 1], experts.shapes[second][0]
    device, dtype = experts.module._parameters[first].device, product_dtype(experts, first)
    tokens = torch.arange(TRIAL_TOKENS, device=device)
    x = torch.sin(torch.arange(TRIAL_TOKENS * width, device=device).view(-1, width) ** 2 % 1009).to(dtype).requires_grad_()
    chosen = torch.stack([tokens % count, (tokens + 1) % count], 1)
    p = torch.tensor([0.7, 0.3], device=device).repeat(TRIAL_TOKENS, 1).requires_grad_()
    trained = [parameter for wrapper in experts.wrappers.values() for parameter in _lora_of(wrapper)]
    with torch.enable_grad():
        out = forward(x, chosen, p)
        gradients = torch.autograd.grad(out.float().square().sum(), [x, p, *trained])
    return [out.detach(), *gradients]


def _lora_of(wrapper: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """lora_A and lora_B as PEFT has them."""
    return wrapper.lora_A["default"].weight, wrapper.lora_B["default"].weight


# Weights


class _Weight:
    """The weights of one parameter of a module of experts, and how to multiply with them."""

    def __init__(self, experts: Experts, name: str, owner: ExpertLayers) -> None:
        self.experts, self.name, self.owner = experts, name, owner
        self.wrapper = experts.wrappers.get(name)
        self.bias_name = f"{name}_bias"
        self.dtype = product_dtype(experts, name)
        self.summed = is_packed(experts.module, name) or self.dtype == torch.float32
        """Whether products are those of W'. If not, the product of the delta weight is added."""

    @property
    def lora(self) -> tuple[torch.Tensor, ...]:
        """lora_A and lora_B as PEFT has them; empty without an adapter, or if it is turned off."""
        if self.wrapper is None or self.wrapper.disable_adapters:
            return ()
        return _lora_of(self.wrapper)

    @property
    def bias(self) -> torch.Tensor | None:
        """(experts, out)"""
        return getattr(self.experts.module, self.bias_name, None)

    @property
    def scaling(self) -> float:
        return float(self.wrapper.scaling["default"]) if self.wrapper is not None else 0.0

    def matrices(self, lora: Sequence[torch.Tensor]) -> "_Matrices | None":
        """lora_A and lora_B of each expert, in their own dtype, with zeros up to an aligned r."""
        if not lora:
            return None
        factors = factors_of(
            *(each.detach() for each in lora), experts=self.experts.shapes[self.name][0], transposed=False, scaling=1.0
        )
        missing = -factors.right.shape[1] % ALIGNED
        return _Matrices(A=pad(factors.right, (0, 0, 0, missing)), B=pad(factors.left, (0, missing)).contiguous())

    def full(self, lora: Sequence[torch.Tensor]) -> torch.Tensor:
        """W' or W of all experts as (experts, out, in), which may be a view of (experts, in, out)."""
        module, shape = self.experts.module, self.experts.shapes[self.name]
        if not self.summed or (not lora and not is_packed(module, self.name)):
            weight: torch.Tensor = module._parameters[self.name].detach()
        else:
            factors = lora and factors_of(
                *(each.detach() for each in lora),
                experts=shape[0],
                transposed=self.experts.transposed,
                scaling=self.scaling,
            )
            out = self.owner.scratch(shape, self.dtype, module._parameters[self.name].device)
            weight = write_sum(read_chunks(module, self.name), factors or None, out=out)
        return weight.transpose(1, 2) if self.experts.transposed else weight


class _Matrices(NamedTuple):
    A: torch.Tensor
    """(experts, r, in)"""
    B: torch.Tensor
    """(experts, out, r)"""


class _FastExperts:
    """Takes the place of the forward method of a module of experts."""

    def __init__(self, experts: Experts, owner: ExpertLayers) -> None:
        self.module = experts.module
        first, second = (_Weight(experts, name, owner) for name in experts.shapes)
        self.first, self.second = first, second

    def __call__(self, x: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor) -> torch.Tensor:
        """Args:
        x: (tokens, in)
        top_k_index: (tokens, k), the numbers of the experts.
        top_k_weights: (tokens, k)
        """
        with torch.autocast(x.device.type, enabled=False):
            lora = (*self.first.lora, *self.second.lora)
            out: torch.Tensor = _Products.apply(x, top_k_weights, top_k_index, self, len(self.first.lora), *lora)  # type: ignore[no-untyped-call]
        return out

    def activate(self, h: torch.Tensor) -> torch.Tensor:
        """g(h), (rows, inner)."""
        module = self.module
        activated: torch.Tensor = module._apply_gate(h) if module.has_gate else module.act_fn(h)
        return activated


# Forward and backward


class _Order(NamedTuple):
    """The rows of a batch, a row for each token and expert that it goes to, in the order of the experts."""

    choices: torch.Tensor
    """(rows,) The token and choice of each row: its place in (tokens, k)."""
    tokens: torch.Tensor
    """(rows,) The token of each row."""
    rows: torch.Tensor
    """(tokens, k) The row of each token and choice."""
    experts: torch.Tensor
    """(rows,) The expert of each row."""
    ends: torch.Tensor
    """(experts,) in int32: the end of each expert's rows."""


def _order(top_k_index: torch.Tensor, experts: int) -> _Order:
    chosen = top_k_index.reshape(-1)
    numbers, order = torch.sort(chosen, stable=True)
    ends = torch.searchsorted(numbers, torch.arange(experts, device=numbers.device, dtype=numbers.dtype), right=True)
    rows = torch.empty_like(order)
    rows[order] = torch.arange(len(order), device=order.device)
    return _Order(order, order // top_k_index.shape[1], rows.view_as(top_k_index), numbers, ends.int())


class _Products(torch.autograd.Function):
    """The layer; see the beginning of this file."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        p: torch.Tensor,
        top_k_index: torch.Tensor,
        layer: _FastExperts,
        first_count: int,
        *lora: torch.Tensor,
    ) -> torch.Tensor:
        first, second = layer.first, layer.second
        lora_1, lora_2 = lora[:first_count], lora[first_count:]
        order = _order(top_k_index, first.experts.shapes[first.name][0])
        h = _multiply(first, x.to(first.dtype)[order.tokens], order, lora_1)
        y = _multiply(second, layer.activate(h), order, lora_2)
        ctx.save_for_backward(x, p, h, *order, *lora)
        ctx.layer, ctx.first_count = layer, first_count
        return _sum_rows(y, order, p).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        layer, (x, p, h, *rest) = ctx.layer, ctx.saved_tensors
        first, second = layer.first, layer.second
        order, lora = _Order(*rest[:5]), rest[5:]
        lora_1, lora_2 = lora[: ctx.first_count], lora[ctx.first_count :]
        rows_p = p.reshape(-1)[order.choices].unsqueeze(-1)
        dout = grad.to(second.dtype)[order.tokens]
        # Of W2.
        g = _multiply_transposed(second, dout, order, lora_2)
        with torch.enable_grad():
            h = h.detach().requires_grad_()
            a = layer.activate(h)
        dp = (g.float() * a.detach().float()).sum(-1)
        if second.bias is not None:
            dp += (dout.float() * second.bias.detach()[order.experts].float()).sum(-1)
        grads_2 = _lora_grads(second, (a.detach() * rows_p).to(a.dtype), dout, order=order, lora=lora_2)
        dh = torch.autograd.grad(a, h, (g * rows_p).to(a.dtype))[0]
        del a, g, dout, h
        # Of W1.
        rows_x = x.to(first.dtype)[order.tokens] if lora_1 else None
        grads_1 = _lora_grads(first, rows_x, dh, order=order, lora=lora_1)
        del rows_x
        dx = dp_all = None
        if ctx.needs_input_grad[0]:
            dx = _sum_rows(_multiply_transposed(first, dh, order, lora_1), order).to(x.dtype)
        if ctx.needs_input_grad[1]:
            dp_all = dp[order.rows].to(p.dtype)
        return dx, dp_all, None, None, None, *grads_1, *grads_2


def _sum_rows(values: torch.Tensor, order: _Order, p: torch.Tensor | None = None) -> torch.Tensor:
    """(tokens, features) in float32: the sum of each token's rows, times p (tokens, k), always in the same order."""
    total = torch.zeros(len(order.rows), values.shape[-1], dtype=torch.float32, device=values.device)
    for choice in range(order.rows.shape[1]):
        part = values[order.rows[:, choice]]
        total = total.add_(part) if p is None else total.addcmul_(part.float(), p[:, choice, None].float())
    return total


def _multiply(weight: _Weight, x: torch.Tensor, order: _Order, lora: Sequence[torch.Tensor]) -> torch.Tensor:
    """x W'ᵀ + b of the rows of each expert, (rows, out)."""
    out = _grouped(x, weight.full(lora).transpose(1, 2), order.ends)
    matrices = None if weight.summed else weight.matrices(lora)
    if matrices:
        x_A = _grouped(x, matrices.A.to(x.dtype).transpose(1, 2), order.ends)
        out.add_(_grouped(x_A, matrices.B.to(x.dtype).transpose(1, 2), order.ends), alpha=weight.scaling)
    if weight.bias is not None:
        out.add_(weight.bias[order.experts])
    return out


def _multiply_transposed(weight: _Weight, grad: torch.Tensor, order: _Order, lora: Sequence[torch.Tensor]) -> torch.Tensor:
    """dy W' of the rows of each expert, (rows, in)."""
    out = _grouped(grad, weight.full(lora), order.ends)
    matrices = None if weight.summed else weight.matrices(lora)
    if matrices:
        dy_B = _grouped(grad, matrices.B.to(grad.dtype), order.ends)
        out.add_(_grouped(dy_B, matrices.A.to(grad.dtype), order.ends), alpha=weight.scaling)
    return out


def _lora_grads(
    weight: _Weight, x: torch.Tensor | None, grad: torch.Tensor, *, order: _Order, lora: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, ...]:
    """dA and dB in PEFT's layout.

    Args:
        x: (rows, in) The inputs; with W2 times p.
        grad: (rows, out) dy; with W2 dout.
    """
    matrices = weight.matrices(lora)
    if matrices is None or x is None:
        return ()
    experts = len(matrices.A)
    dy_B = _grouped(grad, matrices.B.to(grad.dtype), order.ends)
    x_A = _grouped(x, matrices.A.to(x.dtype).transpose(1, 2), order.ends)
    lora_A, lora_B = lora
    r = len(lora_A) // experts
    dA = _grouped_outer(dy_B, x, order.ends)[:, :r]  # (experts, r, in)
    dB = _grouped_outer(grad, x_A, order.ends)[..., :r]  # (experts, out, r)
    return (
        dA.reshape(experts * r, -1).to(lora_A.dtype).mul_(weight.scaling),
        dB.permute(1, 2, 0).reshape(lora_B.shape).to(lora_B.dtype).mul_(weight.scaling),
    )


# Grouped products


def _grouped(x: torch.Tensor, matrices: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """(rows, b): the rows (rows, a) of each expert times its matrix, of (experts, a, b)."""
    if _needs_loop(x, matrices):
        out = x.new_empty(len(x), matrices.shape[2])
        for expert, (start, end) in enumerate(_ranges(ends)):
            torch.mm(x[start:end], matrices[expert], out=out[start:end])
        return out
    return grouped_mm(x.contiguous(), matrices, offs=ends)


def _grouped_outer(left: torch.Tensor, right: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """(experts, a, b): leftᵀ right of the rows of each expert, (rows, a) and (rows, b)."""
    if _needs_loop(left, right):
        return torch.stack([left[start:end].t() @ right[start:end] for start, end in _ranges(ends)])
    out = grouped_mm(left.t(), right, offs=ends)
    unused = torch.diff(ends, prepend=ends.new_zeros(1)) == 0
    return out.masked_fill_(unused[:, None, None], 0)


def _needs_loop(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether PyTorch has no grouped product for these: it needs aligned rows, and on a GPU bfloat16."""
    sizes = (*one.shape[1:], *other.shape[1:])
    return (one.is_cuda and one.dtype != torch.bfloat16) or any(size % ALIGNED for size in sizes)


def _ranges(ends: torch.Tensor) -> list[tuple[int, int]]:
    """The first row and the end of each expert's rows."""
    numbers = ends.tolist()
    return list(zip([0, *numbers[:-1]], numbers, strict=True))
