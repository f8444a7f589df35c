"""The checkpoints of a training: the trained weights in them, which of them can be used, and which is the last.

The weights are in safetensors. The state of the optimizer, the schedule and the random numbers is written by the Trainer
with torch.save; it reads them with weights_only, which runs no code of a pickle.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers.trainer_utils import get_last_checkpoint

from stages.core.jsonl import read_json, write_json
from stages.core.output import sha256_of

COMPLETE = "complete"
"""The file that is written last into a checkpoint: JSON, name → sha256 of every other file."""
STATE = "trainer_state.json"
"""In a checkpoint: the Trainer's counts and curves, and which checkpoint is the best so far."""
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
    hashes = {}
    for file in sorted(checkpoint.iterdir()):
        with file.open("rb") as written:
            os.fsync(written.fileno())
        hashes[file.name] = sha256_of(file)
    partial = checkpoint / f"{COMPLETE}.partial"
    write_json(partial, hashes)
    with partial.open("rb") as mark:
        os.fsync(mark.fileno())
    partial.rename(checkpoint / COMPLETE)


def remove_unusable(folder: Path, *, needs_best: bool) -> list[str]:
    """Removes the checkpoints that a run must not resume from, so that the newest of those that are left can be used.

    These are checkpoints that a killed run did not finish writing, those of which a file is not what was written, and those
    whose best checkpoint is one of these, if `needs_best`: if load_best_model_at_end is set.

    Returns lines for the user: what is damaged, and what the training does about it.
    """
    lines = []
    for path in _by_step(folder):
        why = _why_unusable(path)
        if why:
            lines.append(f"{path.name} is damaged ({why}) and is not used")
        if why or not (path / COMPLETE).exists():
            shutil.rmtree(path)
    for path in _by_step(folder) if needs_best else ():  # the older ones first: those that name one come after it
        best = read_json(path / STATE).get("best_model_checkpoint")
        if best and not (folder / Path(best).name).exists():
            lines.append(f"{path.name} is not used, since its best checkpoint, {Path(best).name}, is not there")
            shutil.rmtree(path)
    if lines and not any(_by_step(folder)):
        lines.append("no other checkpoint is left, so the training begins anew")
    return lines


def _by_step(folder: Path) -> Iterator[Path]:
    yield from sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))


def _why_unusable(checkpoint: Path) -> str:
    """What is wrong with a checkpoint that was completed; empty if nothing is, or if it was not completed."""
    mark = checkpoint / COMPLETE
    if not mark.exists():
        return ""
    try:
        hashes = dict(read_json(mark))
    except (OSError, ValueError, TypeError, RecursionError):
        return f"{COMPLETE} cannot be read"
    found = {file.name for file in checkpoint.iterdir()} - {COMPLETE}
    if STATE not in hashes:
        return f"{COMPLETE} does not name {STATE}"
    for name in sorted({*hashes, *found}):
        if name not in found:
            return f"{name} is missing"
        if name not in hashes:
            return f"{name} is not one of its files"
        try:
            if sha256_of(checkpoint / name) != hashes[name]:
                return f"{name} is not what was written"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    return ""


def last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint in a folder, None if there is none."""
    last: str | None = get_last_checkpoint(str(folder))
    return last
