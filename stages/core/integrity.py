"""Finds damaged inputs: what a stage is about to read is compared with what the stage before it wrote.

DVC compares before it starts a stage, but not for `dvc repro -s`, and not where a stage is started by hand or by torchrun.
So each stage hashes its inputs at its start, and an input must be what dvc.lock records of the stage that made it, or what
that stage wrote when it ran last. dvc.lock has md5 sums, hence md5. Nothing is added to an output, so that equal content
stays equal bytes.

At its end a stage leaves `reports/machine/files/<stage>.json`, which is no output: what it has read and written. `python -m
stages check` compares it with dvc.lock, which DVC writes afterwards (stages/commands/check.py).
"""

import configparser
import hashlib
import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from stages.core.jsonl import read_json, write_json
from stages.core.output import fresh_file
from stages.core.params import read_yaml
from stages.core.problem import Problem

LOCK = "dvc.lock"
RECORDS = Path("reports/machine/files")
LARGE = 2 * 10**9
"""Bytes of the weights of a folder from which they are compared by their size alone: hashing fewer takes seconds. The header
of a safetensors file is checked when it is opened, and `python -m stages verify` hashes all."""
WEIGHTS = ".safetensors"
HASHING_THREADS = 4
IGNORED = ("*.partial", "*.py[cod]", "__pycache__", ".*_cache", ".fetch-*", ".venv", ".checkpoints", ".git", ".hg", ".dvc")
"""Names that DVC does not see in an output: those of .dvcignore, and its own."""


class File(NamedTuple):
    """Size in bytes and md5 of a file; no md5 ("") if it is too large to be hashed."""

    size: int
    md5: str


Files = Mapping[str, File]
"""The files of a folder by their path in it; those of a path that is a file itself as {"": File}."""


class Output(NamedTuple):
    """What dvc.lock records of an output."""

    stage: str
    path: str
    md5: str
    """Of a file; with the suffix .dir, of DVC's list of a folder's files."""
    size: int


def scan(path: Path, *, large: int = LARGE) -> dict[str, File]:
    """Sizes and hashes of a file, or of all files of a folder that DVC sees there.

    The weights of a folder with `large` bytes of them or more have no md5.
    """
    if not path.is_dir():
        return {"": File(path.stat().st_size, md5_of(path))}
    files = {}
    for file in sorted(path.rglob("*")):
        relative = file.relative_to(path)
        if file.is_file() and not any(fnmatchcase(part, name) for part in relative.parts for name in IGNORED):
            files[relative.as_posix()] = file
    sizes = {name: file.stat().st_size for name, file in files.items()}
    weights = {name for name in files if name.endswith(WEIGHTS)}
    unhashed = weights if sum(sizes[name] for name in weights) >= large else set()
    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        hashed = [name for name in files if name not in unhashed]
        md5s = dict(zip(hashed, pool.map(md5_of, (files[name] for name in hashed)), strict=True))
    return {name: File(sizes[name], md5s.get(name, "")) for name in files}


def md5_of(path: Path) -> str:
    """The md5 of a file's bytes, in hex, as DVC computes it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def folder_md5(md5s: Mapping[str, str]) -> str:
    """DVC's md5 of a folder: that of a JSON list with the md5 and path of each file (`Tree.as_bytes` in dvc_data)."""
    listed = json.dumps([{"md5": md5s[name], "relpath": name} for name in sorted(md5s)], sort_keys=True)
    return hashlib.md5(listed.encode(), usedforsecurity=False).hexdigest() + ".dir"


def read_lock(root: Path) -> dict[str, dict[str, Any]]:
    """The entries of dvc.lock by the name of their stage, for example generate@base; none without the file.

    Raises Problem if it cannot be read.
    """
    path = root / LOCK
    if not path.exists():
        return {}
    return _parse_lock(path, path.stat().st_mtime_ns, path.stat().st_size)


