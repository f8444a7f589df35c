"""Reads data/prompts.json: extra prompts that have no reference answer."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stages.core.jsonl import read_json
from stages.core.problem import Problem
from stages.encode.spans import TEXT_FIELDS

WANTED = 'wanted a JSON list; each entry is a text, or a list of {"role", "content"} messages that ends with a user message'
JSON_TYPES = {dict: "an object", list: "a list", str: "a text", bool: "true or false", int: "a number", float: "a number"}


def read_prompts(path: Path) -> list[dict[str, Any]]:
    """The prompts as conversations in the form of data/examples, each with a placeholder answer.

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
            "messages": [*_as_messages(entry), {"role": "assistant", "content": "."}],
        }
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
    except UnicodeDecodeError as error:
        raise Problem(f"{path}: not UTF-8 at byte {error.start + 1}; save it as UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise Problem(f"{path}: not JSON: {error}; {WANTED}") from None
    if not isinstance(found, list):
        raise Problem(f"{path}: found {_json_type(found)}, {WANTED}")
    return found


def _as_messages(entry: Any) -> list[Any]:
    return [{"role": "user", "content": entry}] if isinstance(entry, str) else list(entry)


def _find_problems(entry: Any) -> list[str]:
    """Everything that is wrong in one entry of the list."""
    if not isinstance(entry, str | list):
        return [f"found {_json_type(entry)}, wanted a text or a list of messages"]
    messages = _as_messages(entry)
    if not messages:
        return ["found an empty list, wanted at least one message"]
    problems = [problem for number, message in enumerate(messages, 1) for problem in _message_problems(message, number)]
    if problems:
        return problems
    last = messages[-1]
    if last["role"] != "user":
        return [f"the last message has the role {last['role']!r}, wanted a user message for the model to answer"]
    if not last["content"].strip():
        return ["the prompt is empty, wanted a text"]
    return []


def _message_problems(message: Any, number: int) -> Iterator[str]:
    if not isinstance(message, dict):
        yield f'message {number}: found {_json_type(message)}, wanted an object with "role" and "content"'
        return
    for field in ("role", *TEXT_FIELDS):
        if field not in message:
            if field in ("role", "content"):
                yield f'message {number}: "{field}" is missing'
        elif not isinstance(message[field], str):
            yield f'message {number}: "{field}" is {_json_type(message[field])}, wanted a text'
        elif surrogate := _lone_surrogate(message[field]):
            code = f"U+{ord(surrogate):04X}"
            yield f'message {number}: "{field}" contains {code}, a lone surrogate, which UTF-8 cannot hold'
    if "tool_calls" in message and not _are_tool_calls(message["tool_calls"]):
        yield f'message {number}: "tool_calls" is not a list of {{"function": {{"name": text, "arguments": object}}}}'


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
