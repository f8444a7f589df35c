"""The training rows of a conversation: which text each has, and where in it the answers are.

An answer is trained behind exactly the prompt that a model gets at that turn: the template's rendering of the messages
before it, with `add_generation_prompt`. If the rendering of the complete conversation begins with that prompt and that
answer for each of its answers, the conversation is one row. Many templates write an answer differently as soon as messages
follow: Qwen 3 leaves out earlier reasoning, Mistral moves the system text and the tools to the last question, gpt-oss ends
the last answer with another token. Then the conversation becomes several rows, each of which ends with an answer that the
later rows do not have in this form.

What the template itself writes between the prompt and any plain answer, as an empty thinking block, belongs to the prompt.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import jinja2

from stages.encode.mask import AnswerSpan, SpecialTokens
from stages.encode.spans import LeftOut, Position, Skeleton, TextSpan, Untraceable, mark, mark_texts
from stages.encode.template import ChatTemplate

Thinking: TypeAlias = Literal["train", "mask", "drop"]
Message: TypeAlias = Mapping[str, Any]

REASONING = "reasoning_content"
ReasoningForm: TypeAlias = Literal["none", "reasoning_content", "thinking", "reasoning", "parts", "inline", "open"]
REASONING_FORMS: tuple[ReasoningForm, ...] = ("reasoning_content", "thinking", "reasoning", "parts", "inline", "open")
"""How a message gives its reasoning to a template, in the order in which they are tried: a field of that name, content parts
(Mistral), `<think>…</think>` at the beginning of the content, or not at all, because the prompt for the answer has opened a
thinking block that the answer closes (DeepSeek R1)."""
OPEN_BLOCK = re.compile(r"<([\w:]+)>\s*\Z")
"""The end of a prompt that opens a thinking block."""
CLOSING_MARK = re.compile(r"\s*(?:</[\w:]+>|\[/\w+\])\s*")
"""What ends a thinking block."""
MARKED = "\ue000"
NO_REASONING = "the template has no place for reasoning_content (or <think>); choose a template that has, or write encode.thinking: drop"
PARTS_REPR = "'type':"
"""In a rendering: the template wrote a list of parts as Python does, since it knows only text."""


class RenderedRow(NamedTuple):
    """The text of one training row."""

    text: str
    answers: list[AnswerSpan]
    """The answers that this row trains, in order. The last one ends the row, and is here even if it is not in the loss."""
    spans: list[TextSpan]
    """Where the messages' texts are. Those of tools and tool calls are not among them."""


class Conversation(NamedTuple):
    """What is rendered: a row of data/examples."""

    messages: Sequence[Message]
    tools: Sequence[Any]

    @property
    def has_tools(self) -> bool:
        """Whether tools are described or called. Each template writes them in its own way."""
        return bool(self.tools) or any("tool_calls" in message for message in self.messages)


class _Form(NamedTuple):
    """How the messages are given to the template."""

    reasoning: ReasoningForm
    arguments_as_text: bool


class _Answer(NamedTuple):
    """An answer of a marked rendering."""

    start: int
    label_start: int
    stop_start: int
    end: int
    stop: str
    follows_prompt: bool


class _AnswerShape(NamedTuple):
    """The same, independent of the texts' lengths."""

    message: int
    start: Position
    label_start: Position
    stop_start: Position
    end: Position
    stop: str
    follows_prompt: bool


class _RowShape(NamedTuple):
    """A row of all conversations with the same roles and fields."""

    messages: int
    """The number of messages in the row."""
    form: _Form
    suffix: str
    """A stop token that the template writes only if another message follows."""
    skeleton: Skeleton
    answers: list[_AnswerShape]


