"""Reads JSON values one by one from files of any size, and loses no more than the value that is broken.

A file is one array, or one value a line (JSON lines, whatever it is named: BELLE's are called .json); gzip or not; UTF-8
with or without a byte order mark. Memory holds one value, or the piece of an array that is read at once.
"""

import codecs
import json
import re
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
    decoder = _Decoder()
    number, line = 1, [b""]
    for piece in pieces:
        head, *rest = piece.split(b"\n")
        line.append(head)
        for following in rest:
            yield from _line(number, b"".join(line), decoder)
            number, line = number + 1, [following]
    if pieces.torn:
        yield number, _broken(b"".join(line).decode("utf-8", errors="surrogateescape"), pieces.torn)
    else:
        yield from _line(number, b"".join(line), decoder)


def _line(number: int, line: bytes, decoder: "_Decoder") -> Iterator[tuple[int, Any]]:
    text = (line.removeprefix(codecs.BOM_UTF8) if number == 1 else line).decode("utf-8", errors="surrogateescape")
    if text.strip():
        try:
            yield number, decoder.decode(text)[0]
        except (ValueError, RecursionError) as error:
            yield number, _broken(text, error)


class _Decoder:
    """Python's JSON decoder, which lets pass what is no JSON, and what it let pass in the value at hand."""

    def __init__(self) -> None:
        self._found: list[str] = []
        self._decoder = json.JSONDecoder(parse_constant=self._found.append, parse_int=self._integer)

    def decode(self, text: str, at: int = 0, *, whole: bool = True) -> tuple[Any, int]:
        """The value at a character and where it ends; a Broken for it alone if there is NaN (pandas writes it) in it.

        Raises ValueError if there is none, or, for a `whole` text, if more follows; RecursionError if it is nested too deep.
        """
        self._found.clear()
        if whole:
            value, end = self._decoder.decode(text), len(text)
        else:
            value, end = self._decoder.raw_decode(text, at)
        return (_broken(text[at:end], f"{self._found[0]} is not JSON") if self._found else value), end

    def _integer(self, digits: str) -> int | None:
        if len(digits) > LONGEST_INTEGER:
            self._found.append(f"an integer of {len(digits)} digits")
            return None
        return int(digits)


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
        self._decoder = _Decoder()
        self.buffer, self.at, self.ended = "", 0, False
        self.indent: str | None = None
        """White space before the next character, back to its line's beginning; None if other text is before it there."""

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
            while self.at < len(self.buffer) and (space := self.buffer[self.at]) in " \t\r\n":
                if space == "\n":
                    self.indent = ""
                elif self.indent is not None:
                    self.indent += space
                self.at += 1
            if self.at < len(self.buffer):
                return self.buffer[self.at]
            if not self.more():
                return ""

    def skip(self) -> None:
        """Steps over the next character."""
        self.at += 1
        self.indent = None

    def value(self) -> Any:
        """The value that begins here, or a Broken that holds all up to where the next may begin."""
        indent = self.indent
        while True:
            try:
                value, end = self._decoder.decode(self.buffer, self.at, whole=False)
            except RecursionError as error:
                return self.broken(error, indent)
            except ValueError as error:
                # An error well before the end of what is read is no matter of reading on, unless it is a string's start.
                known = isinstance(error, json.JSONDecodeError) and not error.msg.startswith("Unterminated")
                if (known and cast(json.JSONDecodeError, error).pos < len(self.buffer) - 16) or not self.more():
                    return self.broken(self.torn or error, indent)
                continue
            # Behind what is read, a number may go on: 12 may be the start of 12.5.
            if self.buffer[end : end + 1] in tuple(" \t\r\n,]") or not self.more():
                self.at, self.indent = end, None
                return value

    def broken(self, why: object, indent: str | None) -> Broken:
        """What stands here, as a Broken: up to the next object that begins a line behind the same white space, or the end.

        In an array with an element a line, or one that is indented, that is the next element; what lies inside an element
        is indented deeper. Where the elements do not begin lines (indent is None), nothing tells them apart for certain.
        """
        border = re.compile(rf"\n{re.escape(indent)}(?={{)") if indent is not None else re.compile(r"(?!)")
        overlap = len(indent or "") + 2
        kept, length, start = "", 0, self.at + 1
        while True:
            found = border.search(self.buffer, start)
            end = found.start() if found else len(self.buffer) if self.ended else max(len(self.buffer) - overlap, self.at)
            kept = (kept + self.buffer[self.at : min(end, self.at + KEPT_TEXT)])[:KEPT_TEXT]
            length += end - self.at
            self.at = start = end
            if found or not self.more():
                self.indent = None
                return _broken(kept, why, length)


def _array(text: _Text) -> Iterator[tuple[int, Any]]:
    """The elements. One that is broken costs all up to the next; where the array breaks off, the rest is one Broken."""
    text.peek()
    text.skip()
    number = 0
    while text.peek() != "]":
        number += 1
        indent = text.indent
        if not text.peek():
            yield number, text.broken(text.torn or "the array is not closed", None)
            return
        value = text.value()
        yield number, value
        after = text.peek()
        if not after and isinstance(value, Broken):
            return  # it holds all that was left
        if after == ",":
            text.skip()
        elif after == "{" and text.indent is not None and text.indent == indent:
            pass  # a comma is missing, or the value was broken; here the next begins
        elif after != "]":
            number += 1
            yield number, text.broken(text.torn or "the array is not closed", indent)
            if not text.peek():
                return
    text.skip()
    if text.peek():
        yield number + 1, text.broken("text after the end of the array", None)
