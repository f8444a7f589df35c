"""Converts the usual formats of conversation data into one: the messages of Transformers' chat templates.

A message has a role (system, user, assistant, tool) and content, and an assistant message may have `tool_calls`. `tools`
describes the tools that may be called. `"train": false` in a message keeps it out of the loss.
"""

import json
import re
from typing import Any, Literal, NamedTuple, TypeAlias

from stages.core.params import Section
from stages.core.problem import Rejection

Format: TypeAlias = Literal["alpaca", "belle_multiturn", "sharegpt", "messages"]
Message: TypeAlias = dict[str, Any]

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "function_call": "function_call",
    "observation": "tool",
    "tool": "tool",
}
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
    tools: list[dict[str, Any]]


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
        case "belle_multiturn":
            messages = _belle_multiturn(value, columns)
        case "sharegpt":
            messages = _turns(value, columns.conversations, role_field="from", content_field="value")
        case "messages":
            messages = _turns(value, columns.messages, role_field="role", content_field="content")
    tools = _tools(value, columns.tools) if format in ("sharegpt", "messages") else []
    if messages and messages[0]["role"] != "system" and _text(value, columns.system, default=""):
        messages = [{"role": "system", "content": value[columns.system]}, *messages]
    return Conversation(messages, tools)


def _alpaca(value: dict[str, Any], columns: Columns, *, input_separator: str) -> list[Message]:
    messages: list[Message] = []
    history = value.get(columns.history) or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise Rejection("wrong_type", f"{columns.history}: wanted a list of [question, answer] pairs")
    for question, answer in history:
        if not isinstance(question, str) or not isinstance(answer, str):
            raise Rejection("wrong_type", f"{columns.history}: wanted pairs of text")
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    instruction, query = _text(value, columns.instruction), _text(value, columns.input, default="")
    user: Message = {"role": "user", "content": instruction + (input_separator if query else "") + query}
    if query:
        user |= {"instruction": instruction, "input": query}  # for chat templates that place them separately
    return [*messages, user, {"role": "assistant", "content": _text(value, columns.output)}]


def _belle_multiturn(value: dict[str, Any], columns: Columns) -> list[Message]:
    """The instruction holds all turns as Human:…\\nAssistant:…; the output is the last answer."""
    before, *names_and_texts = TURN.split(_text(value, columns.instruction))
    if before.strip():
        raise Rejection("roles_out_of_order", f"{columns.instruction}: text before the first Human:")
    turns = [(name, text.strip()) for name, text in zip(names_and_texts[::2], names_and_texts[1::2], strict=True)]
    if not turns or turns[-1] != ("Assistant", ""):
        raise Rejection("no_answer_at_the_end", f"{columns.instruction}: does not end in Assistant:")
    turns[-1] = ("Assistant", _text(value, columns.output))
    return [{"role": "user" if name == "Human" else "assistant", "content": text} for name, text in turns]


def _turns(value: dict[str, Any], field: str, *, role_field: str, content_field: str) -> list[Message]:
    turns = value.get(field)
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise Rejection("wrong_type", f"{field}: wanted a list of objects")
    return [
        _message(turn, f"{field}[{number}]", role_field=role_field, content_field=content_field)
        for number, turn in enumerate(turns, 1)
    ]


def _message(turn: dict[str, Any], where: str, *, role_field: str, content_field: str) -> Message:
    """The message of one turn; `where` names the turn in a Rejection."""
    name = _text(turn, role_field, where=f"{where}.")
    role = ROLES.get(name)
    if role is None:
        raise Rejection("unknown_role", f"{where}.{role_field}: {name!r}")
    calls = turn.get("tool_calls")
    content = _text(turn, content_field, default="" if calls else None, where=f"{where}.")
    message: Message = {"role": role, "content": content}
    if role == "function_call":
        message = {"role": "assistant", "content": "", "tool_calls": _parse_calls(content, where)}
    elif calls and role != "assistant":
        raise Rejection("roles_out_of_order", f"{where}: tool_calls in a {role} message")
    elif calls:
        message["tool_calls"] = _check_calls(calls, f"{where}.tool_calls")
    if not _is_trained_on(turn, where):
        message["train"] = False
    return message


def _is_trained_on(turn: dict[str, Any], where: str) -> bool:
    """Our `train`: false, or OpenAI's `weight`: 0, keeps a turn out of the loss."""
    weight, train = turn.get("weight", 1), turn.get("train", True)
    if isinstance(weight, bool) or weight not in (0, 1):
        raise Rejection("wrong_type", f"{where}.weight: wanted 0 or 1")
    if not isinstance(train, bool):
        raise Rejection("wrong_type", f"{where}.train: wanted true or false")
    return train and weight == 1


def _parse_calls(text: str, where: str) -> list[dict[str, Any]]:
    """The content of ShareGPT's function_call: JSON of one call, or of a list of calls."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise Rejection("wrong_type", f"{where}: function_call: wanted JSON") from None
    return _check_calls(value if isinstance(value, list) else [value], where)


def _check_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    checked = []
    for call in calls if isinstance(calls, list) else [None]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise Rejection("wrong_type", f"{where}: wanted calls with a name and arguments")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):  # OpenAI's form; a chat template would encode the text as JSON again
            try:
                arguments = json.loads(arguments or "{}")
            except (ValueError, RecursionError):
                raise Rejection("wrong_type", f"{where}: arguments of {function['name']}: wanted JSON") from None
        if not isinstance(arguments, dict):
            raise Rejection("wrong_type", f"{where}: arguments of {function['name']}: wanted an object")
        checked.append({"type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return checked


def _tools(value: dict[str, Any], field: str) -> list[dict[str, Any]]:
    tools = value.get(field) or []
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else []
        except (ValueError, RecursionError):
            raise Rejection("wrong_type", f"{field}: wanted JSON") from None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise Rejection("wrong_type", f"{field}: wanted a list of objects")
    tools = [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]
    if not all(isinstance(tool["function"], dict) and isinstance(tool["function"].get("name"), str) for tool in tools):
        raise Rejection("wrong_type", f"{field}: wanted functions with a name")
    return tools


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