@lru_cache(maxsize=4)
def _parse_lock(path: Path, _time: int, _size: int) -> dict[str, dict[str, Any]]:
    remedy = f"it is cut off or damaged; get it back with: git checkout {LOCK}, then run dvc repro"
    try:
        stages = read_yaml(path)["stages"]
        for entry in stages.values():  # what is read below is there
            for each in [*entry.get("deps", ()), *entry.get("outs", ())]:
                str(each["path"]), str(each["md5"]), int(each["size"])
    except Problem as problem:
        raise Problem(f"{problem}; {remedy}") from None
    except (AttributeError, LookupError, TypeError, ValueError):
        raise Problem(f"{path}: not as DVC writes it; {remedy}") from None
    return dict(stages)


def outputs_in(lock: Mapping[str, Mapping[str, Any]]) -> list[Output]:
    """All outputs that dvc.lock records."""
    return [
        Output(stage, out["path"], out["md5"], int(out["size"]))
        for stage, entry in lock.items()
        for out in entry.get("outs", ())
    ]


def check_inputs(paths: Iterable[str], root: Path, *, large: int = LARGE) -> dict[str, dict[str, File]]:
    """Hashes what a stage is about to read: path → its files. Raises Problem with every input that is damaged.

    An input without any record, as data/raw, is taken as it is; a model's folder is compared with its own manifest.
    """
    found = {path: scan(root / path, large=large) for path in paths if (root / path).exists()}
    outputs, records = outputs_in(read_lock(root)), _read_records(root)
    problems = [problem for path, files in found.items() for problem in _find_damage(path, files, outputs, records, root)]
    if problems:
        raise Problem(*problems)
    return found


def _find_damage(
    path: str, files: Files, outputs: Iterable[Output], records: Mapping[str, Mapping[str, Files]], root: Path
) -> list[str]:
    """One message if `files`, found at `path`, are not what was written there."""
    made = [output for output in outputs if _holds(output.path, path)]
    if any(not _differences_from_lock(path, files, output, root) for output in made):
        return []
    written = [
        (stage, place, their) for stage, wrote in records.items() for place, their in wrote.items() if _holds(place, path)
    ]
    if any(not _differences(files, _below(place, path, their)) for _, place, their in written):
        return []
    if made:
        stage, whole, by = made[0].stage, made[0].path, f"{LOCK} records of"
        names = _differences_from_lock(path, files, made[0], root)
    elif written:
        stage, whole, their = written[0]
        names, by = _differences(files, _below(whole, path, their)), "was written by"
    else:
        return _manifest_differences(root / path, path, files)
    what = "; ".join(name for name in names[:3] if name)
    return [
        f"{path}: is not what {by} {stage}{f': {what} differs' if what else ''}. It is damaged, or was edited or made "
        f"without DVC. rm -r {whole} && dvc checkout {whole} puts back what {LOCK} records; dvc repro -f -s {stage} makes "
        f"it again; dvc commit {stage} keeps it as it is"
    ]


def _differences_from_lock(path: str, files: Files, output: Output, root: Path) -> list[str]:
    """The files at `path` that are not those of the output, which is `path` or a folder above it."""
    if not output.md5.endswith(".dir"):
        return [] if files.get("", File(0, "")).md5 == output.md5 else [""]
    listed = _listed_files(output.md5, root)
    if listed is not None:
        wanted = {name: File(-1, md5) for name, md5 in listed.items()}
        names = _differences(files, _below(output.path, path, wanted))
        if not names and path == output.path and sum(file.size for file in files.values()) != output.size:
            names = [name for name, file in files.items() if not file.md5]
        return names
    # Without DVC's list, in its cache, only the folder as a whole can be compared.
    whole = files if path == output.path else scan(root / output.path)
    if all(file.md5 for file in whole.values()):
        return [] if folder_md5({name: file.md5 for name, file in whole.items()}) == output.md5 else [""]
    if sum(file.size for file in whole.values()) != output.size:
        return [""]
    return [""] if _manifest_differences(root / path, path, files) else []


def _differences(files: Files, wanted: Files) -> list[str]:
    """The names of the files that are missing, too many, or others. What is not known of both is not compared."""
    return sorted(
        name
        for name in {*files, *wanted}
        if name not in files
        or name not in wanted
        or (files[name].md5 and wanted[name].md5 and files[name].md5 != wanted[name].md5)
        or (-1 not in (files[name].size, wanted[name].size) and files[name].size != wanted[name].size)
    )


