"""Loads models/base or models/merged with Transformers, as a user would: on one GPU, or spread if it is too small."""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import PeftModel

from stages.core.jsonl import read_json
from stages.core.params import bad_param
from stages.core.problem import Problem
from stages.model.architecture import load_pretrained, skeleton
from stages.model.device import DtypeName, assert_on, is_one_of_several, pick_device, pick_dtype
from stages.model.placement import (
    ONE_GPU,
    Placement,
    free_memory,
    gigabytes,
    plan_placement,
    require_input_on_device,
    weight_bytes,
)

ADAPTER = "adapter"
"""The folder in a model's folder with an adapter that cannot be merged into weights: virtual tokens."""


def load_model(folder: Path, dtype: DtypeName) -> Any:
    """The model in a folder, in evaluation mode, with its adapter if it has one.

    It is on this process's device. If one GPU does not hold it, it is spread over all GPUs, then main memory, then the disk,
    and a line says so; inputs then belong on `model.device`, and outputs are there too.

    Raises Problem if the memory is too small, or if the model would have to be spread by one of several processes.
    """
    device = pick_device()
    placement = _place(folder, pick_dtype(dtype, device))
    # Of some models, as those with experts, Transformers writes the weights on the disk anew, in its own layout.
    offloaded = TemporaryDirectory(dir=folder.parent) if placement and "disk" in placement.sizes else None
    try:
        model = load_pretrained(
            folder,
            dtype=pick_dtype(dtype, device),
            device_map=placement.device_map if placement else {"": device},
            **({"offload_folder": offloaded.name} if offloaded else {}),
        )
    except torch.OutOfMemoryError:
        raise Problem(f"{folder}: the model does not fit into the memory of {device}; use a GPU with more memory") from None
    if offloaded:
        model.offload_folder = offloaded  # it is removed with the model
    if not placement:
        assert_on(model, device)
    if (folder / ADAPTER).is_dir():
        model = PeftModel.from_pretrained(model, str(folder / ADAPTER))
    return model.eval()


def _place(folder: Path, dtype: torch.dtype) -> Placement | None:
    """Where to load a model to, with a line that says it; None if this process's device holds all of it."""
    size, memory, device = weight_bytes(folder, dtype), free_memory(), pick_device()
    room = memory.gpus[device.index] if device.type == "cuda" else memory.main
    if size <= ONE_GPU * room:
        return None
    if is_one_of_several():
        raise Problem(one_copy_each(folder, size, room))
    model = skeleton(folder, dtype)
    placement = plan_placement(model, memory)
    require_input_on_device(placement, str(folder))
    if (folder / ADAPTER).is_dir() and {"cpu", "disk"} & placement.sizes.keys() and len(placement.sizes) > 1:
        raise Problem(
            f"{folder}: {placement.describe()}; a model with virtual tokens can only be spread over GPUs; use more of "
            "them, or train.method lora"
        )
    print(f"{folder}: {placement.describe()}", flush=True)
    return placement


def one_copy_each(folder: Path, size: int, room: int) -> str:
    """What to do if a model of `size` bytes does not fit into the `room` of the one GPU that each process has."""
    return bad_param(
        "generate.num_processes",
        f"each process has its own copy of the model on one GPU, and {folder} ({gigabytes(size)} of weights) does not fit "
        f"on one ({gigabytes(room)}); set it to 1, which spreads the model over all GPUs",
    )


def stop_tokens(folder: Path, stops: Sequence[int]) -> list[int]:
    """The ids of all tokens that end an answer, sorted.

    Args:
        folder: A model's folder; its eos_token_id counts too.
        stops: The stop tokens of the chat template.
    """
    files = (folder / name for name in ("generation_config.json", "config.json"))
    config: dict[str, Any] = next((read_json(file) for file in files if file.exists()), {})
    own = config.get("eos_token_id")
    return sorted({*stops, *(own if isinstance(own, list) else [own] if own is not None else [])})
