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

from stages.encode.forms import (
    ANY_MARK,
    BLOCK_END,
    EMPTY_BLOCK,
    MARKS_AT_END,
    OPEN_BLOCK,
    PARTS_AS_TEXT,
    REASONING,
    REASONING_FORMS,
    SECOND_BLOCK,
    Form,
    Message,
    closing_of,
    forms_to_try,
    give,
)
from stages.encode.mask import AnswerSpan, SpecialTokens
from stages.encode.spans import LeftOut, Position, Skeleton, TextSpan, Untraceable, mark, mark_texts
from stages.encode.template import ChatTemplate

Thinking: TypeAlias = Literal["train", "mask", "drop"]

MARKED = "\ue000"
"""The first character of a mark."""
UNFINISHED_TAG = re.compile(r"[<\[][^<>\[\]\s]*\Z")
NO_REASONING = "the template has no place for reasoning_content; choose another template, or write encode.thinking: drop"
REASONING_NOT_PROMPTED = (
    "the prompt for generation leaves no place for reasoning_content; choose other encode.template_kwargs, such as "
    "enable_thinking: true, or write encode.thinking: drop"
)


ANSWER = mark(1, "content")
PLAIN: list[dict[str, Any]] = [{"role": "user", "content": mark(0, "content")}, {"role": "assistant", "content": ANSWER}]
"""A small conversation, marked."""
PROBE_TOOL = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Looks a word up.",
        "parameters": {
            "type": "object",
            "properties": {"word": {"type": "string", "description": "the word"}},
            "required": ["word"],
        },
    },
}
PROBE_CALL: dict[str, Any] = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        # Mistral's templates want ids of nine letters.
        {"id": "abcdefghi", "type": "function", "function": {"name": "look_up", "arguments": {"word": "1"}}}
    ],
}


class RenderedRow(NamedTuple):
    """The text of one training row."""

    text: str
    answers: list[AnswerSpan]
    """The answers that this row trains, in order; the last one ends the row. If no answer is in the loss, the last one."""
    spans: list[TextSpan]
    """Where the messages' texts are. Those of tools and tool calls are not among them."""
    tools_left_out: bool = False
    """Whether the template writes calls, but not which tools there are."""


class Conversation(NamedTuple):
    """What is rendered: a row of data/examples."""

    messages: Sequence[Message]
    tools: Sequence[Any]

    @property
    def has_tools(self) -> bool:
        """Whether tools are described or called. Each template writes them in its own way."""
        return bool(self.tools) or "tool_calls" in fields_of(self.messages)


class _Splice(NamedTuple):
    """How an answer is put behind a prompt for generation that is not the beginning of its rendering."""

    skeleton: Skeleton
    """The rendering."""
    answer: Position
    """Where the answer begins in it."""
    filling: str
    """What is written behind the prompt, or behind the reasoning, instead of the template's own text."""

    def apply(self, prompt: str, messages: Sequence[Message], text: str) -> str:
        """The prompt, and the answer from `text`, the rendering of the messages. Raises Untraceable if it is not there."""
        answer = self.skeleton.fill(messages, text).at(self.answer)
        in_rendering = (len(messages) - 1, REASONING) in self.skeleton.slots
        reasoning: str = "" if in_rendering else messages[-1].get(REASONING, "")
        return prompt + reasoning + self.filling + text[answer:]


class _Rendering(NamedTuple):
    """A marked conversation that ends with an answer, as text."""

    text: str
    prompt: str | None
    """The prompt for generation before the answer; None if the template refuses it."""
    splice: _Splice | None


class _Answer(NamedTuple):
    """An answer of a marked rendering."""

    start: int
    label_start: int
    stop_start: int
    end: int
    stop: str
    follows_prompt: bool


class _FoundAnswer(NamedTuple):
    """A marked conversation that ends with an answer, and where that is."""

    text: str
    suffix: str
    """The stop token at the end of `text` that the template writes only if another message follows, or ""."""
    splice: _Splice | None
    answer: _Answer


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
    form: Form
    splice: _Splice | None
    suffix: str
    """A stop token that the template writes only if another message follows."""
    skeleton: Skeleton
    answers: list[_AnswerShape]


