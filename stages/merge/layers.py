"""Checks every weight that merging changes, one by one: it must be the trained weight, rounded as the files round it.

The logits do not show one layer whose delta weight is missing: of 14 layers of a test model, left out one at a time, 13
changed the logits by a mean KL divergence below 1e-3, the least by 5e-6. And after a short training the delta weight is
smaller than what rounding the weight to bfloat16 changes. So what is right is computed to the last bit: the weight that the
trained model's layer holds, or that of the files if it is not quantized, plus the delta weight, rounded to the dtype of the
files. The merged model must have that.
"""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import bitsandbytes as bnb
import torch
from accelerate.utils import align_module_device
from peft import PeftModel
from peft.tuners.lora.layer import ParamWrapper
from transformers.pytorch_utils import Conv1D

from stages.merge.right_weight import LayerCheck, RightWeight, blocks
from stages.merge.training import Training
from stages.model.base_weights import BaseWeights
from stages.model.collate import collate_padded
from stages.model.experts import Experts, find_experts, read_chunks, wrapper_factors
from stages.model.logits import label_hidden_states
from stages.model.quantize import DequantizedLinear, is_transposed, quantize_4bit

INPUTS = 16
"""The maximum number of inputs of a layer whose outputs are compared; also of inputs made for its delta weight."""
NOISE_SIGMAS = 6
"""An error of a layer's outputs counts only if it is larger than this many standard deviations of rounding noise."""

Layers = Sequence[tuple[str, Any]]


class DeltaKept(NamedTuple):
    """How much of what was trained is left when the sums of weights and delta weights are rounded to the files' dtype."""

    share: float
    """Of all layers together: the projection of the rounded change onto the delta weight; 1 if nothing is lost."""
    smallest: float
    """Of the layer that loses most."""
    dtype: str
    """The dtype of the files: "bfloat16"."""


