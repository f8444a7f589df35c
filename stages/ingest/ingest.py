"""Turns the raw files into checked, deduplicated conversations, split by hash. Every row is accounted for."""

import hashlib
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from stages.core.jsonl import dump_line, write_json, write_line
from stages.core.output import Done, fresh_file, fresh_folder
from stages.core.params import Section, bad_param
from stages.core.problem import Problem, Rejection
from stages.core.progress import progress
from stages.ingest.accounting import Accounting
from stages.ingest.checks import check_encoding, check_length, check_object, check_placeholders, check_turns
from stages.ingest.duplicates import Duplicates, NearDuplicates
from stages.ingest.example import Example, make_example
from stages.ingest.formats import Columns, Format, guess_format, read_conversation
from stages.ingest.json_stream import Broken
from stages.ingest.raw_files import RawFile, RawRow, describe_files, find_files, read_rows
from stages.ingest.splits import SPLITS, Splits


class Params(Section):
    """How rows are read, checked and split."""

    removed: ClassVar[Mapping[str, str]] = {"near_duplicate_similarity": "it is 0.85 now"}

    formats: dict[str, Format]
    """File pattern to format, where the detection by a row's fields is wrong: {"old/*.json": alpaca}."""
    columns: Columns
    """The names of the formats' fields in the raw rows."""
    input_separator: str
    """Text between `instruction` and `input` in the user message; the tutorial and BELLE have none."""
    group_by: str
    """A field whose rows stay in one split (a customer, a document). "": each first prompt is its own group."""
    validation_percent: float = Field(ge=0, lt=100)
    """Share of the groups that are held out to measure progress during training."""
    test_percent: float = Field(ge=0, lt=100)
    """Share of the groups that no stage before `generate` and `score` uses."""
    split_seed: int
    """A different seed puts different groups into validation and test."""
    near_duplicates: Literal["off", "count", "drop"]
    """Rows that are almost equal to an earlier one: not searched for, counted, or rejected."""
    reject_placeholders: bool
    """Whether a row with an unfilled {{placeholder}} is rejected."""
    max_chars: int = Field(gt=0)
    """Longer rows are rejected, in characters of all messages; such a row is often a broken export."""
    max_rejected_percent: float = Field(ge=0, le=100)
    """The stage fails if a larger share of the rows is rejected."""


def ingest(params: Params, *, raw: Path, hub: Path, examples: Path, report: Path) -> Done:
    """Reads every file below `raw` and `hub`, and writes train, validation, test and rejected .jsonl into `examples`.

    A row of a split: {"id", "source", "messages": [{"role", "content", ...}], and "tools" if there are any}. A row of
    rejected.jsonl: {"source", "reason", "detail", "raw"}. `report` gets the counts. Rows are written as they are read:
    memory holds a few hashes per row.

    Raises Problem if there is nothing to read, if a file cannot be read at all, if too many rows are rejected, or if a
    split is empty.
    """
    files = _files(params, raw=raw, hub=hub)
    named = {file.split for file in files}
    accounting = Accounting()
    duplicates = Duplicates()
    near_duplicates = NearDuplicates(drop=params.near_duplicates == "drop") if params.near_duplicates != "off" else None
    splits = Splits(
        seed=params.split_seed,
        # With a set of one's own, nothing more is taken from the other files.
        validation_percent=0 if "validation" in named else params.validation_percent,
        test_percent=0 if "test" in named else params.test_percent,
        grouped=bool(params.group_by),
    )
    with fresh_folder(examples) as folder, fresh_file(report) as report_file, ExitStack() as stack:
        kept = {split: stack.enter_context((folder / f"{split}.jsonl").open("wb")) for split in SPLITS}
        rejected = stack.enter_context((folder / "rejected.jsonl").open("w", encoding="utf-8", newline="\n"))
        for row in progress(read_rows(files, formats=params.formats), "ingest"):
            accounting.read(row)
            try:
                example = _read_example(params, row)
                duplicates.check(example)
                split = splits.choose(example, forced=row.forced_split)
                if near_duplicates:
                    near_duplicates.add(example, row.source, split=split)
            except Rejection as rejection:
                accounting.reject(row, rejection)
                write_line(rejected, _rejected_row(row, rejection))
                continue
            accounting.keep(row, example.format, split=split)
            duplicates.add(example, row.source)
            splits.add(example, split)
            kept[split].write(dump_line(_kept_row(row, example)))
        accounting.check(max_rejected_percent=params.max_rejected_percent)
        leaked_prompts = splits.count_leaked_prompts()
        assert leaked_prompts == 0
        near_counts = near_duplicates.counts() if near_duplicates else {}
        write_json(report_file, accounting.report(leaked_prompts, near_counts))
    by_split = ", ".join(f"{split} {accounting.kept[split]:,}" for split in SPLITS)
    return Done(
        f"{accounting.rows_read:,} rows read, {accounting.kept.total():,} kept ({by_split}), "
        f"{accounting.reasons.total():,} rejected, listed in {examples}/rejected.jsonl"
    )


def _files(params: Params, *, raw: Path, hub: Path) -> list[RawFile]:
    """The files to read, in order. Raises Problem with everything that keeps them from being read and split."""
    files, problems = find_files(raw, hub)
    together = params.validation_percent + params.test_percent
    if together >= 100:
        problems.insert(
            0,
            bad_param(
                "ingest.test_percent",
                f"{params.test_percent:g}, and validation_percent {params.validation_percent:g}, leave nothing to train on; "
                "lower one so that they are below 100 together",
            ),
        )
    if problems:
        raise Problem(*problems)
    for line in describe_files(files):
        print(f"ingest: {line}", flush=True)
    return files


def _read_example(params: Params, row: RawRow) -> Example:
    """The conversation in a raw row. Raises Rejection if it does not pass a check."""
    value = check_object(row.value)
    format = row.format or guess_format(value, params.columns)
    conversation = read_conversation(value, format, columns=params.columns, input_separator=params.input_separator)
    check_encoding(conversation.messages, conversation.tools)
    check_turns(conversation.messages)
    check_length(conversation.messages, params.max_chars)
    if params.reject_placeholders:
        check_placeholders(conversation.messages)
    return make_example(value, conversation, format=format, group_by=params.group_by)


def _kept_row(row: RawRow, example: Example) -> dict[str, Any]:
    messages, tools = example.conversation
    content: dict[str, Any] = {"messages": messages} | ({"tools": tools} if tools else {})
    return {"id": hashlib.sha256(dump_line(content)).hexdigest()[:16], "source": row.source, **content}


def _rejected_row(row: RawRow, rejection: Rejection) -> dict[str, Any]:
    raw = row.value.text if isinstance(row.value, Broken) else row.value
    return {"source": row.source, "reason": rejection.reason, "detail": rejection.detail, "raw": raw}
