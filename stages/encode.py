"""Renders each conversation with the prompt template, tokenizes it, and labels the tokens that are learned."""

import json
import multiprocessing
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import ExitStack, nullcontext
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jinja2
import numpy as np
import pyarrow as pa
from pydantic import Field

from stages.lib.encoder import Encoded, Encoder, EngineDiffersError, Ids
from stages.lib.jsonl import write_json, write_line
from stages.lib.labels import IGNORE
from stages.lib.mask import LabelsOn, Span, find_answers, learned_ranges
from stages.lib.output import fresh_file, fresh_folder
from stages.lib.params import Section
from stages.lib.problem import Problem
from stages.lib.progress import progress
from stages.lib.rejection import Rejection
from stages.lib.template import ChatTemplate, Untraceable
from stages.lib.tokens import PROMPTS, TRAINING, open_tokens

SPLITS = ("train", "validation", "test")
ROWS_PER_CHUNK = 500
"""Rows that are encoded together, and stand together in the Arrow file; the same whatever the number of processes."""
SHOWN_ROWS = 12
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


class Params(Section):
    """How a conversation becomes tokens and labels."""

    template: str
    """The file of the chat template; the model is saved with it. models/tokenizer/chat_template.jinja is the base's own."""
    labels_on: LabelsOn
    """What is learned: "assistant" (every answer), "last_assistant", or "all" (the prompts too)."""
    max_length: int = Field(gt=1)
    """Longest row in tokens."""
    truncation_strategy: Literal["drop", "left", "right", "error"]
    """A longer row is set aside (drop), loses its beginning (left) or its end (right), or stops the stage (error)."""
    gates: Gates
    """What the token rows must not be."""


def encode(
    params: Params,
    examples: Path,
    tokenizer: Path,
    template: Path,
    page: Path,
    tokens: Path,
    report: Path,
    masks: Path,
    lengths: Path,
) -> None:
    """Writes train and validation rows (input_ids, labels) and tokenized test prompts as Arrow files into `tokens`.

    `tokens` also gets rejected.jsonl (rows that do not fit, with the reason) and the template's text, which `merge` saves
    with the model. `report` gets counts, `masks` a page (made with `page`) of what is learned, `lengths` a histogram.

    Several processes encode, and the bytes do not depend on their number.

    Raises Problem if the template or the tokenizer cannot be used, if a gate does not hold, or if no row is left.
    """
    work = _load(params, tokenizer, template, use_engine=True)
    try:
        totals = _write_tokens(work, examples, template, tokens)
    except EngineDiffersError as text:
        print(
            f"encode: fastokens and the tokenizer differ in {str(text)!r}; begins again with the tokenizer alone", flush=True
        )
        work = _load(params, tokenizer, template, use_engine=False)
        totals = _write_tokens(work, examples, template, tokens)
    counts = totals.report(work.stop_token_ids)
    with fresh_file(report) as report_file, fresh_file(masks) as masks_file, fresh_file(lengths) as lengths_file:
        write_json(report_file, counts)
        masks_file.write_text(_page(page, totals.shown), encoding="utf-8", newline="\n")
        lengths_file.write_text(totals.histogram(), encoding="utf-8", newline="\n")
    print(
        f"encode: {counts['train_tokens']:,} tokens to train on, {counts['train_label_tokens']:,} of them learned; "
        f"{counts['rows_rejected']:,} rows set aside in {tokens}/rejected.jsonl; look at {masks}"
    )


def _load(params: Params, tokenizer: Path, template: Path, *, use_engine: bool) -> "_Work":
    """Raises Problem if the template or the tokenizer cannot be read."""
    try:
        return _Work(params, tokenizer, template.read_text(encoding="utf-8"), use_engine=use_engine)
    except FileNotFoundError as error:
        raise Problem(f"{error.filename}: not found; see encode.template, and run fetch for the tokenizer") from None
    except UnicodeDecodeError as error:
        raise Problem(f"{template}: not UTF-8 at byte {error.start + 1}") from None
    except jinja2.TemplateSyntaxError as error:
        raise Problem(f"{template}: line {error.lineno}: {error.message}") from None


