"""The checks that a row must pass. Each raises Rejection with the reason and what was found."""

import json
import re
from collections.abc import Sequence
from typing import Any

from stages.core.problem import Rejection
from stages.ingest.json_stream import Broken
from stages.ingest.tools import Message


class TooManyCharacters(Rejection):
    """A row longer than `max_chars`."""

    def __init__(self, characters: int, max_chars: int) -> None:
        super().__init__("too_long", f"{characters} characters, ingest.max_chars is {max_chars}")
        self.characters = characters


NEXT_ROLES = {
    "start": ("user",),
    "user": ("assistant",),
    "assistant": ("user",),
    "tool_calls": ("tool",),
    "tool": ("tool", "assistant"),
}
"""The roles that may follow each role; `tool_calls` is an assistant message that calls tools."""
CALL_MARKS = ("<tool_call>", "Action Input:")
"""What calls in a text are known by: Hermes', and ReAct's, as in ToolBench."""
PLACEHOLDER = re.compile(r"\{\{\s*[\w.]+\s*\}\}")


def check_object(value: Any) -> dict[str, Any]:
    """The value of a row, which must be a JSON object."""
    if isinstance(value, Broken):
        raise Rejection(value.reason, value.detail)
    if not isinstance(value, dict):
        raise Rejection("not_an_object", f"found {type(value).__name__}, wanted an object")
    return value


def check_encoding(messages: Sequence[Message], tools: list[dict[str, Any]]) -> None:
    """All text must be valid Unicode that UTF-8 can encode."""
    try:
        for message in messages:
            more_than_role_and_content = len(message) > 2
            text = message["content"] + (_dump(message) if more_than_role_and_content else "")
            _check_utf8(text, f"a {message['role']} text")
        if tools:
            _check_utf8(_dump(tools), "tools")
    except RecursionError:
        raise Rejection("wrong_type", "tool calls or tools: nested too deeply") from None
    except ValueError:
        raise Rejection("wrong_type", "tool calls or tools: a number too large for JSON") from None


def _dump(value: Any) -> str:
    """JSON text. Raises ValueError for an infinite number, such as 1e999: it would be written as null."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _check_utf8(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Rejection("bad_encoding", f"not UTF-8: {text[error.start]!r} in {where}") from None


def check_text(text: str) -> None:
    """A raw text must be valid Unicode, and hold more than white space."""
    _check_utf8(text, "text")
    if not text.strip():
        raise Rejection("empty_text", repr(text[:20]))


def check_turns(messages: Sequence[Message]) -> None:
    """An optional system message, then turns in an order of NEXT_ROLES that ends with an answer; none of them empty."""
    turns = messages[1:] if messages and messages[0]["role"] == "system" else messages
    previous = "start"
    for number, message in enumerate(turns):
        role = message["role"]
        if role not in NEXT_ROLES[previous] and not (role == "tool" and number and _calls_in_text(turns[number - 1])):
            raise Rejection("roles_out_of_order", _wrong_order(messages, previous, role))
        previous = "tool_calls" if message.get("tool_calls") else role
    if previous not in ("assistant", "tool_calls"):
        raise Rejection("no_answer_at_the_end", _order(messages))
    for message in turns:
        if message["role"] != "tool" and not message["content"].strip() and not message.get("tool_calls"):
            raise Rejection("empty_answer" if message["role"] == "assistant" else "empty_prompt", repr(message["content"]))


def _calls_in_text(message: Message) -> bool:
    """Whether an answer calls tools in its text, as the system text of Hermes' or of ReAct's data asks it to."""
    return message["role"] == "assistant" and any(mark in message["content"] for mark in CALL_MARKS)


def _order(messages: Sequence[Message]) -> str:
    return " ".join(message["role"] for message in messages) or "no messages"


def _wrong_order(messages: Sequence[Message], previous: str, role: str) -> str:
    if role == "system":
        return f"{_order(messages)}: a system turn behind the first turn; write its text into the next user turn"
    wanted = " or ".join(NEXT_ROLES[previous])
    where = "at the start" if previous == "start" else f"behind {previous}"
    return f"{_order(messages)}: {role} {where}, wanted {wanted}"


def check_length(messages: Sequence[Message], max_chars: int) -> None:
    """The contents and the thinking of all messages may have `max_chars` characters together."""
    length = count_characters(messages)
    if length > max_chars:
        raise TooManyCharacters(length, max_chars)


def count_characters(messages: Sequence[Message]) -> int:
    """The characters of the contents and the thinking of all messages."""
    return sum(len(message["content"]) + len(message.get("reasoning_content", "")) for message in messages)


def check_placeholders(messages: Sequence[Message]) -> None:
    """No message may have an unfilled {{placeholder}}."""
    for message in messages:
        if found := PLACEHOLDER.search(message["content"]):
            raise Rejection("placeholder", found[0])
