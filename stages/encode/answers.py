"""The training rows of a conversation: which text each has, and where in it the answers are.

An answer is trained behind exactly the prompt that a model gets at that turn: the template's rendering of the messages
before it, with `add_generation_prompt`. If the rendering of the complete conversation begins with that prompt and that
answer for each of its answers, the conversation is one row. Many templates write an answer differently as soon as messages
follow: Qwen 3 leaves out earlier reasoning, Mistral moves the system text and the tools to the last question, gpt-oss ends
the last answer with another token. Then the conversation becomes several rows, each of which ends with an answer that the
later rows do not have in this form.

What the template itself writes between the prompt and any plain answer, as an empty thinking block, belongs to the prompt.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import jinja2

from stages.encode.conventions import Conventions
from stages.encode.forms import BLOCK_END, REASONING, Form, Message, forms_to_try, give
from stages.encode.mask import AnswerSpan, SpecialTokens
from stages.encode.renderings import Renderer, Splice
from stages.encode.required import REASONING_NOT_PROMPTED, check_calls, check_context, find_places
from stages.encode.spans import LeftOut, Position, Skeleton, TextSpan, Untraceable, mark, mark_texts
from stages.encode.template import ChatTemplate

Thinking: TypeAlias = Literal["train", "mask", "drop"]


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


class _FoundAnswer(NamedTuple):
    """A marked conversation that ends with an answer, and where that is."""

    text: str
    suffix: str
    """The stop token at the end of `text` that the template writes only if another message follows, or ""."""
    splice: Splice | None
    answer: AnswerSpan


class _AnswerShape(NamedTuple):
    """An AnswerSpan, independent of the texts' lengths."""

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
    splice: Splice | None
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
        self._template = template
        self._renderer = Renderer(template, special)
        self._conventions = Conventions(template, special, self._renderer, bos=bos)
        self._thinking, self._train_empty_thinking = thinking, train_empty_thinking
        self._shapes: dict[tuple[Any, ...], _Shapes | Exception] = {}

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
            prompt = self._renderer.render_prompt(messages[:-1], conversation.tools, shape.form)
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
                check_calls(messages[answer.message], text[answer.start : answer.end], answer.message)
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
        if len(missing) == len(tools) and self._conventions.writes_calls():
            return True
        if missing:
            raise LeftOut(f"the template leaves out the tool {missing[0]!r}; choose one that has a place for tools")
        return False

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
                rows.append(_row_shape(marked[: number + 1], row, [found[n].answer for n in held], form))
            except Untraceable as error:
                problems += [error] * len(held)
        return _Shapes(rows[::-1], problems)

    def _find_answer(self, marked: list[dict[str, Any]], tools: Sequence[Any], form: Form) -> _FoundAnswer:
        """The answer that ends the marked messages. Raises Untraceable and jinja2.TemplateError."""
        rendering = self._renderer.render(marked, tools, form)
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
        places = find_places(message, text, number, after)
        if not places and not follows_prompt:
            raise Untraceable(f"the text before the answer in message {number + 1} is not the prompt for it")
        start = after if follows_prompt else min(places.values())
        if follows_prompt:
            gap = self._conventions.template_gap(message, text[after:], places, after)
            start += 0 if self._train_empty_thinking else len(gap)
        content_end = max((place + len(mark(number, field)) for field, place in places.items()), default=after)
        for call in calls:
            name = call["function"]["name"]
            content_end = max(content_end, text.find(name, content_end) + len(name))
        stop_start, end, stop = self._conventions.find_stop(text, content_end, has_calls=bool(calls))
        suffix = ""
        if not stop:
            suffix = stop = self._conventions.stop_of_next_turn(marked, tools, form, text)
            stop_start = len(text) if suffix else stop_start
            text += suffix
            end = len(text) if suffix else end
        check_calls(message, text[start:end], number)
        label_start = self._label_start(message, text, number, places, start)
        answer = AnswerSpan(
            message=number,
            start=start,
            label_start=label_start,
            stop_start=stop_start,
            end=end,
            in_loss=message.get("train", True),
            stop=stop,
            follows_prompt=follows_prompt,
        )
        return _FoundAnswer(text, suffix, rendering.splice, answer)

    def _label_start(self, message: Message, text: str, number: int, places: Mapping[str, int], start: int) -> int:
        """Where the loss begins: behind the reasoning, if that is not trained."""
        if self._thinking == "train" or REASONING not in places:
            return start
        if "content" in places:
            return places["content"]
        reasoning_end = places[REASONING] + len(mark(number, REASONING))
        closing = BLOCK_END.match(text, reasoning_end)
        return closing.end() if closing else reasoning_end


def _row_shape(marked: list[dict[str, Any]], row: _FoundAnswer, answers: Sequence[AnswerSpan], form: Form) -> _RowShape:
    """The row that holds some answers. Raises Untraceable."""
    skeleton = Skeleton(row.text)
    check_context(marked, skeleton, row.text)
    shapes = [
        _AnswerShape(
            message=answer.message,
            start=skeleton.position(answer.start),
            label_start=skeleton.position(answer.label_start),
            stop_start=skeleton.position(answer.stop_start),
            end=skeleton.position(answer.end),
            stop=answer.stop,
            follows_prompt=answer.follows_prompt,
        )
        for answer in answers
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