class AnswerFinder:
    """Finds the answers in conversations that one template renders."""

    def __init__(
        self, template: ChatTemplate, special: SpecialTokens, *, bos: str, thinking: Thinking, train_empty_thinking: bool
    ) -> None:
        """`bos` is the BOS token or ""; a next turn that begins with it does not end the answer before it."""
        self._template, self._special, self._bos = template, special, bos
        self._thinking, self._train_empty_thinking = thinking, train_empty_thinking
        self._shapes: dict[tuple[Any, ...], list[_RowShape] | Exception] = {}
        self._plain_gaps: dict[bool, str] = {}

    def rows(self, conversation: Conversation, *, last_only: bool) -> list[RenderedRow]:
        """The rows of a conversation that ends with an answer. Every answer is in the loss of exactly one of them.

        Args:
            conversation: Its messages have a role and content, and an answer may have `reasoning_content`, `tool_calls` and
                `"train": False`, which keeps it out of the loss.
            last_only: Only the last answer matters, so that there is one row.

        Raises:
            Untraceable: If the template changes or leaves out a text.
            jinja2.TemplateError: If the template refuses the conversation.
        """
        if self._thinking == "drop" and any(REASONING in message for message in conversation.messages):
            messages = [{k: v for k, v in message.items() if k != REASONING} for message in conversation.messages]
            conversation = conversation._replace(messages=messages)
        shapes = self._find_shapes(conversation, last_only=last_only)
        return [self._fill(shape, conversation) for shape in shapes]

    def _find_shapes(self, conversation: Conversation, *, last_only: bool) -> list[_RowShape]:
        if conversation.has_tools:  # what a template makes of calls and results depends on their values
            return self._make_shapes(conversation, last_only=last_only)
        key = (last_only, *(_shape_key(message) for message in conversation.messages))
        if key not in self._shapes:
            try:
                self._shapes[key] = self._make_shapes(conversation, last_only=last_only)
            except (Untraceable, jinja2.TemplateError) as error:
                self._shapes[key] = error
        shapes = self._shapes[key]
        if isinstance(shapes, Exception):
            raise type(shapes)(*shapes.args)
        return shapes

    def _fill(self, shape: _RowShape, conversation: Conversation) -> RenderedRow:
        """The row with the texts of a conversation. Raises Untraceable if the template treats it unlike its shape."""
        messages = conversation.messages[: shape.messages]
        text = self._render_through(messages, conversation.tools, shape.form) + shape.suffix
        filled = shape.skeleton.fill(messages, text)
        answers = [
            AnswerSpan(
                message=answer.message,
                start=filled.at(answer.start),
                label_start=filled.at(answer.label_start),
                stop_start=filled.at(answer.stop_start),
                end=filled.at(answer.end),
                in_loss=messages[answer.message].get("train", True),
                stop=answer.stop,
                follows_prompt=answer.follows_prompt,
            )
            for answer in shape.answers
        ]
        if conversation.has_tools:
            for answer in answers:
                _check_calls(messages[answer.message], text[answer.start : answer.end], answer.message)
        return RenderedRow(text, answers, filled.spans)

    # Shapes

    def _make_shapes(self, conversation: Conversation, *, last_only: bool) -> list[_RowShape]:
        """Raises what `rows` raises."""
        marked = mark_texts(conversation.messages)
        trained = [
            number
            for number, message in enumerate(marked)
            if message["role"] == "assistant" and message.get("train", True) and not last_only
        ]
        last = len(marked) - 1
        numbers = sorted({*trained, last})
        found: list[_RowShape] = []
        problems: list[Exception] = []
        for form in _forms(conversation.messages):
            try:
                shapes = self._shapes_in_form(marked, conversation.tools, numbers, form)
            except (Untraceable, jinja2.TemplateError) as error:
                problems.append(error)
                continue
            if all(answer.follows_prompt for shape in shapes for answer in shape.answers):
                return shapes
            found = found or shapes
        if not found:
            raise problems[0]
        return found

    def _shapes_in_form(
        self, marked: list[dict[str, Any]], tools: Sequence[Any], numbers: list[int], form: _Form
    ) -> list[_RowShape]:
        """The rows for the answers in the messages `numbers`, if the messages are given to the template in this form."""
        texts, suffixes, answers = {}, {}, {}
        for number in numbers:
            texts[number], suffixes[number], answers[number] = self._find_answer(marked[: number + 1], tools, form)
        shapes: list[_RowShape] = []
        left = list(numbers)
        while left:
            row = left[-1]
            text = texts[row]
            held = [n for n in left if text.startswith(texts[n][: answers[n].end])]
            left = [n for n in left if n not in held]
            skeleton = Skeleton(text)
            _check_texts(marked[: row + 1], skeleton)
            found = [
                _AnswerShape(
                    n,
                    skeleton.position(answers[n].start),
                    skeleton.position(answers[n].label_start),
                    skeleton.position(answers[n].stop_start),
                    skeleton.position(answers[n].end),
                    answers[n].stop,
                    answers[n].follows_prompt,
                )
                for n in held
            ]
            shapes.append(_RowShape(row + 1, form, suffixes[row], skeleton, found))
        return shapes[::-1]

    def _find_answer(self, marked: list[dict[str, Any]], tools: Sequence[Any], form: _Form) -> tuple[str, str, _Answer]:
        """The rendering of marked messages, a stop token appended to it or "", and where the last answer is in it."""
        text = self._render_through(marked, tools, form)
        number, message = len(marked) - 1, marked[-1]
        calls = message.get("tool_calls", [])
        arguments = [call["function"]["arguments"] for call in calls if call["function"]["arguments"]]
        if not form.arguments_as_text and any(repr(each) in text for each in arguments):
            raise Untraceable(f"the template writes the arguments of message {number + 1} as Python, not as JSON")
        prompt = self._render_prompt(marked[:-1], tools, form)
        follows_prompt = prompt is not None and text.startswith(prompt)
        after = len(prompt or "") if follows_prompt else 0
        places = _places(message, text, number, after)
        if not places and not follows_prompt:
            raise Untraceable(f"the text before the answer in message {number + 1} is not the prompt for it")
        start = after if follows_prompt else min(places.values())
        if follows_prompt:
            gap = self._template_gap(message, text[after:], places, after, opens=form.reasoning == "open")
            start += 0 if self._train_empty_thinking else len(gap)
        content_end = max((place + len(mark(number, field)) for field, place in places.items()), default=after)
        stop_start, end, stop = self._find_stop(text, content_end, has_calls=bool(calls))
        suffix = ""
        if not stop:
            suffix = stop = self._stop_of_next_turn(marked, tools, form, text)
            stop_start = len(text) if suffix else stop_start
            text += suffix
            end = len(text) if suffix else end
        label_start = self._label_start(message, text, number, places, start)
        return text, suffix, _Answer(start, label_start, stop_start, end, stop, follows_prompt)

    def _template_gap(self, message: Message, rest: str, places: Mapping[str, int], after: int, *, opens: bool) -> str:
        """What the template writes between the prompt and any plain answer, if it stands at the beginning of `rest`.

        White space there is not meant: the model must generate it.
        """
        if not message.get("tool_calls") and REASONING not in message and places:
            gap = rest[: min(places.values()) - after]
        else:
            gap = self._gap_of_plain_answers(opens=opens)
        return gap if gap.strip() and rest.startswith(gap) else ""

    def _gap_of_plain_answers(self, *, opens: bool) -> str:
        """What stands between the prompt and the answer of a small conversation; `opens` is for the form "open"."""
        if opens not in self._plain_gaps:
            self._plain_gaps[opens] = ""
            plain = [{"role": "user", "content": mark(0, "content")}, {"role": "assistant", "content": mark(1, "content")}]
            form = _Form("open" if opens else "none", arguments_as_text=False)
            try:
                prompt, text = self._render_prompt(plain[:1], (), form), self._render_through(plain, (), form)
            except (jinja2.TemplateError, Untraceable):
                return ""
            if prompt is not None and text.startswith(prompt) and mark(1, "content") in text:
                self._plain_gaps[opens] = text[len(prompt) : text.index(mark(1, "content"))]
        return self._plain_gaps[opens]

    def _label_start(self, message: Message, text: str, number: int, places: Mapping[str, int], start: int) -> int:
        """Where the loss begins: behind the reasoning, if that is not trained."""
        if self._thinking == "train" or REASONING not in places:
            return start
        if "content" in places:
            return places["content"]
        reasoning_end = places[REASONING] + len(mark(number, REASONING))
        closing = CLOSING_MARK.match(text, reasoning_end)
        return closing.end() if closing else reasoning_end

    def _find_stop(self, text: str, at: int, *, has_calls: bool) -> tuple[int, int, str]:
        """Where the stop token begins and the answer ends, and the stop token; "" if there is none.

        The answer's own text ends at `at` or, with calls, somewhere behind it.
        """
        if has_calls:
            start, end = self._special.last(text, at, len(text))
            return (len(text), len(text), "") if start == end or text[end:].strip() else (start, end, text[start:end])
        start = len(text) - len(text[at:].lstrip())
        stop = self._special.at(text, start)
        if not stop:
            return at, at, ""
        end = start + len(stop)
        while following := self._special.at(text, end):  # <|END_RESPONSE|><|END_OF_TURN_TOKEN|>
            end += len(following)
        return start, end, stop

    def _stop_of_next_turn(self, marked: list[dict[str, Any]], tools: Sequence[Any], form: _Form, text: str) -> str:
        """The special token that follows the answer at once when the conversation continues, as GLM's `<|user|>`; or ""."""
        calls = marked[-1].get("tool_calls")
        following: dict[str, Any] = {"role": "tool" if calls else "user", "content": "0"}
        if calls:
            following |= {"name": calls[0]["function"]["name"]} | (
                {"tool_call_id": calls[0]["id"]} if "id" in calls[0] else {}
            )
        try:
            longer = self._template.render(_give([*marked, following], form), tools)
        except jinja2.TemplateError:
            return ""
        stop = self._special.at(longer, len(text)) if longer.startswith(text) else ""
        return "" if stop == self._bos else stop

    # Rendering

    def _render_through(self, messages: Sequence[Message], tools: Sequence[Any], form: _Form) -> str:
        """The rendering of messages that end with an answer; with an open block, the answer stands behind its prompt."""
        text = self._template.render(_give(messages, form), tools)
        if form.reasoning != "open":
            return text
        prompt = self._template.render(_give(messages[:-1], form), tools, add_generation_prompt=True)
        opened = OPEN_BLOCK.search(prompt)
        if text.startswith(prompt) or not opened or not text.startswith(prompt[: opened.start()]):
            if REASONING in messages[-1]:
                raise LeftOut(NO_REASONING)
            return text
        answer = text[opened.start() :]
        empty_block = re.match(rf"<{opened[1]}>\s*</{opened[1]}>", answer)
        answer = answer[empty_block.end() :] if empty_block else answer
        return f"{prompt}{messages[-1].get(REASONING, '')}\n</{opened[1]}>\n\n{answer.lstrip(chr(10))}"

    def _render_prompt(self, messages: Sequence[Message], tools: Sequence[Any], form: _Form) -> str | None:
        """The prompt for the answer that follows the messages; None if the template refuses it."""
        try:
            return self._template.render(_give(messages, form), tools, add_generation_prompt=True)
        except jinja2.TemplateError:
            return None


