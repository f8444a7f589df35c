"""A stage reads, writes and asks for nothing but what dvc.yaml declares: seen while the whole chain runs, not in its text.

Each stage runs in a project of its own, in which all that it does not declare is another file: its outputs must be the same
bytes. So what compiled code reads in silence is noticed too. An audit hook (tests/audited.py) sees the rest.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from tests import preloaded
from tests.tiny import PROJECT, Workspace

SPEC: dict[str, Any] = YAML(typ="safe").load(PROJECT / "dvc.yaml")["stages"]
STAGES = ["fetch", "fetch_data", "ingest", "encode", "train", "merge", "generate@base", "generate@merged", "score"]

# The environment variables that the code asks for, each with the reason why it changes no result.
ENVIRONMENT = {
    "DVC_ROOT": "where checkpoints are, and whether DVC records the result",
    "RANK": "a process of several",
    "WORLD_SIZE": "a process of several",
    "LOCAL_RANK": "a process of several",
    "LOCAL_WORLD_SIZE": "a process of several",
    "MASTER_ADDR": "a process of several",
    "PYTORCH_CUDA_ALLOC_CONF": "how memory is allocated",
    "PYTORCH_ALLOC_CONF": "how memory is allocated",
    "NCCL_NVLS_ENABLE": "how GPUs exchange data",
    "OMP_NUM_THREADS": "threads",
    "HF_HUB_DISABLE_PROGRESS_BARS": "progress bars",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "advice",
    "PYARROW_IGNORE_TIMEZONE": "asked for by pyarrow; the tables have no times",
    "HF_TOKEN": "the right to download what is pinned",
}
# What the launcher reads and leaves: no result depends on it.
READ_BY_ALL = ("dvc.yaml", "params.yaml", "dvc.lock", ".dvc", "reports/machine/files")
WRITTEN_BY_ALL = ("reports/machine", ".checkpoints", "reports/failed")
OUTSIDE = ("/dev/", "/proc/", "/sys/", "/tmp/torchinductor", "/tmp/tmp")


class Audit:
    """One stage, run where all that it does not declare is another file."""

    def __init__(self, workspace: Workspace, root: Path, stage: str, plant: Callable[[Path], None] | None = None) -> None:
        self.stage, self.root = stage, root
        name, _, item = stage.partition("@")
        self.name, spec = name, SPEC[name]
        self.params = workspace.params()[name]

        def fill(text: str) -> str:
            for key, value in self.params.items():
                text = text.replace(f"${{{name}.{key}}}", str(value))
            return text.replace("${item.model}", item)

        self.deps = [fill(dep) for dep in spec["deps"]]
        outs = [*spec.get("outs", []), *spec.get("metrics", [])]
        self.outs = [fill(next(iter(out)) if isinstance(out, dict) else out) for out in outs]
        self.words = fill(spec["cmd"]).split()[3:]
        given = str(self.params.get("model_name_or_path", ""))
        self.inputs = [*self.deps, given] if given else self.deps
        self._copy(workspace)
        if plant:
            plant(root)
        before = self._tree()
        notes = root.with_name("notes.json")
        self.done = subprocess.run(
            ["python", str(PROJECT / "tests" / "audited.py"), str(notes), *self.words],
            cwd=root,
            capture_output=True,
            text=True,
            check=False,
        )
        self.notes: dict[str, list[str]] = json.loads(notes.read_text())
        self.notes["written"] += [path for path, state in self._tree().items() if before.get(path) != state]
        self.differing = [
            path
            for path in self.outs
            if self.done.returncode == 0 and contents(root / path) != contents(workspace.root / path)
        ]

    def _copy(self, workspace: Workspace) -> None:
        """Everything is there, but only what the stage declares is as it was."""
        for file in sorted(workspace.root.rglob("*")):
            path = file.relative_to(workspace.root)
            if not file.is_file() or path.parts[0] in (".git", "tests", "benchmarks", "docs") or "__pycache__" in path.parts:
                continue
            target = self.root / path
            target.parent.mkdir(parents=True, exist_ok=True)
            kept = below(path.as_posix(), self.inputs) or below(path.as_posix(), READ_BY_ALL) or path.name == "__init__.py"
            if kept:
                shutil.copy(file, target)
            else:
                target.write_text("raise RuntimeError\n" if path.suffix == ".py" else "decoy")
        params = YAML()
        params.dump({self.name: self.params}, self.root / "params.yaml")

    def _tree(self) -> dict[str, tuple[int, int]]:
        return {
            path.relative_to(self.root).as_posix(): (status.st_size, status.st_mtime_ns)
            for path in self.root.rglob("*")
            if path.is_file()
            for status in [path.stat()]
        }

    def find(self) -> list[str]:
        """Every difference between what the stage did and what is declared for it."""
        found = [f"reads {path}" for path in self.notes["read"] if not self._may_read(path)]
        found += [f"writes {path}" for path in sorted({*self.notes["written"]}) if not self._may_write(path)]
        found += [
            f"asks for the environment variable {name}" for name in self.notes["environment"] if name not in ENVIRONMENT
        ]
        found += [f"{path} depends on something undeclared" for path in self.differing]
        return found if self.done.returncode == 0 else [*found, f"fails: {self.done.stderr}"]

    def _may_read(self, path: str) -> bool:
        if path.startswith("/"):
            return True  # the libraries, and what belongs to the system
        if path.startswith("stages/") and path.endswith(".py") and path not in self._code():
            return path.endswith("__init__.py") or path == "stages/__main__.py"
        whole = [*self.inputs, *READ_BY_ALL, *WRITTEN_BY_ALL]
        return below(path, whole) or self._may_write(path) or (self.root / path).is_dir()

    def _code(self) -> set[str]:
        return {
            file.relative_to(self.root).as_posix()
            for dep in self.deps
            if dep.startswith("stages/")
            for file in ((self.root / dep).iterdir() if (self.root / dep).is_dir() else [self.root / dep])
        }

    def _may_write(self, path: str) -> bool:
        if path.startswith("/"):
            home = (str(self.root.parent), os.environ["HF_MODULES_CACHE"], *OUTSIDE)
            return path.startswith(home)
        outs = [*self.outs, *(f"{out}.partial" for out in self.outs), *WRITTEN_BY_ALL]
        download = Path(path).name.startswith(".fetch-") or "/.fetch-" in path
        return below(path, outs) or (download and self.name in ("fetch", "fetch_data")) or path in self._folders()

    def _folders(self) -> set[str]:
        return {str(parent) for out in [*self.outs, *WRITTEN_BY_ALL] for parent in Path(out).parents}


def below(path: str, places: Any) -> bool:
    return any(path == place or path.startswith(f"{place}/") for place in places)


def contents(path: Path) -> dict[str, bytes]:
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in files if file.is_file()}


@pytest.fixture(scope="module")
def audits(workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Audit]]:
    with preloaded.python(tmp_path_factory.mktemp("third"), hash_seed=5):
        yield {stage: Audit(workspace, tmp_path_factory.mktemp("audit") / "project", stage) for stage in STAGES}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_does_what_is_declared_and_nothing_else(audits: dict[str, Audit], stage: str) -> None:
    assert audits[stage].find() == []
    assert audits[stage].notes["read"]


# Parameters that the tiny chain does not read, each with what would make it do so.
NOT_READ: dict[str, dict[str, str]] = {
    "train": {
        "num_virtual_tokens": "method p_tuning or prefix_tuning",
        "encoder_hidden_size": "method p_tuning or prefix_tuning",
        "prefix_projection": "method prefix_tuning",
    },
    "score": {"judge_model": "a judge_url", "judge_rows": "a judge_url"},
}


def test_every_parameter_is_read(audits: dict[str, Audit]) -> None:
    for stage, audit in audits.items():
        names = {name for name in audit.params if name not in audit.notes["params"]}
        assert names == set(NOT_READ.get(audit.name, {})), stage


# Planted mistakes: the tests above find what they are for.


def plant(code: str) -> Callable[[Path], None]:
    """Adds code to the module of ingest, which runs when it is imported."""

    def add(root: Path) -> None:
        path = root / "stages" / "ingest" / "ingest.py"
        path.write_text(path.read_text(encoding="utf-8") + code, encoding="utf-8")

    return add


COMPILED = """
import pyarrow
_write = write_json
def write_json(path, value):
    with pyarrow.memory_map("README.md") as file:
        _write(path, value if file.size() > 1000 else {**value, "x": 1})
