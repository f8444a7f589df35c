"""Where models run, and in which floating-point type."""

from pathlib import Path
from typing import Literal, TypeAlias

import torch

DtypeName: TypeAlias = Literal["auto", "float32", "bfloat16", "float16"]


def pick_device() -> torch.device:
    """The GPU of this process if there is one, otherwise the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pick_dtype(name: DtypeName, device: torch.device) -> torch.dtype:
    """The named type; "auto" is bfloat16 where the hardware multiplies it natively, float32 elsewhere.

    The choice changes the bytes of a result, so `train` records it and `merge` repeats it.
    """
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]
    native = torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else _cpu_has_bfloat16()
    return torch.bfloat16 if native else torch.float32


def _cpu_has_bfloat16() -> bool:
    """Whether Linux names an instruction set with bfloat16 products; emulated, the type is slower than float32."""
    cpuinfo = Path("/proc/cpuinfo")
    words = set(cpuinfo.read_text(encoding="utf-8", errors="replace").split()) if cpuinfo.exists() else set()
    return bool(words & {"avx512_bf16", "amx_bf16", "bf16"})