class _Shapes(NamedTuple):
    """The rows of all conversations with the same roles and fields."""

    rows: list[_RowShape]
    problems: list[Exception]
    """One for each answer that is in no row."""
    tools_left_out: bool = False

    def mismatches(self) -> tuple[int, int]:
        """The numbers of answers that are in no row, and of those that do not follow the prompt for generation."""
        return len(self.problems), sum(not answer.follows_prompt for row in self.rows for answer in row.answers)


class AnswerFinder:
    """Finds the answers in conversations that one template renders."""

    def __init__(
        self, template: ChatTemplate, special: SpecialTokens, *, bos: str, thinking: Thinking, train_empty_thinking: bool
    ) -> None:
        """`bos` is the BOS token or ""; a next turn that begins with it does not end the answer before it."""
        self._template, self._special, self._bos = template, special, bos
        self._thinking, self._train_empty_thinking = thinking, train_empty_thinking
        self._shapes: dict[tuple[Any, ...], _Shapes | Exception] = {}
        self._plain_gap: str | None = None
        self._plain_stop: str | None = None
        self._opening: str | None = None
        self._has_calls: bool | None = None
        self._common_gaps: dict[str, bool] = {}
        self._block_ends: dict[str, str] = {}

    def rows(self, conversation: Conversation, *, last_only: bool) -> tuple[list[RenderedRow], list[Exception]]:
        """The rows of a conversation that ends with an answer, and what is wrong with the answers that are in none of them.

        Each answer in the loss is in that of exactly one row.

        Args:
            conversation: Its messages have a role and content, and an answer may have `reasoning_content`, `tool_calls` and
                `"train": False`, which keeps it out of the loss.
            last_only: Only the last answer matters, so that there is one row.

        Raises Untraceable or jinja2.TemplateError if there is no row.
        """
        if self._thinking == "drop" and any(REASONING in message for message in conversation.messages):
            messages = [{k: v for k, v in message.items() if k != REASONING} for message in conversation.messages]
            conversation = conversation._replace(messages=messages)
        shapes, problems, tools_left_out = self._find_shapes(conversation, last_only=last_only)
        rows = [self._fill(shape, conversation) for shape in shapes]
        return [row._replace(tools_left_out=True) for row in rows] if tools_left_out else rows, problems

    def _find_shapes(self, conversation: Conversation, *, last_only: bool) -> _Shapes:
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
        text = self._template.render(give(messages, shape.form), conversation.tools)
        if shape.splice:
            prompt = self._render_prompt(messages[:-1], conversation.tools, shape.form)
            text = shape.splice.apply(prompt or "", messages, text)
        text += shape.suffix
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

    def _make_shapes(self, conversation: Conversation, *, last_only: bool) -> _Shapes:
        """Raises what `rows` raises."""
        marked = mark_texts(conversation.messages)
        trained = [
            number
            for number, message in enumerate(marked)
            if message["role"] == "assistant" and message.get("train", True) and not last_only
        ]
        numbers = trained or [len(marked) - 1]
        tools_left_out = self._leaves_out_tools(marked, conversation.tools)
        best: _Shapes | None = None
        for form in forms_to_try(conversation.messages):
            shapes = self._shapes_in_form(marked, conversation.tools, numbers, form)
            if best is None or shapes.mismatches() < best.mismatches():
                best = shapes
            if not any(best.mismatches()):
                break
        assert best is not None  # there are always forms to try
        if not best.rows:
            raise best.problems[0]
        return best._replace(tools_left_out=tools_left_out)

    def _leaves_out_tools(self, marked: list[dict[str, Any]], tools: Sequence[Any]) -> bool:
        """Whether the prompt for the first answer does not say which tools there are, although the template writes calls.

        Raises LeftOut if it lacks a tool otherwise, and jinja2.TemplateError.
        """
        if not tools:
            return False
        first = next(number for number, message in enumerate(marked) if message["role"] == "assistant")
        prompt = self._template.render(marked[:first], tools, add_generation_prompt=True)
        missing = [name for tool in tools if (name := str(tool.get("function", {}).get("name", ""))) not in prompt]
        if len(missing) == len(tools) and self._writes_calls():
            return True
        if missing:
            raise LeftOut(f"the template leaves out the tool {missing[0]!r}; choose one that has a place for tools")
        return False

    def _writes_calls(self) -> bool:
        """Whether the template has a place for calls, found with a small conversation."""
        if self._has_calls is None:
            self._has_calls = False
            for form in forms_to_try([PROBE_CALL]):
                try:
                    text = self._template.render(give([PLAIN[0], PROBE_CALL], form))
                    _check_calls(PROBE_CALL, text, 1)
                except (jinja2.TemplateError, Untraceable):
                    continue
                self._has_calls = True
        return self._has_calls

    def _shapes_in_form(self, marked: list[dict[str, Any]], tools: Sequence[Any], numbers: list[int], form: Form) -> _Shapes:
        """The rows for the answers in the messages `numbers`, if the messages are given to the template in this form."""
        found: dict[int, _FoundAnswer] = {}
        problems: list[Exception] = []
        for number in numbers:
            try:
                found[number] = self._find_answer(marked[: number + 1], tools, form)
            except (Untraceable, jinja2.TemplateError) as error:
                problems.append(error)
        rows: list[_RowShape] = []
        left = list(found)
        while left:
            row = found[left[-1]]
            held = [n for n in left if row.text.startswith(found[n].text[: found[n].answer.end])]
            left, number = [n for n in left if n not in held], left[-1]
            try:
                rows.append(_row_shape(marked[: number + 1], row, {n: found[n].answer for n in held}, form))
            except Untraceable as error:
                problems += [error] * len(held)
        return _Shapes(rows[::-1], problems)

    def _find_answer(self, marked: list[dict[str, Any]], tools: Sequence[Any], form: Form) -> _FoundAnswer:
        """The answer that ends the marked messages. Raises Untraceable and jinja2.TemplateError."""
        rendering = self._render(marked, tools, form)
        text, prompt = rendering.text, rendering.prompt
        number, message = len(marked) - 1, marked[-1]
        calls = message.get("tool_calls", [])
        arguments = [call["function"]["arguments"] for call in calls if call["function"]["arguments"]]
        if not form.arguments_as_text and any(repr(each) in text for each in arguments):
            raise Untraceable(f"the template writes the arguments of message {number + 1} as Python, not as JSON")
        follows_prompt = prompt is not None and text.startswith(prompt)
        if REASONING in message and not follows_prompt:
            raise LeftOut(REASONING_NOT_PROMPTED)
        after = len(prompt or "") if follows_prompt else 0
        places = _places(message, text, number, after)
        if not places and not follows_prompt:
            raise Untraceable(f"the text before the answer in message {number + 1} is not the prompt for it")
        start = after if follows_prompt else min(places.values())
        if follows_prompt:
            gap = self._template_gap(message, text[after:], places, after)
            start += 0 if self._train_empty_thinking else len(gap)
        content_end = max((place + len(mark(number, field)) for field, place in places.items()), default=after)
        for call in calls:
            name = call["function"]["name"]
            content_end = max(content_end, text.find(name, content_end) + len(name))
        stop_start, end, stop = self._find_stop(text, content_end, has_calls=bool(calls))
        suffix = ""
        if not stop:
            suffix = stop = self._stop_of_next_turn(marked, tools, form, text)
            stop_start = len(text) if suffix else stop_start
            text += suffix
            end = len(text) if suffix else end
        _check_calls(message, text[start:end], number)
        label_start = self._label_start(message, text, number, places, start)
        answer = _Answer(start, label_start, stop_start, end, stop, follows_prompt)
        return _FoundAnswer(text, suffix, rendering.splice, answer)

    def _template_gap(self, message: Message, rest: str, places: Mapping[str, int], after: int) -> str:
        """The beginning of `rest`, which follows the prompt, that the template writes there whatever the answer is.

        That is an empty thinking block, and more if the template begins all kinds of answers with it: the channel of an
        answer of gpt-oss is the model's choice. White space is not meant: the model must generate it.
        """
        empty = EMPTY_BLOCK.match(rest)
        block = empty[0] if empty else ""
        if message.get("tool_calls") or REASONING in message or not places:
            gap = self._gap_of_plain_answers()
            gap = gap if rest.startswith(gap) else ""
        else:
            gap = rest[: min(places.values()) - after]
        if not gap.strip():
            return block
        return gap if EMPTY_BLOCK.fullmatch(gap) or self._begins_all_answers(gap) else block

    def _begins_all_answers(self, gap: str) -> bool:
        """Whether reasoning and calls too, as far as the template has them, begin with what stands before plain answers."""
        if gap not in self._common_gaps:
            self._common_gaps[gap] = all(rest.startswith(gap) for rest in self._other_answers())
        return self._common_gaps[gap]

    def _other_answers(self) -> Iterator[str]:
        """What follows the prompt in small conversations whose answers have reasoning, or are calls."""
        for message, tools in ((PLAIN[1] | {REASONING: mark(1, REASONING)}, ()), (PROBE_CALL, (PROBE_TOOL,))):
            for reasoning in REASONING_FORMS[:-1]:
                form = Form(reasoning, arguments_as_text=False)
                try:
                    text, prompt, _ = self._render([PLAIN[0], message], tools, form)
                    _places(message, text, 1, 0)
                except (jinja2.TemplateError, Untraceable):
                    continue
                if prompt is not None and text.startswith(prompt):
                    yield text[len(prompt) :]
                    break

    def _gap_of_plain_answers(self) -> str:
        """What stands between the prompt and the answer of a small conversation."""
        if self._plain_gap is None:
            self._plain_gap = ""
            try:
                text, prompt, _ = self._render(PLAIN, (), Form("none", arguments_as_text=False))
            except (jinja2.TemplateError, Untraceable):
                return ""
            if prompt is not None and text.startswith(prompt) and ANSWER in text:
                self._plain_gap = text[len(prompt) : text.index(ANSWER)]
        return self._plain_gap

    def _stop_of_plain_answers(self) -> str:
        """The last of the special tokens behind the answer of a small conversation, or ""."""
        if self._plain_stop is None:
            self._plain_stop = ""
            try:
                text = self._template.render(PLAIN)
            except jinja2.TemplateError:
                return ""
            if ANSWER in text:
                _, end, stop = self._find_stop(text, text.index(ANSWER) + len(ANSWER), has_calls=False)
                self._plain_stop = text[slice(*self._special.last(text, 0, end))] if stop else ""
        return self._plain_stop

    def _label_start(self, message: Message, text: str, number: int, places: Mapping[str, int], start: int) -> int:
        """Where the loss begins: behind the reasoning, if that is not trained."""
        if self._thinking == "train" or REASONING not in places:
            return start
        if "content" in places:
            return places["content"]
        reasoning_end = places[REASONING] + len(mark(number, REASONING))
        closing = BLOCK_END.match(text, reasoning_end)
        return closing.end() if closing else reasoning_end

    def _find_stop(self, text: str, at: int, *, has_calls: bool) -> tuple[int, int, str]:
        """Where the stop token begins and the answer ends, and the stop token; "" if there is none.

        The answer's own text ends at `at` or, with calls, somewhere behind it.
        """
        if has_calls:
            plain_stop = self._stop_of_plain_answers()
            start = text.find(plain_stop, at) if plain_stop else -1
            if start >= 0:  # Command R7B writes the next prompt behind a call
                return start, start + len(plain_stop), plain_stop
            start, end = self._special.last(text, at, len(text))
            return (len(text), len(text), "") if start == end or text[end:].strip() else (start, end, text[start:end])
        start = len(text) - len(text[at:].lstrip())
        stop = self._special.at(text, start)
        end = self._end_of_run(text, start + len(stop))
        words = any(piece.strip() for piece in self._special.split(text[end:]))
        if words and self._special.at(text, end) != self._turn_opening():  # the template's own words behind the answer
            start, end = self._special.last(text, at, len(text))
            stop = "" if text[end:].strip() else text[start:end]
        return (start, end, stop) if stop else (at, at, "")

    def _end_of_run(self, text: str, at: int) -> int:
        """The end of the special tokens that follow each other at once, as <|END_RESPONSE|><|END_OF_TURN_TOKEN|>."""
        while (following := self._special.at(text, at)) and following != self._turn_opening():
            at += len(following)
        return at

    def _turn_opening(self) -> str:
        """The special token with which the template begins a turn; "" if it begins without one."""
        if self._opening is None:
            self._opening = ""
            for tools in ((), (PROBE_TOOL,)):  # Command R+ has a template that fails without tools.
                try:
                    text = self._template.render(PLAIN, tools).removeprefix(self._bos)
                except jinja2.TemplateError:
                    continue
                self._opening = self._special.at(text, 0)
                break
        return self._opening

    def _stop_of_next_turn(self, marked: list[dict[str, Any]], tools: Sequence[Any], form: Form, text: str) -> str:
        """The special token that follows the answer at once when the conversation continues, as GLM's `<|user|>`; or ""."""
        calls = marked[-1].get("tool_calls")
        following: dict[str, Any] = {"role": "tool" if calls else "user", "content": "0"}
        if calls:
            following |= {"name": calls[0]["function"]["name"]} | (
                {"tool_call_id": calls[0]["id"]} if "id" in calls[0] else {}
            )
        try:
            longer = self._template.render(give([*marked, following], form), tools)
        except jinja2.TemplateError:
            return ""
        stop = self._special.at(longer, len(text)) if longer.startswith(text) else ""
        return "" if stop == self._bos else stop

    # Rendering

    def _render(self, marked: list[dict[str, Any]], tools: Sequence[Any], form: Form) -> _Rendering:
        """Raises LeftOut and jinja2.TemplateError."""
        text = self._template.render(give(marked, form), tools)
        prompt = self._render_prompt(marked[:-1], tools, form)
        message = marked[-1]
        if prompt is None or text.startswith(prompt):
            if REASONING in message and form.reasoning == "spliced":
                raise LeftOut(NO_REASONING)
            return _Rendering(text, prompt, None)
        splice = self._find_splice(prompt, text, marked, form)
        return _Rendering(splice.apply(prompt, marked, text) if splice else text, prompt, splice)

    def _find_splice(self, prompt: str, text: str, marked: list[dict[str, Any]], form: Form) -> _Splice | None:
        """How to put the answer in `text` behind `prompt`; None if the answer's beginning is not certain.

        Raises LeftOut if its reasoning has no place there.
        """
        number, message = len(marked) - 1, marked[-1]
        skeleton = Skeleton(text)
        length = next((n for n, (a, b) in enumerate(zip(prompt, text, strict=False)) if a != b), min(len(prompt), len(text)))
        shared = len(OPEN_BLOCK.sub("", UNFINISHED_TAG.sub("", prompt[:length])))
        prompt_end, has_reasoning = prompt[shared:], REASONING in message
        opened = OPEN_BLOCK.search(prompt_end)
        own = [text.find(mark(number, field), shared) for field in (REASONING, "content")]
        own_start = min((place for place in own if place >= 0), default=len(text))
        without_blocks = MARKS_AT_END.sub("", prompt)
        header = without_blocks[self._special.last(without_blocks, 0, len(without_blocks))[0] :]
        # The header ends behind the shared text; its first token may be in it.
        behind = max(0, shared + 1 - len(header))
        at = text.rfind(header, 0, own_start) if MARKED in prompt_end else text.find(header, behind, own_start)
        if header != without_blocks and at >= 0:
            start = at + len(header)  # they differ in an earlier message; the answer is behind the same header
        elif MARKED in prompt_end or ANY_MARK.sub("", prompt_end).strip():
            return None
        else:
            start = shared
        if has_reasoning and form.reasoning == "spliced" and not opened:
            raise LeftOut(NO_REASONING)
        if has_reasoning and form.reasoning != "spliced":
            if mark(number, REASONING) not in text:
                raise LeftOut(NO_REASONING)
            return _Splice(skeleton, skeleton.position(start), "") if start > shared else None
        empty = EMPTY_BLOCK.match(text, start)
        gap = text[start:own_start] if own_start < len(text) else empty[0] if empty else ""
        filling = ANY_MARK.sub("", gap)
        if opened:
            filling = self._block_end(opened[1]) if own_start < len(text) else f"\n{closing_of(opened[1])}\n\n"
        return _Splice(skeleton, skeleton.position(start + len(gap)), filling)

    def _block_end(self, opening: str) -> str:
        """What the template writes between the reasoning and the content of an answer."""
        if opening not in self._block_ends:
            messages = [PLAIN[0], PLAIN[1] | {REASONING: mark(1, REASONING)}]
            self._block_ends[opening] = f"\n{closing_of(opening)}\n\n"
            for reasoning in REASONING_FORMS[:-1]:
                form = Form(reasoning, arguments_as_text=False)
                try:
                    text = self._template.render(give(messages, form))
                    places = _places(messages[1], text, 1, 0)
                except (jinja2.TemplateError, Untraceable):
                    continue
                self._block_ends[opening] = text[places[REASONING] + len(mark(1, REASONING)) : places["content"]]
                break
        return self._block_ends[opening]

    def _render_prompt(self, messages: Sequence[Message], tools: Sequence[Any], form: Form) -> str | None:
        """The prompt for the answer that follows the messages; None if the template refuses it."""
        try:
            return self._template.render(give(messages, form), tools, add_generation_prompt=True)
        except jinja2.TemplateError:
            return None


