"""ingest: every raw row is kept, or rejected with its file, line and reason. Splits share no prompt and are stable."""

import gzip
import hashlib
import json
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stages.core.params import parse_section
from stages.core.problem import Problem
from stages.ingest.ingest import Params, ingest
from stages.ingest.json_stream import Broken
from stages.ingest.raw_files import find_files, read_rows
from stages.ingest.split_names import split_of_path

COLUMNS = {
    name: name for name in ("instruction", "input", "output", "system", "history", "conversations", "messages", "tools")
}
PARAMS: dict[str, Any] = {
    "formats": {},
    "columns": COLUMNS,
    "columns_by_file": {},
    "roles": {},
    "preference": "error",
    "input_separator": "",
    "group_by": "",
    "near_duplicates": "off",
    "reject_placeholders": False,
    "validation_percent": 20,
    "test_percent": 20,
    "split_seed": 0,
    "max_chars": 1000,
    "max_rejected_percent": 100,
}
FILLER = [{"instruction": f"question {number}", "input": "", "output": f"answer {number}"} for number in range(40)]


class Folder:
    """A raw folder with enough rows for three splits, and the outputs of ingest for it."""

    def __init__(self, root: Path, name: str = "raw") -> None:
        self.root, self.raw, self.hub = root, root / name, root / "hub"
        self.raw.mkdir()
        self.hub.mkdir(exist_ok=True)
        self.write("filler.json", json.dumps(FILLER))

    def write(self, name: str, text: str | bytes) -> None:
        path = self.raw / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(text.encode() if isinstance(text, str) else text)

    def ingest(self, **params: Any) -> dict[str, Any]:
        outputs = {"examples": self.root / "examples", "report": self.root / "report.json"}
        ingest(Params(**PARAMS | params), raw=self.raw, hub=self.hub, **outputs)
        report: dict[str, Any] = json.loads((self.root / "report.json").read_text())
        return report

    def rows(self, name: str) -> list[dict[str, Any]]:
        return [
            json.loads(line)
            for line in (self.root / "examples" / f"{name}.jsonl").read_text(encoding="utf-8").split("\n")
            if line
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
def test_each_format_becomes_messages(folder: Folder, row: dict[str, Any], messages: list[dict[str, Any]]) -> None:
    folder.write("x.jsonl", lines(row))
    folder.ingest()
    assert [kept["messages"] for kept in folder.kept("x.jsonl")] == [messages]


def test_input_separator_is_added_only_between_instruction_and_input(folder: Folder) -> None:
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
        ('{"a": 1} {"b": 2}', "not_json", "Extra data"),
        ("[1]x", "not_json", "Extra data"),
        ("3", "not_an_object", "found int"),
        ('{"score": 1}', "unknown_format", "fields score; none of them looks like a text"),
        ('{"instruction": "a"}', "missing_field", "output"),
        ('{"output": "a"}', "missing_field", "instruction"),
        ('{"instruction": 1, "output": "a"}', "wrong_type", "instruction: wanted text, found int"),
        ('{"instruction": "a", "output": "b", "history": [["x"]]}', "wrong_type", "history"),
        ('{"instruction": "a", "output": "b", "history": [["x", 1]]}', "wrong_type", "history: wanted pairs of text"),
        ('{"instruction": "a", "output": " "}', "empty_answer", "' '"),
        ('{"instruction": " ", "output": "a"}', "empty_prompt", "' '"),
        ('{"messages": [{"role": "critic", "content": "a"}]}', "unknown_role", "messages[1].role: 'critic'"),
        ('{"messages": [{"role": "tool", "content": "a"}]}', "roles_out_of_order", "tool"),
        ('{"messages": [{"role": "user", "content": "a", "train": 1}]}', "wrong_type", "messages[1].train"),
        ('{"conversations": [{"from": "human"}]}', "missing_field", "conversations[1].value"),
        (
            '{"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": "no json"}]}',
            "wrong_type",
            "conversations[2]: function_call: wanted JSON",
        ),
        ('{"messages": [{"role": "user", "content": "q"}], "tools": "{"}', "wrong_type", "tools: wanted JSON"),
        (
            '{"instruction": "Human:a\\nAssistant:b\\nAssistant:", "output": "c"}',
            "roles_out_of_order",
            "user assistant assistant",
        ),
        ('{"messages": {}}', "wrong_type", "messages: wanted a list"),
        ('{"messages": []}', "no_answer_at_the_end", "no messages"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "no_answer_at_the_end", "user"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "roles_out_of_order", "assistant"),
        ('{"instruction": "' + "x" * 1000 + '", "output": "a"}', "too_long", "1001 characters"),
        (r'{"instruction": "a \ud800", "output": "b"}', "bad_encoding", "'\\ud800' in a user text"),
        ('{"instruction": "question 0", "output": "Answer  0"}', "duplicate", "of filler.json:1"),
        ("[" * 100_000, "not_json", ""),
    ],
)
def test_a_rejected_row_has_its_source_reason_and_detail(folder: Folder, line: str, reason: str, detail: str) -> None:
    folder.write("x.jsonl", lines(BELLE) + line + "\n" + lines({"instruction": "after", "output": "it"}))
    report = folder.ingest()
    (rejected,) = folder.rows("rejected")
    assert (rejected["source"], rejected["reason"]) == ("x.jsonl:2", reason)
    assert detail in rejected["detail"]
    assert (report["rows_read"], report["rows_kept"], report["rejected_by_reason"]) == (43, 42, {reason: 1})
    assert [row["source"] for row in folder.kept("x.jsonl")] == ["x.jsonl:1", "x.jsonl:3"]


