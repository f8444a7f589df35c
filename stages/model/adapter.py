"""Adds an adapter to the base model, initializes it, saves it and loads it again (PEFT)."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import peft
import torch
from peft import LoraConfig, PeftConfig, PeftModel, PeftType, PrefixTuningConfig, PromptEncoderConfig, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import _check_lora_target_modules_mamba
from peft.utils.other import get_pattern_key
from pydantic import Field
from safetensors.torch import load_file, save_file
from transformers.pytorch_utils import Conv1D

from stages.core.jsonl import read_json
from stages.core.params import Section, bad_param
from stages.core.problem import Problem
from stages.model.architecture import computes_linear, outside_language_model
from stages.model.base_weights import BaseWeights
from stages.model.device import pick_device
from stages.model.experts import as_float32, expert_parameters, find_experts, install
from stages.model.lora import lora_scaling, subtract_lora
from stages.model.peft_targets import PATTERNS, portable_config, read_lora_config, targets_as_given
from stages.model.probe import TRIAL_ERRORS, probe_ids
from stages.model.quantize import Quantization, ends_of, is_transposed, round_trip, set_weight
from stages.model.routers import find_routers

INITIAL = "initial.safetensors"
"""In an adapter's folder, for PiSSA and OLoRA: the initial lora_A and lora_B, which were subtracted from the base."""
PEFT_PREFIX = "base_model.model."
"""PEFT's prefix of a layer's name in an adapter file."""


class Adapter(Section):
    """The adapter to train. The names are those of PEFT's LoraConfig, PromptEncoderConfig and PrefixTuningConfig."""

    method: Literal["lora", "p_tuning", "prefix_tuning"]
    """lora: low-rank matrices for linear layers; p_tuning: virtual tokens before the prompt, from a small prompt encoder;
    prefix_tuning: trained keys and values before those of the prompt, in every layer."""
    r: int = Field(gt=0)
    """lora: rank of lora_A and lora_B. A higher rank can learn more and makes a larger adapter."""
    lora_alpha: float = Field(gt=0)
    """lora: the delta weight is scaled by lora_alpha / r; usually one or two times r."""
    rank_pattern: dict[str, Annotated[int, Field(gt=0)]]
    """lora: layer name or regular expression to r, for layers with another rank; it must match the full name, or its end
    after a dot. The first match counts."""
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]]
    """lora: the same for lora_alpha."""
    lora_dropout: float = Field(ge=0, lt=1)
    """lora: dropout probability of the inputs of lora_A."""
    use_rslora: bool
    """lora: scale by lora_alpha / sqrt(r), which trains better at high ranks (Kalajdzievski 2023)."""
    use_dora: bool
    """lora: train the magnitude of each row of a weight apart from its direction (DoRA, Liu et al. 2024); slower."""
    init_lora_weights: bool | Annotated[str, Field(pattern=r"^(gaussian|olora|loftq|pissa(_niter_[0-9]+)?)$")]
    """lora: how lora_A and lora_B are initialized. true: lora_A random (Kaiming uniform), lora_B zero; gaussian: lora_A
    normal; pissa, olora: with the principal part of the weights, which is subtracted from the base; loftq: with the
    quantization error. pissa_niter_16: a fast approximate SVD with 16 iterations."""
    target_modules: str | list[str]
    """lora: all-linear (all linear layers except the output head and routers), a list of names, or a regular expression
    that matches full names. For the experts of most mixture-of-experts models, which are no layers: target_parameters."""
    target_parameters: Literal["all-experts"] | list[str]
    """lora: the parameters of experts that get an adapter, by name or its end, as mlp.experts.down_proj; all-experts: all;
    []: none. Each expert has matrices of its own, so they have many weights: r x experts x (in + out) for each parameter."""
    num_virtual_tokens: int = Field(gt=0)
    """p_tuning, prefix_tuning: number of virtual tokens; they take up part of the model's context."""
    encoder_hidden_size: int = Field(gt=0)
    """p_tuning, prefix_tuning with prefix_projection: hidden size of the prompt encoder."""
    prefix_projection: bool
    """prefix_tuning: make the prefix with a prompt encoder, which trains more steadily, instead of training it directly."""


