"""Converts the usual formats of conversation data into one: the messages of Transformers' chat templates.

A message has a role (system, user, assistant, tool) and content; an assistant message may have `reasoning_content` and
`tool_calls`. `tools` describes the tools that may be called. `"train": false` in a message keeps it out of the loss. A row
of raw text has `text` instead.

FORMATS is the table: a row has the first format whose needed columns it has, each of a kind given. columns.py says under
which names a column is found.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

from stages.core.problem import Rejection
from stages.ingest.columns import PAIRS, Names, lookup
from stages.ingest.keys import CARRY_NOTHING, CHANGE_MEANING, is_empty
from stages.ingest.lists import (
    is_from_value,
    is_list,
    is_question_list,
    read_coig,
    read_list,
    read_prompt_completion,
    read_text_list,
    read_xlam,
    system_of,
)
from stages.ingest.marked_text import (
    is_marked,
    is_moss_text,
    read_marked,
    read_moss,
    read_moss_text,
    rendered_mark,
)
from stages.ingest.pairs import is_multiturn, read_belle_multiturn, read_pair
from stages.ingest.preference import PreferenceFound, read_kto, read_preference, read_rejected_beside
from stages.ingest.row import Row, Settings
from stages.ingest.suggest import columns_line, formats_line, suggest_columns, why_no_columns
from stages.ingest.tools import Message, Tool, read_tools
from stages.ingest.trees import is_tree, read_tree, refuse_message
from stages.ingest.turns import add_system

Format: TypeAlias = Literal[
    "alpaca", "belle_multiturn", "sharegpt", "messages", "prompt_completion", "text_list", "coig", "moss", "oasst", "xlam",
    "guanaco", "preference", "kto", "text",
]  # fmt: skip


class Conversation(NamedTuple):
    """A row in the common format."""

    format: Format
    messages: list[Message]
    """Empty in a row of raw text."""
    tools: list[Tool]
    text: str | None
    """Raw text; None in a conversation."""
    unread: list[str]
    """The names of the row's fields that hold something and are not read; see keys.py."""
    changes: list[str]
    """What was changed beyond the form; see turns.py."""


TEXT, FLAG, NUMBER, OBJECT, OBJECTS, TEXTS, LISTS, EMPTY = (
    "text", "flag", "number", "object", "objects", "texts", "lists", "empty list",
)  # fmt: skip
ANYTHING = (TEXT, FLAG, NUMBER, OBJECT, OBJECTS, TEXTS, LISTS, EMPTY)
KINDS: dict[type, str] = {str: TEXT, bool: FLAG, int: NUMBER, float: NUMBER, dict: OBJECT}
ELEMENTS: dict[type, str] = {str: TEXTS, dict: OBJECTS}


class Shape(NamedTuple):
    """One line of the table of formats."""

    format: Format
    needs: Mapping[str, tuple[str, ...]]
    """The columns that tell the format, and the kinds of value that each may have."""
    may: Mapping[str, tuple[str, ...]]
    """Further columns that are read where a row has them."""
    read: Callable[[Row], list[Message]]
    when: Callable[[Row], bool] | None = None
    """What must be true of the values besides their kinds."""
    lacks: tuple[str, ...] = ()
    """Columns that a row of this format has under none of their usual names."""


def _read_text(row: Row) -> list[Message]:
    row.raw_text = row.text("text")
    return []


