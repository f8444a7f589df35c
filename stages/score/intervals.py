"""Confidence intervals of a mean over the rows of the test set."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from scipy.stats import bootstrap  # type: ignore[import-untyped]

Floats: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]

SEED = 0
CONFIDENCE = 0.95
RESAMPLES = 2000
BATCH_VALUES = 2**20
"""Values that are resampled in one batch: 8 MB, and 8 MB for their indices."""


class Interval(NamedTuple):
    """A mean and the bounds of its 95 % confidence interval."""

    mean: float
    low: float
    high: float


def mean_interval(values: Iterable[float | None]) -> Interval | None:
    """The mean of `values` with its percentile bootstrap interval (Efron 1979).

    The same values always give the same interval. For the difference between two systems on the same rows, pass the
    differences row by row (a paired bootstrap).

    Args:
        values: One value per row. None means that the metric does not apply to the row; such rows are left out.

    Returns:
        None if no value is left.
    """
    data = np.array([value for value in values if value is not None], dtype=float)
    if not len(data):
        return None
    mean = float(data.mean())
    if len(data) == 1:  # scipy wants at least two values
        return Interval(mean, mean, mean)
    result = bootstrap(
        (data,),
        np.mean,
        n_resamples=RESAMPLES,
        batch=max(1, BATCH_VALUES // len(data)),
        vectorized=True,
        method="percentile",
        confidence_level=CONFIDENCE,
        rng=np.random.default_rng(SEED),
    )
    # Not result.confidence_interval: scipy interpolates as (1 - g) * a + g * b, which is not exactly a where a == b. For a
    # share such as 181 of 400, 45.25 %, that last bit decides the digit that is printed. np.quantile is exact there.
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(result.bootstrap_distribution, [tail, 1 - tail])
    return Interval(mean, float(low), float(high))


def resampled_interval(units: Floats, statistics: Callable[[Floats], Floats]) -> list[Interval]:
    """The percentile bootstrap intervals of statistics that are no means of rows, as a ratio of two sums.

    All statistics are computed on the same resamples, so those of two systems are paired.

    Args:
        units: (units, sums) What is resampled, as documents: the sums over each.
        statistics: (..., sums), the sums over all units of a sample, to (..., statistics).

    Returns:
        One for each statistic.
    """
    rng, count = np.random.default_rng(SEED), len(units)
    found = []
    batch = max(1, BATCH_VALUES // count)
    for start in range(0, RESAMPLES, batch):
        indices = rng.integers(0, count, (min(batch, RESAMPLES - start), count))
        weights = np.stack([np.bincount(row, minlength=count) for row in indices]).astype(float)
        found.append(statistics(weights @ units))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(np.concatenate(found), [tail, 1 - tail], axis=0)
    means = statistics(units.sum(0))
    return [Interval(*map(float, values)) for values in zip(means, low, high, strict=True)]
