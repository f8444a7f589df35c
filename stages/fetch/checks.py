"""Which files of a model are taken, and what would keep the later stages from loading it."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from stages.core.jsonl import read_json
from stages.core.params import bad_param

WEIGHTS = r".*\.safetensors"
WEIGHTS_INDEX = r".*\.safetensors\.index\.json"
PICKLED_WEIGHTS = r".*\.(bin|pt|pth|ckpt)"
CONFIG = (r"config\.json", r"generation_config\.json", r"LICENSE.*")
TOKENIZER = (
    r"tokenizer.*",
    r"special_tokens_map\.json",
    r"added_tokens\.json",
    r"vocab\..*",
    r"merges\.txt",
    r".*\.model",
    r".*\.tiktoken",
    r"chat_template\..*",
)
CODE = r".*\.py"


def select_files(listed: Iterable[str], *, trust_remote_code: bool) -> list[str]:
    """The files that fetch takes, sorted: of the top level, weights in safetensors, config, tokenizer, and trusted code.

    `listed` are the paths of all files, relative to the model's folder.
    """
    patterns = [WEIGHTS, WEIGHTS_INDEX, *CONFIG, *TOKENIZER, *([CODE] if trust_remote_code else [])]
    chosen = [name for name in _top_level(listed) if _matches(name, *patterns)]
    if any(name.startswith("model") and _matches(name, WEIGHTS) for name in chosen):
        # Some repositories hold the weights twice; Transformers loads those named model*.
        chosen = [name for name in chosen if name.startswith("model") or not _matches(name, WEIGHTS, WEIGHTS_INDEX)]
    return sorted(chosen)


def select_small_files(names: Iterable[str]) -> list[str]:
    """The files that decide whether the rest is worth a download: config.json and the index of the weights."""
    return [name for name in names if name == "config.json" or _matches(name, WEIGHTS_INDEX)]


def is_tokenizer_file(name: str) -> bool:
    """Whether a file belongs to the tokenizer. Code does: a tokenizer may have its own."""
    return _matches(name, *TOKENIZER, CODE)


def find_problems(model: str, listed: Iterable[str], *, folder: Path, trust_remote_code: bool) -> list[str]:
    """Everything that would keep the later stages from loading the model, a message each.

    Args:
        model: Its name in messages.
        listed: The paths of all its files, relative to its folder.
        folder: Where some or all of them are. Those that are there are opened.
        trust_remote_code: As in params.yaml.
    """
    listed = list(listed)
    names = select_files(listed, trust_remote_code=trust_remote_code)
    problems = _list_problems(listed, names)
    readable = []
    for name in names:
        if not (folder / name).is_file():
            continue
        damage = _find_damage(folder / name)
        if damage:
            problems.append(f"{name}: {damage}; get this file again from an undamaged copy")
        else:
            readable.append(name)
    indexes = {name: read_json(folder / name) for name in select_small_files(readable)}
    config = indexes.pop("config.json", {})
    problems += _quantization_problems(config)
    for name, index in indexes.items():
        problems += _index_problems(name, index, names)
    messages = [f"{model}: {problem}" for problem in problems]
    if "auto_map" in config and not trust_remote_code:
        messages.append(
            bad_param(
                "fetch.trust_remote_code",
                f"is false, but {model} comes with its own Python code (auto_map in config.json). Read that code; if you "
                "trust it, set fetch.trust_remote_code to true",
            )
        )
    return messages


def _list_problems(listed: list[str], names: list[str]) -> list[str]:
    """What the list of files is missing."""
    problems = []
    if not any(_matches(name, WEIGHTS) for name in names):
        top = _top_level(listed)
        pickled = [name for name in top if _matches(name, PICKLED_WEIGHTS)]
        problems.append(
            f"no weights in safetensors; found {', '.join(pickled or sorted(top)) or 'nothing'}. Loratory loads no pickled "
            "weights; load the model once where you trust it, save it with save_pretrained, and fetch that folder"
        )
    if "config.json" not in names:
        problems.append("has no config.json")
    if not any(_matches(name, *TOKENIZER) for name in names):
        problems.append("has no tokenizer files")
    return problems


def _quantization_problems(config: Mapping[str, Any]) -> list[str]:
    """One message if the weights are stored quantized."""
    # Multimodal models keep the language model's config in text_config; compressed-tensors wrote compression_config once.
    parts = [part for part in (config, config.get("text_config")) if isinstance(part, Mapping)]
    found = [part[key] for part in parts for key in ("quantization_config", "compression_config") if part.get(key)]
    if not found:
        return []
    settings = found[0] if isinstance(found[0], Mapping) else {}
    # Early bitsandbytes configs name no method.
    in_bits = "bitsandbytes" if settings.get("load_in_4bit") or settings.get("load_in_8bit") else "an unnamed method"
    return [
        f"its weights are already quantized with {settings.get('quant_method') or in_bits} (quantization_config in "
        "config.json); fetch the unquantized model and set train.quantization instead"
    ]


def _index_problems(name: str, index: Mapping[str, Any], names: list[str]) -> list[str]:
    """One message for each shard that the index of the weights names and the model lacks."""
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, Mapping):
        return [f"{name}: has no weight_map; get this file again from an undamaged copy"]
    missing = sorted({str(shard) for shard in weight_map.values()} - set(names))
    return [f"{name} names {shard}, which is missing" for shard in missing]


def _find_damage(file: Path) -> str:
    """Why a JSON or safetensors file cannot be read, "" if it can. Of weights, the header and the size are checked."""
    if file.suffix == ".json":
        wanted = (dict,) if file.name.endswith(("config.json", ".index.json")) else (dict, list)
        try:
            return "" if isinstance(read_json(file), wanted) else "not a JSON object"
        except ValueError as error:
            return f"not JSON: {error}"
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, framework="numpy"):
                return ""
        except SafetensorError as error:
            return f"not safetensors: {error}"
    return ""


def _top_level(listed: Iterable[str]) -> list[str]:
    return [name for name in listed if "/" not in name and not name.startswith(".")]


def _matches(name: str, *patterns: str) -> bool:
    return any(re.fullmatch(pattern, name) for pattern in patterns)
