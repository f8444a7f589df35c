"""The shapes in which people keep conversations, and the one in which Loratory does.

Ours is Transformers': messages of role (system, user, assistant, tool) and content, an assistant's `tool_calls`, and the
`tools` that it may call. A message keeps `"train": false` where an answer is not to be learned.
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
MAY_FOLLOW = {
    "start": ("user",),
    "user": ("assistant",),
    "assistant": ("user",),
    "tool_calls": ("tool",),
    "tool": ("tool", "assistant"),
}
TURN = re.compile(r"^[ \t]*(Human|Assistant)[:：]", re.MULTILINE)


class Columns(Section):
    """The name that each field has in the raw rows."""

    instruction: str
    """alpaca: what is asked."""
    input: str
    """alpaca: what it is asked of; may be missing or empty."""
    output: str
    """alpaca: the answer."""
    system: str
    """The system prompt; may be missing."""
    history: str
    """alpaca: earlier [question, answer] pairs; may be missing."""
    conversations: str
    """sharegpt: the list of turns."""
    messages: str
    """messages: the list of turns."""
    tools: str
    """sharegpt, messages: the tools that may be called, as a list or as JSON text; may be missing."""


class Conversation(NamedTuple):
    """A row in Loratory's shape."""

    messages: list[Message]
    tools: list[dict[str, Any]]


def guess_format(value: dict[str, Any], columns: Columns) -> Format:
    """The format that a row is in, told by its fields. Raises Rejection if by none."""
    if isinstance(value.get(columns.conversations), list):
        return "sharegpt"
    if isinstance(value.get(columns.messages), list):
        return "messages"
    if columns.instruction in value or columns.output in value:
        instruction = value.get(columns.instruction)
        turns = isinstance(instruction, str) and not value.get(columns.input) and _is_multiturn(instruction)
        return "belle_multiturn" if turns else "alpaca"
    if columns.conversations in value:
        return "sharegpt"
    if columns.messages in value:
        return "messages"
    raise Rejection("unknown_format", f"fields {', '.join(sorted(map(str, value))) or 'none'}")


def _is_multiturn(instruction: str) -> bool:
    """Whether an instruction is a conversation that waits for its next answer, as in BELLE's multi-turn data."""
    text = instruction.strip()
    return text.startswith(("Human:", "Human：")) and text.endswith(("Assistant:", "Assistant："))


def read_conversation(value: dict[str, Any], kind: Format, columns: Columns, input_separator: str) -> Conversation:
    """The conversation in a raw row. Raises Rejection with the field that is missing or of the wrong type."""
    match kind:
        case "alpaca":
            messages = _alpaca(value, columns, input_separator)
        case "belle_multiturn":
            messages = _belle_multiturn(value, columns)
        case "sharegpt":
            messages = _turns(value, columns.conversations, "from", "value")
        case "messages":
            messages = _turns(value, columns.messages, "role", "content")
    tools = _tools(value, columns.tools) if kind in ("sharegpt", "messages") else []
    if messages[:1] and messages[0]["role"] != "system" and _text(value, columns.system, default=""):
        messages = [{"role": "system", "content": value[columns.system]}, *messages]
    return Conversation(messages, tools)


def _alpaca(value: dict[str, Any], columns: Columns, input_separator: str) -> list[Message]:
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
        user |= {"instruction": instruction, "input": query}  # for templates that place them apart
    return [*messages, user, {"role": "assistant", "content": _text(value, columns.output)}]


def _belle_multiturn(value: dict[str, Any], columns: Columns) -> list[Message]:
    """Human:…\\nAssistant:… turns in one text, of which the last is answered by the output."""
    pieces = TURN.split(_text(value, columns.instruction))
    if pieces[0].strip():
        raise Rejection("roles_out_of_order", f"{columns.instruction}: text before the first Human:")
    turns = [(name, text.strip()) for name, text in zip(pieces[1::2], pieces[2::2], strict=True)]
    if not turns or turns[-1] != ("Assistant", ""):
        raise Rejection("no_answer_at_the_end", f"{columns.instruction}: does not end in Assistant:")
    turns[-1] = ("Assistant", _text(value, columns.output))
    return [{"role": "user" if name == "Human" else "assistant", "content": text} for name, text in turns]


