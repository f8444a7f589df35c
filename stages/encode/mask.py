"""Which characters of a rendered conversation are learned, and which tokens those are.

A conversation is rendered once and tokenized once, as a whole. The answers are found by their place in the text, never by
a search for token patterns, and padding plays no part, so the stop token is learned even where it is the pad token too.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

from stages.encode.template import ChatTemplate, Place, Untraceable


class SpecialTokens:
    """Finds special tokens in a text; where several fit, the longest is meant."""

    def __init__(self, tokens: Iterable[str]) -> None:
        ordered = sorted({token for token in tokens if token}, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, ordered)) or r"(?!)")

    def first_in(self, text: str) -> str | None:
        """The first one in a text."""
        found = self._pattern.search(text)
        return found[0] if found else None

    def at(self, text: str, place: int) -> str:
        """The one that begins at a character, "" if none does."""
        found = self._pattern.match(text, place)
        return found[0] if found else ""

    def last(self, text: str, start: int, end: int) -> tuple[int, int]:
        """The characters [start, end) of the last one that lies between two, (start, start) if none does."""
        place = (start, start)
        for found in self._pattern.finditer(text, start, end):
            place = found.span()
        return place


LabelsOn: TypeAlias = Literal["assistant", "last_assistant", "all"]


class Span(NamedTuple):
    """One answer in the text: all that follows the prompt for it, [start, end), stop token included; is it learned?"""

    start: int
    end: int
    learned: bool
    stop: str
    """The special token that ends the answer, "" if the template puts none there."""
    prompted: bool
    """Whether the text before it is the prompt that the template makes for it."""


def find_answers(
    template: ChatTemplate,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Any],
    special: SpecialTokens,
) -> tuple[str, list[Span], list[Place] | None]:
    """The rendered conversation, where its answers are, and where all its texts are (None with tools).

    Args:
        template: The chat template.
        messages: Rows of `messages`: role, content, and `"train": False` for an answer that is not learned.
        tools: What the assistant may call; usually nothing.
        special: The tokenizer's special tokens.

    Raises:
        Untraceable: If the answers do not stand in the text as they are.
        jinja2.TemplateError: If the template refuses the conversation.
    """
    text = template.render(messages, tools)
    if tools or any("tool_calls" in message for message in messages):
        # How a call is written is the template's affair, so there is no text to look for.
        return text, _spans_by_prefix(template, messages, tools, text, special), None
    places = template.places(messages, text)
    answers = [place for place in places if messages[place.message]["role"] == "assistant" and place.field == "content"]
    if [place.message for place in answers] != [n for n, message in enumerate(messages) if message["role"] == "assistant"]:
        raise Untraceable("the template leaves out an answer, or writes one twice")
    spans = []
    for place in answers:
        stop = special.at(text, place.end)
        start, learned = place.start - (place.lead or 0), messages[place.message].get("train", True)
        spans.append(Span(start, place.end + len(stop), learned, stop, prompted=place.lead is not None))
    return text, spans, places


def _spans_by_prefix(
    template: ChatTemplate,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Any],
    text: str,
    special: SpecialTokens,
) -> list[Span]:
    """An answer is what a conversation has more than the prompt for it, if the whole begins with both."""
    spans = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = template.render(messages[:number], tools, add_generation_prompt=True)
        through = template.render(messages[: number + 1], tools)
        if not text.startswith(prompt) or not through.startswith(prompt):
            raise Untraceable(f"the text before the answer in message {number + 1} is not the prompt for it")
        if not text.startswith(through):
            raise Untraceable(f"the template writes the answer in message {number + 1} otherwise when more follows")
        # The stop token is the last thing in the text but white space, or there is none.
        at, end = special.last(through, len(prompt), len(through))
        if at == end or through[end:].strip():
            at = end = len(through)
        stop = through[at:end]
        _check_answer(message, through[len(prompt) : at], number)
        spans.append(Span(len(prompt), at + len(stop), message.get("train", True), stop, prompted=True))
    return spans


def _check_answer(message: Mapping[str, Any], text: str, number: int) -> None:
    """Raises Untraceable if what the template wrote of an answer lacks its content, a call's name or an argument."""
    parts = [message["content"].strip()]
    for call in message.get("tool_calls", []):
        parts += [call["function"]["name"], *_words(call["function"]["arguments"])]
    at = 0
    for part in parts:
        found = text.find(part, at)
        if found < 0:
            raise Untraceable(f"the template leaves out {part[:60]!r} of the answer in message {number + 1}")
        at = found + len(part)


def _words(value: Any) -> Iterator[str]:
    """The names and texts in a call's arguments, in order, as JSON writes them inside quotes."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield json.dumps(key, ensure_ascii=False)[1:-1]
            yield from _words(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _words(inner)
    elif isinstance(value, str):
        yield json.dumps(value, ensure_ascii=False)[1:-1]


def token_range(span: Span, offsets: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The tokens [first, last) of an answer.

    A token that an answer shares with the text before it (" Yes" after "Assistant:") belongs to the answer; so does one
    that it shares with the text behind.

    Args:
        offsets: (tokens,) Characters [start, end) of each token; empty for tokens that stand for no text.
    """
    inside = [n for n, (start, end) in enumerate(offsets) if start < span.end and end > span.start]
    return (inside[0], inside[-1] + 1) if inside else (len(offsets), len(offsets))


def learned_ranges(
    spans: Sequence[Span], ranges: Sequence[tuple[int, int]], length: int, labels_on: LabelsOn
) -> list[tuple[int, int]]:
    """The tokens [first, last) of a row that get a label; the first token of a row never does, as nothing predicts it.

    Args:
        spans: The answers, from `find_answers`.
        ranges: The tokens of each, from `token_range`.
        length: The row's tokens.
        labels_on: "assistant": every answer; "last_assistant": the last one; "all": every token, as a plain language model.
    """
    if labels_on == "all":
        return [(1, length)] if length > 1 else []
    chosen = list(zip(spans, ranges, strict=True))[-1 if labels_on == "last_assistant" else 0 :]
    return [(max(first, 1), last) for span, (first, last) in chosen if span.learned and last > max(first, 1)]
