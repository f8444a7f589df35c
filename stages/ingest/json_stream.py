"""Reads the JSON values of a file one at a time, and loses only the values that are broken.

The content decides the shape of a file, not its name, because BELLE's JSON lines are called .json:

    JSON lines      one value per line
    array           [{...}, {...}]
    objects         pretty-printed, one after the other, or a single one
    wrapper         {"data": [{...}, {...}]}, {"train": [...], "test": [...]}, with or without other members
    numbered        {"0": {...}, "1": {...}}, also pandas' orient="index"
    columns         {"question": {"0": "...", "1": "..."}, "answer": {...}}, as pandas' to_json() writes them
    lists           {"question": ["...", "..."], "answer": ["...", "..."]}, pandas' orient="list"
    named           {"row-7": {...}, "row-9": {...}}, rows with the same fields
    split           {"columns": [...], "index": [...], "data": [[...], [...]]}, pandas' orient="split"

Memory holds one value, or one chunk of the file if that is larger. The last four shapes, and a wrapper whose list is not
called one of WRAPPERS, are read whole: about ten times the size of the file.

A broken line costs only itself, because the next line starts a new value. In an array, the next element must be found.
Recovery by indentation: if a broken element is the first thing on its line, the next element is taken to start at the next
line that begins with the same white space and a "{". Everything before that line is one Broken. For example

    [
      {"a": 1},
      {"a": 2, "b": {
        "c": 3,
      {"a": 4}
    ]

is read as {"a": 1}, a Broken with the text of lines 3 and 4, and {"a": 4}. The two spaces before {"a": 2 and {"a": 4} are
equal; what is inside an element is indented further. If a broken element does not begin its line, as in an array on a
single line, nothing shows reliably where the next element starts, and the rest of the file is one Broken. Pretty-printed
objects one after the other are read in the same way.
"""

import codecs
import json
import re
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

from stages.ingest.byte_chunks import ByteChunks
from stages.ingest.split_names import split_named

MAX_INTEGER_DIGITS = 4000
"""Python converts no longer integers by default (4300), and no row of text needs them."""
MAX_BROKEN_CHARS = 10_000
"""Characters of a Broken that are kept; its `detail` says how many there were."""
LOOKAHEAD_CHARS = 16
"""A token that the end of the buffer cuts starts less than this before it; a pair of \\uXXXX is the longest, with 12."""
WHITE_SPACE = re.compile(r"[ \t\r\n]*")
NOT_CLOSED = "the array is not closed"
WRAPPERS = ("data", "rows", "examples", "instances", "items", "records", "samples")
"""Keys under which a file keeps its rows; so are the names of splits."""
ROW_FIELDS = frozenset(
    ("instruction", "input", "output", "system", "history", "conversations", "conversation", "messages", "tools")
) | frozenset(
    ("prompt", "completion", "question", "answer", "text", "query", "response", "chosen", "rejected", "content", "summary")
)
"""An object with one of these keys is a row, even if it has a list of objects."""
TURN_FIELDS = frozenset({"role", "from", "value", "content"})
"""An object with one of these keys is a turn of a conversation, and no row."""
STRING = r'"(?:[^"\\]|\\.)*"'
SCALARS = re.compile(rf"\{{\s*(?:{STRING}\s*:\s*(?:{STRING}|[-+.\w]+)\s*,\s*)*")
"""The beginning of an object, with its members up to the first that is a list or an object."""
LIST = re.compile(rf"({STRING})\s*:\s*(\[\s*[{{\]])")
"""A member that is a list of objects, or an empty one."""
LIST_OF_OBJECTS = re.compile(r"\[[ \t\r\n]*([^ \t\r\n])")
NUMBERED = re.compile(r'\{\s*"\d+"\s*:\s*\{')
Place: TypeAlias = int | str
Shape: TypeAlias = Literal["lines", "array", "objects", "wrapper", "numbered"]


class Broken(NamedTuple):
    """A part of a file that is not JSON."""

    text: str
    """Its text, or the first MAX_BROKEN_CHARS of it."""
    detail: str
    """Why it cannot be read."""
    reason: str = "not_json"
    """What a rejected row is counted by."""


