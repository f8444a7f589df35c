"""Whether a training has changed what the model computes: one that has not is an error, and not a result."""

import hashlib
from collections.abc import Mapping
from typing import Any

import torch

from stages.core.params import bad_param
from stages.core.problem import Problem
from stages.train.checkpoints import trainable_parameters


def weight_digests(model: Any) -> dict[str, str]:
    """A hash of each trained weight, by name: less memory than a copy of all."""
    return {name: _digest(parameter) for name, parameter in trainable_parameters(model).items()}


def _digest(parameter: torch.Tensor) -> str:
    data = parameter.detach().contiguous().flatten().view(torch.uint8).cpu().numpy().tobytes()
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def check_effect(model: Any, initial: Mapping[str, str], *, steps: int, learning_rate: float) -> None:
    """Raises Problem if the trained model is the one before the training.

    Args:
        model: The trained model.
        initial: Its `weight_digests` before the training.
        steps: The optimizer steps that were made, for the message.
        learning_rate: The highest learning rate, for the message.
    """
    parameters = trainable_parameters(model)
    changed = [name for name, parameter in parameters.items() if _digest(parameter) != initial[name]]
    # While lora_B is 0, lora_A is multiplied by 0: weight decay alone changes it.
    if any(not _is_factor_a(name) or _has_other_half(name, parameters) for name in changed):
        return
    found = (
        f"the adapter computes what the base does: in all {len(parameters):,} trained weights only those before a lora_B of "
        "zeros have changed"
        if changed
        else f"none of the {len(parameters):,} trained weights has changed"
    )
    raise Problem(
        bad_param(
            "train",
            f"nothing was trained: after {steps:,} optimizer steps {found}. Raise learning_rate ({learning_rate:g}), or see "
            "whether the gradient is 0: the function in loss must depend on its logits, and label_weights must not be 0 for "
            "all labels",
        )
    )


def _is_factor_a(name: str) -> bool:
    return "lora_A" in name or "lora_embedding_A" in name


def _has_other_half(name: str, parameters: Mapping[str, torch.Tensor]) -> bool:
    """Whether the factor that a lora_A is multiplied with is other than 0."""
    other = parameters.get(name.replace("lora_A", "lora_B").replace("lora_embedding_A", "lora_embedding_B"))
    return other is None or bool(other.detach().any())
