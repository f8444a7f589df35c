"""python -m stages disk: what the project takes on the disk, and what runs that no longer exist have left there.

    python -m stages disk             lists it
    python -m stages disk --remove    deletes what killed runs have left and no run is expected to use, and results that
                                      were kept until DVC had recorded them

Nothing is deleted that a live process uses, that the next run would resume from, or that is outside the project.
Checkpoints of other data, code or parameters stay for KEPT_DAYS, since an experiment (`dvc exp run --temp -S ...`) that
was killed resumes from them. Other processes may write and remove files meanwhile: what has vanished is skipped. No stage
imports this file: an edit of it reruns nothing.
"""

import importlib
import json
import os
import re
import shutil
import sqlite3
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import cache, partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from stages.core.disk import LINK_TYPES, cache_folder, copying_cache, free_space, size_text
from stages.core.integrity import scan
from stages.core.output import checkpoint_root, without_writers
from stages.core.params import parse_section, read_section, read_stages, read_yaml
from stages.core.problem import Problem
from stages.core.provenance import fingerprint, inputs_of
from stages.core.results import is_recorded, read_kept, read_lock, result_folder, results_root
from stages.core.snapshot import Snapshot, is_code
from stages.model.checkpoints import owner_of

ROOT = Path()
NOT_WRITABLE = "kept: you may not write there"
LISTED_FROM = 10**6
"""Bytes from which an output is listed; leftovers are listed at any size."""
KEPT_DAYS = 7
"""Days without a change after which checkpoints and results that the next `dvc repro` does not use are deleted."""
OTHER_INPUTS = "made from other data, code or parameters: only a run with those again"
TEMPORARY = Path(".dvc/tmp/exps")
"""Where DVC puts the copies of the project for `dvc exp run --temp`."""


class Item(NamedTuple):
    """A file or folder that takes space."""

    path: Path
    size: int
    note: str = ""
    lock: Callable[[], AbstractContextManager[bool]] | None = None
    """For what can be deleted: holds a lock meanwhile, and yields whether no process uses it. None: it must stay."""


def disk(*, remove: bool) -> None:
    """Lists what the project takes on the disk; with `remove`, deletes the leftovers that no run is expected to use."""
    leftovers = [*_checkpoints(), *_results(), *_downloads(), *_partial_outputs()]
    if remove:
        _remove(item for item in leftovers if item.lock)
        return
    items = [*_outputs(), *_dvc_cache(), *_temporary_copies(), *leftovers]
    widest = max((len(str(item.path)) for item in items), default=0)
    for item in items:
        print(f"{item.path!s:{widest}} {size_text(item.size):>10}  {item.note}".rstrip())
    unused = [item.size for item in leftovers if item.lock]
    if unused:
        print(f"disk: {size_text(sum(unused))} can be deleted with: python -m stages disk --remove")
    for place in _file_systems([ROOT, checkpoint_root(), cache_folder()[0]]):
        print(f"disk: {size_text(free_space(place))} are free for {place}")


def _remove(items: Iterable[Item]) -> None:
    removed = 0
    for item in items:
        assert item.lock is not None
        try:
            with item.lock() as unused:
                if not unused:
                    print(f"disk: {item.path}: a process uses it now; kept")
                    continue
                if item.path.is_dir():
                    shutil.rmtree(item.path)
                else:
                    item.path.unlink(missing_ok=True)
        except FileNotFoundError:
            continue
        except OSError as error:
            print(f"disk: {item.path}: cannot be deleted: {error.strerror}; delete it yourself")
            continue
        removed += item.size
        print(f"disk: removed {item.path}, {size_text(item.size)}")
    print(f"disk: {size_text(removed)} removed; {size_text(free_space(ROOT))} are free")


# What the pipeline and DVC keep


def _outputs() -> Iterator[Item]:
    for path in sorted({path for name in _stages() for path in _paths_of(name) if not _is_input(name, path)}):
        size = _size(ROOT / path)
        if size >= LISTED_FROM:
            yield Item(Path(path), size)