def _turns(value: dict[str, Any], field: str, role_field: str, content_field: str) -> list[Message]:
    turns = value.get(field)
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise Rejection("wrong_type", f"{field}: wanted a list of objects")
    messages: list[Message] = []
    for number, turn in enumerate(turns, 1):
        name = _text(turn, role_field, where=f"{field}[{number}].")
        role = ROLES.get(name)
        if role is None:
            raise Rejection("unknown_role", f"{field}[{number}].{role_field}: {name!r}")
        calls = turn.get("tool_calls")
        content = _text(turn, content_field, default="" if calls else None, where=f"{field}[{number}].")
        message: Message = {"role": role, "content": content}
        if role == "function_call":
            message = {"role": "assistant", "content": "", "tool_calls": _parse_calls(content, f"{field}[{number}]")}
        elif calls and role != "assistant":
            raise Rejection("roles_out_of_order", f"{field}[{number}]: tool_calls in a {role} message")
        elif calls:
            message["tool_calls"] = _check_calls(calls, f"{field}[{number}].tool_calls")
        weight = turn.get("weight", 1)
        if isinstance(weight, bool) or weight not in (0, 1):
            raise Rejection("wrong_type", f"{field}[{number}].weight: wanted 0 or 1")
        if not isinstance(turn.get("train", True), bool):
            raise Rejection("wrong_type", f"{field}[{number}].train: wanted true or false")
        if not turn.get("train", True) or weight == 0:
            message["train"] = False
        messages.append(message)
    return messages


def _parse_calls(text: str, where: str) -> list[dict[str, Any]]:
    """ShareGPT's function_call: the JSON of one call, or of a list of calls."""
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
        if isinstance(arguments, str):  # as OpenAI writes them; a template would quote them once more
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


def _text(value: dict[str, Any], field: str, default: str | None = None, where: str = "") -> str:
    found = value.get(field)
    if found is None and default is not None:
        return default
    if field not in value:
        raise Rejection("missing_field", f"{where}{field}")
    if not isinstance(found, str):
        raise Rejection("wrong_type", f"{where}{field}: wanted text, found {type(found).__name__}")
    return found


def check_turns(messages: list[Message], tools: list[dict[str, Any]]) -> None:
    """An optional system message, then turns in an order that a model can have seen, an answer last, none of them empty.

    Raises Rejection.
    """
    for message in messages:
        text = message["content"] + (json.dumps(message, ensure_ascii=False) if len(message) > 2 else "")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            found = text[error.start : error.start + 1]
            raise Rejection("bad_encoding", f"not UTF-8: {found!r} in a {message['role']} text") from None
    try:
        json.dumps(tools, ensure_ascii=False).encode() if tools else None
    except UnicodeEncodeError as error:
        raise Rejection("bad_encoding", f"not UTF-8: {error.object[error.start : error.start + 1]!r} in tools") from None
    turns = messages[1:] if messages and messages[0]["role"] == "system" else messages
    order = " ".join(message["role"] for message in messages) or "no messages"
    before = "start"
    for message in turns:
        if message["role"] not in MAY_FOLLOW[before]:
            raise Rejection("roles_out_of_order", order)
        before = "tool_calls" if message.get("tool_calls") else message["role"]
    if before not in ("assistant", "tool_calls"):
        raise Rejection("no_answer_at_the_end", order)
    for message in turns:
        if message["role"] != "tool" and not message["content"].strip() and not message.get("tool_calls"):
            raise Rejection("empty_answer" if message["role"] == "assistant" else "empty_prompt", repr(message["content"]))
