"""A finished model folder, loaded as a user would load it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import AutoModelForCausalLM

from stages.core.jsonl import read_json
from stages.model.device import DtypeName, pick_device, pick_dtype

ADAPTER = "adapter"
"""The folder inside a model's for an adapter that cannot be merged into weights."""


def load_model(folder: Path, dtype: DtypeName) -> Any:
    """models/base or models/merged on this machine's device, in evaluation mode, with its unmerged adapter if it has one."""
    device = pick_device()
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=pick_dtype(dtype, device),
        device_map={"": device},
        trust_remote_code=read_json(folder / "manifest.json")["trust_remote_code"],
        use_safetensors=True,
    )
    if (folder / ADAPTER).is_dir():
        model = PeftModel.from_pretrained(model, str(folder / ADAPTER))
    return model.eval()


def stop_tokens(folder: Path, stops: Sequence[int]) -> list[int]:
    """The tokens that end an answer: the template's, and those that the model itself came with."""
    files = (folder / name for name in ("generation_config.json", "config.json"))
    config: dict[str, Any] = next((read_json(file) for file in files if file.exists()), {})
    own = config.get("eos_token_id")
    return sorted({*stops, *(own if isinstance(own, list) else [own] if own is not None else [])})
