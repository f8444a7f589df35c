"""The Triton kernels against PyTorch: 4-bit weights with LoRA, and FP8."""
# ruff: noqa: N806 (lora_A and lora_B are PEFT's names)

from collections.abc import Callable
from typing import Any

import bitsandbytes as bnb
import pytest
import torch

from stages.model.collate import collate_padded
from stages.model.four_bit import _kernel_supports, dequantize_and_add_lora
from stages.train import fp8
from tests.gpu.close import assert_within, relative_error
from tests.test_lora_layers import ROWS, adapted, assert_close, lora_layers, losses_and_gradients, small, validation_loss

WIDE = {"hidden_size": 256, "intermediate_size": 384}
"""Widths that the kernel takes: multiples of 128."""


@pytest.fixture
def needs_fp8(device: torch.device) -> None:
    if device.type == "cuda" and fp8.why_unsupported(device):
        pytest.skip(fp8.why_unsupported(device))


# 4-bit weights


@pytest.mark.parametrize(
    ("quant_type", "double", "rows", "columns", "r", "dtype", "storage"),
    [
        ("nf4", True, 200, 384, 16, torch.bfloat16, torch.uint8),
        ("fp4", True, 200, 384, 16, torch.bfloat16, torch.uint8),
        ("nf4", True, 65, 1024, 17, torch.float32, torch.uint8),  # r is padded to 32
        ("fp4", True, 63, 128, 1, torch.float32, torch.uint8),
        ("nf4", True, 1, 256, 4, torch.bfloat16, torch.uint8),
        ("nf4", True, 130, 512, 64, torch.bfloat16, torch.bfloat16),  # as FSDP stores the bits
        ("nf4", True, 64, 128, 256, torch.bfloat16, torch.uint8),
        ("nf4", True, 96, 256, 8, torch.float16, torch.uint8),
        # Without the kernel: single quantization, and columns that are no multiple of 128.
        ("nf4", False, 200, 384, 16, torch.bfloat16, torch.uint8),
        ("fp4", False, 65, 128, 4, torch.float32, torch.uint8),
        ("nf4", True, 100, 192, 16, torch.bfloat16, torch.uint8),
    ],
)
def test_a_4_bit_weight_with_lora_is_the_exact_sum_within_tf32(
    device: torch.device,
    quant_type: str,
    double: bool,
    rows: int,
    columns: int,
    r: int,
    dtype: torch.dtype,
    storage: torch.dtype,
) -> None:
    torch.manual_seed(0)
    layer = bnb.nn.Linear4bit(
        columns,
        rows,
        bias=False,
        compute_dtype=dtype,
        quant_type=quant_type,
        compress_statistics=double,
        quant_storage=storage,
    )
    layer.load_state_dict({"weight": 0.02 * torch.randn(rows, columns)})
    layer.to(device)
    lora_B, lora_A = (0.1 * torch.randn(*shape, device=device) for shape in ((rows, r), (r, columns)))
    out = torch.full((rows, columns), float("nan"), dtype=dtype, device=device)
    state = layer.weight.quant_state
    assert _kernel_supports(layer.weight.data, state, out) == (device.type == "cuda" and double and columns % 128 == 0)
    found = dequantize_and_add_lora(layer, out, lora_A=lora_A, lora_B=lora_B, scaling=0.5)
    assert found is out
    state.dtype = torch.float32
    weight = bnb.functional.dequantize_4bit(layer.weight.data, state).double()
    wanted = weight + 0.5 * lora_B.double() @ lora_A.double()
    # TF32 has 10 bits after the point. Each factor is rounded or cut, by at most 2^-10 of it, so a product by 2^-9. The
    # scales and sums are float32; then the sum is rounded once, to nearest.
    products = 0.5 * lora_B.double().abs() @ lora_A.double().abs()
    rounding = torch.finfo(dtype).eps / 2
    bound = 2**-9 * products + 2**-20 * (weight.abs() + products)
    bound += rounding * (wanted.abs() + bound) + (2**-25 if dtype == torch.float16 else 0)
    assert_within(found, wanted, bound, what=f"W + s B A, {rows} x {columns}, r {r}")
    assert relative_error(found, wanted) < 2**-9 + rounding, "errors of single values have no common sign"


def in_4_bits(device: torch.device, quant_type: str, *, double: bool, dtype: torch.dtype) -> Callable[[], Any]:
    """A Llama on `device` whose linear layers, except the output head, are quantized to 4 bits."""

    def quantize(layer: torch.nn.Linear) -> Any:
        new = bnb.nn.Linear4bit(
            layer.in_features,
            layer.out_features,
            bias=False,
            compute_dtype=dtype,
            quant_type=quant_type,
            compress_statistics=double,
        )
        new.load_state_dict({"weight": layer.weight.data})
        return new.to(device)

    def quantized() -> Any:
        model = small("llama", **WIDE)()
        for block in model.model.layers:
            for parent in (block.self_attn, block.mlp):
                for name, layer in list(parent.named_children()):
                    if isinstance(layer, torch.nn.Linear):
                        setattr(parent, name, quantize(layer))
        return model.to(device)

    return quantized


