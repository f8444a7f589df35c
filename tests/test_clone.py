"""A clone gets what dvc push has put into the remote, and then runs merge alone, whose model no remote holds."""

import contextlib
import shutil
import subprocess
from pathlib import Path

import pytest
from dvc.cli import main as dvc

from stages.core.params import read_yaml
from tests.tiny import PROJECT, Workspace


def run(folder: Path, *words: str) -> int:
    with contextlib.chdir(folder):
        return int(dvc(list(words)))


@pytest.mark.usefixtures("second_python")
def test_a_clone_pulls_with_status_0_and_runs_merge_alone(
    workspace: Workspace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    project, clone = tmp_path / "project", tmp_path / "clone"
    shutil.copytree(workspace.root, project, ignore=shutil.ignore_patterns("__pycache__", "tmp"))
    (project / ".dvc" / "config").write_text(f"[core]\n    remote = r\n['remote \"r\"']\n    url = {tmp_path / 'remote'}\n")
    (project / ".dvc" / ".gitignore").write_text("/config.local\n/tmp\n/cache\n")
    for words in (["init", "-q"], ["add", "-A"], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "a"]):
        subprocess.run(["git", *words], cwd=project, check=True)
    assert run(project, "push") == 0
    subprocess.run(["git", "clone", "-q", project, clone], check=True)
    makefile = (PROJECT / "Makefile").read_text(encoding="utf-8")
    assert "\n\tdvc pull --allow-missing\n" in makefile
    assert run(clone, "pull", "--allow-missing") == 0
    lock = (clone / "dvc.lock").read_bytes()
    outs = {out["path"] for entry in read_yaml(clone / "dvc.lock")["stages"].values() for out in entry["outs"]}
    assert {path for path in outs if not (clone / path).exists()} == {"models/merged"}
    caplog.clear()
    assert run(clone, "repro") == 0
    said = [record.getMessage() for record in caplog.records]
    assert [line for line in said if line.startswith("Running stage")] == ["Running stage 'merge':"]
    assert (clone / "dvc.lock").read_bytes() == lock
