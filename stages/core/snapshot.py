"""What a stage reads, recorded before it runs and compared when it ends.

DVC hashes dependencies after the command, so an edit made while a stage runs would be recorded as if it had made the
result (treeverse/dvc#11058). `python -m stages` takes the snapshot before it imports the stage and what the stage needs:
an edit made during those seconds is noticed too. The stage's parameters are built from the snapshot.
"""

import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.core.output import sha256_of
from stages.core.params import FILE as PARAMS_FILE
from stages.core.params import read_section, read_stage
from stages.core.problem import Problem

CODE = (".py", ".jinja")
"""The files that count in a folder of code; .dvcignore hides the others from DVC."""


@dataclass(frozen=True)
class Snapshot:
    """The state of one stage's dependencies and parameters."""

    stage: str
    paths: tuple[str, ...]
    """The paths on the command line."""
    root: Path
    declared: str
    """A hash of dvc.yaml and params.yaml: while it stays, they need not be parsed again, which takes 60 ms."""
    deps: tuple[str, ...]
    """The dependencies that dvc.yaml declares, with what they name filled in."""
    params: dict[str, Any]
    code: dict[str, str]
    """Path → sha256 of every declared file below stages/."""
    data: dict[str, tuple[tuple[str, int, int], ...]]
    """Path → (file, bytes, mtime in ns) of every other declared input; hashing 16 GB twice would cost minutes."""

    @classmethod
    def take(cls, stage: str, paths: Iterable[str], root: Path) -> "Snapshot":
        """Reads dvc.yaml, and what it declares for `stage` when run with these paths.

        Raises Problem if a declared code file is missing.
        """
        paths, declared = tuple(paths), _hash_declarations(root)
        params = read_section(stage, root)
        deps = tuple(_resolve(dep, stage, params, paths) for dep in read_stage(stage, root).get("deps", []))
        return cls._look(stage, paths, root, declared=declared, deps=deps, params=params)

    @classmethod
    def _look(
        cls, stage: str, paths: tuple[str, ...], root: Path, *, declared: str, deps: tuple[str, ...], params: dict[str, Any]
    ) -> "Snapshot":
        """The state of the dependencies now."""
        return cls(
            stage=stage,
            paths=paths,
            root=root,
            declared=declared,
            deps=deps,
            params=params,
            code=hash_code(stage, deps, root),
            data={dep: _stat(root / dep) for dep in deps if not is_code(dep)},
        )

    def check(self) -> None:
        """Raises Problem if anything has changed since; the stage then fails, and DVC records nothing."""
        if _hash_declarations(self.root) == self.declared:
            now = Snapshot._look(
                self.stage, self.paths, self.root, declared=self.declared, deps=self.deps, params=self.params
            )
        else:
            now = Snapshot.take(self.stage, self.paths, self.root)
        changed = [path for path in {**self.code, **now.code} if now.code.get(path) != self.code.get(path)]
        changed += [path for path in self.data if now.data.get(path) != self.data[path]]
        if now.params != self.params:
            changed.append(f"params.yaml ({self.stage})")
        if changed:
            raise Problem(
                f"changed while {self.stage!r} ran: {', '.join(changed)}. The result belongs to the old state and is not "
                "recorded; run dvc repro again. For long runs, dvc exp run --temp works on a copy, out of reach of edits"
            )

    @property
    def inputs(self) -> list[str]:
        """The data that the stage reads: the dependencies that the command line or a parameter names, or the folder of."""
        named = {*self.paths, *(value for value in self.params.values() if isinstance(value, str))}
        return [dep for dep in self.data if named & {dep, *map(str, Path(dep).parents)}]

    @property
    def code_files(self) -> dict[str, list[Path]]:
        """Each dependency that is code → its files."""
        return {
            dep: [self.root / name for name in self.code if name == dep or name.rpartition("/")[0] == dep]
            for dep in self.deps
            if is_code(dep)
        }

    @property
    def name_in_lock(self) -> str:
        """The stage's name in dvc.lock: with what the command line says of ${item...}, as generate@base."""
        for pattern, dep in zip(read_stage(self.stage, self.root).get("deps", []), self.deps, strict=False):
            before, item, rest = pattern.partition("${item")
            if item and "${" not in dep:
                after = rest.partition("}")[2]
                return f"{self.stage}@{dep.removeprefix(before).removesuffix(after)}"
        return self.stage


def is_code(dep: str) -> bool:
    """Whether a dependency of dvc.yaml is the project's code and not data."""
    return Path(dep).parts[:1] == ("stages",)


def declared_deps(stage: str, params: Mapping[str, Any], root: Path) -> list[str]:
    """The dependencies that dvc.yaml declares for a stage, with its parameters filled in."""
    return [_resolve(dep, stage, params, ()) for dep in read_stage(stage, root).get("deps", [])]


def hash_code(stage: str, deps: Iterable[str], root: Path) -> dict[str, str]:
    """Path → sha256 of every file of code among the dependencies; a folder stands for the files directly in it.

    Raises Problem if one is missing.
    """
    files: list[str] = []
    missing = []
    for dep in filter(is_code, deps):
        path = root / dep
        if path.is_dir():
            files += sorted(f"{dep}/{file.name}" for file in path.iterdir() if _is_code_file(file))
        elif path.is_file():
            files.append(dep)
        else:
            missing.append(f"{dep}: not found, though dvc.yaml declares it for {stage!r}")
    if missing:
        raise Problem(*missing)
    return {name: sha256_of(root / name) for name in files}


def _hash_declarations(root: Path) -> str:
    texts = [path.read_bytes() if path.is_file() else b"" for path in (root / "dvc.yaml", root / PARAMS_FILE)]
    return hashlib.sha256(b"\0".join(texts)).hexdigest()


def _is_code_file(path: Path) -> bool:
    """Whether DVC sees this file of a code folder: .dvcignore hides folders in it, and hidden files, such as `.#train.py`,
    the lock of an open editor."""
    return path.suffix in CODE and not path.name.startswith(".") and path.is_file()


def _resolve(dep: str, stage: str, params: Mapping[str, Any], paths: Iterable[str]) -> str:
    """A path of dvc.yaml with its ${...} filled in: ${stage.key} from the parameters, ${item...} from the command line."""
    for key, value in params.items():
        dep = dep.replace(f"${{{stage}.{key}}}", str(value))
    if "${item" in dep:
        pattern = ".+".join(re.escape(part) for part in re.split(r"\$\{item[^}]*\}", dep))
        dep = next((path for path in paths if re.fullmatch(pattern, path)), dep)
    return dep


def _stat(path: Path) -> tuple[tuple[str, int, int], ...]:
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return tuple((os.fspath(f), s.st_size, s.st_mtime_ns) for f in files if f.is_file() for s in [f.stat()])
