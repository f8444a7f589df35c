"""Parameters: strict, complete, explained, and the same to the stage as to DVC."""

import importlib
import json
import re
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Literal

import dvc.api
import pytest
from pydantic import Field
from ruamel.yaml import YAML

from stages.core.params import Section, parse_section, read_section, read_yaml
from stages.core.problem import Problem
from tests.tiny import PROJECT, Workspace, load_script

SPEC = YAML(typ="safe").load(PROJECT / "dvc.yaml")["stages"]


def load_section(name: str, kind: type[Section], root: Path) -> Any:
    return parse_section(name, kind, read_section(name, root))


class Inner(Section):
    depth: int


class Example(Section):
    learning_rate: float = Field(gt=0)
    epochs: int
    kind: Literal["a", "b"]
    inner: Inner


GOOD = "learning_rate: 1e-05\n  epochs: 3\n  kind: a\n  inner:\n    depth: 1"


@pytest.fixture
def load(tmp_path: Path):
    def load(section: str, declared: str = "[example]") -> Example:
        (tmp_path / "dvc.yaml").write_text(f"stages:\n  example:\n    cmd: x\n    params: {declared}\n")
        (tmp_path / "params.yaml").write_text(f"example:\n  {section}\n")
        return load_section("example", Example, tmp_path)

    return load


def test_a_number_as_dvc_writes_it_is_a_number(load) -> None:
    assert load(GOOD).learning_rate == 1e-05  # PyYAML reads 1e-05 as text


def test_all_problems_come_at_once_and_name_the_near_parameter(load) -> None:
    with pytest.raises(Problem) as caught:
        load("learning_rat: 0.1\n  epochs: '3'\n  kind: c\n  inner:\n    dept: 1")
    assert sorted(caught.value.messages) == [
        "params.yaml: example.epochs: Input should be a valid integer; found '3'",
        "params.yaml: example.inner.dept: unknown parameter; did you mean 'depth'?",
        "params.yaml: example.inner.depth: missing; params.yaml must give every parameter, since the code has no defaults",
        "params.yaml: example.kind: Input should be 'a' or 'b'; found 'c'",
        "params.yaml: example.learning_rat: unknown parameter; did you mean 'learning_rate'?",
        "params.yaml: example.learning_rate: missing; params.yaml must give every parameter, since the code has no defaults",
    ]


@pytest.mark.parametrize("value", [".nan", ".inf", "-1", "true", "'1'", "null"])
def test_what_is_no_sensible_number_is_refused(load, value: str) -> None:
    with pytest.raises(Problem, match=r"example\.learning_rate"):
        load(GOOD.replace("1e-05", value))


def test_a_section_that_is_not_declared_cannot_be_read(load) -> None:
    with pytest.raises(Problem, match=r"must declare exactly params: \[example\]"):
        load(GOOD, declared="[other]")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "not valid YAML"),
        ("a: 1\na: 2", "duplicate key"),
        ("", "the section 'example' is missing"),
        ("- 1", "the section 'example' is missing"),
        ("example:", "example: wanted parameters below it, found None"),
        ("example: [1]", r"example: wanted parameters below it, found \[1\]"),
    ],
)
def test_a_broken_file_is_named(load, tmp_path: Path, text: str, message: str) -> None:
    load(GOOD)
    (tmp_path / "params.yaml").write_text(text)
    with pytest.raises(Problem, match=message):
        load_section("example", Example, tmp_path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(Problem, match=r"params\.yaml: not found"):
        read_yaml(tmp_path / "params.yaml")


@pytest.mark.parametrize("stage", SPEC)
def test_the_committed_parameters_are_good_and_described(stage: str) -> None:
    params = importlib.import_module(f"stages.{stage}.{stage}").Params
    load_section(stage, params, PROJECT)
    check_described(stage, params)


def check_described(at: str, section: type[Section]) -> None:
    for name, field in section.model_fields.items():
        assert field.description, f"{at}.{name} has no line that says what it does"
        assert field.is_required(), f"{at}.{name} has a default in code"
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            check_described(f"{at}.{name}", field.annotation)


def test_every_parameter_in_the_file_has_a_comment() -> None:
    lines = (PROJECT / "params.yaml").read_text(encoding="utf-8").splitlines()
    for above, line in pairwise(lines):
        if re.match(r"  +\w+:", line):
            assert " # " in line or above.lstrip().startswith("# "), line


def test_a_stage_reads_what_dvc_declares(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workspace.root)
    for stage in SPEC:
        name = f"{stage}@base" if "matrix" in SPEC[stage] else stage
        assert {stage: read_section(stage, Path())} == dvc.api.params_show(stages=name)


def test_the_committed_schema_is_current() -> None:
    made = load_script("tools/params_schema.py").text()
    assert (PROJECT / "params.schema.json").read_text(encoding="utf-8") == made, "run make schema"


def test_the_committed_parameters_fit_the_schema_and_an_editor_finds_it() -> None:
    text = (PROJECT / "params.yaml").read_text(encoding="utf-8")
    assert text.startswith("# yaml-language-server: $schema=params.schema.json\n")
    schema = json.loads((PROJECT / "params.schema.json").read_text(encoding="utf-8"))
    for name, values in read_yaml(PROJECT / "params.yaml").items():
        section = schema["$defs"][schema["properties"][name]["$ref"].rpartition("/")[2]]
        assert set(section["properties"]) == set(section["required"]) == set(values)
        assert section["additionalProperties"] is False
        assert all("description" in entry or "$ref" in entry for entry in section["properties"].values())


def test_a_removed_parameter_says_what_to_write_instead(tmp_path: Path) -> None:
    class Renamed(Section):
        removed: ClassVar[Mapping[str, str]] = {"lr": "write learning_rate"}

        learning_rate: float

    with pytest.raises(Problem, match=r"params\.yaml: train\.lr: removed; write learning_rate"):
        parse_section("train", Renamed, {"learning_rate": 1.0, "lr": 1.0})
