"""Typed parameters: params.yaml is the only source of values, and a stage reads only the section that dvc.yaml declares."""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from stages.core.problem import Problem

FILE = "params.yaml"


class Section(BaseModel):
    """Base of each stage's `Params`: one section of params.yaml, strictly typed, without defaults.

    A field's docstring says what the value does. An int is accepted for a float; nothing else is converted.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    removed: ClassVar[Mapping[str, str]] = {}
    """Parameters of earlier versions, and what to write instead."""


S = TypeVar("S", bound=Section)


def bad_param(name: str, message: str) -> str:
    """One line of a Problem about a parameter.

    Args:
        name: Section and key, "train.r".
        message: What was found, what was wanted and what to do.
    """
    return f"{FILE}: {name}: {message}"


def read_yaml(path: Path) -> Any:
    """The values of a YAML 1.2 file, in which `1e-05`, as `dvc exp run -S` writes it, is a number.

    Raises Problem if the file is missing or is not YAML; the message has the line.
    """
    try:
        return YAML(typ="safe", pure=True).load(path)
    except FileNotFoundError:
        raise Problem(f"{path}: not found; run this in the project's root") from None
    except (YAMLError, ValueError, LookupError, RecursionError) as error:  # a date 2020-99-99 is a ValueError
        raise Problem(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None


def read_stages(root: Path) -> dict[str, dict[str, Any]]:
    """The entries of dvc.yaml by the name of their stage. Raises Problem if it is not as DVC wants it."""
    document = read_yaml(root / "dvc.yaml")
    stages = document.get("stages") if isinstance(document, Mapping) else None
    if not isinstance(stages, Mapping):
        raise Problem("dvc.yaml: has no stages; get the file back with: git checkout dvc.yaml")
    for name, entry in stages.items():
        if not isinstance(entry, Mapping):
            raise Problem(f"dvc.yaml: stage {name!r}: wanted cmd, deps and outs below it, found {entry!r}")
    return dict(stages)


def read_stage(name: str, root: Path) -> dict[str, Any]:
    """The entry of dvc.yaml for the stage `name`. Raises Problem if there is none."""
    stages = read_stages(root)
    if name not in stages:
        raise Problem(f"no stage {name!r} in dvc.yaml; the stages are {', '.join(stages)}")
    return stages[name]


def read_section(name: str, root: Path) -> dict[str, Any]:
    """The section `name` of params.yaml, untyped. Raises Problem if dvc.yaml does not declare it for that stage."""
    if read_stage(name, root).get("params") != [name]:
        raise Problem(f"dvc.yaml: stage {name!r} must declare exactly params: [{name}], or DVC would not see a change")
    document = read_yaml(root / FILE)
    if not isinstance(document, Mapping) or name not in document:
        raise Problem(f"{FILE}: the section {name!r} is missing")
    if not isinstance(document[name], Mapping):
        raise Problem(bad_param(name, f"wanted parameters below it, found {document[name]!r}"))
    return dict(document[name])


def parse_section(name: str, kind: type[S], section: Mapping[str, Any]) -> S:
    """A section as a `kind`. Raises one Problem with everything that is wrong in it."""
    try:
        return kind.model_validate(dict(section))
    except ValidationError as error:
        raise Problem(*(_explain(name, kind, dict(item)) for item in error.errors())) from None


def _explain(name: str, kind: type[Section], error: dict[str, Any]) -> str:
    """One pydantic error as a sentence: field, what was found, what to write."""
    where = ".".join([name, *map(str, error["loc"])])
    match error["type"]:
        case "extra_forbidden":
            key = str(error["loc"][-1])
            if key in kind.removed:
                return bad_param(where, f"removed; {kind.removed[key]}")
            known = _fields(kind, error["loc"][:-1])
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"the parameters there are {', '.join(known)}"
            return bad_param(where, f"unknown parameter; {hint}")
        case "missing":
            return bad_param(where, "missing; params.yaml must give every parameter, since the code has no defaults")
        case _:
            return bad_param(where, f"{error['msg']}; found {error['input']!r}")


def _fields(kind: type[BaseModel], path: tuple[Any, ...]) -> list[str]:
    """The parameters at `path` inside `kind`."""
    for part in path:
        annotation = kind.model_fields[part].annotation if part in kind.model_fields else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        kind = annotation
    return list(kind.model_fields)
