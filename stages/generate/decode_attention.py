"""Attention of one new token a row, over the keys and values that the row's slot holds, and no more."""

import torch
from torch.nn.functional import scaled_dot_product_attention

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU has no use for it
    triton = None


def slot_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    lengths: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """softmax(scaling · q kᵀ) v, (slots, heads, size). The new key and value are written to their place.

    Args:
        query: (slots, heads, size)
        key: (slots, key heads, size), as value: of the new token; each for a group of the query's heads.
        keys: (slots, places, key heads, size), as values: of those before it.
        lengths: (slots,) How many there are, and so the new token's place.
    """
    slots, heads, size = query.shape
    groups = heads // keys.shape[2]
    if triton is None or not query.is_cuda:
        rows = torch.arange(slots, device=query.device)
        keys[rows, lengths], values[rows, lengths] = key, value
        visible = torch.arange(keys.shape[1], device=query.device) <= lengths[:, None]
        grouped = query.view(slots, keys.shape[2], groups, size)
        out = scaled_dot_product_attention(
            grouped, keys.transpose(1, 2), values.transpose(1, 2), attn_mask=visible[:, None, None], scale=scaling
        )
        return out.reshape(slots, heads, size)
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    _kernel[(slots, keys.shape[2])](
        query, key, value, keys, values, lengths, out, scaling,
        *query.stride()[:2], *key.stride()[:2], *value.stride()[:2], *keys.stride()[:3],
        HEADS=heads, GROUP=groups, WIDE_GROUP=max(16, triton.next_power_of_2(groups)),
        SIZE=size, WIDE=triton.next_power_of_2(size), PLACES=64,
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
    )  # fmt: skip
    return out


if triton is not None:

    @triton.jit  # type: ignore[untyped-decorator]
    def _kernel(  # type: ignore[no-untyped-def]
        query, key, value, keys, values, lengths, out, scaling, query_slot, query_head, key_slot, key_head, value_slot,
        value_head, slot_stride, place_stride, head_stride,
        HEADS: tl.constexpr, GROUP: tl.constexpr, WIDE_GROUP: tl.constexpr, SIZE: tl.constexpr, WIDE: tl.constexpr,
        PLACES: tl.constexpr, PRECISION: tl.constexpr,
    ):  # fmt: skip
        """The heads of one slot that share keys; PLACES keys at a time, by a running maximum (Milakov & Gimelshein 2018)."""
        slot, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
        group, size = tl.arange(0, WIDE_GROUP), tl.arange(0, WIDE)
        mine = (group < GROUP)[:, None] & (size < SIZE)[None, :]
        place_of = query + slot * query_slot + (head * GROUP + group)[:, None] * query_head + size[None, :]
        q = tl.load(place_of, mask=mine, other=0)
        length = tl.load(lengths + slot).to(tl.int32)
        start = slot * slot_stride + head * head_stride
        # The new token is the first that is looked at, from where it came: what is written now is not to be read at once.
        newest = tl.load(key + slot * key_slot + head * key_head + size, mask=size < SIZE, other=0)
        told = tl.load(value + slot * value_slot + head * value_head + size, mask=size < SIZE, other=0)
        end = start + length.to(tl.int64) * place_stride + size
        tl.store(keys + end, newest, mask=size < SIZE)
        tl.store(values + end, told, mask=size < SIZE)
        top = tl.sum(q.to(tl.float32) * newest.to(tl.float32)[None, :], 1) * scaling
        weight = tl.full((WIDE_GROUP,), 1.0, tl.float32)
        total = tl.zeros((WIDE_GROUP, WIDE), tl.float32) + told.to(tl.float32)[None, :]
        for first in range(0, length, PLACES):
            place = first + tl.arange(0, PLACES)
            real = (place < length)[:, None] & (size < SIZE)[None, :]
            at = start + place.to(tl.int64)[:, None] * place_stride + size[None, :]
            k = tl.load(keys + at, mask=real, other=0)
            v = tl.load(values + at, mask=real, other=0)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scaling
            scores = tl.where((place < length)[None, :], scores, float("-inf"))
            higher = tl.maximum(top, tl.max(scores, 1))
            shrink = tl.exp(top - higher)
            p = tl.exp(scores - higher[:, None])
            weight = weight * shrink + tl.sum(p, 1)
            total = total * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
            top = higher
        to = out + slot * HEADS * SIZE + (head * GROUP + group)[:, None] * SIZE + size[None, :]
        tl.store(to, (total / weight[:, None]).to(out.dtype.element_ty), mask=mine)
