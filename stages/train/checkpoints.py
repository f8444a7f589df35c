"""The checkpoints of a training: the trained weights in them, which of them are complete, and which is the last."""

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers.trainer_utils import get_last_checkpoint

COMPLETE = "complete"
"""The file that is written last into a checkpoint."""
TRAINABLE = "trainable.safetensors"
"""All trained weights. PEFT's own file would hold the result of p_tuning, not the network that computes it."""


def trainable_parameters(model: Any) -> dict[str, torch.nn.Parameter]:
    """The parameters of a model that are trained, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def save_trainable(model: Any, checkpoint: Path) -> None:
    """Writes the trained weights of a model into a checkpoint."""
    checkpoint.mkdir(parents=True, exist_ok=True)
    weights = {name: parameter.detach().contiguous() for name, parameter in trainable_parameters(model).items()}
    save_file(weights, checkpoint / TRAINABLE)


def load_trainable(model: Any, checkpoint: Path) -> None:
    """Reads them back, in place."""
    saved, parameters = load_file(checkpoint / TRAINABLE), trainable_parameters(model)
    assert saved.keys() == parameters.keys()
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(saved[name])


def mark_complete(checkpoint: Path) -> None:
    """Marks a checkpoint as complete, after all of its files are on the disk."""
    for file in checkpoint.iterdir():
        with file.open("rb") as written:
            os.fsync(written.fileno())
    with (checkpoint / COMPLETE).open("wb") as mark:
        os.fsync(mark.fileno())


def remove_incomplete(folder: Path) -> None:
    """Removes the checkpoints that a killed run did not finish writing."""
    for path in folder.glob("checkpoint-*"):
        if not (path / COMPLETE).exists():
            shutil.rmtree(path)


def last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint in a folder, None if there is none."""
    last: str | None = get_last_checkpoint(str(folder))
    return last
