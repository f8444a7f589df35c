"""What must be in a rendered conversation: its texts, its calls and their results."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from stages.encode.forms import PARTS_AS_TEXT, REASONING, SECOND_BLOCK, Message
from stages.encode.spans import MARKED, LeftOut, Skeleton, Untraceable, mark

NO_REASONING = "the template has no place for reasoning_content; choose another template, or write encode.thinking: drop"
REASONING_NOT_PROMPTED = (
    "the prompt for generation leaves no place for reasoning_content; choose other encode.template_kwargs, such as "
    "enable_thinking: true, or write encode.thinking: drop"
)


def find_places(message: Message, text: str, number: int, after: int) -> dict[str, int]:
    """Where the marks of an answer are in a marked rendering, behind the character `after`. Raises Untraceable."""
    places = {}
    for field in (REASONING, "content"):
        if MARKED in message.get(field, ""):
            place = text.find(mark(number, field), after)
            if place < 0:
                raise LeftOut(
                    NO_REASONING if field == REASONING else f"the template leaves out an answer (message {number + 1})"
                )
            if text.find(mark(number, field), place + 1) >= 0:
                raise Untraceable(f"the template writes an answer twice (message {number + 1})")
            places[field] = place
    if REASONING in places and any(
        text.find(call["function"]["name"], places[REASONING]) < 0 for call in message.get("tool_calls", [])
    ):
        raise LeftOut(NO_REASONING)  # not behind the calls, where Gemma 4 writes the content
    if len(places) == 2 and not text[places[REASONING] + len(mark(number, REASONING)) : places["content"]].strip():
        raise LeftOut(NO_REASONING)  # the template writes the parts of a content without marks between them
    if REASONING in places and SECOND_BLOCK.search(text, after and after - 20, places[REASONING]):
        raise LeftOut(REASONING_NOT_PROMPTED)
    if places and PARTS_AS_TEXT.search(text, after, max(places.values())):
        raise LeftOut(NO_REASONING)
    return places


def check_context(marked: list[dict[str, Any]], skeleton: Skeleton, text: str) -> None:
    """Raises LeftOut if a row lacks a text or a call of a message before its last answer. Reasoning may be missing there."""
    present = {(slot.message, slot.field) for slot in skeleton.slots}
    for number, message in enumerate(marked[:-1]):
        fields = {field for field in ("content", "instruction") if MARKED in message.get(field, "")}
        if message["role"] != "tool" and fields and not any((number, field) in present for field in fields):
            raise LeftOut(f"the template leaves out the {message['role']} message (message {number + 1})")
        check_calls(message, text, number)


def check_calls(message: Message, text: str, number: int) -> None:
    """Raises Untraceable if the rendered answer lacks the name or an argument of a call."""
    for call in message.get("tool_calls", []):
        for part in (call["function"]["name"], *_argument_texts(call["function"]["arguments"])):
            if not any(form in text for form in _written_forms(part)):
                raise LeftOut(f"the template leaves out {part[:60]!r} of the call in message {number + 1}")


def _written_forms(text: str) -> Iterator[str]:
    """A text as templates write it in a call: as it is, or as in JSON or Python between quotes."""
    yield text
    yield json.dumps(text, ensure_ascii=False)[1:-1]
    yield json.dumps(text)[1:-1]
    yield repr(text)[1:-1]


def _argument_texts(value: Any) -> Iterator[str]:
    """The names and texts in a call's arguments."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield key
            yield from _argument_texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _argument_texts(inner)
    elif isinstance(value, str):
        yield value.strip()


def tool_result_forms(content: str) -> Iterator[str]:
    """A tool result as templates write it: unchanged, stripped, as a JSON string, or its JSON written anew."""
    yield content.strip()
    for ascii_only in (False, True):
        yield json.dumps(content, ensure_ascii=ascii_only)[1:-1]
        try:
            yield json.dumps(json.loads(content), ensure_ascii=ascii_only)
        except (ValueError, RecursionError):
            continue
