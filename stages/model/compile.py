"""Compiles the elementwise parts of a model into one GPU kernel each: norms, rotary embeddings, gated activations.

Without compilation they take a third of a training step on a GPU, since each is five to ten kernels that read and write
complete tensors. The model's own code is compiled, so this works for every architecture and needs no second implementation.
"""

import inspect
import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, NamedTuple, TypeAlias

import torch

from stages.model.probe import logits_match, probe_ids, reason_of

ROTARY = "apply_rotary_pos_emb"
"""The name of the function in the code of Transformers' models."""
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


class Compiled(NamedTuple):
    """What `compile_elementwise` did, for messages."""

    parts: list[str]
    """What was compiled: "activations", "norms", "rotary positions"."""
    left_out: list[str]
    """What was not, and why: one line for each kind of module or function."""


def compile_elementwise(model: Any, remember: Remember | None = None) -> Compiled:
    """Compiles the elementwise parts of a model on a GPU, in place. Does nothing on a CPU.

    Each compiled part is tried on its first input in a trial run, and left out if its output is not that of the model's
    own code.

    Args:
        remember: Called with the result of each norm and gated activation, for a caller that recomputes them in the backward
            pass.
    """
    if model.device.type != "cuda":
        return Compiled([], [])
    modules, functions = _find_replacements(model, remember)
    reasons = _try_replacements(model, modules, functions)
    # If one module of a class differs, all keep their own code. A module that the trial does not call computes no text.
    failed = {type(module): reason for module, reason in reasons.items() if reason and module in modules}
    left_out = [f"{kind.__name__} is not compiled: {reason}" for kind, reason in failed.items()]
    parts = set()
    for module, replacement in modules.items():
        if module in reasons and type(module) not in failed:
            module.forward = replacement.forward
            parts.add(replacement.part)
    for code, replacement in functions.items():
        if reasons.get(code):
            left_out.append(f"{ROTARY} of {code.__name__} is not compiled: {reasons[code]}")
        elif code in reasons:
            setattr(code, ROTARY, replacement.forward)
            parts.add(replacement.part)
    return Compiled(sorted(parts), left_out)


class _Replacement(NamedTuple):
    part: str
    """As in `Compiled.parts`."""
    forward: Callable[..., Any]


def _find_replacements(
    model: Any, remember: Remember | None
) -> tuple[dict[torch.nn.Module, _Replacement], dict[ModuleType, _Replacement]]:
    """The modules that could get another forward, and the modules of code that could get another rotary function."""
    modules, functions = {}, {}
    for module in model.modules():
        kind = type(module)
        if "norm" in kind.__name__.lower() and next(module.children(), None) is None:
            modules[module] = _Replacement("norms", _norm(module, compiled(kind.forward), remember))
        elif _is_gated(module):
            modules[module] = _Replacement("activations", _gated(module, compiled(_activate), remember))
        code = sys.modules[kind.__module__]
        rotate = getattr(code, ROTARY, None)
        if rotate is None or hasattr(rotate, "original"):
            continue
        if list(inspect.signature(rotate).parameters)[:4] == ["q", "k", "cos", "sin"]:
            functions[code] = _Replacement("rotary positions", _rotary(rotate))
    return modules, functions


def _try_replacements(
    model: Any, modules: Mapping[torch.nn.Module, _Replacement], functions: Mapping[ModuleType, _Replacement]
) -> dict[torch.nn.Module | ModuleType, str]:
    """Runs the model, and each replacement on the first input of what it replaces.

    That is in the middle of the run: only then are weights that FSDP has sharded complete.

    Returns:
        For everything that the run calls why it cannot be replaced, and "" if it can.
    """
    reasons: dict[torch.nn.Module | ModuleType, str] = {}

    def attempt(module: torch.nn.Module, arguments: Any, named: Any, output: Any) -> None:
        if module not in reasons:
            reasons[module] = _why_different(modules[module].forward, arguments, named, output=output)

    def attempting(code: ModuleType, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            output = function(*arguments, **named)
            if code not in reasons:
                reasons[code] = _why_different(functions[code].forward, arguments, named, output=output)
            return output

        return call

    hooks = [module.register_forward_hook(attempt, with_kwargs=True) for module in modules]
    own = {code: getattr(code, ROTARY) for code in functions}
    try:
        for code, function in own.items():
            setattr(code, ROTARY, attempting(code, function))
        with torch.no_grad():
            model(input_ids=probe_ids(model), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
        for code, function in own.items():
            setattr(code, ROTARY, function)
    return reasons


def _why_different(function: Callable[..., Any], arguments: Any, named: Any, *, output: Any) -> str:
    """Why a function cannot take the place of the one that gave `output`; "" if it gives the same."""
    try:
        found = function(*arguments, **named)
        found, wanted = (each if isinstance(each, tuple) else (each,) for each in (found, output))
        same = len(found) == len(wanted) and all(map(logits_match, found, wanted))
    except Exception as error:  # the compiler has errors of its own
        return reason_of(error)
    return "" if same else "its output differs"


def _norm(module: torch.nn.Module, function: Any, remember: Remember | None) -> Any:
    def forward(*inputs: Any, **named: Any) -> Any:
        out = function(module, *inputs, **named)
        # A gated norm has two inputs, and a norm of queries and keys two results.
        if remember and not named and all(isinstance(each, torch.Tensor) for each in (out, *inputs)):
            remember(out, recompute, inputs)
        return out

    def recompute(*inputs: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            out: torch.Tensor = function(module, *inputs)
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
