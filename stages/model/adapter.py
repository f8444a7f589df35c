"""The adapter: which layers it stands in, its first weights, and how it is put on the base and saved."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from peft import LoraConfig, PeftConfig, PeftModel, PrefixTuningConfig, PromptEncoderConfig, get_peft_model
from peft.utils.other import get_pattern_key
from pydantic import Field
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers.pytorch_utils import Conv1D

from stages.core.jsonl import read_json
from stages.core.params import Section
from stages.core.problem import Problem
from stages.model.lora import lora_scaling, subtract_lora
from stages.model.quantize import Quantization, ends_of, is_transposed, round_trip, set_weight

INITIAL = "initial.safetensors"
"""In an adapter's folder: the first factors, where they were taken out of the base's weights (PiSSA, OLoRA)."""


class Adapter(Section):
    """What is learned. PEFT's names."""

    method: Literal["lora", "p_tuning", "prefix_tuning"]
    """lora: low-rank products beside linear layers; p_tuning: virtual tokens before the prompt, made by a small network;
    prefix_tuning: learned keys and values before each layer's own."""
    r: int = Field(gt=0)
    """lora: rank of the products: their size, and how much they can learn."""
    lora_alpha: float = Field(gt=0)
    """lora: the product is scaled by lora_alpha / r; usually one or two times r."""
    rank_pattern: dict[str, Annotated[int, Field(gt=0)]]
    """lora: another r for layers whose name, or its end after a dot, a regular expression fits; the first fit counts."""
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]]
    """lora: another lora_alpha, likewise."""
    lora_dropout: float = Field(ge=0, lt=1)
    """lora: share of the inputs that are left out at random."""
    use_rslora: bool
    """lora: scale by lora_alpha / sqrt(r), which keeps large ranks learning (Kalajdzievski 2023)."""
    use_dora: bool
    """lora: learn the length of each row of a weight apart from its direction (Liu et al. 2024); slower."""
    init_lora_weights: bool | Annotated[str, Field(pattern=r"^(gaussian|olora|loftq|pissa(_niter_[0-9]+)?)$")]
    """lora: true: A at random, B zero; gaussian: A normal; pissa, olora: the largest part of the weights is taken out of
    the base and trained; loftq: the product begins as what rounding cost. pissa_niter_16: a quicker, nearly equal SVD."""
    target_modules: str | list[str]
    """lora: all-linear (all linear layers but the output head), a list of names, or a regular expression for whole names."""
    num_virtual_tokens: int = Field(gt=0)
    """p_tuning, prefix_tuning: how many; they count against the model's longest row."""
    encoder_hidden_size: int = Field(gt=0)
    """p_tuning, prefix_tuning with prefix_projection: width of the network that makes them."""
    prefix_projection: bool
    """prefix_tuning: whether a network makes the prefix, which trains steadier, or it is learned itself."""


def add_adapter(model: Any, base: Path, settings: Quantization, wanted: Adapter) -> Any:
    """The quantized `model` with a fresh adapter in float32 that alone can be trained; the seed is the caller's.

    Raises Problem if `wanted` does not fit the model, or could not be merged into it.
    """
    if wanted.method != "lora":
        return get_peft_model(model, _prompt_config(wanted))
    if wanted.use_dora and settings.quantization == "int8" and model.device.type == "cpu":
        raise Problem("params.yaml: train.use_dora: not with int8 on the CPU, where PEFT loses the scales; nf4 works")
    computed = isinstance(wanted.init_lora_weights, str) and wanted.init_lora_weights != "gaussian"
    targets = find_targets(model, wanted.target_modules)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=wanted.r,
        lora_alpha=wanted.lora_alpha,
        lora_dropout=wanted.lora_dropout,
        use_rslora=wanted.use_rslora,
        use_dora=wanted.use_dora,
        init_lora_weights=True if computed else wanted.init_lora_weights,
        target_modules=targets,
        **_patterns(wanted, targets),
    )
    adapted, weights = get_peft_model(model, config), BaseWeights(base)
    absent = [name for name in targets if f"{name}.weight" not in weights]
    if absent:
        raise Problem(
            f"{base}: has no tensor {absent[0]}.weight, to which merge would add what is learned; name other layers in "
            "train.target_modules"
        )
    if computed:
        _initialize(adapted, weights, settings, str(wanted.init_lora_weights))
    config.init_lora_weights = True  # PEFT would take the factors out of the base once more when it loads the adapter
    return adapted