def test_multi_turn_rows_of_belle(folder: Folder) -> None:
    row = {"instruction": "Human:你好\nAssistant:你好！\nHuman:写诗\nAssistant:", "input": "", "output": "床前明月光"}
    plain = {"instruction": "Human: is this a prompt?", "output": "yes"}
    folder.write("x.json", lines(row, plain))
    folder.ingest()
    assert [kept["messages"] for kept in folder.kept("x.json")] == [
        [user("你好"), assistant("你好！"), user("写诗"), assistant("床前明月光")],
        [user("Human: is this a prompt?"), assistant("yes")],
    ]


def test_sharegpt_and_messages_tool_calls_give_the_same_row(folder: Folder) -> None:
    tool = {"name": "add", "parameters": {}}
    call = {"name": "add", "arguments": {"a": 1}}
    sharegpt = {
        "tools": json.dumps([tool]),
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "function_call", "value": json.dumps(call)},
            {"from": "observation", "value": "2"},
            {"from": "gpt", "value": "two"},
        ],
    }
    messages = {
        "tools": [{"type": "function", "function": tool}],
        "messages": [
            user("q"),
            {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]},
            {"role": "tool", "content": "2"},
            assistant("two"),
        ],
    }
    folder.write("x.jsonl", lines(sharegpt))
    folder.ingest()
    (kept,) = folder.kept("x.jsonl")
    assert (kept["messages"], kept["tools"]) == (messages["messages"], messages["tools"])
    folder.write("y.jsonl", lines(messages))
    assert folder.ingest()["rejected_by_reason"] == {"duplicate": 1}


def test_renamed_columns_and_formats_by_file(folder: Folder) -> None:
    (folder.raw / "filler.json").unlink()
    folder.write("a.jsonl", lines(*({"q": f"question {n}", "a": f"answer {n}"} for n in range(40))))
    folder.write(
        "b/chat.jsonl", lines({"turns": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "q": "x"})
    )
    columns = COLUMNS | {"instruction": "q", "output": "a", "conversations": "turns"}
    report = folder.ingest(columns=columns, formats={"b/*": "alpaca"})
    assert report["rejected_by_reason"] == {"missing_field": 1}
    report = folder.ingest(columns=columns)
    assert report["files"]["b/chat.jsonl"] == {"rows_kept": 1, "rows_read": 1, "sharegpt": 1}
    assert report["files"]["a.jsonl"] == {"alpaca": 40, "rows_kept": 40, "rows_read": 40}


