"""Chat templates: rendered as Transformers renders them, and taken apart to find where each text of a message stands."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

TEXT_FIELDS = ("content", "instruction", "input")


class Untraceable(ValueError):
    """The template changes the texts of a conversation, so that they cannot be found in what it renders."""


class Place(NamedTuple):
    """Where one text of a message stands in a rendered conversation: message number, field, characters [start, end)."""

    message: int
    field: str
    start: int
    end: int
    lead: int | None
    """White space before an answer that the prompt for it does not have, and the model must write: "Assistant:" + " Yes".
    None if the text before the answer is not the prompt for it, so that a model would be asked otherwise than it was taught.
    """


class ChatTemplate:
    """A Jinja template in the format of tokenizers' chat templates.

    The environment is the one in which Transformers compiles them (sandboxed, with trim_blocks and lstrip_blocks, `tojson`
    that leaves HTML characters alone, `raise_exception`, and the `generation` block), with one difference: there is no
    `strftime_now`. A template that asks for it falls back on the date that it holds itself, or the row is set aside; else
    the same data would be other tokens tomorrow.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, Any]) -> None:
        self.source = source
        self._special_tokens = special_tokens
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        self._template = environment.from_string(source)
        # Jinja keeps a chain of mappings, and walks it at every rendering, which takes longer than a short template.
        self._template.globals = dict(self._template.globals)
        self._layouts: dict[tuple[tuple[str, ...], ...], _Layout] = {}

    def render(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] = (), *, add_generation_prompt: bool = False
    ) -> str:
        """The text of a conversation. Raises jinja2.TemplateError if the template refuses it, or fails."""
        try:
            return self._template.render(
                messages=messages,
                tools=list(tools) or None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            )
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise jinja2.TemplateError(f"{type(error).__name__}: {error}") from None

    def places(self, messages: Sequence[Mapping[str, Any]], text: str) -> list[Place]:
        """Where the texts of `messages` stand in `text`, which `render` made of them; in order.

        The template is rendered a second time with a mark for each text: what stands between the marks is the template's
        own. That is done once for all conversations of the same roles and fields, and the sum must be `text` for each.

        Raises:
            Untraceable: If the texts do not stand there as they are, or stripped of white space at their ends.
        """
        shape = tuple((message["role"], *(field for field in TEXT_FIELDS if field in message)) for message in messages)
        if shape not in self._layouts:
            self._layouts[shape] = _Layout.of(self, messages)
        layout = self._layouts[shape]
        for strip in (False, True):
            places, rendered = layout.fill(messages, strip=strip)
            if rendered == text:
                return places
        raise Untraceable("the template changes the text of a message")


class _Layout:
    """The template's own pieces for conversations of one shape, and which text stands behind each."""

    def __init__(self, pieces: list[str], texts: list[tuple[int, str, int | None]]) -> None:
        self.pieces, self.texts = pieces, texts

    @classmethod
    def of(cls, template: ChatTemplate, messages: Sequence[Mapping[str, Any]]) -> "_Layout":
        # Digits alone, so that no filter on letters changes them.
        marks = {
            f"\ue000{number}.{TEXT_FIELDS.index(field)}\ue001": (number, field)
            for number, message in enumerate(messages)
            for field in TEXT_FIELDS
            if field in message
        }
        by_place = {place: mark for mark, place in marks.items()}
        marked = [
            {key: by_place.get((number, key), value) for key, value in message.items()}
            for number, message in enumerate(messages)
        ]
        pieces, texts = [], []
        whole = rest = template.render(marked)
        while "\ue000" in rest:
            head, _, rest = rest.partition("\ue000")
            name, _, rest = rest.partition("\ue001")
            pieces.append(head)
            number, field = marks[f"\ue000{name}\ue001"]
            answer = whole[: whole.index(f"\ue000{name}\ue001")]
            lead = _lead(template, marked[:number], answer) if messages[number]["role"] == "assistant" else None
            texts.append((number, field, lead))
        return cls([*pieces, rest], texts)

    def fill(self, messages: Sequence[Mapping[str, Any]], *, strip: bool) -> tuple[list[Place], str]:
        places, parts, at = [], [], 0
        for piece, (number, field, lead) in zip(self.pieces, self.texts, strict=False):
            content = messages[number][field]
            content = content.strip() if strip else content
            at += len(piece)
            places.append(Place(number, field, at, at + len(content), lead))
            at += len(content)
            parts += [piece, content]
        return places, "".join([*parts, self.pieces[-1]])


def _lead(template: ChatTemplate, before: Sequence[Mapping[str, Any]], text: str) -> int | None:
    """How much white space `text`, which ends where an answer begins, has more than the prompt for that answer."""
    try:
        prompt = template.render(before, add_generation_prompt=True)
    except jinja2.TemplateError:
        return None
    gap = text[len(prompt) :]
    return len(gap) if text.startswith(prompt) and not gap.strip() else None


class _Generation(Extension):
    """{% generation %} … {% endgeneration %}: marks what the model says; here the places tell, so it is only rendered."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_render"), [], [], body).set_lineno(line)

    def _render(self, caller: Any) -> Any:
        return caller()


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
