"""The GPU's kernels, interpreted on the CPU; where Triton is not installed they cannot be, and no CPU uses them."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

PROGRAM = """
import bitsandbytes as bnb, torch, triton
from stages.lib import four_bit, slot_attention
torch.manual_seed(0)
slots, places, heads, group, size = 3, 150, 2, 4, 48
query = torch.randn(slots, heads * group, size)
keys, values = torch.randn(2, slots, places, heads, size)
lengths = torch.tensor([0, 77, 149])
wanted = slot_attention.slot_attention(query, keys, values, lengths, 0.2)
found = torch.full_like(query, float("nan"))
slot_attention._kernel[(slots, heads)](
    query, keys, values, lengths, found, 0.2, query.stride(0), query.stride(1), *keys.stride()[:3],
    HEADS=heads * group, GROUP=group, WIDE_GROUP=16, SIZE=size, WIDE=64, PLACES=64, PRECISION="ieee",
)
torch.testing.assert_close(found, wanted)
for rows, columns, r in ((96, 256, 4), (100, 128, 16)):
    layer = bnb.nn.Linear4bit(columns, rows, bias=False, quant_type="nf4", compress_statistics=True)
    layer.load_state_dict({"weight": 0.02 * torch.randn(rows, columns)})
    layer.to("cpu")
    state = layer.weight.quant_state
    up, down = 0.01 * torch.randn(rows, r), 0.01 * torch.randn(r, columns)
    wanted = four_bit.unpack_sum(layer, up, down, 2.0, torch.empty(rows, columns))
    found = torch.full_like(wanted, float("nan"))
    four_bit._kernel[triton.cdiv(rows, 64), columns // 128](
        layer.weight.data, state.absmax, state.state2.code, state.state2.absmax, state.offset, state.code, up, down, found,
        rows, columns, r, 2.0, RANK=16, ROWS=64, COLUMNS=128,
    )
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-8)
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton, which PyTorch brings for a GPU")
def test_kernels_compute_what_plain_pytorch_does() -> None:
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
