"""The merged weights, streamed tensor by tensor."""

import json
import os
import struct
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from stages.core.jsonl import read_json
from stages.core.problem import Problem
from stages.model.adapter import INITIAL, BaseWeights
from stages.model.device import pick_device
from stages.model.lora import add_lora, lora_scaling, subtract_lora
from stages.model.quantize import Quantization, round_trip

WORKERS = 6
"""Threads that write a model; each holds one tensor on the device."""


BUFFER_BYTES = 1 << 26


DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


class MergedWeights:
    """The merged weights by name, made one at a time from the base's."""

    def __init__(self, base: Path, adapter: Path, lora: "LoraWeights", settings: Quantization, kind: str) -> None:
        """`kind` is merge.base. Raises Problem if the adapter belongs to another base."""
        self.base, self.lora, self.settings = BaseWeights(base), lora, settings
        self.shards = sorted(base.glob("*.safetensors"))
        training = read_json(adapter / "training.json")
        self.rounded_layers, self.transposed = (
            {f"{name}.weight" for name in training[key]} for key in ("quantized_layers", "transposed_layers")
        )
        self.rounds = kind == "dequantized"
        names = {name for shard in self.shards for name in _header(shard)[0]}
        absent = sorted(set(lora.layers) - names)
        problems = [f"{adapter}: trained {name}, which {base} does not have" for name in absent]
        problems += [
            f"{adapter}: quantized {name}, which {base} does not have" for name in sorted(self.rounded_layers - names)
        ]
        if problems:
            raise Problem(*problems)

    def changes(self, name: str) -> bool:
        """Whether the merged weight is another than the base's."""
        return name in self.lora.layers or (self.rounds and name in self.rounded_layers)

    def merged(self, name: str, original: torch.Tensor) -> torch.Tensor:
        """The merged weight in float32, on this machine's device."""
        weight = original.to(pick_device()).float()
        weight = self.lora.base_of(weight.T if name in self.transposed else weight, name)
        if self.rounds and name in self.rounded_layers:
            weight = round_trip(weight, self.settings)
        if name in self.lora.layers:
            weight = self.lora.add_to(weight, name)
        return weight.T if name in self.transposed else weight

    def write(self, folder: Path) -> None:
        """Writes the shards, with the same headers and so the same places.

        A few threads each hold one tensor: while one computes, others read and write.
        """
        with ExitStack() as stack, ThreadPoolExecutor(WORKERS) as pool:
            jobs = []
            for shard in self.shards:
                header, raw = _header(shard)
                reader = stack.enter_context(shard.open("rb")).fileno()
                writer = stack.enter_context((folder / shard.name).open("wb")).fileno()
                os.ftruncate(writer, shard.stat().st_size)
                os.pwrite(writer, raw, 0)
                files = _Files(reader, writer)
                for name, entry in header.items():
                    if name == "__metadata__":
                        continue
                    start, end = (len(raw) + offset for offset in entry["data_offsets"])
                    if self.changes(name):
                        jobs.append(pool.submit(self._write_merged, files, start, end, name, entry))
                    else:
                        jobs.append(pool.submit(files.copy, start, end))
            for job in jobs:
                job.result()

    def _write_merged(self, files: "_Files", start: int, end: int, name: str, entry: dict[str, Any]) -> None:
        data = torch.empty(end - start, dtype=torch.uint8, device=pick_device())
        files.read_into(data, start)
        original = data.view(DTYPES[entry["dtype"]]).view(entry["shape"])
        files.write_from(self.merged(name, original).to(original.dtype).contiguous().view(-1).view(torch.uint8), start)


