"""Reads the tool calls in an answer's text, in the formats that current models write, and compares them."""

import ast
import json
import keyword
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

MAX_CHARS = 100_000
"""Longer answers are read up to here."""
MAX_DEPTH = 32
"""Values that are nested deeper cannot be read."""
MAX_ATTEMPTS = 1000
"""Places in an answer at which JSON is looked for."""


class Call(NamedTuple):
    """A call of a tool."""

    name: str
    """"" for a call that cannot be read."""
    arguments: Mapping[str, Any]


class WrittenText(str):
    """A value from a format that does not say whether it is a text or a number, compared as it is written."""


class Unreadable(ValueError):
    """The text has the marks of a call, but is none."""


class CallScores(NamedTuple):
    """How the calls of an answer agree with those of the reference, each between 0 and 1, in any order."""

    names: float
    """Right names as a share of the calls of the reference, or of the answer if it has more."""
    arguments_f1: float
    """F1 over the arguments of all calls, each with the name of its call and its value."""
    exact: float
    """1 if all calls agree in name and arguments."""


def reference_calls(message: Mapping[str, Any]) -> list[Call]:
    """The calls of a message of data/examples."""
    functions = [call["function"] for call in message.get("tool_calls") or []]
    return [Call(function["name"], function["arguments"]) for function in functions]


def recovers(text: str, calls: Sequence[Call]) -> bool:
    """Whether `parse_calls` finds in the text exactly the calls that are known to stand in it."""
    if not all(_is_shallow(call.arguments) for call in calls):
        return False
    found = parse_calls(text)
    return len(found) == len(calls) and (not calls or compare_calls(calls, found).exact == 1)


def compare_calls(wanted: Sequence[Call], found: Sequence[Call]) -> CallScores:
    """Scores `found` against `wanted`, of which there is at least one."""
    as_written = any(isinstance(value, WrittenText) for call in found for value in call.arguments.values())
    names = [Counter(call.name for call in calls) for calls in (wanted, found)]
    arguments = [Counter(_argument_keys(calls, as_written=as_written)) for calls in (wanted, found)]
    whole = [Counter(_call_key(call, as_written=as_written) for call in calls) for calls in (wanted, found)]
    total = arguments[0].total() + arguments[1].total()
    same_names = names[0] == names[1]
    return CallScores(
        names=(names[0] & names[1]).total() / max(len(wanted), len(found)),
        arguments_f1=2 * (arguments[0] & arguments[1]).total() / total if total else float(same_names),
        exact=float(whole[0] == whole[1]),
    )


def _argument_keys(calls: Sequence[Call], *, as_written: bool) -> Iterator[tuple[str, str, str]]:
    for call in calls:
        for name, value in call.arguments.items():
            yield call.name, name, _value_key(value, as_written=as_written)


def _call_key(call: Call, *, as_written: bool) -> tuple[str, tuple[tuple[str, str, str], ...]]:
    return call.name, tuple(sorted(_argument_keys([call], as_written=as_written)))


def _value_key(value: Any, *, as_written: bool) -> str:
    """A text that is equal for equal values: keys in any order, 5.0 as 5."""
    if not as_written:
        return json.dumps(_plain(value), sort_keys=True)
    if isinstance(value, str):
        text = value.strip()
        if text in ("True", "False", "None"):  # as Jinja writes true, false and null
            return {"True": "true", "False": "false", "None": "null"}[text]
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return text
        return _value_key(value, as_written=True) if not isinstance(value, str) else text
    return json.dumps(_plain(value), sort_keys=True)


def _plain(value: Any) -> Any:
    """The value with whole numbers as integers, all the way down."""
    match value:
        case float() if value.is_integer():
            return int(value)
        case list() | tuple():
            return [_plain(item) for item in value]
        case dict():
            return {str(key): _plain(item) for key, item in value.items()}
        case _:
            return value


# Reading


def parse_calls(text: str) -> list[Call]:
    """The calls in an answer, from the text behind its thinking; [] if it calls nothing.

    A call that has the marks of one and cannot be read has the name "".
    """
    text = text[:MAX_CHARS]
    read = next((reader for mark, reader in FORMATS if mark.search(text)), None)
    try:
        calls = read(text) if read else _unmarked(text)
    except (Unreadable, RecursionError, MemoryError):
        calls = [Call("", {})]
    if read and not calls:
        calls = [Call("", {})]
    return [call if _is_shallow(call.arguments) else Call("", {}) for call in calls]


def _is_shallow(value: Any, depth: int = 0) -> bool:
    """Whether a value is nested no deeper than MAX_DEPTH."""
    if not isinstance(value, Mapping | list | tuple):
        return True
    items = value.values() if isinstance(value, Mapping) else value
    return depth < MAX_DEPTH and all(_is_shallow(item, depth + 1) for item in items)


