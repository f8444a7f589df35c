"""What a stage reads, noted before it runs and compared when it ends.

DVC hashes dependencies after the command, so an edit made while a stage runs would be recorded as if it had made the
result (treeverse/dvc#11058). `python -m stages` takes the snapshot before it imports the stage and what the stage needs:
an edit made during those seconds is seen too.
"""

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.lib.params import declared_stage, read_section
from stages.lib.problem import Problem


@dataclass(frozen=True)
class Snapshot:
    """The state of one stage's dependencies and parameters."""

    stage: str
    arguments: tuple[str, ...]
    root: Path
    params: Any
    code: dict[str, str]
    """Path → sha256 of every declared file below stages/."""
    data: dict[str, tuple[tuple[str, int, int], ...]]
    """Path → (file, bytes, mtime in ns) of every other declared input; hashing 16 GB twice would cost minutes."""

    @classmethod
    def take(cls, stage: str, arguments: tuple[str, ...], root: Path) -> "Snapshot":
        """Reads dvc.yaml, and what it declares for `stage` when run with these arguments.

        Raises Problem if a declared file below stages/ is not there.
        """
        params = read_section(stage, root)
        deps = [_resolve(dep, stage, params, arguments) for dep in declared_stage(stage, root)["deps"]]
        code = [dep for dep in deps if dep.startswith("stages/")]
        missing = [
            f"{dep}: not found, though dvc.yaml declares it for {stage!r}" for dep in code if not (root / dep).exists()
        ]
        if missing:
            raise Problem(*missing)
        return cls(
            stage=stage,
            arguments=arguments,
            root=root,
            params=params,
            code={dep: hashlib.sha256((root / dep).read_bytes()).hexdigest() for dep in code},
            data={dep: _stat(root / dep) for dep in deps if dep not in code},
        )

    def check(self) -> None:
        """Raises Problem if anything has changed since; the stage then fails, and DVC records nothing."""
        now = Snapshot.take(self.stage, self.arguments, self.root)
        changed = [path for path in self.code if now.code.get(path) != self.code[path]]
        changed += [path for path in self.data if now.data.get(path) != self.data[path]]
        if now.params != self.params:
            changed.append(f"params.yaml ({self.stage})")
        if changed:
            raise Problem(
                f"changed while {self.stage!r} ran: {', '.join(changed)}. The result belongs to the old state and is not "
                "recorded; run dvc repro again. For long runs, dvc exp run --temp works on a copy that you cannot touch"
            )


def _resolve(dep: str, stage: str, params: Any, arguments: tuple[str, ...]) -> str:
    """A path of dvc.yaml with its ${...} filled in: ${stage.key} from the parameters, ${item...} from the command line."""
    for key, value in params.items():
        dep = dep.replace(f"${{{stage}.{key}}}", str(value))
    if "${" in dep:
        pattern = ".+".join(re.escape(part) for part in re.split(r"\$\{[^}]*\}", dep))
        dep = next((argument for argument in arguments if re.fullmatch(pattern, argument)), dep)
    return dep


def _stat(path: Path) -> tuple[tuple[str, int, int], ...]:
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return tuple((os.fspath(f), s.st_size, s.st_mtime_ns) for f in files if f.is_file() for s in [f.stat()])
