"""An example: a conversation or a raw text that passed the checks, with the hashes that splits and duplicates are found by.

All comparisons use normalized text: two texts that differ only in white space, upper and lower case or the width of
characters (Unicode NFKC) are equal.
"""

import hashlib
import json
import unicodedata
from typing import Any, NamedTuple

from stages.core.problem import Rejection
from stages.ingest.columns import lookup
from stages.ingest.formats import Conversation


class Example(NamedTuple):
    """One checked conversation or raw text."""

    conversation: Conversation
    texts: list[str]
    """The normalized text of each message, or the raw text alone."""
    digest: bytes
    """Hash of the complete conversation: roles, texts, thinking, tool calls and tools. Equal for duplicates."""
    prompt: bytes
    """Hash of the first user message, or of the raw text. None of them may be in two splits."""
    group: str
    """What the split is computed from: the value of the `group_by` field, or the first user message or raw text."""


def make_example(value: dict[str, Any], conversation: Conversation, *, group_by: str) -> Example:
    """The example of a raw row. Raises Rejection if `group_by` names a field that it lacks."""
    if conversation.text is not None:
        texts, first_user = [_normalize(conversation.text)], 0
    else:
        texts = [_normalize(message["content"]) for message in conversation.messages]
        first_user = next(n for n, message in enumerate(conversation.messages) if message["role"] == "user")
    return Example(
        conversation=conversation,
        texts=texts,
        digest=_digest(conversation, texts),
        prompt=_hash(texts[first_user]),
        group=_group(value, group_by) if group_by else texts[first_user],
    )


def _normalize(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _digest(conversation: Conversation, texts: list[str]) -> bytes:
    if conversation.text is not None:
        return _hash(f"text\0{texts[0]}")
    parts = []
    for message, text in zip(conversation.messages, texts, strict=True):
        parts += [message["role"], text]
        if "reasoning_content" in message:
            parts.append("thinking " + _normalize(message["reasoning_content"]))
        if "tool_calls" in message:  # without the ids, which are random
            parts.append(json.dumps([call["function"] for call in message["tool_calls"]], sort_keys=True))
    if conversation.tools:
        parts.append(json.dumps(conversation.tools, sort_keys=True))
    # With its length before it, no part can be mistaken for two.
    return _hash("\0".join(f"{len(part)} {part}" for part in parts))


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _group(value: dict[str, Any], group_by: str) -> str:
    group = lookup(value, group_by)
    if group is None:
        raise Rejection("missing_field", group_by)
    try:
        return json.dumps(group, sort_keys=True)
    except RecursionError:
        raise Rejection("wrong_type", f"{group_by}: nested too deeply") from None
