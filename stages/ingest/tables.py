"""Reads the rows of Parquet, CSV and TSV files one batch at a time, with Hugging Face's `datasets`.

A row becomes an object: column name to value. The number of a row is its position, counted from 1; the header of a CSV file
is no row.

CSV is text, and stays text: "007", "1e5", "NA" and "true" are what the cell holds. An empty cell is a missing field. The
options below switch off what `datasets` and pandas would do to it. Two things cannot be switched off, and are mended here:
their reader stops at a quotation mark out of place, so the rest of such a file is read again line by line; and it accepts
only text that is valid, so it is given the bytes as Latin-1, and the cells are decoded here.

Parquet has types that JSON lacks: a date or a time becomes its ISO 8601 text, a decimal number its digits, bytes the text
that they hold in UTF-8, NaN a missing value. A row with other bytes or an infinite number is rejected. A field of a struct
that is null is missing: Parquet cannot tell one from the other.

`datasets` is imported when the first table is read. It opens no connection here, and keeps nothing: its cache is a folder
for temporary files, since it makes one even where it caches nothing.
"""

import csv
import datetime
import decimal
import io
import json
import math
import sys
import tempfile
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from stages.ingest.byte_chunks import ByteChunks
from stages.ingest.json_stream import MAX_BROKEN_CHARS, Broken

CSV_SUFFIXES = (".csv", ".tsv", ".csv.gz", ".tsv.gz")
TABLE_SUFFIXES = (".parquet", *CSV_SUFFIXES)
DELIMITERS = {",": "comma", "\t": "tab", ";": "semicolon", "|": "vertical bar"}
BATCH_ROWS = 1000
MAX_MISSING_ROWS = 1_000_000
"""A damaged Parquet file may state any number of rows; no more of them are reported one by one."""
LONGEST_NAME = 100
"""A longer cell of a header is no name."""
INDEX = "Unnamed: 0"
"""pandas' name for a first column without one: the row numbers that to_csv() writes."""


class Header(NamedTuple):
    """What the first line of a CSV file says."""

    delimiter: str
    names: tuple[str, ...]


def find_table_problem(path: Path) -> str:
    """Why no row of a table could be read, and what to do; "" if there is no such reason."""
    return _parquet_problem(path) if path.suffix == ".parquet" else _csv_problem(path)


def read_table(path: Path) -> Iterator[tuple[int, Any]]:
    """Yields (number, row): the position, counted from 1, and an object, or a Broken for a row that cannot be read."""
    yield from _read_parquet(path) if path.suffix == ".parquet" else _read_csv(path)


def describe_header(path: Path) -> str:
    """What is not as the name of a CSV file says: another delimiter; "" if there is nothing."""
    header = _read_header(path)
    by_name = "\t" if ".tsv" in path.suffixes else ","
    return "" if header.delimiter == by_name else f"its cells are separated by a {DELIMITERS[header.delimiter]}"


# CSV


def _csv_problem(path: Path) -> str:
    try:
        names = _read_header(path).names
    except csv.Error as error:
        return f"the header cannot be read: {error}; correct its first line"
    if not names:
        return "empty; a CSV file begins with a line that names its columns"
    if (twice := _twice(names)) or not any(_is_said(name) for name in names):
        return f"two columns have the name {twice}; rename one in its first line" if twice else ""
    said = next(filter(_is_said, names))
    return f"its first line has no names of columns, but {said[:60]!r}; write a line with their names above it"


def _twice(names: Sequence[str]) -> str:
    """The names that stand more than once, for a message."""
    return ", ".join(sorted(repr(name) for name, count in Counter(names).items() if count > 1))


def _is_said(name: str) -> bool:
    """Whether a cell of a header is a sentence, so that the header is the first row."""
    return len(name) > LONGEST_NAME or name.endswith((".", "?", "!", "。", "？", "！"))


def _read_header(path: Path) -> Header:
    """The names of the columns, and the delimiter: the one of the file's name, or another that splits the line better."""
    head = ByteChunks(path).head.decode("latin-1")
    first = "\t" if ".tsv" in path.suffixes else ","
    headers = [Header(delimiter, _first_record(head, delimiter)) for delimiter in sorted(DELIMITERS, key=first.__ne__)]
    return headers[0] if len(headers[0].names) > 1 else max(headers, key=lambda header: len(header.names))


