"""A training that is killed, interrupted or refused: no finished step is lost, and the bytes are those of one full run."""

import errno
import io
import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerControl

import stages.__main__ as launcher
from stages.core.problem import Problem
from stages.core.provenance import fingerprint, inputs_of
from stages.model import launch
from stages.model.checkpoints import CheckpointFolder
from stages.train import train as stage_module
from stages.train import trainer as trainer_module
from stages.train.callbacks import say
from stages.train.checkpoints import COMPLETE, STATE, _why_unusable, last_checkpoint, mark_complete, remove_unusable
from stages.train.signals import Interruption
from tests.runs import INPUTS, params, paths, run
from tests.tiny import PROJECT, Workspace

SCRIPT = """
import os, shutil, signal, sys
from pathlib import Path
import torch
from stages.train import outputs, trainer
from stages.train import train as stage

PATHS, GIVEN = {paths!r}, {given!r}
where = sys.argv[1]

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def at(number, before):
    calls = []
    def wrap(function):
        def wrapped(*arguments, **named):
            calls.append(1)
            if len(calls) == number:
                before(*arguments)
                die()
            return function(*arguments, **named)
        return wrapped
    return wrap

if where == "in the first step":
    trainer.AdapterTrainer.training_step = at(1, lambda *_: None)(trainer.AdapterTrainer.training_step)
elif where == "in the middle of a file of the second checkpoint":
    torch.save = at(4, lambda _, path: Path(path).write_bytes(b"PK half"))(torch.save)
elif where == "before the mark of a checkpoint":
    trainer.mark_complete = at(2, lambda *_: None)(trainer.mark_complete)
elif where == "while an old checkpoint is removed":
    shutil.rmtree = at(1, lambda path, *_: next(Path(path).glob("optimizer.pt")).unlink())(shutil.rmtree)
elif where == "while the adapter is written":
    outputs.save_adapter = at(1, lambda _, folder, *__: (folder / "half").write_text("x"))(outputs.save_adapter)
stage.train(stage.Params(**GIVEN), **{{name: Path(path) for name, path in PATHS.items()}}).clean_up()
"""
KILLED = (-signal.SIGKILL, 256 - signal.SIGKILL)
PLACES = (
    "in the first step",
    "before the mark of a checkpoint",
    "in the middle of a file of the second checkpoint",
    "while an old checkpoint is removed",
    "while the adapter is written",
)


class Child:
    """A training in a process of its own."""

    def __init__(self, workspace: Workspace, scratch: Path, out: Path, **given: Any) -> None:
        self.out, self.script = out, scratch / "run.py"
        named = {name: str(path) for name, path in paths(workspace, out).items()}
        self.script.write_text(SCRIPT.format(paths=named, given=params(workspace, **given).model_dump()))

    def start(self, where: str = "") -> "subprocess.Popen[str]":
        command = ["python", str(self.script), where]
        return subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def signal(self, number: int) -> None:
        """Sends a signal to the process that holds the lock: `python` here only forwards its call (tests/preloaded.py)."""
        (pid,) = self.script.parent.glob(".checkpoints/*.pid")
        os.kill(int(pid.read_text()), number)

    def finish(self) -> str:
        process = self.start()
        output, _ = process.communicate()
        assert process.returncode == 0, output
        return output


def outputs(out: Path) -> dict[str, bytes]:
    files = [path for path in out.rglob("*") if path.is_file() and path.parent.name != "machine"]
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


# Dropout draws random numbers, whose state must be restored too; the best checkpoint must not be lost.
GIVEN = {
    "lora_dropout": 0.1,
    "num_train_epochs": 2,
    "eval_steps": 2,
    "training_arguments": {"load_best_model_at_end": True},
}


@pytest.mark.usefixtures("second_python")
def test_a_run_killed_at_any_moment_ends_with_the_bytes_of_an_uninterrupted_run(workspace: Workspace, scratch: Path) -> None:
    expected = outputs(run(workspace, scratch / "full", **GIVEN))
    child = Child(workspace, scratch, scratch / "killed", **GIVEN)
    for where in PLACES:
        process = child.start(where)
        output, _ = process.communicate()
        assert process.returncode in KILLED, f"{where}: {output}"
        assert not (child.out / "adapter").exists()
    assert "train: resuming from checkpoint-" in child.finish()
    assert outputs(child.out) == expected
    assert [path.suffix for path in scratch.glob(".checkpoints/*")] == [".lock"]


