"""Hidden states in a temporary file, so that they take no memory while another model is loaded."""

import math
import tempfile
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import torch


class _Place(NamedTuple):
    start: int
    """The first byte in the file."""
    shape: torch.Size
    dtype: torch.dtype


class HiddenStates:
    """Tensors that are appended to a file and read back one at a time.

    The file has no name: the system removes it when it is closed, also if the process is killed.
    """

    def __init__(self, folder: Path) -> None:
        """Makes the file in a folder, which is made too if it does not exist."""
        folder.mkdir(parents=True, exist_ok=True)
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (closed by __exit__)
        self._places: list[_Place] = []

    def __enter__(self) -> "HiddenStates":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()

    def __len__(self) -> int:
        return len(self._places)

    def append(self, states: torch.Tensor) -> None:
        """Writes a tensor of any dtype and device."""
        states = states.detach().cpu().contiguous()
        self._places.append(_Place(self._file.seek(0, 2), states.shape, states.dtype))
        self._file.write(states.view(-1).view(torch.uint8).numpy().data)

    def __getitem__(self, number: int) -> torch.Tensor:
        """The tensor that was appended as number `number`, on the CPU."""
        start, shape, dtype = self._places[number]
        data = bytearray(math.prod(shape) * dtype.itemsize)
        self._file.seek(start)
        self._file.readinto(data)
        return torch.frombuffer(data, dtype=dtype).view(shape)