def add_adapter(model: Any, base: Path, *, settings: Quantization, wanted: Adapter) -> Any:
    """Adds a new adapter in float32, the only trainable part. Its random weights come from PyTorch's global generator.

    Args:
        model: The quantized base model. PiSSA and OLoRA change its weights.
        base: The base model's folder.
        settings: How the model is quantized.
        wanted: The adapter's parameters.

    Returns:
        The PEFT model.

    Raises Problem if `wanted` does not fit the model, or if `merge` could not merge the adapter.
    """
    if wanted.method != "lora":
        return get_peft_model(model, _prompt_config(wanted))
    if wanted.use_dora and settings.quantization == "int8" and model.device.type == "cpu":
        raise Problem(
            bad_param("train.use_dora", "must be false with int8 on the CPU, where PEFT loses the scales; nf4 works")
        )
    computed = isinstance(wanted.init_lora_weights, str) and wanted.init_lora_weights != "gaussian"
    parameters = find_target_parameters(model, wanted.target_parameters)
    targets = [] if parameters and wanted.target_modules == [] else find_targets(model, wanted.target_modules)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=wanted.r,
        lora_alpha=wanted.lora_alpha,
        lora_dropout=wanted.lora_dropout,
        use_rslora=wanted.use_rslora,
        use_dora=wanted.use_dora,
        init_lora_weights=True if computed else wanted.init_lora_weights,
        target_modules=targets,
        target_parameters=parameters or None,
        **_full_name_patterns(wanted, [*targets, *parameters]),
    )
    weights = BaseWeights(base)
    weights.require([*(f"{name}.weight" for name in targets), *parameters], "into which merge would merge the adapter")
    with targets_as_given(), as_float32(model):
        adapted = get_peft_model(model, config)
    install(adapted)
    _require_targets(adapted, {*targets, *parameters})
    if computed:
        _initialize(adapted, weights, settings=settings, how=str(wanted.init_lora_weights))
    config.init_lora_weights = True  # otherwise PEFT would initialize and subtract again when it loads the adapter
    return adapted


def _require_targets(adapted: Any, wanted: set[str]) -> None:
    """Raises Problem if PEFT has adapted other layers or parameters than `wanted`."""
    found = {*_adapted_layers(adapted.get_base_model()), *adapted_parameters(adapted)}
    different = sorted(found ^ wanted)
    if different:
        has = "has no adapter" if different[0] in wanted else "has an adapter that was not asked for"
        raise Problem(
            f"PEFT {peft.__version__}: {different[0]} {has} ({len(different)} such layers); name other layers in "
            "train.target_modules, or use another version of PEFT"
        )


