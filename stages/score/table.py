"""The table that is printed at the end of a run."""

from collections.abc import Mapping
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from stages.score.intervals import Interval
from stages.score.metrics import HEADLINE
from stages.score.perplexity import Perplexity
from stages.score.systems import SYSTEMS


class Counts(NamedTuple):
    """What the scores are of."""

    rows: str
    """"1,000 of 125,000 test rows"; "" without any."""
    texts: str
    """The same of raw texts."""


def count_of(count: int, total: int) -> str:
    """ "1,000 of 125,000", or "400" if these are all."""
    return f"{count:,} of {total:,}" if count < total else f"{count:,}"


def print_table(
    summary: Mapping[str, Mapping[str, Interval | None]],
    differences: Mapping[str, Mapping[str, Interval | None]],
    *,
    counts: Counts,
    perplexity: Perplexity | None,
) -> None:
    """Prints the headline metrics of each system, and by how much the fine-tuned model differs from each of the others.

    The perplexity of both models follows, if there is raw text.
    """
    console = Console(width=120)
    if counts.rows:
        _print_scores(console, summary, differences, title=f"{counts.rows}, mean and 95 % interval, in percent")
    if perplexity:
        console.print(
            f"perplexity per token on {counts.texts}: base model {_number(perplexity.base)}, "
            f"fine-tuned model {_number(perplexity.merged)}; difference {_number(perplexity.difference)}"
        )


def _print_scores(
    console: Console,
    summary: Mapping[str, Mapping[str, Interval | None]],
    differences: Mapping[str, Mapping[str, Interval | None]],
    *,
    title: str,
) -> None:
    metrics = [metric for metric in HEADLINE if summary["merged"][metric]]
    table = Table(title=title)
    table.add_column("")
    for metric in metrics:
        table.add_column(metric, justify="right")
    for system, name in SYSTEMS.items():
        table.add_row(name, *(_cell(summary[system][metric]) for metric in metrics))
    console.print(table)
    for other, difference in differences.items():
        if difference["exact_match"]:
            console.print(f"exact match, fine-tuned minus {SYSTEMS[other]}: {_cell(difference['exact_match'])} points")


def _number(interval: Interval) -> str:
    return f"{interval.mean:.4g} ({interval.low:.4g} to {interval.high:.4g})"


def _cell(interval: Interval | None) -> str:
    return "" if interval is None else f"{100 * interval.mean:.1f} ({100 * interval.low:.1f} to {100 * interval.high:.1f})"