def _dvc_cache() -> Iterator[Item]:
    """DVC's cache, and how much of it `dvc gc -w` would delete. Nothing before DVC has made it."""
    folder, _ = cache_folder()
    folder = _shown(folder)
    if not folder.is_dir():
        return
    sizes = {file: status.st_size for file, status in _walk(folder / "files") if stat.S_ISREG(status.st_mode)}
    used = _used_objects(folder / "files" / "md5")
    unused = sum(size for file, size in sizes.items() if file not in used)
    notes = []
    with suppress(OSError):  # it makes a small file, for which a full disk has no space
        copies = f"copies of the outputs; dvc config cache.type {LINK_TYPES} saves them"
        notes.append(copies if copying_cache(ROOT / "dvc.yaml") else "shares its blocks with the outputs")
    if unused >= LISTED_FROM:
        notes.append(
            f"{size_text(unused)} belong to nothing in dvc.lock and *.dvc files: dvc gc -w deletes them, and with them the "
            "results of other commits and experiments"
        )
    yield Item(folder, sum(sizes.values()), "; ".join(notes))


def _used_objects(objects: Path) -> set[Path]:
    """The files of the cache that the outputs of the workspace consist of."""
    used = set()
    for md5 in (str(out.get("md5") or "") for out in _tracked()):
        used.add(objects / md5[:2] / md5[2:])
        if md5.endswith(".dir"):  # a list of the files of a folder
            with suppress(OSError, ValueError):
                listed = json.loads((objects / md5[:2] / md5[2:]).read_bytes())
                used |= {objects / file["md5"][:2] / file["md5"][2:] for file in listed}
    return used


def _tracked() -> Iterator[dict[str, Any]]:
    """The outputs in dvc.lock, and the data that `dvc add` and `dvc import` track with a file of their own."""
    for folder, folders, names in os.walk(ROOT):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if name == "dvc.lock" or name.endswith(".dvc"):
                with suppress(Problem, OSError):  # DVC is writing it
                    yield from _outs_of(read_yaml(Path(folder, name)))


def _outs_of(document: Any) -> Iterator[dict[str, Any]]:
    match document:
        case {"stages": dict(stages)}:
            for entry in stages.values():
                yield from _outs_of(entry)
        case {"outs": list(outs)}:
            yield from (out for out in outs if isinstance(out, dict))


def _temporary_copies() -> Iterator[Item]:
    """Copies of the project. DVC removes them when an experiment ends, but not when it is killed."""
    for file in [*_found(ROOT / TEMPORARY, "*/dvc.yaml"), *_found(ROOT / TEMPORARY, "*/*/dvc.yaml")]:
        if not file.exists():
            continue
        note = f"a copy of the project for dvc exp run; if no experiment is running: rm -r {file.parent}"
        yield Item(file.parent, _size(file.parent), note)


# Leftovers


def _checkpoints() -> Iterator[Item]:
    yield from _each(_found(checkpoint_root(), "*-*"), _checkpoint)


def _checkpoint(folder: Path) -> Iterator[Item]:
    if not folder.is_dir():
        return
    shown, size, hours = _shown(folder), _size(folder), _hours(folder)
    age = _age(hours)
    stage = folder.name.partition("-")[0]
    lock = partial(_unlocked, folder.with_suffix(".lock"))
    with lock() as unused:
        if not unused:
            writable = _writable(folder.parent, folder.with_suffix(".lock"))
            yield Item(shown, size, f"{owner_of(folder)} uses it" if writable else f"{age}; {NOT_WRITABLE}")
        elif folder.suffix == ".removed":
            yield _leftover(shown, size, f"{age}; half removed by a run that was killed", lock)
        elif (current := _current_checkpoints(stage)) is None:
            unknown = "so it is not known whether the next run resumes from it"
            yield Item(shown, size, f"{age}; kept: stages before {stage} are out of date or running, {unknown}")
        elif folder.name not in current:
            note = f"{OTHER_INPUTS} resumes from it"
            yield _not_needed(shown, size, hours, lock, note)
        elif folder.name.rpartition("-")[0].replace("-", "@", 1) in (_stale_stages() or ()):
            yield Item(shown, size, f"{age}; the next run of {stage} resumes from it")
        else:
            note = f"the next run of {stage} resumes from it, but dvc has recorded a result, and will not run it"
            yield _not_needed(shown, size, hours, lock, note)


