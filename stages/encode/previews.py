"""Chooses the training rows that the masks page shows: the first of each kind that occurs."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from stages.encode.rows import TokenRow

SHOWN = 24
"""Conversations on the masks page."""
KEPT = 200
"""Conversations of different kinds that are kept to choose from."""


class Preview(NamedTuple):
    """A conversation that the page may show."""

    example: dict[str, Any]
    rows: list[TokenRow]

    @property
    def kinds(self) -> tuple[str, ...]:
        """What is special about it: its format, and names of KINDS in stages/encode/masks_page.py."""
        rows = self.rows
        found = {
            "thinking": any(row.thinking for row in rows),
            "tools": rows[0].tools,
            "turns": rows[0].turns > 1,
            "per_answer": rows[0].split_answers > 1,
            "untrained": rows[0].untrained,
            "cut": any(row.tokens_cut for row in rows),
            "special_text": any(row.special_text for row in rows),
        }
        return (rows[0].format, *(name for name, is_so in found.items() if is_so))


class Previews:
    """The first conversation of each combination of kinds and of each file."""

    def __init__(self) -> None:
        self._first: dict[tuple[Any, ...], Preview] = {}
        self._kinds: set[str] = set()

    def __iter__(self) -> Iterator[Preview]:
        return iter(self._first.values())

    def add(self, example: dict[str, Any], rows: list[TokenRow]) -> None:
        """Keeps the conversation if it is the first of its kinds."""
        key = _key(rows)
        if key in self._first:
            return
        preview = Preview(example, rows)
        if len(self._first) < KEPT or not self._kinds.issuperset(preview.kinds):
            self._first[key] = preview
            self._kinds.update(preview.kinds)

    def choose(self) -> list[Preview]:
        """Those to show, in order: every kind that occurs at least once, then further combinations and files."""
        shown: set[str] = set()
        chosen = []
        for number, preview in enumerate(self):
            if not shown.issuperset(preview.kinds):
                shown.update(preview.kinds)
                chosen.append(number)
        chosen += [number for number in range(len(self._first)) if number not in chosen]
        previews = list(self)
        return [previews[number] for number in sorted(chosen[:SHOWN])]


def _key(rows: Sequence[TokenRow]) -> tuple[Any, ...]:
    """The conversation's file and kinds; computed for every conversation, so it must take no time."""
    row = rows[0] if len(rows) == 1 else max(rows, key=lambda row: row.tokens_cut)
    file, several, is_cut = row.source.rpartition(":")[0], row.split_answers > 1, row.tokens_cut > 0
    return file, row.format, row.thinking, row.tools, row.turns > 1, several, is_cut, row.special_text, row.untrained
