"""Finds where the texts of messages are in a rendered conversation.

The conversation is rendered a second time with a mark in place of each text: what is between the marks is written by the
template. The template's parts and the messages' texts together must be exactly the rendered conversation.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

TEXT_FIELDS = ("content", "instruction", "input", "reasoning_content")
MARKED = "\ue000"
"""The first character of a mark."""
MARK = re.compile("\ue000(\\d+)\\.(\\d)\ue001")
"""A mark holds only digits, which filters like `upper` do not change."""


class Untraceable(ValueError):
    """The template changes or leaves out a text, so that it cannot be found in the rendered conversation."""


class LeftOut(Untraceable):
    """The template has no place for a text."""


class Slot(NamedTuple):
    """The place of one text between two of the template's parts."""

    message: int
    field: str


class TextSpan(NamedTuple):
    """Where one text of a message is in the rendered conversation: characters [start, end)."""

    message: int
    field: str
    start: int
    end: int


class Position(NamedTuple):
    """A character of a rendered conversation, independent of how long its texts are."""

    slots: int
    """The number of texts before it."""
    offset: int
    """Characters after the last of these texts."""


def mark_texts(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages with a mark for each of their texts. Blank texts stay, since templates ask whether there is one.

    The content of tool messages stays too: templates may parse it.
    """
    return [
        {
            key: mark(number, key)
            if key in TEXT_FIELDS and message["role"] != "tool" and isinstance(value, str) and value.strip()
            else value
            for key, value in message.items()
        }
        for number, message in enumerate(messages)
    ]


def mark(message: int, field: str) -> str:
    """The mark for a field of a message."""
    return f"\ue000{message}.{TEXT_FIELDS.index(field)}\ue001"


class Skeleton:
    """A rendered conversation without its texts: the template's parts, and which text stands between them."""

    def __init__(self, marked: str) -> None:
        """`marked` is the rendering of marked messages. Raises Untraceable if the template changed a mark."""
        self.parts: list[str] = []
        self.slots: list[Slot] = []
        self._ends: list[int] = []  # in `marked`, after each mark
        at = 0
        for found in MARK.finditer(marked):
            self.parts.append(marked[at : found.start()])
            self.slots.append(Slot(int(found[1]), TEXT_FIELDS[int(found[2])]))
            at = found.end()
            self._ends.append(at)
        self.parts.append(marked[at:])
        if any("\ue000" in part or "\ue001" in part for part in self.parts):
            raise Untraceable("the template changes the text of a message")

    def position(self, at: int) -> Position:
        """The position of a character of the marked rendering; it must not be inside a mark."""
        slots = sum(end <= at for end in self._ends)
        return Position(slots, at - (self._ends[slots - 1] if slots else 0))

    def fill(self, messages: Sequence[Mapping[str, Any]], text: str) -> "Filled":
        """Where the texts are in `text`, the rendering of the messages.

        Each is there unchanged, or without white space at one or both of its ends. Raises Untraceable if it is not.
        """
        texts = [messages[slot.message][slot.field] for slot in self.slots]
        filled = Filled.join(self, texts)
        if filled.text != text:
            filled = Filled.join(self, list(self._match(texts, text)))
        if filled.text != text:
            raise Untraceable("the template changes the text of a message")
        return filled

    def _match(self, texts: Sequence[str], text: str) -> Iterator[str]:
        """Each text as it stands in `text`, as far as it can be matched."""
        at = len(self.parts[0])
        for number, (slot, content, part) in enumerate(zip(self.slots, texts, self.parts[1:], strict=True), 1):
            is_last = number == len(texts)
            for variant in _variants(content):
                end = at + len(variant)
                if (
                    text.startswith(variant, at)
                    and text.startswith(part, end)
                    and not (is_last and end + len(part) != len(text))
                ):
                    yield variant
                    at = end + len(part)
                    break
            else:
                raise Untraceable(
                    f"the template changes the text of a message, or the text beside it (message {slot.message + 1})"
                )


class Filled(NamedTuple):
    """A skeleton with the texts of one conversation."""

    text: str
    spans: list[TextSpan]
    starts: list[int]
    """Where each part starts."""

    @classmethod
    def join(cls, skeleton: Skeleton, texts: Sequence[str]) -> "Filled":
        """The skeleton's parts with the texts between them."""
        pieces, spans, starts, at = [], [], [], 0
        for part, slot, text in zip(skeleton.parts, skeleton.slots, texts, strict=False):
            starts.append(at)
            at += len(part)
            spans.append(TextSpan(slot.message, slot.field, at, at + len(text)))
            at += len(text)
            pieces += [part, text]
        return cls("".join([*pieces, skeleton.parts[-1]]), spans, [*starts, at])

    def at(self, position: Position) -> int:
        """The character at a position of the skeleton."""
        return self.starts[position.slots] + position.offset


def _variants(text: str) -> Iterator[str]:
    """The text as templates write it: unchanged, or stripped."""
    yield text
    if text[:1].isspace() or text[-1:].isspace():
        yield from (text.strip(), text.lstrip(), text.rstrip())
        yield from (text.strip("\n"), text.lstrip("\n"), text.rstrip("\n"))
