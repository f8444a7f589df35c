"""Compiles the elementwise parts of a model into one GPU kernel each: norms, rotary embeddings, gated activations.

Without compilation they take a third of a training step on a GPU, since each is five to ten kernels that read and write
complete tensors. The model's own code is compiled, so this works for every architecture and needs no second implementation.
"""

import inspect
import sys
from collections.abc import Callable
from typing import Any, TypeAlias

import torch

_compiled: dict[Any, Any] = {}

Remember: TypeAlias = Callable[[torch.Tensor, Callable[..., torch.Tensor], tuple[torch.Tensor, ...]], None]
"""Called as remember(result, function, inputs): `result` can be recomputed, without gradients, as function(*inputs)."""


def compiled(function: Any) -> Any:
    """`function`, compiled with torch.compile when it is called with GPU tensors, and unchanged with CPU tensors.

    The first tensor among its positional arguments decides. Each function is compiled once in a process.
    """

    def call(*arguments: Any, **named: Any) -> Any:
        on_gpu = next(value for value in arguments if isinstance(value, torch.Tensor)).is_cuda
        return (_compile(function) if on_gpu else function)(*arguments, **named)

    return call


def _compile(function: Any) -> Any:
    if function not in _compiled:
        # Gradients, autocast and changing sizes make more variants than 8, the limit after which Dynamo stops compiling.
        torch._dynamo.config.recompile_limit = 64
        # With worker processes, Inductor would hang after Ctrl-C: it waits for workers that the signal has ended.
        torch._inductor.config.compile_threads = 1
        _compiled[function] = torch.compile(function)
    return _compiled[function]


def compile_elementwise(model: Any, remember: Remember | None = None) -> list[str]:
    """Compiles the elementwise parts of a model on a GPU, in place. Does nothing on a CPU.

    Args:
        remember: Called with the result of each norm and gated activation, for a caller that recomputes them in the backward
            pass.

    Returns:
        What was compiled, for a message: "activations", "norms", "rotary positions".
    """
    if model.device.type != "cuda":
        return []
    parts = set()
    for module in model.modules():
        kind = type(module)
        if "norm" in kind.__name__.lower() and next(module.children(), None) is None:
            module.forward = _norm(module, compiled(kind.forward), remember)
            parts.add("norms")
        elif _is_gated(module):
            module.forward = _gated(module, compiled(_activate), remember)
            parts.add("activations")
        rotate = getattr(sys.modules[kind.__module__], "apply_rotary_pos_emb", None)
        if rotate is not None and not hasattr(rotate, "original"):
            sys.modules[kind.__module__].apply_rotary_pos_emb = _rotary(rotate)  # type: ignore[attr-defined]
            parts.add("rotary positions")
    return sorted(parts)


def _norm(module: torch.nn.Module, function: Any, remember: Remember | None) -> Any:
    def forward(hidden_states: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = function(module, hidden_states)
        if remember:
            remember(out, recompute, (hidden_states,))
        return out

    def recompute(hidden_states: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            out: torch.Tensor = function(module, hidden_states)
        return out

    return forward


def _gated(module: Any, function: Any, remember: Remember | None) -> Any:
    def forward(x: torch.Tensor) -> torch.Tensor:
        gate, up = module.gate_proj(x), module.up_proj(x)
        hidden = function(gate, up, module.act_fn)
        if remember:
            remember(hidden, recompute, (gate, up))
        out: torch.Tensor = module.down_proj(hidden)
        return out

    def recompute(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            out: torch.Tensor = function(gate, up, module.act_fn)
        return out

    return forward


def _rotary(function: Any) -> Any:
    """apply_rotary_pos_emb, compiled for q and k of shape (rows, tokens, heads, head dim).

    That is their layout in memory. For Transformers' shape, (rows, heads, tokens, head dim), the compiled code would write
    results in that layout, and attention would copy them and their gradients.
    """

    def forward(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *rest: Any, **named: Any) -> Any:
        if rest or named or "unsqueeze_dim" not in inspect.signature(function).parameters:
            return compiled(function)(q, k, cos, sin, *rest, **named)
        rotated = compiled(function)(q.transpose(1, 2), k.transpose(1, 2), cos, sin, unsqueeze_dim=2)
        return tuple(each.transpose(1, 2) for each in rotated)

    forward.original = function  # type: ignore[attr-defined]
    return forward


def _activate(gate: torch.Tensor, up: torch.Tensor, act_fn: Any) -> torch.Tensor:
    out: torch.Tensor = act_fn(gate) * up
    return out


def _is_gated(module: torch.nn.Module) -> bool:
    """Whether a module's forward is down_proj(act_fn(gate_proj(x)) * up_proj(x)), as in most models of Transformers."""
    if not all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")):
        return False
    source = "".join(inspect.getsource(type(module).forward).split())
    return "self.down_proj(self.act_fn(self.gate_proj(x))*self.up_proj(x))" in source
