"""What a model can take, from its config: token ids and positions. Beyond them it fails, on a GPU without a message."""

from pathlib import Path
from typing import Any, NamedTuple

from transformers import AutoConfig

from stages.core.jsonl import read_json
from stages.core.provenance import MANIFEST


class Limits(NamedTuple):
    """The limits of a model."""

    vocabulary: int
    """The number of token ids, which are below it."""
    positions: int | None
    """The most tokens of a row, with its answer; None if the config gives no limit."""


def read_limits(folder: Path) -> Limits:
    """The limits of the model in `folder`."""
    trust = read_json(folder / MANIFEST)["trust_remote_code"]
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust).get_text_config()
    return Limits(config.vocab_size, _positions(config))


def _positions(config: Any) -> int | None:
    """max_position_embeddings, times the factor by which rotary positions are scaled, where it does not hold it already.

    As in vLLM: "yarn" scales the positions before the scaling; "longrope" and "llama3" are in max_position_embeddings.
    """
    positions = getattr(config, "max_position_embeddings", None)
    if not isinstance(positions, int):
        return None
    rope = getattr(config, "rope_parameters", None) or {}
    factor = rope.get("factor") or 1.0
    kind = rope.get("rope_type")
    if kind in ("linear", "dynamic"):
        return int(positions * factor)
    if kind == "yarn":
        return max(positions, int(rope.get("original_max_position_embeddings", positions) * factor))
    return positions