class _Files:
    """A shard of the base and the one that is written, and a small buffer a thread between them and the device."""

    buffers = threading.local()

    def __init__(self, reader: int, writer: int) -> None:
        self.reader, self.writer = reader, writer

    def copy(self, start: int, end: int) -> None:
        """Hands bytes on as they are."""
        for at in range(start, end, BUFFER_BYTES):
            data = self._buffer()[: min(BUFFER_BYTES, end - at)]
            self._read(data, at)
            self._write(data, at)

    def read_into(self, data: torch.Tensor, at: int) -> None:
        """Fills bytes (n,) on any device from a place in the base."""
        for part in torch.split(data, BUFFER_BYTES):
            buffer = self._buffer()[: len(part)]
            self._read(buffer, at)
            part.copy_(buffer)
            at += len(part)

    def write_from(self, data: torch.Tensor, at: int) -> None:
        """Writes bytes (n,) from any device to the same place in the other file."""
        for part in torch.split(data, BUFFER_BYTES):
            buffer = self._buffer()[: len(part)]
            buffer.copy_(part)
            self._write(buffer, at)
            at += len(part)

    def _buffer(self) -> torch.Tensor:
        if not hasattr(self.buffers, "bytes"):
            pinned = pick_device().type == "cuda"  # what a GPU reads and writes without a copy in between
            self.buffers.bytes = torch.empty(BUFFER_BYTES, dtype=torch.uint8, pin_memory=pinned)
        found: torch.Tensor = self.buffers.bytes
        return found

    def _read(self, into: torch.Tensor, at: int) -> None:
        view = into.numpy().data
        while view:  # one call may bring less than was asked for
            count = os.preadv(self.reader, [view], at)
            if not count:
                raise Problem("a shard of the base ends too soon; run fetch again")
            view, at = view[count:], at + count

    def _write(self, data: torch.Tensor, at: int) -> None:
        view = data.numpy().data
        while view:
            count = os.pwrite(self.writer, view, at)
            view, at = view[count:], at + count


class LoraWeights:
    """What an adapter does to the weights, by their names; nothing at all if it is no LoRA."""

    def __init__(self, adapter: Path) -> None:
        config = read_json(adapter / "adapter_config.json")
        self.kind = config["peft_type"]
        self.layers: dict[str, dict[str, torch.Tensor]] = {}
        self.first: dict[str, dict[str, torch.Tensor]] = {}
        """PiSSA's and OLoRA's factors at the beginning, which were taken out of the base."""
        if self.kind in ("P_TUNING", "PREFIX_TUNING"):
            return
        unknown = [key for key in ("modules_to_save", "lora_bias") if config.get(key)]
        if self.kind != "LORA" or config["bias"] != "none" or unknown:
            raise Problem(f"{adapter}: cannot merge {self.kind} with {', '.join(unknown) or 'bias'}")
        self.layers = self._read(adapter / "adapter_model.safetensors", dora=config["use_dora"])
        if (adapter / INITIAL).exists():
            self.first = self._read(adapter / INITIAL, dora=False)
        self.scales = {name: lora_scaling(config, name.removesuffix(".weight")) for name in self.layers}

    def _read(self, path: Path, *, dora: bool) -> dict[str, dict[str, torch.Tensor]]:
        parts = {".lora_A.weight": "A", ".lora_B.weight": "B"} | ({".lora_magnitude_vector": "length"} if dora else {})
        layers: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in load_file(path).items():
            ending = next((ending for ending in parts if name.endswith(ending)), None)
            if ending is None:
                raise Problem(f"{path}: holds {name}, which is no part of a LoRA; train it again")
            weight = name.removesuffix(ending).removeprefix("base_model.model.") + ".weight"
            layers.setdefault(weight, {})[parts[ending]] = tensor
        short = sorted(weight for weight, found in layers.items() if len(found) != len(parts))
        if short:
            raise Problem(f"{path}: holds tensors for {short[0]} that are no LoRA pair; train it again")
        return layers

    def base_of(self, weight: torch.Tensor, name: str) -> torch.Tensor:
        """A base's weight (out, in) as training began with it, before it was rounded."""
        if name not in self.first:
            return weight
        a, b = (self.first[name][part].to(weight) for part in "AB")
        return subtract_lora(weight, a, b, self.scales[name])

    def first_products(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """A and scale · B at the beginning, by the names of the layers."""
        return {name.removesuffix(".weight"): (ab["A"], self.scales[name] * ab["B"]) for name, ab in self.first.items()}

    def add_to(self, weight: torch.Tensor, name: str) -> torch.Tensor:
        """The weight (out, in) with the layer's product, and with DoRA's length of each row."""
        layer = {part: tensor.to(weight) for part, tensor in self.layers[name].items()}
        weight = add_lora(weight, layer["A"], layer["B"], scaling=self.scales[name])
        if "length" in layer:
            weight = weight * (layer["length"] / torch.linalg.norm(weight, dim=1)).unsqueeze(1)
        return weight


def _header(shard: Path) -> tuple[dict[str, Any], bytes]:
    """A safetensors file's table of tensors, and the bytes that hold it (8 bytes of length, then JSON)."""
    with shard.open("rb") as file:
        raw = file.read(8)
        raw += file.read(struct.unpack("<Q", raw)[0])
    return json.loads(raw[8:]), raw
