"""The formats of conversation data: each shape as its documentation has it, and the line for params.yaml where none fits."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from stages.core.problem import Problem, Rejection
from stages.ingest.checks import check_turns
from stages.ingest.columns import PAIRS, USUAL, Names, lookup
from stages.ingest.formats import Conversation, Format, Formats
from stages.ingest.preference import PreferenceFound
from stages.ingest.row import Settings
from tests.test_ingest import Folder, assistant, lines, user


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def read(value: dict[str, Any], *, preference: str = "error", format: Any = None, **columns: str) -> Conversation:
    settings = Settings("\n", {}, preference, (columns.get("role"), columns.get("content")))
    return Formats(Names(columns), settings, group_by="").read(value, format, file="x.jsonl")


def system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


def thinking(thought: str, text: str) -> dict[str, str]:
    return {**assistant(text), "reasoning_content": thought}


def moss_turn(human: str, answer: str, *, thoughts: str = "None", commands: str = "None") -> dict[str, str]:
    return {
        "Human": f"<|Human|>: {human}<eoh>\n",
        "Inner Thoughts": f"<|Inner Thoughts|>: {thoughts}<eot>\n",
        "Commands": f"<|Commands|>: {commands}<eoc>\n",
        "Tool Responses": "<|Results|>: None<eor>\n",
        "MOSS": f"<|MOSS|>: {answer}<eom>\n",
    }


def tree_message(role: str, text: str, *replies: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"message_id": text, "role": role, "text": text, "review_count": 3, "replies": list(replies), **fields}


QA = [user("q"), assistant("a")]
CONTEXT = user("q\nc") | {"instruction": "q", "input": "c"}
OPENAI_TOOL = {"name": "add", "description": "adds", "parameters": {"type": "object", "properties": {}}}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"n": 1}}}
MOSS = {
    "conversation_id": "1",
    "meta_instruction": "You are MOSS.",
    "num_turns": 2,
    "chat": {"turn_2": moss_turn("r", "b", thoughts="Think."), "turn_1": moss_turn("q", "a")},
    "category": "Code",
}
TREE = {
    "message_tree_id": "q",
    "tree_state": "ready_for_export",
    "prompt": tree_message(
        "prompter",
        "q",
        tree_message("assistant", "worse", rank=1),
        tree_message(
            "assistant",
            "better",
            tree_message("prompter", "r"),
            tree_message("prompter", "s", tree_message("assistant", "b", rank=0)),
            rank=0,
        ),
        tree_message("assistant", "deleted", rank=-1, deleted=True),
    ),
}

SHAPES: dict[str, tuple[dict[str, Any], str, list[dict[str, Any]]]] = {
    # instruction and output, and the other names of a question and its answer
    "Alpaca": ({"instruction": "q", "input": "c", "output": "a"}, "alpaca", [CONTEXT, assistant("a")]),
    "Alpaca of LLaMA-Factory": (
        {"instruction": "r", "input": "", "output": "b", "system": "s", "history": [["q", "a"]]},
        "alpaca",
        [system("s"), *QA, user("r"), assistant("b")],
    ),
    "COIG-CQIA": (
        {"instruction": "q", "input": "", "output": "a", "task_type": {"major": ["m"]}, "domain": ["d"], "metadata": None},
        "alpaca",
        QA,
    ),
    "Dolly": ({"instruction": "q", "context": "c", "response": "a", "category": "x"}, "alpaca", [CONTEXT, assistant("a")]),
    "Firefly": ({"kind": "NLI", "input": "q", "target": "a"}, "alpaca", QA),
    "ADGEN of ChatGLM": ({"content": "q", "summary": "a"}, "alpaca", QA),
    "ChatGLM with history": (
        {"prompt": "r", "response": "b", "history": [["q", "a"]]},
        "alpaca",
        [*QA, user("r"), assistant("b")],
    ),
    "history of turns": ({"query": "r", "response": "b", "history": QA}, "alpaca", [*QA, user("r"), assistant("b")]),
    "prompt and completion": ({"prompt": "q", "completion": "a"}, "alpaca", QA),
    "GSM8K": ({"question": "q", "answer": "a"}, "alpaca", QA),
    "upper case": ({"Question": "q", "Answer": "a"}, "alpaca", QA),
    "Human and Assistant": ({"Human": "q", "Assistant": "a"}, "alpaca", QA),
    "MetaMathQA": ({"query": "q", "response": "a", "type": "GSM_AnsAug"}, "alpaca", QA),
    "OpenOrca": (
        {"id": "flan.1", "system_prompt": "s", "question": "q", "response": "a"},
        "alpaca",
        [system("s"), *QA],
    ),
    "Aya": ({"inputs": "q", "targets": "a", "language": "Malay"}, "alpaca", QA),
    "OpenThoughts": (
        {"problem": "q", "deepseek_reasoning": "Think.", "deepseek_solution": "a", "domain": "math", "test_cases": None},
        "alpaca",
        [user("q"), thinking("Think.", "a")],
    ),
    "s1K": (
        {"question": "q", "cot": None, "thinking_trajectories": ["Think."], "attempt": "a", "metadata": "{}"},
        "alpaca",
        [user("q"), thinking("Think.", "a")],
    ),
    "medical-o1": (
        {"Question": "q", "Complex_CoT": "Think.", "Response": "a"},
        "alpaca",
        [user("q"), thinking("Think.", "a")],
    ),
    "R1 distillation": (
        {"input": "q", "content": "a", "reasoning_content": "Think."},
        "alpaca",
        [user("q"), thinking("Think.", "a")],
    ),
    "thinking in the answer": (
        {"instruction": "q", "output": "<think>\nThink.\n</think>\n\na"},
        "alpaca",
        [user("q"), thinking("Think.", "a")],
    ),
    "COIG, exams": (
        {"textbox_q_instruction": "s", "textbox_q_context": "c", "textbox_question": "q", "textbox_answer": "a"},
        "alpaca",
        [system("s"), CONTEXT, assistant("a")],
    ),
    "COIG, translated": (
        {"instruction": "x", "input": "y", "output": "z", "trans_instruction": "q", "trans_input": "c", "trans_output": "a"},
        "alpaca",
        [CONTEXT, assistant("a")],
    ),
    "Chinese names": ({"问题": "q", "答案": "a"}, "alpaca", QA),
    "null is as missing": (
        {"messages": None, "conversations": [], "label": None, "instruction": "q", "input": None, "output": "a"},
        "alpaca",
        QA,
    ),
    "BELLE, several turns": (
        {"instruction": "Human:q\nAssistant:a\nHuman:r\nAssistant:", "input": "", "output": "b"},
        "belle_multiturn",
        [*QA, user("r"), assistant("b")],
    ),
    # lists of turns
    "ShareGPT": ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, "sharegpt", QA),
    "SlimOrca": (
        {
            "conversations": [
                {"from": "system", "value": "s", "weight": None},
                {"from": "human", "value": "q", "weight": 0.0},
                {"from": "gpt", "value": "a", "weight": 1.0},
            ]
        },
        "sharegpt",
        [system("s"), *QA],
    ),
    "OpenThoughts, conversations": (
        {"system": "s", "conversations": [{"from": "user", "value": "q"}, {"from": "assistant", "value": "a"}]},
        "sharegpt",
        [system("s"), *QA],
    ),
    "Magpie": (
        {
            "instruction": "q",
            "response": "a",
            "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
        },
        "sharegpt",
        QA,
    ),
    "OpenAI": (
        {"messages": [*QA[:1], assistant("a") | {"weight": 0}, user("r"), assistant("b") | {"weight": 1}]},
        "messages",
        [QA[0], assistant("a") | {"train": False}, user("r"), assistant("b")],
    ),
    "OpenAI, parts": ({"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, QA[1]]}, "messages", QA),
    "Tulu": ({"id": "x", "messages": QA, "source": "s"}, "messages", QA),
    "UltraChat 200k, No Robots": ({"prompt": "q", "prompt_id": "1", "messages": QA, "category": "x"}, "messages", QA),
    "LMSYS": ({"conversation_id": "1", "model": "m", "conversation": QA, "turn": 1}, "messages", QA),
    **{
        name: ({name: QA}, "messages", QA)
        for name in ("conversations", "conversation", "dialogue", "dialog", "turns", "chat", "Messages")
    },
    "Capybara": ({"source": "x", "conversation": [{"input": "q", "output": "a"}]}, "messages", QA),
    "ShareGPT in Chinese": ({"conversation": [{"human": "q", "assistant": "a"}]}, "messages", QA),
    "COIG": (
        {"instruction": "s", "conversations": [{"question": "q", "answer": "a"}]},
        "coig",
        [system("s"), *QA],
    ),
    "UltraChat": ({"id": "0", "data": ["q", "a", "r", "b"]}, "text_list", [*QA, user("r"), assistant("b")]),
    "LIMA": ({"conversations": ["q", "a"], "source": "stackexchange"}, "text_list", QA),
    "TRL, conversational": ({"prompt": QA[:1], "completion": QA[1:]}, "prompt_completion", QA),
    "CSV with the JSON text of turns": ({"messages": json.dumps(QA)}, "messages", QA),
    # formats of their own
    "MOSS": (MOSS, "moss", [system("You are MOSS."), *QA, user("r"), thinking("Think.", "b")]),
    "MOSS 002": (
        {
            "id": 1,
            "prefix": "s",
            "plain_text": "[Human]: q<eoh> [MOSS]: a<eoa>\n[Human]: r <eoh> [MOSS]: b <eoa>",
            "num_turns": 2,
        },
        "moss",
        [system("s"), *QA, user("r"), assistant("b")],
    ),
    "Gemini": (
        {
            "systemInstruction": {"role": "system", "parts": [{"text": "s"}]},
            "contents": [{"role": "user", "parts": [{"text": "q"}]}, {"role": "model", "parts": [{"text": "a"}]}],
        },
        "messages",
        [system("s"), *QA],
    ),
    "Bedrock": (
        {
            "system": [{"text": "s"}],
            "messages": [{"role": "user", "content": [{"text": "q"}]}, {"role": "assistant", "content": [{"text": "a"}]}],
        },
        "messages",
        [system("s"), *QA],
    ),
    "OpenAssistant": (TREE, "oasst", [user("q"), assistant("better"), user("s"), assistant("b")]),
    "guanaco": (
        {"text": "### Human: q### Assistant: a\n### Human: r### Assistant: b\nb"},
        "guanaco",
        [*QA, user("r"), assistant("b\nb")],
    ),
    "OIG": ({"text": "<human>: q\n<bot>: a", "metadata": {"source": "x"}}, "guanaco", QA),
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_documented_shape_becomes_messages(name: str) -> None:
    row, format, messages = SHAPES[name]
    found = read(row)
    assert (found.format, found.messages, found.text) == (format, messages, None)


@pytest.mark.parametrize(("question", "answer"), PAIRS)
def test_each_usual_pair_of_names_is_read(question: str, answer: str) -> None:
    assert read({question: "q", answer: "a"}).messages == QA
    assert read({answer.upper(): "a", question.title(): "q"}).messages == QA


def test_tools_and_functions_reach_the_row() -> None:
    words = {"role": "assistant", "content": "", "function_call": {"name": "add", "arguments": '{"n": 1}'}}
    found = read({"messages": [user("q"), words], "functions": [OPENAI_TOOL]})
    assert found.tools == [{"type": "function", "function": OPENAI_TOOL}]
    assert found.messages == [user("q"), assistant("") | {"tool_calls": [CALL]}]
    tools = json.dumps([OPENAI_TOOL])
    found = read({"id": 1, "query": "q", "answers": '[{"name": "add", "arguments": {"n": 1}}]', "tools": tools})
    assert (found.format, found.messages) == ("xlam", [user("q"), assistant("") | {"tool_calls": [CALL]}])


def test_raw_text(folder: Folder) -> None:
    texts = [{"text": f"a document of its own {n}\n\n", "url": "u"} for n in range(40)]
    long = {"text": "x" * 5000}
    folder.write("t.jsonl", lines(*texts, long, {"text": " "}, {"text": "A document of  its own 3"}))
    report = folder.ingest(max_chars=100)
    kept = folder.kept("t.jsonl")
    assert len(kept) == 41
    row = next(row for row in kept if row["source"] == "t.jsonl:1")
    assert list(row) == ["id", "source", "format", "text"]
    assert (row["format"], row["text"]) == ("text", texts[0]["text"])
    assert report["rejected_by_reason"] == {"duplicate": 1, "empty_text": 1}
    assert report["files"]["t.jsonl"]["text"] == 41
    assert all(any(row["source"].startswith("t") for row in folder.rows(split)) for split in ("train", "validation", "test"))
    folder.write("t.jsonl", json.dumps({"content": "print()", "path": "x.py"}) + "\n")
    folder.ingest(columns={"text": "content"})
    assert [row["text"] for row in folder.kept("t.jsonl")] == ["print()"]


@pytest.mark.parametrize(
    "row",
    [
        {"text": "t", "summary": "s"},
        {"text": "t", "prompt": "p"},
        {"text": "t", "output": "o", "score": 1},
    ],
)
def test_a_text_beside_an_answer_is_not_raw_text(row: dict[str, Any]) -> None:
    with pytest.raises(Rejection) as caught:
        read(row)
    assert caught.value.reason in ("unknown_format", "missing_field")


def test_unread_fields_are_counted_by_name(folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"instruction": f"q{n}", "output": "a", "score": n, "id": n, "note": "" if n else "x"} for n in range(2)]
    folder.write("x.jsonl", lines(*rows, {"messages": [user("m"), assistant("a") | {"mood": "good"}], "prompt": "m"}))
    report = folder.ingest()
    assert report["unread_fields"] == {
        "messages[].mood": {"rows": 1, "first": "x.jsonl:3"},
        "note": {"rows": 1, "first": "x.jsonl:1"},
        "score": {"rows": 2, "first": "x.jsonl:1"},
    }
    assert capsys.readouterr().out.splitlines() == [
        "ingest: score is not read: 2 rows, the first is x.jsonl:1",
        "ingest: messages[].mood is not read: 1 row, the first is x.jsonl:3",
        "ingest: note is not read: 1 row, the first is x.jsonl:1",
    ]
    folder.write("x.jsonl", lines({"instruction": "q", "output": "a", **{f"field{n:02}": "x" for n in range(14)}}))
    folder.ingest()
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 11
    assert printed[-1] == "ingest: 4 more fields are not read; the report lists them"


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({"instruction": "q", "output": "a", "image": "x.png"}, "image"),
        ({"messages": QA, "images": ["x.png"]}, "images"),
        ({"text": "t", "label": 1}, "label"),
        ({"question": "q", "context": {"sentences": ["c"]}, "answer": "a"}, "context"),
        ({"messages": [user("q"), assistant("a") | {"loss_weight": 0.5}]}, "loss_weight"),
    ],
)
def test_a_field_that_changes_the_meaning_rejects_the_row(row: dict[str, Any], field: str) -> None:
    with pytest.raises(Rejection) as caught:
        read(row)
    assert field in str(caught.value)


def test_the_replies_beside_the_best_path_of_a_tree_are_counted() -> None:
    assert read(TREE).unread == ["prompt.replies[] (not ranked first)"] * 2
    flat = {"message_id": "1", "parent_id": None, "text": "q", "role": "prompter", "message_tree_id": "1", "rank": None}
    with pytest.raises(Rejection, match="one message of OpenAssistant's trees, not a conversation; use the file of trees"):
        read(flat)
    question = {"prompt": tree_message("prompter", "q", tree_message("assistant", "a", tree_message("prompter", "r")))}
    found = read(question)
    assert (found.messages, found.unread) == (QA, ["prompt.replies[] (a question without a reply)"])


def test_calls_of_moss_plugins_are_rejected_by_name() -> None:
    with pytest.raises(Rejection, match=r"chat\.turn_1\.Commands: calls of MOSS's plugins"):
        read({"chat": {"turn_1": moss_turn("q", "a", commands='Search("x")')}})


NAMES = sorted({name for names in USUAL.values() for name in names} | {"role", "content", "from", "value", "replies"})
TEXTS = ("", "q", "### Human: q ### Assistant: a", "<think>", "[1]", "a.b")
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.sampled_from(TEXTS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=4),
    max_leaves=10,
)


@settings(max_examples=200, deadline=None)
@given(
    value=st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=3), VALUES, max_size=5),
    format=st.sampled_from([None, *get_args(Format)]),
    preference=st.sampled_from(["error", "chosen", "rejected"]),
    columns=st.sampled_from([{}, {"instruction": "chat.0", "output": "prompt.text"}, {"messages": "data", "role": "value"}]),
)
def test_any_row_is_read_or_rejected(value: Any, format: Any, preference: str, columns: dict[str, str]) -> None:
    with contextlib.suppress(Rejection, PreferenceFound):
        found = read(value, format=format, preference=preference, **columns)
        check_turns(found.messages)
        assert all(isinstance(message["content"], str) for message in found.messages)


# Where no format fits


UNKNOWN: list[tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]]]] = [
    ({"id": 1, "frage": "q", "antwort": "a"}, {"columns": {"instruction": "frage", "output": "antwort"}}, QA),
    ({"pregunta": "q", "respuesta": "a"}, {"columns": {"instruction": "pregunta", "output": "respuesta"}}, QA),
    ({"left": "q", "right": "a"}, {"columns": {"instruction": "left", "output": "right"}}, QA),
    ({"data_": {"q text": "q", "a: 1": "a"}}, {"columns": {"instruction": "data_.q text", "output": "data_.a: 1"}}, QA),
    (
        {"id": "1", "title": "T", "context": "c", "question": "q", "answers": {"text": ["a"], "answer_start": [0]}},
        {"columns": {"instruction": "question", "input": "context", "output": "answers.text.0"}},
        [user("qc") | {"instruction": "q", "input": "c"}, assistant("a")],
    ),
    ({"article": "q", "highlights": "a"}, {"columns": {"instruction": "article", "output": "highlights"}}, QA),
    ({"text": "q", "summary": "a"}, {"columns": {"instruction": "text", "output": "summary"}}, QA),
    ({"log": {"lines": QA}}, {"columns": {"messages": "log.lines"}}, QA),
    (
        {"instruction": "q", "instances": [{"input": "", "output": "a"}]},
        {"columns": {"instruction": "instruction", "output": "instances.0.output"}},
        QA,
    ),
    (
        {"id": 1, "sql_prompt": "q", "sql_context": "c", "sql": "a"},
        {"columns": {"instruction": "sql_prompt", "input": "sql_context", "output": "sql"}},
        [user("qc") | {"instruction": "q", "input": "c"}, assistant("a")],
    ),
    (
        {"log": [{"speaker_name": "Kunde", "line": "q"}, {"speaker_name": "Beraterin", "line": "a"}]},
        {"columns": {"messages": "log", "role": "speaker_name", "content": "line"}},
        [],
    ),
]


def written(message: str) -> dict[str, Any]:
    """The value of the line that a message says to write below ingest."""
    line = message.split("write into params.yaml, below ingest: ")[1]
    value: dict[str, Any] = YAML(typ="safe", pure=True).load(io.StringIO(line))
    return value


@pytest.mark.parametrize(("row", "line", "messages"), UNKNOWN, ids=lambda value: json.dumps(value)[:40])
def test_the_message_says_the_line_to_write_and_the_line_works(
    folder: Folder, row: dict[str, Any], line: dict[str, Any], messages: list[dict[str, Any]]
) -> None:
    folder.write("x.jsonl", lines(row, row))
    with pytest.raises(Problem) as caught:
        folder.ingest(max_rejected_percent=0, columns={})
    assert "2 rejected, the first is x.jsonl:1: " in caught.value.messages[1]
    found = written(caught.value.messages[1])
    assert found == line
    if not messages:  # its roles are unknown too: the next message says the next line
        with pytest.raises(Problem) as caught:
            folder.ingest(max_rejected_percent=0, **found)
        found |= written(caught.value.messages[1])
        assert found["roles"] == {"Kunde": "user", "Beraterin": "assistant"}
        messages = QA
    folder.ingest(max_rejected_percent=0, **found)
    assert [row["messages"] for row in folder.kept("x.jsonl")] == [messages]


def test_a_line_for_roles_that_are_unknown(folder: Folder) -> None:
    rows = [
        {"conversations": [{"from": "human", "value": "q"}, {"from": "merlin", "value": "a"}]},
        {"conversations": [{"from": "A 1", "value": "q"}, {"from": "B", "value": "b"}]},
    ]
    folder.write("x.jsonl", lines(*rows))
    with pytest.raises(Problem) as caught:
        folder.ingest(max_rejected_percent=0)
    _, first, second, _ = caught.value.messages
    assert first.startswith("unknown_role: 2 rejected, the first is x.jsonl:1: conversations[2].from: 'merlin'")
    assert second.startswith("unknown_role: another kind of row is x.jsonl:2: conversations[1].from: 'A 1'")
    assert (written(first), written(second)) == (
        {"roles": {"merlin": "assistant"}},
        {"roles": {"A 1": "user", "B": "assistant"}},
    )
    folder.ingest(max_rejected_percent=0, roles=written(first)["roles"] | written(second)["roles"])
    assert [row["messages"][1]["content"] for row in folder.kept("x.jsonl")] == ["a", "b"]


def test_columns_of_other_files_get_a_line_by_file(folder: Folder) -> None:
    folder.write("a.jsonl", lines({"frage": "q", "antwort": "a"}))
    folder.write("b [1].jsonl", lines({"pregunta": "q2", "respuesta": "a2"}))
    columns = {"instruction": "frage", "output": "antwort"}
    with pytest.raises(Problem) as caught:
        folder.ingest(max_rejected_percent=0, columns=columns)
    line = written(caught.value.messages[1])
    assert line == {"columns_by_file": {"b [[]1].jsonl": {"instruction": "pregunta", "output": "respuesta"}}}
    folder.ingest(max_rejected_percent=0, columns=columns, **line)
    assert [row["messages"][0]["content"] for row in (*folder.kept("a"), *folder.kept("b"))] == ["q", "q2"]


def test_each_kind_of_row_is_reported_once(folder: Folder) -> None:
    folder.write(
        "x.jsonl", lines(*({"frage": f"q{n}", "antwort": "a"} for n in range(20)), {"pregunta": "q", "respuesta": "a"})
    )
    with pytest.raises(Problem) as caught:
        folder.ingest(max_rejected_percent=0)
    assert [message.split(": fields")[0] for message in caught.value.messages[1:-1]] == [
        "unknown_format: 21 rejected, the first is x.jsonl:1",
        "unknown_format: another kind of row is x.jsonl:21",
    ]


def test_a_file_of_which_no_row_fits_stops_the_run_early(folder: Folder) -> None:
    folder.write("x.jsonl", lines(*({"frage": f"q{n}", "antwort": "a"} for n in range(1500))))
    with pytest.raises(Problem) as caught:
        folder.ingest(max_rejected_percent=99)
    assert caught.value.messages[0] == (
        "params.yaml: ingest: the first 1,000 rows of x.jsonl were all rejected; ingest stopped there"
    )
    assert written(caught.value.messages[1]) == {"columns": {"instruction": "frage", "output": "antwort"}}
    assert folder.ingest(max_rejected_percent=100)["rejected_by_reason"] == {"unknown_format": 1500}


# Columns


def test_lookup_of_nested_fields() -> None:
    row = {"a": {"b": ["x", {"c": 1}]}, "a.b": "whole", "n": None}
    assert lookup(row, "a.b") == "whole"
    assert lookup(row, "a.b.0") == "x"
    assert lookup(row, "a.b.1.c") == 1
    assert [lookup(row, name) for name in ("n", "n.x", "a.b.2", "a.b.-1", "x", "a.b.x")] == [None] * 6


def test_nested_columns_are_read_and_what_stands_beside_them_is_counted() -> None:
    found = read({"d": {"q": "q", "a": {"text": "a", "score": 3}, "id": 1}, "e": "x"}, instruction="d.q", output="d.a.text")
    assert (found.messages, found.unread) == (QA, ["e", "d.a.score"])
    with pytest.raises(Rejection, match=r"d\.a: wanted text, found int"):
        read({"d": {"q": "q", "a": 1}}, instruction="d.q", output="d.a")


def test_a_named_column_comes_before_the_usual_names() -> None:
    row = {"messages": [user("x"), assistant("y")], "q": "q", "reply": "a", "output": "z"}
    assert read(row, instruction="q", output="reply").messages == QA
    assert read({"instruction": "a", "output": "q"}, instruction="output", output="instruction").messages == QA


@pytest.mark.parametrize("columns", [{"instruction": "q", "output": "q"}, {"messages": "t", "conversations": "t"}])
def test_two_columns_may_not_read_one_field(folder: Folder, columns: dict[str, str]) -> None:
    first, second = columns
    field = columns[first]
    with pytest.raises(Problem) as caught:
        folder.ingest(columns=columns)
    message = f"{first} and {second} both read the field {field!r}; give each column a field of its own"
    assert caught.value.messages == (f"params.yaml: ingest.columns: {message}",)
    with pytest.raises(Problem) as caught:
        folder.ingest(columns={first: field}, columns_by_file={"*.json": {second: field}})
    assert caught.value.messages == (f"params.yaml: ingest.columns_by_file.*.json: {message}",)


def test_a_pattern_that_matches_no_file_is_an_error(folder: Folder) -> None:
    with pytest.raises(Problem) as caught:
        folder.ingest(formats={"old/*.json": "alpaca"}, columns_by_file={"new/*": {"output": "x"}})
    assert caught.value.messages == (
        "params.yaml: ingest.formats: no file matches 'old/*.json'; the files are filler.json",
        "params.yaml: ingest.columns_by_file: no file matches 'new/*'; the files are filler.json",
    )


def test_a_format_from_params_is_not_guessed() -> None:
    row = {"messages": [user("x"), assistant("y")], "prompt": "q", "completion": "a", "text": "t"}
    assert read(row, format="alpaca").messages == QA
    assert read(row, format="text").text == "t"
    assert read(row, format="sharegpt").messages == [user("x"), assistant("y")]
    with pytest.raises(Rejection, match="rejected"):
        read({"chosen": "x"}, format="preference", preference="chosen")


# Preference data


PREFERENCE: dict[str, dict[str, Any]] = {
    "text": {"prompt": "q", "chosen": "a", "rejected": "b"},
    "Orca": {"system": "", "question": "q", "chosen": "a", "rejected": "b"},
    "turns": {"prompt": [user("q")], "chosen": [assistant("a")], "rejected": [assistant("b")]},
    "UltraFeedback": {
        "prompt": "q",
        "chosen": [user("q"), assistant("a")],
        "rejected": [user("q"), assistant("b")],
        "messages": [user("q"), assistant("a")],
    },
    "LLaMA-Factory": {
        "conversations": [{"from": "human", "value": "q"}],
        "chosen": {"from": "gpt", "value": "a"},
        "rejected": {"from": "gpt", "value": "b"},
    },
    "OpenAI": {
        "input": {"messages": [user("q")]},
        "preferred_output": [assistant("a")],
        "non_preferred_output": [assistant("b")],
    },
    "HH": {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
}


@pytest.mark.parametrize("name", PREFERENCE)
def test_preference_data_is_read_only_where_params_say_which_side(name: str) -> None:
    row = PREFERENCE[name]
    with pytest.raises(PreferenceFound):
        read(row)
    found = read(row, preference="chosen")
    assert (found.format, found.messages, found.unread) == ("preference", QA, [])
    assert read(row, preference="rejected").messages == [user("q"), assistant("b")]


def test_preference_data_stops_the_run_with_the_line_to_write(folder: Folder) -> None:
    folder.write("x.jsonl", lines(*({"prompt": f"q{n}", "chosen": "a", "rejected": "b"} for n in range(9))))
    with pytest.raises(Problem) as caught:
        folder.ingest(max_rejected_percent=100)
    assert caught.value.messages[:-1] == (
        "params.yaml: ingest.preference: x.jsonl:1 is preference data: chosen and rejected are two answers to one prompt. "
        "Supervised training can use one side of it. To train on the preferred answers, write preference: chosen below "
        "ingest; or move such files out of the raw folder",
    )
    folder.ingest(preference="chosen")
    assert {row["messages"][1]["content"] for row in folder.kept("x.jsonl")} == {"a"}


@pytest.mark.parametrize("shape", ["text", "turns", "prompt and completion"])
def test_kto_labels(folder: Folder, shape: str) -> None:
    def row(question: str, label: bool) -> dict[str, Any]:
        match shape:
            case "text":
                return {"prompt": question, "completion": "a", "label": label}
            case "turns":
                return {"messages": [user(question), assistant("a")], "kto_tag": label}
        return {"prompt": [user(question)], "completion": [assistant("a")], "label": label}

    folder.write("x.jsonl", lines(row("good", True), row("bad", False), row("worse", False)))
    with pytest.raises(Problem, match="says whether its answer is a good one"):
        folder.ingest()
    report = folder.ingest(preference="chosen", max_rejected_percent=0)
    assert [(kept["format"], kept["messages"]) for kept in folder.kept("x.jsonl")] == [
        ("kto", [user("good"), assistant("a")])
    ]
    assert report["rejected_by_reason"] == {"other_side": 2}
    folder.ingest(preference="rejected", max_rejected_percent=0)
    assert [row["messages"][0]["content"] for row in folder.kept("x.jsonl")] == ["bad", "worse"]


def test_duplicates_are_counted_apart_and_do_not_stop_a_run(folder: Folder) -> None:
    folder.write("x.jsonl", lines(*[{"instruction": "same", "output": "same"}] * 60, {"instruction": "x", "output": ""}))
    report = folder.ingest(max_rejected_percent=3)
    assert (report["duplicates"], report["rejected_by_reason"]) == (59, {"duplicate": 59, "empty_answer": 1})
    with pytest.raises(Problem) as caught:
        folder.ingest(max_rejected_percent=2)
    assert caught.value.messages[:-1] == (
        "params.yaml: ingest.max_rejected_percent: 1 of 42 rows (2.4 %) were rejected, the limit is 2 %; correct the rows, "
        "or raise it if they may be left out",
        "empty_answer: 1 rejected, the first is x.jsonl:61: ''",
    )


def test_the_row_has_its_format_and_an_id_of_its_content_alone(folder: Folder) -> None:
    folder.write("a.jsonl", lines({"instruction": "question", "output": "answer"}))
    folder.ingest()
    (first,) = folder.kept("a.jsonl")
    assert list(first) == ["id", "source", "format", "messages"]
    assert (first["id"], first["format"]) == ("950b0deec4117dd8", "alpaca")
    folder.write("a.jsonl", lines({"question": "question", "answer": "answer"}))
    folder.ingest()
    assert folder.kept("a.jsonl")[0]["id"] == first["id"]


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "q", "output": "a", "data": [{"x": 1}], "items": ["a", "b"]},
        {"question": "q", "answer": "a", "conversations": ["x", "y"]},
    ],
)
def test_a_list_that_holds_no_turns_is_no_conversation(row: dict[str, Any]) -> None:
    assert read(row).messages == QA


def test_an_empty_instruction_has_no_separator_behind_it() -> None:
    found = read({"instruction": "", "input": "q", "output": "a"})
    assert found.messages[0]["content"] == "q"


def test_a_column_that_no_row_has_is_replaced_in_the_line(folder: Folder) -> None:
    folder.write("x.jsonl", lines({"frage": "q", "antwort": "a"}))
    with pytest.raises(Problem) as caught:
        folder.ingest(max_rejected_percent=0, columns={"instruction": "farge"})
    assert written(caught.value.messages[1]) == {"columns": {"instruction": "frage", "output": "antwort"}}


# What must not be lost


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"question": "q", "answer": "B", "A": "x", "B": "y", "C": "z", "D": "w"}, "A, B, C, D"),
        ({"question": "q", "answer": "a", "options": {"A": "x", "B": "y"}}, "options"),
        ({"question": "q", "answer": "a", "choices": ["x", "y"]}, "choices"),
        ({"question": "q", "answer": "a", "article": "long"}, "article"),
    ],
)
def test_a_question_without_its_options_or_its_text_is_rejected_by_name(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(Rejection, match=f"^{named}: ") as caught:
        read(fields)
    assert caught.value.reason == "unread_field"


def test_the_definition_of_natural_instructions_stands_before_its_input() -> None:
    found = read({"task_name": "t", "definition": "q", "inputs": "c", "targets": "a"})
    assert found.messages == [CONTEXT, assistant("a")]


@pytest.mark.parametrize("name", ["code", "summary", "sentiment", "label_text"])
def test_a_text_with_its_answer_beside_it_is_no_raw_text(name: str) -> None:
    with pytest.raises(Rejection, match=r"write into params\.yaml") as caught:
        read({"text": "q", name: "a"})
    assert written(caught.value.detail) == {"columns": {"instruction": "text", "output": name}}


@pytest.mark.parametrize(
    "text",
    [
        "<s>[INST] q [/INST] a </s>",
        "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n",
        "Below is an instruction that describes a task.\n\n### Instruction:\nq\n\n### Response:\na",
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nq<|eot_id|>",
        "USER: q\n\nASSISTANT: a",
    ],
)
def test_a_conversation_that_a_template_has_written_is_raw_text_only_if_asked(folder: Folder, text: str) -> None:
    folder.write("x [1].jsonl", lines({"text": text}))
    with pytest.raises(Problem) as caught:
        folder.ingest(max_rejected_percent=0)
    assert caught.value.messages[1].startswith("rendered_text: 1 rejected, the first is x [1].jsonl:1: text: a conversation")
    folder.ingest(max_rejected_percent=0, **written(caught.value.messages[1]))
    assert [row["text"] for row in folder.kept("x")] == [text]


def test_the_tools_of_openais_preference_data_are_read() -> None:
    row = {
        "input": {"messages": [user("q")], "tools": [OPENAI_TOOL], "parallel_tool_calls": True, "note": "x"},
        "preferred_output": [assistant("a")],
        "non_preferred_output": [assistant("b")],
    }
    found = read(row, preference="chosen")
    assert (found.messages, found.tools) == (QA, [{"type": "function", "function": OPENAI_TOOL}])
    assert found.unread == ["input.note"]


@pytest.mark.parametrize(
    "rejected",
    [{"rejected_response": "b"}, {"rejected_response": assistant("b")}, {"rejected_messages": [user("q"), assistant("b")]}],
)
def test_a_rejected_answer_beside_a_conversation_is_preference_data(rejected: dict[str, Any]) -> None:
    row = {"messages": QA, **rejected}
    with pytest.raises(PreferenceFound):
        read(row)
    assert read(row, preference="chosen").messages == QA
    assert read(row, preference="rejected").messages == [user("q"), assistant("b")]


def test_other_elements_beside_a_named_one_are_counted() -> None:
    columns = {"instruction": "question", "output": "answers.text.0"}
    row = {"question": "q", "answers": {"text": ["a", "b"]}}
    assert read(row, **columns).unread == ["answers.text[] (elements that no column names)"]
    assert read({"question": "q", "answers": {"text": ["a", "a"]}}, **columns).unread == []
    with pytest.raises(Rejection):
        read({"question": "q", "answers": {"text": []}}, **columns)


def test_an_answer_that_acts_in_its_text_may_have_a_result_behind_it() -> None:
    turns = [user("q"), assistant("Action: f\nAction Input: {}"), {"role": "function", "content": "r"}, assistant("a")]
    check_turns(read({"messages": turns}).messages)


def test_a_thought_that_repeats_the_answer_is_no_thinking() -> None:
    assert read({"messages": [user("q"), assistant("a") | {"thought": "a"}]}).messages == QA
    with pytest.raises(Rejection, match="thought"):
        read({"messages": [user("q"), assistant("a") | {"thought": "b"}]})


SUGGESTED: list[tuple[dict[str, Any], dict[str, str]]] = [
    ({"hexsha": "4c" * 20, "path": "a/b.py", "repo_name": "owner/name", "content": "import os"}, {"text": "content"}),
    ({"questions": [["q", "q again"]], "answers": ["a"]}, {"instruction": "questions.0.0", "output": "answers.0"}),
    ({"anchor": "q", "positive": "a", "negative": "a longer one"}, {"instruction": "anchor", "output": "positive"}),
    ({"query": "q", "pos": ["a"], "neg": ["b", "c"]}, {"instruction": "query", "output": "pos.0"}),
    (
        {"question": "q", "best_answer": "a", "incorrect_answers": ["w"]},
        {"instruction": "question", "output": "best_answer"},
    ),
    ({"db_id": "x", "query": "SELECT", "question": "q"}, {"instruction": "question", "output": "query"}),
    (
        {"sql_prompt": "q", "sql": "a", "sql_explanation": "a long explanation"},
        {"instruction": "sql_prompt", "output": "sql"},
    ),
    (
        {"context": "q", "rots": ["x"], "response": "a", "safety_label": "y"},
        {"instruction": "context", "output": "response"},
    ),
    ({"q_id": "x", "title": "q", "answers": {"text": ["a", "b"]}}, {"instruction": "title", "output": "answers.text.0"}),
    (
        {"message": "q", "chat_history": [{"role": "USER", "message": "x"}], "response": "a"},
        {"instruction": "message", "output": "response", "history": "chat_history"},
    ),
]


@pytest.mark.parametrize(("row", "columns"), SUGGESTED, ids=lambda value: json.dumps(value)[:40])
def test_the_line_names_the_question_and_its_answer(row: dict[str, Any], columns: dict[str, str]) -> None:
    with pytest.raises(Rejection, match=r"write into params\.yaml") as caught:
        read(row)
    assert written(caught.value.detail) == {"columns": columns}


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"prompt": "p", "response_0": "a", "response_1": "b"}, "response_0 and response_1 are of one kind"),
        ({"history": "p", "human_ref_A": "a", "human_ref_B": "b"}, "human_ref_A and human_ref_B are of one kind"),
        ({"conversation_a": QA, "conversation_b": QA}, "conversation_a and conversation_b are of one kind"),
        ({"qid": 1, "question": "p", "answers": [{"text": "a"}, {"text": "b"}]}, "answers has several objects"),
        ({"title": "T", "paragraphs": [{"context": "c"}, {"context": "d"}]}, "paragraphs has several objects"),
        ({"category": "c", "turns": ["Write a long text about it", "Now write it again"]}, "none of them looks like"),
        ({"audio": {"path": "x"}, "sentence": "hello"}, "audio: media"),
        ({"premise": "x", "hypothesis": "y", "label": 1}, "label: a label"),
        ({"system": "s", "chat": "USER: q\n\nASSISTANT: a"}, "chat: a conversation as a chat template writes it"),
    ],
)
def test_no_line_is_said_that_would_train_a_wrong_side_or_would_not_work(row: dict[str, Any], why: str) -> None:
    with pytest.raises(Rejection, match=r"^fields ") as caught:
        read(row)
    assert why in caught.value.detail
    assert "write into" not in caught.value.detail


def test_a_row_of_many_unknown_fields_is_named_by_some_of_them() -> None:
    with pytest.raises(Rejection, match="and 70 more") as caught:
        read({f"field {number}": number for number in range(100)})
    assert len(caught.value.detail) < 500


def test_a_history_may_be_its_json_text() -> None:
    for history, before in (("[]", []), ('[["x", "y"]]', [user("x"), assistant("y")])):
        assert read({"prompt": "q", "response": "a", "history": history}).messages == [*before, *QA]


def test_a_prompt_of_preference_data_that_ends_in_assistant_is_read_into_turns() -> None:
    prompt = "\n\nHuman: x\n\nAssistant: y\n\nHuman: q\n\nAssistant:"
    found = read({"prompt": prompt, "chosen": "a", "rejected": "b"}, preference="chosen")
    assert found.messages == [user("x"), assistant("y"), *QA]


def test_an_id_alone_is_no_text() -> None:
    with pytest.raises(Rejection, match="none of them looks like a text"):
        read({"id": "abc", "response": {"n": 1}})