def read_values(path: Path) -> Iterator[tuple[Place, Any]]:
    """Yields (place, value): the line number in JSON lines, elsewhere the position, both counted from 1; and the value.

    In lists under the name of a split the place is "train:1", that name before the position.

    A part of the file that is not JSON is yielded as a Broken. Bytes that are not UTF-8 become lone surrogates in the
    value's strings, so that the caller can name the field.

    Raises OSError if the file cannot be opened or read.
    """
    chunks = ByteChunks(path)
    match _find_shape(path, chunks.head.decode("utf-8", "surrogateescape")):
        case "lines":
            yield from _read_lines(chunks)
        case "array":
            yield from _read_array(_Text(chunks))
        case "objects":
            yield from _read_objects(_Text(chunks))
        case "wrapper":
            yield from _read_wrapper(_Text(chunks))
        case "numbered":
            yield from _read_numbered(_Text(chunks))


def has_split_lists(path: Path) -> bool:
    """Whether a file is a wrapper that begins with the list of a split."""
    head = ByteChunks(path).head.decode("utf-8", "surrogateescape").lstrip(" \t\r\n")
    return _find_shape(path, head) == "wrapper" and bool(split_named(_first_list(head)))


# Shapes


def _find_shape(path: Path, head: str) -> Shape:
    """The shape of a file that begins with `head`."""
    text = head.lstrip(" \t\r\n")
    if text.startswith("["):
        return "array" if _is_array(path, text) else "lines"
    if not text.startswith("{"):
        return "lines"
    first_line, _, rest = text.partition("\n")
    next_lines = rest.lstrip().split("\n", 2)[:2]
    # Objects in lines of their own are JSON lines, even if the first one is broken; in a list, commas stand between them.
    if all(line.startswith("{") and is_json(line) for line in next_lines if line) and rest.strip():
        return "lines"
    if is_json(first_line) and rest.strip():
        return "lines"
    if _has_second_object(text):
        return "objects"
    if _is_wrapper(text):
        return "wrapper"
    if NUMBERED.match(text):
        return "numbered"
    return "objects" if rest.strip() and _goes_on(first_line) else "lines"


def _has_second_object(text: str) -> bool:
    """Whether another object follows the first one."""
    try:
        _, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return False
    return text[end:].lstrip(" \t\r\n,").startswith("{")


def _is_array(path: Path, text: str) -> bool:
    """Whether the file is one array. In a .jsonl file, a complete list on the first of several lines is a row."""
    if not path.name.endswith((".jsonl", ".jsonl.gz")):
        return True
    first_line, _, rest = text.partition("\n")
    return not is_json(first_line) or not rest.strip()


def is_json(text: str) -> bool:
    """Whether a text is one JSON value."""
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _goes_on(line: str) -> bool:
    """Whether a line is the beginning of a JSON value that goes on in the next line."""
    line = line.rstrip()
    try:
        json.loads(line)
    except json.JSONDecodeError as error:
        return error.pos >= len(line) - 1 and not error.msg.startswith("Unterminated")
    except (ValueError, RecursionError):
        return False
    return False


def _is_wrapper(text: str) -> bool:
    """Whether an object keeps the rows in a list under one of the usual keys; only its beginning is looked at."""
    scalars = SCALARS.match(text)
    found = LIST.match(text, scalars.end()) if scalars else None
    if not scalars or not found or not ROW_FIELDS.isdisjoint(re.findall(r'"(\w+)"\s*:', scalars[0])):
        return False
    key = _first_list(text)
    if found[2].endswith("]"):
        return key in WRAPPERS or bool(split_named(key))
    if key not in WRAPPERS and not split_named(key):
        return False
    try:
        first, _ = json.JSONDecoder().raw_decode(text, found.end() - 1)
    except (ValueError, RecursionError):
        return True
    return not _is_turn(first)


def _first_list(text: str) -> str:
    """The key of the first member of an object that is neither a text nor a number, if it is a list of objects."""
    scalars = SCALARS.match(text)
    found = LIST.match(text, scalars.end()) if scalars else None
    return found[1][1:-1] if found else ""


def _is_turn(value: Any) -> bool:
    return isinstance(value, dict) and not TURN_FIELDS.isdisjoint(value)


