"""What a model can take: token ids and positions. Beyond a table of embeddings it fails, on a GPU without a message."""

from pathlib import Path
from typing import Any, NamedTuple

import torch

from stages.model.architecture import read_config, skeleton


class Limits(NamedTuple):
    """The limits of a model."""

    vocabulary: int
    """The number of token ids, which are below it."""
    positions: int | None
    """The most tokens of a row, with its answer; None if the config gives no limit."""
    has_position_table: bool
    """Whether each position has an embedding of its own, so that the model fails beyond them. Rotary positions go on, but
    the model was not trained on them."""


def read_limits(folder: Path) -> Limits:
    """The limits of the model in `folder`."""
    config = read_config(folder).get_text_config()
    positions = _positions(config)
    table = positions is not None and _has_position_table(folder, positions)
    return Limits(config.vocab_size, positions, table)


def _has_position_table(folder: Path, positions: int) -> bool:
    """Whether the model has an embedding (GPT-2, OPT) or a buffer (GPT-J) with a row for each position.

    OPT's has two rows more.
    """
    model = skeleton(folder, torch.float32)
    sizes = (positions, positions + 2)
    tables = [
        module.weight
        for module in model.modules()
        if isinstance(module, torch.nn.Embedding) and module is not model.get_input_embeddings()
    ]
    tables += [buffer for buffer in model.buffers() if buffer.ndim == 2]
    return any(table.shape[0] in sizes for table in tables)


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
