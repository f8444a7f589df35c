"""What the readers of the formats share: a raw row with the fields that its columns were found in."""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from stages.core.problem import Rejection
from stages.ingest.columns import lookup
from stages.ingest.keys import unread_keys
from stages.ingest.tools import Tool
from stages.ingest.turns import Role


class Settings(NamedTuple):
    """What params.yaml says about reading rows."""

    input_separator: str
    """Text between a question and its input, if neither is empty."""
    roles: Mapping[str, Role]
    """Role names besides the usual ones, and the role that each stands for."""
    preference: str
    """Which side of preference data is trained: chosen, rejected, or error."""
    turn_fields: tuple[str | None, str | None]
    """The fields of a turn's role and content, where they are not the usual ones."""


class Row:
    """A raw row, its fields by column, and the keys of it that are not read."""

    __slots__ = ("changes", "fields", "raw_text", "settings", "tools", "unread", "value")

    def __init__(self, value: dict[Any, Any], settings: Settings) -> None:
        self.value, self.settings = value, settings
        self.fields: Mapping[str, str] = {}
        self.tools: list[Tool] = []
        self.raw_text: str | None = None
        self.unread: list[str] = []
        self.changes: list[str] = []

    def field(self, column: str) -> str:
        """The name of the field that is read as a column, for messages."""
        return self.fields.get(column, column)

    def get(self, column: str) -> Any:
        """What the field of a column holds; None if the row has none."""
        name = self.fields.get(column)
        if name is None or name in self.value:
            return self.value.get(name)
        return lookup(self.value, name)

    def text(self, column: str, *, default: str | None = None) -> str:
        """The text in the field of a column, or `default`, if there is one, where it is missing or null."""
        found = self.value.get(self.fields.get(column))
        if found is None:
            found = self.get(column)
        if isinstance(found, str):
            return found
        if found is None:
            if default is None:
                raise Rejection("missing_field", self.field(column))
            return default
        raise Rejection("wrong_type", f"{self.field(column)}: wanted text, found {type(found).__name__}")

    def books(self, value: Mapping[str, Any], read: Collection[str], where: str) -> None:
        """Notes the keys of an object in the row that are not read; see keys.py."""
        self.unread += unread_keys(value, read, where)


def text_of(value: Mapping[str, Any], field: str, *, where: str = "") -> str:
    """The text in a field of an object inside a row. Raises Rejection if there is none."""
    found = value.get(field)
    if found is None:
        raise Rejection("missing_field", f"{where}{field}")
    if not isinstance(found, str):
        raise Rejection("wrong_type", f"{where}{field}: wanted text, found {type(found).__name__}")
    return found
