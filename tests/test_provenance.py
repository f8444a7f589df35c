"""provenance.json says what made a folder, and `verify` finds whatever is no longer so."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from stages.lib.problem import Problem
from stages.lib.provenance import verify
from tests.tiny import Workspace

ADAPTER = Path("models/adapter")


@pytest.fixture
def root(workspace: Workspace, tmp_path: Path) -> Path:
    """A copy of what the training read and wrote."""
    for name in ("data/tokens", "models/adapter", "stages"):
        shutil.copytree(workspace.root / name, tmp_path / name)
    (tmp_path / "models" / "base").mkdir()
    for name in ("models/base/manifest.json", "params.yaml", "dvc.yaml"):
        shutil.copy(workspace.root / name, tmp_path / name)
    return tmp_path


def test_it_names_all_that_the_training_read(root: Path, workspace: Workspace) -> None:
    said = json.loads((root / ADAPTER / "provenance.json").read_text())
    assert said["stage"] == "train"
    assert set(said["inputs"]) == {"data/tokens/train.arrow", "data/tokens/validation.arrow", "models/base"}
    assert {"stages/train.py", "stages/lib/trainer.py", "stages/losses/cross_entropy.py"} <= set(said["code"])
    assert said["params"] == dict(workspace.params()["train"])
    assert set(said["files"]) == {"adapter_config.json", "adapter_model.safetensors", "training.json"}
    assert verify(root / ADAPTER, root) == []


def touch(path: str) -> Any:
    return lambda root: (root / path).write_bytes((root / path).read_bytes() + b" ")


def change_params(root: Path) -> None:
    path = root / "params.yaml"
    path.write_text(path.read_text().replace("  lora_alpha: 32", "  lora_alpha: 64"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (touch("models/adapter/adapter_model.safetensors"), "adapter_model.safetensors: not the bytes that were written"),
        (lambda root: (root / ADAPTER / "training.json").unlink(), "training.json: not there"),
        (lambda root: (root / ADAPTER / "more.bin").touch(), "more.bin: was not written by train"),
        (touch("data/tokens/train.arrow"), "data/tokens/train.arrow: is another than was read"),
        (touch("models/base/manifest.json"), "models/base: is another than was read"),
        (lambda root: shutil.rmtree(root / "data"), "data/tokens/train.arrow: is not there"),
        (touch("stages/lib/loss.py"), "stages/lib/loss.py: is another than was read"),
        (change_params, "params.yaml: train.lora_alpha: was 32.0, is 64"),
    ],
)
def test_what_no_longer_holds_is_found(root: Path, change: Any, said: str) -> None:
    change(root)
    assert any(line.endswith(said) for line in verify(root / ADAPTER, root)), verify(root / ADAPTER, root)


def test_other_code_changes_nothing(root: Path) -> None:
    touch("stages/lib/mask.py")(root)
    touch("stages/score.py")(root)
    assert verify(root / ADAPTER, root) == []


def test_a_folder_without_it_is_refused(root: Path) -> None:
    with pytest.raises(Problem, match=r"models/base: has no provenance\.json"):
        verify(root / "models" / "base", root)


def test_the_command_says_it_and_exits_with_it(workspace: Workspace, second_python: None) -> None:
    import subprocess

    def verified(*arguments: str) -> "subprocess.CompletedProcess[str]":
        command = ["python", "-m", "stages.lib.provenance", *arguments]
        return subprocess.run(command, cwd=workspace.root, capture_output=True, text=True, check=False)

    good = verified("verify", "models/adapter")
    assert good.returncode == 0, good.stdout
    assert "models/adapter: holds" in good.stdout
    with workspace.edited("params.yaml"):
        change_params(workspace.root)
        bad = verified("verify", "models/adapter")
    assert bad.returncode == 1
    assert "train.lora_alpha: was 32.0, is 64" in bad.stdout
    assert verified("check").returncode == 2
