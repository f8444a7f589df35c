"""Rows of a conversation: each answer is trained once, behind the prompt that generation gives at that turn.

The templates do in a few lines what the templates of well-known models do.
"""

import datetime
from typing import Any

import pytest

from stages.encode.answers import AnswerFinder, Conversation, RenderedRow, Thinking
from stages.encode.conventions import PROBE_TOOL
from stages.encode.forms import Form, give
from stages.encode.mask import SpecialTokens
from stages.encode.required import NO_REASONING, REASONING_NOT_PROMPTED
from stages.encode.spans import LeftOut, Untraceable
from stages.encode.template import ChatTemplate, fix_variables

SPECIAL = ["<|im_start|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|user|>", "<|assistant|>", "<|observation|>"]
HEAD = "{%- for m in messages -%}"
PROMPT = "{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"

# Earlier reasoning is left out, and the last answer has a block even if it is empty (Qwen 3).
DROPS_EARLIER = (
    "{%- set ns = namespace(last=0) -%}"
    "{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}"
    + HEAD
    + "{{ '<|im_start|>' + m.role + '\\n' }}"
    "{%- if m.role == 'assistant' and loop.index0 > ns.last and (loop.last or m.reasoning_content) -%}"
    "{{ '<think>\\n' + m.reasoning_content | default('') + '\\n</think>\\n\\n' }}{%- endif -%}"
    "{{ m.content }}"
    "{%- for c in m.tool_calls or [] -%}{{ '<tool_call>' + c.function | tojson + '</tool_call>' }}{%- endfor -%}"
    "{{ '<|im_end|>\\n' }}"
    + PROMPT.replace("{%- endif -%}", "{{ '<think>\\n\\n</think>\\n\\n' if enable_thinking is false }}{%- endif -%}")
)
# The prompt opens a thinking block, which the text of answers has not (DeepSeek R1).
OPENS = (
    HEAD
    + "{{ '<|im_start|>' + m.role + '\\n' + m.content.split('</think>')[-1] + '<|im_end|>' }}"
    + PROMPT.replace("assistant\\n'", "assistant\\n<think>\\n'")
)
# The system text moves to the last question (Mistral).
MOVES_SYSTEM = (
    "{%- if messages[0].role == 'system' -%}{%- set system = messages[0].content -%}{%- set rest = messages[1:] -%}"
    "{%- else -%}{%- set rest = messages -%}{%- endif -%}"
    "{%- set ns = namespace(last=0) -%}"
    "{%- for m in rest -%}{%- if m.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}"
    "{%- for m in rest -%}"
    "{{ '<|im_start|>' + m.role + '\\n' + (system + '\\n\\n' if system and loop.index0 == ns.last else '') + m.content }}"
    "{{ '<|im_end|>\\n' }}" + PROMPT
)
# Channels, and another stop token behind the last answer (gpt-oss).
CHANNELS = (
    HEAD + "{%- if m.role == 'assistant' -%}"
    "{%- if m.thinking and loop.last -%}"
    "{{ '<|im_start|>assistant<|channel|>analysis' + m.thinking + '<|end|>' }}{%- endif -%}"
    "{{ '<|im_start|>assistant<|channel|>final' + m.content + ('<|return|>' if loop.last else '<|end|>') }}"
    "{%- else -%}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|end|>' }}{%- endif -%}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|im_start|>assistant' }}{%- endif -%}"
)
# The next turn's first token ends an answer (GLM).
NEXT_TURN = (
    HEAD + "{{ '<|observation|>' if m.role == 'tool' else '<|' + m.role + '|>' }}{{ m.content }}"
    "{%- for c in m.tool_calls or [] -%}{{ c.function.name + '\\n' + c.function.arguments | tojson }}{%- endfor -%}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}"
)
PARTS = (
    HEAD + "{{ '<|im_start|>' + m.role + '\\n' }}"
    "{%- if m.content is string -%}{{ m.content }}{%- else -%}{%- for p in m.content -%}"
    "{{ '[THINK]' + p.thinking + '[/THINK]' if p.type == 'thinking' else p.text }}{%- endfor -%}{%- endif -%}"
    "{{ '<|im_end|>\\n' }}" + PROMPT
)
CHATML = HEAD + "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}" + PROMPT
TEXT_ARGUMENTS = (
    "{%- for t in tools or [] -%}{{ t.function.name }}{%- endfor -%}"
    + HEAD
    + "{{ '<|im_start|>' + m.role + '\\n' + m.content }}"
    "{%- for c in m.tool_calls or [] -%}{{ c.function.name + c.function.arguments }}{%- endfor -%}{{ '<|im_end|>\\n' }}"
    + PROMPT
)
# No word of the tools; calls without a text have no content, and their arguments are text (DeepSeek V3).
NO_TOOLS = (
    HEAD + "{%- if m.content is none -%}{{ '<|im_start|>assistant\\n' }}"
    "{%- for c in m.tool_calls -%}{{ c.function.name + c.function.arguments }}{%- endfor -%}{{ '<|im_end|>\\n' }}"
    "{%- else -%}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endif -%}" + PROMPT
)
# An instruction stands behind each conversation (Command R+).
INSTRUCTS = CHATML.replace("<|im_end|>\\n", "<|im_end|>").replace(
    "{%- if add_gen", "{{ '<|im_start|>system\\nSay what to do.<|im_end|>' }}{%- if add_gen"
)
TOOLS = [{"type": "function", "function": {"name": "level", "parameters": {}}}]


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def answer(text: str, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **fields}


