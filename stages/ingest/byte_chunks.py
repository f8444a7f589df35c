"""Reads a file, compressed with gzip or not, in chunks of bytes: UTF-8, whatever encoding it is known to have."""

import zlib
from collections.abc import Iterator
from pathlib import Path

from stages.ingest.encodings import find_encoding, to_utf8

CHUNK_BYTES = 1 << 20
HEAD_BYTES = 1 << 20
"""What is looked at to find the encoding and the shape of a file."""
GZIP_HEADER = 16 + zlib.MAX_WBITS
"""zlib's code for data in the gzip format."""


class ByteChunks:
    """The bytes of a file in chunks, decompressed if its name ends in .gz. They can be iterated over once.

    They are UTF-8 without a byte order mark, converted where the file has another encoding for certain (encodings.py).

    A gzip file that is truncated or damaged gives the chunks before the damage; then `gzip_error` says what is wrong.
    """

    def __init__(self, path: Path) -> None:
        """Raises OSError if the file cannot be opened or read; so does iterating."""
        self.path = path
        self.gzip_error = ""
        """What is wrong with the gzip file; known when the last chunk was given."""
        self._damage = ""
        raw = self._decompress(path) if path.suffix == ".gz" else _read(path)
        held = _take(raw, HEAD_BYTES)
        self.raw_head = b"".join(held)
        """The first bytes as they are in the file, or in the decompressed one."""
        self.encoding, mark = find_encoding(self.raw_head)
        self.is_plain = path.suffix != ".gz" and self.encoding == "utf-8" and not mark
        """Whether the file itself has the bytes that iterating gives."""
        self._chunks = _without_start(_chain(held, raw), mark)
        if self.encoding != "utf-8":
            self._chunks = to_utf8(self._chunks, self.encoding)
        self._held = _take(self._chunks, HEAD_BYTES)
        self.head = b"".join(self._held)
        """The first bytes, all of them if the file is small; iterating gives them too."""

    def __iter__(self) -> Iterator[bytes]:
        yield from self._held
        yield from self._chunks
        self.gzip_error = self._damage

    def _decompress(self, path: Path) -> Iterator[bytes]:
        decompressor = zlib.decompressobj(GZIP_HEADER)
        complete = True
        try:
            for compressed in _read(path):
                left = compressed
                while left:
                    if decompressor.eof:  # a gzip file may have several members, one after the other
                        decompressor = zlib.decompressobj(GZIP_HEADER)
                    if chunk := decompressor.decompress(left, CHUNK_BYTES):
                        yield chunk
                    left = decompressor.unused_data if decompressor.eof else decompressor.unconsumed_tail
                complete = decompressor.eof
            if not complete:
                self._damage = "the gzip file is truncated"
        except zlib.error as error:
            self._damage = f"the gzip file is damaged: {error}"


def _read(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


def _take(chunks: Iterator[bytes], size: int) -> list[bytes]:
    """The first chunks, with `size` bytes together or more if there are as many."""
    taken: list[bytes] = []
    while size > 0 and (chunk := next(chunks, None)) is not None:
        taken.append(chunk)
        size -= len(chunk)
    return taken


def _chain(held: list[bytes], rest: Iterator[bytes]) -> Iterator[bytes]:
    yield from held
    yield from rest


def _without_start(chunks: Iterator[bytes], length: int) -> Iterator[bytes]:
    """The chunks without the first `length` bytes of them all."""
    for chunk in chunks:
        if len(chunk) > length:
            yield chunk[length:]
        length = max(0, length - len(chunk))
