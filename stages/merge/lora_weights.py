"""The LoRA matrices in an adapter's folder, and what they do to the base's weights."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file

from stages.core.problem import Problem
from stages.model.adapter import INITIAL, PEFT_PREFIX
from stages.model.experts import Factors, factors_of
from stages.model.four_bit import add_lora_to_4bit
from stages.model.lora import add_lora, lora_scaling, subtract_lora
from stages.model.peft_targets import read_experts, read_lora_config


class LoraPair(NamedTuple):
    """The tensors of one layer, or of one parameter with the weights of experts; see `factors_of`."""

    lora_A: torch.Tensor  # noqa: N815
    """(r, in); (experts r, in)"""
    lora_B: torch.Tensor  # noqa: N815
    """(out, r); (out, r experts)"""
    magnitude: torch.Tensor | None = None
    """(out,) With DoRA: the norm of each row of the merged weight."""


ENDINGS = {"lora_A": ".lora_A.weight", "lora_B": ".lora_B.weight", "magnitude": ".lora_magnitude_vector"}
"""The end of a tensor's name in an adapter file, by the field of LoraPair."""


class LoraWeights:
    """An adapter's LoRA matrices by the names of the weights, "….q_proj.weight"; empty if the adapter is not a LoRA."""

    def __init__(self, adapter: Path) -> None:
        """Reads the adapter's folder.

        Raises Problem if the adapter is of a kind that cannot be merged, or if its files are incomplete.
        """
        config, experts = read_lora_config(adapter), read_experts(adapter)
        self.adapter = adapter
        self.method: str = config["peft_type"].lower()
        self.pairs: dict[str, LoraPair] = {}
        self._transposed = {each["name"]: each["transposed"] for each in experts}
        """Whether a parameter with the weights of experts is (experts, in, out), by its name."""
        self.initial: dict[str, LoraPair] = {}
        """With PiSSA and OLoRA: the matrices at the start of training, which were subtracted from the base."""
        if self.method in ("p_tuning", "prefix_tuning"):
            return
        unknown = [key for key in ("modules_to_save", "lora_bias") if config.get(key)]
        if self.method != "lora" or config["bias"] != "none" or unknown:
            raise Problem(f"{adapter}: cannot merge {config['peft_type']} with {', '.join(unknown) or 'bias'}")
        adapted = [each["name"] for each in experts if each["adapted"]]
        self.pairs = _read_pairs(adapter / "adapter_model.safetensors", dora=config["use_dora"], parameters=adapted)
        if (adapter / INITIAL).exists():
            self.initial = _read_pairs(adapter / INITIAL, dora=False, parameters=())
        self.scaling = {name: lora_scaling(config, self._own_name(name)) for name in self.pairs}

    def _own_name(self, name: str) -> str:
        """The name by which adapter_config.json knows a weight: that of its layer, or of its parameter."""
        return name if name in self._transposed else name.removesuffix(".weight")

    def subtract_initial(self, weight: torch.Tensor, name: str) -> torch.Tensor:
        """The weight (out, in) as it was in the base at the start of training, before it was quantized."""
        if name not in self.initial:
            return weight
        initial = self.initial[name]
        return subtract_lora(weight, initial.lora_A.to(weight), initial.lora_B.to(weight), self.scaling[name])

    def add_delta(self, weight: torch.Tensor, name: str) -> torch.Tensor:
        """The weight (out, in) with the delta weight of its layer added, and with DoRA rescaled row by row."""
        pair = self.pairs[name]
        weight = add_lora(weight, pair.lora_A.to(weight), pair.lora_B.to(weight), scaling=self.scaling[name])
        if pair.magnitude is None:
            return weight
        factors: torch.Tensor = pair.magnitude.to(weight) / torch.linalg.norm(weight, dim=1)
        return weight * factors.unsqueeze(1)

    def add_delta_to_4bit(self, packed: torch.Tensor, state: Any, out: torch.Tensor, *, name: str) -> torch.Tensor:
        """As `add_delta`, for a 4-bit weight and without DoRA; see `add_lora_to_4bit`."""
        lora_a, lora_b, _ = self.pairs[name]
        lora_a, lora_b = lora_a.to(out.device).float(), lora_b.to(out.device).float()
        return add_lora_to_4bit(packed, state, out, lora_A=lora_a, lora_B=lora_b, scaling=self.scaling[name])

    def expert_factors(self, name: str, *, experts: int, device: torch.device) -> Factors | None:
        """The delta weights of a parameter with the weights of that many experts; None if it has no adapter."""
        if name not in self.pairs:
            return None
        lora_a, lora_b, _ = self.pairs[name]
        return factors_of(
            lora_a.to(device).float(),
            lora_b.to(device).float(),
            experts=experts,
            transposed=self._transposed[name],
            scaling=self.scaling[name],
        )

    def initial_deltas(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """lora_A and scaling · lora_B at the start of training, by layer; empty unless PiSSA or OLoRA was used."""
        return {
            name.removesuffix(".weight"): (pair.lora_A, self.scaling[name] * pair.lora_B)
            for name, pair in self.initial.items()
        }


def _read_pairs(path: Path, *, dora: bool, parameters: Sequence[str]) -> dict[str, LoraPair]:
    """The matrices in a safetensors file. Raises Problem if a layer's are incomplete, or if there is anything else.

    Args:
        path: The file.
        dora: Whether it has magnitudes.
        parameters: The adapted parameters of experts, in the model's order.
    """
    own_names = _names_of_parameters(parameters)
    wanted = {field: ending for field, ending in ENDINGS.items() if dora or field != "magnitude"}
    found: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in load_file(path).items():
        field = next((field for field, ending in wanted.items() if key.endswith(ending)), None)
        if field is None:
            raise Problem(f"{path}: {key} is not a LoRA tensor; train again")
        layer = key.removesuffix(wanted[field]).removeprefix(PEFT_PREFIX)
        name = own_names.get(layer, f"{layer}.weight")
        found.setdefault(name, {})[field] = tensor
    for name in sorted(found):
        missing = [field for field in wanted if field not in found[name]]
        if missing:
            raise Problem(f"{path}: {name} has no {' and no '.join(missing)}; train again")
    return {name: LoraPair(**tensors) for name, tensors in found.items()}


def _names_of_parameters(parameters: Sequence[str]) -> dict[str, str]:
    """The names of parameters by those that PEFT gives their matrices in an adapter file.

    PEFT wraps the module once for each of its parameters, in the module's order: "experts.base_layer.lora_A" is that of
    the first of two, "experts.lora_A" that of the second.
    """
    modules: dict[str, list[str]] = {}
    for name in parameters:
        modules.setdefault(name.rpartition(".")[0], []).append(name)
    return {
        module + ".base_layer" * depth: name
        for module, names in modules.items()
        for depth, name in enumerate(reversed(names))
    }
