"""4-bit weights unpacked, with a low-rank product added before they are rounded."""

import copy
from typing import Any

import bitsandbytes as bnb
import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU has no use for it
    triton = None


def unpack_sum(
    layer: bnb.nn.Linear4bit, up: torch.Tensor, down: torch.Tensor, scale: float, out: torch.Tensor
) -> torch.Tensor:
    """Writes W + scale · up down into `out`, summed in float32 and rounded once.

    Args:
        layer: Holds W (out, in), as bitsandbytes packs it.
        up: (out, r) in float32.
        down: (r, in) in float32.
        out: (out, in) in the type to round to.
    """
    # A weight that is gathered from several processes has lost its state; the layer keeps it.
    packed, state = layer.weight.data, getattr(layer.weight, "quant_state", None) or layer.quant_state
    if triton is None or not packed.is_cuda or not _is_usual(state) or out.shape[1] % COLUMNS or out.numel() >= 1 << 31:
        return _unpack_sum_plain(packed, state, up, down, scale, out)
    rows, columns = out.shape
    _kernel[triton.cdiv(rows, ROWS), columns // COLUMNS](
        packed.view(torch.uint8), state.absmax, state.state2.code, state.state2.absmax, state.offset, state.code,
        up, down, out, rows, columns, up.shape[1], scale,
        RANK=max(16, triton.next_power_of_2(up.shape[1])), ROWS=ROWS, COLUMNS=COLUMNS, num_warps=8,
    )  # fmt: skip
    return out


ROWS, COLUMNS = 64, 128
"""A tile of the kernel."""


def _is_usual(state: Any) -> bool:
    """Whether the scales are quantized too, in blocks of bitsandbytes' sizes."""
    return bool(state.nested and state.blocksize == 64 and state.state2.blocksize == 256)


def _unpack_sum_plain(
    packed: torch.Tensor, state: Any, up: torch.Tensor, down: torch.Tensor, scale: float, out: torch.Tensor
) -> torch.Tensor:
    state = copy.copy(state)
    state.dtype = torch.float32
    weight = bnb.functional.dequantize_4bit(packed, state)
    return out.copy_(weight.addmm_(up, down, alpha=scale))


if triton is not None:

    @triton.jit  # type: ignore[untyped-decorator]
    def _kernel(  # type: ignore[no-untyped-def]
        packed, absmax, codes, absmax_of_absmax, offset, table, up, down, out, rows, columns, r, scale,
        RANK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ):  # fmt: skip
        """A tile of ROWS x COLUMNS weights; two weights a byte, the first in the high half; 64 weights a scale.

        The scales are 8-bit too: codes[absmax] times one float32 for each 256 of them, plus an offset
        (Dettmers et al. 2023, double quantization).
        """
        PAIRS: tl.constexpr = COLUMNS // 2
        BLOCKS: tl.constexpr = COLUMNS // 64
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        real = (row < rows)[:, None]
        pair = tl.program_id(1) * PAIRS + tl.arange(0, PAIRS)
        block = row[:, None] * (columns // 64) + tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)[None, :]
        code = tl.load(absmax + block, mask=real, other=0).to(tl.int32)
        size = tl.load(codes + code) * tl.load(absmax_of_absmax + block // 256, mask=real, other=0) + tl.load(offset)
        size = tl.reshape(tl.broadcast_to(size[:, :, None], (ROWS, BLOCKS, 32)), (ROWS, PAIRS))
        byte = tl.load(packed + row[:, None] * (columns // 2) + pair[None, :], mask=real, other=0).to(tl.int32)
        rank = tl.arange(0, RANK)
        b = tl.load(up + row[:, None] * r + rank[None, :], mask=real & (rank < r)[None, :], other=0)
        place = rank[:, None] * columns + 2 * pair[None, :]
        even = tl.load(down + place, mask=(rank < r)[:, None], other=0)
        odd = tl.load(down + place + 1, mask=(rank < r)[:, None], other=0)
        first = tl.load(table + (byte >> 4)) * size + scale * tl.dot(b, even, input_precision="tf32")
        second = tl.load(table + (byte & 15)) * size + scale * tl.dot(b, odd, input_precision="tf32")
        both = tl.reshape(tl.join(first, second), (ROWS, COLUMNS)).to(out.dtype.element_ty)
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        tl.store(out + row[:, None] * columns + column[None, :], both, mask=real)
