"""Attention of a decode step: one new token in each slot attends to the keys and values that its slot holds."""

import torch
from torch.nn.functional import scaled_dot_product_attention

try:
    import triton
    import triton.language as tl
except ImportError:  # PyTorch for CPUs comes without it
    triton = None


def slot_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    lengths: torch.Tensor,
    window: int,
    scaling: float,
) -> torch.Tensor:
    """Stores each slot's new key and value in the cache; returns softmax(scaling · q kᵀ) v over the slot's tokens.

    On a GPU a Triton kernel reads no more of the cache than each slot's `lengths`, and no more than the window.

    Args:
        query: (slots, heads, head dim).
        key: (slots, key heads, head dim), of the new token; `heads` is a multiple of `key heads`.
        value: As key.
        key_cache: (slots, cache size, key heads, head dim). Written in place.
        value_cache: As key_cache.
        lengths: (slots,) in int64: the number of tokens in each slot, which is the new token's position.
        window: The number of a slot's last tokens, with the new one, that it attends to; the cache size for all.

    Returns:
        (slots, heads, head dim).
    """
    slots, heads, head_dim = query.shape
    key_heads = key_cache.shape[2]
    group = heads // key_heads
    if triton is None or not query.is_cuda:
        rows = torch.arange(slots, device=query.device)
        key_cache[rows, lengths], value_cache[rows, lengths] = key, value
        distance = lengths[:, None] - torch.arange(key_cache.shape[1], device=query.device)
        visible = (distance >= 0) & (distance < window)
        out = scaled_dot_product_attention(
            query.view(slots, key_heads, group, head_dim),
            key_cache.transpose(1, 2),
            value_cache.transpose(1, 2),
            attn_mask=visible[:, None, None],
            scale=scaling,
        )
        return out.reshape(slots, heads, head_dim)
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    with torch.cuda.device(query.device):  # Triton launches on the current device, and a spread model has layers on others
        _kernel[(slots, key_heads)](
            query, key, value, key_cache, value_cache, lengths, out, scaling, window,
            *query.stride()[:2], *key.stride()[:2], *value.stride()[:2], *key_cache.stride()[:3],
            HEADS=heads, GROUP=group, PADDED_GROUP=max(16, triton.next_power_of_2(group)),
            HEAD_DIM=head_dim, PADDED_HEAD_DIM=triton.next_power_of_2(head_dim), BLOCK=64,
            PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
        )  # fmt: skip
    return out


if triton is not None:

    @triton.jit  # type: ignore[untyped-decorator]
    def _kernel(  # type: ignore[no-untyped-def]
        query, key, value, key_cache, value_cache, lengths, out, scaling, window,
        query_slot_stride, query_head_stride, key_slot_stride, key_head_stride, value_slot_stride, value_head_stride,
        cache_slot_stride, cache_token_stride, cache_head_stride,
        HEADS: tl.constexpr, GROUP: tl.constexpr, PADDED_GROUP: tl.constexpr,
        HEAD_DIM: tl.constexpr, PADDED_HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
    ):  # fmt: skip
        """One program computes the GROUP query heads that share one key head of one slot.

        It reads BLOCK cached tokens at a time, with the online softmax (Milakov & Gimelshein 2018). tl.dot needs at least 16
        rows, and tl.arange a power of two: hence PADDED_GROUP and PADDED_HEAD_DIM.
        """
        slot, key_head = tl.program_id(0).to(tl.int64), tl.program_id(1)
        head, dim = tl.arange(0, PADDED_GROUP), tl.arange(0, PADDED_HEAD_DIM)
        real_heads = (head < GROUP)[:, None] & (dim < HEAD_DIM)[None, :]
        query_at = query + slot * query_slot_stride + (key_head * GROUP + head)[:, None] * query_head_stride + dim[None, :]
        q = tl.load(query_at, mask=real_heads, other=0)
        length = tl.load(lengths + slot).to(tl.int32)
        start = slot * cache_slot_stride + key_head * cache_head_stride
        # The new token is used directly, not read back: a load may not yet see what the same program has just stored.
        new_key = tl.load(key + slot * key_slot_stride + key_head * key_head_stride + dim, mask=dim < HEAD_DIM, other=0)
        new_value = tl.load(
            value + slot * value_slot_stride + key_head * value_head_stride + dim, mask=dim < HEAD_DIM, other=0
        )
        end = start + length.to(tl.int64) * cache_token_stride + dim
        tl.store(key_cache + end, new_key, mask=dim < HEAD_DIM)
        tl.store(value_cache + end, new_value, mask=dim < HEAD_DIM)
        highest = tl.sum(q.to(tl.float32) * new_key.to(tl.float32)[None, :], 1) * scaling
        weight = tl.full((PADDED_GROUP,), 1.0, tl.float32)
        total = tl.zeros((PADDED_GROUP, PADDED_HEAD_DIM), tl.float32) + new_value.to(tl.float32)[None, :]
        oldest = tl.maximum(length - window + 1, 0)
        for first in range(oldest // BLOCK * BLOCK, length, BLOCK):
            token = first + tl.arange(0, BLOCK)
            visible = (token >= oldest) & (token < length)
            real_tokens = visible[:, None] & (dim < HEAD_DIM)[None, :]
            at = start + token.to(tl.int64)[:, None] * cache_token_stride + dim[None, :]
            k = tl.load(key_cache + at, mask=real_tokens, other=0)
            v = tl.load(value_cache + at, mask=real_tokens, other=0)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scaling
            scores = tl.where(visible[None, :], scores, float("-inf"))
            new_highest = tl.maximum(highest, tl.max(scores, 1))
            rescale = tl.exp(highest - new_highest)
            p = tl.exp(scores - new_highest[:, None])
            weight = weight * rescale + tl.sum(p, 1)
            total = total * rescale[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
            highest = new_highest
        out_at = out + slot * HEADS * HEAD_DIM + (key_head * GROUP + head)[:, None] * HEAD_DIM + dim[None, :]
        tl.store(out_at, (total / weight[:, None]).to(out.dtype.element_ty), mask=real_heads)