def adapted_parameters(adapted: Any) -> list[str]:
    """The full names of the parameters of experts that have an adapter, in the model's order."""
    return [f"{each.name}.{name}" for each in find_experts(adapted) for name in each.shapes if name in each.wrappers]


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
        model: The base model.
        wanted: As in `Adapter.target_modules`.

    Raises Problem with the names of the model's linear layers if a name or the regular expression matches none; and if an
    output head shares its weight with the input embeddings, which merging would change too.
    """
    found = _match_layers(model, wanted)
    tied = model.get_input_embeddings().weight
    shared = [name for name in found if model.get_submodule(name).weight is tied]
    if shared:
        raise Problem(
            bad_param(
                "train.target_modules",
                f"{shared[0]} shares its weight with the input embeddings (tie_word_embeddings), which merging would change "
                "too; leave it out, or fetch a copy of the base with tie_word_embeddings false and a weight for each",
            )
        )
    return found


def find_target_parameters(model: Any, wanted: str | Sequence[str]) -> list[str]:
    """The full names of the parameters of experts that get an adapter.

    Args:
        model: The base model.
        wanted: As in `Adapter.target_parameters`.

    Raises Problem with the names of the model's parameters of experts if a name matches none.
    """
    parameters = list(expert_parameters(model))
    if wanted != "all-experts" and not wanted:
        return []
    if not parameters:
        raise Problem(
            bad_param(
                "train.target_parameters",
                f"must be []: {type(model).__name__} keeps no experts in parameters of their own; name linear layers in "
                "train.target_modules",
            )
        )
    if wanted == "all-experts":
        return parameters
    by_name = {name: _ending_with(name, parameters) for name in wanted}
    missing = [name for name, found in by_name.items() if not found]
    if missing:
        raise Problem(
            bad_param(
                "train.target_parameters",
                f"{', '.join(missing)} is no parameter of experts; those here: {', '.join(ends_of(parameters))}",
            )
        )
    chosen = {full for found in by_name.values() for full in found}
    return [name for name in parameters if name in chosen]


def unsuitable_layers(model: Any) -> dict[str, str]:
    """The names of the layers that look like linear layers and get no adapter, each with the reason.

    Llama 4's router is a linear layer that chooses experts, and BitNet's layers quantize their input: what such a class
    computes is tried. A trial run shows which layers the model does not call: Mamba reads the weight of its dt_proj, past
    an adapter. PEFT knows more of Mamba's layers that some kernels pass by. Zamba 2 uses one block several times.

    Args:
        model: The base model.
    """
    outside = set(outside_language_model(model))
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, torch.nn.Linear | Conv1D) and name not in outside
    }
    tied = getattr(model, "all_tied_weights_keys", {})
    shared = {name.removesuffix(".weight") for pair in tied.items() for name in pair}
    ends = (model.get_output_embeddings(), model.get_input_embeddings())
    unused, found = _unused_layers(model, layers), {}
    for name, layer in layers.items():
        if not computes_linear(layer):
            found[name] = f"{type(layer).__name__} computes something else than a linear layer"
        elif _refused_by_peft(model, name):
            found[name] = "PEFT refuses it, since Mamba's kernels would pass the adapter by"
        elif name in shared and not any(layer is end for end in ends):
            found[name] = "it shares its weight with another layer, into which an adapter of its own would be merged too"
        elif name in unused:
            found[name] = "the model does not call it"
    return found


def _unused_layers(model: Any, layers: Iterable[str]) -> set[str]:
    """The layers that a trial run does not call, though it calls the module that they belong to.

    Of a module that is not called nothing is known: a few tokens do not reach all experts. Nor if the run fails, which
    `check_causal` and `LoraLayers` explain.
    """
    if model.device.type != pick_device().type:  # in main memory, for FSDP, where a run would take long
        return set()
    called: set[str] = set()
    hooks = [
        module.register_forward_pre_hook(lambda *_, name=name: called.add(name)) for name, module in model.named_modules()
    ]
    try:
        with torch.no_grad():
            model(input_ids=probe_ids(model), use_cache=False)
    except TRIAL_ERRORS:
        return set()
    finally:
        for hook in hooks:
            hook.remove()
    return {name for name in layers if name not in called and name.rpartition(".")[0] in called}


def _refused_by_peft(model: Any, name: str) -> bool:
    try:
        _check_lora_target_modules_mamba(LoraConfig(), model, name.rpartition(".")[2])
    except ValueError:
        return True
    return False


def _match_layers(model: Any, wanted: str | Sequence[str]) -> list[str]:
    head = model.get_output_embeddings()
    unsuitable = unsuitable_layers(model)
    left_out = {*unsuitable, *outside_language_model(model)}
    linear = [
        name for name, layer in model.named_modules() if isinstance(layer, torch.nn.Linear | Conv1D) and name not in left_out
    ]
    if wanted == "all-linear":
        routers = find_routers(model)
        return [name for name in linear if model.get_submodule(name) is not head and name not in routers]
    names = f"linear layers here: {', '.join(ends_of(linear))}"
    if isinstance(wanted, str):
        return _match_expression(linear, wanted, names)
    if not wanted:
        raise Problem(bad_param("train.target_modules", f"the list is empty; {names}"))
    by_name = {name: _ending_with(name, linear) for name in wanted}
    missing = [name for name, found in by_name.items() if not found]
    for name in missing:
        refused = _ending_with(name, unsuitable)
        if refused:
            reason = f"{name} cannot have an adapter: {unsuitable[refused[0]]}; {names}"
            raise Problem(bad_param("train.target_modules", reason))
    if missing:
        raise Problem(bad_param("train.target_modules", f"{', '.join(missing)} is not in the model; {names}"))
    chosen = {full for found in by_name.values() for full in found}
    return [name for name in linear if name in chosen]


def _ending_with(name: str, layers: Iterable[str]) -> list[str]:
    """The full names that are `name`, or end in it after a dot."""
    return [full for full in layers if full == name or full.endswith(f".{name}")]


def _match_expression(linear: Sequence[str], expression: str, names: str) -> list[str]:
    """The full names that match. Raises Problem, with `names` for the user to choose from, if none does."""
    try:
        found = [name for name in linear if re.fullmatch(expression, name)]
    except re.error as error:
        raise Problem(
            bad_param("train.target_modules", f"{expression!r} is not a valid regular expression: {error}; {names}")
        ) from None
    if not found:
        raise Problem(
            bad_param(
                "train.target_modules",
                f"the regular expression {expression!r} matches no full name such as {linear[0]!r}; {names}. To give names, "
                "write a list",
            )
        )
    return found


def _full_name_patterns(wanted: Adapter, targets: Sequence[str]) -> dict[str, dict[str, float]]:
    """rank_pattern and alpha_pattern with the layers' full names as keys.

    PEFT takes the first pattern that matches, but saves the patterns sorted, so that another could be the first.

    Raises Problem with all patterns that apply to no layer.
    """
    problems, found = [], {}
    for parameter, patterns in (("rank_pattern", wanted.rank_pattern), ("alpha_pattern", wanted.alpha_pattern)):
        try:
            chosen = {name: get_pattern_key(patterns, name) for name in targets}  # the name itself if no pattern matches
        except re.error as error:
            message = f"{error.pattern!r} is not a valid regular expression: {error}"
            problems.append(bad_param(f"train.{parameter}", message))
            continue
        problems += [
            bad_param(
                f"train.{parameter}",
                f"{pattern!r} matches none of the layers in train.target_modules, or only layers that an earlier pattern "
                f"matches; the last parts of their names are {', '.join(ends_of(targets))}",
            )
            for pattern in patterns
            if pattern not in chosen.values()
        ]
        found[parameter] = {f"^{name}": patterns[key] for name, key in chosen.items() if key in patterns}
    if problems:
        raise Problem(*problems)
    return found


def _initialize(adapted: Any, weights: BaseWeights, *, settings: Quantization, how: str) -> None:
    """Sets lora_A and lora_B of every layer from the base's weights; PiSSA and OLoRA subtract them from the base."""
    model = adapted.get_base_model()
    for name, layer in _adapted_layers(model).items():
        lora_a, lora_b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        r, out_features, in_features = len(lora_a), len(lora_b), lora_a.shape[1]
        if r > min(in_features, out_features):
            raise Problem(
                bad_param(
                    "train.r",
                    f"{r} is more than the rank of {name}, which is {out_features} x {in_features}, and {how} needs as many "
                    "singular values or columns; lower it for this layer in train.rank_pattern, or set "
                    "train.init_lora_weights to true",
                )
            )
        weight = weights.read_linear(name, transposed=is_transposed(layer.get_base_layer()), device=lora_a.device)
        scaling = layer.scaling["default"]
        initial_a, initial_b = initial_lora_from(weight, r, scaling=scaling, how=how, settings=settings)
        lora_a.data, lora_b.data = initial_a.contiguous(), initial_b.contiguous()
        if how != "loftq":
            rest = subtract_lora(weight, initial_a, initial_b, scaling)
            set_weight(model, f"{name}.base_layer", weight=rest, settings=settings)


