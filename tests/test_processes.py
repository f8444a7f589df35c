"""Several processes: stray variables of torchrun are refused, and Ctrl-C is an interruption."""

import os
import signal
import time

import pytest

from stages.core.problem import Problem
from stages.model import distributed


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE"])
def test_a_rank_without_torchrun_is_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    monkeypatch.setenv(name, "2")
    with pytest.raises(Problem, match=f"variable {name} is set, but MASTER_ADDR is not.*`unset RANK WORLD_SIZE LOCAL_RANK`"):
        distributed.rank(), distributed.world_size()
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    assert 2 in (distributed.rank(), distributed.world_size())


def interrupt_parent() -> None:
    os.kill(os.getppid(), signal.SIGINT)
    time.sleep(60)


def test_ctrl_c_interrupts_a_launch_and_the_signal_handlers_are_restored() -> None:
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        distributed.launch(interrupt_parent, 1)
    assert signal.getsignal(signal.SIGINT) is handler