def batch_on(device: torch.device) -> dict[str, Any]:
    return {name: tensor.to(device) for name, tensor in collate_padded(ROWS).items()}


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [True, False])
def test_gradients_with_4_bit_weights_are_those_of_peft(device: torch.device, quant_type: str, double: bool) -> None:
    batch = batch_on(device)
    make = in_4_bits(device, quant_type, double=double, dtype=torch.float32)
    wanted = losses_and_gradients(adapted(make).to(device), batch)
    model = adapted(make).to(device)
    layers = lora_layers(model)
    assert len(layers.summed_in_float32) == 7 * 3
    for keep in (True, False):
        layers.keep_dequantized(keep)
        # The delta weight has a third of the size of the weights here, so TF32 changes their sum by 2^-10 / 3 at most, and
        # less on average, as its signs differ.
        assert_close(losses_and_gradients(model, batch), wanted, 1e-3)

    exact = wanted[1]

    def error(model: Any) -> float:
        loss, gradients = losses_and_gradients(model, batch)
        assert loss == pytest.approx(wanted[0], rel=5e-3)
        difference = sum(float((gradients[name].float() - g).norm() ** 2) for name, g in exact.items())
        return float((difference / sum(float(g.norm() ** 2) for g in exact.values())) ** 0.5)

    make = in_4_bits(device, quant_type, double=double, dtype=torch.bfloat16)
    peft, ours = (adapted(make, torch.bfloat16).to(device) for _ in range(2))
    lora_layers(ours)
    errors = {"ours": error(ours), "peft": error(peft)}
    # Both round weights, activations and gradients to bfloat16, each by up to 2^-8.
    assert errors["ours"] < 1.5 * errors["peft"] < 0.1, errors


# FP8


@pytest.mark.parametrize(
    ("columns", "dtype"),
    [
        (16, torch.bfloat16),
        (208, torch.float32),
        (5000, torch.bfloat16),
        (fp8.MAX_COLUMNS, torch.bfloat16),
        (fp8.MAX_COLUMNS + 16, torch.bfloat16),  # too long for the kernel
    ],
)
@pytest.mark.usefixtures("needs_fp8")
def test_rows_are_quantized_as_in_plain_pytorch(device: torch.device, columns: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    sizes = torch.tensor([1.0, 1e-6, 300.0, 0.0, 0.02])
    x = (torch.randn(5, columns) * sizes[:, None]).to(device, dtype)
    (found, scales), (wanted, wanted_scales) = fp8.quantize_rows(x), fp8._quantize_rows(x)
    # A GPU divides with an error of 2^-22. So a value in the middle of two e4m3 numbers, which are 2^-3 apart, may be
    # rounded to the other one; the error is the same.
    assert_within(scales, wanted_scales, 2**-21 * wanted_scales.double(), what="scales")
    assert_within(found, wanted, 2**-3 * wanted.double().abs() + 2**-9, what="values in e4m3")
    for row in (0, 1, 2, 4):
        errors = [
            relative_error(values[row].double() * scale[row].double(), x[row])
            for values, scale in ((found, scales), (wanted, wanted_scales))
        ]
        assert errors[0] == pytest.approx(errors[1], rel=1e-3), row
    assert found.float().abs().amax(1).tolist() == [448, 448, 448, 0, 448]
    transposed = fp8.quantize_rows(x.t())  # not contiguous, as for the weights' columns
    assert_within(transposed[1], fp8._quantize_rows(x.t())[1], 1e-6, what="scales of columns")


@pytest.mark.parametrize(("rows", "inner", "columns"), [(64, 64, 32), (37, 208, 336), (192, 1024, 128)])
@pytest.mark.usefixtures("needs_fp8")
def test_products_in_fp8_are_those_of_the_quantized_values(
    device: torch.device, rows: int, inner: int, columns: int
) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(rows, inner, device=device), torch.randn(columns, inner, device=device)
    x *= torch.logspace(-3, 3, rows, device=device)[:, None]
    bias = torch.randn(columns, device=device)
    quantized = fp8.quantize_rows(x.bfloat16()), fp8.quantize_rows(y.bfloat16())
    a, b = (values.double() * scale.double() for values, scale in quantized)
    for given in (None, bias.bfloat16()):
        wanted = a @ b.t() + (given.double() if given is not None else 0)
        found = fp8.matmul(*quantized, given)
        assert found.dtype == torch.bfloat16
        # The tensor cores' fast accumulation keeps about 13 bits of a sum, in each of inner / 32 steps; then the result is
        # rounded to bfloat16.
        bound = 2**-8 * wanted.abs() + 2**-13 * (1 + inner / 32) * (a.abs() @ b.t().abs())
        assert_within(found, wanted, bound, what=f"{rows} x {inner} x {columns}, bias {given is not None}")
        for row in (0, rows - 1):
            assert relative_error(found[row], wanted[row]) < 0.01, "sums have random signs, so their errors are small"


@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.usefixtures("needs_fp8")
def test_training_in_fp8_has_the_error_of_its_rounding_and_validation_none(device: torch.device, quantized: bool) -> None:
    batch = batch_on(device)

    def make(dtype: torch.dtype) -> Any:
        if quantized:
            return adapted(in_4_bits(device, "nf4", double=True, dtype=dtype), dtype).to(device)
        return adapted(small("llama", **WIDE), dtype).to(device)

    exact = losses_and_gradients(make(torch.float32), batch)

    def error(model: Any) -> float:
        loss, gradients = losses_and_gradients(model, batch)
        assert loss == pytest.approx(exact[0], rel=5e-3)
        difference = sum(float((gradients[name].float() - g).norm() ** 2) for name, g in exact[1].items())
        return float((difference / sum(float(g.norm() ** 2) for g in exact[1].values())) ** 0.5)

    plain, in_fp8 = make(torch.bfloat16), make(torch.bfloat16)
    lora_layers(plain)
    layers = lora_layers(in_fp8, fp8=True)
    assert {type(layer).__name__ for layer in layers.layers.values()} == {"_Fp8Weight"}
    assert validation_loss(in_fp8, batch) == validation_loss(plain, batch)
    errors = {"fp8": error(in_fp8), "bfloat16": error(plain)}
    # e4m3 has 3 bits after the point: single values are rounded by up to 2^-4, gradients of 3 layers by a few percent.
    assert 2 * errors["bfloat16"] < errors["fp8"] < 0.2, errors