def test_a_group_and_a_prompt_are_each_in_one_split_only(folder: Folder) -> None:
    (folder.raw / "filler.json").unlink()
    rows = [{"instruction": f"q{n}", "output": f"a{n}", "customer": n // 4} for n in range(200)]
    shared = [{"instruction": "same", "output": f"o{n}", "customer": n} for n in range(50)]
    folder.write("x.jsonl", lines(*rows, *shared))
    report = folder.ingest(group_by="customer")
    for split in ("train", "validation", "test"):
        numbers = [
            int(row["messages"][0]["content"][1:]) // 4 for row in folder.rows(split) if row["source"] <= "x.jsonl:200"
        ]
        others = [row for other in {"train", "validation", "test"} - {split} for row in folder.rows(other)]
        groups = {int(r["messages"][0]["content"][1:]) // 4 for r in others if r["messages"][0]["content"] != "same"}
        assert not set(numbers) & groups
    assert report["rejected_by_reason"]["prompt_in_another_split"] > 0
    assert report["leaked_prompts"] == 0
    folder.write("y.jsonl", lines({"instruction": "x", "output": "y"}))
    assert folder.ingest(group_by="customer")["rejected_by_reason"]["missing_field"] == 1


@pytest.mark.parametrize("how", ["off", "count", "drop"])
def test_near_duplicates(folder: Folder, how: str) -> None:
    (folder.raw / "filler.json").unlink()
    base = "the quick brown fox jumps over the lazy dog while the sun sets behind the hills and the river runs on "
    rows = [{"instruction": f"{base * 2}{base[:n]}{n:04d}", "output": f"{base}{n:04d}"} for n in range(30)]
    folder.write("near.jsonl", lines(*rows))
    folder.write(
        "far.jsonl", lines(*({"instruction": hashlib.sha256(str(n).encode()).hexdigest(), "output": "x"} for n in range(30)))
    )
    report = folder.ingest(near_duplicates=how)
    if how == "off":
        assert "near_duplicates" not in report
    if how == "count":
        assert report["near_duplicates"] > 20
        assert report["near_duplicate_leaks"] > 0
        assert report["rows_rejected"] == 0
    if how == "drop":
        assert report["rejected_by_reason"]["near_duplicate"] == report["near_duplicates"] > 20
        assert report["near_duplicate_leaks"] == 0
        assert len(folder.kept("far.jsonl")) == 30


def test_reject_placeholders_rejects_unfilled_placeholders(folder: Folder) -> None:
    folder.write(
        "x.jsonl", lines({"instruction": "Dear {{ name }}", "output": "Hi"}, {"instruction": "{{}} {x}", "output": "Hi"})
    )
    assert folder.ingest()["rows_rejected"] == 0
    assert folder.ingest(reject_placeholders=True)["rejected_by_reason"] == {"placeholder": 1}


def test_openai_tool_call_arguments_and_weights(folder: Folder) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": '{"q": "x"}'}}
    turns = [
        user("q"),
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "2"},
        assistant("a"),
    ]
    folder.write("x.jsonl", lines({"messages": turns, "system": "s"}))
    folder.write(
        "y.jsonl",
        lines({"messages": [user("q"), assistant("a") | {"weight": 0}, user("r"), assistant("b") | {"weight": 1}]}),
    )
    folder.ingest()
    (kept,) = folder.kept("x.jsonl")
    assert kept["messages"][0] == {"role": "system", "content": "s"}
    assert kept["messages"][2]["tool_calls"][0]["function"]["arguments"] == {"q": "x"}
    assert [message.get("train", True) for message in folder.kept("y.jsonl")[0]["messages"]] == [True, False, True, True]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": [user("q"), assistant("a") | {"weight": 0.5}]}, "wrong_type"),
        ({"messages": [user("q") | {"tool_calls": [{"name": "f"}]}, assistant("a")]}, "roles_out_of_order"),
        ({"messages": [user("q"), assistant("a")], "tools": [{"type": "function", "function": "x"}]}, "wrong_type"),
        ({"messages": [user("q"), assistant("a")], "tools": [{"name": "f", "description": "\ud83d"}]}, "bad_encoding"),
        ({"messages": [user("q"), assistant("") | {"tool_calls": [{"name": "f", "arguments": "{"}]}]}, "wrong_type"),
    ],
)
def test_invalid_tools_and_weights_are_rejected(folder: Folder, row: dict[str, Any], reason: str) -> None:
    folder.write("x.jsonl", json.dumps(row) + "\n")
    assert folder.ingest()["rejected_by_reason"] == {reason: 1}


def test_links_to_folders_and_broken_links_are_reported(folder: Folder) -> None:
    (folder.root / "elsewhere").mkdir()
    (folder.raw / "far").symlink_to(folder.root / "elsewhere")
    (folder.raw / "gone.json").symlink_to(folder.root / "nowhere")
    with pytest.raises(Problem) as caught:
        folder.ingest()
    assert len(caught.value.messages) == 2
    assert all("a link to a folder, or to nothing" in message for message in caught.value.messages)


