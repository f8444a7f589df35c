"""Reads the turns of a conversation, as ShareGPT, OpenAI, Anthropic and the trainers' own formats write them, into messages.

How a turn names its role and its text is detected turn by turn. A message has these keys, in this order:

    role               system, user, assistant or tool
    content            text, "" if there is none
    reasoning_content  assistant: the thinking, if there is any; it never stands in `content`
    tool_calls         assistant: the calls, if there are any
    train              assistant: False if the turn says that it is not to be trained
    tool_call_id, name tool: which call it answers, if the turn says so
"""

import json
import re
from collections.abc import Collection, Mapping
from collections.abc import Set as AbstractSet
from typing import Any, Literal, NamedTuple, TypeAlias

from stages.core.problem import Rejection
from stages.ingest.keys import is_empty, unread_keys
from stages.ingest.tools import (
    Call,
    Message,
    Tool,
    match_results,
    parse_calls,
    parse_json,
    read_calls,
    read_id,
    read_tools,
    result_text,
    split_calls,
    split_results,
)

Role: TypeAlias = Literal["user", "assistant", "system", "tool", "function_call"]
"""What a turn is; `function_call` is an assistant's turn whose text is the JSON of its calls."""

NAMES: dict[Role, str] = {
    "user": "human user prompter",
    "assistant": "gpt assistant model bot chatbot ai chatgpt gpt4 gpt_4 bing bard gemini claude chat",
    "system": "system developer",
    "function_call": "function_call function_calls tool_call tool_calls",
    "tool": "observation tool tool_response tool_responses tool_result tool_results tool_output function function_response"
    " function_result function_output ipython",
}
ROLES: dict[str, Role] = {name: role for role, names in NAMES.items() for name in names.split()}
"""The role names of public data; upper and lower case, "-" and "_" and a space are the same."""

ROLE_KEYS = ("role", "from", "user", "speaker", "author")
CONTENT_KEYS = ("content", "value", "text", "message", "parts")
"""A turn's role and its text are under the first of these keys that are not null."""
QUESTION_KEYS = ("human", "user", "input", "prompt", "question", "query", "instruction")
ANSWER_KEYS = ("assistant", "gpt", "bot", "output", "answer", "response")
"""Firefly, MOSS and XTuner write a question and its answer as one turn, {"human": …, "assistant": …}."""

THINKING_KEYS = ("reasoning_content", "reasoning", "thinking")
DETAILS = ("reasoning_details", "thinking_blocks")
"""The same thinking again, as OpenRouter and LiteLLM give it beside `reasoning` and `reasoning_content`."""
REPEATED = ("thought", "thoughts")
FLAGS = ("train", "training", "loss")
"""true or false: our own, axolotl's, and ms-swift's."""
WEIGHTS = ("weight", "loss_weight", "loss_scale")
"""0 or 1: OpenAI's, LLaMA-Factory's, and ms-swift's."""
PARTS = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "thinking": "thinking",
    "reasoning": "thinking",
    "tool_use": "calls",
    "tool_call": "calls",
}
"""The parts of a content by their `type`: OpenAI's, Anthropic's and LLaMA-Factory's."""
PART_ORDER = ("thinking", "text", "calls")
"""The order in which chat templates write them; parts in another order cannot be written."""
PART_TEXTS = {"text": ("text", "value", "content"), "thinking": ("thinking", "reasoning", "text", "value", "content")}
"""Where the text of a part is; LLaMA-Factory calls it `value`."""
MEDIA = frozenset(("image", "image_url", "input_image", "audio", "audio_url", "input_audio", "video", "video_url", "file"))

OPEN, CLOSE = "<think>", "</think>"
_OPEN = r"""(?:(?<![`'"])<think>|<think>(?![`'"]))"""  # not between quotation marks: a mention of the tag
_CLOSE = r"""(?:(?<![`'"])</think>|</think>(?![`'"]))"""
BLOCK = re.compile(rf"\s*<think>(.*?){_CLOSE}", re.DOTALL)
# The only closing tag of a block may stand between quotation marks by chance: "5"</think>"5".
ANY_BLOCK = re.compile(r"\s*<think>(.*?)</think>", re.DOTALL)
OPEN_TAG, CLOSE_TAG = re.compile(_OPEN), re.compile(_CLOSE)
BLANK_LINES = re.compile(r"[ \t]*\r?\n(?:[ \t]*\r?\n)*|[ \t]+")
SYSTEMS_JOINED, IDS_FILLED = "system_turns_joined", "tool_call_ids_filled"
SYSTEM_SEPARATOR = "\n\n"
"""Between two system turns in a row, as the servers of open models join them."""

