"""Checkpoints of one training and no other, in a folder of their own; only whole ones are ever taken up."""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from transformers.trainer_utils import get_last_checkpoint

from stages.lib.problem import Problem

WHOLE = "whole"
"""The file that is written last into a checkpoint."""


@contextlib.contextmanager
def open_checkpoints(fingerprint: str, *, main: bool = True) -> Iterator[Path]:
    """The folder for a run's checkpoints, held against a second trainer, and removed when the run ends well.

    It lies outside every output, since DVC deletes those before a stage runs, and below DVC_ROOT, which in a run of
    `dvc exp run --temp` or of the queue is still the project's own folder.

    Args:
        fingerprint: Names all that the training reads.
        main: Whether this process is the one of several that writes.

    Raises Problem if another process holds the folder.
    """
    folder = Path(os.environ.get("DVC_ROOT", ".")).absolute() / ".checkpoints" / fingerprint
    if not main:
        yield folder
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise Problem(
                f"process {lock.read().strip()} is training the very same (same data, base, code and parameters); wait for "
                f"it, or end it with: kill {lock.read().strip()}"
            ) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        for broken in (path for path in folder.glob("checkpoint-*") if not (path / WHOLE).exists()):
            shutil.rmtree(broken)
        yield folder
    shutil.rmtree(folder)


def mark_whole(checkpoint: Path) -> None:
    """Says that a checkpoint is complete, once all of its files are on the disk."""
    for file in checkpoint.iterdir():
        with file.open("rb") as written:
            os.fsync(written.fileno())
    with (checkpoint / WHOLE).open("wb") as mark:
        os.fsync(mark.fileno())


def last_checkpoint(folder: Path) -> str | None:
    """The newest checkpoint in an opened folder, None if there is none."""
    last: str | None = get_last_checkpoint(str(folder))
    return last
