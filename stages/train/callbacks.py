"""What happens between optimizer steps: progress is shown, summed weights are invalidated, and the loss must be finite."""

import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from transformers import TrainerCallback

from stages.core.problem import Problem
from stages.core.progress import ProgressBar
from stages.train.lora_layers import LoraLayers

NAMED_ROWS = 16
"""The maximum number of rows that a message names."""
REMEDY = "lower train.learning_rate, or set train.dtype to bfloat16 or float32"


def say(line: str) -> None:
    """Prints a line. A terminal that was closed, or a log on a full disk, does not end a training."""
    try:
        print(line, flush=True)
    except OSError:
        return


class Progress(TrainerCallback):  # type: ignore[misc]
    """Shows a progress bar on a terminal, and a line every `logging_steps` in a log."""

    def __init__(self, mean_row_tokens: float) -> None:
        self.tokens_per_second = 0.0
        self._mean_row_tokens = mean_row_tokens
        self._bar: ProgressBar | None = None
        self._start: tuple[int, float] | None = None
        """Optimizer step and time from which the speed is measured."""
        self._steps = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Called by the Trainer before the first step."""
        if sys.stderr.isatty() and state.is_world_process_zero:
            self._bar = ProgressBar("train", state.max_steps, "steps", initial=state.global_step)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Called by the Trainer after the last step."""
        if self._bar is not None:
            self._bar.close()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Called by the Trainer before each optimizer step."""
        self._start = self._start or (state.global_step, time.monotonic())

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Called by the Trainer after each optimizer step."""
        self._steps += 1
        if self._steps == 1 and state.global_step < state.max_steps:
            # The first step compiles kernels, so the speed is measured from its end, when the GPU has finished it.
            if args.device.type == "cuda":
                torch.cuda.synchronize()
            self._start = (state.global_step, time.monotonic())
        if self._bar is not None:
            self._bar.update()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        """Called by the Trainer at each point of a curve."""
        if "loss" not in logs or not self._start or state.global_step == self._start[0]:
            return
        steps, seconds = state.global_step - self._start[0], time.monotonic() - self._start[1]
        rows = steps * args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        self.tokens_per_second = rows * self._mean_row_tokens / seconds
        figures = f"loss {logs['loss']:.4f}, {self.tokens_per_second:,.0f} tokens/s"
        if self._bar is not None:
            self._bar.set_postfix_str(figures)
        elif state.is_world_process_zero:
            minutes_left = seconds / steps * (state.max_steps - state.global_step) / 60
            say(f"train: step {state.global_step}/{state.max_steps}, {figures}, {minutes_left:.1f} min left")


class InvalidateWeights(TrainerCallback):  # type: ignore[misc]
    """Tells the fast layers after each optimizer step that lora_A and lora_B have changed."""

    def __init__(self, lora_layers: LoraLayers) -> None:
        self._lora_layers = lora_layers

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Called by the Trainer."""
        self._lora_layers.invalidate()


class FiniteLoss(TrainerCallback):  # type: ignore[misc]
    """Raises Problem with the rows of the first micro-batch whose loss is not finite.

    It looks at the losses only where a curve or a checkpoint is written, since looking makes the CPU wait for the GPU.
    """

    def __init__(self) -> None:
        self._losses: list[tuple[torch.Tensor, Sequence[str]]] = []

    def add(self, loss: torch.Tensor, ids: Sequence[str]) -> None:
        """Notes the loss of a micro-batch and the ids of its rows."""
        self._losses.append((loss, ids))

    def clear(self) -> None:
        """Forgets what was noted."""
        self._losses.clear()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Called by the Trainer after each optimizer step."""
        if not (control.should_log or control.should_save or control.should_evaluate or control.should_training_stop):
            return
        losses, self._losses = self._losses, []
        for loss, ids in losses:
            if not torch.isfinite(loss):
                rows = ", ".join(ids[:NAMED_ROWS]) + (", ..." if len(ids) > NAMED_ROWS else "")
                raise Problem(
                    f"the loss is {loss.item()} in a batch before step {state.global_step}, in the rows {rows} of "
                    f"data/examples; {REMEDY}"
                )