def test_the_group_of_a_forced_row_follows_it_into_its_split(folder: Folder) -> None:
    (folder.raw / "filler.json").unlink()
    folder.write("a.jsonl", lines(*({"instruction": f"q{n}", "output": "a", "doc": n // 3} for n in range(120))))
    folder.write("test/t.jsonl", lines(*({"instruction": f"t{n}", "output": "a", "doc": n} for n in range(5))))
    folder.ingest(group_by="doc")
    prompts = {row["messages"][0]["content"] for row in folder.rows("test")}
    assert {f"q{n}" for n in range(15)} <= prompts


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*COLUMNS, "from", "value", "role", "content"]), inner)
    ),
    max_leaves=12,
)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    values=st.lists(VALUES, max_size=5),
    junk=st.binary(max_size=60),
    as_array=st.booleans(),
    params=st.sampled_from(
        [
            {},
            {"reject_placeholders": True},
            {"near_duplicates": "drop"},
            {"group_by": "system"},
            {"formats": {"*": "sharegpt"}},
        ]
    ),
)
def test_any_file_content_is_accounted_for_without_a_traceback(
    folder: Folder, values: list[Any], junk: bytes, as_array: bool, params: dict[str, Any]
) -> None:
    text = json.dumps(values) if as_array else "\n".join(map(json.dumps, values))
    folder.write("fuzz.json", text.encode("utf-8", "surrogatepass") + b"\n" + junk)
    if params.get("group_by"):
        folder.write("filler.json", json.dumps([row | {"system": str(n)} for n, row in enumerate(FILLER)]))
    try:
        report = folder.ingest(**params)
    except Problem as problem:
        # Rows of another format leave a split empty, and a file without any JSON is refused as a whole.
        if "no rows for" not in str(problem) and "fuzz.json: no JSON in its first lines" not in str(problem):
            raise
        return
    kept = sum(len(folder.rows(split)) for split in ("train", "validation", "test"))
    assert report["rows_read"] == kept + len(folder.rows("rejected"))
    assert {row["source"] for row in folder.rows("rejected")} & {row["source"] for row in folder.kept("")} == set()


def test_only_the_row_with_invalid_utf8_is_rejected(folder: Folder) -> None:
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
def test_a_truncated_array_keeps_the_rows_before_the_break(folder: Folder, text: str, kept: int, why: str) -> None:
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
def test_array_or_json_lines_is_detected_from_the_content(folder: Folder, name: str, shape: str, bom: bytes) -> None:
    data = bom + (lines(BELLE) if shape == "lines" else json.dumps([BELLE])).encode()
    folder.write(name, gzip.compress(data) if name.endswith(".gz") else data)
    assert folder.ingest()["rows_rejected"] == 0
    assert [row["source"] for row in folder.kept(name)] == [f"{name}:1"]


def test_new_rows_do_not_move_old_rows(folder: Folder) -> None:
    folder.ingest()
    before = {split: {row["id"] for row in folder.rows(split)} for split in ("train", "validation", "test")}
    assert all(before.values())
    folder.write("a.jsonl", lines(*({"instruction": f"new {n}", "output": "x"} for n in range(30))))
    folder.ingest()
    for split, ids in before.items():
        assert ids < {row["id"] for row in folder.rows(split)}


def test_a_different_split_seed_gives_a_different_split(folder: Folder) -> None:
    folder.ingest()
    before = [row["id"] for row in folder.rows("test")]
    folder.ingest(split_seed=1)
    assert [row["id"] for row in folder.rows("test")] != before


def test_prompts_that_differ_only_in_case_width_or_spaces_share_a_split(folder: Folder) -> None:
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
def test_a_folder_forces_its_split_and_its_prompts_leave_train(folder: Folder, split: str) -> None:
    folder.write(f"{split}/own.jsonl", lines(*({"instruction": f"question {n}", "output": "other"} for n in range(40))))
    folder.write("more.jsonl", lines(*({"instruction": f"more {n}", "output": "x"} for n in range(40))))
    folder.ingest()
    prompts = {row["messages"][0]["content"] for row in folder.rows("train")}
    assert not prompts & {f"question {n}" for n in range(40)}
    assert {row["source"] for row in folder.kept(split)} == {row["source"] for row in folder.rows(split)} & {
        f"{split}/own.jsonl:{n}" for n in range(1, 41)
    }


