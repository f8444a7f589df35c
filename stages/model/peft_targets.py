"""Keeps PEFT from adapting other layers than those that it was told to.

For mixture-of-experts models PEFT takes `gate_proj`, `up_proj` and `down_proj` for the experts of an adapter that was made
with Transformers 4, and adapts the fused experts instead, also where they are layers of a dense MLP or of a shared expert.
"""

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import LoraConfig
from peft.utils import transformers_weight_conversion as conversion

from stages.core.jsonl import read_json

TRAINING = "training.json"
"""In an adapter's folder: what `merge` must know about the training."""
PATTERNS = ("rank_pattern", "alpha_pattern")


@contextmanager
def targets_as_given() -> Iterator[None]:
    """Within the block, PEFT adds or loads adapters for exactly the layers and parameters that a config names.

    It says that patterns of ranks for parameters are ignored, which is not so; the message is left out.
    """
    before = conversion.convert_peft_config_for_transformers, conversion.convert_peft_adapter_state_dict_for_transformers
    conversion.convert_peft_config_for_transformers = lambda *_, **__: None
    conversion.convert_peft_adapter_state_dict_for_transformers = lambda adapter_state_dict, **_: adapter_state_dict
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"The following (rank|alpha)_pattern keys", RuntimeWarning)
            yield
    finally:
        conversion.convert_peft_config_for_transformers, conversion.convert_peft_adapter_state_dict_for_transformers = before


def portable_config(config: Mapping[str, Any], model: Any, layers: Iterable[str]) -> dict[str, Any]:
    """An adapter's config that PEFT loads as it is meant, without `targets_as_given` too.

    A layer that PEFT would take for experts is named by its weight, in target_parameters, which PEFT does not touch. It
    computes the same for it, and the tensors in the adapter's file have the same names.

    Args:
        config: The content of adapter_config.json, as PEFT saves it.
        model: The base model.
        layers: The full names of the adapted layers.
    """
    layers = list(layers)
    endings = {layer.rpartition(".")[2] for layer in layers}
    taken = {ending for ending in endings if _is_rewritten(f"x.{ending}", model)}
    moved = {layer for layer in layers if layer.rpartition(".")[2] in taken}
    if not moved:
        return dict(config)
    changed = {
        **config,
        "target_modules": sorted(set(layers) - moved),
        "target_parameters": sorted({*(config["target_parameters"] or ()), *(f"{layer}.weight" for layer in moved)}),
    }
    for pattern in PATTERNS:
        changed[pattern] = {
            f"{key}.weight" if key.removeprefix("^") in moved else key: value for key, value in config[pattern].items()
        }
    return changed


def _is_rewritten(target: str, model: Any) -> bool:
    config = LoraConfig(target_modules=[target])
    try:
        conversion.convert_peft_config_for_transformers(config, model=model, conversions=None)
    except ValueError:  # it wants the other projections too
        return True
    return config.target_modules != {target} or bool(config.target_parameters)


def read_lora_config(adapter: Path) -> dict[str, Any]:
    """The content of an adapter's adapter_config.json, with all adapted layers in target_modules again."""
    config: dict[str, Any] = read_json(adapter / "adapter_config.json")
    parameters = config.get("target_parameters") or []
    experts = {each["name"] for each in read_experts(adapter)}
    moved = {name.removesuffix(".weight") for name in parameters if name not in experts and name.endswith(".weight")}
    if not moved:
        return config
    restored = {
        **config,
        "target_modules": sorted({*config["target_modules"], *moved}),
        "target_parameters": sorted(set(parameters) & experts),
    }
    for pattern in PATTERNS:
        restored[pattern] = {
            key.removesuffix(".weight") if re.sub(r"^\^|\.weight$", "", key) in moved else key: value
            for key, value in config[pattern].items()
        }
    return restored


def read_experts(adapter: Path) -> list[dict[str, Any]]:
    """What training.json says of the parameters with experts; see `describe_experts`."""
    path = adapter / TRAINING
    experts: list[dict[str, Any]] = read_json(path).get("experts", []) if path.exists() else []
    return experts
