"""How a GPU's memory is used: the plan for measured figures, and the stage with a simulated GPU memory."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from stages.core.problem import Problem
from stages.train import memory_fit
from stages.train.gradient_checkpointing import decoder_blocks, is_checkpointed
from stages.train.memory import PROBES, Known, Need, Plan, choose_plan
from stages.train.trainer import AdapterTrainer
from tests.runs import run
from tests.tiny import Workspace

GB = 1e9
# As measured for an 8B model in bfloat16: all activations, and only the input of each block.
PLAIN, CHECKPOINTED = Need(3 * GB, 3.0e6), Need(3 * GB, 0.4e6)


def find_plan(free: float, **changed: Any) -> Plan | None:
    known = Known(
        free_bytes=free,
        plain=PLAIN,
        checkpointed=CHECKPOINTED,
        dequantized_bytes=int(14 * GB),
        blocks=32,
        step_tokens=32_768,
        longest_row=2048,
    )
    return choose_plan(dataclasses.replace(known, **changed))


def plan(free: float, **changed: Any) -> Plan:
    found = find_plan(free, **changed)
    assert found is not None
    return found


def bytes_of(found: Plan) -> float:
    slope = PLAIN.slope + found.checkpointed_blocks / 32 * (CHECKPOINTED.slope - PLAIN.slope)
    return 3 * GB + found.tokens * slope + 14 * GB * found.keeps_dequantized


def test_the_chosen_plan_fits() -> None:
    for free in (4, 6, 12, 18, 30, 50, 70, 130):
        assert bytes_of(plan(free * GB)) <= free * GB


def test_a_large_gpu_needs_no_checkpointing_and_a_small_one_still_trains() -> None:
    assert plan(200 * GB) == Plan(32_768, 0, True)
    small = plan(6 * GB)
    assert small.checkpointed_blocks == 32
    assert small.tokens >= 2048
    assert find_plan(3.1 * GB) is None


def test_a_micro_batch_holds_the_longest_row_and_no_more_than_a_step() -> None:
    assert plan(200 * GB, step_tokens=900, longest_row=2048).tokens == 2048
    assert plan(200 * GB, step_tokens=5000, longest_row=100).tokens == 5000


def test_the_plan_keeps_to_what_the_user_has_set() -> None:
    assert plan(200 * GB, checkpointed_blocks=32).checkpointed_blocks == 32
    assert plan(40 * GB, checkpointed_blocks=0).checkpointed_blocks == 0
    assert not plan(200 * GB, dequantized_bytes=0).keeps_dequantized, "there is nothing to dequantize"


def test_a_gpu_too_small_for_the_trial_without_checkpointing_checkpoints_all_blocks() -> None:
    assert plan(6 * GB, plain=None).checkpointed_blocks == 32
    assert find_plan(6 * GB, plain=None, checkpointed_blocks=0) is None


def test_the_need_is_extrapolated_from_two_trials() -> None:
    few, many = PROBES
    assert Need.of((few, 1_000_000 + 300 * few), (many, 1_000_000 + 300 * many)) == Need(1_000_000, 300)


@pytest.mark.parametrize("longest", [3, 100, 1000, 2048, 5000])
def test_trial_rows_are_no_longer_than_those_of_the_data(longest: int) -> None:
    few, many = memory_fit._trial_batches(longest)
    assert {len(row["input_ids"]) for row in many} == {min(longest, 2048)}
    for batch, tokens in zip((few, many), PROBES, strict=True):
        assert 0.45 * tokens < sum(len(row["input_ids"]) for row in batch) <= tokens
    labels = [sum(int((row["labels"] != -100).sum()) for row in batch) for batch in (few, many)]
    assert labels[0] == labels[1] == len(few) * (min(longest, 2048) - 1)


# In the stage, with a simulated GPU memory


def pretend(monkeypatch: pytest.MonkeyPatch, free: float, *, small: bool = False) -> list[list[int]]:
    """A GPU with `free` bytes; a token needs 100 bytes in each block without checkpointing.

    With `small`, a trial that needs more than that fails. Returns the row lengths of each trial.
    """
    trials: list[list[int]] = []
    real = AdapterTrainer.try_batch

    def peak(trainer: Any, rows: Any) -> int:
        blocks = decoder_blocks(trainer.model)
        plain = len(blocks) - sum(map(is_checkpointed, blocks))
        return sum(len(row["input_ids"]) for row in rows) * (20 + 100 * plain)

    def attempt(self: Any, rows: Any) -> None:
        trials.append([len(row["input_ids"]) for row in rows])
        if small and rows[0]["id"] != "trial" and peak(self, rows) > free:
            raise Problem("out of memory")
        real(self, rows)

    monkeypatch.setattr(memory_fit, "_has_choice", lambda _: True)
    monkeypatch.setattr(memory_fit, "_peak_bytes", lambda trainer, rows: trainer.try_batch(rows) or peak(trainer, rows))
    monkeypatch.setattr(memory_fit, "ADAM_BYTES", 0)
    monkeypatch.setattr(AdapterTrainer, "try_batch", attempt)
    monkeypatch.setattr("stages.train.memory.free_bytes", lambda: free)
    return trials


def curve(out: Path) -> list[float]:
    return [float(line.split(",")[1]) for line in (out / "loss" / "train.csv").read_text().splitlines()[1:]]


def test_the_plan_changes_the_result_only_by_rounding(
    workspace: Workspace, scratch: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"gradient_checkpointing": "auto", "per_device_train_batch_size": 8, "training_arguments": {"max_steps": 4}}
    wanted = curve(run(workspace, scratch / "a", **given))
    cases = [
        (1e9, "in 0 of 2 blocks"),
        (130 * 220, "of 2 blocks"),
        (130 * 20, "in 2 of 2 blocks"),
    ]
    for number, (free, line) in enumerate(cases):
        with monkeypatch.context() as patch:
            pretend(patch, free)
            assert curve(run(workspace, scratch / str(number), **given)) == pytest.approx(wanted, rel=1e-5)
        assert line in capsys.readouterr().out


def test_a_plan_that_does_not_fit_after_all_is_tried_with_fewer_tokens(
    workspace: Workspace, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"gradient_checkpointing": "auto", "per_device_train_batch_size": 8, "training_arguments": {"max_steps": 2}}
    trials = pretend(monkeypatch, 200 * 220, small=True)
    monkeypatch.setattr("stages.train.memory.free_bytes", lambda: 1e6)  # more than is free
    run(workspace, scratch / "out", **given)
    sizes = [sum(rows) for rows in trials if sum(rows) < 1000]
    assert len(sizes) > 1
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] <= 200
    monkeypatch.setattr(AdapterTrainer, "try_batch", _out_of_memory)
    with pytest.raises(Problem, match="out of memory"):
        run(workspace, scratch / "none", **given)


def _out_of_memory(*_: Any) -> None:
    raise Problem("out of memory")
