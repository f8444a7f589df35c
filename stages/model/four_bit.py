"""Dequantizes 4-bit weights of bitsandbytes and adds the delta weight of LoRA before rounding, in training and merging."""

import copy
from typing import Any

import bitsandbytes as bnb
import torch

from stages.model.lora import add_lora

try:
    import triton
    import triton.language as tl
except ImportError:  # not installed with PyTorch for the CPU, where it is not needed
    triton = None

ROWS, COLUMNS = 64, 128
"""The tile of W that one program of the kernel computes."""


def dequantize_and_add_lora(
    layer: bnb.nn.Linear4bit, out: torch.Tensor, *, lora_A: torch.Tensor, lora_B: torch.Tensor, scaling: float
) -> torch.Tensor:
    """`add_lora_to_4bit` for the weight W (out, in) of a layer."""
    # A weight that FSDP has gathered has lost its quantization state; the layer still has it.
    state = getattr(layer.weight, "quant_state", None) or layer.quant_state
    return add_lora_to_4bit(layer.weight.data, state, out, lora_A=lora_A, lora_B=lora_B, scaling=scaling)


def add_lora_to_4bit(
    packed: torch.Tensor, state: Any, out: torch.Tensor, *, lora_A: torch.Tensor, lora_B: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Writes W + scaling · lora_B lora_A into `out`, summed in float32 and rounded once. Returns `out`.

    Training and merging both call it, so the merged weight is the one that was trained. The kernel
    multiplies lora_B lora_A in TF32, `add_lora` in float32: single weights may round to a neighbouring value.

    Args:
        packed: W (out, in) in 4 bits, as bitsandbytes' `quantize_4bit` packs it.
        state: Its quantization state.
        out: (out, in) in the dtype to round to.
        lora_A: (r, in) in float32, contiguous, as lora_B.
        lora_B: (out, r) in float32.
    """
    if not _kernel_supports(packed, state, out):
        return _add_lora_plain(packed, state, out, lora_A=lora_A, lora_B=lora_B, scaling=scaling)
    rows, columns = out.shape
    r = len(lora_A)
    _kernel[triton.cdiv(rows, ROWS), columns // COLUMNS](
        packed.view(torch.uint8), state.absmax, state.state2.code, state.state2.absmax, state.offset, state.code,
        lora_B, lora_A, out, rows, columns, r, scaling,
        RANK=max(16, triton.next_power_of_2(r)), ROWS=ROWS, COLUMNS=COLUMNS, num_warps=8,
    )  # fmt: skip
    return out


def _kernel_supports(packed: torch.Tensor, state: Any, out: torch.Tensor) -> bool:
    """Whether the kernel can be used: on a GPU, with double quantization in bitsandbytes' default block sizes.

    It indexes `out` in int32.
    """
    if triton is None or not packed.is_cuda or out.shape[1] % COLUMNS or out.numel() >= 1 << 31:
        return False
    return bool(state.nested and state.blocksize == 64 and state.state2.blocksize == 256)


def _add_lora_plain(
    packed: torch.Tensor,
    state: Any,
    out: torch.Tensor,
    *,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    state = copy.copy(state)
    state.dtype = torch.float32
    weight = bnb.functional.dequantize_4bit(packed, state)
    return out.copy_(add_lora(weight, lora_A, lora_B, scaling=scaling, out=weight))


if triton is not None:

    @triton.jit  # type: ignore[untyped-decorator]
    def _kernel(  # type: ignore[no-untyped-def]
        packed, absmax, codes, absmax_of_absmax, offset, table, lora_B, lora_A, out, rows, columns, r, scaling,
        RANK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ):  # fmt: skip
        """`dequantize_4bit` of bitsandbytes and `add_lora` (in TF32) in one pass, for a tile of ROWS x COLUMNS weights.

        A byte has two weights, the first in its high half. 64 weights share a scale, which is quantized to 8 bits:
        codes[absmax] times a float32 shared by 256 scales, plus an offset (double quantization, Dettmers et al. 2023).
        """
        PAIRS: tl.constexpr = COLUMNS // 2
        BLOCKS: tl.constexpr = COLUMNS // 64
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        in_range = (row < rows)[:, None]
        pair = tl.program_id(1) * PAIRS + tl.arange(0, PAIRS)
        block = row[:, None] * (columns // 64) + tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)[None, :]
        code = tl.load(absmax + block, mask=in_range, other=0).to(tl.int32)
        w_scale = tl.load(codes + code) * tl.load(absmax_of_absmax + block // 256, mask=in_range, other=0) + tl.load(offset)
        w_scale = tl.reshape(tl.broadcast_to(w_scale[:, :, None], (ROWS, BLOCKS, 32)), (ROWS, PAIRS))
        byte = tl.load(packed + row[:, None] * (columns // 2) + pair[None, :], mask=in_range, other=0).to(tl.int32)
        rank = tl.arange(0, RANK)
        b = tl.load(lora_B + row[:, None] * r + rank[None, :], mask=in_range & (rank < r)[None, :], other=0)
        index = rank[:, None] * columns + 2 * pair[None, :]
        a_first = tl.load(lora_A + index, mask=(rank < r)[:, None], other=0)
        a_second = tl.load(lora_A + index + 1, mask=(rank < r)[:, None], other=0)
        first = tl.load(table + (byte >> 4)) * w_scale + scaling * tl.dot(b, a_first, input_precision="tf32")
        second = tl.load(table + (byte & 15)) * w_scale + scaling * tl.dot(b, a_second, input_precision="tf32")
        both = tl.reshape(tl.join(first, second), (ROWS, COLUMNS)).to(out.dtype.element_ty)
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        tl.store(out + row[:, None] * columns + column[None, :], both, mask=in_range)