def _write_tokens(work: "_Work", examples: Path, template: Path, tokens: Path) -> "_Totals":
    """Fills the folder `tokens`. Raises Problem if a gate does not hold, and EngineDiffersError."""
    totals = _Totals(work.params)
    count = sum(_count_lines(examples / f"{split}.jsonl") for split in SPLITS)
    with _workers(work, count) as pool, ExitStack() as stack:
        folder = stack.enter_context(fresh_folder(tokens))
        out = {
            split: stack.enter_context(
                open_tokens(folder / f"{split}.arrow", PROMPTS if split == "test" else TRAINING, work.stop_token_ids)
            )
            for split in SPLITS
        }
        rejected = stack.enter_context((folder / "rejected.jsonl").open("w", encoding="utf-8", newline="\n"))
        for chunk in progress(_chunks(pool, work, examples), "encode", total=count, size=lambda chunk: chunk.rows):
            if chunk.batch.num_rows:
                out[chunk.split].write_batch(chunk.batch)
            for row in chunk.rejected:
                write_line(rejected, row)
            totals.add(chunk)
        totals.check(template)
        (folder / "chat_template.jinja").write_text(work.template.source, encoding="utf-8", newline="\n")
    return totals


# Rows


class Row(NamedTuple):
    """One conversation as tokens."""

    id: str
    ids: Ids
    ranges: list[tuple[int, int]]
    """Tokens [first, last) that are learned."""
    prompt_length: int
    """Tokens before the last answer."""
    reference: str
    cut: int
    """Tokens that were cut off for their number."""
    unstopped: bool
    mismatched: bool
    double_bos: bool
    special_text: bool
    unknown: int


class Rendered(NamedTuple):
    """One conversation as text."""

    text: str
    spans: list[Span]
    tail: str
    """The end of the prompt for the last answer, from its last special token on."""
    special: Encoded | None
    """The tokens, where a user's text has the letters of a special token in it."""


