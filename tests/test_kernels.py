"""The Triton kernels in Triton's interpreter, on the CPU. Skipped without Triton, as on machines without a GPU."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

PROGRAM = """
import bitsandbytes as bnb, torch, triton
from stages.model import four_bit
from stages.train import fp8
from stages.generate import decode_attention
torch.manual_seed(0)
slots, cache_size, key_heads, group, head_dim = 3, 150, 2, 4, 48
query, key = torch.randn(slots, key_heads * group, head_dim), torch.randn(slots, key_heads, head_dim)
value = torch.randn(slots, 3 * key_heads, head_dim)[:, key_heads : 2 * key_heads]  # a slice, as of fused projections
keys, values = torch.randn(2, slots, cache_size, key_heads, head_dim)
lengths = torch.tensor([0, 77, 149])
for window in (cache_size, 64, 70, 1):
    caches = {"key_cache": keys.clone(), "value_cache": values.clone()}
    wanted = decode_attention.slot_attention(query, key, value, **caches, lengths=lengths, window=window, scaling=0.2)
    found = torch.full_like(query, float("nan"))
    decode_attention._kernel[(slots, key_heads)](
        query, key, value, keys, values, lengths, found, 0.2, window,
        *query.stride()[:2], *key.stride()[:2], *value.stride()[:2], *keys.stride()[:3],
        HEADS=key_heads * group, GROUP=group, PADDED_GROUP=16, HEAD_DIM=head_dim, PADDED_HEAD_DIM=64, BLOCK=64,
        PRECISION="ieee",
    )
    torch.testing.assert_close(found, wanted)
    assert torch.equal(keys, caches["key_cache"]) and torch.equal(values, caches["value_cache"])
for rows, columns, r in ((96, 256, 4), (100, 128, 16)):
    layer = bnb.nn.Linear4bit(columns, rows, bias=False, quant_type="nf4", compress_statistics=True)
    layer.load_state_dict({"weight": 0.02 * torch.randn(rows, columns)})
    layer.to("cpu")
    state = layer.weight.quant_state
    lora_B, lora_A = 0.01 * torch.randn(rows, r), 0.01 * torch.randn(r, columns)
    wanted = four_bit.dequantize_and_add_lora(layer, torch.empty(rows, columns), lora_A=lora_A, lora_B=lora_B, scaling=2.0)
    found = torch.full_like(wanted, float("nan"))
    four_bit._kernel[triton.cdiv(rows, 64), columns // 128](
        layer.weight.data, state.absmax, state.state2.code, state.state2.absmax, state.offset, state.code,
        lora_B, lora_A, found, rows, columns, r, 2.0, RANK=16, ROWS=64, COLUMNS=128,
    )
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-8)
x = torch.randn(5, 208) * torch.tensor([1.0, 1e-6, 300.0, 0.0, 0.02])[:, None]
(wanted, scales), found, size = fp8.quantize_rows(x), torch.zeros(5, 208, dtype=fp8.E4M3), torch.empty(5, 1)
fp8._kernel[(5,)](x, found, size, 208, PADDED_COLUMNS=256, LARGEST=fp8.LARGEST, LEAST=fp8.LEAST)
torch.testing.assert_close(size, scales, rtol=1e-6, atol=0)
found, wanted = found.float(), wanted.float()
carried = wanted.abs().log2() % 1 == 0  # Triton's interpreter is wrong if rounding carries into the exponent
assert carried.float().mean() < 0.2
assert torch.equal(found[~carried], wanted[~carried])
assert wanted.abs().amax(1).tolist() == [448, 448, 448, 0, 448]
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton, which PyTorch installs for a GPU")
def test_kernels_compute_the_same_as_plain_pytorch() -> None:
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=root,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
