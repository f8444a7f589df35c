"""A merged weight beside the right one: the trained weight, rounded as the files round it.

The two models are not in memory at the same time. Of a right weight its products with a few random vectors are kept. Those
of a wrong weight differ: if D is the difference of the weights, the mean of |D z|² over normally distributed z is the square
of D's Frobenius norm (Freivalds 1977, Hutchinson 1990).
"""

from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import torch

PROBES = 8
"""The number of random vectors. Products with them are in float64, so that a small delta weight is not lost in them."""
BLOCK = 1 << 24
"""Weights that are computed at a time: 64 MB in float32."""
ARITHMETIC = 2.0**-20
"""The part of a weight that may come from the order in which float32 numbers are added."""
UNADAPTED = 0.01
"""Errors of a quantized weight without an adapter are counted in this part of it. So the largest error that passes is 0.1 %
of the weight; quantization changes it by 9 % in 4 bits and by 0.5 % in 8 bits."""


class LayerCheck(NamedTuple):
    """How far a merged weight is from the right one."""

    error: float
    """‖merged - right‖ / ‖change‖, where the change is what merging was to change in the weight as the files store it."""
    share: float | None
    """How much of the change it has: 1 for all of it, 0 if the layer was left out. None if the layer has no adapter."""


class RightWeight:
    """What is kept of a weight (out, in) as it must be in the merged model, given a few rows at a time."""

    def __init__(self, *, adapted: bool, stored: torch.dtype, loaded: torch.dtype) -> None:
        """Args:
        adapted: Whether it has an adapter.
        stored: The dtype of the files, to which merging rounds it.
        loaded: The dtype in which the merged model has it.
        """
        self.adapted, self.stored, self._loaded = adapted, stored, loaded
        self._products: list[torch.Tensor] = []
        self._changes: list[torch.Tensor] = []
        self.along = self.length = 0.0
        """The inner products of the delta weight with what the files have of it, and with itself."""

    def add(self, start: torch.Tensor, trained: torch.Tensor) -> torch.Tensor:
        """Adds the next rows.

        Args:
            start: (rows, in) in float32: the base's weight before the training.
            trained: (rows, in) in float32: the sum with the delta weight, not rounded.

        Returns:
            The rows as the merged model must have them, in float64.
        """
        probes = _probes(start.shape[1]).to(start.device)
        rounded = trained.to(self.stored)
        change, delta = rounded.double() - start, trained.double() - start
        self.along += float((change * delta).sum())
        self.length += float((delta**2).sum())
        right = rounded.to(self._loaded).double()
        products = right @ probes
        self._products.append(products.cpu())
        if self.adapted:
            self._changes.append((products - start.double() @ probes).cpu())
        return right

    def check(self, merged: torch.Tensor) -> LayerCheck:
        """A merged model's weight (out, in) in any dtype, beside this one."""
        right = torch.cat(self._products)
        probes = _probes(merged.shape[1]).to(merged.device)
        error = torch.cat([(merged[rows].double() @ probes).cpu() for rows in blocks(merged)]) - right
        floor = ARITHMETIC * right.norm()
        if not self.adapted:
            return LayerCheck(float(error.norm() / (UNADAPTED * right.norm() + floor)), None)
        change = torch.cat(self._changes)
        size = change.norm()
        share = 1 + float((error * change).sum() / size**2) if size else 1.0
        return LayerCheck(float(error.norm() / (size + floor)) if error.any() else 0.0, share)


def blocks(weight: torch.Tensor) -> Iterator[slice]:
    """Slices of the rows of a weight, with BLOCK weights each."""
    size = max(1, BLOCK // weight.shape[1])
    return (slice(start, start + size) for start in range(0, weight.shape[0], size))


@cache  # a model has a few sizes, and thousands of experts
def _probes(columns: int) -> torch.Tensor:
    """(columns, PROBES) in float64 on the CPU: normally distributed, always the same."""
    return torch.randn(columns, PROBES, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
