"""What made a folder: hashes of all that its stage read, and of what it wrote; nothing that differs between equal runs.

    python -m stages.lib.provenance verify models/adapter

says whether the folder is still what its stage wrote, and whether the stage would read the same again. The commit, the
date and the machine stand in reports/machine/, which is no output: `dvc.lock` ties the bytes to a commit.
"""

import hashlib
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from stages.lib.jsonl import read_json, write_json
from stages.lib.params import declared_stage, read_section
from stages.lib.problem import Problem

FILE = "provenance.json"
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "safetensors")
"""Those whose code the bytes of a model come from."""


def inputs_of(stage: str, params: Mapping[str, Any], inputs: Mapping[str, Path], root: Path) -> dict[str, Any]:
    """What a stage reads: code, parameters, packages, and inputs by name (a base by its manifest).

    Args:
        stage: Its name in dvc.yaml, which declares its code.
        params: Its section of params.yaml.
        inputs: Files and folders.
    """
    deps = [dep.replace(f"${{{stage}.loss}}", str(params.get("loss"))) for dep in declared_stage(stage, root)["deps"]]
    return {
        "stage": stage,
        "inputs": {name: _hash(path) for name, path in inputs.items()},
        "params": dict(params),
        "code": {dep: _hash(root / dep) for dep in deps if dep.endswith(".py")},
        "packages": {package: _version(package) for package in PACKAGES},
    }


def fingerprint(read: Mapping[str, Any]) -> str:
    """16 hex digits that name what `inputs_of` found."""
    return hashlib.sha256(repr(read).encode()).hexdigest()[:16]


def write_provenance(folder: Path, read: Mapping[str, Any]) -> None:
    """Puts provenance.json into a folder whose other files are all there."""
    files = {path.name: _hash(path) for path in sorted(folder.iterdir()) if path.name != FILE}
    write_json(folder / FILE, {**read, "files": files})


def verify(folder: Path, root: Path) -> list[str]:
    """What of a folder's provenance no longer holds, a sentence each. Raises Problem if it has none."""
    if not (folder / FILE).is_file():
        raise Problem(f"{folder}: has no {FILE}; name a folder that a stage wrote, as models/adapter")
    said = read_json(folder / FILE)
    there = {path.name for path in folder.iterdir()} - {FILE}
    found = [f"{folder}/{name}: not there" for name in sorted(said["files"].keys() - there)]
    found += [f"{folder}/{name}: was not written by {said['stage']}" for name in sorted(there - said["files"].keys())]
    found += [
        f"{folder}/{name}: not the bytes that were written"
        for name, digest in said["files"].items()
        if name in there and _hash(folder / name) != digest
    ]
    for kind in ("inputs", "code"):
        for name, digest in said[kind].items():
            now = _hash(root / name) if (root / name).exists() else "nothing"
            if now != digest:
                found.append(f"{name}: {'is not there' if now == 'nothing' else 'is another than was read'}")
    params = read_section(said["stage"], root)
    found += [
        f"params.yaml: {said['stage']}.{name}: was {value!r}, is {params.get(name)!r}"
        for name, value in said["params"].items()
        if params.get(name) != value
    ]
    found += [
        f"{package}: was {was}, is {_version(package)}"
        for package, was in said["packages"].items()
        if _version(package) != was
    ]
    return found


def _hash(path: Path) -> str:
    """sha256 of a file; of a folder, of its provenance or manifest, which has the hashes of the files in it."""
    if path.is_dir():
        known = next((path / name for name in (FILE, "manifest.json") if (path / name).exists()), None)
        if known is None:
            inside = "".join(f"{_hash(file)}  {file.name}\n" for file in sorted(path.iterdir()))
            return hashlib.sha256(inside.encode()).hexdigest()
        path = known
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def main(arguments: list[str]) -> int:
    """Prints what does not hold, and returns the exit status: 0 if all does."""
    if len(arguments) != 2 or arguments[0] != "verify":
        print("usage: python -m stages.lib.provenance verify <folder>", file=sys.stderr)
        return 2
    try:
        found = verify(Path(arguments[1]), Path())
    except Problem as problem:
        print(*problem.messages, sep="\n", file=sys.stderr)
        return 1
    print(*found or [f"{arguments[1]}: holds: its files, and all that its stage read"], sep="\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