def _prompt_config(wanted: Adapter) -> PeftConfig:
    if wanted.method == "p_tuning":
        return PromptEncoderConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=wanted.num_virtual_tokens,
            encoder_hidden_size=wanted.encoder_hidden_size,
        )
    return PrefixTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=wanted.num_virtual_tokens,
        encoder_hidden_size=wanted.encoder_hidden_size,
        prefix_projection=wanted.prefix_projection,
    )


def find_targets(model: Any, wanted: str | Sequence[str]) -> list[str]:
    """The full names of the layers that get an adapter.

    Args:
        wanted: As in `Adapter.target_modules`.

    Raises Problem with the names of the model's linear layers if a name, or the expression, fits none; and if a layer is a
    head that shares its weight with the input embeddings, which merging would change too.
    """
    found = _find(model, wanted)
    tied = model.get_input_embeddings().weight
    shared = [name for name in found if model.get_submodule(name).weight is tied]
    if shared:
        raise Problem(
            f"params.yaml: train.target_modules: {shared[0]} has its weight in common with the input embeddings "
            "(tie_word_embeddings), which merging would change too; leave it out, or fetch a copy of the base with "
            "tie_word_embeddings false and a weight for each"
        )
    return found


def _find(model: Any, wanted: str | Sequence[str]) -> list[str]:
    head = model.get_output_embeddings()
    linear = [name for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear | Conv1D)]
    if wanted == "all-linear":
        return [name for name in linear if model.get_submodule(name) is not head]
    there = f"linear layers here: {', '.join(ends_of(linear))}"
    if isinstance(wanted, str):
        try:
            found = [name for name in linear if re.fullmatch(wanted, name)]
        except re.error as error:
            raise Problem(f"params.yaml: train.target_modules: {wanted!r} is no regular expression: {error}") from None
        if not found:
            raise Problem(
                f"params.yaml: train.target_modules: the expression {wanted!r} fits no whole name, as "
                f"{linear[0]!r}; {there}. For names, write a list"
            )
        return found
    by_name = {name: [full for full in linear if full == name or full.endswith(f".{name}")] for name in wanted}
    missing = [name for name, found in by_name.items() if not found]
    if missing or not wanted:
        raise Problem(f"params.yaml: train.target_modules: {', '.join(missing) or 'nothing'} is not in the model; {there}")
    chosen = {full for found in by_name.values() for full in found}
    return [name for name in linear if name in chosen]


def _patterns(wanted: Adapter, targets: Sequence[str]) -> dict[str, dict[str, float]]:
    """rank_pattern and alpha_pattern by whole names: PEFT takes the first that fits, but saves them in another order.

    Raises Problem with the patterns that decide about no layer.
    """
    problems, found = [], {}
    for parameter, patterns in (("rank_pattern", wanted.rank_pattern), ("alpha_pattern", wanted.alpha_pattern)):
        try:
            chosen = {name: get_pattern_key(patterns, name) for name in targets}  # the name itself where none fits
        except re.error as error:
            problems.append(f"params.yaml: train.{parameter}: {error.pattern!r} is no regular expression: {error}")
            continue
        problems += [
            f"params.yaml: train.{parameter}: {pattern!r} fits none of the layers in train.target_modules, or none that an "
            f"earlier pattern leaves to it; their names end in {', '.join(ends_of(targets))}"
            for pattern in patterns
            if pattern not in chosen.values()
        ]
        found[parameter] = {f"^{name}": patterns[key] for name, key in chosen.items() if key in patterns}
    if problems:
        raise Problem(*problems)
    return found


