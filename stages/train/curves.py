"""The training curve: the mean loss of the optimizer steps between two points."""

from typing import Any

import torch


class TrainingLoss:
    """Sums the loss of the steps since the last point of the curve.

    Transformers sums it too, but a resumed run starts again at zero there.
    """

    def __init__(self, accelerator: Any, device: torch.device) -> None:
        self._accelerator = accelerator
        self._sum, self._last_step = torch.zeros((), device=device), 0

    def add(self, loss: torch.Tensor) -> None:
        """Adds the loss of one step of this process."""
        self._sum += loss

    def point(self, step: int) -> float:
        """The mean loss of the steps since the last point, over all processes. The next point starts after `step`."""
        loss = self._mean_over_processes() / (step - self._last_step)
        self._sum.zero_()
        self._last_step = step
        return loss

    def state(self) -> dict[str, float]:
        """What a checkpoint must hold. To be called in all processes."""
        return {"loss_since_log": self._mean_over_processes(), "last_logged": self._last_step}

    def load(self, state: dict[str, Any]) -> None:
        """Continues from a checkpoint's state."""
        self._sum.fill_(state["loss_since_log"])
        self._last_step = state["last_logged"]

    def _mean_over_processes(self) -> float:
        return float(self._accelerator.reduce(self._sum.clone(), "mean"))
