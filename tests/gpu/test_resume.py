"""With full_determinism a training on a GPU gives the same bytes again, also if it was killed and resumed."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.gpu.project import TRAIN, Project
from tests.runs import params, paths
from tests.test_resume import KILLED, SCRIPT, outputs
from tests.tiny import PROJECT

GIVEN: dict[str, Any] = TRAIN | {
    "dtype": "bfloat16",
    "num_train_epochs": 1,
    "eval_steps": 4,
    "save_steps": 4,
    "training_arguments": {"full_determinism": True},
}


class Child:
    """A training in a fresh process: full_determinism must be set before a process uses the GPU."""

    def __init__(self, project: Project, folder: Path) -> None:
        self.folder, self.out, self.script = folder, folder / "out", folder / "run.py"
        folder.mkdir()
        named = {name: str(path) for name, path in paths(project, self.out).items()}
        self.script.write_text(SCRIPT.format(paths=named, given=params(project, **GIVEN).model_dump()))

    def start(self, where: str = "") -> "subprocess.Popen[str]":
        path = os.pathsep.join([str(PROJECT), *filter(None, [os.environ.get("PYTHONPATH")])])
        return subprocess.Popen(
            [sys.executable, str(self.script), where],
            cwd=PROJECT,
            env=os.environ | {"PYTHONPATH": path, "DVC_ROOT": str(self.folder)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )


def test_a_repeated_and_a_resumed_training_give_the_same_bytes(project: Project, tmp_path: Path) -> None:
    first, second, killed = (Child(project, tmp_path / name) for name in ("first", "second", "killed"))
    running = [first.start(), second.start(), killed.start("before the mark of a checkpoint")]
    said = [process.communicate()[0] for process in running]
    assert [process.returncode for process in running[:2]] == [0, 0], "\n".join(said[:2])
    assert running[2].returncode in KILLED, said[2]
    assert not (killed.out / "adapter").exists()
    resumed = killed.start()
    said.append(resumed.communicate()[0])
    assert resumed.returncode == 0, said[-1]
    assert "train: resuming from checkpoint-4" in said[-1]
    expected = outputs(first.out)
    assert {name.partition("/")[0] for name in expected} == {"adapter", "loss", "report.json"}
    for child in (second, killed):
        found = outputs(child.out)
        assert found.keys() == expected.keys()
        differing = [name for name in expected if found[name] != expected[name]]
        curves = [(each.out / "loss" / "train.csv").read_text() for each in (first, child)]
        assert not differing, f"{child.folder.name}: {differing}\n" + "\n".join(curves)