_LOSS_KEYS = frozenset((*FLAGS, *WEIGHTS))
_ASSISTANT_KEYS = _LOSS_KEYS | {"tool_calls", "function_call"}
_RESULT_IDS = ("tool_call_id", "tool_use_id", "call_id")
_RESULT_NAMES = ("name", "tool_name")
_RESULT_KEYS = frozenset((*_RESULT_IDS, *_RESULT_NAMES))
_RESULT_PART_KEYS = _RESULT_KEYS | {"type", "content"}


class Turns(NamedTuple):
    """The turns of a conversation as messages."""

    messages: list[Message]
    tools: list[Tool]
    """Tools that stand in a system turn, as GLM's data has them."""
    unread: list[str]
    """The keys of the turns that hold something and were not read, see `keys.unread_keys`."""
    changes: list[str]
    """What was changed beyond the form, to be counted: SYSTEMS_JOINED, IDS_FILLED."""


class _Turn(NamedTuple):
    """One turn, whose role and content have been found."""

    keys: Mapping[str, Any]
    where: str
    """The path of the turn: "messages[3]"."""
    content: Any
    content_path: str
    read: frozenset[str] = frozenset()
    """The keys of the role and the content."""


def read_turns(turns: Any, field: str, *, roles: Mapping[str, Role], has_tools: bool) -> Turns:
    """The messages of a list of turns. Their order is not checked here.

    Args:
        turns: The value of the row's `field`: a list of objects, or its JSON text.
        field: Its name, for messages.
        roles: Role names beyond ROLES, or other readings of those there.
        has_tools: Whether the row defines tools. Then calls and results that stand in the texts in the form of Hermes,
            <tool_call>{…}</tool_call> and <tool_response>…</tool_response>, are read. In rows without, the system text
            defines the tools and asks for this form, so the texts are left as they are.

    Raises Rejection if a turn cannot be read without loss.
    """
    if isinstance(turns, str):
        turns = parse_json(turns, f"{field}: wanted a list of objects")
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise Rejection("wrong_type", f"{field}: wanted a list of objects")
    reader = _Reader(field, {**ROLES, **roles} if roles else ROLES, has_tools=has_tools)
    messages, known = reader.messages, reader.roles
    for number, turn in enumerate(turns, 1):
        if len(turn) == 2:  # most turns of most data are plain; the reader reads them too, but slower
            if "value" in turn:
                name, content = turn.get("from"), turn["value"]
            else:
                name, content = turn.get("role"), turn.get("content")
            if isinstance(content, str) and isinstance(name, str):
                role = known.get(name)
                if (role == "user" and not (reader.has_tools and "<tool_response>" in content)) or (
                    role == "assistant" and "think>" not in content and "<tool_call>" not in content
                ):
                    messages.append({"role": role, "content": content})
                    continue
        reader.read(turn, number)
    if reader.has_results and match_results(messages, field):
        reader.changes.append(IDS_FILLED)
    return Turns(messages, reader.tools, reader.unread, reader.changes)


def add_system(messages: list[Message], text: str, changes: list[str]) -> list[Message]:
    """The messages with a system text that stands beside the turns. A system turn follows it, if it says something else."""
    if not text.strip():
        return messages
    if not messages or messages[0]["role"] != "system":
        return [{"role": "system", "content": text}, *messages]
    if messages[0]["content"].strip() == text.strip():
        return messages
    changes.append(SYSTEMS_JOINED)
    return [{"role": "system", "content": text + SYSTEM_SEPARATOR + messages[0]["content"]}, *messages[1:]]


