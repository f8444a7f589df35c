"""Reads the JSON values of a file one at a time, and loses only the values that are broken.

A file is one JSON array, or JSON lines: one value per line. Its name does not matter, because BELLE's JSON lines are called
.json. It is UTF-8, with or without a byte order mark, and may be compressed with gzip. Memory holds one value, or one chunk
of the file if that is larger.

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
single line, nothing shows reliably where the next element starts, and the rest of the file is one Broken.
"""

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from stages.ingest.byte_chunks import ByteChunks

MAX_INTEGER_DIGITS = 4000
"""Python converts no longer integers by default (4300), and no row of text needs them."""
MAX_BROKEN_CHARS = 10_000
"""Characters of a Broken that are kept; its `detail` says how many there were."""
LOOKAHEAD_CHARS = 16
"""A token that the end of the buffer cuts starts less than this before it; a pair of \\uXXXX is the longest, with 12."""
WHITE_SPACE = re.compile(r"[ \t\r\n]*")
NOT_CLOSED = "the array is not closed"


class Broken(NamedTuple):
    """A part of a file that is not JSON."""

    text: str
    """Its text, or the first MAX_BROKEN_CHARS of it."""
    detail: str
    """Why it cannot be read."""


def read_values(path: Path) -> Iterator[tuple[int, Any]]:
    """Yields (number, value): the line number in JSON lines, the position in an array; both count from 1.

    A part of the file that is not JSON is yielded as a Broken. Bytes that are not UTF-8 become lone surrogates in the
    value's strings, so that the caller can name the field.

    Raises OSError if the file cannot be opened or read.
    """
    chunks = ByteChunks(path)
    yield from _read_array(_Text(chunks)) if _is_array(path, chunks.first) else _read_lines(chunks)


def _is_array(path: Path, first_chunk: bytes) -> bool:
    """Whether the file is one array. In a .jsonl file, a complete list on the first of several lines is a row."""
    text = first_chunk.removeprefix(codecs.BOM_UTF8)
    if not text.lstrip().startswith(b"["):
        return False
    if not path.name.endswith((".jsonl", ".jsonl.gz")):
        return True
    first_line, _, rest = text.partition(b"\n")
    try:
        json.loads(first_line)
    except (ValueError, RecursionError):
        return True
    return not rest.strip()


# JSON lines


def _read_lines(chunks: ByteChunks) -> Iterator[tuple[int, Any]]:
    decoder = _Decoder()
    for number, line in enumerate(_split_lines(chunks), 1):
        text = (line.removeprefix(codecs.BOM_UTF8) if number == 1 else line).decode("utf-8", errors="surrogateescape")
        if chunks.gzip_error:  # known when the last chunk was read, so this is the last line
            yield number, _broken(text, chunks.gzip_error)
        elif text and not text.isspace():
            yield number, decoder.decode_line(text)


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


# Arrays


def _read_array(text: "_Text") -> Iterator[tuple[int, Any]]:
    """Yields the elements of an array, and a Broken for each part that is not one."""
    text.skip_white_space()
    text.skip_character()  # the "["
    number = 0
    indent = text.skip_white_space()
    while text.next_character() != "]":
        number += 1
        if text.at_end():
            yield number, text.skip_broken(text.gzip_error or NOT_CLOSED, indent=None)
            return
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
                return  # the Broken says already that the end is missing
            case _:
                number += 1
                yield number, text.skip_broken(text.gzip_error or NOT_CLOSED, indent=indent)
                indent = text.skip_white_space()
                if text.at_end():
                    return
    text.skip_character()  # the "]"
    text.skip_white_space()
    if not text.at_end():
        yield number + 1, text.skip_broken("text after the end of the array", indent=None)


class _Text:
    """The text of a file, from the current position on. It is read as it is needed."""

    def __init__(self, chunks: ByteChunks) -> None:
        self._all_chunks = chunks
        self._chunks = iter(chunks)
        self._decode_utf8 = codecs.getincrementaldecoder("utf-8-sig")(errors="surrogateescape").decode
        self._decoder = _Decoder()
        self._buffer = ""
        self._position = 0
        self._file_ended = False

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
                    return self.skip_broken(self.gzip_error or self._in_element(error), indent=indent)
            else:
                # A number at the end of the buffer may go on: 12 may be the start of 12.5.
                if self._is_final(end) or not self._read_more():
                    self._position = end
                    return value

    def skip_broken(self, why: object, *, indent: str | None) -> Broken:
        """Skips to the next line that begins with `indent` and "{", or to the end of the file if `indent` is None.

        Returns what was skipped. The module's docstring explains the rule.
        """
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

    def _in_element(self, error: json.JSONDecodeError) -> json.JSONDecodeError:
        """The same error, with its line and column counted from the start of the element instead of the buffer."""
        return json.JSONDecodeError(error.msg, self._buffer[self._position : error.pos], error.pos - self._position)

    def _read_more(self) -> bool:
        """Reads at least as much text as is left, so that a long element is decoded few times. False at the end."""
        if self._file_ended:
            return False
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


# Values


class _Decoder:
    """Python's JSON decoder, except that NaN, Infinity (as pandas writes them) and huge integers make a value Broken."""

    def __init__(self) -> None:
        self._not_json: list[str] = []  # what the decoder accepted in the current value although it is not JSON
        self._decoder = json.JSONDecoder(parse_constant=self._not_json.append, parse_int=self._parse_int)

    def decode_line(self, text: str) -> Any:
        """The value that is the complete text, or a Broken."""
        self._not_json.clear()
        try:
            value = self._decoder.decode(text)
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
        return _broken(text, f"{self._not_json[0]} is not JSON")

    def _parse_int(self, digits: str) -> int | None:
        if len(digits) > MAX_INTEGER_DIGITS:
            self._not_json.append(f"an integer of {len(digits)} digits")
            return None
        return int(digits)


def _broken(text: str, why: object, *, length: int | None = None) -> Broken:
    """A Broken with the beginning of `text`; `length` is the number of characters if that is more than `text` has."""
    length = len(text) if length is None else length
    cut = "" if length <= MAX_BROKEN_CHARS else f"; {length:,} characters, the first {MAX_BROKEN_CHARS:,} kept"
    return Broken(text[:MAX_BROKEN_CHARS], f"{why}{cut}")
