"""How far a mean can be trusted: bootstrap intervals over the rows of a test set."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

SEED = 0
CONFIDENCE = 0.95


class Interval(NamedTuple):
    """A mean, and the bounds between which it lies with 95 % confidence."""

    mean: float
    low: float
    high: float


def bootstrap(values: Sequence[float], resamples: int) -> Interval:
    """Percentile bootstrap of the mean (Efron 1979): the rows are drawn again, with replacement, `resamples` times.

    For the difference of two models on the same rows, pass the differences row by row (a paired bootstrap).
    The same values give the same interval.
    """
    data = np.asarray(values, dtype=float)
    rng = np.random.default_rng(SEED)
    means = np.array([data[rng.integers(0, len(data), len(data))].mean() for _ in range(resamples)])
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(float(data.mean()), float(low), float(high))
