"""Ctrl-C, kill and a closed terminal: the training saves a checkpoint after the current step, then stops."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from transformers import TrainerCallback

from stages.train.callbacks import say

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interruption(TrainerCallback):  # type: ignore[misc]
    """Whether the training was interrupted. As a callback, it saves a checkpoint and stops the training if so."""

    def __init__(self) -> None:
        self.requested = False

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Within the block, the first signal requests the interruption; a second one raises KeyboardInterrupt at once."""
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread may set signal handlers
            return

        def interrupt(_number: int, _frame: FrameType | None) -> None:
            if self.requested:
                raise KeyboardInterrupt
            self.requested = True
            with suppress(RuntimeError):  # the signal came while the training itself was printing
                say("train: interrupted; saving a checkpoint after this step")

        # nohup ignores SIGHUP, so that the run survives its terminal.
        ignored = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else set()
        before = {number: signal.signal(number, interrupt) for number in SIGNALS if number not in ignored}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Called by the Trainer after each optimizer step."""
        if self.requested:
            control.should_save = control.should_training_stop = True
