"""What made an output: hashes of everything that its stage read, and of what it wrote.

`reports/provenance/<stage>.json` is a separate output that no stage reads, so an edited comment in the code changes this
file and nothing else. It holds nothing that differs between equal runs: the date, the machine and the commit are in
reports/machine/, which is not an output.

    python -m stages verify

checks whether the outputs are unchanged, and whether everything that their stages read is unchanged too.
"""

import hashlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from stages.core.jsonl import as_json, read_json, write_json
from stages.core.output import fresh_file, sha256_of
from stages.core.params import read_section
from stages.core.problem import Problem
from stages.core.snapshot import declared_deps, hash_code

FOLDER = Path("reports/provenance")
MANIFEST = "manifest.json"
"""In a model's folder: the sha256 of every other file, so that nobody has to hash 16 GB again."""
HASHING_THREADS = 4
"""hashlib releases the interpreter's lock, so the shards of a model are hashed in parallel."""
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "safetensors")
"""The packages whose versions can change the bytes of a model."""


def inputs_of(stage: str, params: Mapping[str, Any], inputs: Iterable[Path], root: Path) -> dict[str, Any]:
    """Hashes of what a stage reads: code, parameters, packages, and inputs by path.

    Args:
        stage: Its name in dvc.yaml, which declares its code.
        params: Its section of params.yaml.
        inputs: Files and folders of data.
    """
    return {
        "stage": stage,
        "inputs": {path.as_posix(): hash_path(path) for path in inputs},
        "params": dict(params),
        "code": hash_code(stage, declared_deps(stage, params, root), root),
        "packages": {package: _version(package) for package in PACKAGES},
    }


def fingerprint(inputs: Mapping[str, Any]) -> str:
    """16 hex digits that name what `inputs_of` found."""
    return hashlib.sha256(repr(inputs).encode()).hexdigest()[:16]


def write_provenance(path: Path, inputs: Mapping[str, Any], outputs: Iterable[Path]) -> None:
    """Writes what `inputs_of` found, and the hashes of the outputs."""
    with fresh_file(path) as file:
        write_json(file, {**inputs, "outputs": {output.as_posix(): hash_path(output) for output in outputs}})


def verify(path: Path, root: Path) -> list[str]:
    """Everything in one provenance file that no longer holds, one sentence each.

    Every file of an output is hashed, not only its manifest. Raises Problem if `path` is not a provenance file.
    """
    try:
        recorded = read_json(path)
        stage, params = recorded["stage"], read_section(recorded["stage"], root)
        outputs, inputs, code, was_params, packages = (
            {**recorded[key]} for key in ("outputs", "inputs", "code", "params", "packages")
        )
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        raise Problem(f"{path}: not a provenance file; run dvc repro to write it") from None
    found = []
    for name, digest in outputs.items():
        found += _compare(root / name, name, digest, f"is not what {stage} wrote")
    for name, digest in inputs.items():
        found += _compare(root / name, name, digest, f"is not what {stage} read")
    for name, digest in code.items():
        found += _compare(root / name, name, digest, f"has changed since {stage} ran")
    declared = [dep for dep in declared_deps(stage, params, root) if (root / dep).exists()]
    found += [f"{name}: was not read when {stage} ran" for name in hash_code(stage, declared, root) if name not in code]
    found += [
        f"params.yaml: {stage}.{name}: was {was!r}, is {params.get(name)!r}"
        for name in {**was_params, **params}
        for was in [was_params.get(name)]
        if as_json(params.get(name)) != was
    ]
    found += [
        f"{package}: was {was}, is {_version(package)}" for package, was in packages.items() if _version(package) != was
    ]
    return found


def _compare(path: Path, name: str, digest: str, difference: str) -> list[str]:
    if not path.exists():
        return [f"{name}: is missing"]
    damaged = _differing_files(path) if path.is_dir() and (path / MANIFEST).is_file() else []
    if damaged:
        return [f"{name}/{file}: is not the file that {MANIFEST} names" for file in damaged]
    return [] if hash_path(path) == digest else [f"{name}: {difference}"]


def _differing_files(folder: Path) -> list[str]:
    """The files of a model's folder that are missing, altered or not in its manifest."""
    try:
        recorded = dict(read_json(folder / MANIFEST)["files"])
    except (ValueError, LookupError, TypeError):
        return []  # the manifest itself is damaged, which its hash shows
    there = {file.relative_to(folder).as_posix(): file for file in folder.rglob("*") if file.is_file()}
    there.pop(MANIFEST)
    return sorted(
        name
        for name in {*recorded, *there}
        if name not in there or name not in recorded or sha256_of(there[name]) != recorded[name]
    )


def file_hashes(folder: Path) -> dict[str, str]:
    """Path → sha256 of every file in a folder except its manifest."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file != folder / MANIFEST)
    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        digests = list(pool.map(sha256_of, files))
    return {file.relative_to(folder).as_posix(): digest for file, digest in zip(files, digests, strict=True)}


def hash_path(path: Path) -> str:
    """The sha256 of a file; of a folder, that of its manifest, or of the hashes of its files."""
    if path.is_file():
        return sha256_of(path)
    if (path / MANIFEST).is_file():
        return sha256_of(path / MANIFEST)
    return hashlib.sha256("".join(f"{digest}  {name}\n" for name, digest in file_hashes(path).items()).encode()).hexdigest()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"