_SYSTEM = {"system": (TEXT, OBJECT, OBJECTS)}
_TURNS = {**_SYSTEM, "tools": (TEXT, OBJECT, OBJECTS, TEXTS, LISTS)}
_PAIR = {**_SYSTEM, "input": (TEXT,), "history": ANYTHING, "reasoning": (TEXT, TEXTS)}
_ONE_SIDE = {**_TURNS, "prompt": (TEXT, OBJECTS, OBJECT), "messages": (OBJECTS,), "input": (TEXT,)}
_TEXTS = {"instruction": (TEXT,), "output": (TEXT,)}
_PROMPT = {"instruction": (TEXT, OBJECTS), "output": (TEXT, OBJECTS)}
_CONVERSATION = ("instruction", "output", "messages")
FORMATS: tuple[Shape, ...] = (
    # format, the columns that tell it, others that it may have, how it is read, what must be true of the values
    Shape("preference", {"chosen": ANYTHING, "rejected": ANYTHING}, _ONE_SIDE, read_preference),
    Shape("preference", {"rejected": (TEXT, OBJECT, OBJECTS), "messages": (OBJECTS,)}, _TURNS, read_rejected_beside),
    Shape("kto", {"label": (FLAG,), **_PROMPT}, {**_PAIR, **_TURNS}, read_kto),
    Shape("kto", {"label": (FLAG,), "messages": (OBJECTS,)}, _TURNS, read_kto),
    Shape("moss", {"rounds": (OBJECT,)}, _SYSTEM, read_moss),
    Shape("moss", {"plain_text": (TEXT,)}, _SYSTEM, read_moss_text, is_moss_text),
    Shape("oasst", {"tree": (OBJECT,)}, {"tree_id": (TEXT,), "tree_state": (TEXT,)}, read_tree, is_tree),
    Shape("oasst", {"tree_id": (TEXT,), "text": (TEXT,)}, {}, refuse_message),
    Shape("xlam", {"query": (TEXT,), "calls": (TEXT, OBJECTS), "tools": (TEXT, OBJECTS)}, _SYSTEM, read_xlam),
    Shape("coig", {"task": (TEXT,), "messages": (OBJECTS,)}, {}, read_coig, is_question_list),
    Shape("sharegpt", {"messages": (OBJECTS,)}, _TURNS, read_list, is_from_value),
    Shape("messages", {"messages": (OBJECTS,)}, _TURNS, read_list, is_list),
    Shape("belle_multiturn", _TEXTS, {**_SYSTEM, "input": (TEXT,)}, read_belle_multiturn, is_multiturn),
    Shape("alpaca", _TEXTS, _PAIR, read_pair),
    Shape("text_list", {"texts": (TEXTS,)}, _TURNS, read_text_list),
    Shape("prompt_completion", _PROMPT, _TURNS, read_prompt_completion),
    Shape("guanaco", {"text": (TEXT,)}, _SYSTEM, read_marked, is_marked, lacks=_CONVERSATION),
    Shape("text", {"text": (TEXT,)}, {}, _read_text, lacks=_CONVERSATION),
)
"""The formats, in the order in which they are tried. Where params.yaml names columns, formats that read them come first."""


MAX_PLANS = 10_000
SHOWN_FIELDS = 30
"""The fields that a message about a row names."""
SAME: dict[str, tuple[str, ...]] = {"sharegpt": ("sharegpt", "messages"), "messages": ("sharegpt", "messages")}
"""Formats of which params.yaml may name either: the fields of each turn say which it is."""
WEAK = frozenset(("user", "human", "source", "content", "document", "article", "a", "q"))
"""Names of a question or an answer that often mean something else beside a text."""
NO_TEXT = frozenset(("code", "sentiment", "label_text", "translation", "highlights"))
"""Names beside a text that make it a question."""
_SHAPES: dict[str, Shape] = {shape.format: shape for shape in reversed(FORMATS)}


class Plan(NamedTuple):
    """How rows with the same fields are read, if the values fit the shape."""

    shape: Shape
    fields: dict[str, str]
    """Column → field."""
    read: frozenset[str]
    """The fields at the top of the row that are read."""
    nested: bool
    """Whether one of the fields is a path inside of another."""
    suspects: bool
    """Whether the row has other fields that may hold something."""


