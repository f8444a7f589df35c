"""Tool definitions, calls and results in the forms of public data become OpenAI's form."""

import json
from typing import Any

import pytest

from stages.core.problem import Rejection
from stages.ingest.checks import check_turns
from stages.ingest.tools import parse_calls, read_calls, read_tools, result_text, split_calls, split_results
from stages.ingest.turns import Turns, read_turns

USER = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}
FUNCTION = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}}
TOOL = {"type": "function", "function": FUNCTION}


def call(name: str = "f", **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def read(*turns: Any, has_tools: bool = True) -> Turns:
    return read_turns(list(turns), "conversations", roles={}, has_tools=has_tools)


def messages(*turns: Any, has_tools: bool = True) -> list[dict[str, Any]]:
    found = read(*turns, has_tools=has_tools)
    assert (found.tools, found.unread, found.changes) == ([], [], [])
    check_turns(found.messages)
    return found.messages


def rejection(*turns: Any, has_tools: bool = True) -> tuple[str, str]:
    with pytest.raises(Rejection) as caught:
        check_turns(read(*turns, has_tools=has_tools).messages)
    return caught.value.reason, caught.value.detail


def said(name: str, value: Any) -> dict[str, Any]:
    return {"from": name, "value": value if isinstance(value, str) else json.dumps(value)}


# Definitions


@pytest.mark.parametrize(
    "tools",
    [
        [TOOL],
        [FUNCTION],
        TOOL,
        FUNCTION,
        json.dumps([TOOL]),
        json.dumps([FUNCTION]),
        json.dumps(FUNCTION),
        [json.dumps(TOOL)],
        [{"type": "function", **FUNCTION}],
        [{"name": "f", "description": "d", "input_schema": FUNCTION["parameters"]}],
        [{"name": "f", "description": "d", "inputSchema": FUNCTION["parameters"]}],
        str([FUNCTION]),
    ],
)
def test_tool_definitions(tools: Any) -> None:
    assert read_tools(tools, "tools") == [TOOL]


@pytest.mark.parametrize("tools", [None, "", " ", [], {}, "[]", [None, {"name": None}]])
def test_no_tools(tools: Any) -> None:
    assert read_tools(tools, "tools") == []


@pytest.mark.parametrize(
    ("tools", "detail"),
    [
        ("{", "tools: wanted JSON"),
        ("3", "tools: wanted a list of objects"),
        ([3], "tools: wanted a list of objects"),
        ([{"type": "function", "function": "f"}], "tools: wanted functions with a name"),
        ([{"type": "web_search"}], "tools: wanted functions with a name"),
    ],
)
def test_invalid_tool_definitions(tools: Any, detail: str) -> None:
    with pytest.raises(Rejection) as caught:
        read_tools(tools, "tools")
    assert (caught.value.reason, caught.value.detail) == ("wrong_type", detail)


def test_tools_in_the_system_turn() -> None:
    found = read({"role": "system", "content": "", "tools": [FUNCTION]}, USER, ANSWER, has_tools=False)
    assert (found.tools, found.messages, found.unread) == ([TOOL], [USER, ANSWER], [])
    found = read(
        {"role": "system", "content": "s", "tools": [FUNCTION]}, USER, said("gpt", '<tool_call>{"name": "f"}</tool_call>')
    )
    assert found.messages == [
        {"role": "system", "content": "s"},
        USER,
        {"role": "assistant", "content": "", "tool_calls": [call()]},
    ]


# Calls


@pytest.mark.parametrize(
    "value",
    [
        [call(x=1)],
        call(x=1),
        {"name": "f", "arguments": {"x": 1}},
        {"name": "f", "arguments": '{"x": 1}'},
        {"name": "f", "arguments": '"{\\"x\\": 1}"'},
        {"name": "f", "parameters": {"x": 1}},
        {"name": "f", "input": {"x": 1}},
        {"name": "f", "args": {"x": 1}},
        {"name": "f", "arguments": {}, "parameters": {"x": 1}},
        {"type": "tool_use", "name": "f", "input": {"x": 1}},
        {"function": {"name": "f", "parameters": '{"x": 1}'}, "index": 0},
        json.dumps([{"name": "f", "arguments": {"x": 1}}]),
        "{'name': 'f', 'arguments': {'x': 1}}",
        [None, call(x=1), {"id": None, "function": {"name": None}}],
    ],
)
def test_calls(value: Any) -> None:
    unread: list[str] = []
    assert read_calls(value, "here", unread) == [call(x=1)]
    assert unread == []


def test_arguments() -> None:
    assert read_calls({"name": "f"}, "here", []) == [call()]
    assert read_calls({"name": "f", "arguments": " "}, "here", []) == [call()]
    assert read_calls({"name": "f", "arguments": None}, "here", []) == [call()]
    assert read_calls({"name": "f", "arguments": {"city": None}}, "here", []) == [call(city=None)]
    assert read_calls({"name": "f", "arguments": "{'a': (1, True, None)}"}, "here", []) == [call(a=[1, True, None])]


def test_the_id_of_a_call_is_kept_as_text_and_its_other_keys_are_counted() -> None:
    unread: list[str] = []
    value = {"id": 7, "type": "function", "mood": 1, "function": {"name": "f", "arguments": {}, "strict": True}}
    (found,) = read_calls(value, "messages[2].tool_calls", unread)
    assert list(found.items()) == [("id", "7"), *call().items()]
    assert sorted(unread) == ["messages[].tool_calls.function.strict", "messages[].tool_calls.mood"]
    assert read_calls({"call_id": "c", "type": "function_call", "name": "f"}, "here", []) == [{"id": "c", **call()}]


@pytest.mark.parametrize(
    ("value", "detail"),
    [
        ("{", "here: wanted JSON"),
        ([3], "here: wanted calls with a name and arguments"),
        ({"arguments": {"x": 1}}, "here: wanted calls with a name and arguments"),
        ({"name": "", "arguments": {"x": 1}}, "here: wanted calls with a name and arguments"),
        ({"function": "f"}, "here: wanted calls with a name and arguments"),
        ({"name": "f", "arguments": "{"}, "here: arguments of f: wanted JSON"),
        ({"name": "f", "arguments": '{"x": NaN}'}, "here: arguments of f: wanted JSON"),
        ({"name": "f", "arguments": "{'x': {1, 2}}"}, "here: arguments of f: wanted JSON"),
        ({"name": "f", "arguments": "f(x)"}, "here: arguments of f: wanted JSON"),
        ({"name": "f", "arguments": [1]}, "here: arguments of f: wanted an object"),
        (
            {"name": "f", "arguments": {"x": 1}, "parameters": {"y": 1}},
            "here: arguments and parameters of f: wanted one of them",
        ),
        (
            {"type": "custom", "custom": {"name": "f", "input": "x"}},
            "here: a call of type 'custom'; only functions can be called",
        ),
        ({"id": True, "name": "f"}, "here.id: wanted text"),
    ],
)
def test_invalid_calls(value: Any, detail: str) -> None:
    with pytest.raises(Rejection) as caught:
        read_calls(value, "here", [])
    assert (caught.value.reason, caught.value.detail) == ("wrong_type", detail)


def test_the_old_function_call_of_openai() -> None:
    calling = {"role": "assistant", "content": "I look.", "function_call": {"name": "f", "arguments": '{"x": 1}'}}
    result = {"role": "function", "name": "f", "content": '{"cm": 2}'}
    assert messages(USER, calling, result, ANSWER | {"function_call": None}) == [
        USER,
        {"role": "assistant", "content": "I look.", "tool_calls": [call(x=1)]},
        {"role": "tool", "content": '{"cm": 2}', "name": "f"},
        ANSWER,
    ]
    del calling["content"]
    assert messages(USER, calling)[1] == {"role": "assistant", "content": "", "tool_calls": [call(x=1)]}
    assert rejection(USER, calling | {"tool_calls": [call()]}) == (
        "wrong_type",
        "conversations[2]: tool_calls and function_call; wanted one of them",
    )


# ShareGPT


def test_function_call_turns_in_a_row_are_parallel_calls() -> None:
    found = messages(
        said("human", "q"),
        said("function_call", {"name": "f", "arguments": {"x": 1}}),
        said("function_call", {"name": "g", "parameters": {}}),
        said("observation", "1"),
        said("observation", "2"),
        said("gpt", "a"),
    )
    assert found == [
        USER,
        {"role": "assistant", "content": "", "tool_calls": [call(x=1), call("g")]},
        {"role": "tool", "content": "1"},
        {"role": "tool", "content": "2"},
        ANSWER,
    ]


def test_a_list_of_calls_in_one_turn_may_have_one_result() -> None:
    found = messages(
        said("human", "q"),
        said("function_call", [{"name": "f"}, {"name": "g"}]),
        said("observation", [1, 2]),
        said("gpt", "a"),
    )
    assert found[1:3] == [
        {"role": "assistant", "content": "", "tool_calls": [call(), call("g")]},
        {"role": "tool", "content": "[1, 2]"},
    ]


def test_a_text_and_the_call_behind_it_are_one_answer() -> None:
    calling = said("tool_call", {"name": "f", "arguments": {}})
    assert messages(USER, said("gpt", "<think>t</think>I look."), calling) == [
        USER,
        {"role": "assistant", "content": "I look.", "reasoning_content": "t", "tool_calls": [call()]},
    ]
    thought = said("function_call", '<think>\nt\n</think>\n\n{"name": "f", "arguments": {}}')
    assert messages(USER, thought) == [
        USER,
        {"role": "assistant", "content": "", "reasoning_content": "t", "tool_calls": [call()]},
    ]
    silent = messages(USER, ANSWER | {"loss": False}, calling | {"loss": False})
    assert silent == [USER, {"role": "assistant", "content": "a", "tool_calls": [call()], "train": False}]
    assert rejection(USER, ANSWER | {"loss": False}, calling)[0] == "roles_out_of_order"
    assert rejection(USER, ANSWER, thought)[0] == "roles_out_of_order"


@pytest.mark.parametrize("value", ["no json", "", "[]", "3", '"f"', {"arguments": {}}])
def test_a_function_call_turn_without_a_call(value: Any) -> None:
    assert rejection(USER, said("function_call", value))[0] == "wrong_type"


def test_a_function_call_turn_may_hold_an_object_or_tags() -> None:
    wanted = [USER, {"role": "assistant", "content": "", "tool_calls": [call(x=1)]}]
    for value in ({"name": "f", "arguments": {"x": 1}}, [{"name": "f", "arguments": {"x": 1}}]):
        assert messages(USER, {"role": "tool_call", "content": value}) == wanted
    tagged = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
    assert messages(USER, said("function_call", tagged), has_tools=False) == wanted
    assert parse_calls(f"First. {tagged}", "here", []) == ("First.", [call(x=1)])


# Hermes

HERMES_CALLS = """<think>
t
</think>
I look.
<tool_call>
{"name": "f", "arguments": {"x": 1}}
</tool_call>
<tool_call>
{'arguments': {'y': 'it is'}, 'name': 'g'}
</tool_call>"""
HERMES_RESULTS = """<tool_response>
{"name": "f", "content": 1}
</tool_response>
<tool_response>
2
</tool_response>"""


@pytest.mark.parametrize("name", ["tool", "human"])
def test_calls_in_the_text_of_a_row_with_tools(name: str) -> None:
    found = messages(said("human", "q"), said("gpt", HERMES_CALLS), said(name, HERMES_RESULTS), said("gpt", "a"))
    assert found == [
        USER,
        {
            "role": "assistant",
            "content": "I look.",
            "reasoning_content": "t",
            "tool_calls": [call(x=1), call("g", y="it is")],
        },
        {"role": "tool", "content": '{"name": "f", "content": 1}'},
        {"role": "tool", "content": "2"},
        ANSWER,
    ]


def test_calls_in_the_text_of_a_row_without_tools_stay_text() -> None:
    text = HERMES_CALLS.partition("</think>\n")[2]
    found = messages(USER, said("gpt", text), said("tool", HERMES_RESULTS), said("gpt", "a"), has_tools=False)
    assert found == [USER, ANSWER | {"content": text}, {"role": "tool", "content": HERMES_RESULTS}, ANSWER]


@pytest.mark.parametrize(
    "text",
    [
        "no call",
        "<tool_call>",
        "<tool_call>{}</tool_call>",
        "<tool_call>f(1)</tool_call>",
        '<tool_call>{"name": "f"}</tool_call> and then',
        '<tool_call>{"name": "f"}</tool_call> <tool_call>',
        'a <tool_call> b <tool_call>{"name": "f"}</tool_call>',
        "The tag <tool_call> starts a call.",
    ],
)
def test_text_that_is_no_call_stays_text(text: str) -> None:
    assert split_calls(text, "here", []) is None
    assert messages(USER, said("gpt", text)) == [USER, ANSWER | {"content": text}]


@pytest.mark.parametrize(
    ("text", "results"),
    [
        ("x", None),
        ("<tool_response>", None),
        ("<tool_response>x</tool_response> y", None),
        ("y <tool_response>x</tool_response>", None),
        ("<tool_response>x</tool_response>", ["x"]),
        ("\n<tool_response>\nx\n</tool_response>\n<tool_response></tool_response>\n", ["x", ""]),
    ],
)
def test_results_in_the_form_of_hermes(text: str, results: list[str] | None) -> None:
    assert split_results(text) == results


# Results


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("212", "212"),
        ("", ""),
        (None, ""),
        ({"cm": 2, "ort": "Köln"}, '{"cm": 2, "ort": "Köln"}'),
        ([1, {"a": "b"}], '[1, {"a": "b"}]'),
        (["a", "b"], '["a", "b"]'),
        (212, "212"),
        (False, "false"),
        ([{"type": "text", "text": "2"}, {"type": "text", "text": "1"}], "21"),
        ([{"type": "metal", "text": "tin"}], '[{"type": "metal", "text": "tin"}]'),
    ],
)
def test_a_result_is_text_or_its_json(value: Any, text: str) -> None:
    calling = {"role": "assistant", "content": None, "tool_calls": [call()]}
    assert messages(USER, calling, {"role": "tool", "content": value}, ANSWER)[2] == {"role": "tool", "content": text}
    if not isinstance(value, list):
        assert result_text(value, "here") == text