def _rows_of(value: Any) -> Iterator[tuple[Place, Any]]:
    """The rows in the only value of a file: those of a wrapper, of numbered objects or of columns, or the value itself."""
    if not isinstance(value, dict) or not value:
        yield 1, value
    elif _is_table(value):
        for number, row in enumerate(value["data"], 1):
            yield number, dict(zip(value["columns"], row, strict=True))
    elif _are_columns(value):
        for number, key in enumerate(next(iter(value.values())), 1):
            yield number, {name: column[key] for name, column in value.items()}
    elif _are_lists(value):
        for number, cells in enumerate(zip(*value.values(), strict=True), 1):
            yield number, dict(zip(value, cells, strict=True))
    elif all(key.isdecimal() and isinstance(row, dict) for key, row in value.items()) or _are_named_rows(value):
        yield from enumerate(value.values(), 1)
    elif key := _wrapped(value):
        yield from enumerate(value[key], 1)
    else:
        yield 1, value


def _is_table(value: dict[str, Any]) -> bool:
    """Whether an object is a table in pandas' orient="split"."""
    columns, rows = value.get("columns"), value.get("data")
    if not value.keys() <= {"columns", "index", "data"} or not isinstance(columns, list) or not isinstance(rows, list):
        return False
    return all(isinstance(name, str) for name in columns) and all(
        isinstance(row, list) and len(row) == len(columns) for row in rows
    )


def _are_columns(value: dict[str, Any]) -> bool:
    """Whether an object is a table in pandas' column form: each column an object with the same row numbers."""
    columns = list(value.values())
    if not all(isinstance(column, dict) and column for column in columns) or all(map(str.isdecimal, value)):
        return False
    return all(map(str.isdecimal, columns[0])) and all(list(column) == list(columns[0]) for column in columns[1:])


def _are_lists(value: dict[str, Any]) -> bool:
    """Whether an object is a table in pandas' orient="list", as Dataset.to_dict() gives it: lists of the same length.

    The lists of a single row would be of turns, or of different lengths.
    """
    columns = list(value.values())
    if len(columns) < 2 or not all(isinstance(column, list) and column for column in columns):
        return False
    texts = [name for name, column in value.items() if name in ROW_FIELDS and not any(map(_is_turn, column))]
    return (len(texts) > 1 or "text" in texts) and len(set(map(len, columns))) == 1


def _are_named_rows(value: dict[str, Any]) -> bool:
    """Whether an object has rows with the same fields under names, such as ids."""
    rows = list(value.values())
    if len(rows) < 2 or not ROW_FIELDS.isdisjoint(value) or not all(isinstance(row, dict) for row in rows):
        return False
    fields = rows[0].keys()
    return len(fields) > 1 and not ROW_FIELDS.isdisjoint(fields) and all(row.keys() == fields for row in rows)


def _wrapped(value: dict[str, Any]) -> str:
    """The key of an object's only list of objects, if these are rows and not a field of one row; else ""."""
    if not ROW_FIELDS.isdisjoint(value):
        return ""
    lists = [key for key, rows in value.items() if isinstance(rows, list) and rows and isinstance(rows[0], dict)]
    return lists[0] if len(lists) == 1 and not any(map(_is_turn, value[lists[0]])) else ""


# JSON lines


def _read_lines(chunks: ByteChunks) -> Iterator[tuple[Place, Any]]:
    values = _read_each_line(chunks)
    first, second = next(values, None), next(values, None)
    if first and second:
        yield first
        yield second
        yield from values
    elif first:  # the only value: a row, or an object that holds all of them
        rows = list(_rows_of(first[1]))
        yield from [first] if len(rows) == 1 and rows[0][1] is first[1] else rows


def _read_each_line(chunks: ByteChunks) -> Iterator[tuple[int, Any]]:
    decoder = _Decoder()
    for number, line in enumerate(_split_lines(chunks), 1):
        text = line.decode("utf-8", errors="surrogateescape")
        if chunks.gzip_error:  # known when the last chunk was read, so this is the last line
            yield number, _broken(text, chunks.gzip_error)
        elif text and not text.isspace():
            # A file that was put together from several has their byte order marks at the beginning of lines.
            yield number, decoder.decode_line(text.removeprefix("\ufeff"), number)


