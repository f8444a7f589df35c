"""Reads JSON values one by one from files of any size, and loses no more than the value that is broken.

A file is one array, or one value a line (JSON lines, whatever it is named: BELLE's are called .json); gzip or not; UTF-8
with or without a byte order mark. Memory holds one value, or the piece of an array that is read at once.
"""

import codecs
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

CHUNK_BYTES = 1 << 20
LONGEST_INTEGER = 4000
"""Digits; Python reads no more by default, and no row of text needs them."""
KEPT_TEXT = 10_000
"""Characters of a broken piece that are handed on; `detail` says how many there were."""


class Broken(NamedTuple):
    """A piece of a file that is not JSON: its text (the start of it, if it is long), and why it cannot be read."""

    text: str
    detail: str


def read_values(path: Path) -> Iterator[tuple[int, Any]]:
    """Numbered values: the line in JSON lines, the place (from 1) in an array. What is not JSON comes as a Broken.

    Bytes that are not UTF-8 come as lone surrogates inside the value's strings, so that the caller can name the field.

    Raises OSError if the file cannot be opened or read.
    """
    pieces = _Pieces(path)
    start = pieces.peek().removeprefix(codecs.BOM_UTF8).lstrip()[:1]
    array = start == b"[" and not (path.name.endswith((".jsonl", ".jsonl.gz")) and _begins_with_a_line(pieces.peek()))
    yield from _array(_Text(pieces)) if array else _lines(pieces)


def _begins_with_a_line(piece: bytes) -> bool:
    """Whether a first line is a whole value and more follows: then a list in it is a row, and not the file's array."""
    line, _, rest = piece.partition(b"\n")
    try:
        json.loads(line.removeprefix(codecs.BOM_UTF8))
    except (ValueError, RecursionError):
        return False
    return bool(rest.strip())


class _Pieces:
    """The bytes of a file in pieces, unpacked as far as they can be; `torn` says so where an archive breaks off."""

    def __init__(self, path: Path) -> None:
        self._source = self._unpack(path) if path.suffix == ".gz" else self._read(path)
        self._first: bytes | None = None
        self.torn = ""

    def __iter__(self) -> Iterator[bytes]:
        first, self._first = self._first, None
        if first:
            yield first
        yield from self._source

    def peek(self) -> bytes:
        if self._first is None:
            self._first = next(self._source, b"")
        return self._first

    def _read(self, path: Path) -> Iterator[bytes]:
        with path.open("rb") as file:
            while piece := file.read(CHUNK_BYTES):
                yield piece

    def _unpack(self, path: Path) -> Iterator[bytes]:
        gzip_with_header = 16 + zlib.MAX_WBITS
        unpacker = zlib.decompressobj(gzip_with_header)
        whole = True
        try:
            for read in self._read(path):
                packed = read
                while packed:
                    if unpacker.eof:  # a file may be several archives, one after the other
                        unpacker = zlib.decompressobj(gzip_with_header)
                    if piece := unpacker.decompress(packed, CHUNK_BYTES):
                        yield piece
                    packed = unpacker.unused_data if unpacker.eof else unpacker.unconsumed_tail
                whole = unpacker.eof
            if not whole:
                self.torn = "the gzip file breaks off"
        except zlib.error as error:
            self.torn = f"the gzip file breaks off: {error}"


def _lines(pieces: _Pieces) -> Iterator[tuple[int, Any]]:
    number, line = 1, [b""]
    for piece in pieces:
        head, *rest = piece.split(b"\n")
        line.append(head)
        for following in rest:
            yield from _line(number, b"".join(line))
            number, line = number + 1, [following]
    if pieces.torn:
        yield number, _broken(b"".join(line).decode("utf-8", errors="surrogateescape"), pieces.torn)
    else:
        yield from _line(number, b"".join(line))


def _line(number: int, line: bytes) -> Iterator[tuple[int, Any]]:
    text = (line.removeprefix(codecs.BOM_UTF8) if number == 1 else line).decode("utf-8", errors="surrogateescape")
    if text.strip():
        yield number, _parse(text)


def _parse(text: str) -> Any:
    _not_json.clear()  # a line that broke behind a NaN leaves it there
    try:
        return _checked(DECODER.decode(text), text)
    except (ValueError, RecursionError) as error:
        return _broken(text, error)


