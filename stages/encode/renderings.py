"""Renders conversations that end with an answer, so that the answer stands behind the prompt for generation.

Some templates write another prompt than the one with which the complete conversation begins: DeepSeek R1's opens a thinking
block that its answers do not have. Then the answer is taken out of its rendering and put behind the prompt.
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jinja2

from stages.encode.forms import (
    ANY_MARK,
    EMPTY_BLOCK,
    MARKS_AT_END,
    OPEN_BLOCK,
    REASONING,
    REASONING_FORMS,
    Form,
    Message,
    closing_of,
    give,
)
from stages.encode.mask import SpecialTokens
from stages.encode.required import NO_REASONING, find_places
from stages.encode.spans import MARKED, LeftOut, Position, Skeleton, Untraceable, mark
from stages.encode.template import ChatTemplate

UNFINISHED_TAG = re.compile(r"[<\[][^<>\[\]\s]*\Z")
ANSWER = mark(1, "content")
PLAIN: list[dict[str, Any]] = [{"role": "user", "content": mark(0, "content")}, {"role": "assistant", "content": ANSWER}]
"""A small conversation, marked."""


class Splice(NamedTuple):
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


class Rendering(NamedTuple):
    """A marked conversation that ends with an answer, as text."""

    text: str
    prompt: str | None
    """The prompt for generation before the answer; None if the template refuses it."""
    splice: Splice | None


class Renderer:
    """Renders marked conversations with one template."""

    def __init__(self, template: ChatTemplate, special: SpecialTokens) -> None:
        self._template, self._special = template, special
        self._block_ends: dict[str, str] = {}

    def render(self, marked: list[dict[str, Any]], tools: Sequence[Any], form: Form) -> Rendering:
        """Raises LeftOut and jinja2.TemplateError."""
        text = self._template.render(give(marked, form), tools)
        prompt = self.render_prompt(marked[:-1], tools, form)
        message = marked[-1]
        if prompt is None or text.startswith(prompt):
            if REASONING in message and form.reasoning == "spliced":
                raise LeftOut(NO_REASONING)
            return Rendering(text, prompt, None)
        splice = self._find_splice(prompt, text, marked, form)
        return Rendering(splice.apply(prompt, marked, text) if splice else text, prompt, splice)

    def _find_splice(self, prompt: str, text: str, marked: list[dict[str, Any]], form: Form) -> Splice | None:
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
            return Splice(skeleton, skeleton.position(start), "") if start > shared else None
        empty = EMPTY_BLOCK.match(text, start)
        gap = text[start:own_start] if own_start < len(text) else empty[0] if empty else ""
        filling = ANY_MARK.sub("", gap)
        if opened:
            filling = self._block_end(opened[1]) if own_start < len(text) else f"\n{closing_of(opened[1])}\n\n"
        return Splice(skeleton, skeleton.position(start + len(gap)), filling)

    def _block_end(self, opening: str) -> str:
        """What the template writes between the reasoning and the content of an answer."""
        if opening not in self._block_ends:
            messages = [PLAIN[0], PLAIN[1] | {REASONING: mark(1, REASONING)}]
            self._block_ends[opening] = f"\n{closing_of(opening)}\n\n"
            for reasoning in REASONING_FORMS[:-1]:
                form = Form(reasoning, arguments_as_text=False)
                try:
                    text = self._template.render(give(messages, form))
                    places = find_places(messages[1], text, 1, 0)
                except (jinja2.TemplateError, Untraceable):
                    continue
                self._block_ends[opening] = text[places[REASONING] + len(mark(1, REASONING)) : places["content"]]
                break
        return self._block_ends[opening]

    def render_prompt(self, messages: Sequence[Message], tools: Sequence[Any], form: Form) -> str | None:
        """The prompt for the answer that follows the messages; None if the template refuses it."""
        try:
            return self._template.render(give(messages, form), tools, add_generation_prompt=True)
        except jinja2.TemplateError:
            return None
