"""Keeps the outputs of a stage that has ended until DVC has recorded them, so that no finished work is done twice.

DVC hashes, copies and records outputs after the stage's process has ended, which takes minutes for a large model. If DVC
is killed before it has done so, the next `dvc repro` deletes the outputs and runs the stage again. So `keep` puts hard links
to them into `.checkpoints/results/<stage>-<fingerprint>`, where the fingerprint names everything that the stage read;
`take_up` gives them to the next run that reads the same; and `remove_recorded` removes those that dvc.lock names. A link
takes no space while the output or DVC's cache has the same file.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from stages.core.jsonl import read_json, write_json
from stages.core.output import checkpoint_root, fresh_file, fresh_folder
from stages.core.params import read_yaml
from stages.core.problem import Problem
from stages.core.provenance import HASHING_THREADS, fingerprint, inputs_of
from stages.core.snapshot import Snapshot, hash_code, is_code

MARK = "result.json"
"""In the folder of a kept result: what it is, and the hashes of its files."""
SMALL = 10**9
"""Bytes up to which a result is copied where it cannot be linked, and flushed to the disk. A larger one is hashed again
when it is taken up, like any other, and a stage that makes one has no checkpoints that could be removed too early."""


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
    """The stage's entry in dvc.lock when the result was kept. DVC has recorded the result if it is another one, with the
    hashes of these outputs."""


def result_folder(snapshot: Snapshot) -> Path:
    """Where the result of a stage that reads what the snapshot names is kept."""
    inputs = inputs_of(snapshot.stage, snapshot.params, map(Path, snapshot.data), snapshot.root)
    name = fingerprint(inputs | {"paths": snapshot.paths})
    return results_root() / f"{snapshot.stage}-{name}"


def results_root() -> Path:
    """The folder that holds all kept results."""
    return checkpoint_root() / "results"


def keep(snapshot: Snapshot, outputs: Iterable[str], summary: str) -> bool:
    """Keeps outputs that are complete.

    Returns whether they are safe: kept, or recorded already, which is so after `dvc repro --force`. If not, a line says why.
    Raises Problem if what the stage reads has changed since the snapshot: then nothing is kept.
    """
    folder = result_folder(snapshot)
    snapshot.check()  # after the inputs were hashed: the name stands for what was read
    hashes = {output: hash_files(Path(output)) for output in outputs}
    entry = _find_entry(read_lock(snapshot.root), hashes)
    if entry is not None and _names(entry, hashes) and _names_inputs(entry, snapshot):
        return True
    try:
        partial = folder.with_suffix(".partial")
        remove(folder)
        remove(partial)
        size = 0
        for output, files in hashes.items():
            for name in files:
                place = partial / output / name
                place.parent.mkdir(parents=True, exist_ok=True)
                _link(Path(output) / name, place)
                size += place.stat().st_size
        kept = Kept(snapshot.stage, summary, str(Path.cwd()), hashes, entry)
        write_json(partial / MARK, kept._asdict())
        for file in [*partial.rglob("*")] if size <= SMALL else [partial / MARK]:
            _flush(file)
        partial.rename(folder)
        _flush(folder.parent)
    except OSError as error:
        print(
            f"{snapshot.stage}: the result is not kept outside of the outputs ({error.strerror or error}): if dvc is killed "
            "before it has recorded them, this stage runs again",
            flush=True,
        )
        return False
    return True


def take_up(snapshot: Snapshot) -> str | None:
    """Puts the kept result of a run that has read the same in the place of the outputs, and returns the stage's summary.

    None if there is none, or if one of its files is not what was kept, which a line says; then it is removed.
    """
    if not any(results_root().glob(f"{snapshot.stage}-*/{MARK}")):
        return None  # nothing is hashed
    folder = result_folder(snapshot)
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
    for output, files in kept.hashes.items():
        if "" in files:
            with fresh_file(Path(output)) as file:
                _link(folder / output, file)
            continue
        with fresh_folder(Path(output)) as made:
            for name in files:
                (made / name).parent.mkdir(parents=True, exist_ok=True)
                _link(folder / output / name, made / name)
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
    return entry is not None and entry != kept.entry and _names(entry, kept.hashes)


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
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        digests = list(pool.map(_md5_of, files))
    return {
        "" if file == path else file.relative_to(path).as_posix(): each for file, each in zip(files, digests, strict=True)
    }


def dvc_hash(files: Mapping[str, str]) -> str:
    """The "md5" in dvc.lock of a file or folder with these hashes; of a folder, that of the list which dvc-data writes."""
    if "" in files:
        return files[""]
    listed = [{"md5": digest, "relpath": name} for name, digest in sorted(files.items())]
    return hashlib.md5(json.dumps(listed, sort_keys=True).encode(), usedforsecurity=False).hexdigest() + ".dir"


def _md5_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _damaged_files(folder: Path, kept: Kept) -> list[str]:
    return [
        f"{output}/{name}".rstrip("/")
        for output, files in kept.hashes.items()
        for found in [hash_files(folder / output)]
        for name in {**files, **found}
        if found.get(name) != files.get(name)
    ]


def _link(source: Path, target: Path) -> None:
    """A hard link, or a copy of a small file. Raises OSError if neither is possible."""
    try:
        target.hardlink_to(source)
    except OSError:
        if source.stat().st_size > SMALL:
            raise
        shutil.copyfile(source, target)


def _flush(path: Path) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


# dvc.lock


def read_lock(root: Path) -> dict[str, Any]:
    """The entries of dvc.lock by stage; none if it is missing or damaged."""
    try:
        return dict(read_yaml(root / "dvc.lock")["stages"])
    except (OSError, Problem, LookupError, TypeError, ValueError):
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
    return {*snapshot.data} <= deps.keys() and all(deps[dep] == dvc_hash(_hash_dep(dep, snapshot.root)) for dep in paths)


def _hash_dep(dep: str, root: Path) -> dict[str, str]:
    path = root / dep
    if is_code(dep) and path.is_dir():  # DVC sees only its code
        return {Path(name).name: _md5_of(root / name) for name in hash_code("", [dep], root)}
    return hash_files(path) if path.exists() else {}


def _shown(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
