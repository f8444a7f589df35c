"""Matrix products in FP8 (e4m3) with a scale per row of each matrix. On a Hopper GPU they take half the time of bfloat16."""

from typing import TypeAlias

import torch
from torch.nn.functional import linear

from stages.model.compile import compiled

try:
    import triton
    import triton.language as tl
except ImportError:  # not installed with PyTorch for the CPU, where it is not needed
    triton = None

E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max
LEAST = 1e-12
"""Smaller row maxima count as this, so that the scale of a row of zeros is not 0."""
MAX_COLUMNS = 32768
"""The longest row that one program of the kernel can hold."""

Fp8Matrix: TypeAlias = tuple[torch.Tensor, torch.Tensor]
"""A matrix (rows, columns) in e4m3, and the scale of each row (rows, 1) in float32; the values are their product."""


def why_unsupported(device: torch.device) -> str:
    """Why `device` cannot multiply in FP8 with a scale for each row; "" if it can."""
    if device.type != "cuda":
        return f"FP8 needs an NVIDIA GPU, found {device.type}"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < (9, 0):
        name = torch.cuda.get_device_name(device)
        return f"FP8 needs a GPU of compute capability 9.0 (Hopper) or later, found {name} with {major}.{minor}"
    return ""


def supported(device: torch.device) -> bool:
    """Whether `device` can multiply in FP8 with a scale for each row."""
    return not why_unsupported(device)


def fits(layer: torch.nn.Linear) -> bool:
    """Whether the hardware supports the shape of a linear layer's weight: both dimensions must be multiples of 16."""
    return layer.in_features % 16 == 0 and layer.out_features % 16 == 0


def quantize_rows(x: torch.Tensor) -> Fp8Matrix:
    """x (rows, columns) in FP8, each row scaled so that its largest absolute value is the largest value of e4m3."""
    if triton is None or not x.is_cuda or x.shape[1] > MAX_COLUMNS:
        quantized: Fp8Matrix = compiled(_quantize_rows)(x)
        return quantized
    x = x.contiguous()
    rows, columns = x.shape
    out = torch.empty_like(x, dtype=E4M3)
    scale = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    width = triton.next_power_of_2(columns)
    _kernel[(rows,)](
        x, out, scale, columns, PADDED_COLUMNS=width, LARGEST=LARGEST, LEAST=LEAST, num_warps=min(16, max(4, width // 1024))
    )
    return out, scale


def _quantize_rows(x: torch.Tensor) -> Fp8Matrix:
    scale = x.abs().amax(1, keepdim=True).float().clamp_min(LEAST) / LARGEST
    return (x.float() / scale).to(E4M3), scale


def matmul(x: Fp8Matrix, y: Fp8Matrix, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x yᵀ + bias in bfloat16, (rows of x, rows of y)."""
    if not x[0].is_cuda:  # for tests, with the same rounding of x and y
        return linear(x[0].float() * x[1], y[0].float() * y[1], bias).to(torch.bfloat16)
    return torch._scaled_mm(
        x[0], y[0].t(), scale_a=x[1], scale_b=y[1].t(), bias=bias, out_dtype=torch.bfloat16, use_fast_accum=True
    )


if triton is not None:

    @triton.jit  # type: ignore[untyped-decorator]
    def _kernel(  # type: ignore[no-untyped-def]
        x, out, scale, columns, PADDED_COLUMNS: tl.constexpr, LARGEST: tl.constexpr, LEAST: tl.constexpr
    ):  # fmt: skip
        """`_quantize_rows` for one row, which is read once and held while its maximum is found."""
        row, column = tl.program_id(0).to(tl.int64), tl.arange(0, PADDED_COLUMNS)
        in_range = column < columns
        values = tl.load(x + row * columns + column, mask=in_range, other=0).to(tl.float32)
        row_scale = tl.maximum(tl.max(tl.abs(values), 0), LEAST) / LARGEST
        tl.store(scale + row, row_scale)
        tl.store(out + row * columns + column, (values / row_scale).to(out.dtype.element_ty), mask=in_range)
