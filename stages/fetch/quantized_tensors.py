"""Which tensors of a quantized model are to be dequantized, found from the headers of its files alone.

The three formats, each as its library writes it:

- fp8: a weight in float8_e4m3fn, and beside it the numbers by which it is to be multiplied: one for each block (DeepSeek V3,
  Qwen3 FP8: `weight_scale_inv`), one for each row, or one for all (Mistral 3, AutoFP8: `weight_scale`).
- mxfp4 (gpt-oss): `*_blocks`, uint8 with two numbers of 4 bits in a byte, (experts, out, in / 32, 16), and `*_scales`, the
  exponents, (experts, out, in / 32). The weight is (experts, in, out).
- bitsandbytes: 4 bits: a weight of bytes, and `weight.absmax`, `weight.quant_map`, `weight.quant_state.bitsandbytes__nf4`,
  with double quantization also `weight.nested_absmax` and `weight.nested_quant_map`; 8 bits: an int8 weight and `SCB`.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from stages.fetch.quantization import Quantization
from stages.fetch.safetensors_files import TensorInfo, item_size

Headers = Mapping[str, Mapping[str, TensorInfo]]
"""File → tensor → where and what it is."""

FP8_SCALES = ("weight_scale_inv", "weight_scale", "scale", "qscale_weight")
FP8_UNUSED = ("activation_scale", "input_scale", "output_scale", "kv_scale", "qscale_act")
"""Scales of a layer's inputs and outputs. A model in bfloat16 does not round those."""
FP8_CACHE_SCALES = ("q_scale", "k_scale", "v_scale", "kv_scale")
"""Scales of the attention's cache, beside the layers."""
STATE_4BIT = re.compile(r"(.+)\.quant_state\.bitsandbytes__(nf4|fp4)")
PARTS_4BIT = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
CONV1D_TYPES = ("gpt2", "gpt-sw3", "openai-gpt")
"""Model types whose layers store (in, out), while bitsandbytes stores (out, in)."""
SHOWN_PROBLEMS = 3
"""So many tensors are named that do not fit; usually all or none do."""
PLAIN_DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "BOOL")
"""What may be beside quantized weights."""


class Weight(NamedTuple):
    """A tensor to dequantize."""

    name: str
    """Its name in the dequantized model."""
    stored: str
    """The tensor with the quantized values."""
    parts: Mapping[str, str]
    """The tensors that belong to it, by what they are."""
    shape: tuple[int, ...] | None
    """None if only the data says it."""
    elements: int
    """At most."""
    block: tuple[int, int] = (0, 0)
    """fp8: rows and columns that share a scale; (0, 0) if all do."""


class Plan(NamedTuple):
    """How the files of a quantized model become files in bfloat16."""

    quantization: Quantization
    headers: Headers
    weights: Mapping[str, Weight]
    """By the name of the tensor with the quantized values."""
    dropped: frozenset[str]
    """Tensors that the dequantized model has no use for."""
    problems: list[str]
    transposed: bool
    """Whether the dequantized weights are to be transposed."""

    @property
    def stored_size(self) -> int:
        """Bytes of all tensors as they are stored."""
        return sum(info.end - info.start for tensors in self.headers.values() for info in tensors.values())

    @property
    def size(self) -> int:
        """Bytes of all tensors when they are dequantized; an upper limit where the header does not say the shape."""
        return sum(self._size(name, info) for tensors in self.headers.values() for name, info in tensors.items())

    def _size(self, name: str, info: TensorInfo) -> int:
        if name in self.dropped:
            return 0
        return 2 * self.weights[name].elements if name in self.weights else info.end - info.start


def plan_dequantization(quantization: Quantization, headers: Headers, *, model_type: object) -> Plan:
    """What is to be done with the tensors of a model whose config.json names a supported method.

    The plan has no weights if the files are not quantized, whatever the config says.
    """
    tensors = {name: info for file in headers.values() for name, info in file.items()}
    find = {"fp8": _find_fp8, "mxfp4": _find_mxfp4, "bitsandbytes": _find_bitsandbytes}[quantization.method]
    weights, dropped, problems = find(tensors, quantization)
    parts = {part for weight in weights.values() for part in weight.parts.values()}
    left = {
        name: info.dtype
        for name, info in tensors.items()
        if name not in weights and name not in parts | dropped and info.dtype not in PLAIN_DTYPES
    }
    if left and not problems:
        name = next(iter(left))
        problems.append(
            f"{name} is stored as {left[name]} in a way that fetch does not know ({len(left)} such tensors); fetch the "
            "unquantized model and set train.quantization instead"
        )
    if len(problems) > SHOWN_PROBLEMS:
        problems[SHOWN_PROBLEMS:] = [f"and {len(problems) - SHOWN_PROBLEMS} more tensors like these"]
    transposed = quantization.method == "bitsandbytes" and model_type in CONV1D_TYPES
    return Plan(quantization, headers, weights, frozenset(parts | dropped), problems, transposed)


Found = tuple[dict[str, Weight], set[str], list[str]]
"""The weights by the name of what is stored, further tensors to drop, problems."""