def _shape_key(message: Message) -> tuple[Any, ...]:
    """What the shape of a conversation without tools depends on: the role, which texts there are, and `train`."""
    fields = tuple(
        (field, bool(value.strip())) for field, value in message.items() if field != "role" and isinstance(value, str)
    )
    return (message["role"], fields, message.get("train", True))


def _forms(messages: Sequence[Message]) -> Iterator[_Form]:
    """The forms to try, in order. A conversation without reasoning may still need a block closed that its prompt opens."""
    has_reasoning = any(REASONING in message for message in messages)
    has_calls = any("tool_calls" in message for message in messages)
    forms: tuple[ReasoningForm, ...] = REASONING_FORMS if has_reasoning else ("none", "open")
    for reasoning in forms:
        yield _Form(reasoning, arguments_as_text=False)
        if has_calls:
            yield _Form(reasoning, arguments_as_text=True)


def _give(messages: Sequence[Message], form: _Form) -> list[Message]:
    """The messages as the template gets them."""
    return [_give_one(message, form) for message in messages]


def _give_one(message: Message, form: _Form) -> Message:
    if "tool_calls" not in message and REASONING not in message:
        return message
    given = {key: value for key, value in message.items() if key != REASONING}
    if form.arguments_as_text and "tool_calls" in message:
        given["tool_calls"] = [
            call
            | {"function": call["function"] | {"arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False)}}
            for call in message["tool_calls"]
        ]
    if REASONING not in message:
        return given
    reasoning, content = message[REASONING], message["content"]
    match form.reasoning:
        case "reasoning_content" | "thinking" | "reasoning":
            given[form.reasoning] = reasoning
        case "parts":
            given["content"] = [{"type": "thinking", "thinking": reasoning}]
            given["content"] += [{"type": "text", "text": content}] if content else []
        case "inline":
            given["content"] = f"<think>\n{reasoning}\n</think>\n\n{content}"
    return given


def _places(message: Message, text: str, number: int, after: int) -> dict[str, int]:
    """Where the marks of an answer are in a marked rendering, behind the character `after`. Raises Untraceable."""
    places = {}
    for field in (REASONING, "content"):
        if MARKED in message.get(field, ""):
            place = text.find(mark(number, field), after)
            if place < 0:
                raise LeftOut(
                    NO_REASONING if field == REASONING else f"the template leaves out an answer (message {number + 1})"
                )
            if text.find(mark(number, field), place + 1) >= 0:
                raise Untraceable(f"the template writes an answer twice (message {number + 1})")
            places[field] = place
    if PARTS_REPR in text[after:] and len(places) == 2 and PARTS_REPR in text[places[REASONING] : places["content"]]:
        raise LeftOut(NO_REASONING)
    return places


def _check_texts(marked: list[dict[str, Any]], skeleton: Skeleton) -> None:
    """Raises Untraceable if the text of a system or user message is missing in a row."""
    present = {slot.message for slot in skeleton.slots}
    for number, message in enumerate(marked):
        if message["role"] in ("system", "user") and MARKED in message["content"] and number not in present:
            raise LeftOut(f"the template leaves out the {message['role']} message (message {number + 1})")


def _check_calls(message: Message, text: str, number: int) -> None:
    """Raises Untraceable if the rendered answer lacks the name or an argument of a call."""
    for call in message.get("tool_calls", []):
        for part in (call["function"]["name"], *_argument_texts(call["function"]["arguments"])):
            if (
                part not in text
                and json.dumps(part)[1:-1] not in text
                and json.dumps(part, ensure_ascii=False)[1:-1] not in text
            ):
                raise LeftOut(f"the template leaves out {part[:60]!r} of the call in message {number + 1}")


def _argument_texts(value: Any) -> Iterator[str]:
    """The names and texts in a call's arguments."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield key
            yield from _argument_texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _argument_texts(inner)
    elif isinstance(value, str):
        yield value.strip()


def tool_result_forms(content: str) -> Iterator[str]:
    """A tool result as templates write it: unchanged, stripped, as a JSON string, or its JSON written anew."""
    yield content.strip()
    for ascii_only in (False, True):
        yield json.dumps(content, ensure_ascii=ascii_only)[1:-1]
        try:
            yield json.dumps(json.loads(content), ensure_ascii=ascii_only)
        except (ValueError, RecursionError):
            continue