@pytest.mark.usefixtures("second_python")
def test_a_run_killed_at_a_random_moment_resumes(workspace: Workspace, scratch: Path) -> None:
    given = GIVEN | {"num_train_epochs": 4, "method": "p_tuning", "learning_rate": 1e-3}
    expected = outputs(run(workspace, scratch / "full", **given))
    child = Child(workspace, scratch, scratch / "killed", **given)
    process = child.start()
    while not list(scratch.glob(".checkpoints/*/checkpoint-2")) and process.poll() is None:
        time.sleep(0.001)
    time.sleep(random.Random(os.getpid()).uniform(0, 0.5))
    child.signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode in KILLED, "it ended before it was killed"
    child.finish()
    assert outputs(child.out) == expected


@pytest.mark.usefixtures("second_python")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_run_saves_its_step_and_resumes_from_it(workspace: Workspace, scratch: Path, number: int) -> None:
    if signal.getsignal(number) is signal.SIG_IGN:
        pytest.skip("ignored here, as nohup does with SIGHUP")
    given = GIVEN | {"num_train_epochs": 6, "save_steps": 50, "eval_steps": 50}
    child = Child(workspace, scratch, scratch / "out", **given)
    process = child.start()
    assert process.stdout is not None
    for line in process.stdout:
        if "step 4/" in line:
            break
    child.signal(number)
    output = process.stdout.read()
    assert process.wait() != 0
    assert "train: interrupted; saving a checkpoint after this step" in output
    assert "KeyboardInterrupt" in output
    assert len(list(scratch.glob(f".checkpoints/*/checkpoint-*/{COMPLETE}"))) == 1
    if number == signal.SIGTERM:
        assert "train: resuming from checkpoint-" in child.finish()
        assert outputs(child.out) == outputs(run(workspace, scratch / "full", **given))


def test_a_run_started_with_nohup_survives_its_terminal() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interruption().handled():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) not in (signal.SIG_IGN, signal.SIG_DFL)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_signal_stops_at_once(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    interruption, before = Interruption(), signal.getsignal(signal.SIGHUP)
    with interruption.handled():
        signal.raise_signal(signal.SIGTERM)
        assert interruption.requested == signal.SIGTERM
        signal.raise_signal(signal.SIGTERM)  # make, or a batch system, has repeated it
        monkeypatch.setattr(launch, "SAME_SIGNAL_S", 0.0)
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            signal.raise_signal(signal.SIGHUP)  # a dropped connection sends it from the kernel and from the shell
        with pytest.raises(KeyboardInterrupt) as caught:
            signal.raise_signal(signal.SIGTERM)
        assert launch.signal_of(caught.value) == signal.SIGTERM
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "0")
        signal.raise_signal(signal.SIGTERM)  # of several processes, only the one that has started them ends them
    assert capsys.readouterr().out == "train: interrupted; saving a checkpoint after this step\n"
    assert signal.getsignal(signal.SIGHUP) is before


def test_a_signal_during_the_exchange_counts_in_the_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def exchange(value: int) -> int:
        signal.raise_signal(signal.SIGTERM)
        return value

    interruption, control = Interruption(), TrainerControl()
    with interruption.handled():
        with monkeypatch.context() as patched:
            patched.setattr("stages.model.distributed.largest", exchange)
            interruption.on_step_end(None, None, control)
        assert not control.should_training_stop, "the other processes do not know of it"
        interruption.on_step_end(None, None, control)
    assert control.should_training_stop
    assert control.should_save
    assert interruption.requested == signal.SIGTERM


def test_a_closed_terminal_does_not_end_a_training(monkeypatch: pytest.MonkeyPatch) -> None:
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("sys.stdout", Closed())
    say("train: step 1/2")