class _Work:
    """The tokenizer and the template, and the rule that makes a row of them. Every process has one."""

    def __init__(self, params: Params, tokenizer: Path, source: str, *, use_engine: bool) -> None:
        self.params = params
        self.encoder = Encoder(tokenizer, use_engine=use_engine)
        self.template = ChatTemplate(source, self.encoder.template_variables)
        self.stop_token_ids = self._find_stop_tokens()
        self._tails: dict[str, list[int]] = {}

    def _find_stop_tokens(self) -> list[int]:
        """The special tokens that the template puts behind an answer, seen on two small conversations."""
        turns = [{"role": ("user", "assistant")[number % 2], "content": str(number)} for number in range(4)]
        found = set()
        for messages in (turns[:2], turns):
            try:
                _, spans, _ = find_answers(self.template, messages, [], self.encoder.special_tokens)
            except (Untraceable, jinja2.TemplateError):
                continue  # it may want more than these; each row is looked at by itself
            found |= {span.stop for span in spans if span.stop}
        return sorted(self.encoder.id_of(token) for token in found)

    def rows(self, examples: list[dict[str, Any]]) -> Iterator[Row | Rejection]:
        """The token rows of some conversations, in order; a Rejection where one is set aside."""
        rendered = [self._render(example) for example in examples]
        texts = [found.text for found in rendered if not isinstance(found, Rejection) and found.special is None]
        encoded = iter(self.encoder.encode_batch(texts))
        self._encode_tails({found.tail for found in rendered if not isinstance(found, Rejection)})
        for example, found in zip(examples, rendered, strict=True):
            try:
                yield found if isinstance(found, Rejection) else self._row(example, found, found.special or next(encoded))
            except Rejection as why:
                yield why

    def _render(self, example: dict[str, Any]) -> "Rendered | Rejection":
        messages, tools = example["messages"], example.get("tools", [])
        try:
            text, spans, places = find_answers(self.template, messages, tools, self.encoder.special_tokens)
        except Untraceable as error:
            return Rejection("answer_not_traceable", str(error))
        except jinja2.TemplateError as error:
            return Rejection("not_in_template", str(error))
        missing = next((part for part in _must_show(messages, tools) if part not in text), None)
        if missing is not None:
            return Rejection("not_in_template", f"the template leaves out {missing[:60]!r}")
        written = [message["content"] for message in messages]
        if places is None:
            written.append(json.dumps([tools, [message.get("tool_calls") for message in messages]], ensure_ascii=False))
        if not any(map(self.encoder.special_in, written)):
            return Rendered(text, spans, self._tail(text, spans[-1]), None)
        if places is None:
            return Rejection("special_token_in_text", "in a conversation with tools")
        edges = [edge for place in places for edge in (place.start, place.end)]
        edges += [edge for span in spans for edge in (span.start, span.end)]
        cuts = sorted({0, len(text), *edges})
        pieces = [
            (text[start:end], not any(place.start <= start < place.end for place in places)) for start, end in pairwise(cuts)
        ]
        return Rendered(text, spans, "", self.encoder.encode_pieces(pieces))

    def _tail(self, text: str, span: Span) -> str:
        """The end of the prompt for an answer, from its last special token on.

        A special token is a border that no token crosses, and up to it the row and its prompt are the same text. So to know
        whether a row begins with its prompt's tokens, it is enough to tokenize the tail: for most templates a word or two.
        """
        ends = (text.rfind(token, 0, span.start) + len(token) for token in self.encoder.special_tokens if token in text)
        return text[max(ends, default=0) : span.start]

    def _encode_tails(self, tails: set[str]) -> None:
        new = sorted(tails - self._tails.keys())
        if len(self._tails) + len(new) > 4 * ROWS_PER_CHUNK:
            self._tails, new = {}, sorted(tails)
        self._tails |= zip(new, (encoded.ids.tolist() for encoded in self.encoder.encode_batch(new)), strict=True)

    def _row(self, example: dict[str, Any], rendered: "Rendered", encoded: Encoded) -> Row:
        """Raises Rejection."""
        text, spans, tail, special = rendered
        ids = encoded.ids
        answers = [encoded.range_of(span) for span in spans]
        first = answers[-1][0]
        wanted = self._tails[tail]
        mismatched = not spans[-1].prompted or (special is None and ids[first - len(wanted) : first].tolist() != wanted)
        if self.encoder.bos_ids and ids[:1].tolist() != self.encoder.bos_ids:
            ids = np.concatenate([np.array(self.encoder.bos_ids, dtype=np.int32), ids])
            answers = [(first + 1, last + 1) for first, last in answers]
        ranges = learned_ranges(spans, answers, len(ids), self.params.labels_on)
        prompt_length = answers[-1][0]
        ids, ranges, prompt_length, cut = self._fit(ids, ranges, prompt_length)
        if cut and prompt_length <= len(self.encoder.bos_ids):
            raise Rejection("too_long", "no token of the prompt is left beside the answer")
        if not ranges:
            raise Rejection("nothing_to_learn", "no token of this row is learned" + (" after it was cut" if cut else ""))
        bos = self.encoder.tokenizer.bos_token_id
        reference = example["messages"][-1]["content"] or text[spans[-1].start : spans[-1].end - len(spans[-1].stop)]
        return Row(
            id=example["id"],
            ids=ids,
            ranges=ranges,
            prompt_length=prompt_length,
            reference=reference,
            cut=cut,
            unstopped=not spans[-1].stop or (self.params.truncation_strategy == "right" and cut > 0),
            mismatched=mismatched,
            double_bos=bos is not None and ids[:2].tolist() == [bos, bos],
            special_text=special is not None,
            unknown=int((ids == self.encoder.unk_id).sum()) if self.encoder.unk_id is not None else 0,
        )

    def _fit(
        self, ids: Ids, ranges: list[tuple[int, int]], prompt_length: int
    ) -> tuple[Ids, list[tuple[int, int]], int, int]:
        """A row no longer than max_length, and how many tokens that cost. Raises Rejection if rows are not to be cut."""
        cut = len(ids) - self.params.max_length
        if cut <= 0:
            return ids, ranges, prompt_length, 0
        match self.params.truncation_strategy:
            case "left":
                kept = len(self.encoder.bos_ids)
                ids = np.concatenate([ids[:kept], ids[kept + cut :]])
                ranges = [(max(first - cut, kept, 1), last - cut) for first, last in ranges]
                prompt_length = max(prompt_length - cut, kept)
            case "right":
                ids = ids[: self.params.max_length]
                ranges = [(first, min(last, len(ids))) for first, last in ranges]
            case "drop" | "error":
                raise Rejection("too_long", f"{len(ids)} tokens, encode.max_length is {self.params.max_length}")
        return ids, [(first, last) for first, last in ranges if last > first], prompt_length, cut


