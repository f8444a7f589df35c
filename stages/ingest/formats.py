"""Converts the usual formats of conversation data into one: the messages of Transformers' chat templates.

A message has a role (system, user, assistant, tool) and content, and an assistant message may have `tool_calls`. `tools`
describes the tools that may be called. `"train": false` in a message keeps it out of the loss.
"""

import re
from typing import Any, Literal, NamedTuple, TypeAlias

from stages.core.params import Section
from stages.core.problem import Rejection
from stages.ingest.keys import unread_keys
from stages.ingest.tools import Message, Tool, read_tools
from stages.ingest.turns import add_system, read_answer, read_turns

Format: TypeAlias = Literal["alpaca", "belle_multiturn", "sharegpt", "messages"]

TURN = re.compile(r"^[ \t]*(Human|Assistant)[:：]", re.MULTILINE)


class Columns(Section):
    """The name of each field in the raw rows."""

    instruction: str
    """alpaca, belle_multiturn: the question."""
    input: str
    """alpaca: the text that the question is about; may be missing or empty."""
    output: str
    """alpaca, belle_multiturn: the answer."""
    system: str
    """The system prompt; may be missing."""
    history: str
    """alpaca: earlier [question, answer] pairs; may be missing."""
    conversations: str
    """sharegpt: the list of turns."""
    messages: str
    """messages: the list of turns."""
    tools: str
    """sharegpt, messages: the tools that may be called, a list or its JSON text; may be missing."""


class Conversation(NamedTuple):
    """A row in the common format."""

    messages: list[Message]
    tools: list[Tool]
    unread: list[str]
    """The keys that hold something and were not read, by name."""
    changes: list[str]
    """What was changed beyond the form, see `turns.Turns`."""


def guess_format(value: dict[str, Any], columns: Columns) -> Format:
    """The format of a row, detected from its fields. Raises Rejection if no format has such fields."""
    if isinstance(value.get(columns.conversations), list):
        return "sharegpt"
    if isinstance(value.get(columns.messages), list):
        return "messages"
    if columns.instruction in value or columns.output in value:
        instruction = value.get(columns.instruction)
        multiturn = isinstance(instruction, str) and not value.get(columns.input) and _is_multiturn(instruction)
        return "belle_multiturn" if multiturn else "alpaca"
    if columns.conversations in value:
        return "sharegpt"
    if columns.messages in value:
        return "messages"
    raise Rejection("unknown_format", f"fields {', '.join(sorted(map(str, value))) or 'none'}")


def _is_multiturn(instruction: str) -> bool:
    """Whether an instruction is a conversation without its last answer, as in BELLE's multi-turn data."""
    text = instruction.strip()
    return text.startswith(("Human:", "Human：")) and text.endswith(("Assistant:", "Assistant："))


def read_conversation(value: dict[str, Any], format: Format, *, columns: Columns, input_separator: str) -> Conversation:
    """The conversation in a raw row of the given format. Raises Rejection if a field is missing or has the wrong type."""
    match format:
        case "alpaca":
            messages = _alpaca(value, columns, input_separator=input_separator)
            read = {columns.instruction, columns.input, columns.output, columns.history, columns.system}
            conversation = Conversation(messages, [], unread_keys(value, read, ""), [])
        case "belle_multiturn":
            read = {columns.instruction, columns.input, columns.output, columns.system}
            conversation = Conversation(_belle_multiturn(value, columns), [], unread_keys(value, read, ""), [])
        case "sharegpt":
            conversation = _read_turns(value, columns.conversations, columns)
        case "messages":
            conversation = _read_turns(value, columns.messages, columns)
    system = _text(value, columns.system, default="")
    if system and conversation.messages:
        return conversation._replace(messages=add_system(conversation.messages, system, conversation.changes))
    return conversation


def _alpaca(value: dict[str, Any], columns: Columns, *, input_separator: str) -> list[Message]:
    messages: list[Message] = []
    history = value.get(columns.history) or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise Rejection("wrong_type", f"{columns.history}: wanted a list of [question, answer] pairs")
    for question, answer in history:
        if not isinstance(question, str) or not isinstance(answer, str):
            raise Rejection("wrong_type", f"{columns.history}: wanted pairs of text")
        messages += [{"role": "user", "content": question}, read_answer(answer, columns.history)]
    instruction, query = _text(value, columns.instruction), _text(value, columns.input, default="")
    user: Message = {"role": "user", "content": instruction + (input_separator if query else "") + query}
    if query:
        user |= {"instruction": instruction, "input": query}  # for chat templates that place them separately
    return [*messages, user, read_answer(_text(value, columns.output), columns.output)]


def _belle_multiturn(value: dict[str, Any], columns: Columns) -> list[Message]:
    """The instruction holds all turns as Human:…\\nAssistant:…; the output is the last answer."""
    before, *names_and_texts = TURN.split(_text(value, columns.instruction))
    if before.strip():
        raise Rejection("roles_out_of_order", f"{columns.instruction}: text before the first Human:")
    turns = [(name, text.strip()) for name, text in zip(names_and_texts[::2], names_and_texts[1::2], strict=True)]
    if not turns or turns[-1] != ("Assistant", ""):
        raise Rejection("no_answer_at_the_end", f"{columns.instruction}: does not end in Assistant:")
    turns[-1] = ("Assistant", _text(value, columns.output))
    return [
        {"role": "user", "content": text} if name == "Human" else read_answer(text, columns.output) for name, text in turns
    ]


def _read_turns(value: dict[str, Any], field: str, columns: Columns) -> Conversation:
    tools = [tool for key in (columns.tools, "functions") for tool in read_tools(value.get(key), key)]
    turns = read_turns(value.get(field), field, roles={}, has_tools=bool(tools))
    unread = unread_keys(value, {field, columns.tools, "functions", columns.system}, "")
    return Conversation(turns.messages, tools + turns.tools, unread + turns.unread, turns.changes)


def _text(value: dict[str, Any], field: str, *, default: str | None = None, where: str = "") -> str:
    """The text in a field, or `default`, if there is one, for a field that is missing or null."""
    found = value.get(field)
    if found is None and default is not None:
        return default
    if field not in value:
        raise Rejection("missing_field", f"{where}{field}")
    if not isinstance(found, str):
        raise Rejection("wrong_type", f"{where}{field}: wanted text, found {type(found).__name__}")
    return found
