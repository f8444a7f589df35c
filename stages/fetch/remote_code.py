"""Whether a model needs its own Python code: only if Transformers has no class for it, or none for its tokenizer.

With a class of its own, Transformers is right and newer: many models still carry the code with which they were released, for
Transformers 4.
"""

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from stages.core.jsonl import read_json
from stages.core.params import bad_param
from stages.fetch.model_types import has_tokenizer_class, transformers_version, type_problem

AUTO_MAP = "auto_map"
"""In config.json and its like: the class in the model's Python files for each Auto class of Transformers."""
GENERATORS = ("AutoModelForCausalLM", "AutoModelForImageTextToText")
TOKENIZER = "AutoTokenizer"


class Code(NamedTuple):
    """Which of the model's Python code is needed."""

    model: bool
    """The model's class."""
    tokenizer: bool
    """The tokenizer's class; False if the model's class is needed, whose code comes with everything that belongs to it."""

    @property
    def needed(self) -> bool:
        """Whether any is."""
        return self.model or self.tokenizer


def find_code(listed: Collection[str], *, folder: Path) -> Code:
    """What of a model's own code is needed.

    Args:
        listed: The names of all its files.
        folder: Where config.json and tokenizer_config.json are, if the model has them.
    """
    config, settings = read_object(folder / "config.json"), read_object(folder / "tokenizer_config.json")
    own = _auto_map(config)
    if any(kind in own for kind in GENERATORS) and type_problem(config):
        return Code(model=True, tokenizer=False)
    # tokenizer.json holds all of a tokenizer; Transformers reads it whatever the class.
    asked = TOKENIZER in _auto_map(settings) and "tokenizer.json" not in listed
    return Code(model=False, tokenizer=asked and not has_tokenizer_class(settings, config.get("model_type")))


def code_problems(model: str, listed: Iterable[str], *, folder: Path, trust_remote_code: bool) -> list[str]:
    """What keeps Transformers from finding a class for the model and its tokenizer, a message each.

    Args:
        model: Its name in messages.
        listed: The names of all its files.
        folder: As in `find_code`.
        trust_remote_code: As in params.yaml.
    """
    listed = list(listed)
    config, settings = read_object(folder / "config.json"), read_object(folder / "tokenizer_config.json")
    code = find_code(listed, folder=folder)
    problem = type_problem(config) if config and not code.model else ""
    messages = [f"{model}: {problem}"] if problem else []
    if not code.needed:
        return messages
    where = "config.json" if code.model else "tokenizer_config.json"
    what = f"model type {config.get('model_type')}" if code.model else f"tokenizer {settings.get('tokenizer_class')}"
    if not trust_remote_code:
        messages.append(
            bad_param(
                "fetch.trust_remote_code",
                f"is false, but {model} comes with its own Python code ({AUTO_MAP} in {where}), and "
                f"{transformers_version()} has no class for its {what}. Read that code; if you trust it, set "
                "fetch.trust_remote_code to true",
            )
        )
        return messages
    for reference in _references(_auto_map(config) if code.model else _auto_map(settings)):
        repository, _, name = reference.rpartition("--")
        file = f"{name.rpartition('.')[0]}.py"
        if repository:
            messages.append(
                f"{model}: {where} takes code from another repository, {repository}, at no fixed version; put that code "
                f"into a copy of the model, write {name} in {AUTO_MAP}, and set fetch.source to folder"
            )
        elif file not in listed:
            messages.append(f"{model}: {where} names code in {file}, which is missing")
    return list(dict.fromkeys(messages))


def ignored_code(code: Code, *, folder: Path) -> str:
    """A sentence if the model has code of its own that is not used, "" otherwise."""
    config = read_object(folder / "config.json")
    if code.model or not any(kind in _auto_map(config) for kind in GENERATORS):
        return ""
    rest = ", except for the tokenizer's" if code.tokenizer else ""
    return (
        f"{transformers_version()} has its own class for model type {config['model_type']}; the model's own Python code is "
        f"not used{rest}"
    )


def without_ignored_code(name: str, value: Mapping[str, Any], *, code: Code) -> dict[str, Any]:
    """A JSON file of the model without references to Python files that are not taken.

    Nobody is asked for consent then, and whoever gives it, as for another model, gets no error.
    """
    if code.model or (code.tokenizer and name == "tokenizer_config.json"):
        return dict(value)
    return {key: each for key, each in value.items() if key != AUTO_MAP}


def tokenizer_reference(folder: Path) -> dict[str, Any]:
    """The auto_map of a tokenizer whose class is in its own code."""
    return {TOKENIZER: _auto_map(read_object(folder / "tokenizer_config.json"))[TOKENIZER]}


def read_object(file: Path) -> dict[str, Any]:
    """A JSON object, empty if the file is missing or damaged, which other checks report."""
    try:
        value = read_json(file)
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _auto_map(config: Mapping[str, Any]) -> dict[str, Any]:
    found = config.get(AUTO_MAP)
    if isinstance(found, list):  # the oldest form, only for tokenizers: [slow, fast]
        return {TOKENIZER: found}
    return found if isinstance(found, dict) else {}


def _references(auto_map: Mapping[str, Any]) -> list[str]:
    """All classes that an auto_map names: module.Class, or owner/name--module.Class."""
    values = (each for value in auto_map.values() for each in (value if isinstance(value, list) else [value]))
    return [each for each in values if isinstance(each, str)]
