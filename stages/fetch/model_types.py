"""Which model types and tokenizers Transformers has classes for.

Its tables are read as source text: to import them takes two seconds and torch, which fetch otherwise does not need.
"""

import ast
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

GENERATORS = ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES")
ENCODERS = "MODEL_FOR_MASKED_LM_MAPPING_NAMES"
ENCODER_DECODERS = "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES"
GENERIC_TOKENIZERS = ("", "PreTrainedTokenizer", "TokenizersBackend", "PythonBackend")
"""Names, without "Fast", of classes that say nothing of a tokenizer without tokenizer.json."""


def has_tokenizer_class(settings: Mapping[str, Any], model_type: object) -> bool:
    """Whether Transformers has the class of a tokenizer that comes without tokenizer.json.

    A class that it does not know it replaces by a generic one, which converts tokenizer.model as well as it can: without the
    space that SentencePiece puts before a text, for example.

    Args:
        settings: tokenizer_config.json.
        model_type: Of config.json; it decides if the settings name no class.
    """
    # What this table has depends on what is installed, so it is imported. Few models need to be asked about.
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES, tokenizer_class_from_name

    named = str(settings.get("tokenizer_class") or TOKENIZER_MAPPING_NAMES.get(model_type) or "").removesuffix("Fast")
    return named not in GENERIC_TOKENIZERS and tokenizer_class_from_name(named) is not None


def type_problem(config: Mapping[str, Any]) -> str:
    """Why Transformers has no class for generating text with models of this config.json, "" if it has one.

    BERT and its kin have a class for causal language modelling too, but it is meant for a config with is_decoder.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        return "config.json has no model_type, by which Transformers finds the model's class; add it if you know it"
    only = "only causal language models are fine-tuned here; fetch another model"
    if config.get("is_encoder_decoder") or model_type in _keys("modeling_auto.py", ENCODER_DECODERS):
        return f"its model type {model_type} is an encoder-decoder; {only}"
    if not config.get("is_decoder") and model_type in _keys("modeling_auto.py", ENCODERS):
        return f"its model type {model_type} is an encoder, which generates no text; {only}"
    if any(model_type in _keys("modeling_auto.py", table) for table in GENERATORS):
        return ""
    if model_type in _known_types():
        return f"{transformers_version()} has no causal language model of its model type {model_type}; {only}"
    own = "its auto_map in config.json names no class for causal language models"
    return (
        f"{transformers_version()} knows no model type {model_type!r}, and "
        f"{own if config.get('auto_map') else 'the model comes without Python code of its own'}; fetch a model of another "
        "type, or correct model_type in a copy of this one"
    )


def transformers_version() -> str:
    """ "Transformers 5.23.0"."""
    return f"Transformers {version('transformers')}"


def _known_types() -> set[str]:
    return {*_keys("auto_mappings.py", "CONFIG_MAPPING_NAMES"), *_keys("configuration_auto.py", "CONFIG_MAPPING_NAMES")}


@cache
def _keys(file: str, table: str) -> frozenset[str]:
    """The keys of a table: OrderedDict([(key, value), ...]) and dictionaries, also in a call of its update."""
    keys: list[ast.expr | None] = []
    for node in (node for value in _values(file, table) for node in ast.walk(value)):
        match node:
            case ast.Tuple(elts=[key, _]):
                keys.append(key)
            case ast.Dict(keys=found):
                keys += found
    return frozenset(str(key.value) for key in keys if isinstance(key, ast.Constant))


def _values(file: str, table: str) -> Iterator[ast.expr]:
    """The expressions that are assigned to a table of transformers/models/auto, or with which it is updated."""
    for node in _parsed(file).body:
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=value) if name == table:
                yield value
            case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value) if name == table:
                yield value
            case ast.Expr(value=ast.Call(func=ast.Attribute(value=ast.Name(id=name), attr="update"), args=[value])) if (
                name == table
            ):
                yield value


@cache
def _parsed(file: str) -> ast.Module:
    spec = find_spec("transformers")  # finds the package without importing it
    assert spec is not None
    assert spec.origin is not None
    return ast.parse((Path(spec.origin).parent / "models" / "auto" / file).read_text(encoding="utf-8"))
