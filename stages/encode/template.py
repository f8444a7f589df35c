"""Chat templates: renders them as Transformers does, and finds where each message's text is in the rendered text."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

TEXT_FIELDS = ("content", "instruction", "input")


class Untraceable(ValueError):
    """The template changes the texts of a conversation, so that they cannot be found in the rendered text."""


class TextSpan(NamedTuple):
    """Where one text of a message is in the rendered text: message number, field, characters [start, end)."""

    message: int
    field: str
    start: int
    end: int
    leading_space: int | None
    """Length of the white space before an answer that is not part of the prompt for it, so that the model must generate it:
    with the prompt "Assistant:" and the text "Assistant: Yes", 1. None if the text before the answer is not the prompt for
    it, so that the model would be prompted differently from how it was trained.
    """


class ChatTemplate:
    """A Jinja template in the format of tokenizers' chat templates.

    The environment is the one in which Transformers compiles them (sandboxed, with trim_blocks and lstrip_blocks, a `tojson`
    that does not escape HTML, `raise_exception`, and the `generation` block), with one difference: `strftime_now` is not
    defined, because the same data would give different tokens tomorrow. A template that uses it without a fallback fails,
    and its rows are rejected.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, Any]) -> None:
        self.source = source
        self._special_tokens = special_tokens
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        self._template = environment.from_string(source)
        # Jinja keeps a chain of mappings and walks it for each rendering, which takes longer than a short template.
        self._template.globals = dict(self._template.globals)
        self._shapes: dict[tuple[tuple[str, ...], ...], _TemplateShape] = {}

    def render(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] = (), *, add_generation_prompt: bool = False
    ) -> str:
        """The text of a conversation. Raises jinja2.TemplateError if the template refuses it or fails."""
        try:
            return self._template.render(
                messages=messages,
                tools=list(tools) or None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            )
        except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
            raise jinja2.TemplateError(f"{type(error).__name__}: {error}") from None

    def text_spans(self, messages: Sequence[Mapping[str, Any]], text: str) -> list[TextSpan]:
        """Where the texts of `messages` are in `text`, which `render` returned for them; in order.

        The template is rendered a second time with a placeholder for each text: what is between the placeholders is written
        by the template. This is done once for all conversations with the same roles and fields. For each conversation, the
        template's parts and the messages' texts together must be exactly `text`.

        Raises:
            Untraceable: If the texts are not there unchanged, or unchanged but for white space stripped from their ends.
        """
        key = tuple((message["role"], *(field for field in TEXT_FIELDS if field in message)) for message in messages)
        if key not in self._shapes:
            self._shapes[key] = _TemplateShape.of(self, messages)
        shape = self._shapes[key]
        for strip in (False, True):
            spans, filled = shape.fill(messages, strip=strip)
            if filled == text:
                return spans
        raise Untraceable("the template changes the text of a message")


class _TemplateShape:
    """The template's own parts for all conversations with the same roles and fields, and which text follows each part."""

    def __init__(self, parts: list[str], texts: list[tuple[int, str, int | None]]) -> None:
        """`texts` are (message number, field, leading_space of TextSpan); `parts` has one more, the end."""
        self.parts, self.texts = parts, texts

    @classmethod
    def of(cls, template: ChatTemplate, messages: Sequence[Mapping[str, Any]]) -> "_TemplateShape":
        """Raises Untraceable if the template changes a placeholder."""
        # A placeholder holds only digits, which filters like `upper` do not change.
        places = {
            f"\ue000{number}.{TEXT_FIELDS.index(field)}\ue001": (number, field)
            for number, message in enumerate(messages)
            for field in TEXT_FIELDS
            if field in message
        }
        placeholders = {place: placeholder for placeholder, place in places.items()}
        replaced = [
            {key: placeholders.get((number, key), value) for key, value in message.items()}
            for number, message in enumerate(messages)
        ]
        parts, texts = [], []
        text = rest = template.render(replaced)
        while "\ue000" in rest:
            head, _, rest = rest.partition("\ue000")
            name, _, rest = rest.partition("\ue001")
            parts.append(head)
            placeholder = f"\ue000{name}\ue001"
            if placeholder not in places:
                raise Untraceable("the template changes the text of a message")
            number, field = places[placeholder]
            space = None
            if messages[number]["role"] == "assistant":
                space = _leading_space(template, replaced[:number], text[: text.index(placeholder)])
            texts.append((number, field, space))
        return cls([*parts, rest], texts)

    def fill(self, messages: Sequence[Mapping[str, Any]], *, strip: bool) -> tuple[list[TextSpan], str]:
        """Where each text of `messages` is, and the complete text, with the texts stripped or as they are."""
        spans, pieces, at = [], [], 0
        for part, (number, field, space) in zip(self.parts, self.texts, strict=False):
            content = messages[number][field]
            content = content.strip() if strip else content
            at += len(part)
            spans.append(TextSpan(number, field, at, at + len(content), space))
            at += len(content)
            pieces += [part, content]
        return spans, "".join([*pieces, self.parts[-1]])


def _leading_space(template: ChatTemplate, before: Sequence[Mapping[str, Any]], text: str) -> int | None:
    """`leading_space` of TextSpan for the answer that follows the messages `before`; `text` ends where the answer starts."""
    try:
        prompt = template.render(before, add_generation_prompt=True)
    except jinja2.TemplateError:
        return None
    gap = text[len(prompt) :]
    return len(gap) if text.startswith(prompt) and not gap.strip() else None


class _GenerationBlock(Extension):
    """{% generation %} … {% endgeneration %} marks what the model generates. Here its content is only rendered."""

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