def _not_needed(shown: Path, size: int, hours: float, lock: Callable[[], AbstractContextManager[bool]], reason: str) -> Item:
    """A checkpoint or result that the next `dvc repro` does not use."""
    note = f"{_age(hours)}; {reason}"
    if hours < 24 * KEPT_DAYS:
        return Item(shown, size, f"{note}; kept until it is {KEPT_DAYS} days old; to delete it now: rm -r {shown}")
    return _leftover(shown, size, note, lock)


def _results() -> Iterator[Item]:
    """Results that are kept until DVC has recorded them (`stages.core.results`)."""
    yield from _each(_found(results_root(), "*-*"), _result)


def _result(folder: Path) -> Iterator[Item]:
    if not folder.is_dir():
        return
    shown, hours = _shown(folder), _hours(folder)
    # What DVC's cache or the output has too takes no space.
    size = sum(status.st_size for _, status in _walk(folder) if stat.S_ISREG(status.st_mode) and status.st_nlink == 1)
    age, stage = _age(hours), folder.name.partition("-")[0]
    lock = _free
    kept = read_kept(folder)
    if folder.suffix == ".partial" and hours < 1:
        yield Item(shown, size, f"{age}; a process may be writing it")
    elif folder.suffix:
        yield _leftover(shown, size, f"{age}; left by a run that was killed", lock)
    elif kept is None:
        yield _leftover(shown, size, f"{age}; damaged, so no run can use it", lock)
    elif is_recorded(kept, read_lock(ROOT)):
        yield _leftover(shown, size, f"{age}; dvc has recorded this result of {stage}", lock)
    elif (current := _current_results(stage)) is None:
        unknown = "so it is not known whether the next run takes it up"
        yield Item(shown, size, f"{age}; kept: stages before {stage} are out of date or running, {unknown}")
    elif folder.name in current:
        yield Item(shown, size, f"{age}; the next run of {stage} takes up this result, which dvc has not recorded")
    else:
        yield _not_needed(shown, size, hours, lock, f"{OTHER_INPUTS} takes up this result")


@contextmanager
def _free() -> Iterator[bool]:
    """The lock of what needs none: a result that vanishes while a run takes it up is made again."""
    yield True


@cache
def _current_results(stage: str) -> set[str] | None:
    """The names of the results that the next runs of a stage would take up; None if that cannot be known yet."""
    if _stages_before_are_stale(stage):
        return None
    try:
        names = set()
        for _, paths in _commands(stage):
            snapshot = Snapshot.take(stage, paths, ROOT)
            read = {path: scan(ROOT / path) for path in snapshot.inputs if (ROOT / path).exists()}
            names.add(result_folder(snapshot, read).name)
    except (Problem, OSError):
        return None
    return names


@cache
def _current_checkpoints(stage: str) -> set[str] | None:
    """The names of the checkpoint folders that the next runs of a stage would use; None if that cannot be known yet."""
    if _stages_before_are_stale(stage):
        return None
    try:
        module = importlib.import_module(f"stages.{stage}.{stage}")
        params = parse_section(stage, module.Params, read_section(stage, ROOT)).model_dump()
        names = set()
        for item, paths in _commands(stage):
            inputs = [Path(path) for path in paths if _is_input(stage, path)]
            names.add("-".join([stage, *item, fingerprint(inputs_of(stage, params, inputs, ROOT))]))
    except (Problem, OSError, ModuleNotFoundError):
        return None
    return names


def _stages_before_are_stale(stage: str) -> bool:
    """Whether what a stage reads is not yet what its next run will read, or is not known."""
    before = list(_stages())
    before = before[: before.index(stage)] if stage in before else []
    stale = _stale_stages()
    return stale is None or any(name.partition("@")[0] in before for name in stale)


