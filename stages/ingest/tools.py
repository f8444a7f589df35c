"""Tool definitions, calls and results in the forms of OpenAI, Anthropic, ShareGPT and Hermes, read into OpenAI's form.

A call is {"id" (only if it has one), "type": "function", "function": {"name", "arguments": an object}}.
"""

import ast
import json
import re
from collections.abc import Mapping
from typing import Any, NoReturn, TypeAlias

from stages.core.problem import Rejection
from stages.ingest.keys import is_empty, unread_keys

Message: TypeAlias = dict[str, Any]
Call: TypeAlias = dict[str, Any]
Tool: TypeAlias = dict[str, Any]

ARGUMENTS = ("arguments", "parameters", "input", "args")
"""The names of a call's arguments; the first that is not null is read."""
IDS = ("id", "call_id", "tool_call_id")
SCHEMAS = ("input_schema", "inputSchema")
"""What Anthropic and the Model Context Protocol call the parameters of a tool."""
CALL_TYPES = ("function", "function_call", "tool_use", "tool_call", None)
TOOL_CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
TOOL_RESPONSE = re.compile(r"\s*<tool_response>(.*?)</tool_response>\s*", re.DOTALL)

_WRAPPER_KEYS = frozenset(("type", "function", "index", *IDS))
_FUNCTION_KEYS = frozenset(("name", *ARGUMENTS))
_CALL_KEYS = _WRAPPER_KEYS | _FUNCTION_KEYS


# Definitions


def read_tools(value: Any, where: str) -> list[Tool]:
    """The tools of a row: OpenAI's wrapped or bare functions, Anthropic's tools, or the JSON text of such a list.

    Raises Rejection if they are something else.
    """
    if is_empty(value):
        return []
    if isinstance(value, str):
        value = parse_json(value, f"{where}: wanted JSON") if value.strip() else []
    tools = value if isinstance(value, list) else [value]
    return [
        _read_tool(parse_json(tool, f"{where}: wanted JSON") if isinstance(tool, str) else tool, where) for tool in tools
    ]


def _read_tool(tool: Any, where: str) -> Tool:
    if not isinstance(tool, dict):
        raise Rejection("wrong_type", f"{where}: wanted a list of objects")
    if "function" not in tool:
        function = {key: value for key, value in tool.items() if (key, value) != ("type", "function")}
        for schema in SCHEMAS:
            if schema in function and "parameters" not in function:
                function = {"parameters" if key == schema else key: value for key, value in function.items()}
        tool = {"type": "function", "function": function}
    checked: Tool = tool
    if not isinstance(checked["function"], dict) or not isinstance(checked["function"].get("name"), str):
        raise Rejection("wrong_type", f"{where}: wanted functions with a name")
    return checked


# Calls


def read_calls(value: Any, where: str, unread: list[str]) -> list[Call]:
    """The calls in a `tool_calls` or `function_call` field: a call, a list of calls, or the JSON text of one of them.

    Adds the keys that are not read to `unread`. Raises Rejection if a call has no name, or arguments that are no object.
    """
    if isinstance(value, str):
        value = parse_json(value, f"{where}: wanted JSON")
    calls = value if isinstance(value, list) else [value]
    return [_read_call(call, where, unread) for call in calls if not is_empty(call)]


def parse_calls(text: str, where: str, unread: list[str]) -> tuple[str, list[Call]]:
    """The content of a function_call turn: JSON of one call or of a list of calls, in <tool_call> tags or not.

    Returns the text before the tags, and the calls.
    """
    if found := split_calls(text, where, unread):
        return found
    return "", read_calls(parse_json(text, f"{where}: function_call: wanted JSON"), where, unread)


def split_calls(text: str, where: str, unread: list[str]) -> tuple[str, list[Call]] | None:
    """Splits an answer in the form of Hermes into its text and its calls: text<tool_call>{…}</tool_call>…

    None if the answer is not of this form: no tags, tags without a call, or text between or after the calls.
    """
    if "<tool_call>" not in text:
        return None
    before, *bodies_and_texts = TOOL_CALL.split(text)
    bodies, texts = bodies_and_texts[::2], bodies_and_texts[1::2]
    if not bodies or any(map(str.strip, texts)) or "<tool_call>" in before:
        return None
    found: list[str] = []
    try:
        calls_of_bodies = [read_calls(parse_json(body, where), where, found) for body in bodies]
    except Rejection as rejection:
        if rejection.reason == "unread_field":
            raise
        return None
    if not all(calls_of_bodies):
        return None
    unread += found
    return before.rstrip(), [call for calls in calls_of_bodies for call in calls]


def _read_call(call: Any, where: str, unread: list[str]) -> Call:
    if isinstance(call, str):
        call = parse_json(call, f"{where}: wanted JSON")
    if not isinstance(call, dict):
        _no_call(where)
    type = call.get("type")
    if type not in CALL_TYPES:
        raise Rejection("wrong_type", f"{where}: a call of type {type!r}; only functions can be called")
    function = call.get("function")
    if function is None:
        function = call
        unread += unread_keys(call, _CALL_KEYS, where)
    elif not isinstance(function, dict):
        _no_call(where)
    else:
        unread += unread_keys(call, _WRAPPER_KEYS, where)
        unread += unread_keys(function, _FUNCTION_KEYS, f"{where}.function")
    name = function.get("name")
    if not isinstance(name, str) or not name:
        _no_call(where)
    content = {"type": "function", "function": {"name": name, "arguments": _arguments(function, name, where)}}
    id = read_id(call, IDS, where)
    return {"id": id, **content} if id else content


