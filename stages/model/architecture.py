"""Which class of Transformers loads a model, whether its files fill it, and which of its modules are the language model."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM
from transformers.pytorch_utils import Conv1D

from stages.core.jsonl import read_json
from stages.core.problem import Problem
from stages.core.provenance import MANIFEST
from stages.model.probe import TRIAL_ERRORS, logits_match

AUTO_CLASSES = (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM)
"""In the order in which they are asked for a model: the first is the smallest, and may leave out a vision tower."""
NAMED = 3
"""The maximum number of tensors that a message names."""


def read_config(folder: Path) -> Any:
    """The config of the model in a folder."""
    return AutoConfig.from_pretrained(folder, trust_remote_code=_trusts(folder))


def skeleton(folder: Path, dtype: torch.dtype) -> Any:
    """The model in a folder on the meta device: names and shapes of its weights, which take no memory."""
    config = read_config(folder)
    with torch.device("meta"), _packages_named(folder):
        return _auto_class(folder, config).from_config(config, dtype=dtype, trust_remote_code=_trusts(folder))


def load_pretrained(folder: Path, **options: Any) -> Any:
    """The model in a folder, from safetensors files that have exactly its weights.

    Transformers would draw a weight that the files lack at random, and pass over one that the model does not know: a model
    that seems to work. Passed over without a message is only what the model's class itself names, as the vision tower of a
    model that is loaded as a language model.

    Args:
        folder: A model's folder, with its manifest.
        options: Those of `from_pretrained`.

    Raises Problem if a tensor is missing, unknown or of another shape.
    """
    config = read_config(folder)
    try:
        with _packages_named(folder):
            model, info = _auto_class(folder, config).from_pretrained(
                folder, use_safetensors=True, trust_remote_code=_trusts(folder), output_loading_info=True, **options
            )
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise Problem(f"{folder}: a tensor has another shape than config.json says: {_one_line(error)}") from None
    problems = [
        f"{folder}: the files lack {_count(info['missing_keys'], 'tensor')} of the {type(model).__name__}, which "
        "Transformers would fill with random numbers"
    ] * bool(info["missing_keys"])
    unknown = (
        _without_towers(info["unexpected_keys"], model)
        if type(model.config) is not type(config)
        else info["unexpected_keys"]
    )
    problems += [
        f"{folder}: the files have {_count(unknown, 'tensor')} that the {type(model).__name__} of Transformers "
        f"{transformers.__version__} does not know and would leave out"
    ] * bool(unknown)
    if problems:
        problems[-1] += "; fetch a model whose files and config.json belong together, or use another version of Transformers"
        raise Problem(*problems)
    return model


@contextmanager
def _packages_named(folder: Path) -> Iterator[None]:
    """Within the block, a package that a model needs and that is not installed is a Problem."""
    try:
        yield
    except ImportError as error:
        raise Problem(
            f"{folder}: this model needs a package that is not installed: {_one_line(error)}; install it into .venv"
        ) from None


def _without_towers(names: Collection[str], model: Any) -> list[str]:
    """The tensors that belong to the modules of a language model, though it does not know them.

    The others are those of the vision or audio tower of the larger model in the same files, which merging copies.
    """
    own = {_beginning(name) for name in model.state_dict()}
    return [name for name in names if _beginning(name) in own]


def _beginning(name: str) -> tuple[str, ...]:
    return tuple(name.split(".")[:2])


def _auto_class(folder: Path, config: Any) -> Any:
    """The class to load a model with. Raises Problem if no class of Transformers, and no code of the model's own, fits."""
    own = getattr(config, "auto_map", None) or {}
    for auto in AUTO_CLASSES:
        if type(config) in auto._model_mapping or auto.__name__ in own:
            return auto
    raise Problem(
        f"{folder}: Transformers {transformers.__version__} has no language model of the type {config.model_type!r}, and "
        "the model brings no code of its own; fetch another model"
    )


def _trusts(folder: Path) -> bool:
    trusts: bool = read_json(folder / MANIFEST)["trust_remote_code"]
    return trusts


def _count(names: Collection[str], noun: str) -> str:
    """`2 tensors (a, b)`"""
    shown = sorted(names)[:NAMED]
    more = ", ..." if len(names) > NAMED else ""
    return f"{len(names):,} {noun}{'s' if len(names) > 1 else ''} ({', '.join(shown)}{more})"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def computes_linear(layer: Any) -> bool:
    """Whether a layer returns x Wᵀ + bias, as nn.Linear and Conv1D do.

    Falcon's own class does; Llama 4's router and BitNet's layers are linear layers by their class alone. What a class
    computes is tried; if the layer is on the meta device, with a small weight.
    """
    kind = type(layer)
    if kind.forward in (torch.nn.Linear.forward, Conv1D.forward) or kind.__module__.startswith("bitsandbytes."):
        return True
    if layer.weight.is_meta:
        layer = copy(layer)
        layer._parameters = {
            name: None
            if weight is None
            else torch.nn.Parameter(torch.linspace(-1, 1, 8**weight.ndim).view(*[8] * weight.ndim))
            for name, weight in layer._parameters.items()
        }
    weight = layer.weight
    x = torch.linspace(-1, 1, 2 * weight.shape[1], dtype=weight.dtype, device=weight.device).view(2, -1)
    try:
        with torch.no_grad():
            return logits_match(layer(x), torch.nn.functional.linear(x, weight, layer.bias))
    except TRIAL_ERRORS:
        return False


def outside_language_model(model: Any) -> list[str]:
    """The names of the linear layers that see no text: those of a vision or audio tower, and of its projector.

    They are neither quantized nor adapted. Empty for a model of text alone.

    Args:
        model: Without an adapter.
    """
    if model.config.get_text_config() is model.config:
        return []
    inside = {id(module) for module in model.get_decoder().modules()} | {id(model.get_output_embeddings())}
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and id(module) not in inside
    ]