"""


@pytest.mark.parametrize(
    ("code", "finding"),
    [
        ("\nimport importlib\nimportlib.import_module('stages.score.systems')\n", "reads stages/score/systems.py"),
        ("\nimport contextlib\nwith contextlib.suppress(OSError): open('data/notes.txt').read()\n", "reads data/notes.txt"),
        ("\nPath('reports/encode.json').read_text()\n", "reads reports/encode.json"),
        ("\nPath('data/more.txt').write_text('x')\n", "writes data/more.txt"),
        ("\nimport pyarrow\npyarrow.OSFile('data/raw/x.bin', 'wb').close()\n", "writes data/raw/x.bin"),
        ("\nPath('../more.txt').resolve().parents[2].joinpath('x.txt').write_text('')\n", "writes /"),
        ("\nPath('data/raw/zh.json').rename('data/raw/zz.json')\n", "writes data/raw/zh.json"),
        ("\nimport os\nif os.environ.get('MODE'): raise SystemExit\n", "asks for the environment variable MODE"),
        (COMPILED, "reports/ingest.json depends on something undeclared"),
    ],
    ids=["import", "read", "report", "write", "compiled write", "outside", "rename", "environment", "compiled read"],
)
def test_a_planted_mistake_is_found(
    audits: dict[str, Audit], workspace: Workspace, tmp_path: Path, code: str, finding: str
) -> None:
    found = Audit(workspace, tmp_path / "a" / "b" / "project", "ingest", plant(code)).find()
    assert [each for each in found if each.startswith(finding)], found


def test_a_planted_parameter_that_nothing_reads_is_found(
    audits: dict[str, Audit], workspace: Workspace, tmp_path: Path
) -> None:
    def add(root: Path) -> None:
        path = root / "stages" / "ingest" / "ingest.py"
        path.write_text(path.read_text(encoding="utf-8").replace("    split_seed: ", "    planted: int\n    split_seed: "))
        text = (root / "params.yaml").read_text()
        (root / "params.yaml").write_text(text.replace("  split_seed:", "  planted: 1\n  split_seed:"))

    audit = Audit(workspace, tmp_path / "project", "ingest", add)
    assert audit.done.returncode == 0, audit.done.stderr
    assert "split_seed" in audit.notes["params"]
    assert "planted" not in audit.notes["params"]