def _must_show(messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> Iterator[str]:
    """What a template with a place for it shows: system, user and tool texts, and the names of tools."""
    for message in messages:
        if message["role"] in ("system", "tool") or (tools and message["role"] == "user"):
            yield message["content"].strip()
    for tool in tools:
        yield str(tool.get("function", {}).get("name", ""))


# Chunks


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


def _encode_chunk(work: _Work, split: str, lines: list[str], show: int) -> Chunk:
    examples = [json.loads(line) for line in lines]
    rejected, rows = [], []
    for example, row in zip(examples, work.rows(examples), strict=True):
        if isinstance(row, Rejection):
            entry = {"id": example["id"], "source": example["source"], "split": split}
            rejected.append(entry | {"reason": row.reason, "detail": row.detail})
        else:
            rows.append(row)
    counts = Counter(row["reason"] for row in rejected)
    counts["label_tokens"] = sum(last - first for row in rows for first, last in row.ranges)
    counts["rows_cut"] = sum(row.cut > 0 for row in rows)
    counts["tokens_cut"] = sum(row.cut for row in rows)
    for name in ("unstopped", "mismatched", "double_bos", "special_text", "unknown"):
        counts[name] = sum(getattr(row, name) for row in rows)
    return Chunk(
        split=split,
        rows=len(lines),
        batch=_prompt_batch(work, rows) if split == "test" else _training_batch(rows),
        rejected=rejected,
        counts=counts,
        lengths=np.array([len(row.ids) for row in rows], dtype=np.int32),
        shown=[(row.id, _pieces(work, row)) for row in rows[:show]],
    )


def _training_batch(rows: list[Row]) -> pa.RecordBatch:
    lengths = np.array([0, *(len(row.ids) for row in rows)], dtype=np.int32)
    ends = np.cumsum(lengths, dtype=np.int32)
    ids = np.concatenate([np.array([], dtype=np.int32), *(row.ids for row in rows)])
    labels = np.full_like(ids, IGNORE)
    for start, row in zip(ends.tolist(), rows, strict=False):
        for first, last in row.ranges:
            labels[start + first : start + last] = ids[start + first : start + last]
    return pa.RecordBatch.from_arrays(
        [
            pa.array([row.id for row in rows], pa.string()),
            pa.ListArray.from_arrays(pa.array(ends), pa.array(ids), type=pa.list_(pa.int32())),
            pa.ListArray.from_arrays(pa.array(ends), pa.array(labels), type=pa.list_(pa.int32())),
        ],
        schema=TRAINING,
    )


def _prompt_batch(work: _Work, rows: list[Row]) -> pa.RecordBatch:
    columns = [
        {
            "id": row.id,
            "prompt": work.encoder.decode(row.ids[: row.prompt_length]),
            "prompt_ids": row.ids[: row.prompt_length],
            "reference": row.reference,
        }
        for row in rows
    ]
    return pa.RecordBatch.from_pylist(columns, schema=PROMPTS)


def _pieces(work: _Work, row: Row) -> list[tuple[str, bool]]:
    pieces, at = [], 0
    for first, last in row.ranges:
        pieces += [(work.encoder.decode(row.ids[at:first]), False), (work.encoder.decode(row.ids[first:last]), True)]
        at = last
    return [*pieces, (work.encoder.decode(row.ids[at:]), False)]


def _chunks(pool: Executor | None, work: _Work, examples: Path) -> Iterator[Chunk]:
    """The chunks of all splits, in order, while the processes work ahead a little."""
    tasks = (
        (split, lines, SHOWN_ROWS if split == "train" and not number else 0)
        for split in SPLITS
        for number, lines in enumerate(_read_chunks(examples / f"{split}.jsonl"))
    )
    if pool is None:
        yield from (_encode_chunk(work, *task) for task in tasks)
        return
    waiting = [pool.submit(_encode_here, *task) for task in islice(tasks, 4 * (os.cpu_count() or 1))]
    while waiting:
        yield waiting.pop(0).result()
        waiting += [pool.submit(_encode_here, *task) for task in islice(tasks, 1)]


def _read_chunks(path: Path) -> Iterator[list[str]]:
    with path.open(encoding="utf-8", newline="\n") as file:
        while lines := list(islice(file, ROWS_PER_CHUNK)):
            yield lines


def _count_lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(1 for _ in file)


_here: _Work
"""The work of this process, taken over from the one that forked it."""


def _encode_here(split: str, lines: list[str], show: int) -> Chunk:
    return _encode_chunk(_here, split, lines, show)


def _workers(work: _Work, rows: int) -> Any:
    """A pool of forked processes, one a core; None where there is too little to do."""
    global _here  # noqa: PLW0603
    _here = work
    cores = len(os.sched_getaffinity(0))
    if cores == 1 or rows < 4 * ROWS_PER_CHUNK:
        return nullcontext()
    # Each process tokenizes by itself; threads do not survive a fork.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["RAYON_NUM_THREADS"] = "1"
    return ProcessPoolExecutor(cores, mp_context=multiprocessing.get_context("fork"))


# Counts


class _Totals:
    """What the chunks add up to."""

    def __init__(self, params: Params) -> None:
        self.params = params
        self.counts: dict[str, Counter[str]] = {split: Counter() for split in SPLITS}
        self.lengths: dict[str, Counter[int]] = {split: Counter() for split in SPLITS}
        self.reasons: Counter[str] = Counter()
        self.first: dict[str, str] = {}
        self.shown: list[tuple[str, list[tuple[str, bool]]]] = []

    def add(self, chunk: Chunk) -> None:
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

    def check(self, template: Path) -> None:
        """Raises Problem with every gate that does not hold, or if a split is empty."""
        empty = [split for split in SPLITS if not self.counts[split]["rows"]]
        if empty:
            reasons = [f"{reason}: the first {first}" for reason, first in sorted(self.first.items())]
            raise Problem(f"no rows left for {' and '.join(empty)} with the template {template}", *reasons)
        if self.params.truncation_strategy == "error" and self.reasons["too_long"]:
            raise Problem(
                f"{self.reasons['too_long']} rows are longer than encode.max_length, the first {self.first['too_long']}; "
                "raise it, or choose another encode.truncation_strategy"
            )
        problems = []
        for gate, (found, of) in self._shares().items():
            limit = getattr(self.params.gates, f"max_{gate}_percent")
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
        report: dict[str, Any] = {}
        for split in SPLITS:
            counts = self.counts[split]
            report |= {f"{split}_{name}": counts[name] for name in ("rows", "tokens", "label_tokens")}
        train = self.counts["train"]
        ordered = np.array(sorted(self.lengths["train"].elements()))
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


def _page(template: Path, rows: list[tuple[str, list[tuple[str, bool]]]]) -> str:
    return jinja2.Environment(autoescape=True).from_string(template.read_text(encoding="utf-8")).render(rows=rows)
