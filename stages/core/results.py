"""Keeps the outputs of a stage that has ended until DVC has recorded them, so that no finished work is done twice.

DVC hashes, copies and records outputs after the stage's process has ended. If DVC is killed before it has done so, the next
`dvc repro` deletes the outputs and runs the stage again. So `keep` copies them into `.checkpoints/results/<stage>-<hash>`,
where the hash is that of everything that the stage read; `take_up` gives them to the next run that reads the same; and
`remove_recorded` removes those that dvc.lock names.

Where the file system has reflinks, a copy takes neither time nor space. Elsewhere outputs of up to SMALL bytes are copied,
which are those of all stages but `merge` and `fetch`, and those of `train` at any size. Larger ones get hard links, but only
if DVC makes hard links of outputs too (cache.type) or has been killed: otherwise DVC would take an output with a second link
for one to replace, and would copy it once more.
"""

import fcntl
import os
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NamedTuple

from stages.core import integrity
from stages.core.integrity import Files, folder_md5, md5_of, scan
from stages.core.jsonl import as_json, read_json, write_json
from stages.core.output import Done, checkpoint_root, fresh_file, fresh_folder
from stages.core.problem import Problem
from stages.core.provenance import fingerprint, inputs_of
from stages.core.snapshot import Snapshot, hash_code, is_code

MARK = "result.json"
"""In the folder of a kept result: what it is, and the hashes of its files."""
SMALL = 10**9
"""Bytes up to which a result is copied where there are no reflinks, and flushed to the disk."""
FICLONE = 0x40049409
"""The request of Linux that makes a reflink: include/uapi/linux/fs.h."""


class Kept(NamedTuple):
    """The mark of a kept result."""

    stage: str
    summary: str
    """The stage's line for the terminal."""
    project: str
    """The folder in which the stage ran: the project's, or the copy of an experiment."""
    hashes: dict[str, dict[str, str]]
    """Output → (path in it, "" for a file) → md5."""
    entry: dict[str, Any] | None
    """The stage's entry in dvc.lock when the result was kept, as JSON has it. DVC has recorded the result if it is another
    one, with the hashes of these outputs."""


def result_folder(snapshot: Snapshot, read: Mapping[str, Files]) -> Path:
    """Where the result of a stage that reads what the snapshot names is kept.

    `read` has the inputs that are hashed already, as `stages.core.integrity.scan` gives them. Large weights are not: their
    folder's manifest stands for them.
    """
    known = {
        path: dvc_hash({name: file.md5 for name, file in files.items()})
        for path, files in read.items()
        if all(file.md5 for file in files.values())
    }
    others = [Path(path) for path in snapshot.data if path not in known]
    inputs = inputs_of(snapshot.stage, snapshot.params, others, snapshot.root)
    name = fingerprint(inputs | {"hashed": known, "paths": snapshot.paths})
    return results_root() / f"{snapshot.stage}-{name}"


def results_root() -> Path:
    """The folder that holds all kept results."""
    return checkpoint_root() / "results"


def keep(snapshot: Snapshot, read: Mapping[str, Files], outputs: Sequence[str], done: Done, *, dvc_lives: bool) -> bool:
    """Keeps outputs that are complete.

    Args:
        snapshot: Of the stage.
        read: As in `result_folder`.
        outputs: Files and folders.
        done: What the stage has returned.
        dvc_lives: Whether DVC waits for the stage, and will hash and copy the outputs.

    Returns whether checkpoints can be removed: false if a file could not be written, which a line says.

    Raises Problem if what the stage reads has changed since the snapshot: then nothing is kept.
    """
    folder = result_folder(snapshot, read)
    snapshot.check()  # after the inputs were hashed: the name stands for what was read
    partial = folder.with_suffix(".partial")
    try:
        remove(partial)
        copy = done.copy_large or sum(_size(Path(output)) for output in outputs) <= SMALL
        link = not copy and (not dvc_lives or _dvc_makes_hard_links())
        if not _copy_all({output: partial / output for output in outputs}, link=link, copy=copy):
            remove(partial)
            return True  # large, and not made from checkpoints
        hashes = {output: hash_files(partial / output) for output in outputs}
        entry = _find_entry(read_lock(snapshot.root), hashes)
        if entry is not None and _names(entry, hashes) and _names_inputs(entry, snapshot):
            remove(partial)
            return True  # dvc repro --force: DVC has these outputs, and nobody wants to have them taken up
        write_json(partial / MARK, Kept(snapshot.stage, done.summary, str(Path.cwd()), hashes, as_json(entry))._asdict())
        if copy:
            for file in partial.rglob("*"):
                _flush(file)
        remove(folder)
        partial.rename(folder)
        _flush(folder.parent)
    except OSError as error:
        remove(partial)
        print(
            f"{snapshot.stage}: the result is not kept outside of the outputs ({error.strerror or error}): if dvc is killed "
            "before it has recorded them, this stage runs again",
            flush=True,
        )
        return False
    return True