def _unmarked(text: str) -> list[Call]:
    """Calls without marks, as Llama 3 and Llama 4 write them, or with marks of one's own template. Raises Unreadable."""
    inner = SPECIAL_TOKEN.sub("", text).strip()
    if inner.startswith("[") and inner.endswith("]") and PYTHON_CALL.match(inner[1:].lstrip()):
        return _python_calls(inner)
    return _json_calls(text, strict=True)


SPECIAL_TOKEN = re.compile(r"<\|[^<>|]{1,40}\|>")
PYTHON_CALL = re.compile(r"[A-Za-z_][\w.]*\(")
CALL_KEYS = {"name", "tool_name", "function", "arguments", "parameters", "args", "id", "tool_call_id", "call_id", "type"}
ARGUMENT_KEYS = ("arguments", "parameters", "args")


def _json_calls(text: str, *, strict: bool = False) -> list[Call]:
    """Every call that stands in the text as a JSON object, alone or in a list.

    Args:
        strict: For a text without marks: an object that has other fields, or no arguments, is no call.
    """
    decoder, calls, at = json.JSONDecoder(), list[Call](), 0
    for _ in range(MAX_ATTEMPTS):
        start = next((place for place in range(at, len(text)) if text[place] in "{["), None)
        if start is None:
            break
        try:
            value, at = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            at = start + 1
            continue
        for item in value if isinstance(value, list) else [value]:
            call = _as_call(item, strict=strict)
            if call:
                calls.append(call)
    return calls


def _as_call(value: Any, *, strict: bool) -> Call | None:
    """A JSON value as a call: {"name", "arguments"} and its variants; None if it is none."""
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = value["function"]
    if not isinstance(value, dict) or (strict and not value.keys() <= CALL_KEYS):
        return None
    name = next((value[key] for key in ("name", "tool_name", "function") if isinstance(value.get(key), str)), "")
    given = next((value[key] for key in ARGUMENT_KEYS if key in value), None)
    if isinstance(given, str):  # JSON in a text, as OpenAI's API has it
        try:
            given = json.loads(given)
        except (ValueError, RecursionError):
            return None
    if given is None and not strict:
        given = {}
    return Call(name, given) if name and isinstance(given, dict) else None


def _object_at(text: str, at: int) -> dict[str, Any]:
    """The JSON object that follows a place of the text. Raises Unreadable if there is none."""
    start = text.find("{", at)
    try:
        value = json.JSONDecoder().raw_decode(text, start)[0] if start >= 0 else None
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise Unreadable
    return value


def _deepseek(text: str) -> list[Call]:
    """V3 and R1: type, mark, name and a block of JSON. V3.1: name, mark and JSON."""
    calls = []
    for segment in text.split("<｜tool▁call▁begin｜>")[1:]:
        before, _, after = segment.partition("<｜tool▁sep｜>")
        name = before if after.lstrip().startswith("{") else after.lstrip().partition("\n")[0]
        calls.append(Call(name.strip(), _object_at(after, 0)))
    return calls


def _named_json(pattern: re.Pattern[str]) -> Callable[[str], list[Call]]:
    """A reader of formats in which the arguments follow the match of `pattern`, whose first group is the name."""

    def read(text: str) -> list[Call]:
        found = [(match[1], match.end()) for match in pattern.finditer(text)]
        return [
            Call(re.sub(r":\d+$", "", name.strip()).removeprefix("functions."), _object_at(text, end)) for name, end in found
        ]

    return read


MISTRAL_NAME = re.compile(r"\[TOOL_CALLS\]\s*([\w.\-]+)\s*(?:\[CALL_ID\]\s*[\w\-]+\s*)?(?:\[ARGS\]\s*)?(?=\{)")


def _mistral(text: str) -> list[Call]:
    """A list of calls as JSON; since 2025 a name and its arguments for each call."""
    return _named_json(MISTRAL_NAME)(text) if MISTRAL_NAME.search(text) else _json_calls(text.partition("[TOOL_CALLS]")[2])


def _blocks(text: str, opening: re.Pattern[str], closing: re.Pattern[str]) -> Iterator[tuple[re.Match[str], str]]:
    """The match of each opening mark, and the text up to the closing mark; one without a closing mark ends the search."""
    at = 0
    while (start := opening.search(text, at)) and (end := closing.search(text, start.end())):
        yield start, text[start.end() : end.start()]
        at = end.end()


INVOKE = re.compile(r"<[^<>\s]{0,20}invoke name=\"([^\"<>]+)\"\s*>"), re.compile(r"</[^<>\s]{0,20}invoke>")
INVOKE_PARAMETER = (
    re.compile(r"<[^<>\s]{0,20}parameter name=\"([^\"<>]+)\"([^<>]{0,40})>"),
    re.compile(r"</[^<>\s]{0,20}parameter>"),
)


