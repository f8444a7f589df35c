"""Compares the outputs of every adapted layer before and after merging."""

from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper

from stages.merge.devices import move_to
from stages.merge.expert_deltas import ExpertDeltas

LAYER_INPUTS = 16
"""The number of input vectors on which each layer is compared."""
NOISE_SIGMAS = 6
"""A layer's error counts only if it is larger than this many standard deviations of rounding noise."""


class LayerDeltas:
    """What training changed in the outputs of every adapted layer.

    The logits do not show one layer whose delta weight is missing: of 14 layers of a test model, left out one at a time, 13
    changed the logits by a mean KL divergence below 1e-3, the least by 5e-6.
    """

    def __init__(self, adapted: Any, initial: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Runs each layer on a few inputs, with and without its adapter.

        Args:
            adapted: The PEFT model.
            initial: lora_A (r, in) and scaling · lora_B (out, r) at the start of training, by layer, if they were
                subtracted from the base (PiSSA, OLoRA); they do not count as changed by training.
        """
        self._layers: dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
        """By layer: inputs (inputs, in), outputs (inputs, out), both in the model's dtype, and the part of the outputs that
        training added, in float32."""
        self._experts = ExpertDeltas(adapted)
        for name, layer in adapted.get_base_model().named_modules():
            if not hasattr(layer, "lora_A") or isinstance(layer, ParamWrapper):
                continue
            matrix = layer.lora_A["default"].weight
            with torch.no_grad():
                # Orthonormal vectors in the row space of lora_A. On others the delta weight is zero, and rounding larger.
                inputs = torch.linalg.qr(matrix.float().T)[0].T[:LAYER_INPUTS].to(adapted.dtype)
                before, after = layer.base_layer(inputs).float(), layer(inputs)
                if name in initial:
                    initial_a, initial_b = (tensor.to(before) for tensor in initial[name])
                    before += inputs.float() @ initial_a.T @ initial_b.T
            self._layers[name] = inputs.cpu(), after.cpu(), (after.float() - before).cpu()

    def shares_in(self, model: Any) -> dict[str, float]:
        """How much of its delta each layer of `model` has: 1 for all of it, 0 for none.

        The error of a layer's outputs is projected onto the delta. If the projection is no larger than that of rounding
        noise of the same size could be, the share is 1.
        """
        shares = {}
        for name, (inputs, outputs, delta) in self._layers.items():
            with torch.no_grad():
                layer = model.get_submodule(name)
                error = layer(move_to(layer, inputs.to(model.dtype))).float().cpu() - outputs.float()
            projection = (error * delta).sum() / delta.norm()
            noise = error.norm() / error.numel() ** 0.5
            shares[name] = 1 + (projection / delta.norm()).item() if projection.abs() > NOISE_SIGMAS * noise else 1.0
        return shares | self._experts.shares_in(model)
