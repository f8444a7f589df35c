"""Counts every row: read = kept + rejected, and kept = train + validation + test."""

from collections import Counter
from typing import Any

from stages.core.params import bad_param
from stages.core.problem import Problem, Rejection
from stages.ingest.formats import Conversation, Format
from stages.ingest.raw_files import RawRow
from stages.ingest.splits import SPLITS


class Accounting:
    """The counts of one run."""

    def __init__(self) -> None:
        self.rows_read = 0
        self.kept: Counter[str] = Counter()
        """Rows kept, by split."""
        self.reasons: Counter[str] = Counter()
        """Rows rejected, by reason."""
        self.unread: Counter[str] = Counter()
        """Rows kept that have a field which was not read, by field."""
        self.changes: Counter[str] = Counter()
        """Rows kept that were changed beyond their form, by change."""
        self._first: dict[str, str] = {}
        self._files: dict[str, Counter[str]] = {}

    def read(self, row: RawRow) -> None:
        """Counts a row that was read; `keep` or `reject` must follow."""
        self.rows_read += 1
        self._files.setdefault(row.file, Counter())["rows_read"] += 1

    def keep(self, row: RawRow, format: Format, *, split: str, conversation: Conversation) -> None:
        """Counts a row that was kept, with what was not read of it and what was changed."""
        self.kept[split] += 1
        if conversation.unread:
            self.unread.update(set(conversation.unread))
        if conversation.changes:
            self.changes.update(set(conversation.changes))
        file = self._files[row.file]
        file["rows_kept"] += 1
        file[format] += 1

    def reject(self, row: RawRow, rejection: Rejection) -> None:
        """Counts a row that was rejected."""
        self.reasons[rejection.reason] += 1
        self._first.setdefault(rejection.reason, f"{row.source}: {rejection.detail}")

    def check(self, *, max_rejected_percent: float) -> None:
        """Raises Problem if too many rows were rejected, or else if a split is empty."""
        rejected = self.reasons.total()
        # If this fails, it is a bug in ingest, and nothing is written.
        assert self.rows_read == self.kept.total() + rejected
        percent = 100 * rejected / max(1, self.rows_read)
        if percent > max_rejected_percent:
            raise Problem(
                bad_param(
                    "ingest.max_rejected_percent",
                    f"{rejected} of {self.rows_read} rows ({percent:.1f} %) were rejected, the limit is "
                    f"{max_rejected_percent:g} %; correct the rows, or raise it if they may be left out",
                ),
                *(
                    f"{reason}: {n} rejected, the first is {self._first[reason]}"
                    for reason, n in sorted(self.reasons.items())
                ),
            )
        if empty := [split for split in SPLITS if not self.kept[split]]:
            raise Problem(*map(_empty_split, empty))

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
            "unread_fields": dict(sorted(self.unread.items())),
            "changes": dict(sorted(self.changes.items())),
            "files": {name: dict(sorted(counts.items())) for name, counts in sorted(self._files.items())},
        }


def _empty_split(split: str) -> str:
    if split == "train":
        return bad_param("ingest", "no rows for train; add data, or lower validation_percent or test_percent")
    return bad_param(f"ingest.{split}_percent", f"no rows for {split}; add data, or raise it")
