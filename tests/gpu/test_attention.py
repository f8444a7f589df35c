"""Attention on a GPU: a decode step over slots, and padding-free rows, against plain attention in float64."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from stages.generate.decode_attention import slot_attention
from stages.model.collate import collate_padded, collate_padding_free
from stages.model.logits import label_logits
from stages.model.padding_free import RowLayout, enable_padding_free, padding_free_attention
from tests.gpu.close import assert_within, relative_error


def rounding_of(dtype: torch.dtype) -> float:
    """The largest relative error of a number that is rounded to the dtype."""
    return torch.finfo(dtype).eps / 2


# A decode step


@pytest.mark.parametrize(
    ("dtype", "key_heads", "group", "head_dim"),
    [
        (torch.bfloat16, 2, 1, 64),
        (torch.bfloat16, 2, 4, 128),
        (torch.bfloat16, 1, 7, 80),  # 80 is padded to 128
        (torch.bfloat16, 1, 20, 64),  # 20 heads are padded to 32
        (torch.bfloat16, 2, 2, 256),
        (torch.float32, 2, 4, 48),
        (torch.float32, 1, 1, 128),
        (torch.float16, 2, 3, 64),
    ],
)
@pytest.mark.parametrize("window", [300, 70, 64, 1])
def test_slots_attend_to_their_own_tokens(
    device: torch.device, dtype: torch.dtype, key_heads: int, group: int, head_dim: int, window: int
) -> None:
    torch.manual_seed(0)
    size, lengths = 300, torch.tensor([0, 1, 63, 64, 65, 127, 128, 200, 299], device=device)
    slots, heads = len(lengths), key_heads * group
    # Slices of one tensor, as of fused projections.
    fused: Any = torch.randn(slots, heads + 2 * key_heads, head_dim, device=device, dtype=dtype)
    query, key, value = fused.split([heads, key_heads, key_heads], 1)
    keys, values = torch.randn(2, slots, size, key_heads, head_dim, device=device, dtype=dtype)
    for slot, length in enumerate(lengths.tolist()):
        keys[slot, length:] = values[slot, length:] = 1e4  # a cached token that is read too far is seen
        first = max(0, length + 1 - window)
        keys[slot, :first] = values[slot, :first] = 1e4
    expected_keys, expected_values = keys.clone(), values.clone()
    rows = torch.arange(slots, device=device)
    expected_keys[rows, lengths], expected_values[rows, lengths] = key, value
    scaling = head_dim**-0.5
    caches = {"key_cache": keys, "value_cache": values}
    found = slot_attention(query, key, value, **caches, lengths=lengths, window=window, scaling=scaling)
    assert torch.equal(keys, expected_keys)
    assert torch.equal(values, expected_values)
    assert found.dtype == dtype
    rounding = rounding_of(dtype)
    for slot, length in enumerate(lengths.tolist()):
        seen = slice(max(0, length + 1 - window), length + 1)
        k, v = (cache[slot, seen].double().repeat_interleave(group, 1) for cache in (expected_keys, expected_values))
        scores = torch.einsum("hd,thd->ht", query[slot].double(), k) * scaling
        weights = scores.softmax(-1)
        wanted = torch.einsum("ht,thd->hd", weights, v)
        # The weights are rounded to the dtype for their product with the values, and so is the result. The scores are sums
        # of head_dim float32 products, and the exponential of a GPU has an error of 2^-22.
        largest = torch.einsum("ht,thd->hd", weights, v.abs())
        in_float32 = 2**-20 * (4 + scores.abs().amax(-1, keepdim=True))
        bound = (2 * rounding + in_float32) * largest + rounding * wanted.abs()
        assert_within(found[slot], wanted, bound, what=f"slot with {length} tokens")


# Padding-free rows


def plain_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None) -> torch.Tensor:
    """Causal attention of one row in float64: (heads, tokens, head dim) each, to (tokens, heads, head dim)."""
    group = len(q) // len(k)
    k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
    scores = q @ k.transpose(1, 2) * q.shape[-1] ** -0.5
    positions = torch.arange(q.shape[1], device=q.device)
    distance = positions[:, None] - positions
    visible = (distance >= 0) & (distance < (window or q.shape[1]))
    out: torch.Tensor = (scores.masked_fill(~visible, -torch.inf).softmax(-1) @ v).transpose(0, 1)
    return out


@pytest.mark.parametrize("lengths", [[130, 1, 64, 200, 3], [96, 96, 96]])
@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize(
    ("dtype", "heads", "key_heads", "head_dim"),
    [
        (torch.bfloat16, 4, 4, 64),
        (torch.bfloat16, 8, 2, 128),
        (torch.bfloat16, 6, 3, 80),
        (torch.float16, 4, 2, 64),
        (torch.float32, 4, 2, 48),
    ],
)
def test_rows_attend_to_themselves_in_both_passes(
    device: torch.device,
    dtype: torch.dtype,
    heads: int,
    key_heads: int,
    head_dim: int,
    lengths: list[int],
    window: int | None,
) -> None:
    torch.manual_seed(0)
    tokens = sum(lengths)
    exact: Any = [
        torch.randn(n, tokens, head_dim, dtype=torch.float64, device=device) for n in (heads, key_heads, key_heads)
    ]
    exact = [tensor.to(dtype).double().requires_grad_() for tensor in exact]
    inputs: Any = [tensor.detach().to(dtype).unsqueeze(0).requires_grad_() for tensor in exact]
    module, layout = SimpleNamespace(training=True), RowLayout(lengths)
    q, k, v = inputs
    found: Any = padding_free_attention(module, q, k, v, None, row_layout=layout, sliding_window=window)[0]
    parts: Any = zip(*(tensor.split(lengths, 1) for tensor in exact), strict=True)
    wanted: Any = torch.cat([plain_attention(q, k, v, window) for q, k, v in parts])
    assert found.shape == (1, tokens, heads, head_dim)
    grad = torch.randn_like(wanted)
    found.backward(grad.to(dtype).unsqueeze(0))
    wanted.backward(grad.to(dtype).double())
    # Every element is a sum of products of values rounded to the dtype; the errors of single steps have random signs. In
    # float32 a GPU may sum in another order, but not use TF32.
    limit = 4 * rounding_of(dtype) if dtype != torch.float32 else 1e-5
    errors = {"out": relative_error(found[0], wanted)}
    errors |= {
        name: relative_error(tensor.grad[0], reference.grad)
        for name, tensor, reference in zip(("dq", "dk", "dv"), inputs, exact, strict=True)
    }
    assert all(error <= limit for error in errors.values()), f"{errors}, wanted at most {limit:.2g}"


SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def set_dtype(model: Any, dtype: torch.dtype) -> Any:
    """Converts the weights only: model.to would round the frequencies of the rotary positions too."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