class _Reader:
    """Collects the messages of one row."""

    def __init__(self, field: str, roles: Mapping[str, Role], *, has_tools: bool) -> None:
        self.messages: list[Message] = []
        self.tools: list[Tool] = []
        self.unread: list[str] = []
        self.changes: list[str] = []
        self.roles = roles
        self.has_tools = has_tools
        self.has_results = False
        self._field = field

    def read(self, turn: Mapping[str, Any], number: int) -> None:
        """Adds the messages of one turn, which counts from 1."""
        where = f"{self._field}[{number}]"
        role_key = next((key for key in ROLE_KEYS if turn.get(key) is not None), None)
        content_key = next((key for key in CONTENT_KEYS if turn.get(key) is not None), None)
        if content_key is None and role_key in (None, "user") and self._read_pair(turn, where):
            return
        usual_key = "value" if role_key == "from" or "value" in turn else "content"
        if role_key is None:
            raise Rejection("missing_field", f"{where}.{'from' if usual_key == 'value' else 'role'}")
        content_key = content_key or next((key for key in CONTENT_KEYS if key in turn), usual_key)
        role = self._role(turn[role_key], f"{where}.{role_key}")
        read = frozenset((role_key, content_key))
        found = _Turn(turn, where, turn.get(content_key), f"{where}.{content_key}", read)
        if role in ("assistant", "function_call"):
            self._read_assistant(found, is_call=role == "function_call")
            return
        if not is_empty(turn.get("tool_calls")) or not is_empty(turn.get("function_call")):
            raise Rejection("roles_out_of_order", f"{where}: tool_calls in a {role} message")
        asked, _ = _loss(turn, where)
        # A request to train on a prompt is not read: encode.labels_on decides that.
        self.unread += [f"{self._field}[].{key}" for key in asked]
        match role:
            case "system":
                self._read_system(found)
            case "tool":
                self._count(found, _LOSS_KEYS | _RESULT_KEYS)
                self._add_results(found)
            case _:
                self._count(found, _LOSS_KEYS)
                self._read_user(found)

    def _role(self, name: Any, where: str) -> Role:
        if not isinstance(name, str):
            raise Rejection("wrong_type", f"{where}: wanted text, found {type(name).__name__}")
        plain = _plain(name)
        role = self.roles.get(name) or self.roles.get(plain)
        role = role or next((role for known, role in self.roles.items() if _plain(known) == plain), None)
        if role is None:
            last = self.messages[-1]["role"] if self.messages else ""
            likely = "assistant" if last in ("user", "tool") else "user"
            key = name if re.fullmatch(r"[A-Za-z]\w*", name, re.ASCII) else json.dumps(name, ensure_ascii=False)
            raise Rejection(
                "unknown_role",
                f"{where}: {name!r}; write into params.yaml which role it is (user, assistant, system, tool or "
                f"function_call): ingest.roles: {{{key}: {likely}}}",
            )
        return role

    def _read_pair(self, turn: Mapping[str, Any], where: str) -> bool:
        """Reads a turn that is a question with its answer, and perhaps a system text. False if it is not."""
        question = next((key for key in QUESTION_KEYS if isinstance(turn.get(key), str)), None)
        answer = next((key for key in ANSWER_KEYS if isinstance(turn.get(key), str)), None)
        if question is None or answer is None:
            return False
        self.unread += unread_keys(turn, {"system", question, answer}, where)
        self._read_system(_Turn({}, where, turn.get("system"), f"{where}.system"))
        self._read_user(_Turn({}, where, turn[question], f"{where}.{question}"))
        self._read_assistant(_Turn({}, where, turn[answer], f"{where}.{answer}"), is_call=False)
        return True

    def _read_system(self, turn: _Turn) -> None:
        """Adds a system message, or adds its text to the one before. An empty system turn is none."""
        self._count(turn, _LOSS_KEYS | {"tools"})
        if tools := read_tools(turn.keys.get("tools"), f"{turn.where}.tools"):
            self.tools += tools
            self.has_tools = True
        if is_empty(turn.content):
            return
        text, _, _ = self._content(turn, ("text",))
        if not text.strip():
            return
        if self.messages and self.messages[-1]["role"] == "system":
            self.messages[-1]["content"] += SYSTEM_SEPARATOR + text
            self.changes.append(SYSTEMS_JOINED)
        else:
            self.messages.append({"role": "system", "content": text})

    def _read_user(self, turn: _Turn) -> None:
        """Adds a user message. A user's turn may hold the results of tools too, in Anthropic's or in Hermes' form."""
        content = turn.content
        if self.has_tools and isinstance(content, str) and (results := split_results(content)):
            self.messages += [{"role": "tool", "content": result} for result in results]
            self.has_results = True
            return
        if isinstance(content, list) and any(_type(part) == "tool_result" for part in content):
            content = self._read_result_parts(turn)
            if not content:
                return
        text, _, _ = self._content(turn._replace(content=content), ("text",))
        self.messages.append({"role": "user", "content": text})

    def _read_result_parts(self, turn: _Turn) -> list[Any]:
        """Adds the results at the start of a user's turn, Anthropic's form. Returns the parts behind them."""
        for number, part in enumerate(turn.content, 1):
            if _type(part) != "tool_result":
                left: list[Any] = turn.content[number - 1 :]
                if any(_type(other) == "tool_result" for other in left):
                    raise Rejection("parts_out_of_order", f"{turn.content_path}: a tool_result behind a text")
                return left
            path = f"{turn.content_path}[{number}]"
            self.unread += unread_keys(part, _RESULT_PART_KEYS, path)
            self._add_results(_Turn(part, path, part.get("content"), f"{path}.content"))
        return []

    def _add_results(self, turn: _Turn) -> None:
        """Adds the tool messages of a turn: one, or several in the form of Hermes."""
        self.has_results = True
        content = turn.content
        texts = split_results(content) if self.has_tools and isinstance(content, str) else None
        if texts and len(texts) > 1:
            self.messages += [{"role": "tool", "content": text} for text in texts]
            return
        if texts:
            text = texts[0]
        elif _has_parts(content):
            text, _, _ = self._content(turn, ("text",))  # which rejects media
        else:
            text = result_text(content, turn.content_path)
        message: Message = {"role": "tool", "content": text}
        if id := read_id(turn.keys, _RESULT_IDS, turn.where):
            message["tool_call_id"] = id
        for key in _RESULT_NAMES:
            name = turn.keys.get(key)
            if name is not None and not isinstance(name, str):
                raise Rejection("wrong_type", f"{turn.where}.{key}: wanted text")
            if name:
                message.setdefault("name", name)
        self.messages.append(message)

    def _read_assistant(self, turn: _Turn, *, is_call: bool) -> None:
        """Adds an assistant message with its thinking and its calls, wherever they stand in the turn."""
        thinking = self._thinking(turn)
        calls = self._calls(turn)
        content = turn.content
        if is_call and content is not None and not isinstance(content, str):
            text, text_calls = "", read_calls(content, turn.content_path, self.unread)
        else:
            if content is None and (calls or thinking):
                turn = turn._replace(content="")
            text, part_thinking, text_calls = self._content(turn, PART_ORDER)
            thinking = _one_thinking(thinking, part_thinking, turn.where)
            thinking, text = _add_thinking(thinking, text, turn.where)
            if is_call and not calls:
                text, text_calls = parse_calls(text, turn.where, self.unread)
            elif self.has_tools and not calls and (found := split_calls(text, turn.where, self.unread)):
                text, text_calls = found
        if is_call and not calls and not text_calls:
            raise Rejection("wrong_type", f"{turn.where}: wanted calls with a name and arguments")
        if calls and text_calls:
            raise Rejection("wrong_type", f"{turn.where}: calls in the content and beside it; wanted one of them")
        message: Message = {"role": "assistant", "content": text}
        if thinking:
            message["reasoning_content"] = thinking
        if calls or text_calls:
            message["tool_calls"] = calls or text_calls
        if _loss(turn.keys, turn.where)[1]:
            message["train"] = False
        if is_call and self.messages and self.messages[-1]["role"] == "assistant":
            self.messages[-1] = _join(self.messages[-1], message, turn.where)
        else:
            self.messages.append(message)

    def _calls(self, turn: _Turn) -> list[Call]:
        fields = [key for key in ("tool_calls", "function_call") if not is_empty(turn.keys.get(key))]
        if len(fields) > 1:
            raise Rejection("wrong_type", f"{turn.where}: tool_calls and function_call; wanted one of them")
        return read_calls(turn.keys[fields[0]], f"{turn.where}.{fields[0]}", self.unread) if fields else []

    def _thinking(self, turn: _Turn) -> str:
        thinking, read = "", set(_ASSISTANT_KEYS)
        for key in THINKING_KEYS:
            value = turn.keys.get(key)
            if isinstance(value, str) and value.casefold() not in ("on", "off"):
                thinking = _one_thinking(thinking, value.strip(), turn.where)
                read.add(key)
        # SWE-agent writes the text of an answer again as its thought.
        read.update(key for key in REPEATED if turn.keys.get(key) and turn.keys[key] == turn.content)
        self._count(turn, read.union(DETAILS) if thinking else read)
        return thinking

    def _count(self, turn: _Turn, read: AbstractSet[str]) -> None:
        if turn.keys:
            self.unread += unread_keys(turn.keys, turn.read | read, turn.where)

    def _content(self, turn: _Turn, kinds: Collection[str]) -> tuple[str, str, list[Call]]:
        """The text, the thinking and the calls in a content, which is a text or a list of parts of the given kinds."""
        content, path = turn.content, turn.content_path
        if isinstance(content, str):
            return content, "", []
        if not isinstance(content, list):
            if content is None and path.removeprefix(f"{turn.where}.") not in turn.keys:
                raise Rejection("missing_field", path)
            raise Rejection("wrong_type", f"{path}: wanted text, found {type(content).__name__}")
        texts: list[str] = []
        thinking: list[str] = []
        calls: list[Call] = []
        latest = 0
        for number, part in enumerate(content, 1):
            part_path = f"{path}[{number}]"
            if is_empty(part):
                continue
            kind = "text" if isinstance(part, str) else PARTS.get(_type(part))
            if kind is None or kind not in kinds:
                if isinstance(part, dict) and _type(part) is None:  # Gemini's parts have no type
                    keys = ", ".join(sorted(map(str, part)))
                    raise Rejection("unread_part", f"{part_path}: a part with {keys}; only {', '.join(kinds)} is read")
                raise Rejection(
                    "unread_part", f"{part_path}: a part of type {_type(part)!r}; only {', '.join(kinds)} is read"
                )
            if PART_ORDER.index(kind) < latest:
                raise Rejection("parts_out_of_order", f"{part_path}: {kind} behind {PART_ORDER[latest]}")
            latest = PART_ORDER.index(kind)
            if isinstance(part, str):
                texts.append(part)
            elif kind == "calls":
                value = part["value"] if "value" in part and "name" not in part else part
                calls += read_calls(value, part_path, self.unread)
            else:
                (texts if kind == "text" else thinking).append(self._part_text(part, kind, part_path))
        return "".join(texts), "\n\n".join(filter(None, map(str.strip, thinking))), calls

    def _part_text(self, part: Mapping[str, Any], kind: str, path: str) -> str:
        key = next((key for key in PART_TEXTS[kind] if part.get(key) is not None), PART_TEXTS[kind][0])
        self.unread += unread_keys(part, {"type", key}, path)
        text = part.get(key)
        if isinstance(text, list) and all(isinstance(inner, dict) and isinstance(inner.get("text"), str) for inner in text):
            for inner in text:  # Mistral's thinking is a list of text parts
                self.unread += unread_keys(inner, {"type", "text"}, f"{path}.{key}[]")
            text = "".join(inner["text"] for inner in text)
        if not isinstance(text, str):
            raise Rejection("wrong_type", f"{path}.{key}: wanted text, found {type(text).__name__}")
        return text


