"""From the checked files of a model to what is done with each of them: linked or copied, written anew, dequantized."""

from collections.abc import Sequence
from pathlib import Path

from stages.fetch.checks import is_config, is_weights
from stages.fetch.files import ModelFiles
from stages.fetch.quantization import find_quantization, without_quantization
from stages.fetch.quantized_tensors import Headers, Plan, plan_dequantization
from stages.fetch.remote_code import (
    AUTO_MAP,
    find_code,
    ignored_code,
    read_object,
    tokenizer_reference,
    without_ignored_code,
)
from stages.fetch.safetensors_files import read_header


def prepare(folder: Path, names: Sequence[str], *, download: Path | None, trust_remote_code: bool) -> ModelFiles:
    """What is to be done with the files `names` of a folder, which passed every check.

    Args:
        folder: Where the files are.
        names: As `select_files` returns them.
        download: As in ModelFiles.
        trust_remote_code: Whether the user expects the model's own code to be used.
    """
    config = read_object(folder / "config.json")
    quantization = find_quantization(config)
    code = find_code(names, folder=folder)
    plan = plan_for(folder, read_headers(folder, names))
    notes = [ignored_code(code, folder=folder)] if trust_remote_code else []
    if plan and not plan.weights:
        notes.append(f"config.json says {plan.quantization.method}, but no tensor is quantized; all are taken as they are")
        plan = None
    changed = {}
    for name in filter(is_config, names):
        value = read_object(folder / name)
        new = without_ignored_code(name, value, code=code)
        if name == "config.json" and code.tokenizer:
            new[AUTO_MAP] = tokenizer_reference(folder)  # config.json tells encode that the tokenizer needs its code
        if name == "config.json" and quantization:
            new = without_quantization(new, dequantized=plan is not None)
        if new != value:
            changed[name] = new
    return ModelFiles(folder, names, download, changed, plan, [note for note in notes if note])


def plan_for(folder: Path, headers: Headers) -> Plan | None:
    """How to dequantize a model with this config.json and these weights; None if its config says nothing of quantization."""
    config = read_object(folder / "config.json")
    quantization = find_quantization(config)
    if not headers or not quantization or not quantization.supported:
        return None
    return plan_dequantization(quantization, headers, model_type=config.get("model_type"))


def read_headers(folder: Path, names: Sequence[str]) -> Headers:
    """The headers of the weights; none if one of them is damaged, which other checks report."""
    try:
        return {name: read_header(folder / name) for name in names if is_weights(name)}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return {}