def call(text: str = "", **arguments: Any) -> dict[str, Any]:
    return answer(text, tool_calls=[{"type": "function", "function": {"name": "level", "arguments": arguments}}])


TWO_TURNS = [user("q1"), answer("a1"), user("q2"), answer("a2")]
THOUGHT = [user("q1"), answer("a1", reasoning_content="r1"), user("q2"), answer("a2", reasoning_content="r2")]


def find(
    source: str,
    messages: list[dict[str, Any]],
    *,
    tools: Any = (),
    thinking: Thinking = "train",
    train_empty_thinking: bool = False,
    last_only: bool = False,
) -> tuple[list[RenderedRow], list[Exception]]:
    finder = AnswerFinder(
        ChatTemplate(source, {}),
        SpecialTokens(SPECIAL),
        bos="",
        thinking=thinking,
        train_empty_thinking=train_empty_thinking,
    )
    return finder.rows(Conversation(messages, tools), last_only=last_only)


def marked(rows: list[RenderedRow]) -> list[str]:
    """The rows with what is in the loss in [[ ]]."""
    texts = []
    for row in rows:
        text, at = "", 0
        for span in row.answers:
            text += row.text[at : span.label_start] + (
                f"[[{row.text[span.label_start : span.end]}]]" if span.in_loss else ""
            )
            at = span.end if span.in_loss else span.label_start
        texts.append(text + row.text[at:])
    return texts


def assert_behind_prompts(source: str, messages: list[dict[str, Any]], rows: list[RenderedRow], tools: Any = ()) -> None:
    """Every trained answer is behind the rendering of the messages before it, with nothing of a message in between."""
    template = ChatTemplate(source, {})
    for row in rows:
        for span in row.answers:
            for form in ("reasoning_content", "thinking", "parts"):
                prompt = template.render(
                    give(messages[: span.message], Form(form, arguments_as_text=False)), tools, add_generation_prompt=True
                )
                if row.text.startswith(prompt):
                    break
            else:
                raise AssertionError(f"{row.text!r} does not start with the prompt for message {span.message + 1}")
            assert span.start >= len(prompt)


