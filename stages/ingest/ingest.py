"""Turns the raw files into checked, deduplicated conversations, split by hash. Every row and field is accounted for."""

import fnmatch
import hashlib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from stages.core.jsonl import dump_line, write_json, write_line
from stages.core.output import Done, fresh_file, fresh_folder, kept_if_stopped
from stages.core.params import Section, bad_param
from stages.core.problem import Problem, Rejection
from stages.core.progress import progress
from stages.ingest.accounting import Accounting
from stages.ingest.checks import (
    check_encoding,
    check_length,
    check_object,
    check_placeholders,
    check_text,
    check_turns,
)
from stages.ingest.columns import Column, Names, check_columns
from stages.ingest.duplicates import Duplicates, NearDuplicates
from stages.ingest.example import Example, make_example
from stages.ingest.formats import Format, Formats
from stages.ingest.json_stream import Broken
from stages.ingest.preference import PreferenceFound
from stages.ingest.raw_files import RawFile, RawRow, describe_files, find_files, read_rows
from stages.ingest.row import Settings
from stages.ingest.splits import SPLITS, Splits
from stages.ingest.turns import Role


class Params(Section):
    """How rows are read, checked and split."""

    removed: ClassVar[Mapping[str, str]] = {"near_duplicate_similarity": "it is 0.85 now"}

    formats: dict[str, Format]
    """File pattern to format, where the detection by a row's fields is wrong: {"old/*.json": alpaca}."""
    columns: dict[Column, str]
    """The fields of your rows whose names are not among the usual ones: {instruction: frage, output: antwort}. a.b is the
    field b inside of a, a.0 the first element of a list."""
    columns_by_file: dict[str, dict[Column, str]]
    """File pattern to columns that differ from `columns` there: {"old/*.json": {output: reply}}."""
    roles: dict[str, Role]
    """Role names besides the usual ones, and what each is: {bing: assistant}."""
    preference: Literal["error", "chosen", "rejected"]
    """Rows with a preferred and a rejected answer, or a label true or false: the run stops, or one side is trained."""
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

    A row of a split: {"id", "source", "format", "messages": [{"role", "content", ...}], and "tools" if there are any}, or
    {"id", "source", "format": "text", "text"}. A row of rejected.jsonl: {"source", "reason", "detail", "raw"}. `report` gets
    the counts. Rows are written as they are read: memory holds a few hashes per row.

    Raises Problem if there is nothing to read, if a file cannot be read at all, if too many rows are rejected, if a row
    holds preference data and `ingest.preference` names no side, or if a split is empty. The rejected rows and a summary are
    then in reports/failed/ingest.
    """
    files = _files(params, raw=raw, hub=hub)
    named = {file.split for file in files}
    readers = _Readers(params, sorted({file.name for file in files}))
    accounting = Accounting(max_rejected_percent=params.max_rejected_percent)
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
        failed, rejected_file = report.parent / "failed" / "ingest", folder / "rejected.jsonl"
        stack.enter_context(kept_if_stopped(failed, rejected_file, summary=accounting.summary))
        kept = {split: stack.enter_context((folder / f"{split}.jsonl").open("wb")) for split in SPLITS}
        rejected = stack.enter_context(rejected_file.open("w", encoding="utf-8", newline="\n"))
        for row in progress(read_rows(files, formats=params.formats), "ingest"):
            accounting.read(row)
            try:
                example = _read_example(params, row, readers.of(row.file))
                duplicates.check(example)
                split = splits.choose(example, forced=row.forced_split)
                if near_duplicates:
                    near_duplicates.add(example, row.source, split=split)
            except Rejection as rejection:
                write_line(rejected, _rejected_row(row, rejection))
                accounting.reject(row, rejection)
                continue
            except PreferenceFound as found:
                raise Problem(found.problem(row.source)) from None
            accounting.keep(row, example.conversation, split=split)
            duplicates.add(example, row.source)
            splits.add(example, split)
            kept[split].write(dump_line(_kept_row(row, example)))
        accounting.check()
        leaked_prompts = splits.count_leaked_prompts()
        assert leaked_prompts == 0
        near_counts = near_duplicates.counts() if near_duplicates else {}
        write_json(report_file, accounting.report(leaked_prompts, near_counts))
    for line in accounting.unread_lines():
        print(f"ingest: {line}", flush=True)
    by_split = ", ".join(f"{split} {accounting.kept[split]:,}" for split in SPLITS)
    return Done(
        f"{accounting.rows_read:,} rows read, {accounting.kept.total():,} kept ({by_split}), "
        f"{accounting.left_out:,} left out as duplicates or the other side, {accounting.rejected:,} rejected; "
        f"both are listed in {examples}/rejected.jsonl"
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


class _Readers:
    """What reads the rows of each file: the first pattern of `columns_by_file` that matches it gives its columns."""

    def __init__(self, params: Params, files: Sequence[str]) -> None:
        """Raises Problem if two columns read one field, or if a pattern matches none of the files."""
        problems = list(check_columns("ingest.columns", params.columns))
        for pattern, columns in params.columns_by_file.items():
            problems += check_columns(f"ingest.columns_by_file.{pattern}", params.columns | columns)
        for name, patterns in (("formats", params.formats), ("columns_by_file", params.columns_by_file)):
            problems += (
                bad_param(f"ingest.{name}", f"no file matches {pattern!r}; the files are {_list(files)}")
                for pattern in patterns
                if not fnmatch.filter(files, pattern)
            )
        if problems:
            raise Problem(*problems)
        self._params = params
        self._by_pattern: dict[str | None, Formats] = {}
        self._by_file: dict[str, Formats] = {}

    def of(self, file: str) -> Formats:
        """The reader of a file's rows."""
        found = self._by_file.get(file)
        if found is None:
            by_file = self._params.columns_by_file
            pattern = next((pattern for pattern in by_file if fnmatch.fnmatch(file, pattern)), None)
            if pattern not in self._by_pattern:
                columns = self._params.columns | (by_file[pattern] if pattern is not None else {})
                self._by_pattern[pattern] = _formats(self._params, columns)
            found = self._by_file[file] = self._by_pattern[pattern]
        return found


