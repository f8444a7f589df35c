"""Counts every row: read = kept + rejected, and kept = train + validation + test. Counts the fields that are not read."""

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

from stages.core.params import bad_param
from stages.core.problem import Problem, Rejection
from stages.ingest.checks import TooManyCharacters, count_characters
from stages.ingest.formats import Conversation
from stages.ingest.preference import OTHER_SIDE
from stages.ingest.raw_files import RawRow
from stages.ingest.splits import SPLITS

LEFT_OUT = ("duplicate", "near_duplicate", OTHER_SIDE)
"""Reasons that say nothing against a row. They are counted, and do not count towards max_rejected_percent."""
BY_KIND = ("unknown_format", "unknown_role")
"""Reasons whose first row is shown for each kind of row, since each needs a line of its own in params.yaml."""
SHOWN_KINDS = 5
SHOWN_FIELDS = 10
COUNTED_FIELDS, OTHER_FIELDS = 1000, "(further fields)"
"""Fields that are not read are counted by name up to this number, and then together: a name may be an id of its row."""
FIRST_ROWS = 1000
"""A file whose first rows are all rejected ends the run after this number of them: the others would be rejected too."""


class Accounting:
    """The counts of one run."""

    def __init__(self, *, max_rejected_percent: float) -> None:
        self.rows_read = 0
        self._held_out = 0
        """Rows of files that are named for validation or test."""
        self.kept: Counter[str] = Counter()
        """Rows kept, by split."""
        self.reasons: Counter[str] = Counter()
        """Rows rejected, by reason."""
        self._lengths: Counter[int] = Counter()
        """Kept rows by characters."""
        self._too_long: Counter[int] = Counter()
        """Rows that are rejected for their length, by characters."""
        self.unread: Counter[str] = Counter()
        """Rows kept that have a field which was not read, by field."""
        self.changes: Counter[str] = Counter()
        """Rows kept that were changed beyond their form, by change."""
        self._max_rejected_percent = max_rejected_percent
        self._first: dict[str, str] = {}
        self._kinds: dict[str, dict[str, str]] = {reason: {} for reason in BY_KIND}
        self._first_unread: dict[str, str] = {}
        self._files: dict[str, Counter[str]] = {}

    @property
    def left_out(self) -> int:
        """Rows rejected for a reason that says nothing against them."""
        return sum(self.reasons[reason] for reason in LEFT_OUT)

    @property
    def rejected(self) -> int:
        """Rows rejected for a fault."""
        return self.reasons.total() - self.left_out

    def read(self, row: RawRow) -> None:
        """Counts a row that was read; `keep` or `reject` must follow."""
        self.rows_read += 1
        self._held_out += row.forced_split is not None
        self._files.setdefault(row.file, Counter())["rows_read"] += 1

    def keep(self, row: RawRow, conversation: Conversation, *, split: str) -> None:
        """Counts a row that was kept, with what was not read of it and what was changed."""
        self.kept[split] += 1
        file = self._files[row.file]
        file["rows_kept"] += 1
        file[conversation.format] += 1
        self._lengths[count_characters(conversation.messages) + len(conversation.text or "")] += 1
        if conversation.unread:
            others = False
            for name in sorted(set(conversation.unread)):
                if name in self.unread or len(self.unread) < COUNTED_FIELDS:
                    self._count_unread(name, row)
                else:
                    others = True
            if others:
                self._count_unread(OTHER_FIELDS, row)
        if conversation.changes:
            self.changes.update(set(conversation.changes))

    def _count_unread(self, name: str, row: RawRow) -> None:
        self.unread[name] += 1
        self._first_unread.setdefault(name, row.source)

    def reject(self, row: RawRow, rejection: Rejection) -> None:
        """Counts a row that was rejected. Raises Problem if no row of a long file fits, see FIRST_ROWS."""
        reason = rejection.reason
        self.reasons[reason] += 1
        if isinstance(rejection, TooManyCharacters):
            self._too_long[rejection.characters] += 1
        found = f"{row.source}: {rejection.detail}"
        self._first.setdefault(reason, found)
        if reason in self._kinds and len(self._kinds[reason]) < SHOWN_KINDS:
            self._kinds[reason].setdefault(rejection.detail, found)
        if reason not in LEFT_OUT:
            file = self._files[row.file]
            file["rows_rejected"] += 1
            if file["rows_rejected"] == file["rows_read"] == FIRST_ROWS and self._max_rejected_percent < 100:
                raise Problem(
                    bad_param(
                        "ingest",
                        f"the first {FIRST_ROWS:,} rows of {row.file} were all rejected; ingest stopped there",
                    ),
                    *self._reasons(),
                )

    def summary(self) -> dict[str, Any]:
        """What a stopped run has counted; {} if it has read nothing."""
        if not self.rows_read:
            return {}
        return {
            "rows_read": self.rows_read,
            "rows_kept": self.kept.total(),
            "rows_rejected": self.reasons.total(),
            "rejected_by_reason": dict(sorted(self.reasons.items())),
            "characters_percentiles": _percentiles(self._lengths),
            "characters_percentiles_of_rejected_too_long": _percentiles(self._too_long),
            "files": {name: dict(sorted(counts.items())) for name, counts in sorted(self._files.items())},
        }

    def check(self) -> None:
        """Raises Problem if too many rows were rejected, or else if a split is empty."""
        # If this fails, it is a bug in ingest, and nothing is written.
        assert self.rows_read == self.kept.total() + self.reasons.total()
        rows = self.rows_read - self.left_out
        percent = 100 * self.rejected / max(1, rows)
        if percent > self._max_rejected_percent:
            raise Problem(
                bad_param(
                    "ingest.max_rejected_percent",
                    f"{self.rejected} of {rows} rows ({percent:.1f} %) were rejected, the limit is "
                    f"{self._max_rejected_percent:g} %; correct the rows, or raise it if they may be left out",
                ),
                *self._reasons(),
            )
        if empty := [split for split in SPLITS if not self.kept[split]]:
            if not self.kept.total() and self.reasons[OTHER_SIDE]:
                raise Problem(
                    bad_param(
                        "ingest.preference",
                        f"no row has an answer of this side; {self.reasons[OTHER_SIDE]:,} rows are of the other side",
                    )
                )
            if "train" in empty and self._held_out == self.rows_read > 0:
                raise Problem(
                    bad_param(
                        "ingest", "no rows for train: the names of all files say validation or test; rename one, or add data"
                    )
                )
            raise Problem(*map(_empty_split, empty))

    def _reasons(self) -> Iterator[str]:
        """One line for each reason, or for each kind of row, with its first row."""
        for reason, number in sorted(self.reasons.items()):
            if reason in LEFT_OUT:
                continue
            first, *others = self._kinds.get(reason, {}).values() or [self._first[reason]]
            yield f"{reason}: {number} rejected, the first is {first}"
            yield from (f"{reason}: another kind of row is {other}" for other in others)

    def unread_lines(self) -> list[str]:
        """What is said on the screen about fields that are not read, the most frequent first."""
        lines = [
            f"{_printable(name)} is not read: {rows:,} row{'s' if rows > 1 else ''}, the first is {self._first_unread[name]}"
            for name, rows in sorted(self.unread.items(), key=lambda item: (-item[1], item[0]))
        ]
        rest = len(lines) - SHOWN_FIELDS
        return lines if rest <= 1 else [*lines[:SHOWN_FIELDS], f"{rest} more fields are not read; the report lists them"]

    def report(self, leaked_prompts: int, near_duplicates: dict[str, int]) -> dict[str, Any]:
        """The counts as they are written to the report."""
        return {
            "rows_read": self.rows_read,
            "rows_kept": self.kept.total(),
            "rows_rejected": self.reasons.total(),
            "rejected_by_reason": dict(sorted(self.reasons.items())),
            "duplicates": self.reasons["duplicate"],
            **{split: self.kept[split] for split in SPLITS},
            "leaked_prompts": leaked_prompts,
            **near_duplicates,
            "unread_fields": {
                _printable(name): {"rows": rows, "first": self._first_unread[name]}
                for name, rows in sorted(self.unread.items())
            },
            "changes": dict(sorted(self.changes.items())),
            "files": {name: dict(sorted(counts.items())) for name, counts in sorted(self._files.items())},
        }


def _printable(name: str) -> str:
    """The name of a field, which may be any text, also one that UTF-8 cannot encode."""
    return name if name.isprintable() else json.dumps(name)[1:-1]


def _percentiles(lengths: Counter[int]) -> dict[str, int]:
    """Percentiles of rows by length; {} if there are none."""
    ordered = sorted(lengths.elements())
    return {f"p{p}": ordered[(len(ordered) - 1) * p // 100] for p in (50, 90, 99)} if ordered else {}


def _empty_split(split: str) -> str:
    if split == "train":
        return bad_param("ingest", "no rows for train; add data, or lower validation_percent or test_percent")
    return bad_param(f"ingest.{split}_percent", f"no rows for {split}; add data, or raise it")