def take_up(snapshot: Snapshot, read: Mapping[str, Files]) -> str | None:
    """Puts the kept result of a run that has read the same in the place of the outputs, and returns the stage's summary.

    None if there is none, or if one of its files is not what was kept, which a line says; then it is removed. `read` is as
    in `result_folder`.
    """
    if not any(results_root().glob(f"{snapshot.stage}-*/{MARK}")):
        return None  # nothing is hashed
    folder = result_folder(snapshot, read)
    if not folder.is_dir():
        return None
    kept = read_kept(folder)
    try:
        damaged = [MARK] if kept is None else _damaged_files(folder, kept)
    except OSError as error:
        damaged = [str(error)]
    if kept is None or damaged:
        print(
            f"{snapshot.stage}: the result that was kept in {_shown(folder)} is damaged ({', '.join(damaged)}) and is not "
            "used: this stage runs again",
            flush=True,
        )
        remove(folder)
        return None
    with ExitStack() as stack:
        fresh = {
            output: stack.enter_context((fresh_file if "" in files else fresh_folder)(Path(output)))
            for output, files in kept.hashes.items()
        }
        large = sum(_size(folder / output) for output in fresh) > SMALL
        _copy_all({str(folder / output): place for output, place in fresh.items()}, link=large, copy=True)
    with fresh_file(folder / MARK) as file:
        write_json(file, kept._replace(project=str(Path.cwd()))._asdict())
    print(
        f"{snapshot.stage}: takes up the result of an earlier run, which had read the same and which dvc has not recorded "
        f"({_shown(folder)}); to compute it again, delete that folder",
        flush=True,
    )
    return kept.summary


def remove_recorded(root: Path) -> None:
    """Removes the results of this project folder, and of folders that no longer exist, that DVC has recorded."""
    entries = None
    for mark in sorted(results_root().glob(f"*/{MARK}")):
        entries = read_lock(root) if entries is None else entries
        kept = read_kept(mark.parent)
        if kept and is_recorded(kept, entries) and (kept.project == str(Path.cwd()) or not Path(kept.project).exists()):
            with suppress(OSError):
                remove(mark.parent)


def is_recorded(kept: Kept, entries: Mapping[str, Any]) -> bool:
    """Whether dvc.lock, as `read_lock` gives it, has got an entry with the hashes of these outputs since they were kept."""
    entry = _find_entry(entries, kept.hashes)
    return entry is not None and as_json(entry) != kept.entry and _names(entry, kept.hashes)


def read_kept(folder: Path) -> Kept | None:
    """The mark of a kept result; None if it cannot be read."""
    try:
        return Kept(**read_json(folder / MARK))
    except (OSError, ValueError, TypeError, RecursionError):
        return None


def remove(folder: Path) -> None:
    """Removes a kept result. It is renamed first: a run that is killed meanwhile leaves no half of one."""
    removed = folder.with_suffix(".removed")
    shutil.rmtree(removed, ignore_errors=True)
    with suppress(FileNotFoundError):
        folder.rename(removed)
    shutil.rmtree(removed, ignore_errors=True)


def hash_files(path: Path) -> dict[str, str]:
    """Path below `path` → md5, of each file; "" for `path` itself if it is a file."""
    return {name: file.md5 for name, file in scan(path, large=sys.maxsize).items()}