@cache
def _stale_stages() -> list[str] | None:
    """The stages that DVC would run because something that they read has changed; None if DVC cannot say it now."""
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        return list(Repo(str(ROOT.absolute())).status())
    except (DvcException, OSError, sqlite3.Error):  # another dvc is running, or the disk is full
        return None


def _downloads() -> Iterator[Item]:
    """The download folders of fetch and fetch_data."""
    yield from _each((path for parent in _parents() for path in _found(parent, ".fetch-*")), _download)


def _download(folder: Path) -> Iterator[Item]:
    if not folder.is_dir():
        return
    wanted, size, age = _wanted_downloads(), _size(folder), _age(_hours(folder))
    lock = partial(_unused_download, folder)
    with lock() as unused:
        if not unused:
            yield Item(folder, size, "a process uses it" if _writable(*_locks_of(folder)) else f"{age}; {NOT_WRITABLE}")
        elif folder.name in wanted:
            yield Item(folder, size, f"{age}; {wanted[folder.name]}")
        else:
            yield _leftover(folder, size, f"{age}; no parameter names it any more", lock)


def _wanted_downloads() -> dict[str, str]:
    """The names of the download folders that belong to the current parameters, each with what it is for."""
    model, data = read_section("fetch", ROOT), read_section("fetch_data", ROOT)
    name = model.get("model_name_or_path") if model.get("source") == "wheel" else model.get("revision")
    wanted = {f".fetch-{name}": "the next run of fetch resumes from it"}
    datasets = data.get("datasets") or []
    for dataset in datasets:
        path, revision = str(dataset.get("path")).replace("/", "--"), dataset.get("revision")
        wanted[f".fetch-{path}-{revision}"] = "a later run of fetch_data needs no network with it; it can be deleted"
    if datasets:
        wanted[".fetch-cache"] = "the libraries' own cache of fetch_data; it can be deleted"
    return wanted


def _partial_outputs() -> Iterator[Item]:
    """What a killed stage has left of an output that it was writing. Other files of such a name are not Loratory's."""
    outputs = {ROOT / path for name in _stages() for path in _paths_of(name) if not _is_input(name, path)}
    paths = sorted(path.with_name(f"{path.name}.partial") for path in outputs)
    yield from _each((path for path in paths if os.path.lexists(path)), _partial_output)


def _partial_output(path: Path) -> Iterator[Item]:
    lock = partial(without_writers, path.parent)
    with lock() as unused:
        if unused:
            yield _leftover(path, _size(path), f"{_age(_hours(path))}; left by a run that was killed", lock)
        else:
            yield Item(path, _size(path), f"a process writes in {path.parent}")


def _each(paths: Iterable[Path], items_of: Callable[[Path], Iterator[Item]]) -> Iterator[Item]:
    """The items of each path, without what vanishes meanwhile. What may not be read is one line, and not the end."""
    for path in paths:
        try:
            yield from items_of(path)
        except FileNotFoundError:
            continue
        except PermissionError:
            _say_unreadable(path)


def _leftover(path: Path, size: int, note: str, lock: Callable[[], AbstractContextManager[bool]]) -> Item:
    """An item that can be deleted, unless it is a link or outside the project."""
    if path.is_symlink() or not path.resolve().is_relative_to(ROOT.resolve()):
        return Item(path, size, f"{note}; outside the project, so delete it yourself")
    return Item(path, size, note, lock)


@contextmanager
def _unlocked(file: Path) -> Iterator[bool]:
    """Holds the lock of a file. Yields False if another process holds it, or if this one may not.

    A file that was not there is not left behind.
    """
    lock, new = FileLock(file, timeout=0), not file.exists()
    try:
        lock.acquire()
    except (Timeout, OSError):
        yield False
        return
    try:
        yield True
    finally:
        if new:
            file.unlink(missing_ok=True)
        lock.release()


def _locks_of(download: Path) -> tuple[Path, Path]:
    return download.with_name(f"{download.name}.lock"), download / "lock"


