"""What is counted of the token rows, and the limits past which `encode` fails."""

from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from pydantic import Field

from stages.core.params import Section
from stages.core.problem import Problem

SPLITS = ("train", "validation", "test")
HISTOGRAM_BINS = 20


class Gates(Section):
    """Shares of the rows, in percent, above which the stage fails."""

    max_unlearned_percent: float = Field(ge=0, le=100)
    """Rows in which nothing is learned."""
    max_unstopped_percent: float = Field(ge=0, le=100)
    """Training rows that do not teach the model to stop; a template without a stop token (join) has 100."""
    max_prompt_mismatch_percent: float = Field(ge=0, le=100)
    """Rows that do not begin with the tokens of the prompt that the template makes for generation."""
    max_double_bos_percent: float = Field(ge=0, le=100)
    """Rows that begin with two BOS tokens."""
    max_too_long_percent: float = Field(ge=0, le=100)
    """Rows that are cut, or set aside, for their length."""
    max_unknown_percent: float = Field(ge=0, le=100)
    """Tokens (not rows) that stand for text outside the vocabulary."""


class Chunk(NamedTuple):
    """Some encoded rows of one split, with all that is counted of them."""

    split: str
    rows: int
    batch: pa.RecordBatch
    rejected: list[dict[str, Any]]
    counts: Counter[str]
    lengths: np.ndarray[Any, np.dtype[np.int32]]
    shown: list[tuple[str, list[tuple[str, bool]]]]
    """The first rows as (id, pieces of text with whether they are learned)."""


class Tally:
    """What the chunks add up to."""

    def __init__(self) -> None:
        self.counts: dict[str, Counter[str]] = {split: Counter() for split in SPLITS}
        self.lengths: dict[str, Counter[int]] = {split: Counter() for split in SPLITS}
        self.reasons: Counter[str] = Counter()
        self.first: dict[str, str] = {}
        self.shown: list[tuple[str, list[tuple[str, bool]]]] = []

    def add(self, chunk: Chunk) -> None:
        """Counts the rows of a chunk."""
        counts = self.counts[chunk.split]
        counts.update(chunk.counts)
        counts["read"] += chunk.rows
        counts["rows"] += len(chunk.lengths)
        counts["tokens"] += int(chunk.lengths.sum())
        self.lengths[chunk.split].update(chunk.lengths.tolist())
        for row in chunk.rejected:
            self.reasons[row["reason"]] += 1
            self.first.setdefault(row["reason"], f"{row['source']}: {row['detail']}")
        self.shown += chunk.shown

    def check(self, template: Path, gates: Gates, *, cut_is_error: bool) -> None:
        """Raises Problem with every gate that does not hold, or if a split is empty, or if a row was to be no longer."""
        empty = [split for split in SPLITS if not self.counts[split]["rows"]]
        if empty:
            reasons = [f"{reason}: the first {first}" for reason, first in sorted(self.first.items())]
            raise Problem(f"no rows left for {' and '.join(empty)} with the template {template}", *reasons)
        if cut_is_error and self.reasons["too_long"]:
            raise Problem(
                f"{self.reasons['too_long']} rows are longer than encode.max_length, the first {self.first['too_long']}; "
                "raise it, or choose another encode.truncation_strategy"
            )
        problems = []
        for gate, (found, of) in self._shares().items():
            limit = getattr(gates, f"max_{gate}_percent")
            percent = 100 * found / max(1, of)
            if percent > limit:
                first = self.first.get({"unlearned": "nothing_to_learn", "too_long": "too_long"}.get(gate, ""), "")
                problems.append(
                    f"{found:,} of {of:,} ({percent:.3g} %) are {gate}; encode.gates.max_{gate}_percent is {limit:g}"
                    + (f"; the first {first}" if first else "")
                )
        if problems:
            raise Problem(*problems)

    def _shares(self) -> dict[str, tuple[int, int]]:
        total = sum(self.counts.values(), Counter[str]())
        trained = self.counts["train"] + self.counts["validation"]
        return {
            "unlearned": (total["nothing_to_learn"], total["read"]),
            "unstopped": (trained["unstopped"], trained["rows"]),
            "prompt_mismatch": (total["mismatched"], total["rows"]),
            "double_bos": (total["double_bos"], total["rows"]),
            "too_long": (total["too_long"] + total["rows_cut"], total["read"]),
            "unknown": (total["unknown"], total["tokens"]),
        }

    def report(self, stop_token_ids: list[int]) -> dict[str, Any]:
        """What reports/encode.json says."""
        report: dict[str, Any] = {}
        for split in SPLITS:
            counts = self.counts[split]
            report |= {f"{split}_{name}": counts[name] for name in ("rows", "tokens", "label_tokens")}
        train = self.counts["train"]
        lengths = sorted(self.lengths["train"].items())
        ordered = np.repeat([length for length, _ in lengths], [rows for _, rows in lengths])
        total = sum(self.counts.values(), Counter[str]())
        return report | {
            "label_share": round(train["label_tokens"] / train["tokens"], 4),
            "length_percentiles": {f"p{p}": int(np.percentile(ordered, p, method="higher")) for p in (50, 90, 99)},
            "longest_row": max(max(lengths) for lengths in self.lengths.values() if lengths),
            "rows_cut": total["rows_cut"],
            "tokens_cut": total["tokens_cut"],
            "rows_with_special_text": total["special_text"],
            "stop_token_ids": stop_token_ids,
            "gates": {name: found for name, (found, _) in self._shares().items()},
            "rows_rejected": sum(self.reasons.values()),
            "rejected_by_reason": dict(sorted(self.reasons.items())),
        }

    def histogram(self) -> str:
        """How many training rows have how many tokens, as CSV. The ranges have leading zeros: DVC sorts them as text."""
        lengths = self.lengths["train"]
        width = max(1, -(-max(lengths) // HISTOGRAM_BINS))
        bins: Counter[int] = Counter()
        for length, rows in lengths.items():
            bins[(length - 1) // width] += rows
        digits = len(str((max(bins) + 1) * width))
        lines = [
            f"{at * width + 1:0{digits}}-{(at + 1) * width:0{digits}},{bins[at]}\n" for at in range(min(bins), max(bins) + 1)
        ]
        return "tokens,rows\n" + "".join(lines)
