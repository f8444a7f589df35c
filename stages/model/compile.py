"""The elementwise parts of a model compiled into one GPU kernel each: norms, rotary positions, gated activations.

A GPU spends a third of a step of the plain model on them, since each is five to ten kernels that read and write everything.
It is the model's own code that is compiled, so this holds for every architecture and has no arithmetic of its own.
"""

import inspect
import sys
from collections.abc import Callable
from typing import Any, TypeAlias

import torch

_compiled: dict[Any, Any] = {}

Remember: TypeAlias = Callable[[torch.Tensor, Callable[..., torch.Tensor], tuple[torch.Tensor, ...]], None]
"""(result, function, inputs): called with each cheap result, and how to compute it again without gradients."""


def compiled(function: Any) -> Any:
    """`function`, compiled at its first call with a GPU tensor; called as it is with any other."""

    def call(*given: Any, **named: Any) -> Any:
        on_gpu = next(value for value in given if isinstance(value, torch.Tensor)).is_cuda
        return (_compile(function) if on_gpu else function)(*given, **named)

    return call


def _compile(function: Any) -> Any:
    if function not in _compiled:
        # With and without gradients, autocast, and changing sizes: more variants than the 8 after which Dynamo gives up.
        torch._dynamo.config.recompile_limit = 64
        # Inductor's worker processes would be waited for forever after Ctrl-C has ended them.
        torch._inductor.config.compile_threads = 1
        _compiled[function] = torch.compile(function)
    return _compiled[function]


def compile_elementwise(model: Any, remember: Remember | None = None) -> list[str]:
    """Compiles the elementwise parts of a model on a GPU, in place.

    Args:
        remember: Called with the result of each norm and gated activation, for a caller that recomputes them later.

    Returns:
        What was compiled, for a message: "norms", "activations", "rotary positions". Nothing on a CPU.
    """
    if model.device.type != "cuda":
        return []
    found = set()
    for module in model.modules():
        kind = type(module)
        if "norm" in kind.__name__.lower() and next(module.children(), None) is None:
            module.forward = _norm(module, compiled(kind.forward), remember)
            found.add("norms")
        elif _is_gated(module):
            module.forward = _gated(module, compiled(_activate), remember)
            found.add("activations")
        rotate = getattr(sys.modules[kind.__module__], "apply_rotary_pos_emb", None)
        if rotate is not None and not hasattr(rotate, "original"):
            sys.modules[kind.__module__].apply_rotary_pos_emb = _rotary(rotate)  # type: ignore[attr-defined]
            found.add("rotary positions")
    return sorted(found)


def _norm(module: torch.nn.Module, function: Any, remember: Remember | None) -> Any:
    def forward(hidden_states: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = function(module, hidden_states)
        if remember:
            remember(out, again, (hidden_states,))
        return out

    def again(hidden_states: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            out: torch.Tensor = function(module, hidden_states)
        return out

    return forward


def _gated(module: Any, function: Any, remember: Remember | None) -> Any:
    def forward(x: torch.Tensor) -> torch.Tensor:
        gate, up = module.gate_proj(x), module.up_proj(x)
        hidden = function(gate, up, module.act_fn)
        if remember:
            remember(hidden, again, (gate, up))
        out: torch.Tensor = module.down_proj(hidden)
        return out

    def again(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            out: torch.Tensor = function(gate, up, module.act_fn)
        return out

    return forward


def _rotary(function: Any) -> Any:
    """The same with the heads behind the tokens, as they lie in memory; else attention and its gradients are copied."""

    def forward(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *rest: Any, **named: Any) -> Any:
        if rest or named or "unsqueeze_dim" not in inspect.signature(function).parameters:
            return compiled(function)(q, k, cos, sin, *rest, **named)
        turned = compiled(function)(q.transpose(1, 2), k.transpose(1, 2), cos, sin, unsqueeze_dim=2)
        return tuple(each.transpose(1, 2) for each in turned)

    forward.original = function  # type: ignore[attr-defined]
    return forward


def _activate(gate: torch.Tensor, up: torch.Tensor, act_fn: Any) -> torch.Tensor:
    out: torch.Tensor = act_fn(gate) * up
    return out


def _is_gated(module: torch.nn.Module) -> bool:
    """Whether its forward is down_proj(act_fn(gate_proj(x)) * up_proj(x)), as it stands in most of Transformers."""
    if not all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")):
        return False
    text = "".join(inspect.getsource(type(module).forward).split())
    return "self.down_proj(self.act_fn(self.gate_proj(x))*self.up_proj(x))" in text
