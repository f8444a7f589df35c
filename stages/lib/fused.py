"""The elementwise parts of a model, each compiled into one kernel: norms, rotary positions, gated activations.

A GPU spends a third of a step of the plain model on them, since each is five to ten kernels that read and write everything.
It is the model's own code that is compiled, so this holds for every architecture and has no arithmetic of its own.

What is cheap to make is not kept for the way back: a norm's result or an activation carries the recipe by which `recall`
makes it again from what is kept anyway, and lib/low_rank.py keeps the recipe.
"""

import inspect
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

_compiled: dict[Any, Any] = {}


class Recipe(NamedTuple):
    """How to make a tensor again."""

    function: Callable[..., torch.Tensor]
    sources: tuple[torch.Tensor, ...]


def fuse(model: Any) -> list[str]:
    """Compiles the elementwise parts of a loaded model on a GPU, and returns their names for a person to read."""
    if model.device.type != "cuda":
        return []
    found = set()
    for module in model.modules():
        kind = type(module)
        if "norm" in kind.__name__.lower() and next(module.children(), None) is None:
            _replace(module, _norm, kind.forward)
            found.add("norms")
        elif _is_gated(module):
            _replace(module, _gated, _activate)
            found.add("activations")
        rotate = getattr(sys.modules[kind.__module__], "apply_rotary_pos_emb", None)
        if rotate is not None and not hasattr(rotate, "original"):
            sys.modules[kind.__module__].apply_rotary_pos_emb = _rotary(rotate)  # type: ignore[attr-defined]
            found.add("rotary positions")
    return sorted(found)


def recall(recipe: Recipe) -> torch.Tensor:
    """The tensor that a recipe makes. The last one is remembered, since several layers read the same."""
    known = _Last.recipe
    if known is None or not _same(known, recipe):
        _Last.recipe, _Last.value = recipe, recipe.function(*recipe.sources)
    assert _Last.value is not None
    return _Last.value


def forget() -> None:
    """Gives back the memory of the last recalled tensor."""
    _Last.recipe = _Last.value = None


class _Last:
    """Holds the sources too, so no other tensor can take their place in memory while they are compared by it."""

    recipe: Recipe | None = None
    value: torch.Tensor | None = None


def _same(one: Recipe, other: Recipe) -> bool:
    return one.function is other.function and all(
        a.data_ptr() == b.data_ptr() and a.shape == b.shape for a, b in zip(one.sources, other.sources, strict=True)
    )


def compiled(function: Any) -> Any:
    """The function, compiled when a GPU's tensors first come to it, once for each kind of them; as it is for others."""

    def call(*given: Any, **named: Any) -> Any:
        on_gpu = next(value for value in given if isinstance(value, torch.Tensor)).is_cuda
        return (_compile(function) if on_gpu else function)(*given, **named)

    return call


def _compile(function: Any) -> Any:
    if function not in _compiled:
        # With and without gradients, autocast, and sizes that change: more kinds than the 8 after which it would give up.
        torch._dynamo.config.recompile_limit = 64
        # Compiling in processes of their own, it would wait for ever for one that Ctrl-C has ended.
        torch._inductor.config.compile_threads = 1
        _compiled[function] = torch.compile(function)
    return _compiled[function]


def _replace(module: torch.nn.Module, make: Callable[..., Any], function: Any) -> None:
    module.forward = make(module, compiled(function))


def _norm(module: torch.nn.Module, function: Any) -> Any:
    def forward(hidden_states: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = function(module, hidden_states)
        out.recipe = Recipe(again, (hidden_states,))  # type: ignore[attr-defined]
        return out

    def again(hidden_states: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            out: torch.Tensor = function(module, hidden_states)
        return out

    return forward


def _gated(module: Any, function: Any) -> Any:
    def forward(x: torch.Tensor) -> torch.Tensor:
        gate, up = module.gate_proj(x), module.up_proj(x)
        hidden = function(gate, up, module.act_fn)
        hidden.recipe = Recipe(again, (gate, up))
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
