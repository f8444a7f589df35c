"""Confidence intervals of a mean over the rows of the test set."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from stages.core.progress import ProgressBar

Floats: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]

SEED = 0
CONFIDENCE = 0.95
RESAMPLES = 2000
UNIT = 2.0**-32
"""Values are rounded to multiples of it. Sums of up to two million of them are exact then, and the intervals depend neither
on the order in which a library adds, nor on the machine."""
BATCH = 100
"""Resamples that are multiplied at once: fewer read the values more often, more need more memory."""


class Interval(NamedTuple):
    """A mean and the bounds of its 95 % confidence interval."""

    mean: float
    low: float
    high: float


def mean_interval(values: Iterable[float | None]) -> Interval | None:
    """`mean_intervals` of a single column, in which None means that the metric does not apply to the row."""
    column = np.array([np.nan if value is None else value for value in values], dtype=float)
    return mean_intervals(column[:, None])[0]


def mean_intervals(columns: Floats, desc: str = "") -> list[Interval | None]:
    """The mean of each column with its percentile bootstrap interval (Efron 1979).

    The same values always give the same interval. For the difference between two systems on the same rows, pass the
    differences row by row (a paired bootstrap). Columns with the same number of values are computed on the same resamples,
    in one matrix product: the times that each row is drawn, by the values.

    Args:
        columns: (rows, columns) NaN means that the metric does not apply to the row; such rows are left out.
        desc: What the progress bar says; "": none.

    Returns:
        One for each column; None if it has no value.
    """
    found: list[Interval | None] = [None] * columns.shape[1]
    applies = ~np.isnan(columns)
    by_count: dict[int, list[int]] = {}
    for column, count in enumerate(applies.sum(0).tolist()):
        if count:
            by_count.setdefault(count, []).append(column)
    with ProgressBar(desc, RESAMPLES * len(by_count), "resamples", disable=not desc) as bar:
        for count, members in by_count.items():
            values = np.empty((count, len(members)))
            means = []
            for at, column in enumerate(members):
                values[:, at] = np.round(columns[applies[:, column], column] / UNIT) * UNIT
            for drawn in _resample(count):
                means.append(drawn @ values / count)
                bar.update(len(drawn))
            for column, *bounds in zip(members, *_bounds(np.concatenate(means)), strict=True):
                mean = columns[applies[:, column], column].mean()
                found[column] = Interval(float(mean), *map(float, bounds))
    return found


def resampled_interval(units: Floats, statistics: Callable[[Floats], Floats]) -> list[Interval]:
    """The percentile bootstrap intervals of statistics that are no means of rows, as a ratio of two sums.

    All statistics are computed on the same resamples, so those of two systems are paired.

    Args:
        units: (units, sums) What is resampled, as documents: the sums over each.
        statistics: (..., sums), the sums over all units of a sample, to (..., statistics).

    Returns:
        One for each statistic.
    """
    low, high = _bounds(np.concatenate([statistics(drawn @ units) for drawn in _resample(len(units))]))
    means = statistics(units.sum(0))
    return [Interval(*map(float, values)) for values in zip(means, low, high, strict=True)]


def _resample(count: int) -> Iterator[Floats]:
    """(BATCH, count) How often each unit is drawn, until there are RESAMPLES. The array is used again for the next."""
    rng = np.random.default_rng(SEED)
    drawn = np.empty((BATCH, count))
    for _ in range(RESAMPLES // BATCH):
        for row in drawn:
            row[:] = np.bincount(rng.integers(0, count, count), minlength=count)
        yield drawn


def _bounds(statistics: Floats) -> tuple[Floats, Floats]:
    """The bounds of the interval of each statistic, from (resamples, statistics)."""
    # scipy's bootstrap interpolates as (1 - g) * a + g * b, which is not exactly a where a == b. For a share such as 181 of
    # 400, 45.25 %, that last bit decides the digit that is printed. np.quantile is exact there.
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(statistics, [tail, 1 - tail], axis=0)
    return low, high
