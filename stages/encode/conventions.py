"""What a chat template does in every conversation, found with small ones: what it writes before and behind an answer."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jinja2

from stages.encode.forms import EMPTY_BLOCK, REASONING, REASONING_FORMS, Form, Message, forms_to_try, give
from stages.encode.mask import SpecialTokens
from stages.encode.renderings import ANSWER, PLAIN, Renderer
from stages.encode.required import check_calls, find_places
from stages.encode.spans import Untraceable, mark
from stages.encode.template import ChatTemplate

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


class Conventions:
    """The conventions of one template. Each is found when it is first asked for."""

    def __init__(self, template: ChatTemplate, special: SpecialTokens, renderer: Renderer, *, bos: str) -> None:
        """`bos` is the BOS token or ""; a next turn that begins with it does not end the answer before it."""
        self._template, self._special, self._renderer, self._bos = template, special, renderer, bos
        self._plain_gap: str | None = None
        self._plain_stop: str | None = None
        self._opening: str | None = None
        self._has_calls: bool | None = None
        self._common_gaps: dict[str, bool] = {}

    def template_gap(self, message: Message, rest: str, places: Mapping[str, int], after: int) -> str:
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
                    text, prompt, _ = self._renderer.render([PLAIN[0], message], tools, form)
                    find_places(message, text, 1, 0)
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
                text, prompt, _ = self._renderer.render(PLAIN, (), Form("none", arguments_as_text=False))
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
                _, end, stop = self.find_stop(text, text.index(ANSWER) + len(ANSWER), has_calls=False)
                self._plain_stop = text[slice(*self._special.last(text, 0, end))] if stop else ""
        return self._plain_stop

    def find_stop(self, text: str, at: int, *, has_calls: bool) -> tuple[int, int, str]:
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

    def stop_of_next_turn(self, marked: list[dict[str, Any]], tools: Sequence[Any], form: Form, text: str) -> str:
        """The special token that follows the answer at once when the conversation continues, as GLM's `<|user|>`; or "".

        If the template writes the answer itself otherwise then, as without its reasoning, a small conversation shows it.
        """
        has_calls = "tool_calls" in marked[-1]
        plain = Form("none", arguments_as_text=form.arguments_as_text)
        small = ([PLAIN[0], PROBE_CALL], (PROBE_TOOL,)) if has_calls else (PLAIN, ())
        for messages, these_tools, this_form in ((marked, tools, form), (*small, plain)):
            following: dict[str, Any] = {"role": "user", "content": "0"}
            if has_calls:
                call = messages[-1]["tool_calls"][0]
                following = {"role": "tool", "content": "0", "name": call["function"]["name"]}
                following |= {"tool_call_id": call["id"]} if "id" in call else {}
            try:
                before = text if messages is marked else self._template.render(give(messages, this_form), these_tools)
                longer = self._template.render(give([*messages, following], this_form), these_tools)
            except jinja2.TemplateError:
                continue
            if longer.startswith(before):
                stop = self._special.at(longer, len(before))
                return "" if stop == self._bos else stop
        return ""

    def writes_calls(self) -> bool:
        """Whether the template has a place for calls, found with a small conversation."""
        if self._has_calls is None:
            self._has_calls = False
            for form in forms_to_try([PROBE_CALL]):
                try:
                    text = self._template.render(give([PLAIN[0], PROBE_CALL], form))
                    check_calls(PROBE_CALL, text, 1)
                except (jinja2.TemplateError, Untraceable):
                    continue
                self._has_calls = True
        return self._has_calls
