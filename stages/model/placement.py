"""Where a model's weights lie: on one GPU if it holds them; else on all GPUs, then in main memory, then on the disk.

Accelerate spreads the model (`infer_auto_device_map`): decoder layers one after the other, none of them split. A layer that
is not on a GPU is copied to GPU 0 whenever it computes.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import psutil
import torch
from accelerate import infer_auto_device_map
from accelerate.utils import CustomDtype, compute_module_sizes, get_balanced_memory
from safetensors import safe_open

from stages.core.problem import Problem
from stages.model.device import is_one_of_several

ONE_GPU = 0.94
"""Share of a GPU's memory that the weights may take if the whole model is on it; too large batches are halved then."""
SPREAD = 0.9
"""Share of each GPU's memory, and of main memory, that the weights of a spread model may take. The rest is for activations,
keys and values, and for the layer that is copied to GPU 0."""

Device: TypeAlias = int | str
"""The number of a GPU, "cpu" or "disk", as in Accelerate's device maps."""


class Memory(NamedTuple):
    """Bytes of memory."""

    gpus: dict[int, int]
    """By the number of the GPU; empty without GPUs."""
    main: int


class Placement(NamedTuple):
    """Where the parts of a model lie."""

    device_map: dict[str, Device]
    """By module name; {"": device} if all of the model is on one device."""
    sizes: dict[Device, int]
    """Bytes of weights on each device."""

    @property
    def gpu_bytes(self) -> int:
        """Bytes of weights on GPUs."""
        return sum(size for device, size in self.sizes.items() if isinstance(device, int))

    @property
    def total_bytes(self) -> int:
        """Bytes of all weights."""
        return sum(self.sizes.values())

    def describe(self) -> str:
        """For a message: "141 GB of weights: 71 GB on GPU 0, 70 GB on GPU 1"."""
        parts = [f"{gigabytes(size)} on GPU {device}" for device, size in self.sizes.items() if isinstance(device, int)]
        if "cpu" in self.sizes:
            text = f"{gigabytes(self.sizes['cpu'])} in main memory"
            parts.append(f"{text}, which every token reads over the bus: slower" if parts else text)
        if "disk" in self.sizes:
            parts.append(f"{gigabytes(self.sizes['disk'])} on the disk, which every token reads: very slow")
        return f"{gigabytes(self.total_bytes)} of weights: {', '.join(parts)}"


def plan_placement(model: Any, memory: Memory, *, quantized: Mapping[str, float] | None = None) -> Placement:
    """Spreads a model over the GPUs, then main memory, then the disk; over one GPU if it is enough.

    Args:
        model: On the meta device, in the dtype that it will have.
        memory: What may be used; `SPREAD` of it is.
        quantized: Bits of each weight that will be quantized, by parameter name, scales included: below 8, or 8.
    """
    bits = dict(quantized or {})
    dtypes: dict[str, Any] = {name: CustomDtype.INT4 if count < 8 else torch.int8 for name, count in bits.items()}
    # Accelerate counts 4 bits per weight, without the scales.
    scales = max((count / (4 if count < 8 else 8) for count in bits.values()), default=1.0)
    usable: dict[Device, int] = {device: int(SPREAD * size / scales) for device, size in memory.gpus.items()}
    usable["cpu"] = int(SPREAD * memory.main)
    blocks = _block_classes(model)
    logging.getLogger("accelerate").setLevel(logging.ERROR)  # it warns of what `describe` says
    balanced = get_balanced_memory(model, max_memory=usable, no_split_module_classes=blocks, special_dtypes=dtypes)
    found = infer_auto_device_map(model, max_memory=balanced, no_split_module_classes=blocks, special_dtypes=dtypes)
    parts = compute_module_sizes(model, special_dtypes=dtypes)
    sizes: dict[Device, int] = {}
    for name, device in found.items():
        sizes[device] = sizes.get(device, 0) + int(scales * parts[name])
    return Placement({"": next(iter(sizes))} if len(sizes) == 1 else dict(found), sizes)


