"""Turns in the forms of public data become messages, and no text is lost on the way."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.core.problem import Rejection
from stages.ingest.checks import check_turns
from stages.ingest.tools import ARGUMENTS, IDS
from stages.ingest.turns import (
    ANSWER_KEYS,
    CONTENT_KEYS,
    FLAGS,
    PARTS,
    QUESTION_KEYS,
    ROLE_KEYS,
    ROLES,
    THINKING_KEYS,
    WEIGHTS,
    Role,
    Turns,
    add_system,
    read_answer,
    read_turns,
    split_thinking,
)

USER = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}
TOOL = {"role": "tool", "content": "2"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
CALLS = {"role": "assistant", "content": "", "tool_calls": [CALL]}


def read(*turns: Any, roles: dict[str, Role] | None = None, has_tools: bool = False) -> Turns:
    return read_turns(list(turns), "messages", roles=roles or {}, has_tools=has_tools)


def messages(*turns: Any, **options: Any) -> list[dict[str, Any]]:
    found = read(*turns, **options)
    assert (found.tools, found.unread, found.changes) == ([], [], [])
    return found.messages


def rejection(*turns: Any, **options: Any) -> tuple[str, str]:
    with pytest.raises(Rejection) as caught:
        read(*turns, **options)
    return caught.value.reason, caught.value.detail


# Roles and names


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "user", "content": "q"},
        {"from": "human", "value": "q"},
        {"from": "human", "content": "q"},
        {"role": "user", "value": "q"},
        {"user": "human", "text": "q"},
        {"speaker": "Human", "text": "q"},
        {"role": "prompter", "message": "q"},
        {"role": None, "from": "human", "value": "q", "content": None},
        {"from": " USER ", "value": "q"},
        {"role": "user", "parts": [{"text": "q"}]},
    ],
)
def test_each_turn_is_read_by_its_own_names(turn: dict[str, Any]) -> None:
    assert messages(turn, {"from": "gpt", "value": "a"}) == [USER, ANSWER]


@pytest.mark.parametrize(
    ("names", "role"),
    [
        ("human user prompter Human USER", "user"),
        ("gpt assistant model bot AI ChatGPT gpt4 GPT-4 bing bard gemini claude chat chatbot", "assistant"),
        ("system developer System", "system"),
        ("observation tool tool_response tool-response tool_result function function-response ipython tool_output", "tool"),
    ],
)
def test_role_names_of_public_data(names: str, role: str) -> None:
    for name in names.split():
        assert [message["role"] for message in messages({"from": name, "value": "x"})] == [role], name


def test_known_names_are_as_they_are_compared() -> None:
    assert all(name == name.casefold() and "-" not in name and " " not in name for name in ROLES)


@pytest.mark.parametrize(
    ("turns", "detail"),
    [
        (
            ({"from": "bingo", "value": "q"},),
            "messages[1].from: 'bingo'; write into params.yaml which role it is (user, assistant, system, tool or "
            "function_call): ingest.roles: {bingo: user}",
        ),
        ((USER, {"role": "bingo", "content": "q"}), "ingest.roles: {bingo: assistant}"),
        ((USER, {"role": "客服", "content": "q"}), 'ingest.roles: {"客服": assistant}'),
        ((USER, {"role": "a: b", "content": "q"}), 'ingest.roles: {"a: b": assistant}'),
    ],
)
def test_an_unknown_role_says_the_line_to_write(turns: tuple[Any, ...], detail: str) -> None:
    reason, found = rejection(*turns)
    assert reason == "unknown_role"
    assert found.endswith(detail)


def test_roles_from_the_parameters() -> None:
    roles: dict[str, Role] = {
        "bingo": "assistant",
        "客服": "assistant",
        "api": "tool",
        "chat": "user",
        "act": "function_call",
    }
    for name in ("bingo", "Bingo", "客服"):
        assert messages(USER, {"from": name, "value": "a"}, roles=roles) == [USER, ANSWER]
    assert messages({"from": "chat", "value": "q"}, roles=roles) == [USER]  # a name of ROLES, read otherwise
    assert messages({"from": "human", "value": "q"}, roles=roles) == [USER]
    call = {"from": "act", "value": '{"name": "f", "arguments": {"x": 1}}'}
    assert messages(USER, call, {"from": "api", "value": "2"}, ANSWER, roles=roles) == [USER, CALLS, TOOL, ANSWER]


@pytest.mark.parametrize(
    ("turns", "found"),
    [
        ([{"human": "q", "assistant": "a"}], [USER, ANSWER]),
        ([{"user": "q", "assistant": "a"}, {"user": "q", "assistant": "a"}], [USER, ANSWER, USER, ANSWER]),
        (
            [{"system": "s", "input": "q", "output": "<think>t</think>a"}],
            [{"role": "system", "content": "s"}, USER, ANSWER | {"reasoning_content": "t"}],
        ),
        ([{"system": "", "input": "q", "output": "a"}], [USER, ANSWER]),
    ],
)
def test_a_turn_of_a_question_and_its_answer(turns: list[Any], found: list[Any]) -> None:
    assert messages(*turns) == found


@pytest.mark.parametrize(
    ("turn", "reason", "detail"),
    [
        ({"from": "human"}, "missing_field", "messages[1].value"),
        ({"role": "user"}, "missing_field", "messages[1].content"),
        ({"content": "q"}, "missing_field", "messages[1].role"),
        ({"value": "q"}, "missing_field", "messages[1].from"),
        ({"user": "q"}, "unknown_role", "messages[1].user: 'q'"),
        ({"role": 1, "content": "q"}, "wrong_type", "messages[1].role: wanted text, found int"),
        ({"role": "user", "content": 1}, "wrong_type", "messages[1].content: wanted text, found int"),
        ({"role": "user", "content": None}, "wrong_type", "messages[1].content: wanted text, found NoneType"),
        ({"role": "assistant", "content": None}, "wrong_type", "messages[1].content: wanted text, found NoneType"),
        ("q", "wrong_type", "messages: wanted a list of objects"),
    ],
)
def test_turns_that_cannot_be_read(turn: Any, reason: str, detail: str) -> None:
    found = rejection(turn)
    assert found[0] == reason
    assert found[1].startswith(detail)


def test_turns_may_be_their_json_text() -> None:
    assert read_turns(json.dumps([USER, ANSWER]), "messages", roles={}, has_tools=False).messages == [USER, ANSWER]
    for text in ("q", "3", "{}", ""):
        with pytest.raises(Rejection, match="messages: wanted a list of objects"):
            read_turns(text, "messages", roles={}, has_tools=False)


# System turns


def test_system_turns() -> None:
    system = {"role": "system", "content": "s"}
    empty = {"from": "system", "value": " \n"}
    assert messages(empty, USER, ANSWER) == [USER, ANSWER]
    assert messages({"role": "system", "content": None}, USER, empty, ANSWER) == [USER, ANSWER]
    joined = read(system, {"role": "developer", "content": "d"}, USER, ANSWER)
    assert joined.messages == [{"role": "system", "content": "s\n\nd"}, USER, ANSWER]
    assert joined.changes == ["system_turns_joined"]
    later = messages(USER, ANSWER, system, USER, ANSWER)
    with pytest.raises(Rejection) as caught:
        check_turns(later)
    assert caught.value.detail == (
        "user assistant system user assistant: a system turn behind the first turn; write its text into the next user turn"
    )


def test_a_system_text_beside_the_turns() -> None:
    changes: list[str] = []
    system = {"role": "system", "content": "s"}
    assert add_system([USER], "s", changes) == [system, USER]
    assert add_system([system, USER], " s", changes) == [system, USER]
    assert add_system([USER], " ", changes) == [USER]
    assert changes == []
    assert add_system([system, USER], "row", changes) == [{"role": "system", "content": "row\n\ns"}, USER]
    assert changes == ["system_turns_joined"]


# Parts


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "Name a "}, {"type": "input_text", "text": "metal", "image_url": None}, "."]
    answer = [{"type": "text", "value": "Tin."}, None]
    assert messages({"role": "user", "content": parts}, {"role": "assistant", "content": answer}) == [
        {"role": "user", "content": "Name a metal."},
        {"role": "assistant", "content": "Tin."},
    ]


def test_thinking_and_calls_as_parts() -> None:
    anthropic = [
        {"type": "thinking", "thinking": " t1\n", "signature": "xyz"},
        {"type": "reasoning", "value": "t2"},
        {"type": "text", "text": "a"},
        {"type": "tool_use", "id": "c1", "name": "f", "input": {"x": 1}},
        {"type": "tool_call", "value": '{"name": "g", "arguments": {}}'},
    ]
    results = [
        {"type": "tool_result", "tool_use_id": "c1", "content": [{"type": "text", "text": "2"}]},
        {"type": "tool_result", "tool_use_id": "c2", "content": "3"},
    ]
    with_id = {"type": "tool_use", "id": "c2", "name": "g", "input": {}}
    found = messages(
        USER, {"role": "assistant", "content": [*anthropic[:4], with_id]}, {"role": "user", "content": results}, ANSWER
    )
    calls = [{"id": "c1", **CALL}, {"id": "c2", "type": "function", "function": {"name": "g", "arguments": {}}}]
    assert found == [
        USER,
        {"role": "assistant", "content": "a", "reasoning_content": "t1\n\nt2", "tool_calls": calls},
        {"role": "tool", "content": "2", "tool_call_id": "c1"},
        {"role": "tool", "content": "3", "tool_call_id": "c2"},
        ANSWER,
    ]
    llama_factory = {"role": "assistant", "content": [anthropic[4]]}
    assert messages(llama_factory)[0]["tool_calls"] == [{"type": "function", "function": {"name": "g", "arguments": {}}}]
    magistral = [{"type": "thinking", "thinking": [{"type": "text", "text": "t"}]}, {"type": "text", "text": "a"}]
    assert messages({"role": "assistant", "content": magistral}) == [ANSWER | {"reasoning_content": "t"}]


@pytest.mark.parametrize(
    ("turn", "reason", "detail"),
    [
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
            "unread_part",
            "messages[1].content[1]: a part of type 'image_url'; only text is read",
        ),
        (
            {"role": "assistant", "content": [{"type": "redacted_thinking", "data": "x"}]},
            "unread_part",
            "messages[1].content[1]: a part of type 'redacted_thinking'; only thinking, text, calls is read",
        ),
        (
            {"role": "user", "content": [{"type": "thinking", "thinking": "t"}]},
            "unread_part",
            "messages[1].content[1]: a part of type 'thinking'; only text is read",
        ),
        ({"role": "user", "content": [3]}, "unread_part", "messages[1].content[1]: a part of type 'int'; only text is read"),
        (
            {"role": "tool", "content": [{"type": "text", "text": "t"}, {"type": "image", "source": "x"}]},
            "unread_part",
            "messages[1].content[2]: a part of type 'image'; only text is read",
        ),
        (
            {"role": "assistant", "content": ["a", {"type": "thinking", "thinking": "t"}]},
            "parts_out_of_order",
            "messages[1].content[2]: thinking behind text",
        ),
        (
            {"role": "user", "content": ["a", {"type": "tool_result", "content": "t"}]},
            "parts_out_of_order",
            "messages[1].content: a tool_result behind a text",
        ),
        (
            {"role": "user", "content": [{"type": "text", "text": 1}]},
            "wrong_type",
            "messages[1].content[1].text: wanted text, found int",
        ),
    ],
)
def test_other_parts_reject_the_row_by_their_type(turn: dict[str, Any], reason: str, detail: str) -> None:
    assert rejection(turn) == (reason, detail)


# The loss


@pytest.mark.parametrize(
    ("keys", "in_loss"),
    [
        ({"weight": 0}, False),
        ({"weight": 0.0}, False),
        ({"weight": 1}, True),
        ({"weight": None}, True),
        ({"train": False}, False),
        ({"train": None, "weight": 1.0}, True),
        ({"training": False}, False),
        ({"loss": False}, False),
        ({"loss": True}, True),
        ({"loss_weight": 0.0}, False),
        ({"loss_scale": 0}, False),
        ({"train": True, "weight": 0}, False),
    ],
)
def test_the_flags_of_the_trainers_keep_an_answer_out_of_the_loss(keys: dict[str, Any], in_loss: bool) -> None:
    assert messages(USER, ANSWER | keys) == [USER, ANSWER if in_loss else ANSWER | {"train": False}]
    # A prompt is not in the loss anyway; a request to train on it is not read, so it is counted.
    prompt = read(USER | keys, ANSWER)
    assert prompt.messages == [USER, ANSWER]
    assert prompt.unread == [f"messages[].{key}" for key, value in keys.items() if value]


@pytest.mark.parametrize("key", [*FLAGS, *WEIGHTS])
@pytest.mark.parametrize("turn", [USER, ANSWER])
def test_other_values_of_the_flags_reject_the_row(key: str, turn: dict[str, Any]) -> None:
    wanted = "true or false" if key in FLAGS else "0 or 1"
    for value in ("no", 0.5, [0], 1 if key in FLAGS else True):
        assert rejection(turn | {key: value}) == ("wrong_type", f"messages[1].{key}: wanted {wanted}")


# Thinking


@pytest.mark.parametrize(
    ("content", "thinking", "answer"),
    [
        ("a", "", "a"),
        ("<think>\nt\n</think>\n\na", "t", "a"),
        ("<think>t</think>a", "t", "a"),
        ("\n <think>t</think> a ", "t", "a "),
        ("<think>t</think>\r\n\r\n  indented()", "t", "  indented()"),
        ("<think>\n\n</think>\n\na", "", "a"),
        ("<think></think>", "", ""),
        ("<think>\n\n</think>\n\n<think>t</think>a", "t", "a"),
        ("<think>t1</think>\n<think>t2</think>a", "t1\n\nt2", "a"),
        ("t\n</think>\n\na", "t", "a"),
        ("</think>a", "", "a"),
        ('<think>is it "5"</think>"5"', 'is it "5"', '"5"'),
        ("<think>`</think>` ends it</think>a", "`</think>` ends it", "a"),
        ("<think>a <think> b</think>c", "a <think> b", "c"),
        # mentions
        (
            "The tag `<think>` opens thinking, `</think>` closes it.",
            "",
            "The tag `<think>` opens thinking, `</think>` closes it.",
        ),
        ("Write <think> first.", "", "Write <think> first."),
        # the tags of other models are text
        ("<thinking>t</thinking>a", "", "<thinking>t</thinking>a"),
        ("<seed:think>t</seed:think>a", "", "<seed:think>t</seed:think>a"),
    ],
)
def test_thinking_in_the_text(content: str, thinking: str, answer: str) -> None:
    assert split_thinking(content, "here") == (thinking, answer)
    message = {"role": "assistant", "content": answer} | ({"reasoning_content": thinking} if thinking else {})
    assert read_answer(content, "here") == message
    assert messages(USER, {"from": "gpt", "value": content}) == [USER, message]
    assert messages({"role": "user", "content": content}) == [{"role": "user", "content": content}]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("<think>t", "unclosed_think"),
        ("<think>t</think><think>", "unclosed_think"),
        ("Well. <think>t</think> a", "thinking_out_of_place"),
        ("<think>t</think>a<think>u</think>b", "thinking_out_of_place"),
        ("<think>t</think>a</think>b", "thinking_out_of_place"),
        ("t</think>a</think>b", "thinking_out_of_place"),
    ],
)
def test_thinking_that_no_template_writes_rejects_the_row(content: str, reason: str) -> None:
    assert rejection(USER, {"role": "assistant", "content": content})[0] == reason


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_thinking_in_a_field(key: str) -> None:
    thought = ANSWER | {"reasoning_content": "t"}
    assert messages(USER, ANSWER | {key: "\nt\n"}) == [USER, thought]
    assert messages(USER, ANSWER | {key: " "}, USER, ANSWER | {key: None}) == [USER, ANSWER, USER, ANSWER]
    assert messages(ANSWER | {key: "t", "content": "<think>\nt\n</think>\n\na"}) == [thought]
    assert messages(ANSWER | {key: "t", "content": "<think>\n</think>\n\na"}) == [thought]
    assert messages(ANSWER | {key: "t", "content": None, "tool_calls": [CALL]}) == [
        {"role": "assistant", "content": "", "reasoning_content": "t", "tool_calls": [CALL]}
    ]
    assert rejection(ANSWER | {key: "t", "content": "<think>u</think>a"})[0] == "two_thinkings"
    assert rejection(USER | {key: "t"})[0] == "unread_field"
    assert list(messages(ANSWER | {key: "t", "train": False, "tool_calls": [CALL]})[0]) == [
        "role",
        "content",
        "reasoning_content",
        "tool_calls",
        "train",
    ]


def test_thinking_beside_an_answer_in_a_field_of_its_own() -> None:
    assert read_answer("a", "output", thinking=" t ") == ANSWER | {"reasoning_content": "t"}
    assert read_answer("<think>t</think>a", "output", thinking="t") == ANSWER | {"reasoning_content": "t"}
    assert read_answer("a", "output", thinking=" ") == ANSWER
    with pytest.raises(Rejection, match="output: two different texts of thinking"):
        read_answer("<think>t</think>a", "output", thinking="u")


def test_thinking_given_twice() -> None:
    openrouter = ANSWER | {"reasoning": "t", "reasoning_details": [{"type": "reasoning.text", "text": "t"}]}
    assert messages(openrouter | {"reasoning_content": "t"}) == [ANSWER | {"reasoning_content": "t"}]
    assert rejection(openrouter | {"reasoning_content": "u"})[0] == "two_thinkings"
    del openrouter["reasoning"]
    assert rejection(openrouter)[0] == "unread_field"
    assert read(ANSWER | {"reasoning": "on"}).unread == ["messages[].reasoning"]


# Keys


def test_unread_keys_are_returned_and_known_keys_reject() -> None:
    turns = read(
        USER | {"mood": "good", "id": 3, "name": "Ann"}, ANSWER | {"score": 0.5, "refusal": None, "annotations": []}
    )
    assert turns.messages == [USER, ANSWER]
    assert turns.unread == ["messages[].mood", "messages[].name", "messages[].score"]
    assert rejection(USER | {"image": "x.png"})[0] == "unread_field"
    assert rejection(USER | {"tools": [{"name": "f"}]})[0] == "unread_field"
    assert rejection({"role": "user", "content": "q", "tool_calls": [CALL]}) == (
        "roles_out_of_order",
        "messages[1]: tool_calls in a user message",
    )


# No text is lost

TEXTS = st.text(st.sampled_from("ab<>/think \n`\"'{}"), max_size=24) | st.sampled_from(
    ["<think>", "</think>", "<think>t</think>", "<tool_call>", '<tool_call>{"name": "f"}</tool_call>', "text"]
)
ANY_TEXT = st.lists(TEXTS, max_size=4).map("".join)


@settings(max_examples=400, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["human", "gpt", "tool"]), ANY_TEXT), max_size=5), st.booleans())
def test_texts_survive_up_to_white_space_and_tags(turns: list[tuple[str, str]], has_tools: bool) -> None:
    try:
        found = read(*({"from": name, "value": text} for name, text in turns), has_tools=has_tools)
    except Rejection:
        return
    letters = "".join(
        message.get("reasoning_content", "")
        + message["content"]
        + "".join('{"name": "f"}' for call in message.get("tool_calls", []) if call["function"]["name"] == "f")
        for message in found.messages
    )
    marks = ("<think>", "</think>", "<tool_call>", "</tool_call>", *" \n")
    for mark in marks:
        letters = letters.replace(mark, "")
    wanted = "".join(text for _, text in turns)
    for mark in marks:
        wanted = wanted.replace(mark, "")
    assert letters == wanted
    for message in found.messages:
        thinking = message.get("reasoning_content")
        assert thinking is None or (message["role"] == "assistant" and thinking == thinking.strip() != "")


KEYS = [*ROLE_KEYS, *CONTENT_KEYS, *QUESTION_KEYS, *ANSWER_KEYS, *THINKING_KEYS, *FLAGS, *WEIGHTS, *ARGUMENTS, *IDS]
KEYS += ["type", "tool_calls", "function_call", "function", "name", "tools", "system", "mood"]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.sampled_from([*ROLES, *PARTS]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(KEYS),
            inner,
            max_size=5,
        )
    ),
    max_leaves=12,
)


@settings(max_examples=400, deadline=None)
@given(st.lists(VALUES, max_size=4), st.booleans())
def test_any_value_is_read_or_rejected(turns: list[Any], has_tools: bool) -> None:
    try:
        found = read(*turns, has_tools=has_tools)
    except Rejection:
        return
    json.dumps(found)
    assert all(isinstance(message["content"], str) for message in found.messages)


def test_values_nested_too_deeply_are_no_traceback() -> None:
    deep: Any = "x"
    for _ in range(900):
        deep = [deep]
    assert read(USER | {"mood": deep}).unread == ["messages[].mood"]
    assert rejection(USER | {"content": deep})[0] == "unread_part"
    assert rejection(ANSWER | {"tool_calls": deep})[0] == "wrong_type"