def read_answer(text: str, where: str, *, thinking: str = "") -> Message:
    """The message of an answer in a field of its own, such as Alpaca's `output`, which may begin with its thinking.

    `thinking` is what the row has beside it. Raises Rejection as `split_thinking` does, or if there are two thinkings.
    """
    thinking, text = _add_thinking(thinking.strip(), text, where)
    message: Message = {"role": "assistant", "content": text}
    if thinking:
        message["reasoning_content"] = thinking
    return message


def split_thinking(content: str, where: str) -> tuple[str, str]:
    """The thinking at the start of an answer, without white space at its ends, and what follows it.

    A </think> without <think> ends thinking that the prompt began, as in the answers of DeepSeek R1. Blocks in a row are
    one. Text that only mentions a tag is returned as it is.

    Raises Rejection if a block is not closed, or if a block stands behind text, where no chat template would write it.
    """
    blocks, rest = [], content
    while found := BLOCK.match(rest) or ANY_BLOCK.match(rest):
        blocks.append(found[1].strip())
        rest = rest[found.end() :]
    if rest.lstrip().startswith(OPEN):
        raise Rejection("unclosed_think", f"{where}: <think> without </think>; the answer may be cut off")
    close = CLOSE_TAG.search(rest)
    if close and not blocks and not OPEN_TAG.search(rest):
        blocks.append(rest[: close.start()].strip())
        rest = rest[close.end() :]
        close = CLOSE_TAG.search(rest)
    if close:
        raise Rejection(
            "thinking_out_of_place", f"{where}: thinking behind the start of the answer; wanted it before the text"
        )
    if not blocks:
        return "", content
    space = BLANK_LINES.match(rest)
    return "\n\n".join(filter(None, blocks)), rest[space.end() :] if space else rest