class Formats:
    """Reads the rows of files that have the same names of columns. Rows with the same fields are looked up once."""

    def __init__(self, names: Names, settings: Settings, *, group_by: str) -> None:
        self._names, self._settings = names, settings
        self._group_by = group_by.split(".")[0]
        self._paths = tuple(
            name for column, name in names.given.items() if "." in name and column not in ("role", "content")
        )
        self._given_found = False
        self._lines: dict[tuple[Any, ...], str] = {}
        self._plans: dict[tuple[Any, ...], tuple[Plan, ...]] = {}

    def read(self, value: dict[str, Any], format: Format | None = None, *, file: str = "") -> Conversation:
        """The conversation, or the raw text, in a row.

        Args:
            value: The row.
            format: Its format, where params.yaml names it; None: told by its fields.
            file: The row's file, for messages.

        Raises Rejection if no format has such fields, if a field is missing, has the wrong type, or is known to change the
        meaning and is not read; and PreferenceFound for preference data if params.yaml does not say which side is trained.
        """
        try:
            return self._told(value, format)
        except Rejection as rejection:
            if rejection.reason == "unknown_format" and not rejection.detail:
                names = sorted(map(str, value))
                more = f" and {len(names) - SHOWN_FIELDS} more" if len(names) > SHOWN_FIELDS else ""
                found = f"fields {', '.join(names[:SHOWN_FIELDS]) or 'none'}{more}"
                line = self._line(value, file, ()) or why_no_columns(value)
                raise Rejection("unknown_format", f"{found}; {line}") from None
            if rejection.reason == "rendered_text":
                line = formats_line("text", file=file)
                raise Rejection(
                    "rendered_text",
                    f"{rejection.detail}; use the data set with its turns, or, to train it as raw text, {line}",
                ) from None
            if rejection.reason == "missing_field" and (line := self._line(value, file, ("output", "role"))):
                raise Rejection("missing_field", f"{rejection.detail}; {line}") from None
            raise

    def _told(self, value: dict[str, Any], format: Format | None) -> Conversation:
        """Like `read`, without a line for params.yaml in the Rejection."""
        row = Row(value, self._settings)
        for plan in self._find_plans(value, format):
            row.fields = plan.fields
            if plan.shape.when is None or plan.shape.when(row):
                if format is None and plan.shape.format == "text" and (mark := rendered_mark(row.text("text"))):
                    raise Rejection(
                        "rendered_text", f"{row.field('text')}: a conversation as a chat template writes it ({mark})"
                    )
                return self._read(row, plan)
        raise Rejection("unknown_format", "")

    def _read(self, row: Row, plan: Plan) -> Conversation:
        shape = plan.shape
        if "tools" in plan.fields:
            row.tools = read_tools(row.get("tools"), row.field("tools"))
        messages = shape.read(row)
        if messages and "system" in plan.fields:
            messages = add_system(messages, system_of(row), row.changes)
        if plan.suspects or plan.nested:
            self._count_unread(row, plan)
            said = {message["content"] for message in messages}
            # UltraChat and No Robots repeat the first question in a field `prompt`, which is not lost then.
            row.unread = [name for name in row.unread if not _is_said(row.value.get(name), said)]
        return Conversation(shape.format, messages, row.tools, row.raw_text, row.unread, row.changes)

    def _count_unread(self, row: Row, plan: Plan) -> None:
        """Notes the fields that are not read, at the top and beside each path into an object."""
        row.books(row.value, plan.read, "")
        letters = sorted(name for name in row.unread if name.casefold() in ("a", "b", "c", "d"))
        if {"a", "b"} <= set(map(str.casefold, letters)):  # C-Eval, CMMLU: the question means nothing without them
            meaning = CHANGE_MEANING["options"]
            raise Rejection("unread_field", f"{', '.join(letters)}: {meaning.what}, is not read here; {meaning.to_do}")
        if plan.nested:
            inside: dict[str, set[str]] = {}
            for field in plan.fields.values():
                if field not in row.value and "." in field:
                    *steps, last = field.split(".")
                    for depth in range(1, len(steps) + 1):
                        inside.setdefault(".".join(steps[:depth]), set()).add([*steps, last][depth])
            for path, read in inside.items():
                found = lookup(row.value, path)
                if isinstance(found, dict):
                    row.books(found, read, path)
                elif isinstance(found, list):
                    taken = [found[int(step)] for step in read if step.isdecimal() and int(step) < len(found)]
                    if any(not is_empty(other) and other not in taken for other in found):
                        row.unread.append(f"{path}[] (elements that no column names)")

    def _find_plans(self, value: dict[str, Any], format: Format | None) -> tuple[Plan, ...]:
        types = tuple(map(type, value.values()))
        key: tuple[Any, ...] = (format, *value, *types)
        if list in types:
            key += tuple(type(field[0]) if field else None for field in value.values() if isinstance(field, list))
        if self._paths:
            key += tuple(_kind(lookup(value, path)) for path in self._paths)
        plans = self._plans.get(key)
        if plans is None:
            if len(self._plans) > MAX_PLANS:  # rows with fields of their own each
                self._plans.clear()
            plans = self._plans[key] = tuple(self._make_plans(value, format))
        return plans

    def _make_plans(self, value: dict[str, Any], format: Format | None) -> list[Plan]:
        """The shapes that the fields of a row have, in the order in which they are tried."""
        kinds = {name: kind for name in value if (kind := _kind(value[name]))}
        kinds |= {path: kind for path in self._paths if path not in value and (kind := _kind(lookup(value, path)))}
        shapes = [shape for shape in FORMATS if format is None or shape.format in SAME.get(format, (format,))]
        if format is not None:
            shapes = [shape._replace(lacks=()) for shape in shapes]
        found = [(shape, fields) for shape in shapes if (fields := self._fields(shape, kinds)) is not None]
        found.sort(key=lambda item: -self._names.uses_given(item[1][column] for column in item[0].needs))
        self._given_found |= any(self._names.uses_given(fields.values()) for _, fields in found)
        # Where no shape fits, the nearest one says what is missing or wrong.
        if not any(shape.when is None for shape, _ in found) and (nearest := self._nearest(kinds, format)):
            found.append((nearest[0]._replace(when=None), nearest[1]))
        return [self._plan(value, shape, fields) for shape, fields in found]

    def _fields(self, shape: Shape, kinds: Mapping[str, str]) -> dict[str, str] | None:
        """Column → field, if the row has all that the shape needs."""
        fields: dict[str, str] = {}
        if "instruction" in shape.needs:
            pair = self._names.find_pair(kinds, questions=shape.needs["instruction"], answers=shape.needs["output"])
            if pair is None:
                return None
            fields = dict(zip(("instruction", "output"), pair, strict=True))
        for column, wanted in shape.needs.items():
            if column not in fields:
                field = self._names.find(column, kinds, wanted)
                if field is None:
                    return None
                fields[column] = field
        if not self._names.uses_given(fields.values()) and any(
            self._has(column, kinds, fields.values()) for column in shape.lacks
        ):
            return None
        for column, wanted in shape.may.items():
            field = self._names.find(column, kinds, wanted, question=fields.get("instruction", ""))
            if field is not None and field not in fields.values():
                fields[column] = field
        return fields

    def _has(self, column: str, kinds: Mapping[str, str], read: Iterable[str]) -> bool:
        others = {name: kind for name, kind in kinds.items() if name not in read}
        if column == "messages":
            return self._names.find("messages", others, (OBJECTS,)) is not None
        names = {pair[column == "output"] for pair in PAIRS} - WEAK | (NO_TEXT if column == "output" else set())
        return any(name.casefold() in names and kind in (TEXT, OBJECTS) for name, kind in others.items())

    def _nearest(self, kinds: Mapping[str, str], format: Format | None) -> tuple[Shape, dict[str, str]] | None:
        """The format that a row was meant to have, and the fields of it that are there."""
        lists = self._names.find_primary("messages", kinds)
        if format in ("sharegpt", "messages") or (format is None and lists):
            return _SHAPES[format or "messages"], {"messages": lists or "messages"}
        pair = self._names.find_pair(kinds, questions=ANYTHING, answers=ANYTHING)
        primary = {column: self._names.find_primary(column, kinds) for column in ("instruction", "output")}
        if pair:
            primary = dict(zip(("instruction", "output"), pair, strict=True))
        if format in ("alpaca", "belle_multiturn", "prompt_completion") or (format is None and any(primary.values())):
            names = {column: field or self._names.given.get(column, column) for column, field in primary.items()}
            return _SHAPES[format or "alpaca"], names
        if format is None:
            return None
        shape = _SHAPES[format]
        return shape, {
            column: self._names.find(column, kinds, ANYTHING) or self._names.given.get(column, column)
            for column in shape.needs
        }

    def _plan(self, value: dict[str, Any], shape: Shape, fields: dict[str, str]) -> Plan:
        heads = {field if field in value else field.split(".")[0] for field in fields.values()}
        read = frozenset((*heads, self._group_by))
        return Plan(
            shape,
            fields,
            read,
            nested=any("." in field and field not in value for field in fields.values()),
            suspects=any(name not in read and name.casefold() not in CARRY_NOTHING for name in value),
        )

    def _line(self, value: dict[str, Any], file: str, wanted: tuple[str, ...]) -> str:
        """What to write into params.yaml to read such a row; "" if there is no such line, or none with a wanted column.

        Rows of a file with the same fields get the same line, so that they are one kind of row.
        """
        key = (file, wanted, *value)
        line = self._lines.get(key)
        if line is None:
            if len(self._lines) > MAX_PLANS:
                self._lines.clear()
            columns = suggest_columns(value)
            # Columns that no row has so far are a mistake, which the line replaces.
            given = self._names.given if self._given_found else {}
            line = ""
            if columns and (not wanted or any(column in columns for column in wanted)):
                found = self._try(columns, value)
                if found is None:
                    line = columns_line(columns, given=given, file=file)
                elif found.reason in ("unread_field", "rendered_text") and not wanted:
                    line = found.detail
            self._lines[key] = line
        return line

    def _try(self, columns: Mapping[str, str], value: dict[str, Any]) -> Rejection | None:
        """Why a row is not read with such columns; None if it is, or for a reason that lies in this row alone."""
        fields = (columns.get("role"), columns.get("content"))
        formats = Formats(Names(columns), self._settings._replace(turn_fields=fields), group_by=self._group_by)
        try:
            formats._told(value, None)
        except Rejection as rejection:
            ours = ("unknown_format", "missing_field", "wrong_type", "unread_field", "rendered_text")
            return rejection if rejection.reason in ours else None
        except PreferenceFound:
            pass
        return None


def _kind(value: Any) -> str:
    """The kind of a value; "" for null, which is as missing, and for types that JSON lacks."""
    if isinstance(value, list):
        return ELEMENTS.get(type(value[0]), LISTS) if value else EMPTY
    return KINDS.get(type(value), "")


def _is_said(value: Any, said: set[str]) -> bool:
    return isinstance(value, str) and value in said