def test_too_many_rejections_fail_with_the_first_row_of_each_reason(folder: Folder) -> None:
    folder.write("x.jsonl", lines({"a": 1}, {"a": 2}, {"instruction": "a", "output": ""}))
    with pytest.raises(Problem) as caught:
        folder.ingest(max_rejected_percent=5)
    assert caught.value.messages[:-1] == (
        "params.yaml: ingest.max_rejected_percent: 3 of 43 rows (7.0 %) were rejected, the limit is 5 %; correct the "
        "rows, or raise it if they may be left out",
        "empty_answer: 1 rejected, the first is x.jsonl:3: ''",
        "unknown_format: 2 rejected, the first is x.jsonl:1: fields a; none of them looks like a text, a question with its "
        "answer, or a list of turns",
    )
    assert caught.value.messages[-1].endswith("(removed when this stage succeeds)")
    assert not (folder.root / "examples").exists()


def test_a_file_that_would_be_ignored_is_an_error(folder: Folder) -> None:
    folder.write("table.xlsx", "a,b")
    folder.write(".hidden", "")
    folder.write("big.jsonl.dvc", "outs: []")
    with pytest.raises(Problem, match=r"table\.xlsx: not one of \.json, \.jsonl") as caught:
        folder.ingest()
    assert len(caught.value.messages) == 1


def test_a_truncated_gzip_file_and_an_empty_folder_are_reported(folder: Folder) -> None:
    folder.write("x.jsonl.gz", gzip.compress(lines(BELLE).encode())[:-12])
    folder.ingest()
    assert [(row["reason"], row["detail"]) for row in folder.rows("rejected")] == [
        ("not_json", "the gzip file is truncated")
    ]
    for file in folder.raw.iterdir():
        file.unlink()
    with pytest.raises(Problem, match=r"raw: no \.json, .* file found; put your data there"):
        folder.ingest()


def test_splits_without_rows_are_an_error(folder: Folder) -> None:
    with pytest.raises(Problem) as caught:
        folder.ingest(validation_percent=0, test_percent=0)
    assert caught.value.messages[:-1] == (
        "params.yaml: ingest.validation_percent: no rows for validation; add data, or raise it",
        "params.yaml: ingest.test_percent: no rows for test; add data, or raise it",
    )
    with pytest.raises(Problem, match=r"params\.yaml: ingest: no rows for train; add data, or lower validation_percent"):
        folder.ingest(validation_percent=0, test_percent=99)


def test_the_removed_parameter_is_explained() -> None:
    with pytest.raises(Problem) as caught:
        parse_section("ingest", Params, PARAMS | {"near_duplicate_similarity": 0.85})
    assert caught.value.messages == ("params.yaml: ingest.near_duplicate_similarity: removed; it is 0.85 now",)


def test_names_with_spaces_parentheses_quotes_and_chinese(tmp_path: Path) -> None:
    name = """问答 (1) 'old' "new" [a] $x; %s #"""
    folder = Folder(tmp_path, f"raw {name}")
    folder.write(f"{name}.jsonl", lines({"instruction": "plain", "output": "x"}))
    folder.write(f"{name}/{name}.json.gz", gzip.compress(lines({"instruction": "zipped", "output": "x"}).encode()))
    folder.write(f"test/{name}.json", json.dumps([{"instruction": "forced", "output": "x"}]))
    folder.write("bad (2).jsonl", "{\n")
    report = folder.ingest(formats={"问答 (1) *": "alpaca"})
    assert [row["source"] for row in folder.kept(name)] == [f"{name}.jsonl:1", f"{name}/{name}.json.gz:1"]
    assert f"test/{name}.json:1" in {row["source"] for row in folder.rows("test")}
    assert [row["source"] for row in folder.rows("rejected")] == ["bad (2).jsonl:1"]
    assert report["files"][f"{name}/{name}.json.gz"] == {"alpaca": 1, "rows_kept": 1, "rows_read": 1}
    with pytest.raises(Problem) as caught:
        folder.ingest(max_rejected_percent=0)
    assert caught.value.messages[1].startswith("not_json: 1 rejected, the first is bad (2).jsonl:1: Expecting")