def initial_lora_from(
    weight: torch.Tensor, r: int, *, scaling: float, how: str, settings: Quantization
) -> tuple[torch.Tensor, torch.Tensor]:
    """The initial lora_A (r, in) and lora_B (out, r) of a layer; scaling · lora_B lora_A is a part of its weight.

    pissa: the r largest singular values with their vectors (Meng et al. 2024). olora: the first r columns of Q and rows of
    R of the weight's QR decomposition (Büyükakyüz 2024). loftq: as pissa, but of the quantization error (Li et al. 2023,
    with one iteration).

    Args:
        weight: (out, in) in float32.
        r: The rank.
        scaling: Of the layer's delta weight.
        how: As in `Adapter.init_lora_weights`.
        settings: How the model is quantized, for loftq.
    """
    if how == "olora":
        q, upper = torch.linalg.qr(weight)
        return upper[:r], q[:, :r]
    target = weight - round_trip(weight, settings) if how == "loftq" else weight
    _, _, iterations = how.partition("_niter_")
    if iterations:
        u, s, v = torch.svd_lowrank(target, r, niter=int(iterations))
        vh = v.T
    else:
        u, s, vh = torch.linalg.svd(target, full_matrices=False)
    root = (s[:r] / scaling).sqrt()
    return root[:, None] * vh[:r], u[:, :r] * root


