"""What `train` wrote about the base model that it trained on."""

from pathlib import Path
from typing import NamedTuple

from stages.core.jsonl import read_json
from stages.model.peft_targets import TRAINING, read_experts
from stages.model.quantize import Quantization


class Training(NamedTuple):
    """The content of an adapter's training.json. Layers are named by their weight, "….q_proj.weight"; parameters with the
    weights of experts by their own name, "….experts.down_proj"."""

    settings: Quantization
    """How the base was quantized."""
    quantized: frozenset[str]
    """The quantized layers and parameters."""
    transposed: frozenset[str]
    """The layers whose weights the base's files store as (in, out): GPT-2's Conv1D."""
    summed_in_float32: frozenset[str]
    """The 4-bit layers to whose weights training added the delta weight in float32, before it rounded the sum."""
    experts: frozenset[str]
    """The parameters with the weights of experts."""
    rows: int
    """Training rows."""
    tokens: int
    """Tokens of all training rows."""
    label_tokens: int
    """Those of them in the loss."""


def read_training(adapter: Path) -> Training:
    """Reads training.json in an adapter's folder."""
    content, experts = read_json(adapter / TRAINING), read_experts(adapter)

    def weights(key: str) -> frozenset[str]:
        return frozenset(f"{layer}.weight" for layer in content.get(key, []))

    return Training(
        settings=Quantization.model_validate(content["quantization"]),
        quantized=weights("quantized_layers") | {each["name"] for each in experts if each["quantized"]},
        transposed=weights("transposed_layers"),
        summed_in_float32=weights("summed_in_float32"),
        experts=frozenset(each["name"] for each in experts),
        rows=content["data"]["rows"],
        tokens=content["data"]["tokens"],
        label_tokens=content["data"]["label_tokens"],
    )