def _add_thinking(thinking: str, text: str, where: str) -> tuple[str, str]:
    """The thinking of an answer, whether it stands beside its text or at the start of it, and the rest of the text."""
    if "think>" not in text:
        return thinking, text
    text_thinking, text = split_thinking(text, where)
    return _one_thinking(thinking, text_thinking, where), text


def _one_thinking(first: str, second: str, where: str) -> str:
    if first and second and first != second:
        raise Rejection("two_thinkings", f"{where}: two different texts of thinking; wanted one")
    return first or second


def _join(answer: Message, call: Message, where: str) -> Message:
    """One message of an answer and the function_call turn that follows it.

    Function_call turns in a row are parallel calls, and text before a call is said with it, as in the data of ms-swift.
    """
    if call["content"] or (call.get("reasoning_content") and (answer["content"] or answer.get("tool_calls"))):
        raise Rejection("roles_out_of_order", f"{where}: a call with text or thinking follows another answer")
    if answer.get("train", True) != call.get("train", True):
        raise Rejection(
            "roles_out_of_order", f"{where}: a call and the text before it are one answer; train must be the same"
        )
    joined: Message = {"role": "assistant", "content": answer["content"]}
    if thinking := answer.get("reasoning_content") or call.get("reasoning_content"):
        joined["reasoning_content"] = thinking
    joined["tool_calls"] = [*answer.get("tool_calls", ()), *call["tool_calls"]]
    if "train" in call:
        joined["train"] = False
    return joined