def _split_lines(chunks: ByteChunks) -> Iterator[bytes]:
    """The lines of a file, also those longer than a chunk."""
    parts: list[bytes] = []
    for chunk in chunks:
        end_of_line, *more_lines = chunk.split(b"\n")
        parts.append(end_of_line)
        for line in more_lines:
            yield b"".join(parts)
            parts = [line]
    yield b"".join(parts)


# Arrays and objects


def _read_array(text: "_Text") -> Iterator[tuple[int, Any]]:
    """Yields the elements of a file that is an array, and a Broken for each part that is not one."""
    text.skip_white_space()
    elements = yield from _read_elements(text)
    yield from _read_end(text, elements + 1, "text after the end of the array")


def _read_elements(text: "_Text") -> Generator[tuple[int, Any], None, int]:
    """Yields the elements of the array at the position, and a Broken for each part that is not one. Returns their number."""
    text.skip_character()  # the "["
    number = 0
    indent = text.skip_white_space()
    while text.next_character() != "]":
        number += 1
        if text.at_end():
            yield number, text.skip_broken(text.gzip_error or NOT_CLOSED, indent=None)
            return number
        value = text.read_element(indent)
        yield number, value
        next_indent = text.skip_white_space()
        match text.next_character():
            case ",":
                text.skip_character()
                indent = text.skip_white_space()
            case "{" if next_indent is not None and next_indent == indent:
                pass  # the next element, after a Broken or a missing comma
            case "]":
                pass
            case "" if isinstance(value, Broken):
                return number  # the Broken says already that the end is missing
            case _:
                number += 1
                yield number, text.skip_broken(text.gzip_error or NOT_CLOSED, indent=indent)
                indent = text.skip_white_space()
                if text.at_end():
                    return number
    text.skip_character()  # the "]"
    return number


def _read_end(text: "_Text", number: int, why: str) -> Iterator[tuple[int, Any]]:
    """Yields a Broken if anything but white space is left."""
    text.skip_white_space()
    if not text.at_end():
        yield number, text.skip_broken(why, indent=None)


def _read_objects(text: "_Text") -> Iterator[tuple[Place, Any]]:
    """Yields the objects of a file that has one after the other, or the rows in the only one."""
    text.skip_white_space()
    value = text.read_element("")
    indent = text.skip_white_space()
    if text.at_end():
        yield from _rows_of(value)
        return
    yield 1, value
    number = 1
    while not text.at_end():
        if text.next_character() == ",":
            text.skip_character()
            indent = text.skip_white_space()
        number += 1
        yield number, text.read_element(indent)
        indent = text.skip_white_space()


def _read_wrapper(text: "_Text") -> Iterator[tuple[Place, Any]]:
    """Yields the elements of the lists of objects in an object. Its other members are no rows."""
    plain_lists = 0
    for key in _read_members(text):
        if isinstance(key, Broken):
            yield "end", key
        elif text.starts_list_of_objects():
            split, plain_lists = split_named(key), plain_lists + (not split_named(key))
            # A second list has no rows, as a rule; they are rejected under its name.
            prefix = f"{key}:" if split or plain_lists > 1 else ""
            for number, value in _read_elements(text):
                yield f"{prefix}{number}" if prefix else number, value
        elif isinstance(value := text.read_element(None), Broken):
            yield key, value


def _read_numbered(text: "_Text") -> Iterator[tuple[Place, Any]]:
    """Yields the values of an object whose keys are numbers."""
    for number, key in enumerate(_read_members(text), 1):
        yield number, key if isinstance(key, Broken) else text.read_element(None)


def _read_members(text: "_Text") -> Iterator[str | Broken]:
    """Yields the key of each member of the object that is the file; the caller reads the value before the next.

    Yields a Broken, as the last, if the object is not as JSON wants it.
    """
    text.skip_white_space()
    text.skip_character()  # the "{"
    text.skip_white_space()
    while text.next_character() != "}":
        key = text.read_element(None) if text.next_character() == '"' else None
        text.skip_white_space()
        if not isinstance(key, str) or text.next_character() != ":":
            if not isinstance(key, Broken):
                key = text.skip_broken(text.gzip_error or "the object is not closed", indent=None)
            yield key
            return
        text.skip_character()
        text.skip_white_space()
        yield key
        text.skip_white_space()
        if text.next_character() == ",":
            text.skip_character()
            text.skip_white_space()
        elif text.next_character() != "}":
            if not (text.at_end() and text.was_broken):
                yield text.skip_broken(text.gzip_error or "the object is not closed", indent=None)
            return
    text.skip_character()
    for _, broken in _read_end(text, 1, "text after the end of the object"):
        yield broken