class TrainedWeights:
    """What is left of a trained model's weights: enough to check the merged ones."""

    noise: dict[str, float]
    """By layer: how much its outputs differ from those of the right merged weight, in parts of their norm. It is what comes
    from rounding inputs, weights and outputs, and with merge.base full from the quantization of the base."""
    outputs: dict[str, float]
    """By layer with an adapter: how much of what the adapter should change in the rounded outputs it does change; 1 unless
    PEFT computes something else than what the adapter's tensors say."""
    kept: DeltaKept | None
    """None without LoRA matrices."""

    def __init__(
        self,
        adapted: Any,
        base: Path,
        *,
        training: Training,
        dequantized: bool,
        initial: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
        row: Mapping[str, Any],
    ) -> None:
        """Computes the right weight of each layer that has an adapter or is quantized.

        Args:
            adapted: The PEFT model.
            base: The base model's folder.
            training: How it was trained.
            dequantized: Whether the delta weight is added to the quantized and dequantized weight, or to the original one.
            initial: lora_A (r, in) and scaling · lora_B (out, r) at the start of training, by layer, if they were
                subtracted from the base (PiSSA, OLoRA); they do not count as changed by training.
            row: The row whose hidden states are the layers' inputs.
        """
        self._base, self._training, self._dequantized, self._initial = BaseWeights(base), training, dequantized, initial
        self._compute_dtype = adapted.dtype
        self._layers: dict[str, RightWeight] = {}
        self._experts: dict[str, list[RightWeight]] = {}
        """Of each parameter with the weights of experts, by its name: those of the single experts."""
        self.noise, self.outputs = {}, {}
        layers = _changed_layers(adapted.get_base_model(), training)
        seen = _run(adapted, layers, row)
        with torch.no_grad():
            for name, layer in layers:
                self._add(name, layer, seen.get(name))
            typical = sum(self.noise.values()) / max(1, len(self.noise))
            self.noise = {name: self.noise.get(name, typical) for name, _ in layers}  # a row does not reach all experts
            for experts in find_experts(adapted):
                for name in experts.shapes:
                    if name in experts.wrappers or f"{experts.name}.{name}" in training.experts & training.quantized:
                        self._add_experts(experts, name)
        self.kept = self._summarize_kept()

    def check(self, model: Any) -> dict[str, LayerCheck]:
        """The weights of a merged model, by layer. Weights that Accelerate keeps on the disk are read one at a time."""
        model = model.get_base_model() if isinstance(model, PeftModel) else model
        found = {}
        for name, right in self._layers.items():
            layer = model.get_submodule(name)
            with torch.no_grad(), align_module_device(layer):
                found[name] = right.check(_own_weight(layer))
        for name, rights in self._experts.items():
            module, _, parameter = name.rpartition(".")
            layer = model.get_submodule(module)
            with torch.no_grad(), align_module_device(layer):
                weights = getattr(layer, parameter).detach()
                found |= {f"{name}[{number}]": right.check(weights[number]) for number, right in enumerate(rights)}
        return found

    def _add(self, name: str, layer: Any, seen: tuple[torch.Tensor, torch.Tensor] | None) -> None:
        """Keeps what is needed of a layer; `seen` are inputs and outputs that it had, (tokens, in) and (tokens, out)."""
        plain = layer.get_base_layer() if hasattr(layer, "lora_A") else layer
        weight = self._weight(name, plain)
        delta = _Delta(layer, weight) if hasattr(layer, "lora_A") else None
        stored = self._base.dtype(f"{name}.weight")
        right = RightWeight(adapted=delta is not None, stored=stored, loaded=self._compute_dtype)
        tokens = seen[0] if seen else weight.new_empty(0, weight.shape[1])
        directions = (_directions(delta.lora_a) if delta else weight[:0]).to(self._compute_dtype)
        outputs, deltas = [], []
        for rows in blocks(weight):
            start = weight[rows]
            trained = delta.add(weight, rows) if delta else start
            deltas.append(directions.double() @ (trained.double() - start).T)
            if name in self._initial:
                initial_a, initial_b = (tensor.to(weight) for tensor in self._initial[name])
                start = start + initial_b[rows] @ initial_a
            outputs.append(tokens.double() @ right.add(start, trained).T)
        self._layers[name] = right
        if seen:
            bias = 0 if plain.bias is None else plain.bias.double()
            merged = (torch.cat(outputs, 1) + bias).to(self._compute_dtype).double()
            trained = seen[1].double()
            self.noise[name] = float((trained - merged).norm() / trained.norm()) if trained.any() else 0.0
        # DoRA's factors depend on the weight, which is another one in the trained layer if merge.base is full.
        if delta and (self._dequantized or not delta.is_dora):
            self.outputs[name] = _share(plain(directions), layer(directions), torch.cat(deltas, 1))

    def _add_experts(self, experts: Experts, name: str) -> None:
        """Keeps what is needed of the experts of a layer; their weights may be (in, out), which changes nothing here.

        The noise of their outputs is taken to be that of their weights: the functions that compute both models are the same.
        """
        full_name, factors = f"{experts.name}.{name}", wrapper_factors(experts, name)
        stored = self._base.dtype(full_name)
        original = None if self._is_dequantized(full_name) else self._base[full_name]
        rights = self._experts[full_name] = []
        error = size = 0.0
        for part, chunk in read_chunks(experts.module, name):
            start = chunk if original is None else original[part].to(chunk)
            delta = torch.zeros((), device=chunk.device)
            if factors is not None:
                delta = factors.scaling * torch.bmm(factors.left[part].to(chunk), factors.right[part].to(chunk))
            computed = (chunk + delta).to(self._compute_dtype)  # what the trained model multiplies with
            for before, after, own in zip(start, start + delta, computed, strict=True):
                weight = RightWeight(adapted=factors is not None, stored=stored, loaded=self._compute_dtype)
                for rows in blocks(before):
                    right = weight.add(before[rows], after[rows])
                    error += float((right - own[rows].double()).square().sum())
                    size += float(right.square().sum())
                rights.append(weight)
        if error:
            self.noise[experts.name] = (self.noise.get(experts.name, 0.0) ** 2 + error / size) ** 0.5

    def _weight(self, name: str, layer: Any) -> torch.Tensor:
        """The weight (out, in) in float32 to which merging adds the delta weight: the trained layer's, or the files'."""
        dequantized = self._is_dequantized(f"{name}.weight")
        if dequantized and not (isinstance(layer, DequantizedLinear) and self._in_float32(name)):
            return _dequantize(layer, in_float32=self._in_float32(name))
        weight = self._base[f"{name}.weight"].to(layer.weight.device, torch.float32)
        weight = weight.T if is_transposed(layer) else weight
        if name in self._initial:
            initial_a, initial_b = (tensor.to(weight) for tensor in self._initial[name])
            weight = weight - initial_b @ initial_a
        if not dequantized:
            return weight
        packed, state = quantize_4bit(weight, self._training.settings)
        return _to_float32(packed, state)

    def _is_dequantized(self, name: str) -> bool:
        """Whether merging adds the delta weight to the quantized and dequantized weight.

        A layer that is not quantized was trained with its weight rounded to the dtype of matrix products, which the files
        need not have: merging adds the delta weight to that of the files.
        """
        return self._dequantized and name in self._training.quantized

    def _in_float32(self, name: str) -> bool:
        return f"{name}.weight" in self._training.summed_in_float32

    def _summarize_kept(self) -> DeltaKept | None:
        weights = dict(self._layers)
        for name, rights in self._experts.items():
            weights |= {f"{name}[{number}]": right for number, right in enumerate(rights)}
        adapted = {name: right for name, right in weights.items() if right.adapted and right.length}
        if not adapted:
            return None
        share = sum(right.along for right in adapted.values()) / sum(right.length for right in adapted.values())
        smallest = min(adapted, key=lambda name: adapted[name].along / adapted[name].length)
        least = adapted[smallest]
        return DeltaKept(share, least.along / least.length, str(least.stored).removeprefix("torch."))


