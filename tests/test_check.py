"""python -m stages check: what a killed dvc leaves is named with its remedy, and so is an edit that no stage has read."""

import json
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from stages.commands import check as check_module
from stages.commands.check import find_problems, is_recorded
from stages.core.integrity import md5_of, read_records, write_record
from stages.core.jsonl import as_json
from tests.tiny import Workspace


@pytest.fixture
def root(workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The project after a run, whose records were not compared with dvc.lock yet."""
    for name in ("data", "models", "reports", "stages"):
        shutil.copytree(workspace.root / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("dvc.lock", "dvc.yaml", "params.yaml"):
        shutil.copy(workspace.root / name, tmp_path / name)
    for file in (tmp_path / "reports/machine/files").iterdir():
        file.write_text(file.read_text().replace('"recorded": true', '"recorded": false'))
    (tmp_path / ".dvc/tmp").mkdir(parents=True)
    monkeypatch.setattr(check_module, "WAIT_S", 0.0)
    return tmp_path


def test_a_run_without_edits_is_noted_once(root: Path) -> None:
    assert not any(record.recorded for record in read_records(root))
    assert find_problems(root) == []
    assert all(record.recorded for record in read_records(root))


def record_as_dvc_would(root: Path, stage: str, path: str) -> None:
    """dvc.lock after an edit of `path` that DVC has hashed for `stage`, though the stage ended before."""
    lock = check_module.read_lock(root)
    before = next(dep["md5"] for dep in lock[stage]["deps"] if dep["path"] == path)
    text = (root / "dvc.lock").read_text()
    at = text.index(f"\n  {stage}:\n")
    (root / "dvc.lock").write_text(text[:at] + text[at:].replace(before, md5_of(root / path), 1))


@pytest.mark.parametrize(
    ("stage", "path"),
    [
        ("train", "data/tokens/train.arrow"),
        ("train", "stages/__main__.py"),
        ("encode", "data/prompts.json"),
        ("generate@merged", "stages/model/load.py"),
    ],
)
def test_an_edit_in_the_moment_in_which_a_stage_ended_is_found(root: Path, stage: str, path: str) -> None:
    (root / path).write_bytes((root / path).read_bytes() + b"\n")
    record_as_dvc_would(root, stage, path)
    for _ in range(2):  # until it is mended
        assert find_problems(root) == [
            f"{path}: edited in the moment in which {stage} ended. dvc.lock records the edit, but the result is that of the "
            f"state before. Run dvc repro -f -s {stage}, then dvc repro. If dvc.lock came from elsewhere since, as with git "
            f"pull, it is right: rm reports/machine/files/{stage}.json"
        ]


def test_an_edited_parameter_in_that_moment_is_found(root: Path) -> None:
    text = (root / "dvc.lock").read_text()
    at = text.index("\n  train:\n")
    assert "lora_alpha: 32" in text[at:]
    (root / "dvc.lock").write_text(text[:at] + text[at:].replace("lora_alpha: 32", "lora_alpha: 33", 1))
    (message,) = find_problems(root)
    assert message.startswith("params.yaml (train): edited in the moment in which train ended")


def test_an_edit_after_the_run_is_none_of_these(root: Path) -> None:
    (root / "stages/train/loss.py").write_text("")
    (root / "data/tokens/train.arrow").write_bytes(b"")
    assert find_problems(root) == []


def test_a_run_that_dvc_did_not_record_says_nothing(root: Path) -> None:
    file = root / "reports/machine/files/train.json"
    record = json.loads(file.read_text())
    record["read"]["data/tokens/train.arrow"][""][1] = record["wrote"]["reports/train.json"][""][1] = "0" * 32
    file.write_text(json.dumps(record))
    assert find_problems(root) == []


def test_a_run_by_hand_that_wrote_the_same_is_no_edit(root: Path) -> None:
    """Neither its code nor its parameters are those in dvc.lock, which has its outputs nevertheless."""
    file = root / "reports/machine/files/train.json"
    record = json.loads(file.read_text())
    record["read"]["stages/__main__.py"][""][1] = "0" * 32
    record["params"]["lora_alpha"] = 33
    file.write_text(json.dumps(record))
    assert len(find_problems(root)) == 1
    record["entry"] = as_json(check_module.read_lock(root)["train"])
    file.write_text(json.dumps(record))
    assert find_problems(root) == []


def test_parameters_that_json_cannot_hold_as_they_are_compare_equal(root: Path) -> None:
    lock = (root / "dvc.lock").read_text()
    at = lock.index("\n  train:\n")
    given = re.search(r"\n( +)label_weights: \{\}", lock[at:])
    assert given
    weights = f"\n{given[1]}label_weights:\n{given[1]}  2: 5.0"
    (root / "dvc.lock").write_text(lock[:at] + lock[at:].replace(given[0], weights, 1))
    assert check_module.read_lock(root)["train"]["params"]["params.yaml"]["train"]["label_weights"] == {2: 5.0}
    (record,) = (each for each in read_records(root) if each.stage == "train")
    write_record(record._replace(params=as_json(record.params | {"label_weights": {2: 5.0}})), root)
    assert find_problems(root) == []


@pytest.mark.parametrize("content", ["", "{", '{"write": {', "[]", '{"write": 1}'])
@pytest.mark.parametrize("path", [".dvc/tmp/rwlock", ".dvc/tmp/exps/rwlock"])
def test_a_broken_rwlock_is_named(root: Path, content: str, path: str) -> None:
    (root / path).parent.mkdir(exist_ok=True)
    (root / path).write_text(content)
    assert find_problems(root) == [
        f"{path}: is empty or cut off, since dvc was killed; no dvc command works with it: rm {path}"
    ]


def test_an_rwlock_that_names_a_process_that_is_no_dvc_is_named(root: Path) -> None:
    def write(pid: int) -> None:
        entry = {"pid": pid, "cmd": "dvc repro"}
        (root / ".dvc/tmp/rwlock").write_text(json.dumps({"write": {}, "read": {"a": [entry]}}))

    write(2**22 + 1)  # nobody: DVC removes it by itself
    assert find_problems(root) == []
    with subprocess.Popen(["sleep", "60"]) as other:
        while "sleep" not in check_module._command_of(other.pid):  # the system takes a moment
            time.sleep(0.01)
        write(other.pid)
        (message,) = find_problems(root)
        other.kill()
    assert f"names process {other.pid} as a dvc that was killed since" in message
    assert message.endswith("dvc commands are refused: rm .dvc/tmp/rwlock")


def test_a_cut_off_lock_is_named(root: Path) -> None:
    lock = (root / "dvc.lock").read_bytes()
    named = 0
    for size in range(0, len(lock), len(lock) // 20):
        (root / "dvc.lock").write_bytes(lock[:size])
        found = find_problems(root)
        named += bool(found)
        assert all("it is cut off or damaged; get it back with: git checkout dvc.lock" in message for message in found)
    assert named > 10  # where a cut ends an entry, DVC runs the rest again
    (root / "dvc.lock").unlink()
    assert find_problems(root) == []


def git(root: Path, *words: str) -> None:
    name = {"GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@b", "GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a@b"}
    subprocess.run(["git", *words], cwd=root, env=os.environ | name, check=True, capture_output=True)


def test_the_head_that_a_killed_experiment_leaves_is_named(root: Path) -> None:
    git(root, "init", "-b", "work")
    git(root, "add", "params.yaml")
    git(root, "commit", "-m", "a")
    assert find_problems(root) == []
    git(root, "update-ref", "refs/exps/exec/EXEC_HEAD", "HEAD")
    assert find_problems(root) == []
    git(root, "checkout", "--detach")
    (message,) = find_problems(root)
    assert message.startswith("git: HEAD is detached, since dvc exp run was killed")
    assert "Run git checkout work, look at git diff" in message
    git(root, "update-ref", "-d", "refs/exps/exec/EXEC_HEAD")
    assert find_problems(root) == []  # the user's own


def test_only_a_stage_that_has_not_run_like_this_is_imported_by_check(root: Path) -> None:
    stages = ["fetch", "fetch_data", "ingest", "encode", "train", "merge", "generate", "score"]
    assert all(is_recorded(name, root) for name in stages)
    (root / "stages/model/load.py").write_text("")
    assert [name for name in stages if not is_recorded(name, root)] == ["merge", "generate"]
    text = (root / "params.yaml").read_text()
    (root / "params.yaml").write_text(text.replace("lora_alpha: 32", "lora_alpha: 33"))
    assert [name for name in stages if not is_recorded(name, root)] == ["train", "merge", "generate"]