# Files of every kind


def row(text: str) -> dict[str, str]:
    return {"instruction": text, "output": "x"}


def test_csv_parquet_and_json_in_any_encoding_give_the_same_rows(folder: Folder) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    text = "instruction,output\n问题,答案\n"
    wanted = [[user("问题"), assistant("答案")]]
    files = {
        "a.csv": text.encode(),
        "b.csv": text.encode("utf-16"),
        "c.csv.gz": gzip.compress(text.encode("utf-8-sig")),
        "d.tsv": text.replace(",", "\t").encode(),
        "e.json": json.dumps({"instruction": "问题", "output": "答案"}, ensure_ascii=False, indent=2).encode("utf-16"),
        "f.jsonl": lines({"instruction": "问题", "output": "答案"}).encode("utf-16-le"),
    }
    pq.write_table(pa.table({"instruction": ["问题"], "output": ["答案"]}), folder.root / "g.parquet")
    files["g.parquet"] = (folder.root / "g.parquet").read_bytes()
    for name, data in files.items():
        folder.write(name, data)
        assert folder.ingest()["rows_rejected"] == 0
        assert [kept["messages"] for kept in folder.kept(name)] == wanted
        assert [kept["source"] for kept in folder.kept(name)] == [f"{name}:1"]
        (folder.raw / name).unlink()


def test_a_row_of_a_table_that_cannot_be_read_is_counted_by_its_format(folder: Folder) -> None:
    folder.write("x.csv", b'instruction,output\na,b\nc\nd,\xff\ne,"f\ng,h\n')
    report = folder.ingest()
    assert report["rejected_by_reason"] == {"not_csv": 2, "bad_encoding": 1}
    found = {rejected["source"]: rejected for rejected in folder.rows("rejected")}
    assert found["x.csv:2"] == {
        "source": "x.csv:2",
        "reason": "not_csv",
        "detail": "the header has 2 cells, this row only 1",
        "raw": "c",
    }
    assert set(found) == {"x.csv:2", "x.csv:3", "x.csv:4"}
    assert [kept["source"] for kept in folder.kept("x.csv")] == ["x.csv:1", "x.csv:5"]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("x.json", b"PAR1...", "it is a Parquet file; name it .parquet"),
        ("x.json", gzip.compress(b"{}"), "it is compressed with gzip; add .gz to its name"),
        ("x.csv", b"PK\x03\x04...", "it is a zip archive or an Excel file"),
        ("x.jsonl", b"version https://git-lfs.github.com/spec/v1\n", "get the data with: git lfs pull"),
        ("x.jsonl", b"instruction,output\na,b\n", "no JSON in its first lines, which begin with 'instruction,output'"),
        ("x.jsonl", b"{'instruction': 'a', 'output': 'b'}\n" * 3, "Python's notation, with single quotes"),
        ("x.json", ('[{"instruction": "' + "给定一个句子翻译成中文" * 9 + '"}]').encode("gbk"), "it looks like GB18030"),
        (
            "x.csv",
            ("问题,答案\n" + "给定一个句子,翻译成中文\n" * 9).encode("gbk"),
            "iconv -f GB18030 -t UTF-8 x.csv > new.x.csv",
        ),
        ("x.json", ('["' + "請將這句話翻譯成英文，謝謝您的幫助" * 9 + '"]').encode("big5"), "iconv -f BIG5"),
        ("x.csv", ("问题,答案\n" * 9).encode("utf-16-le"), "it looks like UTF-16-LE"),
        ("x.csv", b"", "empty; a CSV file begins with a line"),
        ("x.csv", b"a,a\n1,2\n", "two columns have the name 'a'"),
        ("x.parquet", b"a,b\n", "not a complete Parquet file"),
        ("README.txt", b"About", "move or rename it"),
    ],
)
def test_a_file_of_another_format_or_encoding_is_said_once(folder: Folder, name: str, data: bytes, message: str) -> None:
    folder.write(name, data)
    with pytest.raises(Problem) as caught:
        folder.ingest()
    (said,) = caught.value.messages
    assert said.startswith(f"{folder.raw / name}: ")
    assert message in said