@pytest.mark.parametrize(
    ("source", "messages", "expected"),
    [
        (  # an empty block is prompt, and stands only before the last answer of a row
            DROPS_EARLIER,
            TWO_TURNS,
            [
                "<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n[[a1<|im_end|>]]\n",
                "<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\na1<|im_end|>\n"
                "<|im_start|>user\nq2<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n[[a2<|im_end|>]]\n",
            ],
        ),
        (
            DROPS_EARLIER,
            THOUGHT,
            [
                "<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\n[[<think>\nr1\n</think>\n\na1<|im_end|>]]\n",
                "<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\na1<|im_end|>\n"
                "<|im_start|>user\nq2<|im_end|>\n<|im_start|>assistant\n[[<think>\nr2\n</think>\n\na2<|im_end|>]]\n",
            ],
        ),
        (
            OPENS,
            THOUGHT[:2],
            ["<|im_start|>user\nq1<|im_end|><|im_start|>assistant\n<think>\n[[r1\n</think>\n\na1<|im_end|>]]"],
        ),
        (
            OPENS,
            TWO_TURNS[:2],
            ["<|im_start|>user\nq1<|im_end|><|im_start|>assistant\n<think>\n\n</think>\n\n[[a1<|im_end|>]]"],
        ),
        (
            MOVES_SYSTEM,
            [{"role": "system", "content": "s"}, *TWO_TURNS],
            [
                "<|im_start|>user\ns\n\nq1<|im_end|>\n<|im_start|>assistant\n[[a1<|im_end|>]]\n",
                "<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\na1<|im_end|>\n"
                "<|im_start|>user\ns\n\nq2<|im_end|>\n<|im_start|>assistant\n[[a2<|im_end|>]]\n",
            ],
        ),
        (
            CHANNELS,
            TWO_TURNS,
            [
                "<|im_start|>user\nq1<|end|><|im_start|>assistant[[<|channel|>finala1<|return|>]]",
                "<|im_start|>user\nq1<|end|><|im_start|>assistant<|channel|>finala1<|end|>"
                "<|im_start|>user\nq2<|end|><|im_start|>assistant[[<|channel|>finala2<|return|>]]",
            ],
        ),
        (
            CHANNELS,
            THOUGHT[:2],
            [
                "<|im_start|>user\nq1<|end|><|im_start|>assistant"
                "[[<|channel|>analysisr1<|end|><|im_start|>assistant<|channel|>finala1<|return|>]]"
            ],
        ),
        (NEXT_TURN, TWO_TURNS, ["<|user|>q1<|assistant|>[[a1<|user|>]]q2<|assistant|>[[a2<|user|>]]"]),
        (
            NEXT_TURN,
            [user("q"), call(river="Nebo"), {"role": "tool", "content": "2"}, answer("two")],
            [
                '<|user|>q<|assistant|>[[level\n{"river": "Nebo"}<|observation|>]]2<|assistant|>[[two<|user|>]]',
            ],
        ),
        (
            PARTS,
            THOUGHT[:2],
            ["<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\n[[[THINK]r1[/THINK]a1<|im_end|>]]\n"],
        ),
        (  # no field for reasoning: it becomes a part of the content
            CHATML,
            THOUGHT,
            [
                "<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\n[[<think>\nr1\n</think>\n\na1<|im_end|>]]\n"
                "<|im_start|>user\nq2<|im_end|>\n<|im_start|>assistant\n[[<think>\nr2\n</think>\n\na2<|im_end|>]]\n"
            ],
        ),
    ],
)
def test_every_answer_is_trained_once_behind_its_prompt(
    source: str, messages: list[dict[str, Any]], expected: list[str]
) -> None:
    rows, problems = find(source, messages)
    assert problems == []
    assert marked(rows) == expected
    trained = [span.message for row in rows for span in row.answers if span.in_loss]
    assert trained == [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    assert all(span.follows_prompt for row in rows for span in row.answers)
    if source != CHATML:
        assert_behind_prompts(source, messages, rows)


def test_only_the_last_answer_matters_for_a_test_row() -> None:
    (row,), _ = find(DROPS_EARLIER, THOUGHT, last_only=True)
    assert [span.message for span in row.answers] == [3]


def test_answers_that_are_not_trained_get_no_row_of_their_own() -> None:
    silent = [TWO_TURNS[0], TWO_TURNS[1] | {"train": False}, *TWO_TURNS[2:]]
    rows, _ = find(DROPS_EARLIER, silent)
    assert [[span.message for span in row.answers] for row in rows] == [[3]]


def test_reasoning_is_in_the_loss_or_context_or_gone() -> None:
    prompt = "<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\n"
    for thinking, expected in [
        ("train", prompt + "[[<think>\nr1\n</think>\n\na1<|im_end|>]]\n"),
        ("mask", prompt + "<think>\nr1\n</think>\n\n[[a1<|im_end|>]]\n"),
        ("drop", prompt + "<think>\n\n</think>\n\n[[a1<|im_end|>]]\n"),
    ]:
        rows, _ = find(DROPS_EARLIER, THOUGHT[:2], thinking=thinking)  # type: ignore[arg-type]
        assert marked(rows) == [expected]
    rows, _ = find(DROPS_EARLIER, [user("q1"), call(river="N") | {"reasoning_content": "r"}], thinking="mask")
    assert marked(rows)[0].endswith(
        'r\n</think>\n\n[[<tool_call>{"name": "level", "arguments": {"river": "N"}}</tool_call><|im_end|>]]\n'
    )


def test_an_empty_block_is_trained_if_asked() -> None:
    rows, _ = find(DROPS_EARLIER, TWO_TURNS[:2], train_empty_thinking=True)
    assert marked(rows)[0].endswith("assistant\n[[<think>\n\n</think>\n\na1<|im_end|>]]\n")


def test_an_empty_block_before_a_call_is_prompt_too() -> None:
    rows, _ = find(DROPS_EARLIER, [user("q1"), call(river="N")])
    assert marked(rows)[0].endswith(
        "</think>\n\n[[<tool_call>" + '{"name": "level", "arguments": {"river": "N"}}</tool_call><|im_end|>]]\n'
    )


def test_reasoning_without_a_place_is_refused() -> None:
    strips = CHATML.replace("m.content", "m.content.split('</think>')[-1]")
    with pytest.raises(LeftOut, match=NO_REASONING.split(";")[0]):
        find(strips, THOUGHT)
    rows, _ = find(strips, THOUGHT, thinking="drop")
    assert len(rows) == 1
    as_python = CHATML.replace("m.content +", "m.content | string +").replace(
        "'\\n' + m.content", "'\\n' + m.content | string"
    )
    rows, _ = find(as_python, THOUGHT[:2])
    assert "'type'" not in rows[0].text


def test_answers_that_the_prompt_leaves_no_place_for_are_refused_one_by_one() -> None:
    source = fix_variables(DROPS_EARLIER, {"enable_thinking": False})
    rows, problems = find(source, [*TWO_TURNS[:2], *THOUGHT[2:]])
    assert [[span.message for span in row.answers] for row in rows] == [[1]]
    assert [str(problem) for problem in problems] == [REASONING_NOT_PROMPTED]


def test_a_template_that_wants_text_gets_the_arguments_as_text() -> None:
    rows, _ = find(TEXT_ARGUMENTS, [user("q"), call(river="Nebo")], tools=TOOLS)
    assert '[[level{"river": "Nebo"}<|im_end|>]]' in marked(rows)[0]
    as_python = TEXT_ARGUMENTS.replace("c.function.arguments }}", "c.function.arguments | string }}")
    rows, _ = find(as_python, [user("q"), call(river="Nebo")], tools=TOOLS)
    assert '[[level{"river": "Nebo"}<|im_end|>]]' in marked(rows)[0]


def test_each_text_is_stripped_or_not_on_its_own() -> None:
    source = (
        HEAD
        + "{{ '<|im_start|>' + m.role + '\\n' + (m.content | trim if m.role == 'assistant' else m.content) }}"
        + "{{ '<|im_end|>\\n' }}"
        + PROMPT
    )
    rows, _ = find(source, [user("q\n"), answer(" a"), user(" q "), answer("b")])
    assert marked(rows) == [
        "<|im_start|>user\nq\n<|im_end|>\n<|im_start|>assistant\n[[a<|im_end|>]]\n"
        "<|im_start|>user\n q <|im_end|>\n<|im_start|>assistant\n[[b<|im_end|>]]\n"
    ]


@pytest.mark.parametrize("space", [" ", "\n", "\n\n"])
def test_white_space_may_stand_before_the_stop_token(space: str) -> None:
    source = CHATML.replace("m.content + '<|im_end|>", f"m.content + {space!r} + '<|im_end|>")
    rows, _ = find(source, TWO_TURNS)
    assert [row.text[span.start : span.end] for row in rows for span in row.answers] == [
        f"a{n}{space}<|im_end|>" for n in (1, 2)
    ]
    assert [row.text[span.stop_start :][:10] for row in rows for span in row.answers] == ["<|im_end|>"] * 2


def test_the_next_turn_ends_an_answer_whose_reasoning_is_left_out_then() -> None:
    source = NEXT_TURN.replace(
        "{{ m.content }}",
        "{{ '<think>' + m.reasoning_content + '</think>' if loop.last and m.reasoning_content }}{{ m.content }}",
    )
    rows, _ = find(source, THOUGHT[:2])
    assert marked(rows) == ["<|user|>q1<|assistant|>[[<think>r1</think>a1<|user|>]]"]


def test_a_context_that_lacks_a_call_is_refused() -> None:
    with pytest.raises(Untraceable, match="leaves out 'level' of the call in message 2"):
        find(CHATML, [user("q"), call(river="N"), {"role": "tool", "content": "2"}, answer("two")])
    with pytest.raises(LeftOut, match="leaves out the tool 'level'; choose one that has a place for tools"):
        find(CHATML, [user("q"), answer("a")], tools=TOOLS)


def test_tools_may_be_left_out_where_calls_are_written() -> None:
    rows, problems = find(
        NO_TOOLS, [user("q"), call(river="N"), {"role": "tool", "content": "2"}, answer("two")], tools=TOOLS
    )
    assert problems == []
    assert marked(rows) == [
        '<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n[[level{"river": "N"}<|im_end|>]]\n'
        "<|im_start|>tool\n2<|im_end|>\n<|im_start|>assistant\n[[two<|im_end|>]]\n"
    ]
    assert [row.tools_left_out for row in rows] == [True]
    rows, _ = find(TEXT_ARGUMENTS, [user("q"), call(river="N")], tools=TOOLS)
    assert [row.tools_left_out for row in rows] == [False]


def test_every_form_is_tried_for_a_call_that_ends_the_row() -> None:
    rows, problems = find(NO_TOOLS, [user("q"), call(river="N")], tools=TOOLS)
    assert problems == []
    assert marked(rows)[0].endswith('assistant\n[[level{"river": "N"}<|im_end|>]]\n')


def test_reasoning_that_the_template_does_not_read_is_not_written_without_marks() -> None:
    rows, problems = find(INSTRUCTS, THOUGHT[:2])
    assert problems == []
    assert marked(rows)[0].startswith(
        "<|im_start|>user\nq1<|im_end|><|im_start|>system\nSay what to do.<|im_end|><|im_start|>assistant\n"
        "[[<think>\nr1\n</think>\n\na1<|im_end|>]]"
    )
    with pytest.raises(LeftOut, match=NO_REASONING.split(";")[0]):
        find(INSTRUCTS.replace("m.content", "m.content.split('</think>')[-1]"), THOUGHT[:2])


def test_a_block_is_not_opened_twice() -> None:
    opens = CHATML.replace("assistant\\n'", "assistant\\n<think>\\n'").replace(
        "'\\n' + m.content", "('\\n<think>\\n' if m.role == 'assistant' and loop.last else '\\n') + m.content"
    )
    (row,), _ = find(opens, [user("q"), answer("a")])
    assert row.text.endswith("assistant\n<think>\na<|im_end|>\n")
    with pytest.raises(LeftOut):
        find(opens, THOUGHT[:2])


def test_a_template_may_need_tools() -> None:
    source = INSTRUCTS.replace("{%- if add", "{%- for t in tools -%}{{ t.function.name }}{%- endfor -%}{%- if add")
    (row,), _ = find(source, TWO_TURNS[:2], tools=[PROBE_TOOL])
    assert marked([row])[0].endswith("[[a1<|im_end|>]]<|im_start|>system\nSay what to do.<|im_end|>look_up")


def test_a_stop_token_may_begin_the_conversation_too() -> None:
    rows, _ = find("{{ '<|im_end|>' }}" + CHATML, TWO_TURNS)
    assert [row.text[span.start : span.end] for row in rows for span in row.answers] == ["a1<|im_end|>", "a2<|im_end|>"]


# Variables


def test_variables_are_fixed_in_the_source() -> None:
    source = "{{ name }}|{{ messages[0].content }}|{{ 'on' if flag else 'off' }}"
    fixed = fix_variables(source, {"name": 'a "b" \\ é 🌹\n', "flag": False})
    assert ChatTemplate(fixed, {}).render([user("q")]) == 'a "b" \\ é 🌹\n|q|off'
    assert ChatTemplate(fixed, {"flag": True}).render([user("q")]).endswith("|on")  # a default, not a constant
    assert fix_variables(source, {}) == source
    assert ChatTemplate(fix_variables("\n\n{{ flag }}", {"flag": [1, {"a": None}]}), {}).render([]) == "\n\n[1, {'a': None}]"


def test_the_date_is_fixed() -> None:
    source = "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }} {{ strftime_now(\"%Y\") }}{% endif %}"
    assert ChatTemplate(fix_variables(source, {"date": "2026-01-31"}), {}).render([]) == "31 Jan 2026 2026"
    in_a_macro = "{% macro f() %}{{ strftime_now('%Y') }}{% endmacro %}{{ f() }}"
    assert ChatTemplate(fix_variables(in_a_macro, {"date": "2026-01-31"}), {}).render([]) == "2026"
    for_a_variable = "{% set f = '%A, %-d.%-m.%Y' %}{{ strftime_now(f) }}{{ strftime_now(format='%y') }}"
    assert ChatTemplate(fix_variables(for_a_variable, {"date": "2026-01-03"}), {}).render([]) == "Saturday, 3.1.202626"
    with pytest.raises(Exception, match=r'encode.template_kwargs: \{date: "2026-01-31"\}'):
        ChatTemplate(in_a_macro, {}).render([])


def test_a_variable_that_the_template_does_not_read_is_an_error() -> None:
    with pytest.raises(
        ValueError, match="enable_thinkin: the template does not read it; it reads enable_thinking"
    ) as caught:
        fix_variables("{{ enable_thinking }}{{ eos_token }}", {"enable_thinkin": False, "messages": [], "eos_token": "x"})
    assert len(str(caught.value).splitlines()) == 3
    for value in (float("inf"), float("nan"), "\ud800", [{"a": datetime.date(2026, 1, 31)}]):
        with pytest.raises(ValueError, match=r"enable_thinking: found .* wanted a text, a number"):
            fix_variables("{{ enable_thinking }}", {"enable_thinking": value})
    with pytest.raises(ValueError, match="wanted a text in quotes"):
        fix_variables("{{ strftime_now('%Y') }}", {"date": "yesterday"})
    with pytest.raises(ValueError, match="date: the template does not read it"):
        fix_variables("{{ messages }}", {"date": "2026-01-31"})
