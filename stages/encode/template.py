"""Chat templates: renders them as Transformers does, with the variables of `encode.template_kwargs` fixed in the source."""

import datetime
import json
import math
import re
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import jinja2
import jinja2.meta
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from stages.core.params import bad_param
from stages.core.problem import Problem

DATE = "date"
"""The variable that fixes `strftime_now`, which would give other tokens tomorrow."""
RESERVED = ("messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token", "pad_token", "unk_token")
"""Variables that every rendering gives to the template."""
SURROGATE = re.compile("[\ud800-\udfff]")
"""What UTF-8 cannot hold."""
DIRECTIVE = re.compile(r"%-?[A-Za-z]")
"""A part of a date format."""
MAX_RENDERING_S = 30.0
"""A rendering takes about a millisecond; one that takes this long does not end."""
MAX_REPEATED = 10**7
"""Characters, or list items, that `*` may make: "x" * 10**12 would take all memory at once, and no signal stops it."""


class ChatTemplate:
    """A Jinja template in the format of tokenizers' chat templates.

    The environment is the one in which Transformers compiles them (sandboxed, with trim_blocks and lstrip_blocks, a `tojson`
    that does not escape HTML, `raise_exception`, and the `generation` block), with one difference: `strftime_now` is not
    defined, because the same data would give different tokens tomorrow. `fix_variables` can fix its date.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, Any]) -> None:
        """Raises jinja2.TemplateSyntaxError if `source` is not valid."""
        self.source = source
        self._special_tokens = special_tokens
        self._template = _environment().from_string(source)
        # Jinja keeps a chain of mappings and walks it for each rendering, which takes longer than a short template.
        self._template.globals = dict(self._template.globals)

    def render(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] = (), *, add_generation_prompt: bool = False
    ) -> str:
        """The text of a conversation.

        Raises jinja2.TemplateError if the template refuses it or fails, and Problem if it does not end.
        """
        try:
            with _time_limit():
                return self._template.render(
                    messages=messages,
                    tools=list(tools) or None,
                    documents=None,
                    add_generation_prompt=add_generation_prompt,
                    **self._special_tokens,
                )
        except (ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, TypeError, ValueError) as error:
            raise jinja2.TemplateError(f"the template fails: {type(error).__name__}: {error}") from None
        except jinja2.UndefinedError as error:
            if "strftime_now" in str(error):
                raise jinja2.TemplateError(
                    "the template writes today's date; fix one, so that a rerun gives the same tokens: "
                    'encode.template_kwargs: {date: "2026-01-31"}'
                ) from None
            raise jinja2.TemplateError(f"the template fails: {error}") from None


@contextmanager
def _time_limit() -> Iterator[None]:
    """Raises Problem in the block if it takes longer than MAX_RENDERING_S. Only a main thread can be stopped."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    if signal.getsignal(signal.SIGALRM) is not _stop:
        signal.signal(signal.SIGALRM, _stop)
    signal.setitimer(signal.ITIMER_REAL, MAX_RENDERING_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _stop(*_: object) -> None:
    raise Problem(
        bad_param(
            "encode.template",
            f"the template has run for {MAX_RENDERING_S:g} s on one conversation, and does not end; correct its loops",
        )
    )


def fix_variables(source: str, variables: Mapping[str, Any]) -> str:
    """The template with default values for its variables written into its beginning.

    So whoever renders it later (this stage, the fine-tuned model's users, a server) gets the same text without passing
    anything, and can still pass other values. `date`, a text YYYY-MM-DD, becomes the date that `strftime_now` returns.

    Raises:
        ValueError: With everything that is wrong: a variable that the template does not read, or a value without a Jinja
            literal.
        jinja2.TemplateSyntaxError: If `source` is not valid.
    """
    parsed = _environment().parse(source)
    read = jinja2.meta.find_undeclared_variables(parsed)
    problems, header = [], []
    for name, value in variables.items():
        if name == DATE and "strftime_now" in read:
            try:
                header.append(_fixed_date(source, value))
            except (TypeError, ValueError):
                problems.append(f'{name}: found {value!r}, wanted a text in quotes, as "2026-01-31"')
        elif name in RESERVED:
            problems.append(f"{name}: the rows or the tokenizer say what it is; delete it here")
        elif name not in read:
            own = {node.name for node in parsed.find_all(jinja2.nodes.Name) if node.ctx == "store"}
            known = sorted(read - own - {*RESERVED, "strftime_now"} | ({DATE} if "strftime_now" in read else set()))
            problems.append(f"{name}: the template does not read it; it reads {', '.join(known) or 'no variables'}")
        else:
            try:
                header.append(f"{{%- if {name} is not defined -%}}{{%- set {name} = {_literal(value)} -%}}{{%- endif +%}}")
            except TypeError:
                problems.append(
                    f"{name}: found {value!r}, wanted a text, a number, true, false, null, or a list or map of them"
                )
    if problems:
        raise ValueError("\n".join(problems))
    # "+%}" keeps a line break with which the source may begin, in spite of trim_blocks.
    return "".join(header) + source


def _fixed_date(source: str, value: Any) -> str:
    """A macro `strftime_now` that knows the directives (%d) which occur in the source. Raises TypeError or ValueError."""
    date = datetime.datetime.combine(datetime.date.fromisoformat(value), datetime.time())
    found = sorted(set(DIRECTIVE.findall(source)), key=lambda each: (-len(each), each))
    filters = "".join(f" | replace({_literal(each)}, {_literal(date.strftime(each))})" for each in found)
    return f"{{%- macro strftime_now(format) -%}}{{{{- format{filters} -}}}}{{%- endmacro +%}}"


def _literal(value: Any) -> str:
    """A JSON value as a Jinja literal. Raises TypeError for another value."""
    match value:
        case None:
            return "none"
        case bool():
            return "true" if value else "false"
        case int() | float() if math.isfinite(value):
            return repr(value)
        case str() if not SURROGATE.search(value):
            escaped = value.encode("unicode_escape").decode("ascii").replace('"', '\\"')
            return f'"{escaped}"'
        case list():
            return f"[{', '.join(map(_literal, value))}]"
        case dict():
            return "{" + ", ".join(f"{_literal(str(key))}: {_literal(inner)}" for key, inner in value.items()) + "}"
    raise TypeError(type(value).__name__)


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox of Transformers, with a limit for what `*` and `**` make."""

    intercepted_binops = frozenset(["*", "**"])

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """The value of `left * right` or `left ** right`. Raises ValueError if it is too large."""
        size = 0
        match operator, left, right:
            case "**", int(), int():
                size = left.bit_length() * right
            case "*", int(), str() | list() | tuple():
                size = left * len(right)
            case "*", str() | list() | tuple(), int():
                size = len(left) * right
        if size > MAX_REPEATED:
            raise ValueError(f"{operator} makes more than {MAX_REPEATED:,} characters, items or bits")
        return super().call_binop(context, operator, left, right)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    return environment


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
    raise jinja2.TemplateError(f"the template says: {message}")
