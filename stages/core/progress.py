"""The progress bar of all stages: a bar on a terminal, an occasional line in a log."""

import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from tqdm import tqdm

T = TypeVar("T")

LOG_INTERVAL_S = 15.0
LOG_FORMAT = "{desc}: {n_fmt} of {total_fmt}{unit} ({percentage:.0f} %), {rate_fmt}, {remaining} left"
LOG_FORMAT_WITHOUT_TOTAL = "{desc}: {n_fmt}{unit}, {rate_fmt}"


class ProgressBar(tqdm):  # type: ignore[misc]
    """tqdm that writes whole lines if stderr is not a terminal."""

    def __init__(self, desc: str, total: int | None = None, unit: str = "rows", **settings: Any) -> None:
        """`settings` are tqdm's."""
        self._terminal = sys.stderr.isatty()
        self.disable: bool
        super().__init__(
            desc=desc,
            total=total,
            unit=f" {unit}",
            file=sys.stderr,
            dynamic_ncols=True,
            mininterval=0.1 if self._terminal else LOG_INTERVAL_S,
            maxinterval=LOG_INTERVAL_S,
            bar_format=None if self._terminal else LOG_FORMAT if total else LOG_FORMAT_WITHOUT_TOTAL,
            **settings,
        )

    def display(self, msg: str | None = None, pos: int | None = None) -> Any:
        """Called by tqdm when there is something new to show."""
        if self._terminal:
            return super().display(msg, pos)
        if self.n > self.initial:  # not the empty bar at the start
            print(msg or str(self), file=sys.stderr, flush=True)
        return True

    def close(self) -> None:
        """Leaves the bar on a terminal; writes nothing more into a log."""
        if not self._terminal and not self.disable:
            self.disable = True
            self._decr_instances(self)
        super().close()


def progress(
    items: Iterable[T], desc: str, total: int | None = None, unit: str = "rows", size: Callable[[T], int] = lambda _: 1
) -> Iterator[T]:
    """Yields `items`, and shows how many are done, and out of how many if `total` is known.

    `size` returns the number of units that an item counts for.
    """
    with ProgressBar(desc, total, unit) as bar:
        for item in items:
            yield item
            bar.update(size(item))
