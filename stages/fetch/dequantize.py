"""Writes the files of a quantized model in bfloat16, a part of a tensor at a time.

On the CPU whatever the machine has: the same files give the same bytes. The arithmetic is that of the libraries that read
these formats, with the exception of blocks at an edge that are smaller than the others, see `_fp8_matrix`.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, int8_vectorwise_dequant
from safetensors import safe_open
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from stages.core.jsonl import read_json, write_json
from stages.core.problem import Problem
from stages.core.progress import progress
from stages.fetch.checks import is_weights_index
from stages.fetch.quantized_tensors import Plan, Weight
from stages.fetch.safetensors_files import NewTensor, read_metadata, read_parts, write_safetensors

CHUNK_ELEMENTS = 1 << 24
"""Numbers that are dequantized at once, at least a row of blocks. Some of the functions need 12 bytes for each."""


def write_dequantized(plan: Plan, source: Path, target: Path) -> int:
    """Writes the weights of a model into `target`, with the same files and their index, and returns their bytes.

    Tensors that were not quantized keep their bytes. A file of which nothing is left, since it held only scales, is not
    written.

    Args:
        plan: What to dequantize; it has no problems.
        source: The folder with the quantized files, which were checked.
        target: An existing folder.

    Raises Problem if the data contradict the headers.
    """
    kept = {file: [name for name in tensors if name not in plan.dropped] for file, tensors in plan.headers.items()}
    files = {file: names for file, names in kept.items() if names}
    with _Reader(plan, source) as reader:
        written = (
            tensor
            for file, names in files.items()
            for tensor in write_safetensors(
                target / file,
                [reader.new_tensor(file, name) for name in names],
                read_metadata(source / file),
            )
        )
        total = sum(map(len, files.values()))
        size = sum(tensor.size for tensor in progress(written, "dequantize", total=total, unit="tensors"))
    weight_map = {plan.weights[n].name if n in plan.weights else n: file for file, names in files.items() for n in names}
    for index in source.iterdir():
        if is_weights_index(index.name) and set(read_json(index)["weight_map"].values()) <= plan.headers.keys():
            metadata = {**read_json(index).get("metadata", {}), "total_size": size}
            metadata.pop("total_parameters", None)
            write_json(target / index.name, {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))})
    return size


class _Reader:
    """The tensors of a model's files, dequantized on the way."""

    def __init__(self, plan: Plan, source: Path) -> None:
        self._plan, self._source = plan, source
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}
        self._file_of = {name: file for file, tensors in plan.headers.items() for name in tensors}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()

    def new_tensor(self, file: str, name: str) -> NewTensor:
        """A tensor of a file as it is to be written."""
        weight, info = self._plan.weights.get(name), self._plan.headers[file][name]
        if weight is None:
            return NewTensor(name, info.dtype, info.shape, partial(read_parts, self._source / file, info))
        shape = weight.shape or tuple(self._state(weight).shape or ())
        if math.prod(shape) not in (weight.elements, weight.elements - 1):  # 4 bits: an odd number leaves half a byte
            raise Problem(f"{file}: {name} has the shape {list(shape)}, which does not fit its size; get this file again")
        if self._plan.transposed:
            shape = shape[::-1]
        return NewTensor(weight.name, "BF16", shape, partial(self._dequantized, weight))

    def _dequantized(self, weight: Weight) -> Iterator[memoryview]:
        """The bytes of a dequantized tensor."""
        if "scale" in weight.parts:
            values = self._fp8(weight)
        elif "scales" in weight.parts:
            values = self._mxfp4(weight)
        elif "SCB" in weight.parts:
            values = self._int8(weight)
        else:
            packed = self._tensor(weight.stored).reshape(-1, 1)  # (1, n) would mean something else to bitsandbytes
            values = iter([dequantize_4bit(packed, self._state(weight))])
        if self._plan.transposed:
            values = iter([torch.cat(list(values)).T])
        for value in values:
            yield value.to(torch.bfloat16).contiguous().view(-1).view(torch.uint8).numpy().data

    def _fp8(self, weight: Weight) -> Iterator[torch.Tensor]:
        stored, scale = self._slice(weight.stored), self._tensor(weight.parts["scale"])
        if scale.dtype != torch.uint8:  # Fp8Dequantize rounds to the dtype of the scales; bytes are exponents
            scale = scale.float()
        assert weight.shape is not None
        *experts, rows, columns = weight.shape
        if not experts:
            yield from _fp8_matrix(lambda a, b: stored[a:b], (rows, columns), scale=scale, block=weight.block)
            return
        for expert in range(experts[0]):
            own = scale if scale.numel() == 1 else scale[expert]
            read = partial(_rows_of, stored, expert)
            yield from _fp8_matrix(read, (rows, columns), scale=own, block=weight.block)

    def _mxfp4(self, weight: Weight) -> Iterator[torch.Tensor]:
        blocks, scales = self._slice(weight.stored), self._slice(weight.parts["scales"])
        for expert in range(blocks.get_shape()[0]):
            at = slice(expert, expert + 1)
            yield convert_moe_packed_tensors(blocks[at], scales[at], dtype=torch.bfloat16)

    def _int8(self, weight: Weight) -> Iterator[torch.Tensor]:
        name = f"{weight.stored.removesuffix('.weight')}.weight_format"
        if name in self._plan.dropped and self._tensor(name).any():
            raise Problem(f"{name}: the weight is in a layout of an old GPU kernel; fetch the unquantized model instead")
        stored, scales = self._slice(weight.stored), self._tensor(weight.parts["SCB"])
        assert weight.shape is not None
        step = max(1, CHUNK_ELEMENTS // weight.shape[1])
        for start in range(0, weight.shape[0], step):
            yield int8_vectorwise_dequant(stored[start : start + step], scales[start : start + step])

    def _state(self, weight: Weight) -> QuantState:
        """bitsandbytes' state of a 4-bit weight: shape, dtype, scales."""
        try:
            return QuantState.from_dict({part: self._tensor(name) for part, name in weight.parts.items()}, "cpu")
        except (ValueError, LookupError, TypeError, AttributeError, AssertionError) as error:
            raise Problem(
                f"{self._file_of[weight.stored]}: bitsandbytes cannot read the state of {weight.name}: {error!r}; get this "
                "file again from an undamaged copy"
            ) from None

    def _tensor(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._open(name).get_tensor(name)
        return tensor

    def _slice(self, name: str) -> Any:
        """A tensor of which only the parts are read that are asked for."""
        return self._open(name).get_slice(name)

    def _open(self, name: str) -> Any:
        file = self._file_of[name]
        if file not in self._files:
            self._files[file] = self._stack.enter_context(safe_open(self._source / file, framework="pt"))
        return self._files[file]


def _rows_of(stored: Any, expert: int, start: int, end: int) -> torch.Tensor:
    rows: torch.Tensor = stored[expert, start:end]
    return rows


def _fp8_matrix(
    read: Callable[[int, int], torch.Tensor], shape: tuple[int, int], *, scale: torch.Tensor, block: tuple[int, int]
) -> Iterator[torch.Tensor]:
    """The rows of a float8 matrix times its scales, some at a time.

    Transformers' function takes the size of the blocks from the number of scales, which is right only if the blocks fill the
    matrix: DeepSeek V3's kv_a_proj_with_mqa has 576 rows in 5 blocks of 128, and is an error there. Here the last blocks
    are filled up with zeros first.

    Args:
        read: (first row, end) to these rows.
        shape: Rows and columns.
        scale: One for each block; or one, if `block` is (0, 0).
        block: Rows and columns of a block.
    """
    rows, columns = shape
    high, wide = block if block != (0, 0) else (1, columns)
    step = high * max(1, CHUNK_ELEMENTS // (high * columns))
    for start in range(0, rows, step):
        end = min(start + step, rows)
        part = read(start, end)
        if block == (0, 0):
            own = scale.reshape(())
        else:
            own = scale[start // high : math.ceil(end / high)]
            missing = (0, -columns % wide, 0, -(end - start) % high)
            part = torch.nn.functional.pad(part.view(torch.uint8), missing).view(part.dtype)
        yield Fp8Dequantize(None).convert({"weight": part, "weight_scale_inv": own})["weight"][: end - start, :columns]
