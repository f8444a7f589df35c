"""A model's files on their way to the output: the download folder, the free disk space, hard links and copies."""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout

from stages.core.disk import Write, space_problems
from stages.core.problem import Problem
from stages.core.progress import progress


class ModelFiles(NamedTuple):
    """A model that passed every check, ready to be put into the output."""

    folder: Path
    names: Sequence[str]
    """The files of `folder` that belong to the model."""
    download: Path | None
    """The download folder that holds `folder`; None if `folder` belongs to the user."""

    def put_into(self, target: Path) -> None:
        """Links or copies the files into `target`. Nothing is moved: the source stays complete if the process is killed."""
        if self.download is None:
            _copy_files(self.folder, target, names=self.names)
        else:
            _link_files(self.folder, target, names=self.names)

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