def _row_shape(marked: list[dict[str, Any]], row: _FoundAnswer, answers: Mapping[int, _Answer], form: Form) -> _RowShape:
    """The row that holds some answers, by message number. Raises Untraceable."""
    skeleton = Skeleton(row.text)
    _check_context(marked, skeleton, row.text)
    shapes = [
        _AnswerShape(
            message=number,
            start=skeleton.position(answer.start),
            label_start=skeleton.position(answer.label_start),
            stop_start=skeleton.position(answer.stop_start),
            end=skeleton.position(answer.end),
            stop=answer.stop,
            follows_prompt=answer.follows_prompt,
        )
        for number, answer in answers.items()
    ]
    return _RowShape(len(marked), form, row.splice, row.suffix, skeleton, shapes)


def fields_of(messages: Sequence[Message]) -> set[str]:
    """The names of the fields that any of the messages has."""
    return set().union(*messages)


def _shape_key(message: Message) -> tuple[Any, ...]:
    """What the shape of a conversation without tools depends on: the role, which texts there are, and `train`."""
    texts = [
        (field, not value or value.isspace()) for field, value in message.items() if field != "role" and type(value) is str
    ]
    return (message["role"], message.get("train", True), *texts)


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
    if REASONING in places and any(
        text.find(call["function"]["name"], places[REASONING]) < 0 for call in message.get("tool_calls", [])
    ):
        raise LeftOut(NO_REASONING)  # not behind the calls, where Gemma 4 writes the content
    if len(places) == 2 and not text[places[REASONING] + len(mark(number, REASONING)) : places["content"]].strip():
        raise LeftOut(NO_REASONING)  # the template writes the parts of a content without marks between them
    if REASONING in places and SECOND_BLOCK.search(text, after and after - 20, places[REASONING]):
        raise LeftOut(REASONING_NOT_PROMPTED)
    if places and PARTS_AS_TEXT.search(text, after, max(places.values())):
        raise LeftOut(NO_REASONING)
    return places