def test_ollama_names_the_tool_of_a_result() -> None:
    found = messages(
        USER, {"role": "assistant", "tool_calls": [call()]}, {"role": "tool", "tool_name": "f", "content": "2"}, ANSWER
    )
    assert found[2] == {"role": "tool", "content": "2", "name": "f"}


def with_ids(*ids: str | None) -> dict[str, Any]:
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [({"id": id} if id else {}) | call(f"f{number}") for number, id in enumerate(ids)],
    }


def results(*ids: str | None, **more: Any) -> list[dict[str, Any]]:
    return [
        {"role": "tool", "content": str(number)} | ({"tool_call_id": id} if id else {}) | more
        for number, id in enumerate(ids)
    ]


def test_ids_and_names_are_kept_in_the_order_of_the_contract() -> None:
    turns = [USER, with_ids("a", "b"), *results("b", "a", name="f"), ANSWER]
    found = messages(*turns)
    assert found == turns
    assert list(found[2]) == ["role", "content", "tool_call_id", "name"]
    assert list(found[1]["tool_calls"][0]) == ["id", "type", "function"]


@pytest.mark.parametrize(
    ("calling", "answering"), [(("a", "b"), (None, None)), ((None, None), ("a", "b")), (("a",), (None,)), ((None,), ("a",))]
)
def test_ids_of_one_side_are_written_to_the_other(calling: tuple[Any, ...], answering: tuple[Any, ...]) -> None:
    found = read(USER, with_ids(*calling), *results(*answering, name="f"), ANSWER)
    ids = ("a", "b")[: len(calling)]
    assert found.messages == [USER, with_ids(*ids), *results(*ids, name="f"), ANSWER]
    assert found.changes == ["tool_call_ids_filled"]
    assert list(found.messages[2]) == ["role", "content", "tool_call_id", "name"]
    assert list(found.messages[1]["tool_calls"][0]) == ["id", "type", "function"]