def _formats(params: Params, columns: Mapping[Column, str]) -> Formats:
    settings = Settings(
        input_separator=params.input_separator,
        roles=params.roles,
        preference=params.preference,
        turn_fields=(columns.get("role"), columns.get("content")),
    )
    return Formats(Names(columns), settings, group_by=params.group_by)


def _list(names: Sequence[str]) -> str:
    """The first of some names, for a message."""
    return ", ".join([*names[:5], f"and {len(names) - 5} more"] if len(names) > 6 else names)


def _read_example(params: Params, row: RawRow, formats: Formats) -> Example:
    """The conversation or the text in a raw row. Raises Rejection if it does not pass a check."""
    value = check_object(row.value)
    conversation = formats.read(value, row.format, file=row.file)
    if conversation.text is not None:
        check_text(conversation.text)
    else:
        check_encoding(conversation.messages, conversation.tools)
        check_turns(conversation.messages)
        check_length(conversation.messages, params.max_chars)
        if params.reject_placeholders:
            check_placeholders(conversation.messages)
    return make_example(value, conversation, group_by=params.group_by)


def _kept_row(row: RawRow, example: Example) -> dict[str, Any]:
    """The row as it is written. Its id is a hash of its content, so that it outlives a renamed file or format."""
    format, messages, tools, text, *_ = example.conversation
    content: dict[str, Any]
    if text is not None:
        content = {"text": text}
    else:
        content = {"messages": messages, "tools": tools} if tools else {"messages": messages}
    id = hashlib.sha256(dump_line(content)).hexdigest()[:16]
    return {"id": id, "source": row.source, "format": format, **content}


def _rejected_row(row: RawRow, rejection: Rejection) -> dict[str, Any]:
    raw = row.value.text if isinstance(row.value, Broken) else row.value
    return {"source": row.source, "reason": rejection.reason, "detail": rejection.detail, "raw": raw}