def _invoke(text: str) -> list[Call]:
    """MiniMax's tags, DeepSeek V3.2's, in which string="false" marks JSON, and Muse's."""
    calls = []
    for match, body in _blocks(text, *INVOKE):
        arguments: dict[str, Any] = {}
        for parameter, value in _blocks(body, *INVOKE_PARAMETER):
            key, attributes = parameter[1], parameter[2]
            if 'string="true"' in attributes:
                arguments[key] = value
            elif 'string="false"' in attributes:
                arguments[key] = _json_or_text(value)
            else:
                arguments[key] = WrittenText(value)
        calls.append(Call(match[1], arguments if arguments or not body.strip() else _object_at(body, 0)))
    return calls


def _json_or_text(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


FUNCTION = re.compile(r"<function=([^<>\n]+)>"), re.compile("</function>")
FUNCTION_PARAMETER = re.compile(r"<parameter=([^<>\n]+)>\n?"), re.compile(r"\n?</parameter>")


def _function_tags(text: str) -> list[Call]:
    """Qwen3-Coder, Qwen3.5, Nemotron 3, Seed-OSS: a tag for each argument. Llama 3.1's <function=name>: JSON."""
    calls = []
    for match, body in _blocks(text, *FUNCTION):
        if body.lstrip().startswith("{"):
            arguments = _object_at(body, 0)
        else:
            arguments = {key[1].strip(): WrittenText(value) for key, value in _blocks(body, *FUNCTION_PARAMETER)}
        calls.append(Call(match[1].strip(), arguments))
    return calls


GLM_CALL = re.compile(r"<tool_call>\s*([^\s<{\[]+)"), re.compile("</tool_call>")
GLM_ARGUMENT = re.compile(r"<arg_key>([^<]*)</arg_key>\s*<arg_value>"), re.compile("</arg_value>")


def _glm(text: str) -> list[Call]:
    return [
        Call(match[1], {key[1].strip(): WrittenText(value) for key, value in _blocks(body, *GLM_ARGUMENT)})
        for match, body in _blocks(text, *GLM_CALL)
    ]


GEMMA_CALL = re.compile(r"(?:<\|tool_call>|<start_function_call>)\s*call:([^{\s]+)\s*(?=\{)")


def _gemma(text: str) -> list[Call]:
    """Gemma 4 and FunctionGemma: call:name{key:value}, with marks around texts instead of quotation marks."""
    return [Call(match[1], _GemmaValue(text, match.end()).read_object(0)) for match in GEMMA_CALL.finditer(text)]


class _GemmaValue:
    """Reads one value from a place of the text."""

    QUOTES = ('<|"|>', "<escape>")
    LITERALS: Mapping[str, Any] = {"true": True, "false": False, "null": None, "None": None, "True": True, "False": False}
    BARE = re.compile(r"[^,{}\[\]<]*")
    KEY = re.compile(r"[^:{}\[\]<,]*")

    def __init__(self, text: str, at: int) -> None:
        self._text, self._at = text, at

    def read_object(self, depth: int) -> dict[str, Any]:
        """Raises Unreadable."""
        found: dict[str, Any] = {}
        self._expect("{")
        while not self._skip("}"):
            key = self._quoted()
            if key is None:
                key = self._match(self.KEY).strip()
            self._expect(":")
            found[key] = self._value(depth + 1)
            if not self._skip(","):
                self._expect("}")
                break
        return found

    def _value(self, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise Unreadable
        quoted = self._quoted()
        if quoted is not None:
            return quoted
        if self._text.startswith("{", self._at):
            return self.read_object(depth)
        if self._skip("["):
            items = []
            while not self._skip("]"):
                items.append(self._value(depth + 1))
                if not self._skip(","):
                    self._expect("]")
                    break
            return items
        word = self._match(self.BARE).strip()
        if word in self.LITERALS:
            return self.LITERALS[word]
        try:
            return json.loads(word)
        except ValueError:
            raise Unreadable from None

    def _quoted(self) -> str | None:
        for quote in self.QUOTES:
            if self._skip(quote):
                end = self._text.find(quote, self._at)
                if end < 0:
                    raise Unreadable
                value, self._at = self._text[self._at : end], end + len(quote)
                return value
        return None

    def _match(self, pattern: re.Pattern[str]) -> str:
        match = pattern.match(self._text, self._at)
        assert match is not None  # the patterns match an empty text too
        self._at = match.end()
        return match[0]

    def _skip(self, text: str) -> bool:
        found = self._text.startswith(text, self._at)
        self._at += len(text) * found
        return found

    def _expect(self, text: str) -> None:
        if not self._skip(text):
            raise Unreadable


PYTHON_TAG_CALL = re.compile(r"<\|python_tag\|>\s*([\w]+)\.call\((.*)\)", re.DOTALL)
PYTHON_BLOCK = (
    re.compile(r"<\|tool_call_start\|>|<function_calls>"),
    re.compile(r"<\|tool_call_end\|>|</function_calls>"),
)


def _python_block(text: str) -> list[Call]:
    """LFM2, Olmo 3: calls as Python writes them, in a list or one a line. Llama 3.1: built-in tools."""
    tagged = PYTHON_TAG_CALL.search(text)
    if tagged:
        return _python_calls(f"[{tagged[1]}({tagged[2]})]")
    calls = []
    for _, block in _blocks(text, *PYTHON_BLOCK):
        body = block.strip()
        calls += _python_calls(body if body.startswith("[") else f"[{','.join(body.splitlines())}]")
    return calls


ESCAPE = "_is_no_keyword"
"""Is put behind the name of an argument that is a word of Python, as `from`, and taken off again."""
KEYWORD_ARGUMENT = re.compile(rf"(?<=[(,\s])({'|'.join(keyword.kwlist)})(?=\s*=)")


def _python_calls(source: str) -> list[Call]:
    """[name(key=value), ...]: parsed, never run. Raises Unreadable."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of backslashes in the text
        try:
            tree = ast.parse(KEYWORD_ARGUMENT.sub(rf"\1{ESCAPE}", source), mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            raise Unreadable from None
    if not isinstance(tree, ast.List):
        raise Unreadable
    return [_python_call(node) for node in tree.elts]


def _python_call(node: ast.expr) -> Call:
    if not isinstance(node, ast.Call) or node.args or not isinstance(node.func, ast.Name | ast.Attribute):
        raise Unreadable
    arguments = {}
    for argument in node.keywords:
        if argument.arg is None:
            raise Unreadable
        arguments[argument.arg.removesuffix(ESCAPE)] = _python_value(argument.value, 0)
    return Call(ast.unparse(node.func), arguments)


def _python_value(node: ast.expr, depth: int) -> Any:
    """The value of a literal; true, false and null too, as JSON writes them."""
    if depth > MAX_DEPTH:
        raise Unreadable
    match node:
        case ast.Name(id="true" | "false" | "null" as name):
            return json.loads(name)
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [_python_value(item, depth + 1) for item in items]
        case ast.Dict(keys=keys, values=values) if None not in keys:
            pairs = zip(keys, values, strict=True)
            return {_python_value(key, depth + 1): _python_value(value, depth + 1) for key, value in pairs if key}
        case ast.Constant() | ast.UnaryOp():
            try:
                value = ast.literal_eval(node)
            except (ValueError, TypeError):
                raise Unreadable from None
            if isinstance(value, str):
                return value.replace(ESCAPE, "")
            if value is None or isinstance(value, int | float):
                return value
    raise Unreadable


JSON_MARKS = (
    r"<tool_call>|<\|tool_call\|>|<TOOLCALL>|<tool_calls>|<\|START_ACTION\|>|<\|python_tag\|>|<\|action_start\|>|"
    r"<function_?call>|^Action:\s*```json"
)
FORMATS: tuple[tuple[re.Pattern[str], Callable[[str], list[Call]]], ...] = (
    (re.compile("<｜tool▁call▁begin｜>"), _deepseek),
    (
        re.compile(r"<\|tool_call_begin\|>"),  # Kimi K2
        _named_json(re.compile(r"<\|tool_call_begin\|>\s*([^<]*?)\s*<\|tool_call_argument_begin\|>")),
    ),
    (re.compile(r"<[^<>\s]{0,20}invoke name="), _invoke),
    (
        re.compile(r"\bto=functions\."),  # gpt-oss
        _named_json(re.compile(r"\bto=(functions\.[\w.\-]+)[^{}]{0,200}?<\|message\|>")),
    ),
    (re.compile(r"\[TOOL_CALLS\]"), _mistral),
    (re.compile("<function="), _function_tags),
    (re.compile(r"<tool_call>\s*[^\s<{\[]"), _glm),
    (re.compile(r"<\|tool_call>|<start_function_call>"), _gemma),
    (re.compile(r"<\|tool_call_start\|>|<function_calls>|<\|python_tag\|>\s*\w+\.call\("), _python_block),
    (
        re.compile(r"^Action:.*\nAction Input:", re.MULTILINE),  # ReAct
        _named_json(re.compile(r"^Action:[ \t]*(\S+)[ \t]*\nAction Input:", re.MULTILINE)),
    ),
    (re.compile(JSON_MARKS, re.MULTILINE), _json_calls),
)
"""The mark that shows a format, and its reader; the first format whose mark stands in the text is read."""