def _find_fp8(tensors: Mapping[str, TensorInfo], quantization: Quantization) -> Found:
    weights: dict[str, Weight] = {}
    dropped: set[str] = set()
    problems = []
    for name, info in tensors.items():
        if info.dtype != "F8_E4M3":
            continue
        scale = next((each for each in _beside(name, FP8_SCALES) if each in tensors), None)
        if scale is None:
            problems.append(f"{name} is stored in 8 bits without a scale; get the model again from an undamaged copy")
            continue
        block = _block(info.shape, tensors[scale], quantization.block)
        if block is None:
            problems.append(
                f"{name} has the shape {list(info.shape)} and its scales have {list(tensors[scale].shape)}, which does not "
                f"fit weight_block_size {list(quantization.block or ()) or None} of config.json; fetch the unquantized "
                "model and set train.quantization instead"
            )
            continue
        weights[name] = Weight(name, name, {"scale": scale}, info.shape, info.elements, block)
        dropped.update(each for each in _beside(name, FP8_UNUSED) if each in tensors)
        attention = name.rpartition(".")[0].rpartition(".")[0]
        caches = (f"{attention}.{suffix}" for suffix in FP8_CACHE_SCALES)
        dropped.update(each for each in caches if each in tensors and tensors[each].elements == 1)
    return weights, dropped, problems


def _beside(name: str, suffixes: tuple[str, ...]) -> Iterator[str]:
    """The names that a tensor's scale may have: of layer.weight, and of experts.gate_up_proj, which is no module."""
    for suffix in suffixes:
        yield (
            f"{name.removesuffix('.weight')}.{suffix}"
            if name.endswith(".weight")
            else (f"{name}_{suffix.removeprefix('weight_')}")
        )


def _block(shape: tuple[int, ...], scale: TensorInfo, block: tuple[int, int] | None) -> tuple[int, int] | None:
    """Rows and columns that share a scale, (0, 0) if all do, None if weight and scales do not fit together.

    The shape of the weight is (out, in) or (experts, out, in). The last block of a row or column may be smaller.
    """
    if scale.elements == 1 and len(shape) >= 2:
        return (0, 0)
    if len(shape) not in (2, 3) or (len(shape) == 3 and scale.shape[:1] != shape[:1]):
        return None
    grid = scale.shape[len(shape) - 2 :]
    rows, columns = shape[-2:]
    if math.prod(grid) == 1:  # one for each expert
        return (0, 0)
    if block and grid == (math.ceil(rows / block[0]), math.ceil(columns / block[1])):
        return block
    return (1, columns) if grid == (rows, 1) else None


def _find_mxfp4(tensors: Mapping[str, TensorInfo], _: Quantization) -> Found:
    weights: dict[str, Weight] = {}
    problems = []
    for name, info in tensors.items():
        if not name.endswith(("gate_up_proj_blocks", "down_proj_blocks")):
            continue
        target = name.removesuffix("_blocks")
        scales = f"{target}_scales"
        if scales not in tensors or len(info.shape) != 4 or tensors[scales].shape != info.shape[:3] or info.shape[3] != 16:
            problems.append(f"{name} has no {scales} that fit it; get the model again from an undamaged copy")
            continue
        experts, out, groups, size = info.shape
        shape = (experts, groups * size * 2, out)
        weights[name] = Weight(target, name, {"scales": scales}, shape, math.prod(shape))
    return weights, set(), problems


def _find_bitsandbytes(tensors: Mapping[str, TensorInfo], _: Quantization) -> Found:
    weights: dict[str, Weight] = {}
    dropped: set[str] = set()
    problems = []
    for name, info in tensors.items():
        state = STATE_4BIT.fullmatch(name)
        if state:
            stored = state[1]
            parts = {part: f"{stored}.{part}" for part in PARTS_4BIT if f"{stored}.{part}" in tensors}
            nested = [part in parts for part in PARTS_4BIT[2:]]
            if stored not in tensors or not {"absmax", "quant_map"} <= parts.keys() or any(nested) != all(nested):
                problems.append(f"{name} belongs to tensors that are missing; get the model again from an undamaged copy")
                continue
            packed = tensors[stored]
            elements = 2 * packed.elements * item_size(packed.dtype)  # the bytes may be stored as another dtype
            parts[f"quant_state.bitsandbytes__{state[2]}"] = name
            weights[stored] = Weight(stored, stored, parts, None, elements)
        elif info.dtype == "I8" and name.endswith(".weight"):
            layer = name.removesuffix(".weight")
            if f"{layer}.SCB" not in tensors or tensors[f"{layer}.SCB"].shape != info.shape[:1] or len(info.shape) != 2:
                problems.append(f"{name} is stored in 8 bits without SCB; get the model again from an undamaged copy")
                continue
            weights[name] = Weight(name, name, {"SCB": f"{layer}.SCB"}, info.shape, info.elements)
            dropped.update({f"{layer}.weight_format"} & tensors.keys())
    return weights, dropped, problems