@pytest.mark.parametrize("window", [None, 70])
def test_a_padding_free_model_is_as_exact_as_a_padded_one(device: torch.device, window: int | None) -> None:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(4, 300, (length,), generator=generator).tolist() for length in (150, 9, 64, 201)]
    rows = [{"input_ids": row, "labels": [-100, *row[1:]]} for row in ids]
    padded = {name: value.to(device) for name, value in collate_padded(rows).items()}
    batch = collate_padding_free(rows, 64)
    batch = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
    if window:
        model = MistralForCausalLM(MistralConfig(sliding_window=window, **SIZES))
    else:
        model = LlamaForCausalLM(LlamaConfig(**SIZES))
    model = model.eval().to(device)
    with torch.no_grad():
        exact = label_logits(set_dtype(model, torch.float64), padded)[0]
        logits = {}
        for dtype in (torch.float32, torch.bfloat16):
            set_dtype(model, dtype)
            model.set_attn_implementation("sdpa")
            logits["padded", dtype] = label_logits(model, padded)[0]
            assert enable_padding_free(model) == ""
            logits["padding-free", dtype] = label_logits(model, batch)[0]
    errors = {f"{kind} {dtype}": relative_error(found, exact) for (kind, dtype), found in logits.items()}
    # Both round at the same places; by chance one may be a little closer.
    assert errors["padding-free torch.float32"] < 1.5 * errors["padded torch.float32"] + 1e-5, errors
    assert errors["padding-free torch.bfloat16"] < 1.5 * errors["padded torch.bfloat16"], errors
    assert errors["padding-free torch.bfloat16"] < 0.03, errors