def _first_record(head: str, delimiter: str) -> tuple[str, ...]:
    records = csv.reader(io.StringIO(head, newline=""), delimiter=delimiter)
    cells = next(filter(_is_row, records), [])
    names = [_decode(cell).strip() for cell in cells]
    return tuple([INDEX, *names[1:]] if names and not names[0] else names)


def _is_row(cells: Sequence[str]) -> bool:
    """Whether a line of CSV is more than white space, as pandas has it."""
    return len(cells) > 1 or bool(cells and cells[0].strip())


def _read_csv(path: Path) -> Iterator[tuple[int, Any]]:
    header = _read_header(path)
    csv.field_size_limit(sys.maxsize)  # a cell may be a long text
    with tempfile.TemporaryDirectory(prefix="loratory-") as folder:
        plain = Path(folder, "table.csv")  # a name in which `datasets` finds no pattern
        gzip_error = _put_plain(path, plain)
        rows = _csv_rows(plain, header)
        previous = next(rows, None)
        for row in rows:
            assert previous
            yield previous
            previous = row
        if gzip_error:  # the last row may be cut
            yield previous[0] if previous else 1, Broken("", gzip_error, "not_csv")
        elif previous:
            yield previous


def _put_plain(path: Path, target: Path) -> str:
    """Links a CSV file at `target`, or writes it there in UTF-8, decompressed. Returns what is wrong with its gzip."""
    chunks = ByteChunks(path)
    if chunks.is_plain:
        target.symlink_to(path.resolve())
        return ""
    with target.open("wb") as file:
        file.writelines(chunks)
    return chunks.gzip_error


def _csv_rows(plain: Path, header: Header) -> Iterator[tuple[int, Any]]:
    records = 0
    try:
        for cells in _stream_csv(plain, header):
            records += 1
            if records > 1 and (row := _csv_row(cells, header)) is not None:
                yield records - 1, row
    except (ValueError, csv.Error):  # pandas' ParserError is a ValueError
        for number, cells_or_broken in _read_on(plain, header, after=records):
            row = cells_or_broken if isinstance(cells_or_broken, Broken) else _csv_row(cells_or_broken, header)
            if number > 1 and row is not None:
                yield number - 1, row


def _stream_csv(plain: Path, header: Header) -> Iterator[tuple[str | None, ...]]:
    """The cells of each line, the header's too, and one more than the header has: what is too much."""
    import datasets

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    width = len(header.names) + 1
    stream = datasets.IterableDataset.from_csv(
        str(plain),
        cache_dir=str(plain.parent),
        sep=header.delimiter,
        header=None,
        names=[str(number) for number in range(width)],
        index_col=False,
        encoding="latin-1",
        engine="python",  # the other one fills a line that is too short with empty cells
        on_bad_lines=lambda cells: cells[:width],
        converters=dict.fromkeys(range(width), _same),  # no types are guessed
        keep_default_na=False,
        chunksize=BATCH_ROWS,
    )
    for batch in stream.with_format("arrow").iter(BATCH_ROWS):
        yield from zip(*(column.to_pylist() for column in batch.columns), strict=True)


def _same(cell: str) -> str:
    return cell


def _read_on(plain: Path, header: Header, *, after: int) -> Iterator[tuple[int, Sequence[str | None] | Broken]]:
    """Yields the records after the first `after`, and a Broken for each line whose quotation marks are out of place."""
    width = len(header.names) + 1
    with plain.open(encoding="latin-1", newline="") as file:
        lines = _Lines(file)
        records = csv.reader(lines, delimiter=header.delimiter, strict=True)
        number = 0
        while True:
            lines.taken.clear()
            try:
                cells = next(records)
            except StopIteration:
                return
            except csv.Error as error:
                number += 1
                broken, *rest = lines.taken
                lines.give_back(rest)
                if number > after:
                    yield number, _broken(_decode(broken), f"{error}; a quotation mark inside quotation marks is doubled")
                continue
            if _is_row(cells):
                number += 1
                if number > after:
                    yield number, [*cells, *[None] * (width - len(cells))][:width]