def dvc_hash(files: Mapping[str, str]) -> str:
    """The "md5" in dvc.lock of a file or folder with these hashes."""
    return files[""] if "" in files else folder_md5(files)


def _damaged_files(folder: Path, kept: Kept) -> list[str]:
    return [
        f"{output}/{name}".rstrip("/")
        for output, files in kept.hashes.items()
        for found in [hash_files(folder / output)]
        for name in {**files, **found}
        if found.get(name) != files.get(name)
    ]


def _copy_all(places: Mapping[str, Path], *, link: bool, copy: bool) -> bool:
    """Makes reflinks of files and folders; where that fails hard links, if `link`; where that fails copies, if `copy`.

    Returns false if there are no reflinks, and neither links nor copies are wanted. Raises OSError if links alone are
    wanted, and cannot be made.
    """
    for source, target in places.items():
        for file in _files_of(Path(source)):
            place = target / file.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            if _reflink(file, place):
                continue
            if link and _hard_link(file, place, may_fail=copy):
                continue
            if not copy:
                return False
            shutil.copyfile(file, place)
    return True


def _hard_link(source: Path, target: Path, *, may_fail: bool) -> bool:
    target.unlink()
    try:
        target.hardlink_to(source)
    except OSError:  # as between file systems
        if not may_fail:
            raise
        return False
    return True


def _reflink(source: Path, target: Path) -> bool:
    """Makes a file that shares its blocks with `source`. Returns false, with an empty file, if the file system cannot."""
    with source.open("rb") as read, target.open("wb") as written:
        try:
            fcntl.ioctl(written, FICLONE, read.fileno())
        except OSError:
            return False
    return True


def _files_of(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in _files_of(path))


def _dvc_makes_hard_links() -> bool:
    """Whether DVC's cache gets hard links to outputs, by its setting cache.type."""
    try:
        from dvc.config import Config  # takes a while, and only a large result asks
    except ImportError:  # DVC is installed elsewhere
        return False
    kinds: list[str] = Config(".dvc")["cache"].get("type") or [""]
    return kinds[0] == "hardlink"


def _flush(path: Path) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


# dvc.lock


def read_lock(root: Path) -> dict[str, Any]:
    """The entries of dvc.lock by stage; none if it is missing, or damaged: DVC may be writing it."""
    try:
        return integrity.read_lock(root)
    except (OSError, Problem):
        return {}


def _find_entry(entries: Mapping[str, Any], outputs: Iterable[str]) -> dict[str, Any] | None:
    """The entry of the stage that has these outputs."""
    wanted = set(outputs)
    found: Iterable[dict[str, Any]] = (entry for entry in entries.values() if isinstance(entry, dict))
    return next((entry for entry in found if wanted <= _hashes(entry, "outs").keys()), None)


def _hashes(entry: Mapping[str, Any], kind: str) -> dict[str, str]:
    listed = entry.get(kind) or []
    return {str(each.get("path")): str(each.get("md5")) for each in listed if isinstance(each, dict)}


def _names(entry: Mapping[str, Any], hashes: Mapping[str, Mapping[str, str]]) -> bool:
    recorded = _hashes(entry, "outs")
    return all(recorded.get(output) == dvc_hash(files) for output, files in hashes.items())


def _names_inputs(entry: Mapping[str, Any], snapshot: Snapshot) -> bool:
    """Whether an entry of dvc.lock has the parameters, code and data of now: then DVC can restore the outputs itself.

    Data is hashed only if all else is the same.
    """
    params = (entry.get("params") or {}).get("params.yaml") or {}
    if params.get(snapshot.stage) != snapshot.params:
        return False
    deps = _hashes(entry, "deps")
    paths = sorted(deps, key=lambda dep: not is_code(dep))
    return {*snapshot.data} <= deps.keys() and all(deps[dep] == dvc_hash(hash_dep(dep, snapshot.root)) for dep in paths)


def hash_dep(dep: str, root: Path) -> dict[str, str]:
    """As `hash_files`, for a dependency, of which DVC sees only the code if it is a folder of code."""
    path = root / dep
    if is_code(dep) and path.is_dir():
        return {Path(name).name: md5_of(root / name) for name in hash_code("", [dep], root)}
    return hash_files(path) if path.exists() else {}


def _shown(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
