"""Training in two processes on the CPU, with gloo."""

import json
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from stages.core.problem import Problem
from stages.model import distributed
from stages.model.launch import launch
from stages.train.checkpoints import COMPLETE
from stages.train.fsdp import load_in_turns
from tests.runs import run
from tests.tiny import Workspace

# A loss that kills the second process, only the first time: the marker file then exists.
KILLING_LOSS = """
import os, signal
from pathlib import Path
from stages.train.loss import next_token_loss

calls = []

def loss(logits, labels, num_items):
    calls.append(1)
    marker = Path({marker!r})
    if os.environ.get("RANK") == "1" and len(calls) == 10 and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return next_token_loss(logits, labels, num_items)
"""


def test_two_processes_train_like_one_and_a_killed_process_loses_no_checkpoint(workspace: Workspace, scratch: Path) -> None:
    (scratch / "killing.py").write_text(KILLING_LOSS.format(marker=str(scratch / "marker")))
    loss = {"loss": str(scratch / "killing.py"), "num_train_epochs": 2}
    two = {"num_processes": 2, "per_device_train_batch_size": 2, **loss}
    with pytest.raises(
        Problem, match=r"process 1 of 2 was killed \(SIGKILL\), and the others were stopped.*dvc repro resumes"
    ):
        run(workspace, scratch / "two", **two)
    assert not (scratch / "two").exists()
    assert list(scratch.glob(f".checkpoints/*/checkpoint-*/{COMPLETE}"))
    run(workspace, scratch / "two", **two)
    machine = json.loads((scratch / "two" / "machine" / "x.json").read_text())
    assert machine["processes"] == 2
    assert machine["resumed_from"].startswith("checkpoint-")
    one = run(workspace, scratch / "one", per_device_train_batch_size=4, **loss)
    reports = [json.loads((scratch / name / "report.json").read_text()) for name in ("one", "two")]
    assert reports[0]["rows"] % 4, "the last batch of an epoch is incomplete, and filled with empty rows"
    assert reports[0]["steps"] == reports[1]["steps"]
    for name in ("validation_loss_before", "validation_loss", "validation_token_accuracy"):
        assert reports[0][name] == pytest.approx(reports[1][name], rel=1e-4)
    weights = [load_file(scratch / name / "adapter" / "adapter_model.safetensors") for name in ("one", "two")]
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], rtol=1e-2, atol=2e-4)
    curves = [(out / "loss" / "train.csv").read_text().splitlines()[1:] for out in (one, scratch / "two")]
    for a, b in zip(*curves, strict=True):
        assert a.split(",")[0] == b.split(",")[0]
        assert float(a.split(",")[1]) == pytest.approx(float(b.split(",")[1]), rel=1e-3)


def test_sharded_weights_train_to_the_same_bytes_as_unsharded_ones(workspace: Workspace, scratch: Path) -> None:
    given = {"num_processes": 2, "per_device_train_batch_size": 2, "training_arguments": {"max_steps": 3}}
    outs = [run(workspace, scratch / str(fsdp), fsdp=fsdp, gradient_checkpointing=fsdp, **given) for fsdp in (False, True)]
    for name in ("adapter/adapter_model.safetensors", "report.json", "loss/train.csv"):
        assert (outs[0] / name).read_bytes() == (outs[1] / name).read_bytes(), name


def write_turns(at_a_time: int, path: str) -> None:
    """In each process: a line when its turn begins, and one when it ends."""
    distributed.init_processes(cpu=True)

    def load() -> int:
        for line in ("begins", "ends"):
            with Path(path).open("a") as file:
                file.write(f"{distributed.rank()} {line}\n")
            time.sleep(0.2)
        return distributed.rank()

    assert load_in_turns(load, at_a_time) == distributed.rank()


def test_processes_load_one_after_the_other_if_main_memory_holds_one_copy(tmp_path: Path) -> None:
    launch(write_turns, 2, 1, str(tmp_path / "turns"))
    assert (tmp_path / "turns").read_text().splitlines() == ["0 begins", "0 ends", "1 begins", "1 ends"]


def test_sharded_weights_need_several_processes_and_no_int8(workspace: Workspace, scratch: Path) -> None:
    with pytest.raises(Problem, match=r"train\.fsdp: must be false: train\.num_processes is 1"):
        run(workspace, scratch, fsdp=True)
    with pytest.raises(Problem, match=r"train\.fsdp: must be false: train\.quantization is int8; nf4 or none can"):
        run(workspace, scratch, fsdp=True, quantization="int8")


def test_a_problem_in_every_process_is_reported_once(workspace: Workspace, scratch: Path) -> None:
    with pytest.raises(Problem) as caught:
        run(workspace, scratch / "out", num_processes=2, target_modules=["W_pack"])
    assert len(caught.value.messages) == 1
    assert "W_pack is not in the model; linear layers here: down_proj" in str(caught.value)