def _manifest_differences(folder: Path, path: str, files: Files) -> list[str]:
    """One message if a model's folder lacks a file of its manifest, or holds another one; weights must be hashed too."""
    if "manifest.json" not in files:
        return []
    try:
        recorded = dict(read_json(folder / "manifest.json")["files"])
    except (ValueError, LookupError, TypeError):
        return [f"{path}/manifest.json: is damaged; get the model again"]
    wrong = [name for name in recorded if name not in files]
    for name, file in files.items():
        if file.md5 and name in recorded:
            with (folder / name).open("rb") as opened:
                wrong += [name] if hashlib.file_digest(opened, "sha256").hexdigest() != recorded[name] else []
    return [f"{path}/{name}: is not the file that manifest.json names; get the model again" for name in wrong]


def _holds(folder: str, path: str) -> bool:
    return path == folder or path.startswith(f"{folder}/")


def _below(folder: str, path: str, files: Files) -> Files:
    """Of the files of `folder` those at `path`, which is the folder, or a file or folder in it."""
    if path == folder:
        return files
    name = path[len(folder) + 1 :]
    if name in files:
        return {"": files[name]}
    return {each[len(name) + 1 :]: file for each, file in files.items() if each.startswith(f"{name}/")}


def _listed_files(md5: str, root: Path) -> dict[str, str] | None:
    """Path → md5 of the files of a folder, from DVC's cache; None if they are not there, or the list is damaged."""
    for cache in _cache_folders(root):
        path = cache / "files" / "md5" / md5[:2] / md5[2:]
        try:
            if path.is_file() and md5_of(path) == md5.removesuffix(".dir"):
                return {each["relpath"]: each["md5"] for each in read_json(path)}
        except (OSError, ValueError, LookupError, TypeError):
            continue
    return None


def _cache_folders(root: Path) -> list[Path]:
    """DVC's cache as the project's configuration has it: read here, since importing dvc takes longer than a small stage."""
    folders = [root / ".dvc" / "cache"]
    for name in ("config", "config.local"):
        settings = configparser.ConfigParser(interpolation=None)
        try:
            settings.read(root / ".dvc" / name, encoding="utf-8")
            folders.append(root / ".dvc" / settings["cache"]["dir"].strip("'\""))
        except (configparser.Error, KeyError, ValueError):
            continue
    return folders


# What a stage leaves at its end


class Record(NamedTuple):
    """What a run of a stage has read and written."""

    stage: str
    """As in dvc.lock: generate@base."""
    read: dict[str, dict[str, File]]
    """Inputs and code, by path as dvc.yaml declares it."""
    params: Any
    """Its section of params.yaml, as JSON has it."""
    wrote: dict[str, dict[str, File]]
    entry: Any = None
    """The stage's entry in dvc.lock at the end of the run, as JSON has it. DVC has not recorded it while it is the same."""
    recorded: bool = False
    """Whether dvc.lock was found to have the same."""


def write_record(record: Record, root: Path) -> None:
    """Keeps a record as the last one of its stage."""
    with fresh_file(root / RECORDS / f"{record.stage}.json") as file:
        write_json(file, record._asdict())


def read_records(root: Path) -> list[Record]:
    """The last record of each stage. One that is damaged says nothing."""
    found = []
    for path in sorted((root / RECORDS).glob("*.json")):
        try:
            values = read_json(path)
            paths = {
                key: {
                    place: {name: File(int(size), str(md5)) for name, (size, md5) in files.items()}
                    for place, files in values[key].items()
                }
                for key in ("read", "wrote")
            }
            found.append(Record(**values | paths))
        except (OSError, AttributeError, LookupError, TypeError, ValueError):
            continue
    return found


def _read_records(root: Path) -> dict[str, dict[str, dict[str, File]]]:
    """Stage → what it wrote when it ran last."""
    return {record.stage: record.wrote for record in read_records(root)}
