"""Ctrl-C, kill and a closed terminal: the training saves a checkpoint after the current step, then stops."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from transformers import TrainerCallback

from stages.model import distributed
from stages.model.launch import SIGNALS, ends_at_once, ignored_signals
from stages.train.callbacks import say


class Interruption(TrainerCallback):  # type: ignore[misc]
    """Whether the training was interrupted. As a callback, it saves a checkpoint and stops the training if so.

    Several processes stop after the same step: after each step they exchange whether one of them got a signal.
    """

    def __init__(self) -> None:
        self.requested = 0
        """The number of the signal that interrupts the training; 0 if none does. With several processes it is the same in
        all of them when the training has stopped."""
        self._requested_at = 0.0
        self._said = False

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Within the block, the first signal requests the interruption.

        In a single process a second one raises KeyboardInterrupt at once, unless it is the first one, repeated. Of several
        processes only the one that has started them ends them.
        """
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread may set signal handlers
            return

        def interrupt(number: int, _frame: FrameType | None) -> None:
            if not self.requested:
                self.requested, self._requested_at = number, time.monotonic()
                self._say()
            elif distributed.world_size() == 1 and ends_at_once(number, time.monotonic() - self._requested_at):
                raise KeyboardInterrupt(number)

        before = {number: signal.signal(number, interrupt) for number in set(SIGNALS) - ignored_signals()}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Called by the Trainer after each optimizer step."""
        # A signal may come during the exchange: it stays requested, and counts in the next step.
        agreed = distributed.largest(self.requested)
        if agreed:
            self.requested = agreed
            self._say()
            control.should_save = control.should_training_stop = True

    def _say(self) -> None:
        """Prints a line, once, in one process."""
        if not self._said and distributed.is_main():
            self._said = True
            with suppress(RuntimeError):  # the signal came while the training itself was printing
                say("train: interrupted; saving a checkpoint after this step")
