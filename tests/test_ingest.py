"""ingest: every raw row is kept or set aside, with its file, line and reason; splits share no prompt and stay put."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from stages.ingest import Params, ingest
from stages.lib.problem import Problem

PARAMS = {
    "input_separator": "",
    "validation_percent": 20,
    "test_percent": 20,
    "split_seed": 0,
    "max_chars": 1000,
    "max_rejected_percent": 100,
}
FILLER = [{"instruction": f"question {number}", "input": "", "output": f"answer {number}"} for number in range(40)]


class Folder:
    """A raw folder that always has enough rows for three splits, and what ingest makes of it."""

    def __init__(self, root: Path) -> None:
        self.root, self.raw = root, root / "raw"
        self.raw.mkdir()
        self.write("filler.json", json.dumps(FILLER))

    def write(self, name: str, text: str | bytes) -> None:
        path = self.raw / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(text.encode() if isinstance(text, str) else text)

    def ingest(self, **params: Any) -> dict[str, Any]:
        ingest(Params(**PARAMS | params), self.raw, self.root / "examples", self.root / "report.json")
        report: dict[str, Any] = json.loads((self.root / "report.json").read_text())
        return report

    def rows(self, name: str) -> list[dict[str, Any]]:
        return [
            json.loads(line) for line in (self.root / "examples" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        ]

    def kept(self, file: str) -> list[dict[str, Any]]:
        rows = [row for split in ("train", "validation", "test") for row in self.rows(split)]
        return sorted((row for row in rows if row["source"].startswith(file)), key=lambda row: row["source"])


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def lines(*rows: Any) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


BELLE = {"instruction": "给定一个英文句子，翻译成中文。\nI love to learn.\n", "input": "", "output": "我喜欢学习。"}


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        (BELLE, [user(BELLE["instruction"]), assistant("我喜欢学习。")]),
        (
            {"instruction": "a", "input": "b", "output": "c"},
            [user("ab") | {"instruction": "a", "input": "b"}, assistant("c")],
        ),
        (
            {"instruction": "q2", "output": "a2", "system": "s", "history": [["q1", "a1"]]},
            [{"role": "system", "content": "s"}, user("q1"), assistant("a1"), user("q2"), assistant("a2")],
        ),
        ({"instruction": "a", "input": None, "output": "c"}, [user("a"), assistant("c")]),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
            [user("q"), assistant("a")],
        ),
        (
            {"messages": [user("q"), assistant("a") | {"train": False}, user("r"), assistant("b")]},
            [user("q"), assistant("a") | {"train": False}, user("r"), assistant("b")],
        ),
    ],
    ids=["belle", "input", "history", "null input", "sharegpt", "messages"],
)
def test_formats(folder: Folder, row: dict[str, Any], messages: list[dict[str, Any]]) -> None:
    folder.write("x.jsonl", lines(row))
    folder.ingest()
    assert [kept["messages"] for kept in folder.kept("x.jsonl")] == [messages]


def test_the_separator_stands_between_instruction_and_input_alone(folder: Folder) -> None:
    folder.write(
        "x.jsonl", lines({"instruction": "a", "input": "b", "output": "c"}, {"instruction": "d", "input": "", "output": "e"})
    )
    folder.ingest(input_separator="\n")
    assert [row["messages"][0]["content"] for row in folder.kept("x.jsonl")] == ["a\nb", "d"]


@pytest.mark.parametrize(
    ("line", "reason", "detail"),
    [
        ('{"instruction": "cut', "not_json", "Unterminated string"),
        ('{"instruction": "a", "output": NaN}', "not_json", "NaN is not JSON"),
        ('{"a": 1} {"b": 2}', "not_json", "text after the object"),
        ("[1]x", "not_json", "text after"),
        ("3", "not_an_object", "found int"),
        ('{"text": "x"}', "unknown_format", "fields text"),
        ('{"instruction": "a"}', "missing_field", "output"),
        ('{"output": "a"}', "missing_field", "instruction"),
        ('{"instruction": 1, "output": "a"}', "wrong_type", "instruction: wanted text, found int"),
        ('{"instruction": "a", "output": "b", "history": [["x"]]}', "wrong_type", "history"),
        ('{"instruction": "a", "output": "b", "history": [["x", 1]]}', "wrong_type", "history: wanted text, found int"),
        ('{"instruction": "a", "output": " "}', "empty_answer", "' '"),
        ('{"instruction": " ", "output": "a"}', "empty_prompt", "' '"),
        ('{"messages": [{"role": "tool", "content": "a"}]}', "unknown_role", "'tool'"),
        ('{"messages": {}}', "wrong_type", "messages: wanted a list"),
        ('{"messages": []}', "no_answer_at_the_end", "no messages"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "no_answer_at_the_end", "user"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "roles_out_of_order", "assistant"),
        ('{"instruction": "' + "x" * 1000 + '", "output": "a"}', "too_long", "1001 characters"),
        (r'{"instruction": "a \ud800", "output": "b"}', "bad_encoding", "character 3 of a user text"),
        ('{"instruction": "question 0", "output": "Answer  0"}', "duplicate", "of filler.json:1"),
        ("[" * 100_000, "not_json", ""),
    ],
)
def test_a_row_that_is_set_aside_says_where_and_why(folder: Folder, line: str, reason: str, detail: str) -> None:
    folder.write("x.jsonl", lines(BELLE) + line + "\n" + lines({"instruction": "after", "output": "it"}))
    report = folder.ingest()
    (rejected,) = folder.rows("rejected")
    assert (rejected["source"], rejected["reason"]) == ("x.jsonl:2", reason)
    assert detail in rejected["detail"]
    assert (report["rows_read"], report["rows_kept"], report["rejected_by_reason"]) == (43, 42, {reason: 1})
    assert [row["source"] for row in folder.kept("x.jsonl")] == ["x.jsonl:1", "x.jsonl:3"]


def test_bytes_that_are_not_utf8_cost_their_row_only(folder: Folder) -> None:
    folder.write("x.jsonl", lines(BELLE).encode() + b'{"instruction": "a\xff", "output": "b"}\n')
    folder.ingest()
    assert [row["reason"] for row in folder.rows("rejected")] == ["bad_encoding"]
    assert len(folder.kept("x.jsonl")) == 1


@pytest.mark.parametrize(
    ("text", "kept", "why"),
    [
        ("[%s, %s", 2, "the array is not closed"),
        ("[%s, %s, {", 2, "Expecting property name"),
        ("[%s, %s] tail", 2, "text after the end"),
        ("[%s %s]", 1, "the array is not closed"),
    ],
)
def test_an_array_that_breaks_off_keeps_what_came_before(folder: Folder, text: str, kept: int, why: str) -> None:
    rows = [json.dumps({"instruction": f"i{n}", "output": "o"}) for n in range(2)]
    folder.write("x.json", text % tuple(rows))
    folder.ingest()
    assert len(folder.kept("x.json")) == kept
    (rejected,) = folder.rows("rejected")
    assert rejected["reason"] == "not_json"
    assert why in rejected["detail"]


@pytest.mark.parametrize("name", ["x.json", "x.jsonl", "x.json.gz", "x.jsonl.gz"])
@pytest.mark.parametrize("shape", ["lines", "array"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
def test_the_shape_is_told_by_the_content(folder: Folder, name: str, shape: str, bom: bytes) -> None:
    data = bom + (lines(BELLE) if shape == "lines" else json.dumps([BELLE])).encode()
    folder.write(name, gzip.compress(data) if name.endswith(".gz") else data)
    assert folder.ingest()["rows_rejected"] == 0
    assert [row["source"] for row in folder.kept(name)] == [f"{name}:1"]


def test_new_rows_move_no_old_row(folder: Folder) -> None:
    folder.ingest()
    before = {split: {row["id"] for row in folder.rows(split)} for split in ("train", "validation", "test")}
    assert all(before.values())
    folder.write("a.jsonl", lines(*({"instruction": f"new {n}", "output": "x"} for n in range(30))))
    folder.ingest()
    for split, ids in before.items():
        assert ids < {row["id"] for row in folder.rows(split)}


def test_another_split_seed_splits_otherwise(folder: Folder) -> None:
    folder.ingest()
    before = [row["id"] for row in folder.rows("test")]
    folder.ingest(split_seed=1)
    assert [row["id"] for row in folder.rows("test")] != before


def test_the_same_prompt_never_stands_in_two_splits(folder: Folder) -> None:
    variants = [
        {"instruction": text, "output": f"o{n}"}
        for n, text in enumerate(("Ｑｕｅｓｔｉｏｎ  7", "QUESTION 7", "question\t7 "))
    ]
    folder.write("x.jsonl", lines(*variants))
    report = folder.ingest()
    homes = {
        split
        for split in ("train", "validation", "test")
        for row in folder.rows(split)
        if row["messages"][0]["content"] in [v["instruction"] for v in variants] + ["question 7"]
    }
    assert len(homes) == 1
    assert report["leaked_prompts"] == 0


@pytest.mark.parametrize("split", ["test", "validation"])
def test_a_folder_forces_the_split_and_takes_its_prompts_out_of_train(folder: Folder, split: str) -> None:
    folder.write(f"{split}/own.jsonl", lines(*({"instruction": f"question {n}", "output": "other"} for n in range(40))))
    folder.write("more.jsonl", lines(*({"instruction": f"more {n}", "output": "x"} for n in range(40))))
    folder.ingest()
    prompts = {row["messages"][0]["content"] for row in folder.rows("train")}
    assert not prompts & {f"question {n}" for n in range(40)}
    assert {row["source"] for row in folder.kept(split)} == {row["source"] for row in folder.rows(split)} & {
        f"{split}/own.jsonl:{n}" for n in range(1, 41)
    }


def test_too_many_rejections_stop_the_stage_with_the_first_of_each(folder: Folder) -> None:
    folder.write("x.jsonl", lines({"a": 1}, {"a": 2}, {"instruction": "a", "output": ""}))
    with pytest.raises(Problem) as caught:
        folder.ingest(max_rejected_percent=5)
    assert caught.value.messages == (
        "3 of 43 rows (7.0 %) would be set aside, ingest.max_rejected_percent is 5",
        "empty_answer: 1 rows, the first x.jsonl:3: ''",
        "unknown_format: 2 rows, the first x.jsonl:1: fields a",
    )
    assert not (folder.root / "examples").exists()


def test_what_would_go_unread_is_an_error(folder: Folder) -> None:
    folder.write("table.csv", "a,b")
    folder.write(".hidden", "")
    folder.write("big.jsonl.dvc", "outs: []")
    with pytest.raises(Problem, match=r"table\.csv: not one of \.json, \.jsonl") as caught:
        folder.ingest()
    assert len(caught.value.messages) == 1


def test_an_empty_folder_and_a_torn_archive_are_named(folder: Folder) -> None:
    folder.write("x.jsonl.gz", gzip.compress(lines(BELLE).encode())[:-12])
    with pytest.raises(Problem, match=r"x\.jsonl\.gz: not a whole gzip file"):
        folder.ingest()
    for file in folder.raw.iterdir():
        file.unlink()
    with pytest.raises(Problem, match=r"holds no \.json"):
        folder.ingest()


def test_a_split_without_rows_is_an_error(folder: Folder) -> None:
    with pytest.raises(Problem, match="no rows for validation"):
        folder.ingest(validation_percent=0)
