"""Masks: in every template, exactly the tokens of the answers and their stop tokens are in the loss."""

from pathlib import Path
from typing import Any

import jinja2
import pytest
from transformers import AutoTokenizer

from stages.encode.answers import AnswerFinder, Conversation, RenderedRow
from stages.encode.mask import SpecialTokens, find_label_ranges, token_range
from stages.encode.spans import Untraceable
from stages.encode.template import ChatTemplate
from stages.encode.tokenizer import align
from tests.tiny import PROJECT

TEMPLATES = PROJECT / "stages" / "templates"
BELLE = "给定一个英文句子，翻译成中文。\nI love to learn new things every day.\n"
SINGLE = [{"role": "user", "content": BELLE}, {"role": "assistant", "content": "我每天喜欢学习新事物。"}]
MULTI = [
    {"role": "user", "content": "q1"},
    {"role": "assistant", "content": "a1"},
    {"role": "user", "content": "q2"},
    {"role": "assistant", "content": "a2"},
]


EOS = {"eos_token": "</s>"}
SPECIAL = SpecialTokens(["</s>", "<|im_end|>", "<|im_start|>"])
NONE = SpecialTokens([])


def renderer(source: str) -> ChatTemplate:
    return ChatTemplate(source, EOS)


def built_in(name: str) -> ChatTemplate:
    return renderer((TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8"))


def find_rows(
    template: ChatTemplate, messages: list[dict[str, Any]], *, tools: Any = (), special: SpecialTokens = SPECIAL
) -> list[RenderedRow]:
    finder = AnswerFinder(template, special, bos="", thinking="train", train_empty_thinking=False)
    rows, problems = finder.rows(Conversation(messages, tools), last_only=False)
    if problems:
        raise problems[0]
    return rows


def answer_texts(rows: list[RenderedRow]) -> list[str]:
    return [row.text[answer.start : answer.end] for row in rows for answer in row.answers]


# The exact text that the tutorial's templates render.
@pytest.mark.parametrize(
    ("name", "messages", "text"),
    [
        ("join", SINGLE, BELLE + "我每天喜欢学习新事物。"),
        ("join_eos", SINGLE, BELLE + "我每天喜欢学习新事物。</s>"),
        ("human_assistant", SINGLE, f"Human: {BELLE}\n\nAssistant: 我每天喜欢学习新事物。</s>"),
        ("chatglm", SINGLE, f"[Round 1]\n\n问：{BELLE}\n\n答：我每天喜欢学习新事物。</s>"),
        ("chatglm", MULTI, "[Round 1]\n\n问：q1\n\n答：a1\n\n[Round 2]\n\n问：q2\n\n答：a2</s>"),
        (
            "chatml",
            MULTI[:2],
            "<|im_start|>user\nq1<|im_end|>\n<|im_start|>assistant\na1<|im_end|>\n",
        ),
        ("alpaca", MULTI[:2], "### Instruction:\nq1\n\n### Response:\na1</s>"),
        (
            "alpaca",
            [{"role": "user", "content": "xy", "instruction": "x", "input": "y"}, MULTI[1]],
            "### Instruction:\nx\n\n### Input:\ny\n\n### Response:\na1</s>",
        ),
    ],
)
def test_rendered_texts(name: str, messages: list[dict[str, Any]], text: str) -> None:
    assert built_in(name).render(messages) == text


@pytest.mark.parametrize("name", ["human_assistant", "chatglm", "chatml", "alpaca"])
def test_the_prompt_for_an_answer_is_the_start_of_the_training_text(name: str) -> None:
    template = built_in(name)
    full = template.render(MULTI)
    prompt = template.render(MULTI[:3], add_generation_prompt=True)
    assert full.startswith(prompt)
    assert full[len(prompt) :].lstrip().startswith("a2")


@pytest.mark.parametrize(
    ("name", "texts"),
    [
        ("join", ["a1", "a2"]),
        ("join_eos", ["a1</s>", "a2</s>"]),
        ("human_assistant", [" a1</s>", " a2</s>"]),  # the prompt ends in "Assistant:", so the space is generated too
        ("chatglm", ["a1</s>", "a2</s>"]),
        ("chatml", ["a1<|im_end|>", "a2<|im_end|>"]),
        ("alpaca", ["a1</s>", "a2</s>"]),
    ],
)
def test_the_answers_with_their_stop_tokens_are_found(name: str, texts: list[str]) -> None:
    rows = find_rows(built_in(name), MULTI)
    assert answer_texts(rows) == texts
    assert len(rows) == (2 if name == "chatglm" else 1)  # ChatGLM writes the stop token behind the last answer alone


def test_an_answer_that_also_occurs_in_the_prompt_is_found_after_it() -> None:
    messages = [{"role": "user", "content": "Assistant: yes"}, {"role": "assistant", "content": "yes"}]
    (row,) = find_rows(built_in("human_assistant"), messages)
    (answer,) = row.answers
    assert (answer.start, answer.end, answer.stop) == (row.text.rindex(" yes"), len(row.text), "</s>")
    assert answer.follows_prompt


def test_a_template_may_strip_an_answer_but_not_change_or_drop_it() -> None:
    padded = [MULTI[0], {"role": "assistant", "content": " a1 \n"}]
    rows = find_rows(renderer("{% for m in messages %}<{{ m.content | trim }}>{% endfor %}"), padded, special=NONE)
    assert rows[0].text == "<q1><a1>"
    assert [rows[0].text[span.start : span.end] for span in rows[0].spans] == ["q1", "a1"]
    for source, match in [
        ("{% for m in messages %}<{{ m.content | upper }}>{% endfor %}", "changes the text"),
        ("{{ messages[0].content }}", "leaves out an answer"),
        ("{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}", "writes an answer twice"),
    ]:
        with pytest.raises(Untraceable, match=match):
            find_rows(renderer(source), padded, special=NONE)


@pytest.mark.parametrize(
    ("source", "match"),
    [
        ("{% for m in messages %}{{ m.content | replace('.', ',') }}|{% endfor %}", "leaves out an answer"),
        ("{% for m in messages %}{{ m.content | reverse }}|{% endfor %}", "leaves out an answer"),
        ("{% for m in messages %}\ue000{{ m.content }}|{% endfor %}", "changes the text"),
        ("{% for m in messages %}{{ m.content[1:] }}|{% endfor %}", "leaves out an answer"),
        ("{% for m in messages %}{{ m.content if m.role != 'user' }}|{% endfor %}", "leaves out the user message"),
    ],
)
def test_a_template_that_changes_or_drops_a_text_is_refused(source: str, match: str) -> None:
    with pytest.raises(Untraceable, match=match):
        find_rows(renderer(source), MULTI, special=NONE)


def test_a_template_that_recurses_without_end_is_refused() -> None:
    with pytest.raises(jinja2.TemplateError, match="RecursionError"):
        renderer("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}").render(MULTI)


def test_each_row_is_checked_even_if_the_shape_is_cached() -> None:
    picky = renderer("{% for m in messages %}{{ m.content if m.content != 'no' else 'NO' }}|{% endfor %}")
    finder = AnswerFinder(picky, NONE, bos="", thinking="train", train_empty_thinking=False)
    for content in ("yes", "maybe"):
        conversation = Conversation([MULTI[0], {"role": "assistant", "content": content}], [])
        assert finder.rows(conversation, last_only=False)[0]
    with pytest.raises(Untraceable, match="changes the text"):
        finder.rows(Conversation([MULTI[0], {"role": "assistant", "content": "no"}], []), last_only=False)


CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}],
}
OTHER_CALL = {"type": "function", "function": {"name": "subtract", "arguments": {"b": 2}}}
TOOLED = [MULTI[0], CALL, {"role": "tool", "content": "2"}, MULTI[3]]
TOOL_TEMPLATE = (
    "{% for t in tools or [] %}<{{ t.function.name }}>{% endfor %}"
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def test_a_tool_call_is_an_answer() -> None:
    tools = [{"type": "function", "function": {"name": "add"}}]
    rows = find_rows(renderer(TOOL_TEMPLATE), TOOLED, tools=tools)
    call = '{"name": "add", "arguments": {"a": 1}}</s>'
    assert answer_texts(rows) == [call, "a2</s>"]
    assert len(rows) == 1


def test_a_template_that_leaves_out_a_part_of_a_call_is_refused() -> None:
    tools = [{"type": "function", "function": {"name": "add"}}]
    two = [MULTI[0], CALL | {"tool_calls": [*CALL["tool_calls"], OTHER_CALL]}, *TOOLED[2:]]
    first_only = renderer(TOOL_TEMPLATE.replace("m.tool_calls or []", "(m.tool_calls or [])[:1]"))
    find_rows(first_only, TOOLED, tools=tools)
    with pytest.raises(Untraceable, match="leaves out 'subtract' of the call in message 2"):
        find_rows(first_only, two, tools=tools)
    first_tool = renderer(TOOL_TEMPLATE.replace("tools or []", "(tools or [])[:1]"))
    find_rows(first_tool, TOOLED, tools=tools)
    with pytest.raises(Untraceable, match="leaves out the tool 'subtract'"):
        find_rows(first_tool, TOOLED, tools=[*tools, {"type": "function", "function": {"name": "subtract"}}])
    no_stop = renderer(
        TOOL_TEMPLATE.replace("{{ m.content }}", "<|im_start|>{{ m.content }}").replace("{{ eos_token }}", "")
    )
    (row,) = find_rows(no_stop, TOOLED, tools=tools)
    assert [answer.stop for answer in row.answers] == ["", ""]
    assert row.text[row.answers[0].start : row.answers[0].end].endswith('{"a": 1}}')


def test_templates_render_as_in_transformers(tiny_tokenizer: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer)
    own = (
        "{% for m in messages if m.content %}\n  {% if loop.first %}{{ bos_token }}{% endif %}\n"
        "{% generation %}{{ m | tojson }}{% endgeneration %}"
        "{% if m.role == 'assistant' %}{% continue %}{% endif %}-{% endfor %}"
        "{{ tools }}{{ add_generation_prompt }}"
    )
    for source in [
        own,
        TOOL_TEMPLATE,
        *(path.read_text(encoding="utf-8") for path in TEMPLATES.glob("*.jinja")),
    ]:
        ours = ChatTemplate(source, tokenizer.special_tokens_map)
        for messages in (SINGLE, MULTI):
            for prompt in (False, True):
                theirs = tokenizer.apply_chat_template(
                    messages, tokenize=False, chat_template=source, add_generation_prompt=prompt
                )
                assert ours.render(messages, add_generation_prompt=prompt) == theirs


def test_a_template_cannot_read_the_date() -> None:
    dated = "{% if strftime_now is defined %}{{ strftime_now('%Y') }}{% else %}1 Jan{% endif %}{{ messages[0].content }}"
    assert renderer(dated).render(MULTI) == "1 Janq1"


# A tokenizer that is easy to check: one token per character, but a space and the next character are one token, as with "Ġ".
def tokens(text: str) -> tuple[list[str], list[int], list[tuple[int, int]]]:
    pieces, at = [], 0
    while at < len(text):
        width = 4 if text.startswith("</s>", at) else 2 if text[at] == " " and at + 1 < len(text) else 1
        pieces.append((text[at : at + width], (at, at + width)))
        at += width
    return [piece for piece, _ in pieces], list(range(100, 100 + len(pieces))), [offset for _, offset in pieces]


def in_loss(messages: list[dict[str, Any]], labels_on: Any, name: str = "human_assistant") -> list[str]:
    finder = AnswerFinder(built_in(name), SpecialTokens(["</s>"]), bos="", thinking="train", train_empty_thinking=False)
    ((row,), _) = finder.rows(Conversation(messages, []), last_only=labels_on != "assistant")
    pieces, ids, offsets = tokens(row.text)
    ranges = [token_range(answer.label_start, answer.end, offsets) for answer in row.answers]
    chosen = {
        token
        for first, last in find_label_ranges(row.answers, ranges, length=len(ids), labels_on=labels_on)
        for token in range(first, last)
    }
    assert 0 not in chosen
    return [piece if number in chosen else "." for number, piece in enumerate(pieces)]


def test_a_token_shared_with_the_text_before_belongs_to_the_answer() -> None:
    assert "".join(in_loss(MULTI[:2], "assistant")).lstrip(".") == " a1</s>"


def test_labels_on_all_answers_the_last_answer_or_everything() -> None:
    assert [piece for piece in in_loss(MULTI, "assistant") if piece != "."] == [" a", "1", "</s>", " a", "2", "</s>"]
    assert [piece for piece in in_loss(MULTI, "last_assistant") if piece != "."] == [" a", "2", "</s>"]
    assert in_loss(MULTI, "all").count(".") == 1


def test_a_message_with_train_false_has_no_labels() -> None:
    silent = [MULTI[0], MULTI[1] | {"train": False}, *MULTI[2:]]
    assert [piece for piece in in_loss(silent, "assistant") if piece != "."] == [" a", "2", "</s>"]
    assert set(in_loss([*MULTI[:3], MULTI[3] | {"train": False}], "last_assistant")) == {"."}


@pytest.mark.parametrize(
    ("text", "pieces", "starts"),
    [
        ("ab cd", ["▁ab", "▁cd"], [0, 2]),  # a space is added before the first word
        ("ab  c", ["▁ab", "▁", "▁c"], [0, 2, 3]),
        ("</s>ab", ["</s>", "▁ab"], [0, 4]),
        ("a你b", ["▁a", "<0xE4>", "<0xBD>", "<0xA0>", "b"], [0, 1, 1, 1, 2]),
        ("a你b", ["▁a", "<unk>", "b"], [0, 1, 2]),
        ("你", ["▁", "<unk>"], [0, 0]),
    ],
)
def test_the_tokens_of_a_slow_tokenizer_are_aligned_with_the_text(text: str, pieces: list[str], starts: list[int]) -> None:
    offsets = align(text, pieces)
    assert [start for start, _ in offsets] == starts
    assert offsets[-1][1] == len(text)


def test_tokens_that_are_not_the_text_are_an_error() -> None:
    with pytest.raises(ValueError, match="token 1, 'xy', is not the text at character 1"):
        align("ab", ["xy", "zz"])


def test_the_tests_cover_all_templates() -> None:
    names = {path.stem for path in TEMPLATES.glob("*.jinja")}
    assert names == {"join", "join_eos", "human_assistant", "chatglm", "chatml", "alpaca"}
