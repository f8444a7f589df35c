"""Streams the adapter into the base's weights, and proves that the merged model is the model that was trained."""

import json
import os
import shutil
import struct
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from safetensors.torch import load_file
from transformers.utils import logging

from stages.lib.adapter import INITIAL, BaseWeights, load_adapter, lora_scale, without
from stages.lib.device import pick_device
from stages.lib.jsonl import read_json, write_json
from stages.lib.model import ADAPTER, load_model
from stages.lib.output import fresh_file, fresh_folder
from stages.lib.params import Section
from stages.lib.parity import Additions, Said, compare, greedy_agreement
from stages.lib.problem import Problem
from stages.lib.provenance import inputs_of, write_provenance
from stages.lib.quantized import Quantization, load_quantized, round_trip
from stages.lib.tokens import read_tokens, stop_token_ids

WORKERS = 6
"""Threads that write a model; each holds one tensor on the device."""
BUFFER_BYTES = 1 << 26
MAX_SHARE_ERROR = 0.1
"""A layer that has a tenth less or more of what training added to it is not the trained one."""
NAMED = 3
"""Layers that a message names."""
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


class Params(Section):
    """What the adapter is added to, and how close the result must be."""

    base: Literal["dequantized", "full"]
    """dequantized: the rounded weights that training saw; full: the original ones, which the adapter never met."""
    parity_rows: int = Field(gt=0)
    """Validation rows on which the two models are compared."""
    max_mean_kl: float = Field(gt=0)
    """The stage fails above this mean Kullback-Leibler divergence, in nats a token, from the trained model."""
    min_top1_agreement: float = Field(ge=0, le=1)
    """The stage fails if the likeliest token agrees at a smaller share of the positions."""
    min_greedy_agreement: float = Field(ge=0, le=1)
    """The stage fails if a smaller share of greedy answers is the same, token for token."""


def merge(params: Params, base: Path, adapter: Path, validation: Path, template: Path, merged: Path, report: Path) -> None:
    """Writes `base` + `adapter` as an ordinary Hugging Face folder, loads it again and measures it.

    Tensor by tensor, in float32, written in the base's types and sharding; no model is built for it. The folder gets the
    tokenizer, the chat `template` it was trained with, a generation config with the right stop tokens, and a README.
    `report` gets the comparison with the adapter on the quantized base, over the labelled tokens of `validation`.

    Raises Problem if a tensor of the adapter has no place in the base, or if the merged model is not the trained one: by
    what it says, or by what any layer has of its training.
    """
    logging.disable_progress_bar()
    read = inputs_of(
        "merge",
        params.model_dump(),
        {str(path): path for path in (base, adapter, validation, template)},
        Path(),
    )
    settings = Quantization.model_validate(read_json(adapter / "training.json")["quantization"])
    table = read_tokens(validation)
    rows = table.slice(0, params.parity_rows).to_pylist()
    stops = stop_token_ids(table)
    lora = _Lora(adapter)
    weights = _Weights(base, adapter, lora, settings, params.base)
    adapted = load_adapter(load_quantized(base, settings).model, base, settings, adapter)
    trained, additions = Said(adapted, rows, stops), Additions(adapted, lora.first_products())
    del adapted  # its memory is for the merged model
    with fresh_folder(merged) as folder:
        weights.write(folder)
        if not lora.layers:
            _keep_beside(adapter, folder)
        _copy_the_rest(base, template, stops, folder)
        model = load_model(folder, settings.dtype)
        figures = {
            "model": read_json(base / "manifest.json")["model"],
            "base": params.base,
            "method": lora.kind.lower(),
            "merged_layers": len(lora.layers),
            "rows": len(rows),
            "tokens": len(trained.labels),
            **compare(trained, Said(model, rows)),
            "greedy_rows": len(trained.answers),
            "greedy_agreement": greedy_agreement(trained, model),
        }
        _check_parity(params, figures, additions.shares_in(model))
        if weights.rounded_layers:
            # What the other choice of merge.base would have given.
            other = _Weights(base, adapter, lora, settings, _other_base(params))
            _put_weights(
                model.get_base_model() if hasattr(model, "get_base_model") else model, other, weights.rounded_layers
            )
            figures["other_base"] = {"base": _other_base(params), **compare(trained, Said(model, rows))}
        _write_card(folder, base, adapter, table.num_rows, figures)
        write_provenance(folder, {**read, "adapter": read_json(adapter / "provenance.json"), "parity": figures})
    with fresh_file(report) as file:
        write_json(file, figures)
    kept = f"{len(lora.layers)} layers" if lora.layers else f"{lora.kind.lower()}, kept beside the weights,"
    print(
        f"merge: {kept} into {merged}; mean KL {figures['mean_kl']:.2e}, the likeliest token agrees at "
        f"{100 * figures['top1_agreement']:.2f} % of {figures['tokens']:,} positions"
    )


# Weights


class _Weights:
    """The merged weights by name, made one at a time from the base's."""

    def __init__(self, base: Path, adapter: Path, lora: "_Lora", settings: Quantization, kind: str) -> None:
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