def test_a_full_disk_loses_no_earlier_checkpoint(
    workspace: Workspace, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = outputs(run(workspace, scratch / "full", **GIVEN))
    save, calls = torch.save, []

    def full(value: Any, path: Any, *rest: Any, **named: Any) -> None:
        calls.append(path)
        if len(calls) == 7:
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(value, path, *rest, **named)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        run(workspace, scratch / "out", **GIVEN)
    assert list(scratch.glob(f".checkpoints/*/checkpoint-*/{COMPLETE}"))
    monkeypatch.setattr(torch, "save", save)
    assert outputs(run(workspace, scratch / "out", **GIVEN)) == expected


def test_other_parameters_data_or_base_have_other_checkpoints(workspace: Workspace, tmp_path: Path) -> None:
    def name(*inputs: Path, **given: Any) -> str:
        read = inputs_of("train", params(workspace, **given).model_dump(), inputs, PROJECT)
        read["inputs"] = list(read["inputs"].values())  # the content decides, not the path
        return fingerprint(read)

    inputs = [workspace.root / path for path in INPUTS]
    names = {name(*inputs), name(*inputs, learning_rate=1e-4)}
    other = tmp_path / "train.arrow"
    other.write_bytes(inputs[0].read_bytes() + b"\0")
    names.add(name(other, *inputs[1:]))
    (tmp_path / "manifest.json").write_text("{}")
    names.add(name(*inputs[:2], tmp_path))
    assert len(names) == 4
    assert name(*inputs) in names


def test_a_second_run_is_refused_with_the_process_of_the_first(scratch: Path) -> None:
    message = (
        f"process {os.getpid()} is running train on the same data.*computes nothing again.*kill {os.getpid()}; it saves"
    )
    first = CheckpointFolder("train", "same")
    with pytest.raises(Problem, match=message):
        CheckpointFolder("train", "same")
    first.remove()
    assert not first.path.exists()
    with pytest.raises(ZeroDivisionError), CheckpointFolder("train", "same"):
        raise ZeroDivisionError
    CheckpointFolder("train", "same").release()


def test_a_run_killed_while_it_removes_its_checkpoints_leaves_no_half_of_one(
    scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = CheckpointFolder("train", "same")
    (folder.path / "checkpoint-2").mkdir()
    monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)  # as if killed there
    folder.remove()
    monkeypatch.undo()
    monkeypatch.setenv("DVC_ROOT", str(scratch))
    again = CheckpointFolder("train", "same")
    assert list(again.path.iterdir()) == []
    again.remove()
    assert [path.suffix for path in scratch.glob(".checkpoints/*")] == [".lock"]


def test_an_incomplete_checkpoint_is_not_used(scratch: Path) -> None:
    for step in (2, 4, 6):
        make_checkpoint(scratch, step, complete=step < 6)
    assert remove_unusable(scratch, needs_best=True) == []  # that a run was killed is nothing to tell
    assert last_checkpoint(scratch) == str(scratch / "checkpoint-4")
    assert not (scratch / "checkpoint-6").exists()


def make_checkpoint(folder: Path, step: int, *, complete: bool = True, best: int | None = None) -> Path:
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir()
    state = {"best_model_checkpoint": f"/moved/checkpoint-{best}" if best else None}
    (checkpoint / STATE).write_text(json.dumps(state))
    (checkpoint / "optimizer.pt").write_bytes(bytes([step] * 100))
    if complete:
        mark_complete(checkpoint)
    return checkpoint


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


@pytest.mark.parametrize(
    ("damage", "file", "why"),
    [
        (flip, "optimizer.pt", "optimizer.pt is not what was written"),
        (cut, "optimizer.pt", "optimizer.pt is not what was written"),
        (Path.unlink, "optimizer.pt", "optimizer.pt is missing"),
        (flip, STATE, f"{STATE} is not what was written"),
        (cut, COMPLETE, f"{COMPLETE} cannot be read"),
        (Path.touch, "more", "more is not one of its files"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    scratch: Path, damage: Callable[[Path], None], file: str, why: str
) -> None:
    for step in (2, 4):
        make_checkpoint(scratch, step)
    damage(scratch / "checkpoint-4" / file)
    assert remove_unusable(scratch, needs_best=True) == [f"checkpoint-4 is damaged ({why}) and is not used"]
    assert last_checkpoint(scratch) == str(scratch / "checkpoint-2")
    damage(scratch / "checkpoint-2" / file)
    assert remove_unusable(scratch, needs_best=True) == [
        f"checkpoint-2 is damaged ({why}) and is not used",
        "no other checkpoint is left, so the training begins anew",
    ]
    assert last_checkpoint(scratch) is None


def test_any_flipped_bit_of_the_mark_is_noticed(scratch: Path) -> None:
    checkpoint = make_checkpoint(scratch, 2)
    mark = (checkpoint / COMPLETE).read_bytes()
    unnoticed = []
    for bit in range(8 * len(mark)):
        data = bytearray(mark)
        data[bit // 8] ^= 1 << bit % 8
        (checkpoint / COMPLETE).write_bytes(data)
        if not _why_unusable(checkpoint):
            unnoticed.append(json.loads(data))
    assert all(found == json.loads(mark) for found in unnoticed)  # white space


def test_a_checkpoint_is_not_used_without_the_best_one_that_it_needs(scratch: Path) -> None:
    make_checkpoint(scratch, 2, best=2)
    make_checkpoint(scratch, 4, best=4)
    make_checkpoint(scratch, 6, best=4)
    flip(scratch / "checkpoint-4" / "optimizer.pt")
    assert remove_unusable(scratch, needs_best=False) == [
        "checkpoint-4 is damaged (optimizer.pt is not what was written) and is not used"
    ]
    assert last_checkpoint(scratch) == str(scratch / "checkpoint-6")
    assert remove_unusable(scratch, needs_best=True) == [
        "checkpoint-6 is not used, since its best checkpoint, checkpoint-4, is not there"
    ]
    assert last_checkpoint(scratch) == str(scratch / "checkpoint-2")


@pytest.mark.parametrize("damaged", ["the newest", "all"])
def test_after_a_damage_the_bytes_are_those_of_an_uninterrupted_run(
    workspace: Workspace,
    scratch: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    damaged: str,
) -> None:
    given = {"lora_dropout": 0.1, "training_arguments": {"max_steps": 5}}
    expected = outputs(run(workspace, scratch / "full", **given))
    with monkeypatch.context() as patch:
        patch.setattr(stage_module, "write_adapter", disk_is_full)
        with pytest.raises(OSError, match="No space left"):
            run(workspace, scratch / "out", **given)
    found = sorted(scratch.glob(".checkpoints/train-*/checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
    assert [path.name for path in found] == ["checkpoint-4", "checkpoint-5"]
    for path in found[-1:] if damaged == "the newest" else found:
        flip(path / "optimizer.pt")
    capsys.readouterr()
    assert outputs(run(workspace, scratch / "out", **given)) == expected
    printed = capsys.readouterr().out
    assert "train: checkpoint-5 is damaged (optimizer.pt is not what was written) and is not used\n" in printed
    assert ("train: resuming from checkpoint-4\n" in printed) == (damaged == "the newest")
    assert ("so the training begins anew" in printed) == (damaged == "all")


# A run that fails after its training


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with each optimizer step."""
    found: list[int] = []
    step = trainer_module.AdapterTrainer.training_step

    def counted(self: Any, *given: Any, **named: Any) -> Any:
        found.append(1)
        return step(self, *given, **named)

    monkeypatch.setattr(trainer_module.AdapterTrainer, "training_step", counted)
    return found


def disk_is_full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("failure", ["report", "machine", "snapshot"])
def test_after_a_failure_behind_the_training_no_step_is_repeated(
    workspace: Workspace, scratch: Path, monkeypatch: pytest.MonkeyPatch, steps: list[int], failure: str
) -> None:
    root, out = workspace.root, scratch / "out"
    monkeypatch.chdir(root)
    monkeypatch.setenv("PATH", str(scratch))  # where there is no git either
    words = ["train"]
    for name, path in paths(workspace, out).items():
        inside = path.is_relative_to(root)  # inputs are named as in dvc.yaml
        words += [f"--{name.replace('_', '-')}", str(path.relative_to(root) if inside else path)]

    def touch_the_base(*_: Any, **__: Any) -> None:
        os.utime(root / INPUTS[2] / "config.json")

    with monkeypatch.context() as patch:
        if failure == "snapshot":
            patch.setattr(stage_module, "write_machine", touch_the_base)
        else:
            patch.setattr(stage_module, f"write_{failure}", disk_is_full)
        assert launcher.main(words) == 1
    assert steps
    steps.clear()
    assert launcher.main(words) == 0
    assert not steps
    machine = json.loads((out / "machine" / "x.json").read_text())
    assert machine["resumed_from"].startswith("checkpoint-")
    assert machine["commit"] == ""
    assert not list(scratch.glob(".checkpoints/*/*"))
    for name, file in (("adapter", "models/adapter"), ("loss", "reports/loss"), ("report.json", "reports/train.json")):
        assert files_of(out / name) == files_of(root / file), name


def files_of(path: Path) -> dict[str, bytes]:
    files = path.rglob("*") if path.is_dir() else [path]
    return {str(file.relative_to(path)): file.read_bytes() for file in files}


@pytest.mark.parametrize(
    "given",
    [
        {"training_arguments": {"max_steps": 5}},  # in the middle of an epoch
        {
            "early_stopping_patience": 1,
            "num_train_epochs": 6,
            "learning_rate": 3e-2,
            "lr_scheduler_type": "constant",
            "eval_steps": 3,
            "save_steps": 100,
        },
    ],
)
def test_a_finished_training_is_not_continued(
    workspace: Workspace, scratch: Path, monkeypatch: pytest.MonkeyPatch, steps: list[int], given: dict[str, Any]
) -> None:
    expected = outputs(run(workspace, scratch / "full", **given))
    with monkeypatch.context() as patch:
        patch.setattr(stage_module, "write_adapter", disk_is_full)
        with pytest.raises(OSError, match="No space left"):
            run(workspace, scratch / "out", **given)
    steps.clear()
    assert outputs(run(workspace, scratch / "out", **given)) == expected
    assert not steps


# What stops a run


@pytest.mark.filterwarnings("ignore")
def test_a_loss_that_is_not_finite_names_the_rows(workspace: Workspace, scratch: Path) -> None:
    with pytest.raises(Problem, match=r"loss is (nan|inf)") as caught:
        run(workspace, scratch / "out", learning_rate=1e30, training_arguments={"max_grad_norm": 1e30})
    assert "lower train.learning_rate" in str(caught.value)
    assert not (scratch / "out" / "adapter").exists()


def test_a_training_that_changes_nothing_is_an_error(workspace: Workspace, scratch: Path) -> None:
    (scratch / "flat.py").write_text(
        "def loss(logits, labels, num_items):\n    return (logits.float() * 0).sum() / num_items\n"
    )
    given = {"loss": str(scratch / "flat.py"), "training_arguments": {"max_steps": 2}}
    with pytest.raises(Problem, match=r"nothing was trained: after 2 optimizer steps none of the .* weights has changed"):
        run(workspace, scratch / "out", **given)
    decay = {"max_steps": 2, "weight_decay": 0.1}
    with pytest.raises(Problem, match=r"nothing was trained: .* computes what the base does: .* lora_B of zeros"):
        run(workspace, scratch / "out", **given | {"training_arguments": decay})
    assert not (scratch / "out" / "adapter").exists()


def test_the_rows_of_a_bad_batch_are_named(workspace: Workspace, scratch: Path) -> None:
    (scratch / "bad.py").write_text(
        "def loss(logits, labels, num_items):\n"
        "    loss.calls = getattr(loss, 'calls', 0) + 1\n"
        "    return logits.float().logsumexp(-1).sum() / (num_items if loss.calls != 4 else 0)\n"
    )
    with pytest.raises(Problem, match=r"the loss is inf in a batch before step 4, in the rows (\w{16}), ") as caught:
        run(workspace, scratch / "out", loss=str(scratch / "bad.py"))
    examples = (workspace.root / "data" / "examples" / "train.jsonl").read_text()
    ids = str(caught.value).partition("in the rows ")[2].partition(" of data")[0].split(", ")
    assert len(ids) == 4
    assert all(f'"id":"{number}"' in examples for number in ids)


def test_too_little_memory_is_reported_before_the_first_step(
    workspace: Workspace, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def small(model: Any, batch: Any, **_: Any) -> Any:
        seen.append(batch)
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.11 GiB of "
            "which 1.25 GiB is free."
        )

    monkeypatch.setattr(trainer_module, "label_loss", small)
    with pytest.raises(Problem) as caught:
        run(workspace, scratch / "out")
    message = str(caught.value)
    assert "out of memory on a batch of 4 rows" in message
    assert "2.50 GiB were requested, 1.25 GiB were free" in message
    assert "train.gradient_checkpointing to true" in message
    longest = sorted(map(len, _token_rows(workspace)))[-4:]
    assert len(seen) == 1
    assert seen[0]["input_ids"].numel() == sum(longest)


def test_a_failed_allocation_on_the_cpu_is_reported_too(workspace: Workspace, scratch: Path) -> None:
    (scratch / "huge.py").write_text("import torch\ndef loss(logits, labels, num_items):\n    return torch.empty(2**60)\n")
    with pytest.raises(Problem, match=r"out of memory on a batch of 4 rows, .*: \d+ bytes were requested"):
        run(workspace, scratch / "out", loss=str(scratch / "huge.py"))


def _token_rows(workspace: Workspace) -> list[list[int]]:
    from stages.core.tokens import read_tokens

    ids: list[list[int]] = read_tokens(workspace.root / INPUTS[0]).column("input_ids").to_pylist()
    return ids


def test_the_trial_of_the_largest_batch_changes_nothing(
    workspace: Workspace, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"lora_dropout": 0.5, "training_arguments": {"max_steps": 3}}
    tried = outputs(run(workspace, scratch / "a", **given))
    monkeypatch.setattr(stage_module, "fit_memory", lambda *_: None)
    assert outputs(run(workspace, scratch / "b", **given)) == tried