@contextmanager
def _unused_download(folder: Path) -> Iterator[bool]:
    """As `_unlocked`, for a download folder: fetch locks it with a file beside it, fetch_data with one inside it."""
    beside, inside = _locks_of(folder)
    # The libraries' cache has no lock: it is used while data/hub is being written.
    with (
        _unlocked(beside) if beside.exists() else nullcontext(True) as first,
        _unlocked(inside) if inside.exists() else nullcontext(True) as second,
        without_writers(folder.parent) as third,
    ):
        yield first and second and third
        if not folder.exists():
            beside.unlink(missing_ok=True)


# Paths


@cache
def _stages() -> dict[str, dict[str, Any]]:
    return read_stages(ROOT)


def _commands(name: str) -> Iterator[tuple[tuple[str, ...], list[str]]]:
    """The command lines of a stage: the values of its matrix, and its paths in order."""
    words = str(_stages()[name]["cmd"]).split()[5::2]
    matrix = _stages()[name].get("matrix")
    if not matrix:
        yield (), words
        return
    ((key, values),) = matrix.items()
    for value in values:
        yield (str(value),), [word.replace(f"${{item.{key}}}", str(value)) for word in words]


def _paths_of(name: str) -> list[str]:
    return [path for _, paths in _commands(name) for path in paths]


def _is_input(name: str, path: str) -> bool:
    """Whether a path on a stage's command line is read and not written: a dependency, or the folder of one."""
    deps = [dep for dep in _stages()[name].get("deps", []) if not is_code(dep) and not dep.startswith("${")]
    patterns = (".+".join(map(re.escape, re.split(r"\$\{[^}]*\}", dep))) for dep in deps)
    return any(
        re.fullmatch(pattern, path) or dep.startswith(f"{path}/") for pattern, dep in zip(patterns, deps, strict=True)
    )


def _parents() -> list[Path]:
    """The folders that hold outputs."""
    return sorted({ROOT / Path(path).parent for name in _stages() for path in _paths_of(name)})


def _file_systems(places: Iterable[Path]) -> list[Path]:
    """One of the places for each file system."""
    by_device = {place.stat().st_dev: place for place in reversed([*places]) if place.exists()}
    return list(by_device.values())[::-1]


def _shown(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _found(folder: Path, pattern: str) -> list[Path]:
    try:
        return sorted(folder.glob(pattern))
    except FileNotFoundError:  # it vanished meanwhile
        return []


def _walk(path: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """A path and everything below it, each with its status. Links are not followed; what vanishes meanwhile is skipped."""
    folders = () if path.is_symlink() else os.walk(path, onerror=_note_unreadable)
    for each in chain([path], (Path(folder, name) for folder, *names in folders for name in chain(*names))):
        try:
            yield each, each.lstat()
        except (FileNotFoundError, NotADirectoryError):
            continue
        except PermissionError:
            _say_unreadable(each)


def _note_unreadable(error: OSError) -> None:
    if isinstance(error, PermissionError):
        _say_unreadable(Path(error.filename))


@cache
def _say_unreadable(path: Path) -> None:
    """Says once that something is left out."""
    print(f"disk: {_shown(path)}: you may not read it; left out")


def _writable(*paths: Path) -> bool:
    return all(os.access(path, os.W_OK) for path in paths if path.exists())


def _size(path: Path) -> int:
    """Bytes of a file, or of all files in a folder, without those that are symlinks."""
    return sum(status.st_size for _, status in _walk(path) if stat.S_ISREG(status.st_mode))


def _hours(path: Path) -> float:
    """Hours since something in a folder was written last."""
    newest = max((status.st_mtime for _, status in _walk(path)), default=time.time())
    return max(0.0, time.time() - newest) / 3600


def _age(hours: float) -> str:
    """How old that is, to read: "3 days old"."""
    return (
        f"{hours / 24:.0f} days old" if hours >= 48 else f"{hours:.0f} hours old" if hours >= 2 else "less than 2 hours old"
    )