def test_no_id_is_invented_or_guessed() -> None:
    for turns in (
        [USER, with_ids(None, None), *results(None, None), ANSWER],
        [USER, with_ids("a", "b"), *results(None), ANSWER],
        [USER, with_ids("a", None), *results("a", None), ANSWER],
    ):
        assert messages(*turns) == turns


@pytest.mark.parametrize(
    ("calling", "answering", "detail"),
    [
        (("a",), ("b",), "conversations: tool_call_id 'b' names no call, or one that has a result"),
        (("a", "b"), ("a", "a"), "conversations: tool_call_id 'a' names no call, or one that has a result"),
        ((None, None), ("a",), "conversations: tool_call_id 'a' names no call, or one that has a result"),
        (("a",), ("a", None), "conversations: 2 tool results for 1 calls"),
        ((None,), (None, None), "conversations: 2 tool results for 1 calls"),
    ],
)
def test_a_result_of_no_call_rejects_the_row(calling: tuple[Any, ...], answering: tuple[Any, ...], detail: str) -> None:
    assert rejection(USER, with_ids(*calling), *results(*answering), ANSWER) == ("unknown_tool_call", detail)


@pytest.mark.parametrize(
    ("turns", "detail"),
    [
        ((USER, USER, ANSWER), "user user assistant: user behind user, wanted assistant"),
        ((USER, ANSWER, ANSWER), "user assistant assistant: assistant behind assistant, wanted user"),
        ((USER, ANSWER, *results(None)), "user assistant tool: tool behind assistant, wanted user"),
        ((USER, with_ids(None), ANSWER), "user assistant assistant: assistant behind tool_calls, wanted tool"),
        ((ANSWER,), "assistant: assistant at the start, wanted user"),
        ((*results(None), ANSWER | {"content": "<tool_call>"}), "tool assistant: tool at the start, wanted user"),
    ],
)
def test_turns_out_of_order_say_which(turns: tuple[Any, ...], detail: str) -> None:
    assert rejection(*turns) == ("roles_out_of_order", detail)
