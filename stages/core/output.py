"""Writes outputs so that they appear under their name only when complete; and `Done`, which a stage returns."""

import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from stages.core.jsonl import write_json
from stages.core.problem import Problem


class Done(NamedTuple):
    """What a stage's function returns; None in a process of a distributed run that writes nothing."""

    summary: str
    """One line for the terminal: what was made."""
    clean_up: Callable[[], None] = lambda: None
    """Removes what only an interrupted run needs. Called last, when the outputs are written and the snapshot is checked."""
    copy_large: bool = False
    """Whether outputs of any size are copied for the next run (`stages.core.results`): they took hours to compute, and what
    `clean_up` removes is larger."""


def checkpoint_root() -> Path:
    """The folder, outside all outputs, of what outlives a stopped run: checkpoints, finished results, locks."""
    return Path(os.environ.get("DVC_ROOT", ".")).absolute() / ".checkpoints"


@contextmanager
def only_writer(stage: str, outputs: Sequence[str], *, kept: bool) -> Iterator[None]:
    """While it holds, no other process can run a stage on the same outputs: two would write into the same unfinished files.

    The lock belongs to this process alone. The system releases it when the process ends, however it ends, and also if a
    child of it lives on.

    Args:
        stage: The stage's name, for the message.
        outputs: Its outputs, of which the first names the lock.
        kept: Whether the result will be kept for the next run (`stages.core.results`), for the message of another process.

    Raises Problem if another process has the lock.
    """
    if not outputs:
        yield
        return
    name = hashlib.sha256(str(Path(outputs[0]).absolute()).encode()).hexdigest()[:16]
    path = checkpoint_root() / "locks" / f"{stage}-{name}"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="ascii") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            raise Problem(_explain_owner(stage, outputs[0], file.read().split())) from None
        except OSError:  # a file system without locks
            pass
        with suppress(OSError):  # a full disk
            file.truncate(0)
            file.write(f"{os.getpid()} {'kept' if kept else ''}")
            file.flush()
        yield


def _explain_owner(stage: str, output: str, words: Sequence[str]) -> str:
    """Who runs a stage, and what waiting and killing each do. `words` is the content of its lock."""
    owner, end = (f"process {words[0]}", f"with: kill {words[0]}") if words else ("another process", "with Ctrl-C")
    waiting = (
        "dvc repro then takes up its result in seconds, also if its own dvc is dead"
        if "kept" in words
        else "dvc did not start it, so dvc repro runs the stage again nevertheless"
    )
    return (
        f"{owner} is running {stage} and writes {output}. Wait until it has ended: {waiting}. Or end it {end}; then train "
        "and generate go on from what they have finished, and other stages begin anew"
    )


@contextmanager
def fresh_folder(path: Path) -> Iterator[Path]:
    """Yields an empty folder to fill. If the block succeeds, the folder is renamed to `path` and replaces what was there.

    A stage that fails leaves nothing. One that is killed leaves `<path>.partial`, which no stage reads and which the next
    run removes.
    """
    partial = _partial(path)
    partial.parent.mkdir(parents=True, exist_ok=True)
    with _writing_in(partial.parent):
        partial.mkdir()
        try:
            yield partial
            _remove(path)
            partial.rename(path)
        finally:
            _remove(partial)


@contextmanager
def fresh_file(path: Path) -> Iterator[Path]:
    """Like `fresh_folder`, for one file."""
    partial = _partial(path)
    partial.parent.mkdir(parents=True, exist_ok=True)
    with _writing_in(partial.parent):
        try:
            yield partial
            partial.replace(path)
        finally:
            _remove(partial)


@contextmanager
def kept_if_stopped(folder: Path, rejected: Path, *, summary: Callable[[], dict[str, Any]]) -> Iterator[None]:
    """Keeps what explains a Problem that is raised in the block, since the stage's outputs are removed then.

    `folder` gets a copy of the rows of `rejected`, if there are any, and summary.json; the Problem gets a line that names
    them. It is no output: git and DVC ignore reports/failed. If the block succeeds, the folder is removed.

    Args:
        folder: reports/failed/<stage>.
        rejected: The rejected rows, as JSON lines. They must be flushed when the block ends.
        summary: Makes the counts so far; nothing is kept if it returns no counts.
    """
    try:
        yield
    except Problem as problem:
        counts = summary()
        if not counts:
            raise
        with fresh_folder(folder) as kept:
            write_json(kept / "summary.json", counts)
            if rejected.exists() and rejected.stat().st_size:
                shutil.copyfile(rejected, kept / "rejected.jsonl")
            names = " and ".join(f"{folder}/{file.name}" for file in sorted(kept.iterdir()))
        raise Problem(*problem.messages, f"see {names} (removed when this stage succeeds)") from None
    _remove(folder)


def sha256_of(path: Path) -> str:
    """The sha256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def without_writers(folder: Path) -> Iterator[bool]:
    """Yields whether no process writes outputs in a folder, and lets none begin until the block ends.

    False also where this cannot be known, on a file system without locks.
    """
    number = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True
    finally:
        os.close(number)


@contextmanager
def _writing_in(folder: Path) -> Iterator[None]:
    """Holds a lock that any number of writers can share. The system releases it when the process ends, however it ends."""
    number = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(number, fcntl.LOCK_SH)
        yield
    finally:
        os.close(number)


def _partial(path: Path) -> Path:
    partial = path.with_name(path.name + ".partial")
    _remove(partial)
    return partial


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
