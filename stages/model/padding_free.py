"""Attention for rows that lie end to end in one batch: no row sees another, and no work is done on padding."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

from stages.core.tokens import IGNORE
from stages.model.collate import collate_padding_free

PADDING_FREE = "loratory_flat"
"""The name under which Transformers knows the attention below."""


def enable_padding_free(model: Any) -> bool:
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
            model.set_attn_implementation(PADDING_FREE)
            batch = collate_padding_free(rows)
            ids, positions = (batch[name].to(model.device) for name in ("input_ids", "position_ids"))
            found = model(input_ids=ids, position_ids=positions, use_cache=False).logits[0]
        except (TypeError, ValueError, NotImplementedError):
            found = None
    if found is not None and logits_match(found, wanted):
        return True
    model.set_attn_implementation(before)
    return False


def logits_match(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Whether logits differ by rounding alone.

    Through many blocks in 16 bits it makes a hundredth; a row that saw another would be off by the half.
    """
    most = 1e-3 if wanted.dtype == torch.float32 else 0.1
    return found.shape == wanted.shape and bool((found - wanted).float().std() < most * wanted.float().std())


def require_plain_attention(attention_mask: torch.Tensor | None, wanted: dict[str, Any]) -> None:
    """Raises NotImplementedError if a model asks its attention for more than the plain kind."""
    if attention_mask is not None or wanted.get("softcap") or wanted.get("s_aux") is not None:
        raise NotImplementedError("attention of another kind")


def padding_free_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **wanted: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each row of a flat batch.

    Args:
        query: (1, heads, tokens, head size); key and value may have fewer heads, each for a group of queries.

    Returns:
        (1, tokens, heads, head size), and no weights.
    """
    position_ids = wanted.get("position_ids")
    if position_ids is None:
        raise NotImplementedError("a model that keeps the positions from its attention")
    layout = _layout(position_ids)
    window = wanted.get("sliding_window")
    window = window if window and window < layout.longest else None
    require_plain_attention(attention_mask, wanted)
    dropout = dropout if module.training else 0.0
    # Not tensor[0]: the gradient of that is a tensor of zeros with a copy in it.
    heads = [tensor.squeeze(0) for tensor in (query, key, value)]  # (heads, tokens, size)
    half = query.is_cuda and query.dtype != torch.float32
    if layout.ragged and half and not dropout and not torch.are_deterministic_algorithms_enabled():
        q, k, v = (tensor.transpose(0, 1) for tensor in heads)  # (tokens, heads, size)
        return _ragged_attention(q, k, v, layout, scaling, window).unsqueeze(0), None
    if window:
        raise NotImplementedError("a window")
    if layout.ragged:
        # Padding stands on the right, where causal attention never looks, so no mask is needed.
        places, real = layout.padded(position_ids.device)
        q, k, v = (tensor[:, places].transpose(0, 1) for tensor in heads)  # (rows, heads, longest, size)
    else:
        # PyTorch's kernel for rows of one length is nearly twice as fast as the one for rows of many.
        q, k, v = (torch.unflatten(tensor, 1, (-1, layout.longest)).transpose(0, 1) for tensor in heads)
    out = scaled_dot_product_attention(
        q, k, v, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
    ).transpose(1, 2)
    return (out[real] if layout.ragged else out.flatten(0, 1)).unsqueeze(0), None


def _ragged_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: "_Layout", scaling: float | None, window: int | None
) -> torch.Tensor:
    """PyTorch's flash attention for rows of many lengths, (tokens, heads, size) each."""
    from torch.nn.attention.varlen import varlen_attn

    starts = layout.starts(q.device)
    given: dict[str, Any] = {"scale": scaling, "window_size": (window - 1 if window else -1, 0)}
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:  # without the name it shares keys too, seen with 2.11
        given["enable_gqa"] = q.shape[1] != k.shape[1]
    out = varlen_attn(q, k, v, starts, starts, layout.longest, layout.longest, **given)
    assert isinstance(out, torch.Tensor)  # and not a pair, which has to be asked for
    return out


class _Layout:
    """Where the rows of a flat batch lie."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths, self.longest = list(lengths), max(lengths)
        self.ragged = min(lengths) < self.longest
        self._starts: torch.Tensor | None = None
        self._padded: tuple[torch.Tensor, torch.Tensor] | None = None

    def starts(self, device: torch.device) -> torch.Tensor:
        """(rows + 1,) in int32: where each row starts, and where the last one ends."""
        if self._starts is None:
            ends = torch.tensor([0, *self.lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
            self._starts = ends.to(device, non_blocking=True)
        return self._starts

    def padded(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """places and real, both (rows, longest): where each row's tokens stand, and which of the places are no padding."""
        if self._padded is None:
            lengths = torch.tensor(self.lengths).unsqueeze(1)
            steps = torch.arange(self.longest)
            real = steps < lengths
            places = (lengths.cumsum(0) - lengths + steps).where(real, 0)
            self._padded = places.to(device, non_blocking=True), real.to(device, non_blocking=True)
        return self._padded


class _Last:
    """The layout of the batch at hand, for which every layer asks."""

    position_ids: torch.Tensor | None = None
    layout: _Layout


def expect(position_ids: torch.Tensor, lengths: Sequence[int]) -> None:
    """Says where the rows of the next batch lie, which a GPU would have to be waited for to tell."""
    _Last.position_ids, _Last.layout = position_ids, _Layout(lengths)


def _layout(position_ids: torch.Tensor) -> _Layout:
    if _Last.position_ids is not position_ids:
        starts = (position_ids[0] == 0).nonzero().flatten().tolist()
        expect(position_ids, [end - start for start, end in zip(starts, [*starts[1:], position_ids.shape[1]], strict=True)])
    return _Last.layout


AttentionInterface.register(PADDING_FREE, padding_free_attention)
AttentionMaskInterface.register(PADDING_FREE, lambda *_, **__: None)
