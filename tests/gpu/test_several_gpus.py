"""Several GPUs compute what one computes. Skipped with one."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu.project import TRAIN, Project
from tests.runs import run
from tests.test_memory import curve

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")

GIVEN: dict[str, Any] = TRAIN | {"dtype": "float32", "num_train_epochs": 1, "eval_steps": 8, "save_steps": 8}


def assert_same_training(one: Path, other: Path, rel: float) -> None:
    curves = [curve(out) for out in (one, other)]
    reports = [json.loads((out / "report.json").read_text()) for out in (one, other)]
    assert curves[1] == pytest.approx(curves[0], rel=rel), f"{curves}"
    for name in ("validation_loss_before", "validation_loss", "validation_token_accuracy"):
        assert reports[1][name] == pytest.approx(reports[0][name], rel=rel), f"{name}: {reports}"
    assert reports[0]["steps"] == reports[1]["steps"]


def test_two_gpus_train_like_one(project: Project, scratch: Path) -> None:
    one = run(project, scratch / "one", **GIVEN | {"per_device_train_batch_size": 16})
    two = run(project, scratch / "two", **GIVEN | {"per_device_train_batch_size": 8, "num_processes": 2})
    assert json.loads((two / "machine" / "x.json").read_text())["processes"] == 2
    # The gradients are summed in another order; Adam divides by their size, so that small differences grow over the steps.
    assert_same_training(one, two, rel=2e-3)


def test_two_gpus_answer_like_one(project: Project, scratch: Path) -> None:
    one = project.generate(project.base, scratch / "one")
    assert project.generate(project.base, scratch / "two", num_processes=2) == one
    for name in ("predictions.jsonl", "extra.jsonl"):
        assert (scratch / "one" / name).read_bytes() == (scratch / "two" / name).read_bytes(), name
    # The second process compiles its functions for other shapes first, and sums in bfloat16 differ in the last bits.
    losses = [
        [json.loads(line)["loss"] for line in (scratch / out / "text.jsonl").read_text().splitlines()]
        for out in ("one", "two")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_sharded_weights_train_like_unsharded_ones(project: Project, scratch: Path, quantization: str) -> None:
    given = GIVEN | {"num_processes": 2, "per_device_train_batch_size": 8, "quantization": quantization}
    plain, sharded = (run(project, scratch / str(fsdp), fsdp=fsdp, **given) for fsdp in (False, True))
    # Weights are the same to the bit, but micro-batches are not, so that gradients are summed in another order.
    assert_same_training(plain, sharded, rel=2e-3)