def _check_context(marked: list[dict[str, Any]], skeleton: Skeleton, text: str) -> None:
    """Raises LeftOut if a row lacks a text or a call of a message before its last answer. Reasoning may be missing there."""
    present = {(slot.message, slot.field) for slot in skeleton.slots}
    for number, message in enumerate(marked[:-1]):
        fields = {field for field in ("content", "instruction") if MARKED in message.get(field, "")}
        if message["role"] != "tool" and fields and not any((number, field) in present for field in fields):
            raise LeftOut(f"the template leaves out the {message['role']} message (message {number + 1})")
        _check_calls(message, text, number)


def _check_calls(message: Message, text: str, number: int) -> None:
    """Raises Untraceable if the rendered answer lacks the name or an argument of a call."""
    for call in message.get("tool_calls", []):
        for part in (call["function"]["name"], *_argument_texts(call["function"]["arguments"])):
            if not any(form in text for form in _written_forms(part)):
                raise LeftOut(f"the template leaves out {part[:60]!r} of the call in message {number + 1}")


def _written_forms(text: str) -> Iterator[str]:
    """A text as templates write it in a call: as it is, or as in JSON or Python between quotes."""
    yield text
    yield json.dumps(text, ensure_ascii=False)[1:-1]
    yield json.dumps(text)[1:-1]
    yield repr(text)[1:-1]


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
