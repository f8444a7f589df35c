"""A folder for what an interrupted run leaves to the next one, held against a second run of the same.

It lies outside every output, since DVC deletes those before a stage runs, and below DVC_ROOT, which in a run of
`dvc exp run --temp` or of the queue is still the project's own folder. Its name is a fingerprint of all that the run reads,
so nothing made from other data, code or parameters is ever resumed from.
"""

import os
import shutil
from pathlib import Path

from filelock import FileLock, Timeout

from stages.core.problem import Problem


def checkpoint_root() -> Path:
    """The folder that holds all of them."""
    return Path(os.environ.get("DVC_ROOT", ".")).absolute() / ".checkpoints"


class CheckpointFolder:
    """The folder of one run. Use it as a context manager: the lock is released if the block raises.

    If the block ends well the lock stays held until `remove` is called, so that no other run finds the folder while it is
    being removed.
    """

    def __init__(self, stage: str, fingerprint: str) -> None:
        """Creates and locks the folder. Raises Problem if another process holds it."""
        self.path = checkpoint_root() / f"{stage}-{fingerprint}"
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.path.with_suffix(".lock"), timeout=0)
        pid = self.path.with_suffix(".pid")
        try:
            self._lock.acquire()
        except Timeout:
            raise Problem(
                f"{_process(pid)} is running {stage} on the same data, base, code and parameters. Wait for it: its work is "
                f"kept in {self.path}, and this run can then resume from it. If it is a run that you no longer want, end it "
                f"{_how_to_end(pid)}; it stops after saving what it has"
            ) from None
        self.path.mkdir(parents=True, exist_ok=True)  # the process that held the lock may have removed it
        pid.write_text(str(os.getpid()))

    def __enter__(self) -> "CheckpointFolder":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            self.release()

    def release(self) -> None:
        """Lets the next run have the folder."""
        self._lock.release()

    def remove(self) -> None:
        """Removes the folder: the run's result is safe."""
        shutil.rmtree(self.path, ignore_errors=True)
        self.path.with_suffix(".pid").unlink(missing_ok=True)
        self.release()


def _process(pid: Path) -> str:
    number = _read(pid)
    return f"process {number}" if number else "another process"


def _how_to_end(pid: Path) -> str:
    number = _read(pid)
    return f"with: kill {number}" if number else "with Ctrl-C in its terminal"


def _read(pid: Path) -> str:
    try:
        return pid.read_text().strip()
    except OSError:
        return ""
