"""The merged weights, computed tensor by tensor; no model is loaded."""

import threading
from pathlib import Path

import torch

from stages.core.problem import Problem
from stages.merge.lora_weights import LoraWeights
from stages.merge.shards import DTYPES, copy_shards, read_header
from stages.merge.training import Training
from stages.model.base_weights import BaseWeights
from stages.model.device import pick_device
from stages.model.experts import weight_chunks, write_sum
from stages.model.quantize import pack_experts, quantize_4bit, round_trip


class MergedWeights:
    """The base's weights with an adapter merged into them."""

    def __init__(self, base: Path, lora: LoraWeights, *, training: Training, dequantized: bool) -> None:
        """Reads no tensor yet.

        Args:
            base: The base model's folder.
            lora: The adapter. Without LoRA matrices only the base's quantized weights change.
            training: How it was trained.
            dequantized: Whether to merge into the base's quantized and dequantized weights, which training used, or into
                the original ones.

        Raises Problem if the adapter was trained on another base, or if a weight has a dtype that cannot be written.
        """
        self.lora, self.training = lora, training
        self._dequantized = training.quantized if dequantized else frozenset()
        self._kernel_lock = threading.Lock()
        """Held while the GPU kernel is started: its first call compiles it, which several threads must not do at once."""
        self._base = BaseWeights(base)
        self._shards = sorted(base.glob("*.safetensors"))
        self._changed = lora.pairs.keys() | self._dequantized
        """The names of the weights that differ from the base's."""
        entries = {key: entry for shard in self._shards for key, entry in read_header(shard)[0].items()}
        verbs = [("trained", lora.pairs.keys()), ("quantized", training.quantized)]
        problems = [
            f"{lora.adapter}: {verb} {name}, which {base} does not have; train again, on this base"
            for verb, names in verbs
            for name in sorted(names)
            if name not in self._base
        ]
        if problems:
            raise Problem(*problems)
        self._conversions = {key: each for each in self._base.conversions(self._changed) for key in each.keys}
        """By the names of the tensors in the files that change."""
        problems = [
            f"{base}: {key} has the dtype {entries[key]['dtype']}; merge can only change {', '.join(DTYPES)}"
            for key in sorted(self._conversions)
            if entries[key]["dtype"] not in DTYPES
        ]
        if problems:
            raise Problem(*problems)

    def write(self, folder: Path) -> None:
        """Writes the safetensors files with the base's names, dtypes and sharding."""
        groups = {conversion.keys for conversion in self._conversions.values()}
        copy_shards(self._shards, folder, replaced=sorted(groups), compute=self._compute_files, device=pick_device())

    def read(self, name: str) -> torch.Tensor:
        """One weight, as `write` writes it."""
        original = self._base[name]
        return self._compute(name, original).to(original.dtype)

    def _compute_files(self, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The merged tensors of the files, from the base's, for one conversion. Both by their names in the files."""
        conversion = self._conversions[next(iter(tensors))]
        weights = self._base.to_model(conversion, tensors)
        merged = {
            name: self._compute(name, weight).to(weight.dtype) if name in self._changed else weight
            for name, weight in weights.items()
        }
        return self._base.to_files(conversion, merged)

    def _compute(self, name: str, original: torch.Tensor) -> torch.Tensor:
        """The merged weight in float32, on this process's device; the caller rounds it to the dtype of `original`.

        The sum is the one that training used, computed by the same functions. For the layers of
        training.summed_in_float32, most 4-bit layers on a GPU, training dequantized the weight to float32, added the delta
        weight and rounded the sum once. For all other quantized layers it multiplied with the dequantized weight in its own
        dtype, so the delta weight is added to that.
        """
        if name in self.training.experts:
            return self._compute_experts(name, original)
        weight = original.to(pick_device()).float()
        weight = weight.T if name in self.training.transposed else weight
        weight = self.lora.subtract_initial(weight, name)
        if name in self._dequantized and name in self.training.summed_in_float32 and name in self.lora.pairs:
            packed, state = quantize_4bit(weight, self.training.settings)
            out = torch.empty(weight.shape, device=weight.device)
            with self._kernel_lock:
                weight = self.lora.add_delta_to_4bit(packed, state, out, name=name)
        else:
            weight = round_trip(weight, self.training.settings) if name in self._dequantized else weight
            weight = self.lora.add_delta(weight, name) if name in self.lora.pairs else weight
        return weight.T if name in self.training.transposed else weight

    def _compute_experts(self, name: str, original: torch.Tensor) -> torch.Tensor:
        """As `_compute`, for the weights (experts, ...) of all experts: the function that training called."""
        device = pick_device()
        if name in self._dequantized:
            data, packed = pack_experts(original, self.training.settings)
            chunks = packed.chunks(data)
        else:
            chunks = weight_chunks(original.to(device))
        factors = self.lora.expert_factors(name, experts=len(original), device=device)
        return write_sum(chunks, factors, out=torch.empty(original.shape, device=device))