class _Lines:
    """The lines of a file, which can be given back."""

    def __init__(self, lines: Iterator[str]) -> None:
        self._lines = lines
        self._given_back: deque[str] = deque()
        self.taken: list[str] = []

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._given_back.popleft() if self._given_back else next(self._lines)
        self.taken.append(line)
        return line

    def give_back(self, lines: list[str]) -> None:
        self._given_back.extendleft(reversed(lines))


def _csv_row(cells: Sequence[str | None], header: Header) -> dict[str, str] | Broken | None:
    """The row in the cells of a line; None if all of them are empty."""
    *in_columns, too_much = cells
    filled = [cell for cell in in_columns if cell is not None]
    if too_much is not None or len(filled) < len(in_columns):
        found = "more" if too_much is not None else f"only {len(filled)}"
        text = header.delimiter.join(map(_decode, filled))
        return _broken(text, f"the header has {len(header.names)} cells, this row {found}")
    row = {name: _decode(cell) for name, cell in zip(header.names, filled, strict=True) if cell}
    return row or None


def _decode(cell: str) -> str:
    """The text of a cell that was read as Latin-1."""
    return cell if cell.isascii() else cell.encode("latin-1").decode("utf-8", "surrogateescape")


def _broken(text: str, detail: str) -> Broken:
    return Broken(text[:MAX_BROKEN_CHARS], detail, "not_csv")


# Parquet


def _parquet_problem(path: Path) -> str:
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        schema = pq.read_schema(path)
    except (pa.ArrowException, OSError, ValueError) as error:  # a damaged name of a column is a ValueError
        return f"not a complete Parquet file: {_one_line(error)}; get it again from an undamaged copy"
    if twice := _twice(schema.names):
        return f"two columns have the name {twice}; rename one"
    problems = []
    for field in schema:
        try:
            datasets.Features.from_arrow_schema(pa.schema([field.remove_metadata()]))
        except (ValueError, TypeError, NotImplementedError, AttributeError, KeyError):
            problems.append(f"column {field.name!r} has the type {field.type}, which `datasets` does not read")
    return "; ".join(problems) + "; leave it out or write it as text" if problems else ""


def _read_parquet(path: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        for row in _stream_parquet(path):
            number += 1
            yield number, row
    except (pa.ArrowException, OSError, ValueError) as error:
        rows = pq.read_metadata(path).num_rows
        for missing in range(number + 1, min(rows, number + MAX_MISSING_ROWS) + 1):
            yield missing, Broken("", f"damaged: {_one_line(error)}", "not_parquet")


def _stream_parquet(path: Path) -> Iterator[Any]:
    import pyarrow.parquet as pq

    # Not with `datasets`, whose scanner reads ahead: how many rows before a damage it yields differs from run to run.
    with pq.ParquetFile(path, pre_buffer=False) as file:
        for batch in file.iter_batches(BATCH_ROWS, use_threads=False):
            yield from map(_parquet_row, batch.to_pylist())


def _parquet_row(row: dict[str, Any]) -> dict[str, Any] | Broken:
    found: dict[str, Any] = {}
    for name, value in row.items():
        try:
            plain = _to_json(value)
        except _NotJsonError as error:
            text = json.dumps(row, ensure_ascii=False, default=repr)
            return Broken(text[:MAX_BROKEN_CHARS], f"column {name!r}: {error}", "not_parquet")
        if plain is not None:
            found[name] = plain
    return found


class _NotJsonError(Exception):
    """A value that JSON cannot hold."""


def _to_json(value: Any) -> Any:
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            if math.isinf(value):
                raise _NotJsonError("an infinite number")
            return None if math.isnan(value) else value
        case dict():
            return {key: plain for key, item in value.items() if (plain := _to_json(item)) is not None}
        case list() | tuple():
            return [_to_json(item) for item in value]
        case bytes():
            try:
                return value.decode()
            except UnicodeDecodeError:
                raise _NotJsonError(f"{len(value):,} bytes that are not UTF-8 text") from None
        case datetime.date() | datetime.time():  # a datetime is a date
            return value.isoformat()
        case datetime.timedelta() | decimal.Decimal():
            return str(value)
        case _:
            raise _NotJsonError(f"{type(value).__name__}, which JSON lacks")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