class _Lora:
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
        self.scales = {name: lora_scale(config, name.removesuffix(".weight")) for name in self.layers}

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
        return without(weight, a, b, self.scales[name])

    def first_products(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """A and scale · B at the beginning, by the names of the layers."""
        return {name.removesuffix(".weight"): (ab["A"], self.scales[name] * ab["B"]) for name, ab in self.first.items()}

    def add_to(self, weight: torch.Tensor, name: str) -> torch.Tensor:
        """The weight (out, in) with the layer's product, and with DoRA's length of each row."""
        layer = {part: tensor.to(weight) for part, tensor in self.layers[name].items()}
        weight = torch.addmm(weight, layer["B"], layer["A"], alpha=self.scales[name])
        if "length" in layer:
            weight = weight * (layer["length"] / torch.linalg.norm(weight, dim=1)).unsqueeze(1)
        return weight


def _header(shard: Path) -> tuple[dict[str, Any], bytes]:
    """A safetensors file's table of tensors, and the bytes that hold it (8 bytes of length, then JSON)."""
    with shard.open("rb") as file:
        raw = file.read(8)
        raw += file.read(struct.unpack("<Q", raw)[0])
    return json.loads(raw[8:]), raw


def _keep_beside(adapter: Path, folder: Path) -> None:
    """Virtual tokens and prefixes are no part of any weight: the adapter goes along, and `generate` loads it."""
    (folder / ADAPTER).mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copyfile(adapter / name, folder / ADAPTER / name)


def _copy_the_rest(base: Path, template: Path, stops: list[int], folder: Path) -> None:
    """Config and tokenizer as they are; the chat template and the stop tokens as they were trained."""
    for file in base.iterdir():
        if file.suffix != ".safetensors" and file.name != "manifest.json":
            shutil.copyfile(file, folder / file.name)
    shutil.copyfile(template, folder / "chat_template.jinja")
    settings = folder / "tokenizer_config.json"
    if settings.exists():
        config = read_json(settings)
        if config.pop("chat_template", None) is not None:
            write_json(settings, config)
    path = folder / "generation_config.json"
    generation = read_json(path) if path.exists() else {}
    if stops:
        generation["eos_token_id"] = stops[0] if len(stops) == 1 else stops
    write_json(path, generation)
    manifest = read_json(base / "manifest.json")
    write_json(folder / "manifest.json", {key: manifest[key] for key in ("model", "revision", "trust_remote_code")})


# Proof


def _other_base(params: Params) -> str:
    return "full" if params.base == "dequantized" else "dequantized"


def _put_weights(model: Any, weights: "_Weights", names: Iterable[str]) -> None:
    """Gives a loaded model the merged weights of these names, one at a time, in the type that a folder would hold."""
    for name in sorted(names):
        original = weights.base[name]
        model.get_parameter(name).data.copy_(weights.merged(name, original).to(original.dtype))


def _check_parity(params: Params, figures: dict[str, Any], shares: dict[str, float]) -> None:
    wrong = [name for name, share in shares.items() if abs(share - 1) > MAX_SHARE_ERROR]
    problems = [f"{name} has {shares[name]:.2f} times what training added to it" for name in wrong[:NAMED]]
    if len(wrong) > NAMED:
        problems.append(f"and so have {len(wrong) - NAMED} more of {len(shares)} layers another share than 1")
    if not figures["mean_kl"] <= params.max_mean_kl:
        problems.append(f"mean KL {figures['mean_kl']:.3e} is above merge.max_mean_kl {params.max_mean_kl:.3e}")
    if not figures["top1_agreement"] >= params.min_top1_agreement:
        problems.append(
            f"the likeliest token agrees at {figures['top1_agreement']:.4f} of the positions, merge.min_top1_agreement is "
            f"{params.min_top1_agreement}"
        )
    if not figures["greedy_agreement"] >= params.min_greedy_agreement:
        problems.append(
            f"{figures['greedy_agreement']:.4f} of the greedy answers are the same, merge.min_greedy_agreement is "
            f"{params.min_greedy_agreement}"
        )
    if problems:
        problems.append(
            f"the merged model is not the trained one (loss {figures['merged_loss']:.4f} against "
            f"{figures['trained_loss']:.4f}, largest logit difference {figures['max_abs_logit_difference']:.3f}), "
            "and was not kept. "
            + ("merge.base: dequantized is closer" if params.base == "full" else "Train again, and compare the weights")
        )
        raise Problem(*problems)


def _write_card(folder: Path, base: Path, adapter: Path, validation_rows: int, figures: dict[str, Any]) -> None:
    manifest = read_json(base / "manifest.json")
    training = read_json(adapter / "training.json")
    config = read_json(adapter / "adapter_config.json")
    quantization, data = training["quantization"]["quantization"], training["data"]
    if figures["method"] == "lora":
        how = (
            f"LoRA with r={config['r']} and lora_alpha={config['lora_alpha']}"
            + " (some layers have others)" * bool(config["rank_pattern"] or config["alpha_pattern"])
            + f", trained on the base in {quantization} and merged into its {figures['base']} weights."
        )
    else:
        how = (
            f"{figures['method']} with {config['num_virtual_tokens']} virtual tokens, trained on {quantization} weights. "
            f"It cannot be merged into weights: load this folder's {figures['base']} weights with Transformers, then "
            f'PeftModel.from_pretrained(model, "{ADAPTER}") from the folder inside it.'
        )
    scores = f"greedy answers that are the same: {100 * figures['greedy_agreement']:.0f} % of {figures['greedy_rows']}"
    (folder / "README.md").write_text(
        f"# {manifest['model']}, fine-tuned\n\n"
        f"Base: {manifest['model']} at {manifest['revision']}. {how}\n\n"
        f"Trained on {data['rows']:,} rows of {data['tokens']:,} tokens, of which {data['label_tokens']:,} were learned; "
        f"{validation_rows:,} further rows for validation.\n\n"
        f"Measured against the trained model on {figures['tokens']} tokens: mean KL {figures['mean_kl']:.2e} nats, the "
        f"likeliest token agrees at {100 * figures['top1_agreement']:.2f} %, {scores}. `provenance.json` has the rest.\n",
        encoding="utf-8",
        newline="\n",
    )