class _Text:
    """The text of a file, from the current position on. It is read as it is needed."""

    def __init__(self, chunks: ByteChunks) -> None:
        self._all_chunks = chunks
        self._chunks = iter(chunks)
        self._decode_utf8 = codecs.getincrementaldecoder("utf-8")(errors="surrogateescape").decode
        self._decoder = _Decoder()
        self._buffer = ""
        self._position = 0
        self._file_ended = False
        self._buffer_start = 0  # characters of the file before the buffer
        self._lines = _LineCounter(chunks.path)
        self.was_broken = False
        """Whether a part was skipped and returned as a Broken."""

    @property
    def gzip_error(self) -> str:
        return self._all_chunks.gzip_error

    def next_character(self) -> str:
        """The character at the position, "" at the end of the file. Call `skip_white_space` before it."""
        return self._buffer[self._position : self._position + 1]

    def at_end(self) -> bool:
        """Whether the file has no more text. Call `skip_white_space` before it."""
        return not self.next_character()

    def skip_character(self) -> None:
        self._position += 1

    def starts_list_of_objects(self) -> bool:
        """Whether the value at the position is a list whose first element is an object, or an empty list."""
        while not (found := LIST_OF_OBJECTS.match(self._buffer, self._position)):
            rest = self._buffer[self._position :]
            if (rest and (rest[0] != "[" or rest[1:].strip())) or not self._read_more():
                return False
        return found[1] in "{]"

    def skip_white_space(self) -> str | None:
        """Moves to the next character that is not white space.

        Returns the indentation of that character: the white space before it on its line. None if no new line began.
        """
        space = ""
        while True:
            found = WHITE_SPACE.match(self._buffer, self._position)
            assert found
            space += found[0]
            self._position = found.end()
            if self._position < len(self._buffer) or not self._read_more():
                break
        _, newline, indent = space.rpartition("\n")
        return indent if newline else None

    def read_element(self, indent: str | None) -> Any:
        """Reads the element at the position, whose indentation is `indent`.

        One that is broken is skipped, up to where the next element starts, and returned as a Broken.
        """
        while True:
            try:
                value, end = self._decoder.decode_at(self._buffer, self._position)
            except RecursionError as error:
                return self.skip_broken(error, indent=indent)
            except json.JSONDecodeError as error:
                # The position of an unterminated string is its start, so its end may still be to come.
                final = self._is_final(error.pos) and not error.msg.startswith("Unterminated")
                if final or not self._read_more():
                    return self.skip_broken(self.gzip_error or self._describe(error), indent=indent)
            else:
                # A number at the end of the buffer may go on: 12 may be the start of 12.5.
                if self._is_final(end) or not self._read_more():
                    self._position = end
                    return value

    def skip_broken(self, why: object, *, indent: str | None) -> Broken:
        """Skips to the next line that begins with `indent` and "{", or to the end of the file if `indent` is None.

        Returns what was skipped. The module's docstring explains the rule.
        """
        self.was_broken = True
        next_element = None if indent is None else re.compile(rf"\n{re.escape(indent)}(?={{)")
        overlap = len(indent or "") + 2  # the match may begin in this buffer and end in the next
        kept, length = "", 0
        while True:
            found = next_element.search(self._buffer, self._position) if next_element else None
            if found:
                end = found.start()
            elif self._file_ended:
                end = len(self._buffer)
            else:
                end = max(len(self._buffer) - overlap, self._position)
            if len(kept) < MAX_BROKEN_CHARS:
                kept += self._buffer[self._position : min(end, self._position + MAX_BROKEN_CHARS)]
            length += end - self._position
            self._position = end
            if found or not self._read_more():
                return _broken(kept, why, length=length)

    def _is_final(self, position: int) -> bool:
        """Whether more text cannot change a value, or an error, that ends at this position of the buffer."""
        return position < len(self._buffer) - LOOKAHEAD_CHARS

    def _describe(self, error: json.JSONDecodeError) -> str:
        """What is wrong, with the line and column in the file."""
        return f"{error.msg}: {self._lines.find(self._buffer_start + error.pos)}"

    def _read_more(self) -> bool:
        """Reads at least as much text as is left, so that a long element is decoded few times. False at the end."""
        if self._file_ended:
            return False
        self._buffer_start += self._position
        left = self._buffer[self._position :]
        chunks, size = [], 0
        while size <= len(left) and not self._file_ended:
            chunk = next(self._chunks, b"")
            self._file_ended = not chunk
            chunks.append(chunk)
            size += len(chunk)
        self._buffer = left + self._decode_utf8(b"".join(chunks), self._file_ended)
        self._position = 0
        return True


