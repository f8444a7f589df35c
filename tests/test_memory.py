"""What a GPU's memory is spent on, worked out on figures and with a memory that is made up."""

from pathlib import Path
from typing import Any

import pytest

from stages.core.problem import Problem
from stages.train.gradient_checkpointing import decoder_blocks
from stages.train.memory import PROBES, Need, Plan, choose
from stages.train.trainer import AdapterTrainer
from tests.runs import run
from tests.tiny import Workspace

GB = 1e9
# As measured for an 8B model in bfloat16: activations, and the input of each block alone.
KEPT, TWICE = Need(3 * GB, 3.0e6), Need(3 * GB, 0.4e6)


def plan(
    free: float, step: int = 32_768, longest: int = 2048, recomputed: int | None = None, weights: int = int(14 * GB)
) -> Plan:
    found = choose(free, KEPT, TWICE, weights, 32, step, longest, recomputed)
    assert found is not None
    return found


def bytes_of(found: Plan) -> float:
    slope = KEPT.slope + found.recomputed / 32 * (TWICE.slope - KEPT.slope)
    return 3 * GB + found.tokens * slope + 14 * GB * found.keeps_weights


def test_what_is_chosen_fits_and_more_memory_is_never_slower() -> None:
    for free in (4, 6, 12, 18, 30, 50, 70, 130):
        assert bytes_of(plan(free * GB)) <= free * GB


def test_a_large_card_computes_nothing_twice_and_a_small_one_still_trains() -> None:
    assert plan(200 * GB) == Plan(32_768, 0, True)
    small = plan(6 * GB)
    assert small.recomputed == 32
    assert small.tokens >= 2048
    assert choose(3.1 * GB, KEPT, TWICE, int(14 * GB), 32, 32_768, 2048, None) is None


def test_a_micro_batch_holds_the_longest_row_and_no_more_than_a_step() -> None:
    assert plan(200 * GB, step=900, longest=2048).tokens == 2048
    assert plan(200 * GB, step=5000, longest=100).tokens == 5000


def test_what_the_user_has_set_is_not_chosen() -> None:
    assert plan(200 * GB, recomputed=32).recomputed == 32
    assert plan(40 * GB, recomputed=0).recomputed == 0
    assert not plan(200 * GB, weights=0).keeps_weights, "nothing is packed"


def test_a_card_too_small_for_the_trial_computes_all_twice() -> None:
    found = choose(6 * GB, None, TWICE, int(14 * GB), 32, 32_768, 2048, None)
    assert found is not None
    assert found.recomputed == 32
    assert choose(6 * GB, None, TWICE, int(14 * GB), 32, 32_768, 2048, 0) is None


def test_the_need_follows_from_two_trials() -> None:
    few, many = PROBES
    assert Need.of(1_000_000 + 300 * few, 1_000_000 + 300 * many) == Need(1_000_000, 300)


# In the stage, with a memory that is made up


def pretend(monkeypatch: pytest.MonkeyPatch, free: float, *, small: bool = False) -> list[list[int]]:
    """A GPU with so many free bytes; a token needs 100 in each block that keeps all. Returns the rows of each trial."""
    trials: list[list[int]] = []
    real = AdapterTrainer._try

    def peak(self: Any, rows: Any) -> int:
        twice = sum("computed_twice" in block.forward.__qualname__ for block in decoder_blocks(self.model))
        return sum(len(row["input_ids"]) for row in rows) * (20 + 100 * (len(decoder_blocks(self.model)) - twice))

    def attempt(self: Any, rows: Any) -> None:
        trials.append([len(row["input_ids"]) for row in rows])
        if rows[0]["id"] != "trial":  # too long for the tiny model
            if small and peak(self, rows) > free:
                raise Problem("out of memory")
            real(self, rows)

    monkeypatch.setattr(AdapterTrainer, "_may_choose", lambda _: True)
    monkeypatch.setattr(AdapterTrainer, "_peak", lambda self, rows: attempt(self, rows) or peak(self, rows))
    monkeypatch.setattr(AdapterTrainer, "_try", attempt)
    monkeypatch.setattr("stages.train.memory.free_bytes", lambda: free)
    monkeypatch.setattr("stages.train.trainer.ADAM_BYTES", 0)
    return trials


def curve(out: Path) -> list[float]:
    return [float(line.split(",")[1]) for line in (out / "loss" / "train.csv").read_text().splitlines()[1:]]


def test_what_fits_changes_the_result_by_rounding_alone(
    workspace: Workspace, scratch: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"gradient_checkpointing": "auto", "per_device_train_batch_size": 8, "training_arguments": {"max_steps": 4}}
    wanted = curve(run(workspace, scratch / "a", **given))
    for number, (free, said) in enumerate([(1e9, "0 of 2 blocks"), (130 * 220, "of 2 blocks"), (130 * 20, "2 of 2 blocks")]):
        with monkeypatch.context() as patch:
            pretend(patch, free)
            assert curve(run(workspace, scratch / str(number), **given)) == pytest.approx(wanted, rel=1e-5)
        assert said in capsys.readouterr().out


def test_a_plan_that_does_not_fit_after_all_takes_fewer_tokens(
    workspace: Workspace, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"gradient_checkpointing": "auto", "per_device_train_batch_size": 8, "training_arguments": {"max_steps": 1}}
    trials = pretend(monkeypatch, 200 * 220, small=True)
    monkeypatch.setattr("stages.train.memory.free_bytes", lambda: 1e6)  # more than there is
    run(workspace, scratch / "out", **given)
    sizes = [sum(rows) for rows in trials if rows[0] < 1000]
    assert len(sizes) > 1
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] <= 200
    monkeypatch.setattr(AdapterTrainer, "_try", _always_too_much)
    with pytest.raises(Problem, match="out of memory"):
        run(workspace, scratch / "none", **given)


def _always_too_much(*_: Any) -> None:
    raise Problem("out of memory")
