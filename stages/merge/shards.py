"""Copies safetensors files and replaces some of their tensors on the way; memory holds a few tensors at a time."""

import json
import os
import struct
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch

from stages.core.problem import Problem
from stages.core.progress import progress

WORKERS = 6
"""Threads: while one computes, others read and write. Each holds one tensor, or one group, on the device."""
LARGE_BYTES = 1 << 28
"""Groups of more bytes, as all experts of a layer, are computed one after the other."""
BUFFER_BYTES = 1 << 26
"""Bytes that a thread reads or writes in one call."""
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
"""The dtypes, by safetensors' names, of tensors that can be replaced."""


def read_header(shard: Path) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file.

    Returns:
        Tensor name to {"dtype", "shape", "data_offsets"}, without the metadata; and the bytes in front of the data: 8 bytes
        with the length, then JSON.
    """
    with shard.open("rb") as file:
        raw = file.read(8)
        raw += file.read(struct.unpack("<Q", raw)[0])
    return {name: entry for name, entry in json.loads(raw[8:]).items() if name != "__metadata__"}, raw


def copy_shards(
    shards: Sequence[Path],
    folder: Path,
    *,
    replaced: Collection[Sequence[str]],
    compute: Callable[[dict[str, torch.Tensor]], Mapping[str, torch.Tensor]],
    device: torch.device,
) -> None:
    """Copies safetensors files into a folder; names, headers and all other tensors stay as they are.

    Args:
        shards: The files to copy.
        folder: An existing folder.
        replaced: The names of the tensors to replace; those of one group are computed together.
        compute: A group's tensors on `device`, by name, to the new ones, of the same shapes. They are rounded to the old
            dtypes. Called in several threads.
        device: Where to compute.

    Raises Problem if a file ends too soon.
    """
    copier = _Copier(device)
    with ExitStack() as stack, ThreadPoolExecutor(WORKERS) as pool:
        jobs, found = [], {}
        together = {name for group in replaced for name in group}
        for shard in shards:
            header, raw = read_header(shard)
            reader = stack.enter_context(shard.open("rb")).fileno()
            writer = stack.enter_context((folder / shard.name).open("wb")).fileno()
            os.ftruncate(writer, shard.stat().st_size)
            os.pwrite(writer, raw, 0)
            for name, entry in header.items():
                start, end = (len(raw) + offset for offset in entry["data_offsets"])
                tensor = _Tensor(
                    name=name,
                    dtype=DTYPES.get(entry["dtype"]),
                    shape=entry["shape"],
                    shard=shard,
                    reader=reader,
                    writer=writer,
                    start=start,
                    end=end,
                )
                if name in together:
                    found[name] = tensor
                else:
                    jobs.append(pool.submit(copier.copy, tensor))
        jobs += [pool.submit(copier.replace, [found[name] for name in group], compute) for group in replaced]
        try:
            for job in progress(as_completed(jobs), "merge", total=len(jobs), unit="tensors"):
                job.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


class _Tensor(NamedTuple):
    """A tensor, and its place in the file that is read and in the file that is written."""

    name: str
    dtype: torch.dtype | None
    shape: list[int]
    shard: Path
    reader: int
    """The file descriptor."""
    writer: int
    start: int
    """The first byte in both files."""
    end: int


class _Copier:
    """Moves bytes between files and a device. Each thread has one buffer, pinned for a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers = threading.local()
        self._large = threading.Lock()
        """Held while a group of more than LARGE_BYTES is in memory."""

    def copy(self, tensor: _Tensor) -> None:
        """Copies a tensor's bytes."""
        for at in range(tensor.start, tensor.end, BUFFER_BYTES):
            data = self._buffer()[: min(BUFFER_BYTES, tensor.end - at)]
            _read(tensor, data, at)
            _write(tensor, data, at)

    def replace(
        self, group: Sequence[_Tensor], compute: Callable[[dict[str, torch.Tensor]], Mapping[str, torch.Tensor]]
    ) -> None:
        """Reads tensors, computes the new ones on the device, and writes them."""
        with self._large if sum(each.end - each.start for each in group) > LARGE_BYTES else nullcontext():
            new = compute({tensor.name: self._read(tensor) for tensor in group})
            for tensor in group:
                assert new[tensor.name].shape == torch.Size(tensor.shape), tensor.name
                data = new[tensor.name].to(tensor.dtype).contiguous()
                self._write_from(tensor, data.view(-1).view(torch.uint8))

    def _read(self, tensor: _Tensor) -> torch.Tensor:
        assert tensor.dtype is not None
        data = torch.empty(tensor.end - tensor.start, dtype=torch.uint8, device=self._device)
        self._read_into(tensor, data)
        return data.view(tensor.dtype).view(tensor.shape)

    def _read_into(self, tensor: _Tensor, data: torch.Tensor) -> None:
        at = tensor.start
        for part in torch.split(data, BUFFER_BYTES):
            buffer = self._buffer()[: len(part)]
            _read(tensor, buffer, at)
            part.copy_(buffer)
            at += len(part)

    def _write_from(self, tensor: _Tensor, data: torch.Tensor) -> None:
        at = tensor.start
        for part in torch.split(data, BUFFER_BYTES):
            buffer = self._buffer()[: len(part)]
            buffer.copy_(part)
            _write(tensor, buffer, at)
            at += len(part)

    def _buffer(self) -> torch.Tensor:
        if not hasattr(self._buffers, "bytes"):
            pinned = self._device.type == "cuda"  # a GPU transfers pinned memory without another copy
            self._buffers.bytes = torch.empty(BUFFER_BYTES, dtype=torch.uint8, pin_memory=pinned)
        buffer: torch.Tensor = self._buffers.bytes
        return buffer


def _read(tensor: _Tensor, into: torch.Tensor, at: int) -> None:
    view = into.numpy().data
    while view:  # a call may read fewer bytes than were asked for
        count = os.preadv(tensor.reader, [view], at)
        if not count:
            raise Problem(f"{tensor.shard}: ends before the data of {tensor.name}; run fetch again")
        view, at = view[count:], at + count


def _write(tensor: _Tensor, data: torch.Tensor, at: int) -> None:
    view = data.numpy().data
    while view:
        count = os.pwrite(tensor.writer, view, at)
        view, at = view[count:], at + count
