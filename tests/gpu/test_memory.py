"""Micro-batches that are chosen for little GPU memory give the same loss as those for much."""

import gc
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from stages.train import memory
from stages.train.memory import Known, Plan
from stages.train.memory_fit import ADAM_BYTES
from tests.gpu.project import Project
from tests.runs import run
from tests.test_memory import curve

GIVEN: dict[str, Any] = {
    "dtype": "bfloat16",
    "gradient_checkpointing": "auto",
    "per_device_train_batch_size": 64,
    "num_train_epochs": 1,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "training_arguments": {"max_steps": 3},
}
SLACK = 64 << 20
"""Bytes for weights, optimizer, cuBLAS and what the allocator rounds up."""


@pytest.fixture(scope="module")
def deep_project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A model that is deep enough for its activations to take hundreds of megabytes."""
    return Project(tmp_path_factory.mktemp("deep"), rows=192, hidden_size=512, intermediate_size=1024, num_hidden_layers=6)


@pytest.fixture
def limit() -> Iterator[Callable[[float], None]]:
    """Limits the GPU memory that PyTorch may take beyond what it has now."""

    def set_limit(more: float) -> None:
        gc.collect()
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + more) / total)

    yield set_limit
    torch.cuda.set_per_process_memory_fraction(1.0)


class Choices:
    """The plans that were chosen, and from what."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.known: list[Known] = []
        self.plans: list[Plan | None] = []
        choose = memory.choose_plan

        def recorded(known: Known) -> Plan | None:
            self.known.append(known)
            self.plans.append(choose(known))
            return self.plans[-1]

        monkeypatch.setattr(memory, "choose_plan", recorded)


def used_tokens(said: str) -> int:
    """The tokens of a micro-batch in the line that `train` prints."""
    found = re.search(r"micro-batches of up to ([\d,]+) tokens", said)
    assert found, said
    return int(found[1].replace(",", ""))


def test_little_memory_gives_the_same_loss(
    deep_project: Project,
    scratch: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    limit: Callable[[float], None],
) -> None:
    choices = Choices(monkeypatch)
    wanted = curve(run(deep_project, scratch / "ample", **GIVEN))
    ample_said = capsys.readouterr().out
    (known,), (ample,) = choices.known, choices.plans
    assert ample is not None
    assert known.plain is not None
    assert ample.checkpointed_blocks == 0, ample_said
    assert used_tokens(ample_said) == ample.tokens == known.step_tokens
    report = json.loads((scratch / "ample" / "report.json").read_text())
    optimizer = ADAM_BYTES * report["trainable_parameters"]
    needs = {
        # Half of the tokens of a step without checkpointing; or with it in all blocks, little more than for the trials.
        "half": known.plain.fixed + known.plain.slope * known.step_tokens / 2 + known.dequantized_bytes,
        "checkpointed": known.checkpointed.fixed + known.checkpointed.slope * 1.1 * memory.PROBES[1],
    }
    for name, need in needs.items():
        with monkeypatch.context() as patch:
            patch.setattr(memory, "free_bytes", lambda need=need: need + optimizer)
            limit(need + SLACK)
            found = curve(run(deep_project, scratch / name, **GIVEN))
        said = capsys.readouterr().out
        plan = choices.plans[-1]
        details = f"{name}: {need / 2**20:.0f} MiB, {plan}\n{known}\n{said}"
        assert plan is not None, details
        assert plan.checkpointed_blocks == 6 or name == "half", details
        assert plan != ample, details
        # What is extrapolated may be a little too small; two trials with fewer tokens at most.
        assert 0.6 * plan.tokens < used_tokens(said) <= plan.tokens, details
        # Rounding to bfloat16 is up to 2^-8 of each activation; the loss is a mean over a thousand labels.
        assert found == pytest.approx(wanted, rel=5e-3), details


def test_a_plan_that_does_not_fit_after_all_is_tried_with_fewer_tokens(
    deep_project: Project,
    scratch: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    limit: Callable[[float], None],
) -> None:
    choices = Choices(monkeypatch)
    given = GIVEN | {"gradient_checkpointing": False}
    wanted = curve(run(deep_project, scratch / "ample", **given))
    capsys.readouterr()
    (known,) = choices.known
    assert known.plain is not None
    monkeypatch.setattr(memory, "free_bytes", lambda: 1e12)  # more than there is
    limit(known.plain.fixed + known.plain.slope * known.step_tokens * 0.6 + known.dequantized_bytes + SLACK)
    found = curve(run(deep_project, scratch / "little", **given))
    said = capsys.readouterr().out
    plan = choices.plans[-1]
    assert plan is not None
    assert plan.tokens == known.step_tokens
    assert known.longest_row <= used_tokens(said) < known.step_tokens, f"{known}\n{said}"
    assert found == pytest.approx(wanted, rel=5e-3), said
