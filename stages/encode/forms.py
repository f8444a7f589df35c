"""The forms in which reasoning and tool calls are given to chat templates, which differ in what they read."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

Message: TypeAlias = Mapping[str, Any]

REASONING = "reasoning_content"
ReasoningForm: TypeAlias = Literal["none", "reasoning_content", "thinking", "reasoning", "parts", "inline", "spliced"]
REASONING_FORMS: tuple[ReasoningForm, ...] = ("reasoning_content", "thinking", "reasoning", "parts", "inline", "spliced")
"""How a message gives its reasoning to a template, in the order in which they are tried: a field of that name, content parts
(Mistral), `<think>…</think>` at the beginning of the content, or not at all: then the answer is put behind a prompt for
generation that has opened a thinking block (DeepSeek R1)."""

THINKING_MARKS = (
    ("<think>", "</think>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<mm:think>", "</mm:think>"),
    ("<|channel>thought", "<channel|>"),
)
"""What opens and what closes a thinking block in the templates of current models."""
OPENING = "|".join(re.escape(opening) for opening, _ in THINKING_MARKS)
CLOSING = "|".join(re.escape(closing) for _, closing in THINKING_MARKS)
OPEN_BLOCK = re.compile(rf"({OPENING})\s*\Z")
"""The end of a prompt that opens a thinking block."""
EMPTY_BLOCK = re.compile(rf"\s*(?:{OPENING})?\s*(?:{CLOSING})\s*")
"""An empty thinking block, whether the prompt has opened it or not."""
BLOCK_END = re.compile(rf"\s*(?:{CLOSING})\s*")
ANY_MARK = re.compile(rf"\s*(?:{OPENING}|{CLOSING})\s*")
MARKS_AT_END = re.compile(rf"(?:\s*(?:{OPENING}|{CLOSING})\s*)+\Z")
SECOND_BLOCK = re.compile(rf"(?:{OPENING}|{CLOSING})\s*(?:{OPENING})\s*\Z")
"""A thinking block opened in another one, or behind one that is closed."""
PARTS_AS_TEXT = re.compile(r"""["']type["']: ["']""")
"""In a rendering: the template wrote a list of parts as Python or JSON does, since it knows only text."""


class Form(NamedTuple):
    """How the messages of a conversation are given to the template."""

    reasoning: ReasoningForm
    arguments_as_text: bool
    """Whether the arguments of calls are JSON text instead of objects."""
    no_content: bool = False
    """Whether the content of calls without a text is None, as DeepSeek V3 wants it, instead of ""."""


def forms_to_try(messages: Sequence[Message]) -> Iterator[Form]:
    """The forms in which a template may write the messages, in order."""
    has_calls = any("tool_calls" in message for message in messages)
    none: tuple[ReasoningForm, ...] = ("none",)
    for reasoning in REASONING_FORMS if any(REASONING in message for message in messages) else none:
        yield Form(reasoning, arguments_as_text=False)
        if has_calls:
            yield Form(reasoning, arguments_as_text=True)
            yield Form(reasoning, arguments_as_text=False, no_content=True)
            yield Form(reasoning, arguments_as_text=True, no_content=True)


def give(messages: Sequence[Message], form: Form) -> list[Message]:
    """The messages as the template gets them."""
    return [_give(message, form) if "tool_calls" in message or REASONING in message else message for message in messages]


def _give(message: Message, form: Form) -> Message:
    given = {key: value for key, value in message.items() if key != REASONING}
    if form.arguments_as_text and "tool_calls" in message:
        given["tool_calls"] = [_with_text_arguments(call) for call in message["tool_calls"]]
    if form.no_content and "tool_calls" in message and not message["content"]:
        given["content"] = None
    if REASONING not in message:
        return given
    reasoning, content = message[REASONING], message["content"]
    match form.reasoning:
        case "reasoning_content" | "thinking" | "reasoning":
            given[form.reasoning] = reasoning
        case "parts":
            given["content"] = [{"type": "thinking", "thinking": reasoning}]
            given["content"] += [{"type": "text", "text": content}] if content else []
        case "inline":
            given["content"] = f"<think>\n{reasoning}\n</think>\n\n{content or ''}"
    return given


def _with_text_arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call["function"]
    return {**call, "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}}


def closing_of(opening: str) -> str:
    """The mark that closes a thinking block."""
    return dict(THINKING_MARKS)[opening]