class _Delta:
    """The delta weight of a PEFT layer, from its own tensors, and with DoRA its magnitudes."""

    def __init__(self, layer: Any, weight: torch.Tensor) -> None:
        self.lora_a = layer.lora_A["default"].weight.to(weight)
        self._lora_b = layer.scaling["default"] * layer.lora_B["default"].weight.to(weight)
        magnitudes = layer.lora_magnitude_vector
        self._magnitude = magnitudes["default"].weight.to(weight) if "default" in magnitudes else None
        self.is_dora = self._magnitude is not None

    def add(self, weight: torch.Tensor, rows: slice) -> torch.Tensor:
        """Some rows of the trained weight, in float32."""
        trained = torch.addmm(weight[rows], self._lora_b[rows], self.lora_a)
        if self._magnitude is None:
            return trained
        factors: torch.Tensor = self._magnitude[rows] / trained.norm(dim=1)
        return trained * factors[:, None]


def _changed_layers(model: Any, training: Training) -> Layers:
    """The linear layers of the trained model that have an adapter or are quantized, by their names without it."""
    found = {
        name: layer
        for name, layer in model.named_modules()
        if hasattr(layer, "lora_A") and not isinstance(layer, ParamWrapper)
    }
    for weight in sorted(training.quantized - training.experts):
        name = weight.removesuffix(".weight")
        if name not in found:
            found[name] = model.get_submodule(name)
    return list(found.items())


def _run(model: Any, layers: Layers, row: Mapping[str, Any]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """At most INPUTS inputs (tokens, in) and outputs (tokens, out) of each layer on a row; an expert may not be used."""
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def keep(name: str, inputs: torch.Tensor, outputs: torch.Tensor) -> None:
        inputs, outputs = inputs.flatten(0, -2), outputs.flatten(0, -2)
        step = -(-len(inputs) // INPUTS) or 1
        if len(inputs):
            seen.setdefault(name, (inputs[::step].detach().clone(), outputs[::step].detach().clone()))

    hooks = [
        layer.register_forward_hook(lambda _, inputs, outputs, name=name: keep(name, inputs[0], outputs))
        for name, layer in layers
    ]
    try:
        with torch.no_grad():
            label_hidden_states(model, {key: value.to(model.device) for key, value in collate_padded([dict(row)]).items()})
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _own_weight(layer: Any) -> torch.Tensor:
    """The weight (out, in) of a layer that is not quantized."""
    weight: torch.Tensor = layer.weight.detach()
    return weight.T if isinstance(layer, Conv1D) else weight


def _dequantize(layer: Any, *, in_float32: bool) -> torch.Tensor:
    """The weight (out, in) that a layer multiplies with, in float32.

    Args:
        layer: Quantized or not.
        in_float32: Do not round a 4-bit weight to the dtype of matrix products.
    """
    weight = layer.weight
    if isinstance(layer, bnb.nn.Linear4bit):
        if in_float32:
            return _to_float32(weight.data, weight.quant_state)
        values: torch.Tensor = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
        return values.to(layer.compute_dtype).float()
    if isinstance(layer, bnb.nn.Linear8bitLt):
        scales = weight.SCB if weight.SCB is not None else layer.state.SCB
        return torch.mul(weight.data.float(), scales.float().to(weight.device).view(-1, 1)) / 127
    return _own_weight(layer).float()


def _to_float32(packed: torch.Tensor, state: Any) -> torch.Tensor:
    state = copy.copy(state)
    state.dtype = torch.float32
    weight: torch.Tensor = bnb.functional.dequantize_4bit(packed, state)
    return weight


def _directions(lora_a: torch.Tensor) -> torch.Tensor:
    """(at most INPUTS, in): orthonormal vectors in the row space of lora_A. On others the delta weight is zero."""
    basis = torch.linalg.qr(lora_a.T)[0]
    if basis.shape[1] > INPUTS:  # a mixture of all of them, so that each counts
        mixture = torch.randn(basis.shape[1], INPUTS, generator=torch.Generator().manual_seed(0))
        basis = basis @ torch.linalg.qr(mixture.to(basis))[0]
    vectors: torch.Tensor = basis.T
    return vectors


def _share(before: torch.Tensor, after: torch.Tensor, delta: torch.Tensor) -> float:
    """How much of the change that an adapter should make in a layer's outputs it makes.

    An adapter that was hardly trained changes outputs in 16 bits by less than their rounding, which loses most of it.

    Args:
        before: (inputs, out) The outputs without the adapter.
        after: With it.
        delta: What it should add, in float64.

    Returns:
        1 + the projection of the error onto the change; 1 if rounding noise of the same size as the error could be as large.
    """
    base = before.double()
    wanted = (base + delta).to(after.dtype).double() - base
    error, size = after.double() - base - wanted, wanted.norm()
    if not size:
        return 1.0
    projection = (error * wanted).sum() / size
    noise = error.norm() / error.numel() ** 0.5
    return 1 + (projection / size).item() if projection.abs() > NOISE_SIGMAS * noise else 1.0
