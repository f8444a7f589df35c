"""The folder for the checkpoints of a run, locked so that two runs cannot use it at the same time.

It is outside all outputs, because DVC deletes those before a stage runs. It is inside DVC_ROOT, which is the project's
folder also for `dvc exp run --temp` and `--queue`. Its name has a fingerprint of everything that the run reads, so a run
resumes only from checkpoints made with the same data, code and parameters.
"""

import os
import shutil
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from stages.core.output import checkpoint_root
from stages.core.problem import Problem


class CheckpointFolder:
    """The checkpoint folder of one run, as a context manager.

    If the block raises, the lock is released and the folder stays. Otherwise the lock is held until `remove` is called, so
    that no other run uses the folder while it is being removed.
    """

    def __init__(self, stage: str, fingerprint: str) -> None:
        """Creates and locks the folder.

        Args:
            stage: The stage's name, for the folder's name and messages.
            fingerprint: 16 hex digits, from `stages.core.provenance.fingerprint`.

        Raises Problem if another process has locked it.
        """
        self.path = checkpoint_root() / f"{stage}-{fingerprint}"
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.path.with_suffix(".lock"), timeout=0)
        pid = self.path.with_suffix(".pid")
        try:
            self._lock.acquire()
        except Timeout:
            raise Problem(
                f"{owner_of(self.path)} is running {stage} on the same data, base, code and parameters. Wait until it has "
                "ended: dvc repro then takes up its result, and computes nothing again. Or end it "
                f"{_how_to_end(pid)}; it saves what it has finished in {self.path}, and dvc repro goes on from there"
            ) from None
        self.path.mkdir(parents=True, exist_ok=True)  # the process that had the lock may have removed it
        pid.write_text(str(os.getpid()))

    def __enter__(self) -> "CheckpointFolder":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            self.release()

    def release(self) -> None:
        """Releases the lock and keeps the folder."""
        self._lock.release()

    def remove(self) -> None:
        """Removes the folder and releases the lock. Call it when the outputs of the run are written.

        The folder is renamed first: a run that is killed now leaves no half-removed checkpoint to resume from.
        """
        removed = self.path.with_suffix(".removed")
        shutil.rmtree(removed, ignore_errors=True)  # of a run that was killed here
        with suppress(OSError):
            self.path.rename(removed)
        shutil.rmtree(removed, ignore_errors=True)
        self.path.with_suffix(".pid").unlink(missing_ok=True)
        self.release()


def owner_of(folder: Path) -> str:
    """The process that has locked a checkpoint folder: "process 1234"."""
    number = _read(folder.with_suffix(".pid"))
    return f"process {number}" if number else "another process"


def _how_to_end(pid: Path) -> str:
    number = _read(pid)
    return f"with: kill {number}" if number else "with Ctrl-C in its terminal"


def _read(pid: Path) -> str:
    try:
        return pid.read_text().strip()
    except OSError:
        return ""
