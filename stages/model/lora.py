"""The LoRA sum, W + scaling · lora_B lora_A (Hu et al. 2021), as training, merging and initialization compute it."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from peft.utils.other import get_pattern_key


def lora_scaling(config: Mapping[str, Any], name: str) -> float:
    """The factor of a layer's delta weight, from an adapter's adapter_config.json.

    lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora (Kalajdzievski 2023); rank_pattern and alpha_pattern are looked
    up as PEFT does.

    Args:
        config: The content of adapter_config.json.
        name: The full name of the layer.
    """
    r, alpha = (
        config[pattern].get(get_pattern_key(config[pattern], name), config[default])
        for pattern, default in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha"))
    )
    return float(alpha / (math.sqrt(r) if config["use_rslora"] else r))


def add_lora(
    weight: torch.Tensor,
    lora_A: torch.Tensor,
    lora_B: torch.Tensor,
    *,
    scaling: float,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """weight + scaling · lora_B lora_A, computed in the dtype of `weight`, which should be float32.

    In bfloat16 a small delta weight would be rounded away. Round only the sum.

    Args:
        weight: (out, in)
        lora_A: (r, in), in the dtype of `weight`, as lora_B.
        lora_B: (out, r)
        out: Where to write the sum; a new tensor if None. May be `weight`.
    """
    return torch.addmm(weight, lora_B, lora_A, alpha=scaling, out=out)


def subtract_lora(weight: torch.Tensor, lora_A: torch.Tensor, lora_B: torch.Tensor, scaling: float) -> torch.Tensor:
    """weight - scaling · lora_B lora_A in float32: what PiSSA and OLoRA leave in the base."""
    return add_lora(weight.float(), lora_A.float(), lora_B.float(), scaling=-scaling)
