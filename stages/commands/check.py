"""python -m stages check: what a killed dvc leaves, and edits that dvc.lock records though no stage has read them.

DVC hashes the inputs of a stage when the stage has ended. What is edited between the last look of the stage, at its end
(`Snapshot.check`), and DVC's, some milliseconds later, is recorded as if it had made the result. Each stage leaves what it
has read in reports/machine/files; here it is compared with dvc.lock. No stage imports this file: an edit reruns nothing.
"""

import json
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from stages.core.integrity import LOCK, RECORDS, File, Record, folder_md5, read_lock, read_records, scan, write_record
from stages.core.jsonl import as_json
from stages.core.params import read_section
from stages.core.problem import Problem
from stages.core.results import dvc_hash, hash_dep
from stages.core.snapshot import declared_deps, is_code

RWLOCKS = (Path(".dvc/tmp/rwlock"), Path(".dvc/tmp/exps/rwlock"))
"""Where DVC notes which process reads and writes what."""
WAIT_S = 0.5
"""A live dvc writes the file above in place: what is cut off after this time stays so."""


def find_problems(root: Path) -> list[str]:
    """One message, with the remedy, for each thing that keeps dvc from working, or that it has recorded wrongly."""
    problems = [*_broken_rwlocks(root), *_detached_head(root)]
    try:
        lock = read_lock(root)
    except Problem as problem:
        return [*problems, *problem.messages]
    for record in read_records(root):
        if not record.recorded and record.stage in lock:
            problems += _compare(record, lock[record.stage], root)
    return problems


def is_recorded(name: str, root: Path) -> bool:
    """Whether dvc.lock records a run of a stage with these parameters and this code, which then need no check."""
    try:
        lock, section = read_lock(root), read_section(name, root)
        code = {dep for dep in declared_deps(name, section, root) if is_code(dep)}
        entries = [entry for stage, entry in lock.items() if stage.partition("@")[0] == name]
        return bool(entries) and all(
            entry.get("params", {}).get("params.yaml", {}).get(name) == section
            and {dep["path"]: dep["md5"] for dep in entry["deps"] if is_code(dep["path"])}
            == {dep: dvc_hash(hash_dep(dep, root)) for dep in code}
            for entry in entries
        )
    except Problem:
        return False


def _compare(record: Record, entry: Mapping[str, Any], root: Path) -> list[str]:
    """One message if dvc.lock records for a run other inputs than the run has read; if not, that is noted."""
    wrote, outs = record.wrote, {out["path"]: out for out in entry.get("outs", ())}
    if as_json(entry) == record.entry:
        return []  # of a run by hand or under a dvc that was killed, though it may have written the same
    if not outs or not all(path in wrote and _is_same(wrote[path], out) for path, out in outs.items()):
        return []  # of another run, or dvc was killed before it recorded this one
    others = [
        dep["path"]
        for dep in entry["deps"]
        if dep["path"] in record.read
        and not _is_same(record.read[dep["path"]], dep)
        # A .dvcignore of the user's may hide a file from DVC, so that the two never agree, though nothing was edited.
        and not (not is_code(dep["path"]) and _is_unchanged(root / dep["path"], record.read[dep["path"]]))
    ]
    name = record.stage.partition("@")[0]
    if as_json(entry.get("params", {}).get("params.yaml", {}).get(name)) != record.params:
        others.append(f"params.yaml ({name})")
    if others:
        return [
            f"{', '.join(others)}: edited in the moment in which {record.stage} ended. dvc.lock records the edit, but "
            f"the result is that of the state before. Run dvc repro -f -s {record.stage}, then dvc repro. If {LOCK} came "
            f"from elsewhere since, as with git pull, it is right: rm {RECORDS / record.stage}.json"
        ]
    with suppress(OSError):
        write_record(record._replace(recorded=True), root)
    return []


def _is_same(files: Mapping[str, File], entry: Mapping[str, Any]) -> bool:
    """Whether files have the md5 that an entry of dvc.lock has; of weights too large to be hashed, the size."""
    md5 = str(entry["md5"])
    if not md5.endswith(".dir"):
        return "" in files and files[""].md5 == md5
    if all(file.md5 for file in files.values()):
        return folder_md5({name: file.md5 for name, file in files.items()}) == md5
    return sum(file.size for file in files.values()) == entry.get("size")


def _is_unchanged(path: Path, files: Mapping[str, File]) -> bool:
    return path.exists() and scan(path) == files


def _broken_rwlocks(root: Path) -> Iterator[str]:
    for path in RWLOCKS:
        state = _read_rwlock(root / path)
        if state is None:
            time.sleep(WAIT_S)
            state = _read_rwlock(root / path)
        if state is None:
            yield f"{path}: is empty or cut off, since dvc was killed; no dvc command works with it: rm {path}"
            continue
        for each in state:
            command = _command_of(each.get("pid"))
            if command and "dvc" not in command:
                yield (
                    f"{path}: names process {each['pid']} as a dvc that was killed since, and another process has "
                    f"this number now ({command[:60]}); dvc commands are refused: rm {path}"
                )


def _read_rwlock(path: Path) -> list[dict[str, Any]] | None:
    """The processes that a file of DVC's locks names; None if it cannot be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        writers, readers = found.get("write", {}).values(), found.get("read", {}).values()
        return [*writers, *(each for several in readers for each in several)]
    except FileNotFoundError:
        return []
    except (ValueError, AttributeError, TypeError):
        return None


def _command_of(pid: object) -> str:
    """The command line of a process; "" if there is none, or if it cannot be known."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def _detached_head(root: Path) -> Iterator[str]:
    """`dvc exp run` works on a detached HEAD, and names its commits in refs/exps/exec until it ends."""
    if _git(root, "symbolic-ref", "--quiet", "HEAD") or not _git(root, "for-each-ref", "refs/exps/exec"):
        return
    if any("dvc" in _command_of(each.get("pid")) for path in RWLOCKS for each in _read_rwlock(root / path) or []):
        return  # it is running
    branches = _git(root, "branch", "--format=%(refname:short)", "--points-at", "HEAD").splitlines()
    branch = next((name for name in branches if not name.startswith("(")), "<your branch>")
    yield (
        "git: HEAD is detached, since dvc exp run was killed: commits would belong to no branch, and params.yaml may have "
        f"the values of the experiment. Run git checkout {branch}, look at git diff, and if edits of yours are missing, at "
        "git stash list"
    )


def _git(root: Path, *words: str) -> str:
    """What git prints; "" without git, or outside of a repository."""
    try:
        done = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