def _loss(turn: Mapping[str, Any], where: str) -> tuple[list[str], bool]:
    """The keys that put a turn into the loss, and whether a key keeps it out. Raises Rejection for any other value."""
    asked, silent = [], False
    for key in (*FLAGS, *WEIGHTS):
        value = turn.get(key)
        if value is None:
            continue
        if key in FLAGS and not isinstance(value, bool):
            raise Rejection("wrong_type", f"{where}.{key}: wanted true or false")
        if key in WEIGHTS and (isinstance(value, bool) or value not in (0, 1)):
            raise Rejection("wrong_type", f"{where}.{key}: wanted 0 or 1")
        if value:
            asked.append(key)
        else:
            silent = True
    return asked, silent


def _plain(name: str) -> str:
    return name.strip().casefold().replace("-", "_").replace(" ", "_")


def _has_parts(content: Any) -> bool:
    """Whether a tool's result is a list of text parts, or has a part that is no text; other lists are results themselves."""
    if not isinstance(content, list) or not content:
        return False
    return all(PARTS.get(_type(part)) == "text" for part in content) or any(_type(part) in MEDIA for part in content)


def _type(part: Any) -> Any:
    """The type of a part of a content; a part without one is a text if it has one."""
    if not isinstance(part, dict):
        return type(part).__name__
    found = part.get("type")
    if found is None and isinstance(part.get("text"), str):
        return "text"
    return found if isinstance(found, str) else None
