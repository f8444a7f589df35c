"""Loads models/base or models/merged with Transformers, as a user would."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from stages.core.jsonl import read_json
from stages.core.problem import Problem
from stages.core.provenance import MANIFEST
from stages.model.device import DtypeName, pick_device, pick_dtype

ADAPTER = "adapter"
"""The folder in a model's folder with an adapter that cannot be merged into weights: virtual tokens."""


def load_model(folder: Path, dtype: DtypeName) -> Any:
    """The model in a folder, on this process's device, in evaluation mode, with its adapter if it has one.

    Raises Problem if the GPU has too little memory.
    """
    device = pick_device()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=pick_dtype(dtype, device),
            device_map={"": device},
            trust_remote_code=read_json(folder / MANIFEST)["trust_remote_code"],
            use_safetensors=True,
        )
    except torch.OutOfMemoryError:
        raise Problem(f"{folder}: the model does not fit into the memory of {device}; use a GPU with more memory") from None
    if (folder / ADAPTER).is_dir():
        model = PeftModel.from_pretrained(model, str(folder / ADAPTER))
    return model.eval()


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