def _no_call(where: str) -> NoReturn:
    raise Rejection("wrong_type", f"{where}: wanted calls with a name and arguments")


def _arguments(function: dict[str, Any], name: str, where: str) -> dict[str, Any]:
    """The arguments as an object: OpenAI gives their JSON text, which a chat template would encode as JSON again."""
    given = [key for key in ARGUMENTS if function.get(key) not in (None, "", {})]
    if len(given) > 1:
        raise Rejection("wrong_type", f"{where}: {' and '.join(given)} of {name}: wanted one of them")
    arguments = function[given[0]] if given else {}
    for _ in range(2):  # some exports encode the text a second time
        if isinstance(arguments, str):
            arguments = parse_json(arguments, f"{where}: arguments of {name}: wanted JSON") if arguments.strip() else {}
    if not isinstance(arguments, dict):
        raise Rejection("wrong_type", f"{where}: arguments of {name}: wanted an object")
    return arguments


def read_id(value: Mapping[str, Any], keys: tuple[str, ...], where: str) -> str:
    """The id under the first of `keys` that is not empty, as text; "" if there is none."""
    for key in keys:
        id = value.get(key)
        if id is None or id == "":
            continue
        if isinstance(id, bool) or not isinstance(id, (str, int)):
            raise Rejection("wrong_type", f"{where}.{key}: wanted text")
        return str(id)
    return ""


def parse_json(text: Any, message: str) -> Any:
    """The value of a JSON text, or of a Python literal, as Hermes' data writes it. Raises Rejection with `message`."""
    if not isinstance(text, str):
        return text
    try:
        return json.loads(text, parse_constant=_no_constant)
    except RecursionError:
        raise Rejection("wrong_type", message) from None
    except ValueError:
        pass
    try:
        if text.lstrip()[:1] in ("{", "["):
            # Through JSON, since a literal may hold a tuple, a set, bytes or a complex number.
            value = json.dumps(ast.literal_eval(text.strip()), allow_nan=False)
            return json.loads(value)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        pass
    raise Rejection("wrong_type", message)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


# Results


def result_text(value: Any, where: str) -> str:
    """The text of a tool's result: text as it is, anything else as JSON."""
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    try:
        return json.dumps(value, ensure_ascii=False)
    except RecursionError:
        raise Rejection("wrong_type", f"{where}: nested too deeply") from None


def split_results(text: str) -> list[str] | None:
    """The results in a turn in the form of Hermes, <tool_response>…</tool_response>…; None if it is not of this form."""
    if "<tool_response>" not in text:
        return None
    between, *bodies_and_between = TOOL_RESPONSE.split(text)
    if between or any(bodies_and_between[1::2]):
        return None
    return [body.strip() for body in bodies_and_between[::2]]


def match_results(messages: list[Message], field: str) -> bool:
    """Compares the results behind each message with its calls, and writes an id that only one side has to the other side.

    The ids are matched by position, and only if the calls and the results are equally many. No id is invented.

    Returns whether an id was written. Raises Rejection if a result names no call, or two name the same, or if there are
    more results than calls.
    """
    filled = False
    for number, message in enumerate(messages):
        calls = message.get("tool_calls")
        if not calls:
            continue
        results = []
        for later in messages[number + 1 :]:
            if later["role"] != "tool":
                break
            results.append(later)
        if len(results) > len(calls):
            raise Rejection("unknown_tool_call", f"{field}: {len(results)} tool results for {len(calls)} calls")
        filled |= _fill_ids(calls, results)
        _check_ids(calls, results, field)
    return filled


def _fill_ids(calls: list[Call], results: list[Message]) -> bool:
    if len(calls) != len(results):
        return False
    call_ids = [call.get("id") for call in calls]
    result_ids = [result.get("tool_call_id") for result in results]
    if all(call_ids) and not any(result_ids):
        for result, id in zip(results, call_ids, strict=True):
            name = result.pop("name", None)
            result["tool_call_id"] = id
            if name is not None:
                result["name"] = name  # behind the id, as in rows that have both
        return True
    if all(result_ids) and not any(call_ids):
        for call, id in zip(calls, result_ids, strict=True):
            content = dict(call)
            call.clear()
            call.update({"id": id, **content})
        return True
    return False


def _check_ids(calls: list[Call], results: list[Message], field: str) -> None:
    open_ids = [call["id"] for call in calls if "id" in call]
    for result in results:
        id = result.get("tool_call_id")
        if id is None:
            continue
        if id not in open_ids:
            raise Rejection("unknown_tool_call", f"{field}: tool_call_id {id!r} names no call, or one that has a result")
        open_ids.remove(id)
