"""Quantizes experts while Transformers loads a model, one parameter at a time, as it does for linear layers."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.functional import pad
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.quantizers_utils import get_module_from_name, should_convert_module

from stages.model.experts import PACKED, expert_shapes, pack

QUANTIZERS = ("bitsandbytes_4bit", "bitsandbytes_8bit")
"""Transformers' names of the quantizers that quantize experts too within `quantized_experts`."""


@contextmanager
def quantized_experts(
    quantization: str, *, double_quant: bool, device: torch.device, storage: torch.dtype
) -> Iterator[None]:
    """Within the block, a model that is loaded with 4 or 8 bits has its experts quantized as well.

    Transformers reads the files of one parameter, stacks the experts on the parameter's device, and then has it quantized
    before it reads the next: no more than one layer is in 16 bits. Modules that its quantizer skips are not quantized.

    Args:
        quantization: nf4, fp4, int8; or none, which changes nothing.
        double_quant: 4 bits: whether the scales are quantized too.
        device: Where to quantize.
        storage: The dtype of the parameters that hold the bytes.
    """

    class Quantize(ConversionOps):  # type: ignore[misc]
        """Quantizes what it is given: experts here, anything else by the operation of Transformers."""

        def __init__(self, other: ConversionOps) -> None:
            self.other = other

        def convert(self, input_dict: dict[str, Any], model: Any = None, **named: Any) -> dict[str, Any]:
            done, others = {}, {}
            for name, value in input_dict.items():
                if not _is_experts(model, name):
                    others[name] = value
                    continue
                weight = value[0] if isinstance(value, list) else value
                module, own = get_module_from_name(model, name)
                data, packed = pack(weight, quantization, double_quant=double_quant, device=device)
                vars(module).setdefault(PACKED, {})[own] = packed
                data = pad(data.view(-1), (0, -len(data) % storage.itemsize))
                done[name] = torch.nn.Parameter(data.view(storage).view(-1, 1), requires_grad=False)
            return done | (self.other.convert(others, model=model, **named) if others else {})

    def with_experts(kind: Any) -> Any:
        class WithExperts(kind):  # type: ignore[misc]
            def param_needs_quantization(self, model: Any, param_name: str, **named: Any) -> bool:
                if _is_experts(model, param_name):
                    return bool(should_convert_module(param_name.rpartition(".")[0], self.modules_to_not_convert))
                return bool(super().param_needs_quantization(model, param_name, **named))

            def get_quantize_ops(self) -> ConversionOps:
                return Quantize(super().get_quantize_ops())

        return WithExperts

    before = {name: AUTO_QUANTIZER_MAPPING[name] for name in QUANTIZERS}
    AUTO_QUANTIZER_MAPPING.update({name: with_experts(kind) for name, kind in before.items()})
    try:
        yield
    finally:
        AUTO_QUANTIZER_MAPPING.update(before)


def _is_experts(model: Any, parameter: str) -> bool:
    module, name = get_module_from_name(model, parameter)
    return name in expert_shapes(module)