_not_json: list[str] = []
"""What Python's decoder let pass in the value at hand, though it is no JSON."""


def _constant(name: str) -> None:
    _not_json.append(name)


def _integer(digits: str) -> int | None:
    if len(digits) > LONGEST_INTEGER:
        _not_json.append(f"an integer of {len(digits)} digits")
        return None
    return int(digits)


DECODER = json.JSONDecoder(parse_constant=_constant, parse_int=_integer)


def _checked(value: Any, text: str) -> Any:
    """The value, or a Broken for it alone if there is NaN (pandas writes it) or the like in it."""
    if not _not_json:
        return value
    return _broken(text, f"{_not_json[0]} is not JSON")


def _broken(text: str, why: object, length: int | None = None) -> Broken:
    """A Broken with the first KEPT_TEXT of the text's characters, and with its `length` if that is more."""
    length = len(text) if length is None else length
    more = "" if length <= KEPT_TEXT else f"; {length:,} characters, the first {KEPT_TEXT:,} kept"
    return Broken(text[:KEPT_TEXT], f"{why}{more}")


class _Text:
    """The text of a file that is read as it is needed."""

    def __init__(self, pieces: _Pieces) -> None:
        self._pieces = pieces
        self._source = iter(pieces)
        self._decode = codecs.getincrementaldecoder("utf-8-sig")(errors="surrogateescape").decode
        self.buffer, self.at, self.ended = "", 0, False

    @property
    def torn(self) -> str:
        return self._pieces.torn

    def more(self) -> bool:
        """Reads on, at least doubling what is left, so that a long value is tried few times; False at the end."""
        if self.ended:
            return False
        left = self.buffer[self.at :]
        parts, size = [], 0
        while size <= len(left) and not self.ended:
            piece = next(self._source, b"")
            self.ended = not piece
            parts.append(piece)
            size += len(piece)
        self.buffer = left + self._decode(b"".join(parts), self.ended)
        self.at = 0
        return True

    def peek(self) -> str:
        """The next character that is no white space, "" at the end."""
        while True:
            while self.at < len(self.buffer) and self.buffer[self.at] in " \t\r\n":
                self.at += 1
            if self.at < len(self.buffer):
                return self.buffer[self.at]
            if not self.more():
                return ""

    def value(self) -> Any:
        """The value that begins here, or a Broken that holds all that is left."""
        while True:
            _not_json.clear()
            try:
                value, end = DECODER.raw_decode(self.buffer, self.at)
            except RecursionError as error:
                return self.rest(error)
            except ValueError as error:
                # An error well before the end of what is read is no matter of reading on, unless it is a string's start.
                known = isinstance(error, json.JSONDecodeError) and not error.msg.startswith("Unterminated")
                if (known and cast(json.JSONDecodeError, error).pos < len(self.buffer) - 16) or not self.more():
                    return self.rest(self.torn or error)
                continue
            # Behind what is read, a number may go on: 12 may be the start of 12.5.
            if self.buffer[end : end + 1] in tuple(" \t\r\n,]") or not self.more():
                text, self.at = self.buffer[self.at : end], end
                return _checked(value, text)

    def rest(self, why: object) -> Broken:
        """All that is left, as a Broken; reads to the end, and keeps only its beginning."""
        text = self.buffer[self.at :]
        kept, length = text[:KEPT_TEXT], len(text)
        self.at = len(self.buffer)
        while self.more():
            length += len(self.buffer)
            kept = (kept + self.buffer[:KEPT_TEXT])[:KEPT_TEXT]
            self.at = len(self.buffer)
        return _broken(kept, why, length)


def _array(text: _Text) -> Iterator[tuple[int, Any]]:
    """The elements: where the array breaks off, those before are handed on, and the rest is one Broken."""
    text.peek()
    text.at += 1
    number = 1
    while text.peek() != "]":
        if not text.peek():
            yield number, text.rest(text.torn or "the array is not closed")
            return
        value = text.value()
        yield number, value
        number += 1
        if text.at == len(text.buffer) and text.ended and isinstance(value, Broken):
            return  # it holds all that was left
        if text.peek() == ",":
            text.at += 1
        elif text.peek() != "]":
            yield number, text.rest(text.torn or "the array is not closed")
            return
    text.at += 1
    if text.peek():
        yield number, text.rest("text after the end of the array")
