"""The checks that a row must pass. Each raises Rejection with the reason and what was found."""

import json
import re
from collections.abc import Sequence
from typing import Any

from stages.core.problem import Rejection
from stages.ingest.formats import Message
from stages.ingest.json_stream import Broken

NEXT_ROLES = {
    "start": ("user",),
    "user": ("assistant",),
    "assistant": ("user",),
    "tool_calls": ("tool",),
    "tool": ("tool", "assistant"),
}
"""The roles that may follow each role; `tool_calls` is an assistant message that calls tools."""
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
    for message in messages:
        more_than_role_and_content = len(message) > 2
        text = message["content"] + (json.dumps(message, ensure_ascii=False) if more_than_role_and_content else "")
        _check_utf8(text, f"a {message['role']} text")
    if tools:
        _check_utf8(json.dumps(tools, ensure_ascii=False), "tools")


def _check_utf8(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Rejection("bad_encoding", f"not UTF-8: {text[error.start]!r} in {where}") from None


def check_turns(messages: Sequence[Message]) -> None:
    """An optional system message, then turns in an order of NEXT_ROLES that ends with an answer; none of them empty."""
    turns = messages[1:] if messages and messages[0]["role"] == "system" else messages
    order = " ".join(message["role"] for message in messages) or "no messages"
    previous = "start"
    for message in turns:
        if message["role"] not in NEXT_ROLES[previous]:
            raise Rejection("roles_out_of_order", order)
        previous = "tool_calls" if message.get("tool_calls") else message["role"]
    if previous not in ("assistant", "tool_calls"):
        raise Rejection("no_answer_at_the_end", order)
    for message in turns:
        if message["role"] != "tool" and not message["content"].strip() and not message.get("tool_calls"):
            raise Rejection("empty_answer" if message["role"] == "assistant" else "empty_prompt", repr(message["content"]))


def check_length(messages: Sequence[Message], max_chars: int) -> None:
    """The contents of all messages may have `max_chars` characters together."""
    length = sum(len(message["content"]) for message in messages)
    if length > max_chars:
        raise Rejection("too_long", f"{length} characters, ingest.max_chars is {max_chars}")


def check_placeholders(messages: Sequence[Message]) -> None:
    """No message may have an unfilled {{placeholder}}."""
    for message in messages:
        if found := PLACEHOLDER.search(message["content"]):
            raise Rejection("placeholder", found[0])
