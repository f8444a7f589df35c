"""Checkpoints of a training: which are complete, and which is the last."""

import os
import shutil
from pathlib import Path

from transformers.trainer_utils import get_last_checkpoint

COMPLETE = "complete"
"""The file that is written last into a checkpoint."""


def mark_complete(checkpoint: Path) -> None:
    """Says that a checkpoint is complete, once all of its files are on the disk."""
    for file in checkpoint.iterdir():
        with file.open("rb") as written:
            os.fsync(written.fileno())
    with (checkpoint / COMPLETE).open("wb") as mark:
        os.fsync(mark.fileno())


def remove_incomplete(folder: Path) -> None:
    """Removes the checkpoints that a killed run did not finish."""
    for path in folder.glob("checkpoint-*"):
        if not (path / COMPLETE).exists():
            shutil.rmtree(path)


def last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint in a folder, None if there is none."""
    last: str | None = get_last_checkpoint(str(folder))
    return last
