"""Whether a model's files hold quantized weights, by its config.json, and whether fetch can dequantize them."""

import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple, get_args

Method = Literal["fp8", "mxfp4", "bitsandbytes"]
"""What fetch dequantizes, by the names in quantization_config.quant_method."""
# compressed-tensors wrote compression_config once; Transformers writes _pre_quantization_dtype beside the first one.
KEYS = ("quantization_config", "compression_config")
REMOVED_KEYS = (*KEYS, "_pre_quantization_dtype")
DTYPE_KEYS = ("dtype", "torch_dtype")


class Quantization(NamedTuple):
    """How the weights of a model are stored."""

    method: str
    """quant_method, or a description of what was found instead of one."""
    block: tuple[int, int] | None = None
    """fp8: rows and columns that share a scale, if the config says so."""

    @property
    def supported(self) -> Method | None:
        """The method if fetch can dequantize it."""
        return next((each for each in get_args(Method) if each == self.method), None)


def find_quantization(config: Mapping[str, Any]) -> Quantization | None:
    """What config.json says about quantized weights, also in the config of a multimodal model's language part."""
    settings = next(_settings_in(config), None)
    if settings is None:
        return None
    # Early bitsandbytes configs name no method.
    in_bits = "bitsandbytes" if settings.get("load_in_4bit") or settings.get("load_in_8bit") else "an unnamed method"
    method = str(settings.get("quant_method") or in_bits)
    match settings.get("weight_block_size"):
        case [int(rows), int(columns)] if rows > 0 and columns > 0:
            return Quantization(method, (rows, columns))
    return Quantization(method)


def quantization_problems(config: Mapping[str, Any], *, model: str) -> list[str]:
    """One message if the weights are quantized in a way that fetch cannot dequantize. `model` is its name."""
    quantization = find_quantization(config)
    if quantization is None or quantization.supported:
        return []
    original = config.get("_name_or_path")
    named = isinstance(original, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", original) and original != model
    return [
        f"its weights are already quantized with {quantization.method} (quantization_config in config.json), which fetch "
        f"cannot dequantize; fetch the unquantized model{f' (config.json names {original})' if named else ''} and set "
        "train.quantization instead"
    ]


def without_quantization(config: Mapping[str, Any], *, dequantized: bool) -> dict[str, Any]:
    """A config.json without a word of the quantization, and with bfloat16 as the dtype if the weights were dequantized."""
    cleaned = _cleaned(config, dequantized)
    if dequantized and not any(key in config for key in DTYPE_KEYS):
        cleaned["dtype"] = "bfloat16"
    return cleaned


def _settings_in(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for key, value in config.items():
        if key in KEYS and value:
            yield value if isinstance(value, Mapping) else {}
    for value in config.values():
        if isinstance(value, Mapping):
            yield from _settings_in(value)


def _cleaned(config: Mapping[str, Any], dequantized: bool) -> dict[str, Any]:
    cleaned: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and key not in REMOVED_KEYS:
            cleaned[key] = _cleaned(value, dequantized)
        elif key not in REMOVED_KEYS:
            cleaned[key] = "bfloat16" if dequantized and key in DTYPE_KEYS and isinstance(value, str) else value
    return cleaned
