"""Headers of safetensors files, and files that are written tensor by tensor: memory holds a part of one tensor.

The format: 8 bytes with the length of the header, little-endian; the header, JSON; the tensors' bytes.
https://huggingface.co/docs/safetensors/index#format
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

COPY_BYTES = 1 << 24
"""Bytes that are read at once."""
LENGTH_BYTES = 8
METADATA = "__metadata__"
BITS = {"64": 64, "32": 32, "16": 16}
"""Bits per element by the digits in a dtype's name; F8_E4M3, U8, BOOL and all others have 8."""


class TensorInfo(NamedTuple):
    """A tensor in a file."""

    dtype: str
    """By safetensors' names: BF16, F8_E4M3, ..."""
    shape: tuple[int, ...]
    start: int
    """Its first byte, counted from the end of the header."""
    end: int

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)


class NewTensor(NamedTuple):
    """A tensor to write."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    parts: Callable[[], Iterable[bytes | memoryview]]
    """Makes its bytes, in order."""

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * item_size(self.dtype)


def item_size(dtype: str) -> int:
    """Bytes per element of a dtype, by its name in safetensors."""
    return next((bits for digits, bits in BITS.items() if dtype.endswith(digits)), 8) // 8


def read_header(file: Path) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file by name, in the order of their bytes."""
    header = _read(file)
    tensors = {}
    for name, entry in header.items():
        if name != METADATA:
            start, end = entry["data_offsets"]
            tensors[name] = TensorInfo(entry["dtype"], tuple(entry["shape"]), start, end)
    return dict(sorted(tensors.items(), key=lambda item: item[1].start))


def read_parts(file: Path, tensor: TensorInfo) -> Iterator[bytes]:
    """The bytes of a tensor, as they are in the file."""
    with file.open("rb") as source:
        source.seek(LENGTH_BYTES + _header_length(source) + tensor.start)
        rest = tensor.end - tensor.start
        while rest:
            part = source.read(min(COPY_BYTES, rest))
            if not part:
                raise EOFError(f"{file}: ends too early")  # the size of the file was checked before
            yield part
            rest -= len(part)


def read_metadata(file: Path) -> dict[str, str]:
    """The text that a safetensors file carries beside its tensors."""
    return dict(_read(file).get(METADATA, {}))


def write_safetensors(file: Path, tensors: Sequence[NewTensor], metadata: Mapping[str, str]) -> Iterator[NewTensor]:
    """Writes a safetensors file, and yields each tensor after it was written.

    As in files of the library, tensors with larger elements come first, so that each begins at a multiple of its element.
    """
    tensors = sorted(tensors, key=lambda tensor: -item_size(tensor.dtype))
    header: dict[str, object] = {METADATA: dict(metadata)} if metadata else {}
    at = 0
    for tensor in tensors:
        header[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [at, at + tensor.size]}
        at += tensor.size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as target:
        target.write(len(text).to_bytes(LENGTH_BYTES, "little") + text)
        for tensor in tensors:
            written = sum(target.write(part) for part in tensor.parts())
            assert written == tensor.size, tensor.name
            yield tensor


def _read(file: Path) -> dict[str, Any]:
    """The header. Raises ValueError if it is not one."""
    with file.open("rb") as source:
        length = _header_length(source)
        if length > file.stat().st_size:
            raise ValueError(f"{file}: not safetensors")
        header: dict[str, Any] = json.loads(source.read(length))
        return header


def _header_length(source: BinaryIO) -> int:
    """What the first 8 bytes say."""
    return int.from_bytes(source.read(LENGTH_BYTES), "little")
