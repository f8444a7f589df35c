"""Reads a file, compressed with gzip or not, in chunks of bytes."""

import zlib
from collections.abc import Iterator
from pathlib import Path

CHUNK_BYTES = 1 << 20
GZIP_HEADER = 16 + zlib.MAX_WBITS
"""zlib's code for data in the gzip format."""


class ByteChunks:
    """The bytes of a file in chunks, decompressed if its name ends in .gz. They can be iterated over once.

    A gzip file that is truncated or damaged gives the chunks before the damage; then `gzip_error` says what is wrong.
    """

    def __init__(self, path: Path) -> None:
        """Raises OSError if the file cannot be opened or read; so does iterating."""
        self.gzip_error = ""
        self._chunks = self._decompress(path) if path.suffix == ".gz" else _read(path)
        self.first = next(self._chunks, b"")
        """The first chunk, empty if the file is; iterating gives it too."""

    def __iter__(self) -> Iterator[bytes]:
        yield self.first
        yield from self._chunks

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
                self.gzip_error = "the gzip file is truncated"
        except zlib.error as error:
            self.gzip_error = f"the gzip file is damaged: {error}"


def _read(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk
