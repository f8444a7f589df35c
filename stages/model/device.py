"""The device that models run on, and the dtype that they compute in."""

import os
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch

DtypeName: TypeAlias = Literal["auto", "float32", "bfloat16", "float16"]


def pick_device() -> torch.device:
    """The current CUDA device by its number, if there is a GPU; otherwise the CPU.

    With several processes, call `distributed.select_gpu` or `init_processes` first: each process then has its own GPU.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def is_one_of_several() -> bool:
    """Whether this process works with others, so that only its own GPU is its to use."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def assert_on(model: Any, device: torch.device) -> None:
    """Asserts that a model lies where this process computes: with several processes, on the GPU of its own."""
    found = {parameter.device for parameter in model.parameters()}
    assert found <= {device}, f"weights on {found}, wanted {device}"
    if device.type == "cuda" and is_one_of_several():
        assert device.index == int(os.environ["LOCAL_RANK"]), f"{device} in process {os.environ['LOCAL_RANK']}"


def pick_dtype(name: DtypeName, device: torch.device) -> torch.dtype:
    """The named dtype; "auto" is bfloat16 if the device multiplies it in hardware, otherwise float32.

    The choice changes the bytes of a result, so `train` records it and `merge` uses the same.
    """
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]
    supported = torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else _cpu_has_bfloat16()
    return torch.bfloat16 if supported else torch.float32


def _cpu_has_bfloat16() -> bool:
    """Whether the CPU has instructions for bfloat16 products, according to /proc/cpuinfo; without them float32 is faster."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = set(cpuinfo.read_text(encoding="utf-8", errors="replace").split()) if cpuinfo.exists() else set()
    return bool(flags & {"avx512_bf16", "amx_bf16", "bf16"})
