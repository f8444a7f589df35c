"""Masks: exactly the answers and their stop tokens are learned, in every template, to the token."""

from pathlib import Path
from typing import Any

import jinja2.sandbox
import pytest

from stages.lib.mask import IGNORE, Span, Untraceable, find_answers, make_labels, prompt_length
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


def renderer(source: str):
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)

    def fail(message: str) -> None:
        raise jinja2.TemplateError(message)

    template = environment.from_string(source)
    return lambda messages, **extra: template.render(messages=messages, eos_token="</s>", raise_exception=fail, **extra)


def built_in(name: str):
    return renderer((TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8"))


# The tutorial's renderings, to the byte.
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
def test_renderings(name: str, messages: list[dict[str, Any]], text: str) -> None:
    assert built_in(name)(messages) == text


@pytest.mark.parametrize("name", ["human_assistant", "chatglm", "chatml", "alpaca"])
def test_the_prompt_for_an_answer_is_the_start_of_the_training_text(name: str) -> None:
    render = built_in(name)
    full = render(MULTI)
    prompt = render(MULTI[:3], add_generation_prompt=True)
    assert full.startswith(prompt)
    assert full[len(prompt) :].lstrip().startswith("a2")


@pytest.mark.parametrize(
    ("name", "learned"),
    [
        ("join", ["a1", "a2"]),
        ("join_eos", ["a1</s>", "a2</s>"]),
        ("human_assistant", ["a1</s>", "a2</s>"]),
        ("chatglm", ["a1", "a2</s>"]),
        ("chatml", ["a1<|im_end|>", "a2<|im_end|>"]),
        ("alpaca", ["a1</s>", "a2</s>"]),
    ],
)
def test_the_answers_with_their_stop_tokens_are_found(name: str, learned: list[str]) -> None:
    text, spans = find_answers(built_in(name), MULTI, ["</s>", "<|im_end|>", "<|im_start|>"])
    assert [text[span.start : span.end] for span in spans] == learned


def test_an_answer_that_repeats_the_prompt_is_found_in_its_own_place() -> None:
    messages = [{"role": "user", "content": "Assistant: yes"}, {"role": "assistant", "content": "yes"}]
    text, spans = find_answers(built_in("human_assistant"), messages, ["</s>"])
    assert spans == [Span(text.rindex("yes"), len(text), True, "</s>")]


def test_a_template_may_strip_an_answer_but_not_change_or_drop_it() -> None:
    padded = [MULTI[0], {"role": "assistant", "content": " a1 \n"}]
    text, spans = find_answers(renderer("{% for m in messages %}<{{ m.content | trim }}>{% endfor %}"), padded, [])
    assert [text[span.start : span.end] for span in spans] == ["a1"]
    with pytest.raises(Untraceable, match="changes the text"):
        find_answers(renderer("{% for m in messages %}<{{ m.content | upper }}>{% endfor %}"), padded, [])
    with pytest.raises(Untraceable, match="leaves out the answer in message 2"):
        find_answers(renderer("{{ messages[0].content }}"), padded, [])


# One character a token, as a tokenizer that can be checked by eye; "Ġ"-like tokens by joining a space to what follows.
def tokens(text: str) -> tuple[list[str], list[int], list[tuple[int, int]]]:
    pieces, at = [], 0
    while at < len(text):
        width = 4 if text.startswith("</s>", at) else 2 if text[at] == " " and at + 1 < len(text) else 1
        pieces.append((text[at : at + width], (at, at + width)))
        at += width
    return [piece for piece, _ in pieces], list(range(100, 100 + len(pieces))), [offset for _, offset in pieces]


def learned(messages: list[dict[str, Any]], labels_on: Any, name: str = "human_assistant") -> list[str]:
    text, spans = find_answers(built_in(name), messages, ["</s>"])
    pieces, ids, offsets = tokens(text)
    labels = make_labels(ids, offsets, spans, labels_on)
    assert all(label in (IGNORE, token) for label, token in zip(labels, ids, strict=True))
    assert labels[0] == IGNORE
    return [piece if label != IGNORE else "." for piece, label in zip(pieces, labels, strict=True)]


def test_a_token_shared_with_the_text_before_belongs_to_the_answer() -> None:
    assert "".join(learned(MULTI[:2], "assistant")).lstrip(".") == " a1</s>"


def test_all_answers_or_the_last_or_everything() -> None:
    assert [piece for piece in learned(MULTI, "assistant") if piece != "."] == [" a", "1", "</s>", " a", "2", "</s>"]
    assert [piece for piece in learned(MULTI, "last_assistant") if piece != "."] == [" a", "2", "</s>"]
    assert learned(MULTI, "all").count(".") == 1


def test_a_message_that_is_not_to_be_learned_is_left_out() -> None:
    silent = [MULTI[0], MULTI[1] | {"train": False}, *MULTI[2:]]
    assert [piece for piece in learned(silent, "assistant") if piece != "."] == [" a", "2", "</s>"]
    assert set(learned([*MULTI[:3], MULTI[3] | {"train": False}], "last_assistant")) == {"."}


def test_the_prompt_ends_where_the_last_answer_begins() -> None:
    text, spans = find_answers(built_in("human_assistant"), MULTI, ["</s>"])
    pieces, _, offsets = tokens(text)
    assert "".join(pieces[: prompt_length(offsets, spans)]) == "Human: q1\n\nAssistant: a1</s>Human: q2\n\nAssistant:"


def test_the_templates_in_the_folder_are_the_ones_tested() -> None:
    names = {path.stem for path in TEMPLATES.glob("*.jinja")} - {"report.html"}
    assert names == {"join", "join_eos", "human_assistant", "chatglm", "chatml", "alpaca"}
    assert Path(TEMPLATES / "report.html.jinja").exists()
