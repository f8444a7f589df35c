"""The pages in two languages say the same, and what they say about the project is true."""

import json
import re
from typing import get_args

import pytest
from ruamel.yaml import YAML

from stages.ingest.columns import Names
from stages.ingest.formats import Format, Formats
from stages.ingest.preference import OTHER_SIDE
from stages.ingest.row import Settings
from tests.test_pipeline import AFTER, ALL, EARLY_CUT_OFF, GENERATE, read_by
from tests.tiny import PROJECT

ENGLISH, CHINESE, DATA, CHINESE_DATA = (
    (PROJECT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh.md", "docs/data.md", "docs/data.zh.md")
)
IN_BOTH = pytest.mark.parametrize(
    ("english", "chinese"), [(ENGLISH, CHINESE), (DATA, CHINESE_DATA)], ids=["README", "docs/data"]
)


def fenced(text: str) -> list[str]:
    return re.findall(r"^```\w*\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


def headings(text: str) -> list[str]:
    return re.findall(r"^(#+) ", re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE), flags=re.MULTILINE)


def table_rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


@IN_BOTH
def test_both_have_the_same_headings_commands_and_tables(english: str, chinese: str) -> None:
    assert headings(english) == headings(chinese)
    assert fenced(english) == fenced(chinese)
    assert [len(row) for row in table_rows(english)] == [len(row) for row in table_rows(chinese)]


@IN_BOTH
def test_both_name_the_same_files_parameters_and_rows(english: str, chinese: str) -> None:
    def named(text: str) -> list[str]:
        plain = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
        return sorted(set(re.findall(r"`([\w./:<>{}@-]+|\{.*?\})`", plain)))

    assert named(english) == named(chinese)


def read_row(text: str) -> tuple[str, list[str]]:
    """The format that ingest detects in a row of a page, and the roles of its messages."""
    settings = Settings(input_separator="", roles={}, preference="chosen", turn_fields=(None, None))
    found = Formats(Names({}), settings, group_by="").read(json.loads(text.replace("\\|", "|")))
    return found.format, [message["role"] for message in found.messages]


@pytest.mark.parametrize(("format", "row"), re.findall(r"^\| (\w+) \| `(\{.*?\})` \|", DATA, flags=re.MULTILINE))
def test_every_row_of_the_table_of_formats_has_the_format(format: str, row: str) -> None:
    found, roles = read_row(row)
    assert found == format
    assert roles[-1:] == (["assistant"] if format != "text" else [])


@pytest.mark.parametrize(
    "row", [*re.findall(r"`(\{\".*?\})`", ENGLISH), *re.findall(r"```json\n(.*?)```", DATA, flags=re.DOTALL)]
)
def test_every_other_row_is_read(row: str) -> None:
    assert read_row(row)


def test_the_table_of_formats_is_complete() -> None:
    assert {row[0] for row in table_rows(DATA)} >= set(get_args(Format))


def test_the_tables_of_reasons_are_complete() -> None:
    code = "".join(
        path.read_text(encoding="utf-8")
        for stage in ("ingest", "encode")
        for path in (PROJECT / "stages" / stage).glob("*.py")
    )
    reasons = {
        *re.findall(r"""(?:Rejection|TooLong)\(\s*"(\w+)\"""", code),
        OTHER_SIDE,
        "not_json",
        "not_csv",
        "not_parquet",
        "not_text",
    }
    assert reasons <= {name for row in table_rows(DATA) for name in re.findall(r"`(\w+)`", row[0])}


# What each row of the English table edits. The Chinese rows stand in the same order.
EDITS = {
    "a README": "README.md",
    "a `score:` key": "score",
    "a `generate:` key": "generate",
    "any `merge:` key": "merge",
    "a `train:` key": "train",
    "an `encode:` key, or the template's text": "encode",
    "an `ingest:` key": "ingest",
    "a `fetch:` key": "fetch",
    "a `fetch_data:` key": "fetch_data",
}


def rerun_rows(text: str) -> list[list[str]]:
    rows = table_rows(text)
    end = next(n for n, row in enumerate(rows) if len(row) == 3 and "`fetch:`" in row[0])
    start = next(n for n in range(end, -1, -1) if set(rows[n][0]) == {"-"})
    return rows[start + 1 : next((n for n in range(start + 1, len(rows)) if len(rows[n]) != 3), len(rows))]


def stages_in(cell: str) -> set[str]:
    """The stages that a cell names; `generate` alone stands for both models."""
    names = {name.strip() for name in re.split("[,、]", cell)} - {"nothing", "无"}
    return {full for name in names for full in (GENERATE if name == "generate" else {name})}


@pytest.mark.parametrize("text", [ENGLISH, CHINESE], ids=["en", "zh"])
def test_the_table_of_reruns_is_the_one_that_is_tested(text: str) -> None:
    """Every cell of it: against the table in test_pipeline, or against what really ran there."""
    edits = [row[0] for row in rerun_rows(ENGLISH)]
    assert set(edits) == {*EDITS, *EARLY_CUT_OFF}
    for edit, (_, runs, then) in zip(edits, rerun_rows(text), strict=True):
        assert stages_in(runs) | stages_in(then) <= ALL, edit
        if edit in EARLY_CUT_OFF:
            first = {stage for stage in EARLY_CUT_OFF[edit] if stage in stages_in(runs)}
            assert len(first) == 1, edit
            assert stages_in(runs) | stages_in(then) == EARLY_CUT_OFF[edit], edit
        else:
            assert stages_in(runs) == read_by(EDITS[edit]), edit
            after = {stage for by_itself in stages_in(runs) for stage in AFTER[by_itself]}
            assert stages_in(then) == after - stages_in(runs), edit


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
        assert known, path


def test_the_first_screen_has_both_commands() -> None:
    for text in (ENGLISH, CHINESE):
        top = "\n".join(text.splitlines()[:20])
        assert "make repro" in top
        assert "make test" in top


def test_no_text_holds_a_machines_path_or_a_placeholder() -> None:
    for path in [
        PROJECT / name
        for name in (
            "README.md",
            "README.zh.md",
            "ARCHITECTURE.md",
            "CONTRIBUTING.md",
            "CHANGELOG.md",
            "docs/data.md",
            "docs/data.zh.md",
            "constraints.txt",
        )
    ]:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"/(home|root|work|tmp|Users)/|\bfile:|@[A-Z]+@", text), path