def test_damaged_characters_in_chinese_utf8_are_no_other_encoding(folder: Folder) -> None:
    good = [{"instruction": f"给定一个英文句子，翻译成中文 {n}", "output": "我喜欢学习"} for n in range(20)]
    folder.write("x.jsonl", lines(*good).encode() + b'{"instruction": "\xff\xfe\xfd", "output": "b"}\n' * 12)
    assert folder.ingest()["rejected_by_reason"]["bad_encoding"] == 12


def test_a_text_file_is_one_document(folder: Folder) -> None:
    files, problems = find_files(folder.raw, folder.hub)
    assert problems == []
    folder.write("book.txt", "第一章\n\n第二章\r\n".encode("utf-16"))
    folder.write("notes.txt.gz", gzip.compress(b"\xef\xbb\xbfone\ntwo"))
    folder.write("cut.txt.gz", gzip.compress(b"one\ntwo")[:-6])
    files, _ = find_files(folder.raw, folder.hub)
    rows = {read.source: read.value for read in read_rows(files, formats={}) if "txt" in read.file}
    assert rows == {
        "book.txt:1": {"text": "第一章\n\n第二章\r\n"},
        "notes.txt.gz:1": {"text": "one\ntwo"},
        "cut.txt.gz:1": Broken("one\ntwo", "the gzip file is truncated", "not_text"),
    }


# Splits by name


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("data_test.json", "test"),
        ("test-00000-of-00001.parquet", "test"),
        ("Test.jsonl", "test"),
        ("zh.dev.csv", "validation"),
        ("val.jsonl.gz", "validation"),
        ("valid/x.json", "validation"),
        ("zh/Validation/train.json", "validation"),
        ("test/validation.json", "test"),
        ("train.jsonl", "train"),
        ("train/test.json", "train"),
        ("latest.json", ""),
        ("contest/x.json", ""),
        ("my-test/x.json", ""),
        ("train_test.json", ""),
        ("eval.json", ""),
        ("x.test", ""),
    ],
)
def test_the_split_of_a_name(path: str, split: str) -> None:
    assert split_of_path(PurePosixPath(path)) == split


def test_with_sets_of_ones_own_nothing_is_taken_from_the_other_files(
    folder: Folder, capsys: pytest.CaptureFixture[str]
) -> None:
    folder.write("train.jsonl", lines(*(row(f"train {n}") for n in range(100))))
    folder.ingest()
    assert capsys.readouterr().out == ""
    homes = {split for split in ("train", "validation", "test") for kept in folder.rows(split) if "train" in kept["source"]}
    assert homes == {"train", "validation", "test"}  # with train alone, both are taken from it

    folder.write("data_test.json", lines(*(row(f"test {n}") for n in range(5))))
    folder.ingest()
    assert {kept["source"].split(":")[0] for kept in folder.rows("test")} == {"data_test.json"}
    assert {kept["source"].split(":")[0] for kept in folder.rows("validation")} == {"filler.json", "train.jsonl"}
    assert capsys.readouterr().out == "ingest: test: by name, the rows of data_test.json; test_percent takes no others\n"

    for name in ("a", "b", "c", "d"):
        folder.write(f"dev/{name}.jsonl", lines(row(f"dev {name}")))
    folder.ingest(validation_percent=0)
    assert sorted(kept["source"] for kept in folder.rows("validation")) == [f"dev/{name}.jsonl:1" for name in "abcd"]
    assert capsys.readouterr().out.splitlines()[1] == (
        "ingest: validation: by name, the rows of dev/a.jsonl, dev/b.jsonl, dev/c.jsonl and 1 more; validation_percent "
        "takes no others"
    )


def test_lists_of_one_file_go_where_their_names_say_and_test_comes_first(folder: Folder) -> None:
    value = {"train": [row("a"), row("same")], "validation": [row("b")], "test": [row("Same "), row("c")]}
    folder.write("all.json", json.dumps(value))
    folder.ingest()
    assert [kept["source"] for kept in folder.rows("test")] == ["all.json:test:1", "all.json:test:2"]
    assert [kept["source"] for kept in folder.rows("validation")] == ["all.json:validation:1"]
    assert {"all.json:train:1"} <= {kept["source"] for kept in folder.rows("train")}
    assert [(rejected["source"], rejected["reason"]) for rejected in folder.rows("rejected")] == [
        ("all.json:train:2", "duplicate")
    ]