# Folders


def save_adapter(adapted: Any, folder: Path, initial: Mapping[str, torch.Tensor]) -> None:
    """Saves PEFT's adapter_config.json and adapter_model.safetensors; the same adapter gives the same bytes.

    Args:
        adapted: The PEFT model.
        folder: An existing folder.
        initial: From `initial_lora`; saved as INITIAL if not empty.
    """
    adapted.save_pretrained(folder, save_embedding_layers=False)  # otherwise PEFT saves the output head with its adapter
    (folder / "README.md").unlink(missing_ok=True)
    base = adapted.get_base_model()
    config = read_json(folder / "adapter_config.json")
    if config["peft_type"] == "LORA":
        config = portable_config(config, base, _adapted_layers(base))
    for key, value in config.items():
        if isinstance(value, list):
            config[key] = sorted(value)  # PEFT writes sets, whose order differs from run to run
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    if initial:
        save_file(dict(initial), folder / INITIAL)


def _adapted_layers(model: Any) -> dict[str, Any]:
    """The linear layers with an adapter, by name."""
    return {
        name: layer
        for name, layer in model.named_modules()
        if hasattr(layer, "lora_A") and not isinstance(layer, ParamWrapper)
    }


def initial_lora(adapted: Any, wanted: Adapter) -> dict[str, torch.Tensor]:
    """Copies lora_A and lora_B of a new PiSSA or OLoRA adapter to the CPU; empty for all other adapters.

    The keys are the names in adapter_model.safetensors.
    """
    if wanted.method != "lora" or not str(wanted.init_lora_weights).startswith(("pissa", "olora")):
        return {}
    return {
        f"{PEFT_PREFIX}{name}.{matrix}.weight": getattr(layer, matrix)["default"].weight.detach().to("cpu", copy=True)
        for name, layer in _adapted_layers(adapted.get_base_model()).items()
        for matrix in ("lora_A", "lora_B")
    }


def load_adapter(model: Any, adapter: Path, *, base: Path, settings: Quantization) -> Any:
    """Loads a trained adapter onto the base model, and restores the model that was trained.

    Args:
        model: The base model, quantized as in training. If the adapter was initialized with PiSSA or OLoRA, the initial
            delta weights are subtracted from its weights.
        adapter: The adapter's folder.
        base: The base model's folder.
        settings: How the model is quantized.

    Returns:
        The PEFT model in evaluation mode.
    """
    if (adapter / INITIAL).exists():
        config, tensors = read_lora_config(adapter), load_file(adapter / INITIAL)
        weights = BaseWeights(base)
        for key in tensors:
            if key.endswith(".lora_A.weight"):
                stem = key.removesuffix(".lora_A.weight")
                name = stem.removeprefix(PEFT_PREFIX)
                lora_a, lora_b = (tensors[f"{stem}.{matrix}.weight"].to(model.device) for matrix in ("lora_A", "lora_B"))
                transposed = is_transposed(model.get_submodule(name))
                weight = weights.read_linear(name, transposed=transposed, device=model.device)
                rest = subtract_lora(weight, lora_a, lora_b, lora_scaling(config, name))
                set_weight(model, name, weight=rest, settings=settings)
    config = PeftConfig.from_pretrained(str(adapter))
    if config.peft_type == PeftType.LORA:
        for key, value in read_lora_config(adapter).items():
            if key in ("target_modules", "target_parameters", *PATTERNS):
                setattr(config, key, value)
    with targets_as_given(), as_float32(model):
        adapted = PeftModel.from_pretrained(model, str(adapter), config=config)
    install(adapted)
    return adapted.eval()
