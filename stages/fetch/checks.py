"""Which files of a model are taken, and what would keep the later stages from loading it."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from stages.core.jsonl import read_json
from stages.fetch.quantization import find_quantization, quantization_problems
from stages.fetch.quantized_tensors import Headers, plan_dequantization
from stages.fetch.remote_code import code_problems, find_code

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
    r"chat_template\.jinja",
)
# What AutoProcessor reads, so that a fine-tuned multimodal model still is one. No stage and no tokenizer needs them.
PROCESSOR = (r"(pre|video_pre)?processor_config\.json", r"chat_template\.json")
CODE = r".*\.py"
LFS_POINTER = b"version https://git-lfs"


def select_files(listed: Iterable[str], *, code: bool) -> list[str]:
    """The files that fetch takes, sorted: of the top level, weights in safetensors, config, tokenizer, processor, and code.

    Args:
        listed: The paths of all files, relative to the model's folder.
        code: Whether the model's own Python files are needed, and trusted.
    """
    patterns = [WEIGHTS, WEIGHTS_INDEX, *CONFIG, *TOKENIZER, *PROCESSOR, *([CODE] if code else [])]
    chosen = [name for name in _top_level(listed) if _matches(name, *patterns)]
    if any(name.startswith("model") and _matches(name, WEIGHTS) for name in chosen):
        # Some repositories hold the weights twice; Transformers loads those named model*.
        chosen = [name for name in chosen if name.startswith("model") or not _matches(name, WEIGHTS, WEIGHTS_INDEX)]
    return sorted(chosen)


def select_small_files(names: Iterable[str]) -> list[str]:
    """The files that decide whether the rest is worth a download: the configs of model and tokenizer, and the index."""
    return [name for name in names if name in ("config.json", "tokenizer_config.json") or is_weights_index(name)]


def is_weights_index(name: str) -> bool:
    """Whether a file says which weights are in which file."""
    return _matches(name, WEIGHTS_INDEX)


def is_weights(name: str) -> bool:
    """Whether a file holds weights."""
    return _matches(name, WEIGHTS)


def is_tokenizer_file(name: str) -> bool:
    """Whether a file belongs to the tokenizer. Code does: a tokenizer may have its own."""
    return _matches(name, *TOKENIZER, CODE)


def is_code(name: str) -> bool:
    """Whether a file is Python code of the model."""
    return _matches(name, CODE)


def is_config(name: str) -> bool:
    """Whether a file is a small JSON object with settings, which may name Python code."""
    return _matches(name, r".*config\.json")


def find_problems(
    model: str, listed: Iterable[str], *, folder: Path, trust_remote_code: bool, headers: Headers | None = None
) -> list[str]:
    """Everything that would keep the later stages from loading the model, a message each.

    Args:
        model: Its name in messages.
        listed: The paths of all its files, relative to its folder.
        folder: Where some or all of them are. Those that are there are opened.
        trust_remote_code: As in params.yaml.
        headers: Those of the weights, if they are known.
    """
    listed = list(listed)
    names = select_files(listed, code=trust_remote_code and find_code(listed, folder=folder).needed)
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
    objects = {name: read_json(folder / name) for name in select_small_files(readable)}
    config = objects.get("config.json", {})
    problems += quantization_problems(config, model=model)
    quantization = find_quantization(config)
    if headers and quantization and quantization.supported:
        problems += plan_dequantization(quantization, headers, model_type=config.get("model_type")).problems
    for name, value in objects.items():
        problems += _index_problems(name, value, names) if is_weights_index(name) else []
    messages = [f"{model}: {problem}" for problem in problems]
    return messages + code_problems(model, listed, folder=folder, trust_remote_code=trust_remote_code)


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


def _index_problems(name: str, index: Mapping[str, Any], names: list[str]) -> list[str]:
    """One message for each shard that the index of the weights names and the model lacks."""
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, Mapping):
        return [f"{name}: has no weight_map; get this file again from an undamaged copy"]
    missing = sorted({str(shard) for shard in weight_map.values()} - set(names))
    return [f"{name} names {shard}, which is missing" for shard in missing]


def _find_damage(file: Path) -> str:
    """Why a file cannot be used, "" if it can. Of weights, the header and the size are checked; JSON is read."""
    with file.open("rb") as start:
        if start.read(len(LFS_POINTER)) == LFS_POINTER:
            return "a git-lfs pointer, not the file itself (git lfs pull, in that folder, downloads it)"
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