def test_data_sets_of_the_hub_are_read_beside_the_raw_files(folder: Folder) -> None:
    for split, name in (("train_sft", "a.jsonl"), ("test_sft", "b.jsonl")):
        path = folder.hub / "owner--test" / split / name
        path.parent.mkdir(parents=True)
        path.write_text(lines(row(split)))
    report = folder.ingest(formats={"hub/owner--test/*": "alpaca"})
    assert [kept["source"] for kept in folder.rows("test")] == ["hub/owner--test/test_sft/b.jsonl:1"]
    assert report["files"]["hub/owner--test/train_sft/a.jsonl"]["alpaca"] == 1
    (folder.raw / "filler.json").unlink()
    with pytest.raises(Problem, match="no rows for validation"):  # and not: no files
        folder.ingest()


def test_percentages_that_leave_nothing_to_train_on_are_refused_at_once(folder: Folder) -> None:
    folder.write("x.csv", "")
    with pytest.raises(Problem) as caught:
        folder.ingest(validation_percent=60, test_percent=40)
    assert caught.value.messages[0] == (
        "params.yaml: ingest.test_percent: 40, and validation_percent 60, leave nothing to train on; lower one so that they "
        "are below 100 together"
    )
    assert len(caught.value.messages) == 2


def test_an_empty_folder_says_what_is_read(folder: Folder) -> None:
    (folder.raw / "filler.json").unlink()
    with pytest.raises(Problem) as caught:
        folder.ingest()
    (message,) = caught.value.messages
    for suffix in (".jsonl", ".parquet", ".csv", ".txt", "fetch_data.datasets"):
        assert suffix in message


def test_a_field_with_a_name_that_utf8_cannot_encode_is_counted(folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    folder.write("x.jsonl", r'{"instruction": "q", "output": "a", "no\ud800te": "x"}')
    assert folder.ingest()["unread_fields"] == {r"no\ud800te": {"rows": 1, "first": "x.jsonl:1"}}
    assert r"no\ud800te is not read: 1 row" in capsys.readouterr().out


def test_fields_whose_names_are_ids_are_counted_together_beyond_a_thousand(folder: Folder) -> None:
    rows = [{"instruction": f"q{n}", "output": "a", f"key{n}": "x", f"key{n}b": "x", "note": "x"} for n in range(700)]
    folder.write("x.jsonl", lines(*rows))
    unread = folder.ingest()["unread_fields"]
    assert len(unread) == 1001
    assert unread["note"]["rows"] == 700
    assert sum(found["rows"] for name, found in unread.items() if name.startswith("key")) == 999
    assert unread["(further fields)"] == {"rows": 201, "first": "x.jsonl:500"}


def test_a_number_too_large_for_json_is_not_trained_as_null(folder: Folder) -> None:
    call = r'{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"n": 1e999}}}]}'
    folder.write("x.jsonl", f'{{"messages": [{{"role": "user", "content": "q"}}, {call}]}}')
    assert folder.ingest()["rejected_by_reason"] == {"wrong_type": 1}


def test_a_text_file_of_json_lines_is_no_text_and_an_empty_file_is_named(
    folder: Folder, capsys: pytest.CaptureFixture[str]
) -> None:
    folder.write("empty.jsonl", "")
    folder.ingest()
    assert "ingest: empty.jsonl: an empty file; it has no rows\n" in capsys.readouterr().out
    folder.write("x.txt", lines(*FILLER))
    with pytest.raises(Problem, match=r"it begins with a JSON object, .* name it \.jsonl"):
        folder.ingest()


def test_files_that_are_all_held_out_by_name_leave_nothing_to_train_on(folder: Folder) -> None:
    (folder.raw / "filler.json").rename(folder.raw / "my_test_data.json")
    with pytest.raises(Problem, match="no rows for train: the names of all files say validation or test; rename one"):
        folder.ingest()


def test_a_file_of_evaluation_is_named(folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    folder.write("my_eval.jsonl", lines({"instruction": "q", "output": "a"}))
    folder.ingest()
    assert "ingest: my_eval.jsonl: `eval` may mean validation or test;" in capsys.readouterr().out


def test_a_side_of_which_there_is_no_row_is_named(folder: Folder) -> None:
    (folder.raw / "filler.json").unlink()
    folder.write("x.jsonl", lines({"prompt": "q", "completion": "a", "label": False}))
    with pytest.raises(Problem, match="no row has an answer of this side; 1 rows are of the other side"):
        folder.ingest(preference="chosen")
