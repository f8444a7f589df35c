"""The loss on the labelled tokens of a batch: from a user's file, and in chunks that need little memory."""

import importlib.util
import inspect
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

import torch
from torch.nn.functional import cross_entropy

from stages.core.params import bad_param
from stages.core.problem import Problem
from stages.model.compile import compiled
from stages.model.logits import is_head_last, label_hidden_states

Loss: TypeAlias = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | int], torch.Tensor]
"""(logits, labels, num_items) to a scalar, as in stages/losses/cross_entropy.py."""

MAX_LOGITS = 1 << 28
"""Logits that are in memory at a time: 1 GiB in float32."""


def label_loss(
    model: Any, batch: Mapping[str, Any], *, head: torch.nn.Module, loss: Loss, num_items: torch.Tensor | int
) -> torch.Tensor:
    """The loss of a batch, with at most MAX_LOGITS logits in memory at a time.

    The logits are computed for a chunk of the labels, their loss is backpropagated to the hidden states, and they are freed.
    So `loss` is called with chunks of a batch's labels, and the results are added up.

    Args:
        model: A causal language model for which `head_is_last` is true.
        batch: As for `label_logits`.
        head: The model's output head.
        loss: The function to minimize.
        num_items: The number of labels in the optimizer step.

    Returns:
        A scalar. Its backward pass uses the gradient that has been computed here.
    """
    hidden = label_hidden_states(model, batch, head)
    total: torch.Tensor = _ChunkedLoss.apply(hidden, batch["targets"], head, loss, num_items)  # type: ignore[no-untyped-call]
    return total


def head_is_last(model: Any, head: torch.nn.Module) -> bool:
    """Whether a model's logits are exactly head(hidden states), and the head is frozen.

    Some models change the logits after the head, for example by capping them.
    """
    return not any(parameter.requires_grad for parameter in head.parameters()) and is_head_last(model, head)


class _ChunkedLoss(torch.autograd.Function):
    """The loss of hidden states (labels, hidden size), a chunk of labels at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        targets: torch.Tensor,
        head: torch.nn.Module,
        loss: Loss,
        num_items: torch.Tensor | int,
    ) -> torch.Tensor:
        """Computes the loss, and already its gradient with respect to the hidden states."""
        chunk_size = max(1, MAX_LOGITS // head.get_parameter("weight").shape[0])
        grad = torch.empty_like(hidden)
        total = torch.zeros((), device=hidden.device)
        for start in range(0, len(targets), chunk_size):
            chunk = slice(start, start + chunk_size)
            with torch.enable_grad():
                states = hidden[chunk].detach().requires_grad_()
                value = loss(head(states), targets[chunk], num_items)
            grad[chunk] = torch.autograd.grad(value, states)[0]
            total += value.detach()
        ctx.save_for_backward(grad)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Scales the gradient that `forward` has computed."""
        return ctx.saved_tensors[0] * grads[0], None, None, None, None


def next_token_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    num_items: torch.Tensor | int,
    label_weights: torch.Tensor | None = None,
    label_smoothing_factor: float = 0.0,
) -> torch.Tensor:
    """Cross-entropy in float32: the sum over the labels, divided by `num_items`.

    `num_items` is the number of labels in the optimizer step, not in this micro-batch. So every label has the same weight,
    however the rows are distributed over micro-batches and processes.

    Args:
        logits: (labels, vocabulary)
        labels: (labels,)
        num_items: The number of labels in the optimizer step.
        label_weights: (vocabulary,) The weight of each token as a label.
        label_smoothing_factor: Share of the target distribution that is spread evenly over the vocabulary (Szegedy et al.
            2016).

    Returns:
        A scalar.
    """
    weight = label_weights.to(logits.device) if label_weights is not None else None
    total: torch.Tensor = compiled(_sum)(logits, labels, weight, label_smoothing_factor)
    return total / num_items


def _sum(
    logits: torch.Tensor, labels: torch.Tensor, weight: torch.Tensor | None, label_smoothing_factor: float
) -> torch.Tensor:
    return cross_entropy(logits.float(), labels, weight=weight, label_smoothing=label_smoothing_factor, reduction="sum")


# The function in the file that train.loss names


def load_loss(path: Path, vocabulary: int, *, label_weights: Mapping[int, float], label_smoothing_factor: float) -> Loss:
    """The function `loss` of a Python file, with the label weights and the label smoothing filled in.

    Args:
        path: train.loss.
        vocabulary: The size of the model's vocabulary.
        label_weights: train.label_weights: token id to weight; tokens without an entry have weight 1. Empty for none.
        label_smoothing_factor: Of train.training_arguments; 0 for none.

    Raises Problem if the file cannot be imported or has no such function, if a weight's token is not in the vocabulary, or
    if a value is set that the function does not accept.
    """
    function = getattr(_import_file(path), "loss", None)
    if not callable(function):
        raise Problem(_bad_loss(path, "has no function `loss`; stages/losses/cross_entropy.py shows what it must look like"))
    try:
        accepted = inspect.signature(function).parameters
    except ValueError:  # some functions that are written in C
        raise Problem(_bad_loss(path, "`loss` must be a Python function, so that its parameters are known")) from None
    problems = []
    unknown = [str(token) for token in label_weights if not 0 <= token < vocabulary]
    if unknown:
        message = f"{', '.join(unknown)}: no such token; there are {vocabulary:,}, numbered from 0"
        problems.append(bad_param("train.label_weights", message))
    not_accepted = f"the loss in {path} does not take it; add a parameter of this name to the function, or set"
    if label_weights and "label_weights" not in accepted:
        problems.append(bad_param("train.label_weights", f"{not_accepted} {{}}"))
    if label_smoothing_factor > 0 and "label_smoothing_factor" not in accepted:
        problems.append(bad_param("train.training_arguments.label_smoothing_factor", f"{not_accepted} 0"))
    if problems:
        raise Problem(*problems)
    values = {
        "label_weights": _weight_tensor(label_weights, vocabulary),
        "label_smoothing_factor": label_smoothing_factor,
    }
    return partial(function, **{name: value for name, value in values.items() if name in accepted})


def _import_file(path: Path) -> ModuleType:
    """Imports a Python file of any name. Raises Problem if that fails."""
    if not path.is_file():
        raise Problem(_bad_loss(path, "not found; set the path of a Python file, relative to the project's root"))
    spec = importlib.util.spec_from_file_location("loratory_loss", path)
    if spec is None or spec.loader is None:
        raise Problem(_bad_loss(path, "not a Python file; its name must end in .py"))
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # a user's file can raise anything
        raise Problem(_bad_loss(path, f"cannot be imported: {type(error).__name__}: {error}")) from None
    return module


def _bad_loss(path: Path, message: str) -> str:
    return bad_param("train.loss", f"{path}: {message}")


def _weight_tensor(label_weights: Mapping[int, float], vocabulary: int) -> torch.Tensor | None:
    """(vocabulary,) in float32, None if no weight is set."""
    if not label_weights:
        return None
    weights = torch.ones(vocabulary)
    weights[list(label_weights)] = torch.tensor(list(label_weights.values()))
    return weights
