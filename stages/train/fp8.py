"""Products in FP8 (e4m3), with a scale for each row of either factor: on a Hopper GPU in half the time of bfloat16."""

from typing import TypeAlias

import torch
from torch.nn.functional import linear

from stages.model.compile import compiled

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU has no use for it
    triton = None

E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max
LEAST = 1e-12
"""The scale of a row of zeros, times LARGEST."""
MOST_COLUMNS = 32768
"""The longest row that one of the kernel's programs holds."""

Rounded: TypeAlias = tuple[torch.Tensor, torch.Tensor]
"""A matrix (rows, columns) in e4m3, and the scale of each row (rows, 1) in float32, by which it is to be multiplied."""


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
    """Whether the weight of a linear layer has sides that the hardware takes."""
    return layer.in_features % 16 == 0 and layer.out_features % 16 == 0


def to_fp8(x: torch.Tensor) -> Rounded:
    """x (rows, columns), each row scaled so that its largest number is e4m3's."""
    if triton is None or not x.is_cuda or x.shape[1] > MOST_COLUMNS:
        found: Rounded = compiled(_to_fp8)(x)
        return found
    x = x.contiguous()
    rows, columns = x.shape
    out = torch.empty_like(x, dtype=E4M3)
    scale = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    wide = triton.next_power_of_2(columns)
    _kernel[(rows,)](
        x, out, scale, columns, WIDE=wide, LARGEST=LARGEST, LEAST=LEAST, num_warps=min(16, max(4, wide // 1024))
    )
    return out, scale


def _to_fp8(x: torch.Tensor) -> Rounded:
    scale = x.abs().amax(1, keepdim=True).float().clamp_min(LEAST) / LARGEST
    return (x.float() / scale).to(E4M3), scale


def product(x: Rounded, y: Rounded, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x yᵀ + bias in bfloat16, (rows of x, rows of y)."""
    if not x[0].is_cuda:  # the same rounding, for tests
        return linear(x[0].float() * x[1], y[0].float() * y[1], bias).to(torch.bfloat16)
    return torch._scaled_mm(
        x[0], y[0].t(), scale_a=x[1], scale_b=y[1].t(), bias=bias, out_dtype=torch.bfloat16, use_fast_accum=True
    )


if triton is not None:

    @triton.jit  # type: ignore[untyped-decorator]
    def _kernel(  # type: ignore[no-untyped-def]
        x, out, scale, columns, WIDE: tl.constexpr, LARGEST: tl.constexpr, LEAST: tl.constexpr
    ):  # fmt: skip
        """A row, which is read once: it is held while its largest number is looked for."""
        row, column = tl.program_id(0).to(tl.int64), tl.arange(0, WIDE)
        real = column < columns
        values = tl.load(x + row * columns + column, mask=real, other=0).to(tl.float32)
        size = tl.maximum(tl.max(tl.abs(values), 0), LEAST) / LARGEST
        tl.store(scale + row, size)
        tl.store(out + row * columns + column, (values / size).to(out.dtype.element_ty), mask=real)
