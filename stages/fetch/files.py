"""A model's files on their way to the output: the download folder, the free space, hard links, copies, dequantization."""

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from stages.core.disk import Write, size_text, space_problems
from stages.core.jsonl import write_json
from stages.core.problem import Problem
from stages.core.progress import progress
from stages.fetch.checks import is_weights, is_weights_index
from stages.fetch.quantized_tensors import Plan


class ModelFiles(NamedTuple):
    """A model that passed every check, ready to be put into the output."""

    folder: Path
    names: Sequence[str]
    """The files of `folder` that belong to the model."""
    download: Path | None
    """The download folder that holds `folder`; None if `folder` belongs to the user."""
    changed: Mapping[str, Any] = {}
    """JSON files that are written anew, with these values."""
    plan: Plan | None = None
    """What is to be dequantized."""
    notes: Sequence[str] = ()
    """What the user should know, a line each."""

    def put_into(self, target: Path) -> None:
        """Links or copies the files into `target`. Nothing is moved: the source stays complete if the process is killed.

        Quantized weights are dequantized on the way.
        """
        for note in self.notes:
            print(f"fetch: {note}", flush=True)
        weights = {name for name in self.names if is_weights(name) or is_weights_index(name)} if self.plan else set()
        names = [name for name in self.names if name not in self.changed and name not in weights]
        if self.download is None:
            _copy_files(self.folder, target, names=names)
        else:
            _link_files(self.folder, target, names=names)
        for name, value in self.changed.items():
            write_json(target / name, value)
        if self.plan:
            _dequantize(self.plan, self.folder, target)

    @property
    def output_size(self) -> int:
        """Bytes of the output, about: without what JSON files gain or lose."""
        return total_size(self.folder, self.names) + (self.plan.size - self.plan.stored_size if self.plan else 0)

    def clean_up(self) -> None:
        """Removes the download folder, which is kept only so that an interrupted run can resume."""
        if self.download is not None:
            _remove_download(self.download)


@contextmanager
def open_download(folder: Path) -> Iterator[Path]:
    """Locks `folder`, creates it if it is missing, and yields it. An interrupted run finds there what it downloaded before.

    Raises Problem if another process holds the lock.
    """
    lock = _lock(folder)
    try:
        lock.acquire()
    except Timeout:
        raise Problem(f"{folder}: another fetch is using this download folder; wait until it ends, or stop it") from None
    try:
        folder.mkdir(exist_ok=True)
        yield folder
    finally:
        if not any(folder.iterdir()):
            folder.rmdir()
            Path(lock.lock_file).unlink()
        lock.release()


def total_size(folder: Path, names: Sequence[str]) -> int:
    """Bytes of these files of `folder`."""
    return sum((folder / name).stat().st_size for name in names)


def _copy_files(source: Path, target: Path, *, names: Sequence[str]) -> None:
    """Copies the files into `target`. Raises Problem if the disk has too little space."""
    size = total_size(source, names)
    problems = space_problems(f"copying {source}", Write(target.parent, size, cached=size))
    if problems:
        raise Problem(*problems)
    for name in progress(names, "copy", total=len(names), unit="files"):
        shutil.copyfile(source / name, target / name)


def _link_files(source: Path, target: Path, *, names: Sequence[str]) -> None:
    """Gives each file a second name in `target`, which takes no disk space. Copies where the file system cannot link."""
    for name in names:
        try:
            os.link(source / name, target / name)
        except OSError as error:
            rest = [each for each in names if not (target / each).exists()]
            print(f"fetch: {target.parent} allows no hard links ({error.strerror}); copying {len(rest)} files", flush=True)
            _copy_files(source, target, names=rest)
            return


def _dequantize(plan: Plan, source: Path, target: Path) -> None:
    """Writes the weights in bfloat16, and says so. Raises Problem if the disk has too little space."""
    problems = space_problems(f"dequantizing {source}", Write(target.parent, plan.size, cached=plan.size))
    if problems:
        raise Problem(*problems)
    # Imported here: other models need neither torch nor the seconds that it takes to load.
    from stages.fetch.dequantize import write_dequantized

    size = write_dequantized(plan, source, target)
    total = sum(map(len, plan.headers.values())) - len(plan.dropped)
    print(
        f"fetch: dequantized {len(plan.weights)} of {total} tensors from {plan.quantization.method} to bfloat16: "
        f"{size_text(plan.stored_size)} to {size_text(size)}",
        flush=True,
    )


def _remove_download(folder: Path) -> None:
    lock = _lock(folder)
    try:
        with lock:
            if folder.exists():
                shutil.rmtree(folder)
            Path(lock.lock_file).unlink()
    except Timeout:
        return  # another fetch has started to use it, and removes it when it ends


def _lock(folder: Path) -> FileLock:
    return FileLock(folder.with_name(folder.name + ".lock"), timeout=0)
