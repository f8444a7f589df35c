"""Reads data/prompts.json: extra prompts that have no reference answer."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stages.core.jsonl import DamagedFile, read_json
from stages.core.problem import Problem

WANTED = (
    'wanted a JSON list; each entry is a text, or a list of {"role", "content"} messages that ends with a user message or a '
    'tool result, or {"messages": such a list, "tools": a list of functions}'
)
ROLES = ("system", "user", "assistant", "tool")
ENTRY = ("messages", "tools")
OTHER_FIELDS = ("reasoning_content", "tool_call_id", "name", "instruction", "input")
JSON_TYPES = {dict: "an object", list: "a list", str: "a text", bool: "true or false", int: "a number", float: "a number"}


def read_prompts(path: Path) -> list[dict[str, Any]]:
    """The prompts as conversations in the form of data/examples, each with a placeholder answer.

    An answer in them may have `reasoning_content` and `tool_calls`, as in data/examples.

    Raises Problem with everything that is wrong in the file.
    """
    entries = _read_list(path)
    problems = [
        f"{path}: entry {number}: {problem}" for number, entry in enumerate(entries, 1) for problem in _find_problems(entry)
    ]
    if problems:
        raise Problem(*problems)
    return [
        {
            "id": f"prompt-{number}",
            "source": f"{path}: entry {number}",
            "messages": [*_messages_of(entry), {"role": "assistant", "content": "."}],
        }
        | ({"tools": entry["tools"]} if isinstance(entry, dict) and entry.get("tools") else {})
        for number, entry in enumerate(entries, 1)
    ]


def _read_list(path: Path) -> list[Any]:
    """Raises Problem if the file does not hold a JSON list."""
    try:
        found = read_json(path)
    except FileNotFoundError:
        raise Problem(f"{path}: not found; write [] into it if there are no extra prompts") from None
    except IsADirectoryError:
        raise Problem(f"{path}: found a folder, wanted a JSON file") from None
    except DamagedFile as damage:
        try:
            path.read_bytes().decode()
        except UnicodeDecodeError as error:
            raise Problem(f"{path}: not UTF-8 at byte {error.start + 1}; save it as UTF-8") from None
        raise Problem(f"{path}: not JSON: {damage}; {WANTED}") from None
    if not isinstance(found, list):
        raise Problem(f"{path}: found {_json_type(found)}, {WANTED}")
    return found


def _messages_of(entry: Any) -> list[Any]:
    messages = entry["messages"] if isinstance(entry, dict) else entry
    return [{"role": "user", "content": messages}] if isinstance(messages, str) else list(messages)


def _find_problems(entry: Any) -> list[str]:
    """Everything that is wrong in one entry of the list."""
    problems = []
    if isinstance(entry, dict):
        if "messages" not in entry:
            return ['found an object, wanted a text or a list of messages, or an object with "messages"']
        if not isinstance(entry["messages"], list):
            return [f'"messages" is {_json_type(entry["messages"])}, wanted a list of messages']
        problems += [f'"{key}" is not read; an entry has "messages" and "tools"' for key in entry if key not in ENTRY]
        problems += _tool_problems(entry.get("tools", []))
    elif not isinstance(entry, str | list):
        return [f"found {_json_type(entry)}, wanted a text or a list of messages"]
    messages = _messages_of(entry)
    if not messages:
        return [*problems, "found an empty list, wanted at least one message"]
    problems += [problem for number, message in enumerate(messages, 1) for problem in _message_problems(message, number)]
    if problems:
        return problems
    last = messages[-1]
    if last["role"] not in ("user", "tool"):
        return [f"the last message has the role {last['role']!r}, wanted a user message for the model to answer"]
    if last["role"] == "user" and not last["content"].strip():
        return ["the prompt is empty, wanted a text"]
    return []


def _tool_problems(tools: Any) -> list[str]:
    """What is wrong in the tools of an entry."""
    if not isinstance(tools, list):
        return [f'"tools" is {_json_type(tools)}, wanted a list of functions']
    return [
        f'tool {number}: wanted {{"type": "function", "function": {{"name": text, "description", "parameters"}}}}'
        for number, tool in enumerate(tools, 1)
        if not (isinstance(tool, dict) and isinstance(tool.get("function"), dict))
        or not isinstance(tool["function"].get("name"), str)
        or _lone_surrogate(json.dumps(tool, ensure_ascii=False))
    ]


def _message_problems(message: Any, number: int) -> Iterator[str]:
    if not isinstance(message, dict):
        yield f'message {number}: found {_json_type(message)}, wanted an object with "role" and "content"'
        return
    for field in ("role", "content", *OTHER_FIELDS):
        if field not in message:
            if field in ("role", "content"):
                yield f'message {number}: "{field}" is missing'
        elif not isinstance(message[field], str):
            yield f'message {number}: "{field}" is {_json_type(message[field])}, wanted a text'
        elif surrogate := _lone_surrogate(message[field]):
            code = f"U+{ord(surrogate):04X}"
            yield f'message {number}: "{field}" contains {code}, a lone surrogate, which UTF-8 cannot hold'
    if isinstance(role := message.get("role"), str) and role not in ROLES:
        yield f'message {number}: "role" is {role!r}, wanted one of {", ".join(ROLES)}'
    if "tool_calls" in message and not _are_tool_calls(message["tool_calls"]):
        yield f'message {number}: "tool_calls" is not a list of {{"function": {{"name": text, "arguments": object}}}}'
    for field in ("reasoning_content", "tool_calls"):
        if field in message and role != "assistant":
            yield f'message {number}: "{field}" belongs to an assistant message, found in one of the role {role!r}'


def _are_tool_calls(value: Any) -> bool:
    """Whether a value has the form of a message's tool calls."""
    if not isinstance(value, list):
        return False
    functions = [call.get("function") if isinstance(call, dict) else None for call in value]
    return all(
        isinstance(function, dict) and isinstance(function.get("name"), str) and isinstance(function.get("arguments"), dict)
        for function in functions
    )


def _lone_surrogate(text: str) -> str:
    """The first character that UTF-8 cannot hold, "" if there is none."""
    return next((character for character in text if "\ud800" <= character <= "\udfff"), "")


def _json_type(value: Any) -> str:
    return JSON_TYPES.get(type(value), "null")