class BaseWeights:
    """The base's tensors by name, read from its safetensors files one at a time."""

    def __init__(self, base: Path) -> None:
        self._shards: dict[str, Path] = {}
        for shard in sorted(base.glob("*.safetensors")):
            with safe_open(shard, framework="pt") as file:
                self._shards |= dict.fromkeys(file.keys(), shard)

    def __contains__(self, name: str) -> bool:
        return name in self._shards

    def __getitem__(self, name: str) -> torch.Tensor:
        with safe_open(self._shards[name], framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
            return tensor

    def of(self, name: str, layer: Any, device: torch.device) -> torch.Tensor:
        """The weight (out, in) in float32 of the layer `name`, which is `layer` where the base was loaded."""
        weight = self[f"{name}.weight"].to(device, torch.float32)
        return weight.T if is_transposed(layer) else weight


def _initialize(adapted: Any, weights: BaseWeights, settings: Quantization, how: str) -> None:
    """Sets the first factors of every layer from the base's own weights, and takes them out of it where that is meant."""
    model = adapted.get_base_model()
    for name, layer in _adapted_layers(model).items():
        down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        if len(down) > min(down.shape[1], len(up)):
            raise Problem(
                f"params.yaml: train.r: {len(down)} is more than {name}, {len(up)} by {down.shape[1]}, can be parted into; "
                f"lower it there by train.rank_pattern, or set train.init_lora_weights to true instead of {how}"
            )
        weight, scale = weights.of(name, layer.get_base_layer(), down.device), layer.scaling["default"]
        a, b = initial_lora_from(weight, len(down), scale, how, settings)
        down.data, up.data = a.contiguous(), b.contiguous()
        if how != "loftq":
            set_weight(model, f"{name}.base_layer", subtract_lora(weight, a, b, scale), settings)


def initial_lora_from(
    weight: torch.Tensor, r: int, scale: float, how: str, settings: Quantization
) -> tuple[torch.Tensor, torch.Tensor]:
    """The factors A (r, in) and B (out, r) with which a layer begins, so that scale · B A is a part of its weight.

    pissa: the r largest singular values and vectors (Meng et al. 2024). olora: the first columns of its QR decomposition
    (Büyükakyüz 2024). loftq: the same as pissa, of what rounding takes away (Li et al. 2023, with one iteration).

    Args:
        weight: (out, in) in float32.
        how: Adapter.init_lora_weights.
    """
    if how == "olora":
        q, upper = torch.linalg.qr(weight)
        return upper[:r], q[:, :r]
    target = weight - round_trip(weight, settings) if how == "loftq" else weight
    _, _, steps = how.partition("_niter_")
    if steps:
        u, s, v = torch.svd_lowrank(target, r, niter=int(steps))
        vh = v.T
    else:
        u, s, vh = torch.linalg.svd(target, full_matrices=False)
    root = (s[:r] / scale).sqrt()
    return root[:, None] * vh[:r], u[:, :r] * root


# Folders


def save_adapter(adapted: Any, folder: Path, initial: Mapping[str, torch.Tensor]) -> None:
    """PEFT's two files, the same bytes for the same adapter, and the first factors where they were taken out of the base."""
    adapted.save_pretrained(folder, save_embedding_layers=False)  # else PEFT puts the head's own weight beside its adapter
    (folder / "README.md").unlink(missing_ok=True)
    config = read_json(folder / "adapter_config.json")
    for key, value in config.items():
        if isinstance(value, list):
            config[key] = sorted(value)  # PEFT writes sets, in an order that changes from run to run
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    if initial:
        save_file(dict(initial), folder / INITIAL)


def _adapted_layers(model: Any) -> dict[str, Any]:
    return {name: layer for name, layer in model.named_modules() if hasattr(layer, "lora_A")}


def initial_lora(adapted: Any, wanted: Adapter) -> dict[str, torch.Tensor]:
    """The factors of a fresh adapter that were taken out of the base, by their names in adapter_model.safetensors."""
    if wanted.method != "lora" or not str(wanted.init_lora_weights).startswith(("pissa", "olora")):
        return {}
    return {
        f"base_model.model.{name}.{factor}.weight": getattr(layer, factor)["default"].weight.detach().to("cpu", copy=True)
        for name, layer in _adapted_layers(adapted.get_base_model()).items()
        for factor in ("lora_A", "lora_B")
    }


def load_adapter(model: Any, base: Path, settings: Quantization, adapter: Path) -> Any:
    """The quantized `model` with a trained adapter on it, as it was when it was trained."""
    if (adapter / INITIAL).exists():
        config, factors = read_json(adapter / "adapter_config.json"), load_file(adapter / INITIAL)
        weights = BaseWeights(base)
        for key in factors:
            if key.endswith(".lora_A.weight"):
                stem = key.removesuffix(".lora_A.weight")
                a, b = (factors[f"{stem}.{factor}.weight"].to(model.device) for factor in ("lora_A", "lora_B"))
                name = stem.removeprefix("base_model.model.")
                weight = weights.of(name, model.get_submodule(name), model.device)
                set_weight(model, name, subtract_lora(weight, a, b, lora_scaling(config, name)), settings)
    return PeftModel.from_pretrained(model, str(adapter)).eval()