def _block_classes(model: Any) -> list[str]:
    """The names of the classes of a model's decoder layers, in which a residual connection must stay on one device.

    A model with code of its own may not name them; then the classes in the ModuleList with the most parameters.
    """
    if model._no_split_modules:
        return sorted(model._no_split_modules)
    lists = [list(module) for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    largest = max(lists, key=lambda layers: sum(p.numel() for layer in layers for p in layer.parameters()), default=[])
    return sorted({type(layer).__name__ for layer in largest})


def weight_bytes(folder: Path, dtype: torch.dtype) -> int:
    """Bytes of the weights in a folder's safetensors files if they are loaded in a dtype. Reads the files' headers."""
    count = 0
    for shard in sorted(folder.glob("*.safetensors")):
        with safe_open(shard, framework="pt") as file:
            count += sum(torch.Size(file.get_slice(name).get_shape()).numel() for name in file.keys())  # noqa: SIM118
    return count * dtype.itemsize


def free_memory() -> Memory:
    """What this process may still allocate: on all visible GPUs, or on its own if it is one of several processes."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    numbers = [torch.cuda.current_device()] if count and is_one_of_several() else range(count)
    return Memory(
        {number: _free_on(number) for number in numbers}, min(psutil.virtual_memory().available, _limit() - _used())
    )


def total_memory() -> Memory:
    """The memory of all visible GPUs, and main memory, whatever is in use. Allocates nothing on a GPU."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    gpus = {number: torch.cuda.get_device_properties(number).total_memory for number in range(count)}
    return Memory(gpus, min(psutil.virtual_memory().total, _limit()))


def _free_on(gpu: int) -> int:
    """Free bytes of a GPU, with those that PyTorch holds but does not use."""
    free, _ = torch.cuda.mem_get_info(gpu)
    return free + torch.cuda.memory_reserved(gpu) - torch.cuda.memory_allocated(gpu)


def _limit() -> int:
    """The limit of this process's main memory, as containers set it (cgroup v2 or v1)."""
    return _cgroup("memory.max", "memory/memory.limit_in_bytes") or 1 << 62


def _used() -> int:
    """Main memory that the container's processes use, without cached files; 0 outside containers."""
    statistics = _CGROUP / "memory.stat"
    lines = statistics.read_text(encoding="ascii").splitlines() if statistics.exists() else []
    cached = sum(int(line.split()[1]) for line in lines if line.split()[0] in ("active_file", "inactive_file"))
    return max(0, _cgroup("memory.current", "memory/memory.usage_in_bytes") - cached)


_CGROUP = Path("/sys/fs/cgroup")


def _cgroup(*names: str) -> int:
    """The number in the first of these files that exists; 0 if none does, or if it holds a word."""
    texts = [(_CGROUP / name).read_text(encoding="ascii").strip() for name in names if (_CGROUP / name).exists()]
    return int(texts[0]) if texts and texts[0].isdigit() else 0


def require_input_on_device(placement: Placement, name: str) -> None:
    """Raises Problem if even the input embeddings must lie elsewhere, so that a model's inputs have no device.

    Args:
        placement: From `plan_placement`.
        name: What is loaded, for the message.
    """
    first = next(iter(placement.device_map))
    device = placement.device_map[first]
    if device == "disk" or (device == "cpu" and placement.gpu_bytes):
        raise Problem(
            f"{name}: {placement.describe()}; the memory does not even hold its input embeddings; use a larger machine"
        )


def is_spread(model: Any) -> bool:
    """Whether a model lies on several devices."""
    return len(set(getattr(model, "hf_device_map", {}).values())) > 1


def gigabytes(size: float) -> str:
    """Bytes as "71 GB"; with a decimal below 10 GB."""
    return f"{size / 1e9:,.1f} GB" if size < 9.95e9 else f"{size / 1e9:,.0f} GB"
