"""reports/provenance records what made an output, and `verify` finds every difference."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from stages.core.problem import Problem
from stages.core.provenance import verify
from tests.tiny import Workspace

ADAPTER = Path("models/adapter")
EMPTY = '{"stage": "train", "inputs": [], "params": {}, "code": {}, "packages": {}, "outputs": {}}'
FILE = Path("reports/provenance/train.json")


@pytest.fixture
def root(workspace: Workspace, tmp_path: Path) -> Path:
    """A copy of what the training read and wrote."""
    for name in ("data/tokens", "models/adapter", "models/base", "reports", "stages"):
        shutil.copytree(workspace.root / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(workspace.root / name, tmp_path / name)
    return tmp_path


def test_it_names_all_that_the_training_read_and_wrote(root: Path, workspace: Workspace) -> None:
    recorded = json.loads((root / FILE).read_text())
    assert recorded["stage"] == "train"
    assert set(recorded["inputs"]) == {"data/tokens/train.arrow", "data/tokens/validation.arrow", "models/base"}
    assert {"stages/train/train.py", "stages/core/tokens.py", "stages/losses/cross_entropy.py"} <= set(recorded["code"])
    assert recorded["params"] == dict(workspace.params()["train"])
    assert set(recorded["outputs"]) == {"models/adapter", "reports/train.json", "reports/loss"}
    assert verify(root / FILE, root) == []


def test_a_token_id_as_a_key_of_a_parameter_is_no_difference(root: Path) -> None:
    """JSON has text for keys, YAML numbers too."""
    recorded = json.loads((root / FILE).read_text())
    recorded["params"]["label_weights"] = {"2": 5.0}
    (root / FILE).write_text(json.dumps(recorded))
    assert verify(root / FILE, root) == ["params.yaml: train.label_weights: was {'2': 5.0}, is {}"]
    params = (root / "params.yaml").read_text()
    assert "label_weights: {}" in params
    (root / "params.yaml").write_text(params.replace("label_weights: {}", "label_weights: {2: 5.0}"))
    assert verify(root / FILE, root) == []


def touch(path: str) -> Any:
    return lambda root: (root / path).write_bytes((root / path).read_bytes() + b" ")


def touch_new(path: str) -> Any:
    return lambda root: (root / path).touch()


def damage(path: str, text: str) -> Any:
    return lambda root: (root / path).write_text(text)


def change_params(root: Path) -> None:
    path = root / "params.yaml"
    path.write_text(path.read_text().replace("  lora_alpha: 32", "  lora_alpha: 64"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (touch("models/adapter/adapter_model.safetensors"), "models/adapter: is not what train wrote"),
        (lambda root: (root / ADAPTER / "training.json").unlink(), "models/adapter: is not what train wrote"),
        (lambda root: (root / ADAPTER / "more.bin").touch(), "models/adapter: is not what train wrote"),
        (lambda root: shutil.rmtree(root / ADAPTER), "models/adapter: is missing"),
        (touch("data/tokens/train.arrow"), "data/tokens/train.arrow: is not what train read"),
        (touch("models/base/manifest.json"), "models/base: is not what train read"),
        (touch("models/base/model.safetensors"), "models/base/model.safetensors: is not the file that manifest.json names"),
        (
            lambda root: (root / "models/base/more.py").touch(),
            "models/base/more.py: is not the file that manifest.json names",
        ),
        (lambda root: (root / "data/tokens/train.arrow").unlink(), "data/tokens/train.arrow: is missing"),
        (touch("stages/train/loss.py"), "stages/train/loss.py: has changed since train ran"),
        (touch_new("stages/train/more.py"), "stages/train/more.py: was not read when train ran"),
        (damage("models/base/manifest.json", ""), "models/base: is not what train read"),
        (damage("models/base/manifest.json", '{"files": 1}'), "models/base: is not what train read"),
        (change_params, "params.yaml: train.lora_alpha: was 32, is 64"),
    ],
)
def test_what_no_longer_holds_is_found(root: Path, change: Any, message: str) -> None:
    change(root)
    assert verify(root / FILE, root) == [message]


def test_other_code_changes_nothing(root: Path) -> None:
    touch("stages/encode/mask.py")(root)
    touch("stages/score/score.py")(root)
    assert verify(root / FILE, root) == []


@pytest.mark.parametrize("text", [None, "", "[]", "{}", "[" * 100_000, '{"stage": "train"}', EMPTY])
def test_what_is_no_provenance_is_refused(root: Path, text: str | None) -> None:
    path = root / "x.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(Problem, match=r"x\.json: not a provenance file; run dvc repro"):
        verify(path, root)


def test_the_command_says_it_and_exits_with_it(workspace: Workspace, second_python: None) -> None:
    good = workspace.run("verify")
    assert (good.returncode, good.stderr) == (0, "")
    assert "merge, train: outputs, inputs, code, parameters and packages are unchanged" in good.stdout
    with workspace.edited("params.yaml"):
        change_params(workspace.root)
        bad = workspace.run("verify")
    assert bad.returncode == 1
    assert "train.lora_alpha: was 32, is 64" in bad.stderr
