"""The two READMEs say the same, and what they say of the project is so."""

import re

import pytest
from ruamel.yaml import YAML

from tests.test_pipeline import AFTER, READ_BY
from tests.tiny import PROJECT

ENGLISH, CHINESE = ((PROJECT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh.md"))


def fenced(text: str) -> list[str]:
    return re.findall(r"^```\w*\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


def headings(text: str) -> list[str]:
    return re.findall(r"^(#+) ", re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE), flags=re.MULTILINE)


def table_rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def test_both_have_the_same_headings_commands_and_tables() -> None:
    assert headings(ENGLISH) == headings(CHINESE)
    assert fenced(ENGLISH) == fenced(CHINESE)
    assert [len(row) for row in table_rows(ENGLISH)] == [len(row) for row in table_rows(CHINESE)]


def test_both_name_the_same_files_and_parameters() -> None:
    def named(text: str) -> list[str]:
        plain = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
        return sorted(set(re.findall(r"`([\w./:<>{}@-]+)`", plain)))

    assert named(ENGLISH) == named(CHINESE)


@pytest.mark.parametrize("text", [ENGLISH, CHINESE], ids=["en", "zh"])
def test_the_table_of_reruns_is_the_one_that_is_tested(text: str) -> None:
    cells = {row[0]: row[1] for row in table_rows(text) if re.search(r"`(\w+):`", row[0])}
    seen = set()
    for edit, reruns in cells.items():
        section = re.findall(r"`(\w+):`", edit)[0]
        seen.add(section)
        named = set(
            re.findall(r"(fetch|ingest|encode|train|merge|generate@merged|generate|score)\b", re.split("[;；]", reruns)[0])
        )
        by_itself = {stage.split("@")[0] for stage in READ_BY[section]}
        assert by_itself <= named, edit
        after = {name for stage in READ_BY[section] for name in AFTER[stage]}
        assert {name.split("@")[0] for name in named - by_itself} <= {name.split("@")[0] for name in after}, edit
    assert seen == set(YAML(typ="safe").load(PROJECT / "params.yaml"))


def test_every_parameter_that_is_named_exists() -> None:
    params = YAML(typ="safe").load(PROJECT / "params.yaml")
    for section, key in re.findall(r"`(?:-S )?(\w+)\.(\w+)(?:=[^`]*|: [^`]*)?`", ENGLISH):
        if section in params:
            assert key in params[section], f"{section}.{key}"


def test_every_path_that_is_named_is_the_projects() -> None:
    outs = (PROJECT / "dvc.yaml").read_text(encoding="utf-8")
    for path in re.findall(r"`((?:data|models|reports|stages)/[\w./-]*)`", ENGLISH):
        name = path.rstrip("/")
        known = (PROJECT / name).exists() or name in outs or name.rpartition("/")[0] in outs
        assert known or name in ("data/raw/test", "data/raw/validation"), path


def test_the_first_screen_has_both_commands() -> None:
    for text in (ENGLISH, CHINESE):
        top = "\n".join(text.splitlines()[:20])
        assert "make repro" in top
        assert "make test" in top


def test_no_text_holds_a_machines_path_or_a_placeholder() -> None:
    for path in [
        PROJECT / name for name in ("README.md", "README.zh.md", "CONTRIBUTING.md", "CHANGELOG.md", "constraints.txt")
    ]:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"/(home|root|work|tmp|Users)/|file:|@[A-Z]+@", text), path
