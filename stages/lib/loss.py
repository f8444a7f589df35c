"""The logits where something is learned, and what is minimized there."""

import importlib.util
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch.nn.functional import cross_entropy

from stages.lib.labels import IGNORE
from stages.lib.problem import Problem

Loss: TypeAlias = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | int], torch.Tensor]
"""(logits, labels, num_items) to a scalar, as in stages/losses/cross_entropy.py."""


def label_logits(
    model: Any, batch: Mapping[str, Any], head: torch.nn.Module | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the model says where something is learned.

    Position t predicts token t + 1, so the logits for a label come from the position before it. The hidden states of all
    other positions are left out before the output head, which for short answers is the larger part of its work and memory.

    Args:
        model: A causal language model, with or without an adapter.
        batch: From `pad`, or from `flatten` for a model that `use_flat_rows` has prepared.
        head: The model's output head; needed where `model` is wrapped for several processes and does not tell.

    Returns:
        logits (labels, vocabulary) and the labels (labels,), row by row.
    """
    targets = batch["labels"][:, 1:]
    learned = targets != IGNORE
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch}
    with _only(head or model.get_output_embeddings(), learned):
        logits = model(**inputs, use_cache=False).logits
    return logits, targets[learned]


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
    total = cross_entropy(logits.float(), labels, weight=weight, label_smoothing=label_smoothing_factor, reduction="sum")
    return total / num_items


def load_loss(path: Path, vocabulary: int, label_weights: Mapping[int, float], label_smoothing_factor: float) -> Loss:
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


@contextmanager
def _only(head: torch.nn.Module, learned: torch.Tensor) -> Iterator[None]:
    """While it holds, the output head sees the hidden states at `learned` (rows, tokens - 1) and no others.

    An adapter may have put virtual tokens before the row, so the places are counted from its end.
    """
    tokens = learned.shape[1] + 1
    hook = head.register_forward_pre_hook(lambda _, inputs: (inputs[0][:, -tokens:-1][learned], *inputs[1:]))
    try:
        yield
    finally:
        hook.remove()
