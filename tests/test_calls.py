"""score: tool calls are read from the text in the formats of current models, and compared by name and arguments."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.score.calls import MAX_CHARS, Call, compare_calls, parse_calls, recovers, reference_calls

ARGUMENTS = {"city": "Köln", "nights": 3, "pets": True}
JSON = '{"city": "Köln", "nights": 3, "pets": true}'
BOOK = Call("book_room", ARGUMENTS)
NOW = Call("now", {})


def hermes(calls: str) -> str:
    return f"<tool_call>\n{calls}\n</tool_call>"


TAGS = "<parameter=city>\nKöln\n</parameter>\n<parameter=nights>\n3\n</parameter>\n<parameter=pets>\nTrue\n</parameter>\n"
XML = (
    '<parameter name="city">Köln</parameter>\n<parameter name="nights">3</parameter><parameter name="pets">true</parameter>'
)
DSML = "".join(
    f'<｜DSML｜parameter name="{key}" string="{text}">{value}</｜DSML｜parameter>\n'
    for key, text, value in (("city", "true", "Köln"), ("nights", "false", 3), ("pets", "false", "true"))
)
GLM = (
    "<arg_key>city</arg_key>\n<arg_value>Köln</arg_value>\n<arg_key>nights</arg_key>\n<arg_value>3</arg_value>\n"
    "<arg_key>pets</arg_key>\n<arg_value>true</arg_value>\n"
)
FENCED = f"```json\n{JSON}\n```"

FORMATS = {
    "Hermes, Qwen": hermes(f'{{"name": "book_room", "arguments": {JSON}}}'),
    "Llama 3": f'{{"name": "book_room", "parameters": {JSON}}}',
    "Llama 3, tag": f'<|python_tag|>{{"name": "book_room", "parameters": {JSON}}}',
    "Llama 3, function tag": f"<function=book_room>{JSON}</function>",
    "Mistral": f'[TOOL_CALLS][{{"name": "book_room", "arguments": {JSON}, "id": "abcdefghi"}}]',
    "Mistral, args": f"[TOOL_CALLS]book_room[ARGS]{JSON}",
    "Mistral, id": f"[TOOL_CALLS]book_room[CALL_ID]abcdefghi[ARGS]{JSON}",
    "Qwen3-Coder, Qwen3.5": f"<tool_call>\n<function=book_room>\n{TAGS}</function>\n</tool_call>",
    "GLM-4.5": f"<tool_call>book_room\n{GLM}</tool_call>",
    "DeepSeek V3, R1": (
        f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>book_room\n{FENCED}<｜tool▁call▁end｜>"
        "<｜tool▁calls▁end｜>"
    ),
    "DeepSeek V3.1": f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>book_room<｜tool▁sep｜>{JSON}<｜tool▁call▁end｜>",
    "DeepSeek V3.2": f'<｜DSML｜function_calls>\n<｜DSML｜invoke name="book_room">\n{DSML}\n</｜DSML｜invoke>\n',
    "gpt-oss": f"<|channel|>commentary to=functions.book_room <|constrain|>json<|message|>{JSON}",
    "gpt-oss, header": f" to=functions.book_room<|channel|>commentary json<|message|>{JSON}<|call|>",
    "Llama 4": '[book_room(city="Köln", nights=3, pets=True)]',
    "Llama 4, tags": '<|python_start|>[book_room(city="Köln", nights=3, pets=True)]<|python_end|>',
    "LFM2": "<|tool_call_start|>[book_room(city='Köln', nights=3, pets=true)]<|tool_call_end|>",
    "Olmo 3": '<function_calls>\nbook_room(city="Köln", nights=3, pets=true)\n</function_calls>',
    "MiniMax M2": f'<minimax:tool_call>\n<invoke name="book_room">\n{XML}\n</invoke>\n</minimax:tool_call>',
    "Kimi K2": (
        f"<|tool_calls_section_begin|><|tool_call_begin|>functions.book_room:0<|tool_call_argument_begin|>{JSON}"
        "<|tool_call_end|><|tool_calls_section_end|>"
    ),
    "FunctionGemma": "<start_function_call>call:book_room{city:<escape>Köln<escape>,nights:3,pets:true}<end_function_call>",
    "Gemma 4": '<|tool_call>call:book_room{city:<|"|>Köln<|"|>,nights:3,pets:true}<tool_call|>',
    "Command R7B": (
        f'<|START_ACTION|>[\n    {{"tool_call_id": "0", "tool_name": "book_room", "parameters": {JSON}}}\n]<|END_ACTION|>'
    ),
    "Command R": f'Action: ```json\n[{{"tool_name": "book_room", "parameters": {JSON}}}]\n```',
    "ReAct": f"Thought: a room.\nAction: book_room\nAction Input: {JSON}",
    "Granite, Phi-4-mini": f'<|tool_call|>[{{"name": "book_room", "arguments": {JSON}}}]',
    "OpenAI, text arguments": json.dumps({"type": "function", "function": {"name": "book_room", "arguments": JSON}}),
    "a template's own mark": f'<|endoftext|>{{"name": "book_room", "arguments": {JSON}}}',
}


@pytest.mark.parametrize("text", FORMATS.values(), ids=FORMATS)
def test_a_call_is_read(text: str) -> None:
    assert [call.name for call in parse_calls(text)] == ["book_room"]
    assert recovers(text, [BOOK])
    assert not recovers(text, [Call("book_room", ARGUMENTS | {"nights": 4})])
    assert not recovers(text, [])


@pytest.mark.parametrize(
    "text",
    [
        hermes(f'{{"name": "book_room", "arguments": {JSON}}}') + "\n" + hermes('{"name": "now", "arguments": {}}'),
        f'Wait. [TOOL_CALLS][{{"name": "book_room", "arguments": {JSON}}}, {{"name": "now", "arguments": {{}}}}]',
        f"[TOOL_CALLS]book_room[ARGS]{JSON}[TOOL_CALLS]now[ARGS]{{}}",
        f"<tool_call>\n<function=book_room>\n{TAGS}</function>\n</tool_call>\n<tool_call>\n<function=now>\n</function>\n</tool_call>",
        f"<tool_call>book_room\n{GLM}</tool_call>\n<tool_call>now\n</tool_call>",
        "<|tool_call_start|>[book_room(city='Köln', nights=3, pets=True), now()]<|tool_call_end|>",
        '<|tool_call>call:book_room{city:<|"|>Köln<|"|>,nights:3,pets:true}<tool_call|><|tool_call>call:now{}<tool_call|>',
        f'{{"name": "book_room", "parameters": {JSON}}}\n{{"name": "now", "parameters": {{}}}}',
        f'<minimax:tool_call><invoke name="book_room">{XML}</invoke><invoke name="now"></invoke></minimax:tool_call>',
    ],
)
def test_parallel_calls_are_read_in_any_order(text: str) -> None:
    assert recovers(text, [NOW, BOOK])
    assert not recovers(text, [BOOK])
    assert not recovers(text, [BOOK, NOW, NOW])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "I cannot look that up.",
        "See [the list](x) and {a, b}.",
        '{"name": "Köln", "nights": 3}',  # an answer in JSON
        '{"name": "Köln"}',
        '[{"name": "a", "type": "b"}]',
        "[1, 2]",
        "[see (1)]",
        "f(a=1)",
    ],
)
def test_an_answer_without_a_call_has_none(text: str) -> None:
    assert parse_calls(text) == []
    assert recovers(text, [])


@pytest.mark.parametrize(
    "text",
    [
        hermes('{"name": "book_room", "arguments": {"city": "Kö'),
        '<tool_call>\n{"arguments": {}}\n</tool_call>',
        "<tool_call>\n<function=book_room>\n<parameter=city>\nKö",
        "[TOOL_CALLS]book_room[ARGS]{",
        "[TOOL_CALLS]",
        "<|tool_call_start|>[book_room(city=__import__('os').system('x'))]<|tool_call_end|>",
        "<|tool_call_start|>[book_room('Köln')]<|tool_call_end|>",
        "<|tool_call_start|>[" + "(" * 5000 + "]<|tool_call_end|>",
        "[book_room(city=open('x'))]",
        '<|tool_call>call:book_room{city:<|"|>Kö',
        "<|tool_call>call:x{a:" + "[" * 5000,
        "<tool_call>" + "[" * MAX_CHARS * 2,
        "<tool_call>" + '{"a":' * 50_000,
        '<tool_call>{"name": "x", "arguments": ' + '{"a": ' * 400 + "1" + "}" * 402,
        "[a" + ".b" * 4000 + "(c=1)]",
        "<function=a>" * 10_000,
        '<invoke name="a">' * 10_000,
        "<tool_call>a" * 10_000,
    ],
)
def test_a_call_that_cannot_be_read_is_a_call_without_a_name(text: str) -> None:
    assert parse_calls(text) == [Call("", {})]


PARTS = [*"{}[]\"':,()=a1 \n<>|/", "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<function=", "call:", '{"name": "x", ']


@given(st.lists(st.sampled_from(PARTS)).map("".join))
def test_any_text_is_read_without_an_error(text: str) -> None:
    parse_calls(text)
    parse_calls(f"<|tool_call>call:x{text}")
    parse_calls(f"<|tool_call_start|>[{text}]<|tool_call_end|>")


VALUES: dict[str, Any] = {
    "quoted": 'it\'s "so", {x}: [1]',
    "lines": "one\ntwo",
    "number": 2.5,
    "digits": "12",
    "nothing": None,
    "list": ["a", 1, {"k": "v"}],
    "object": {"a": {"b": [1, True]}},
}


def test_values_of_any_kind_are_read() -> None:
    call = Call("f", VALUES)
    assert recovers(hermes(json.dumps({"name": "f", "arguments": VALUES})), [call])
    assert recovers(f"[f({', '.join(f'{key}={value!r}' for key, value in VALUES.items())})]", [call])

    assert recovers("[f(from='a', class=1, to='(in=2)')]", [Call("f", {"from": "a", "class": 1, "to": "(in=2)"})])

    def written(value: Any) -> str:  # as a template writes a value that it does not put in quotation marks
        return json.dumps(value) if isinstance(value, list | dict) else str(value)

    tags = "".join(f"<parameter={key}>\n{written(value)}\n</parameter>\n" for key, value in VALUES.items())
    assert recovers(f"<function=f>\n{tags}</function>", [call])
    gemma = (
        'quoted:<|"|>it\'s "so", {x}: [1]<|"|>,lines:<|"|>one\ntwo<|"|>,number:2.5,digits:<|"|>12<|"|>,nothing:null,'
        'list:[<|"|>a<|"|>,1,{k:<|"|>v<|"|>}],object:{a:{b:[1,true]}}'
    )
    assert recovers(f"<|tool_call>call:f{{{gemma}}}<tool_call|>", [call])


@pytest.mark.parametrize(
    ("wanted", "found", "scores"),
    [
        ([BOOK], [BOOK], (1, 1, 1)),
        ([BOOK], [Call("book_room", {"pets": True, "nights": 3.0, "city": "Köln"})], (1, 1, 1)),
        ([BOOK], [Call("book_room", ARGUMENTS | {"nights": 4})], (1, 2 / 3, 0)),
        ([BOOK], [Call("book_room", ARGUMENTS | {"nights": "3"})], (1, 2 / 3, 0)),
        ([BOOK], [Call("book_room", ARGUMENTS | {"pets": 1})], (1, 2 / 3, 0)),
        ([BOOK], [Call("book_room", {"city": "Köln"})], (1, 0.5, 0)),
        ([BOOK], [Call("book", ARGUMENTS)], (0, 0, 0)),
        ([BOOK], [], (0, 0, 0)),
        ([BOOK], [Call("", {})], (0, 0, 0)),
        ([BOOK], [BOOK, BOOK], (0.5, 2 / 3, 0)),
        ([BOOK, NOW], [NOW, BOOK], (1, 1, 1)),
        ([BOOK, NOW], [BOOK], (0.5, 1, 0)),
        ([NOW], [NOW], (1, 1, 1)),
        ([NOW], [], (0, 0, 0)),
    ],
)
def test_calls_are_compared_by_name_and_arguments(
    wanted: list[Call], found: list[Call], scores: tuple[float, float, float]
) -> None:
    assert compare_calls(wanted, found) == pytest.approx(scores)


def test_the_calls_of_a_message() -> None:
    message = {"tool_calls": [{"type": "function", "function": {"name": "now", "arguments": {}}}]}
    assert reference_calls(message) == [NOW]
    assert reference_calls({"content": "x"}) == []
