"""Which characters of a rendered conversation are in the loss, and which tokens those are.

A conversation is rendered once and tokenized once, as a whole. The answers are found by their position in the text, not by
searching for token patterns, and labels do not depend on padding. So the stop token is in the loss even if it is also the
pad token.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

from stages.encode.template import ChatTemplate, TextSpan, Untraceable

LabelsOn: TypeAlias = Literal["assistant", "last_assistant", "all"]


class SpecialTokens:
    """Finds special tokens in a text; where several match, the longest one counts."""

    def __init__(self, tokens: Iterable[str]) -> None:
        ordered = sorted({token for token in tokens if token}, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, ordered)) or r"(?!)")

    def first_in(self, text: str) -> str | None:
        """The first special token in a text, None if there is none."""
        found = self._pattern.search(text)
        return found[0] if found else None

    def at(self, text: str, position: int) -> str:
        """The special token that starts at a character, "" if none does."""
        found = self._pattern.match(text, position)
        return found[0] if found else ""

    def last(self, text: str, start: int, end: int) -> tuple[int, int]:
        """The characters [start, end) of the last special token within a range, (start, start) if there is none."""
        last = (start, start)
        for found in self._pattern.finditer(text, start, end):
            last = found.span()
        return last


class AnswerSpan(NamedTuple):
    """One answer in the rendered text: everything that follows the prompt for it, [start, end), with the stop token."""

    start: int
    end: int
    in_loss: bool
    """False if the message has `"train": False`."""
    stop: str
    """The special token that ends the answer, "" if the template writes none there."""
    follows_prompt: bool
    """Whether the text before the answer is the prompt that the template renders for it."""


def find_answers(
    template: ChatTemplate, messages: Sequence[Mapping[str, Any]], *, tools: Sequence[Any], special: SpecialTokens
) -> tuple[str, list[AnswerSpan], list[TextSpan] | None]:
    """The rendered conversation, where its answers are, and where all its texts are (None for a conversation with tools).

    Args:
        template: The chat template.
        messages: Messages with role and content, and `"train": False` for an answer that is not in the loss.
        tools: The functions that the assistant may call; usually empty.
        special: The tokenizer's special tokens.

    Raises:
        Untraceable: If an answer is not in the rendered text unchanged.
        jinja2.TemplateError: If the template refuses the conversation.
    """
    text = template.render(messages, tools)
    if tools or any("tool_calls" in message for message in messages):
        # Each template writes a call in its own format, so there is no known text to look for.
        return text, _find_answers_by_prefix(template, messages, tools=tools, text=text, special=special), None
    text_spans = template.text_spans(messages, text)
    contents = [span for span in text_spans if messages[span.message]["role"] == "assistant" and span.field == "content"]
    if [span.message for span in contents] != [n for n, message in enumerate(messages) if message["role"] == "assistant"]:
        raise Untraceable("the template leaves out an answer, or writes one twice")
    answers = []
    for span in contents:
        stop = special.at(text, span.end)
        answers.append(
            AnswerSpan(
                start=span.start - (span.leading_space or 0),
                end=span.end + len(stop),
                in_loss=messages[span.message].get("train", True),
                stop=stop,
                follows_prompt=span.leading_space is not None,
            )
        )
    return text, answers, text_spans


def _find_answers_by_prefix(
    template: ChatTemplate,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Any],
    text: str,
    special: SpecialTokens,
) -> list[AnswerSpan]:
    """The answers in `text`, the complete conversation.

    Each is found by rendering the conversation up to the answer and through it: the answer is the difference. Both must be
    prefixes of `text`.
    """
    answers = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = template.render(messages[:number], tools, add_generation_prompt=True)
        through = template.render(messages[: number + 1], tools)
        if not text.startswith(prompt) or not through.startswith(prompt):
            raise Untraceable(f"the text before the answer in message {number + 1} is not the prompt for it")
        if not text.startswith(through):
            raise Untraceable(f"the template writes the answer in message {number + 1} differently if more messages follow")
        # Only white space may follow a stop token.
        at, end = special.last(through, len(prompt), len(through))
        if at == end or through[end:].strip():
            at = end = len(through)
        stop = through[at:end]
        _check_answer(message, through[len(prompt) : at], number)
        answers.append(
            AnswerSpan(
                start=len(prompt),
                end=at + len(stop),
                in_loss=message.get("train", True),
                stop=stop,
                follows_prompt=True,
            )
        )
    return answers


def _check_answer(message: Mapping[str, Any], text: str, number: int) -> None:
    """Raises Untraceable if the rendered answer lacks the message's content, or the name or an argument of a call."""
    parts = [message["content"].strip()]
    for call in message.get("tool_calls", []):
        parts += [call["function"]["name"], *_argument_texts(call["function"]["arguments"])]
    at = 0
    for part in parts:
        found = text.find(part, at)
        if found < 0:
            raise Untraceable(f"the template leaves out {part[:60]!r} of the answer in message {number + 1}")
        at = found + len(part)


def _argument_texts(value: Any) -> Iterator[str]:
    """The names and texts in a call's arguments, in order, as JSON writes them between quotes."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield json.dumps(key, ensure_ascii=False)[1:-1]
            yield from _argument_texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _argument_texts(inner)
    elif isinstance(value, str):
        yield json.dumps(value, ensure_ascii=False)[1:-1]


def token_range(answer: AnswerSpan, offsets: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The tokens [start, end) of an answer.

    A token that overlaps the start of the answer (" Yes" after "Assistant:") belongs to it, and so does one that overlaps
    its end.

    Args:
        answer: The answer's characters.
        offsets: (tokens,) Characters [start, end) of each token; empty ranges for tokens without text.
    """
    inside = [n for n, (start, end) in enumerate(offsets) if start < answer.end and end > answer.start]
    return (inside[0], inside[-1] + 1) if inside else (len(offsets), len(offsets))


def find_label_ranges(
    answers: Sequence[AnswerSpan], ranges: Sequence[tuple[int, int]], *, length: int, labels_on: LabelsOn
) -> list[tuple[int, int]]:
    """The tokens [start, end) of a row that have a label. The first token never has one: no token before it predicts it.

    Args:
        answers: The answers, from `find_answers`.
        ranges: The tokens of each answer, from `token_range`.
        length: The number of tokens in the row.
        labels_on: "assistant": every answer; "last_assistant": the last one; "all": every token, as in pretraining.
    """
    if labels_on == "all":
        return [(1, length)] if length > 1 else []
    chosen = list(zip(answers, ranges, strict=True))[-1 if labels_on == "last_assistant" else 0 :]
    return [(max(start, 1), end) for answer, (start, end) in chosen if answer.in_loss and end > max(start, 1)]
