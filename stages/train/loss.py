"""The logits where something is learned, and what is minimized there."""

import importlib.util
import inspect
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch.nn.functional import cross_entropy

from stages.core.problem import Problem
from stages.model.compile import compiled
from stages.model.logits import forward, modify_head_input, select_positions

Loss: TypeAlias = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | int], torch.Tensor]
"""(logits, labels, num_items) to a scalar, as in stages/losses/cross_entropy.py."""


def label_loss(
    model: Any, batch: Mapping[str, Any], head: torch.nn.Module, loss: Loss, num_items: torch.Tensor | int
) -> torch.Tensor:
    """The loss of a batch, for which no more than LOGITS logits are in memory at a time.

    The logits of a part of the labels are made, their loss is taken back to the hidden states, and they are dropped. So
    `loss` sees the labels of a batch in parts, which by its contract add up. `head` must be frozen.
    """
    tokens, found = batch["input_ids"].shape[1], []

    def keep(hidden: torch.Tensor) -> torch.Tensor:
        found.append(select_positions(hidden, tokens, batch["target_positions"]))
        return hidden[:1, :1]  # the head's own result is not used

    with modify_head_input(head, keep):
        forward(model, batch)
    total: torch.Tensor = _InParts.apply(found[0], batch["targets"], head, loss, num_items)  # type: ignore[no-untyped-call]
    return total


LOGITS = 1 << 28
"""So many logits take 1 GiB in float32."""


def head_is_last(model: Any, head: torch.nn.Module) -> bool:
    """Whether logits are what the frozen head makes of the hidden states, and nothing is done to them after it."""
    if any(parameter.requires_grad for parameter in head.parameters()):
        return False
    seen: list[torch.Tensor] = []
    handle = head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[5, 6, 7]], device=model.device)).logits
    finally:
        handle.remove()
    with torch.no_grad():
        return len(seen) == 1 and torch.equal(head(seen[0])[:, -3:].to(logits.dtype), logits)


class _InParts(torch.autograd.Function):
    """Hidden states (labels, size) to the summed loss."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        targets: torch.Tensor,
        head: torch.nn.Module,
        loss: Loss,
        num_items: torch.Tensor | int,
    ) -> torch.Tensor:
        at_once = max(1, LOGITS // head.get_parameter("weight").shape[0])
        grad = torch.empty_like(hidden)
        total = torch.zeros((), device=hidden.device)
        for start in range(0, len(targets), at_once):
            part = slice(start, start + at_once)
            with torch.enable_grad():
                states = hidden[part].detach().requires_grad_()
                value = loss(head(states), targets[part], num_items)
            grad[part] = torch.autograd.grad(value, states)[0]
            total += value.detach()
        ctx.save_for_backward(grad)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return ctx.saved_tensors[0] * grads[0], None, None, None, None


def next_token_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    num_items: torch.Tensor | int,
    label_weights: torch.Tensor | None = None,
    label_smoothing_factor: float = 0.0,
) -> torch.Tensor:
    """The summed cross-entropy over `num_items`: the labels of the whole optimizer step, not of this micro-batch.

    So rows of unequal length weigh the same whatever batch they fall into. Computed in float32.

    Args:
        logits: (labels, vocabulary)
        labels: (labels,)
        label_weights: (vocabulary,) How much each token counts.
        label_smoothing_factor: Share of the target that is spread evenly over all tokens (Szegedy et al. 2016).
    """
    weight = label_weights.to(logits.device) if label_weights is not None else None
    total: torch.Tensor = compiled(_sum)(logits, labels, weight, label_smoothing_factor)
    return total / num_items


def _sum(
    logits: torch.Tensor, labels: torch.Tensor, weight: torch.Tensor | None, label_smoothing_factor: float
) -> torch.Tensor:
    return cross_entropy(logits.float(), labels, weight=weight, label_smoothing=label_smoothing_factor, reduction="sum")


def load_loss(path: Path, vocabulary: int, *, label_weights: Mapping[int, float], label_smoothing_factor: float) -> Loss:
    """The function `loss` of a Python file, with the settings that it asks for.

    Raises Problem if the file does not run or has no such function, if a weight's token is not in the vocabulary, or if
    a value is given that the function does not take.
    """
    spec = importlib.util.spec_from_file_location("loratory_loss", path)
    if spec is None or spec.loader is None:
        raise Problem(f"params.yaml: train.loss: {path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except FileNotFoundError:
        raise Problem(f"params.yaml: train.loss: {path}: not found") from None
    except Exception as error:  # whatever a user's file does wrong
        raise Problem(f"{path}: cannot be imported: {type(error).__name__}: {error}") from None
    found = getattr(module, "loss", None)
    if not callable(found):
        raise Problem(f"{path}: has no function `loss`; stages/losses/cross_entropy.py shows what it must look like")
    beyond = [str(token) for token in label_weights if not 0 <= token < vocabulary]
    if beyond:
        raise Problem(f"params.yaml: train.label_weights: {', '.join(beyond)}: no such token; there are {vocabulary:,}")
    weights = None
    if label_weights:
        weights = torch.ones(vocabulary)
        weights[list(label_weights)] = torch.tensor(list(label_weights.values()))
    settings = {"label_weights": weights, "label_smoothing_factor": label_smoothing_factor}
    taken = inspect.signature(found).parameters
    given = {"label_weights": bool(label_weights), "label_smoothing_factor": label_smoothing_factor > 0}
    left_out = [f"train.{name}" for name in settings if given[name] and name not in taken]
    if left_out:
        raise Problem(f"params.yaml: {', '.join(left_out)}: the loss in {path} does not take it; leave it at its default")
    return partial(found, **{name: value for name, value in settings.items() if name in taken})