class _LineCounter:
    """Finds the line and the column of a character, in a second reading of the file that only an error needs.

    Counting the lines of every file would take a tenth of the time of reading it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._texts: Iterator[str] | None = None
        self._text = ""
        self._counted, self._line, self._column = 0, 1, 1  # up to where the text begins

    def find(self, position: int) -> str:
        """The place of the character at a position, which is not before the last that was asked for."""
        if self._texts is None:
            decode = codecs.getincrementaldecoder("utf-8")(errors="surrogateescape").decode
            self._texts = map(decode, ByteChunks(self._path))
        while self._counted + len(self._text) < position:
            self._count(len(self._text))
            text = next(self._texts, None)
            if text is None:
                break
            self._text = text
        self._count(max(0, position - self._counted))
        return f"line {self._line} column {self._column}"

    def _count(self, length: int) -> None:
        """Goes over the first characters of the text."""
        passed, self._text = self._text[:length], self._text[length:]
        self._counted += len(passed)
        self._line += passed.count("\n")
        self._column = len(passed) - passed.rfind("\n") if "\n" in passed else self._column + len(passed)


# Values


class _Decoder:
    """Python's JSON decoder, except that some things make a value Broken.

    These are NaN and Infinity (as pandas writes them), huge integers, and a key that an object has twice with different
    values: one of them would be lost.
    """

    def __init__(self) -> None:
        self._not_json: list[str] = []  # what the decoder accepted in the current value although it may not stay
        self._decoder = json.JSONDecoder(
            parse_constant=self._refuse_constant, parse_int=self._parse_int, object_pairs_hook=self._make_object
        )

    def decode_line(self, text: str, number: int) -> Any:
        """The value that is the complete text of a line, or a Broken. `number` is the line's."""
        self._not_json.clear()
        try:
            value = self._decoder.decode(text)
        except json.JSONDecodeError as error:
            return _broken(text, f"{error.msg}: line {number} column {error.pos + 1}")
        except (ValueError, RecursionError) as error:
            return _broken(text, error)
        return self._not_strict(text) if self._not_json else value

    def decode_at(self, text: str, start: int) -> tuple[Any, int]:
        """The value that begins at `start`, or a Broken, and where it ends.

        Raises json.JSONDecodeError if there is no value, and RecursionError if it is nested too deeply.
        """
        self._not_json.clear()
        value, end = self._decoder.raw_decode(text, start)
        return (self._not_strict(text[start:end]) if self._not_json else value), end

    def _not_strict(self, text: str) -> Broken:
        return _broken(text, self._not_json[0])

    def _refuse_constant(self, name: str) -> None:
        self._not_json.append(f"{name} is not JSON")

    def _make_object(self, members: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(members)
        if len(found) != len(members):
            twice = next((key for key, value in members if value != found[key]), None)
            if twice is not None:
                self._not_json.append(f"an object has the key {twice!r} twice")
        return found

    def _parse_int(self, digits: str) -> int | None:
        if len(digits) > MAX_INTEGER_DIGITS:
            self._not_json.append(f"an integer of {len(digits)} digits is not JSON")
            return None
        return int(digits)


def _broken(text: str, why: object, *, length: int | None = None) -> Broken:
    """A Broken with the beginning of `text`; `length` is the number of characters if that is more than `text` has."""
    length = len(text) if length is None else length
    cut = "" if length <= MAX_BROKEN_CHARS else f"; {length:,} characters, the first {MAX_BROKEN_CHARS:,} kept"
    return Broken(text[:MAX_BROKEN_CHARS], f"{why}{cut}")
