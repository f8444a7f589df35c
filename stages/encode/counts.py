"""Counts the token rows, checks the counts against the gates, and makes the report and the histogram of them."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydantic import Field

from stages.core.params import Section, bad_param
from stages.core.problem import Problem
from stages.encode.chunks import REASON, SPLITS, Chunk, FirstRows
from stages.encode.previews import Previews

HISTOGRAM_BINS = 20
DOUBT = 1e-6
"""A sample exceeds a gate beyond doubt if it would look like this with at most this probability in data at the limit."""
KEEPS_REASONING = 75
"""Percentage of rows with reasoning below which a thinking model tends to stop thinking: a rule of thumb."""


class Gates(Section):
    """Percentages of rows above which the stage fails."""

    max_rejected_percent: float = Field(ge=0, le=100)
    """Rows that are rejected, whatever the reason."""
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
    first: tuple[str, ...]
    """Where the first few are."""

    @property
    def percent(self) -> float:
        """The share of what is wrong."""
        return 100 * self.found / max(1, self.of)

    def explain(self, name: str, limit: float, *, where: str = "") -> str:
        """One line of a Problem; `where` says what was counted, if it is not everything."""
        found = f"{where}{self.found:,} of {self.of:,} {self.what} ({self.percent:.3g} %), wanted at most {limit:g} %"
        return bad_param(f"encode.gates.max_{name}_percent", f"{found}{_name_first(self.first)}; {self.remedy}")


class Counts:
    """The sums over all chunks."""

    def __init__(self) -> None:
        self.by_split: dict[str, Counter[str]] = {split: Counter() for split in SPLITS}
        self.lengths: dict[str, Counter[int]] = {split: Counter() for split in SPLITS}
        self.first = FirstRows()
        """For each count and each reason, the first few rows."""
        self.previews = Previews()
        self._too_long: Counter[int] = Counter()
        """Rejected conversations by the tokens of their longest row."""

    def add(self, chunk: Chunk) -> None:
        """Adds the rows of a chunk."""
        counts = self.by_split[chunk.split]
        counts.update(chunk.counts)
        counts["read"] += chunk.rows
        counts["rows"] += len(chunk.lengths)
        counts["text_windows"] += chunk.text.num_rows
        counts["tokens"] += int(chunk.lengths.sum())
        self.lengths[chunk.split].update(chunk.lengths.tolist())
        self._too_long.update(chunk.too_long)
        for name, rows in chunk.first.items():
            self.first.add(name, *rows)
        for preview in chunk.previews:
            self.previews.add(*preview)

    @property
    def reasons(self) -> dict[str, int]:
        """Rejected rows of data/examples by reason."""
        total = self._total().items()
        return {name.removeprefix(REASON): count for name, count in sorted(total) if name.startswith(REASON)}

    def check(self, template: Path, gates: Gates, *, long_row_is_error: bool) -> None:
        """Raises Problem if a split is empty, or with every gate that is exceeded.

        `long_row_is_error` makes a single row longer than `max_length` an error, whatever the gate allows.
        """
        empty = [split for split in SPLITS if not self.by_split[split]["rows"]]
        if empty:
            raise Problem(f"no rows left for {' and '.join(empty)} with the template {template}", *self._explain_reasons())
        problems = [*self._certain_problems(template, long_row_is_error=long_row_is_error)]
        exceeded = {
            name: gate
            for name, gate in self._gate_counts().items()
            if gate.percent > _limit(gates, name) and not (name == "too_long" and long_row_is_error)
        }
        problems += [gate.explain(name, _limit(gates, name)) for name, gate in exceeded.items()]
        if problems:
            raise Problem(*problems, *(self._explain_reasons() if "rejected" in exceeded else ()))

    def check_sample(self, template: Path, gates: Gates, *, rows: int, long_row_is_error: bool) -> None:
        """Raises Problem with what `check` would certainly say of all `rows`, if these counts are those of a sample.

        A gate is exceeded beyond doubt if data at its limit would have as many wrong rows in a sample with a probability
        below DOUBT. The tokens of a row depend on each other: for the gate that counts tokens, a row is one draw, as if it
        were unknown or known as a whole.
        """
        sampled = self._total()["read"]
        problems = [*self._certain_problems(template, long_row_is_error=long_row_is_error)]
        exceeded = {}
        for name, gate in self._gate_counts().items():
            limit = _limit(gates, name)
            draws = min(gate.of, self._total()["rows"] if name == "unknown" else gate.of)
            found = math.ceil(gate.found * draws / max(1, gate.of)) if not limit else gate.found * draws // max(1, gate.of)
            if gate.percent > limit and binomial_tail(found, draws, limit / 100) < DOUBT:
                exceeded[name] = gate
        if long_row_is_error:
            exceeded.pop("too_long", None)
        where = f"in a sample of {sampled:,} of the {rows:,} rows, "
        problems += [gate.explain(name, _limit(gates, name), where=where) for name, gate in exceeded.items()]
        if problems:
            reasons = self._explain_reasons() if "rejected" in exceeded else ()
            raise Problem(*problems, *reasons, f"stopped before the other {rows - sampled:,} rows were encoded")

    def _certain_problems(self, template: Path, *, long_row_is_error: bool) -> Iterator[str]:
        """What is wrong however few rows it is."""
        total = self._total()
        if total["double_bos"]:
            yield (
                f"{template}: {total['double_bos']:,} rows begin with two BOS tokens, wanted one"
                f"{_name_first(self._first_of('double_bos'))}; remove a bos_token from the template"
            )
        if long_row_is_error and (too_long := total[f"{REASON}too_long"]):
            found = f"{too_long:,} rows are longer, the first {self._first_of('too_long')[0]}"
            yield bad_param("encode.max_length", f"{found}; raise it, or choose another encode.truncation_strategy")

    def _explain_reasons(self) -> Iterator[str]:
        """A line for each reason of rejected rows."""
        for reason, count in self.reasons.items():
            yield f"{reason}: {count:,} rows, the first {'; '.join(self._first_of(reason))}"

    def _first_of(self, *names: str) -> tuple[str, ...]:
        """The first few rows of the first of these counts that has any."""
        return next((tuple(self.first.by_name[name]) for name in names if name in self.first.by_name), ())

    def _total(self) -> Counter[str]:
        return sum(self.by_split.values(), Counter[str]())

    def _gate_counts(self) -> dict[str, GateCount]:
        """The name of each gate and what it counts."""
        total = self._total()
        trained = self.by_split["train"] + self.by_split["validation"]
        first = self._first_of
        return {
            "rejected": GateCount(
                total["rejected"],
                total["read"],
                "rows are rejected",
                "the reasons are below; correct the rows or the template, or raise it if these rows may be left out",
                (),
            ),
            "unlabelled": GateCount(
                total[f"{REASON}no_labels"],
                total["read"],
                "rows have no labelled tokens",
                'check encode.labels_on, and the messages with "train": false',
                first("no_labels"),
            ),
            "without_stop": GateCount(
                trained["without_stop"],
                trained["rows"],
                "rows have no stop token after an answer",
                "let the template write a special token there, do not cut it off (encode.truncation_strategy: right), or "
                "set 100 if the model need not learn to stop",
                first("without_stop"),
            ),
            "prompt_mismatch": GateCount(
                total["prompt_mismatch"],
                total["rows"],
                "rows do not start with the prompt for generation",
                "what the template renders with add_generation_prompt must be the beginning of the training text",
                first("prompt_mismatch"),
            ),
            "too_long": GateCount(
                total[f"{REASON}too_long"] + total["conversations_cut"],
                total["read"],
                "rows are longer than encode.max_length",
                "raise encode.max_length, or this limit",
                first("too_long", "conversations_cut"),
            ),
            "unknown": GateCount(
                total["unknown"],
                total["tokens"],
                "tokens are unknown tokens",
                "the tokenizer's vocabulary does not cover this text: choose another model, or raise this limit",
                first("unknown"),
            ),
        }

    def summary(self) -> dict[str, Any]:
        """What a stopped run has counted; {} if it has read nothing."""
        total = self._total()
        if not total["read"]:
            return {}
        return {
            "rows_read": total["read"],
            "rows_rejected": total["rejected"],
            "rejected_by_reason": self.reasons,
            "gates": {name: gate.found for name, gate in self._gate_counts().items()},
            "length_percentiles": _percentiles(sum(self.lengths.values(), Counter[int]())),
            "length_percentiles_of_rejected_too_long": _percentiles(self._too_long),
        }

    def notes(self, *, truncates: bool) -> Iterator[str]:
        """What the user should know, one line each. `truncates`: whether long rows are truncated, and not rejected."""
        total, train = self._total(), self.by_split["train"]
        if total["rows_per_answer"]:
            yield (
                f"{total['rows_per_answer']:,} conversations become one row per answer, since the template writes an answer "
                f"otherwise if more follows: {total['extra_rows']:,} more rows, {total['extra_tokens']:,} more tokens "
                f"({100 * total['extra_tokens'] / total['tokens']:.1f} % of all)"
            )
        percent = 100 * _thinking_share(train)
        if 0 < percent < KEEPS_REASONING:
            yield (
                f"{percent:.3g} % of the training conversations contain reasoning; as a rule of thumb, a thinking model "
                f"tends to lose its reasoning if fewer than about {KEEPS_REASONING} % do"
            )
        if left_out := total["tools_left_out"]:
            yield (
                f"{left_out:,} conversations have tools that the template leaves out: their prompts do not say which tools "
                "there are; choose a template with a place for tools if the model must know them"
            )
        if cut := total["rows_cut"]:
            yield f"{cut:,} rows are truncated to encode.max_length: {total['tokens_cut']:,} tokens are cut"
        if truncates and (rejected := self.by_split["test"][f"{REASON}too_long"]):
            yield f"{rejected:,} test rows are rejected, not truncated: a model cannot answer half a prompt"

    def report(self, stop_token_ids: list[int]) -> dict[str, Any]:
        """The content of reports/encode.json."""
        report: dict[str, Any] = {}
        splits: dict[str, Any] = {}
        names = (
            "conversations",
            "with_thinking",
            "with_tools",
            "tools_left_out",
            "rows_per_answer",
            "extra_rows",
            "extra_tokens",
        )
        for split in SPLITS:
            counts = self.by_split[split]
            report |= {f"{split}_{name}": counts[name] for name in ("rows", "tokens", "label_tokens")}
            splits[split] = {name: counts[name] for name in names}
            splits[split] |= {"rows_rejected": counts["rejected"], "rejected_too_long": counts[f"{REASON}too_long"]}
            splits[split]["formats"] = {
                name.removeprefix("format "): count for name, count in sorted(counts.items()) if name.startswith("format ")
            }
        windows = self.by_split["test"]["text_windows"]  # nothing is generated for them
        report |= {"test_rows": report["test_rows"] - windows, "test_text_windows": windows}
        train = self.by_split["train"]
        total = self._total()
        return report | {
            "splits": splits,
            "label_share": round(train["label_tokens"] / train["tokens"], 4),
            "thinking_share": round(_thinking_share(train), 4),
            "length_percentiles": _percentiles(self.lengths["train"]),
            "longest_row": max(max(lengths) for lengths in self.lengths.values() if lengths),
            "rows_cut": total["rows_cut"],
            "tokens_cut": total["tokens_cut"],
            "rows_with_special_text": total["special_text"],
            "stop_token_ids": stop_token_ids,
            "gates": {name: gate.found for name, gate in self._gate_counts().items()},
            "rows_rejected": total["rejected"],
            "rejected_by_reason": self.reasons,
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


def binomial_tail(found: int, of: int, share: float) -> float:
    """The probability of `found` or more successes in `of` draws, each with the probability `share`."""
    from scipy.stats import binom  # type: ignore[import-untyped]  # takes a second to import, and few runs need it

    return float(binom.sf(found - 1, of, share))


def _limit(gates: Gates, name: str) -> float:
    return float(getattr(gates, f"max_{name}_percent"))


def _thinking_share(counts: Mapping[str, int]) -> float:
    """The share of conversations with reasoning; raw texts are none."""
    return counts["with_thinking"] / max(1, counts["conversations"] - counts["format text"])


def _name_first(rows: tuple[str, ...]) -> str:
    """The first row with its detail, and the sources of the next ones."""
    if not rows:
        return ""
    others = ", ".join(row.partition(": ")[0] for row in rows[1:])
    return f"; the first {rows[0]}" + (f", then {others}" if others else "")


def _percentiles(lengths: Counter[int]) -> dict[str, int]:
    """Percentiles of rows by length, in tokens; {} if there are none."""
    if not lengths:
        return {}
    values = sorted(lengths.items())
    ordered = np.repeat([length for length, _ in values], [rows for _, rows in values])
    return {f"p{p}": int(np.percentile(ordered, p, method="higher")) for p in (50, 90, 99)}
