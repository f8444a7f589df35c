"""How far a long loop is: a bar on a terminal, a line now and then in a log."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")

SECONDS_BETWEEN_LINES = 15.0


def progress(
    items: Iterable[T], label: str, total: int | None = None, size: Callable[[T], int] = lambda _: 1
) -> Iterator[T]:
    """Hands `items` on, and says on stderr how many there were, and of how many if `total` is known.

    `size` tells how many an item counts for.
    """
    terminal = sys.stderr.isatty()
    started = last = time.monotonic()
    count = 0
    for item in items:
        yield item
        count += size(item)
        now = time.monotonic()
        if now - last > (0.1 if terminal else SECONDS_BETWEEN_LINES):
            last = now
            _say(label, count, total, now - started, terminal)
    if terminal and last > started:
        _say(label, count, total, time.monotonic() - started, terminal)
        print(file=sys.stderr)


def _say(label: str, count: int, total: int | None, seconds: float, terminal: bool) -> None:
    of = f"/{total:,} ({count / total:.0%})" if total else ""
    line = f"{label}: {count:,}{of}, {count / seconds:,.0f} a second"
    print(f"\r{line}" if terminal else line, end="" if terminal else "\n", file=sys.stderr, flush=True)
