"""Counts the token rows, checks the counts against the gates, and makes the report and the histogram of them."""

from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydantic import Field

from stages.core.params import Section, bad_param
from stages.core.problem import Problem
from stages.encode.chunks import SPLITS, Chunk
from stages.encode.masks_page import MarkedRow

HISTOGRAM_BINS = 20


class Gates(Section):
    """Percentages of rows above which the stage fails."""

    max_unlabelled_percent: float = Field(ge=0, le=100)
    """Rows without labelled tokens. They are rejected."""
    max_without_stop_percent: float = Field(ge=0, le=100)
    """Training and validation rows without a stop token after the last answer. With the template `join` all rows are."""
    max_prompt_mismatch_percent: float = Field(ge=0, le=100)
    """Rows that do not start with the tokens of the prompt that the template renders for generation."""
    max_too_long_percent: float = Field(ge=0, le=100)
    """Rows longer than `max_length`: rejected or truncated."""
    max_unknown_percent: float = Field(ge=0, le=100)
    """Tokens (not rows) that are the unknown token, for text outside the vocabulary."""


class GateCount(NamedTuple):
    """What a gate counts."""

    found: int
    of: int
    what: str
    """What is wrong with the rows or tokens that were found."""
    remedy: str
    first: str
    """Where the first one is, "" if unknown."""


class Counts:
    """The sums over all chunks."""

    def __init__(self) -> None:
        self.by_split: dict[str, Counter[str]] = {split: Counter() for split in SPLITS}
        self.lengths: dict[str, Counter[int]] = {split: Counter() for split in SPLITS}
        self.reasons: Counter[str] = Counter()
        """Rejected rows by reason."""
        self.first: dict[str, str] = {}
        """For each count and each reason, the source of the first row."""
        self.preview: list[MarkedRow] = []

    def add(self, chunk: Chunk) -> None:
        """Adds the rows of a chunk."""
        counts = self.by_split[chunk.split]
        counts.update(chunk.counts)
        counts["read"] += chunk.rows
        counts["rows"] += len(chunk.lengths)
        counts["tokens"] += int(chunk.lengths.sum())
        self.lengths[chunk.split].update(chunk.lengths.tolist())
        self.reasons.update(row["reason"] for row in chunk.rejected)
        self.first = chunk.first | self.first
        self.preview += chunk.preview

    def check(self, template: Path, gates: Gates, *, long_row_is_error: bool) -> None:
        """Raises Problem if a split is empty, or with every gate that is exceeded.

        `long_row_is_error` makes a single row longer than `max_length` an error, whatever the gate allows.
        """
        empty = [split for split in SPLITS if not self.by_split[split]["rows"]]
        if empty:
            reasons = [
                f"{reason}: {self.reasons[reason]:,} rows, the first {self.first[reason]}" for reason in sorted(self.reasons)
            ]
            raise Problem(f"no rows left for {' and '.join(empty)} with the template {template}", *reasons)
        problems = []
        total = self._total()
        if total["double_bos"]:
            problems.append(
                f"{template}: {total['double_bos']:,} rows begin with two BOS tokens, wanted one; the first "
                f"{self.first['double_bos']}; remove a bos_token from the template"
            )
        if long_row_is_error and self.reasons["too_long"]:
            found = f"{self.reasons['too_long']:,} rows are longer, the first {self.first['too_long']}"
            problems.append(
                bad_param("encode.max_length", f"{found}; raise it, or choose another encode.truncation_strategy")
            )
        for name, gate in self._gate_counts().items():
            if name == "too_long" and long_row_is_error:
                continue
            limit = getattr(gates, f"max_{name}_percent")
            percent = 100 * gate.found / max(1, gate.of)
            if percent > limit:
                found = f"{gate.found:,} of {gate.of:,} {gate.what} ({percent:.3g} %), wanted at most {limit:g} %"
                first = f"; the first {gate.first}" if gate.first else ""
                problems.append(bad_param(f"encode.gates.max_{name}_percent", f"{found}{first}; {gate.remedy}"))
        if problems:
            raise Problem(*problems)

    def _total(self) -> Counter[str]:
        return sum(self.by_split.values(), Counter[str]())

    def _gate_counts(self) -> dict[str, GateCount]:
        """The name of each gate and what it counts."""
        total = self._total()
        trained = self.by_split["train"] + self.by_split["validation"]
        first = self.first
        return {
            "unlabelled": GateCount(
                total["no_labels"],
                total["read"],
                "rows have no labelled tokens",
                'check encode.labels_on, and the messages with "train": false',
                first.get("no_labels", ""),
            ),
            "without_stop": GateCount(
                trained["without_stop"],
                trained["rows"],
                "rows have no stop token after the last answer",
                "let the template write a special token there, or set 100 if the model need not learn to stop",
                first.get("without_stop", ""),
            ),
            "prompt_mismatch": GateCount(
                total["prompt_mismatch"],
                total["rows"],
                "rows do not start with the prompt for generation",
                "what the template renders with add_generation_prompt must be the beginning of the training text",
                first.get("prompt_mismatch", ""),
            ),
            "too_long": GateCount(
                total["too_long"] + total["rows_cut"],
                total["read"],
                "rows are longer than encode.max_length",
                "raise encode.max_length, or this limit",
                first.get("too_long", first.get("tokens_cut", "")),
            ),
            "unknown": GateCount(
                total["unknown"],
                total["tokens"],
                "tokens are unknown tokens",
                "the tokenizer's vocabulary does not cover this text: choose another model, or raise this limit",
                first.get("unknown", ""),
            ),
        }

    def report(self, stop_token_ids: list[int]) -> dict[str, Any]:
        """The content of reports/encode.json."""
        report: dict[str, Any] = {}
        for split in SPLITS:
            counts = self.by_split[split]
            report |= {f"{split}_{name}": counts[name] for name in ("rows", "tokens", "label_tokens")}
        train = self.by_split["train"]
        lengths = sorted(self.lengths["train"].items())
        ordered = np.repeat([length for length, _ in lengths], [rows for _, rows in lengths])
        total = self._total()
        return report | {
            "label_share": round(train["label_tokens"] / train["tokens"], 4),
            "length_percentiles": {f"p{p}": int(np.percentile(ordered, p, method="higher")) for p in (50, 90, 99)},
            "longest_row": max(max(lengths) for lengths in self.lengths.values() if lengths),
            "rows_cut": total["rows_cut"],
            "tokens_cut": total["tokens_cut"],
            "rows_with_special_text": total["special_text"],
            "stop_token_ids": stop_token_ids,
            "gates": {name: gate.found for name, gate in self._gate_counts().items()},
            "rows_rejected": sum(self.reasons.values()),
            "rejected_by_reason": dict(sorted(self.reasons.items())),
        }

    def histogram(self) -> list[tuple[str, int]]:
        """Training rows by length: (range of tokens, rows). The ranges have leading zeros because DVC sorts them as text."""
        lengths = self.lengths["train"]
        width = max(1, -(-max(lengths) // HISTOGRAM_BINS))
        bins: Counter[int] = Counter()
        for length, rows in lengths.items():
            bins[(length - 1) // width] += rows
        digits = len(str((max(bins) + 1) * width))
        return [
            (f"{at * width + 1:0{digits}}-{(at + 1) * width:0{digits}}", bins[at]) for at in range(min(bins), max(bins) + 1)
        ]
