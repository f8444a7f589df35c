"""Rows of tokens as tensors: padded, or laid end to end so that no work is done on padding."""

import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, AttentionMaskInterface

from stages.lib.labels import IGNORE

FLAT = "loratory_flat"
"""The name under which Transformers knows the attention below."""


def pad(rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """input_ids, attention_mask and labels of the rows, each (rows, longest row) in int64, padded on the right."""

    def fill(field: str, value: int) -> torch.Tensor:
        return pad_sequence([_long(row[field]) for row in rows], batch_first=True, padding_value=value)

    ones = [torch.ones(len(row["input_ids"]), dtype=torch.long) for row in rows]
    mask = pad_sequence(ones, batch_first=True)
    return {"input_ids": fill("input_ids", 0), "attention_mask": mask, "labels": fill("labels", IGNORE)}


def flatten(rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """The rows end to end: input_ids, position_ids and labels, each (1, tokens) in int64; position 0 begins a row.

    Every row's first label must be -100: nothing before it, and so no token of another row, predicts it.
    """
    return {
        "input_ids": torch.cat([_long(row["input_ids"]) for row in rows]).unsqueeze(0),
        "position_ids": torch.cat([torch.arange(len(row["input_ids"])) for row in rows]).unsqueeze(0),
        "labels": torch.cat([_long(row["labels"]) for row in rows]).unsqueeze(0),
    }


def _long(values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.long)


def use_flat_rows(model: Any) -> bool:
    """Lets the model read flat batches, and returns True; leaves it alone and returns False if it cannot.

    Some models bring attention of their own, or want more of it than the plain kind. So it is tried: on two short rows
    the flat logits must be the padded ones.
    """
    if not getattr(model, "_supports_attention_backend", False):
        return False
    before = model.config._attn_implementation
    rows: list[dict[str, Any]] = [{"input_ids": ids, "labels": [IGNORE] * len(ids)} for ids in ([5, 6, 7, 8, 9], [9, 5, 8])]
    to = {"device": model.device}
    with torch.no_grad():
        wanted = torch.cat([model(input_ids=torch.tensor([row["input_ids"]], **to)).logits[0] for row in rows])
        try:
            model.set_attn_implementation(FLAT)
            batch = {name: tensor.to(model.device) for name, tensor in flatten(rows).items()}
            found = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits[0]
        except (TypeError, ValueError, NotImplementedError):
            found = None
    scale = wanted.float().std()
    if found is not None and found.shape == wanted.shape and (found - wanted).float().abs().max() < 0.1 * scale:
        return True
    model.set_attn_implementation(before)
    return False


def _flat_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **wanted: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each row of a flat batch; only here are the rows padded, side by side.

    Padding stands on the right, where causal attention never looks, so no mask is needed.

    Args:
        query: (1, heads, tokens, head size); key and value may have fewer heads, each for a group of queries.

    Returns:
        (1, tokens, heads, head size), and no weights.
    """
    position_ids = wanted.get("position_ids")
    if position_ids is None:
        raise NotImplementedError("a model that keeps the positions from its attention")
    places, real = _layout(position_ids)
    window = wanted.get("sliding_window")
    if (
        attention_mask is not None
        or wanted.get("softcap")
        or wanted.get("s_aux") is not None
        or (window and window < real.shape[1])
    ):
        raise NotImplementedError("attention of another kind")
    q, k, v = (tensor[0][:, places].transpose(0, 1) for tensor in (query, key, value))  # (rows, heads, longest, size)
    out = scaled_dot_product_attention(
        q,
        k,
        v,
        dropout_p=dropout if module.training else 0.0,
        is_causal=True,
        scale=scaling,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return out.transpose(1, 2)[real].unsqueeze(0), None


class _Last:
    """The layout of the batch at hand; every layer asks for it again, and finding it makes a GPU wait."""

    position_ids: torch.Tensor | None = None
    layout: tuple[torch.Tensor, torch.Tensor]


def _layout(position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where each row's tokens stand in the flat batch: places and real, both (rows, longest); real is False on padding."""
    if _Last.position_ids is not position_ids:
        starts = (position_ids[0] == 0).nonzero()
        ends = torch.cat([starts[1:], starts.new_tensor([[position_ids.shape[1]]])])
        places = starts + torch.arange(int((ends - starts).max()), device=position_ids.device)
        real = places < ends
        _Last.position_ids, _Last.layout = position_ids, (places.where(real, 0), real)
    return _Last.layout


AttentionInterface.register(FLAT, _flat_attention)
AttentionMaskInterface.register(FLAT, lambda *_, **__: None)


class Shuffled(torch.utils.data.Sampler[int]):
    """Every row once an epoch, in an order that follows from `seed` and the epoch alone; then `fill` times the empty row.

    So a resumed run sees the rows that it would have seen. Rows are not sorted by length: where length goes with the
    answer, a batch of like rows teaches that answer alone (the sample's exact match fell from 87 % to 66 %).
    """

    def __init__(self, count: int, seed: int, fill: int = 0) -> None:
        self.count, self.seed, self.fill, self.epoch = count, seed, fill, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count + self.fill

    def __iter__(self) -> Iterator[int]:
        order = list(range(self.count))
        random.Random(f"{self.seed} {self.epoch}").shuffle(order)
        return iter(order + [self.count] * self.fill)
