"""JSON as Loratory writes it: the same values are always the same bytes, and Chinese is readable in an editor."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import orjson

from stages.core.problem import Problem

REMEDY = "the file is damaged: dvc checkout puts it back, or dvc repro makes it again"
NOT_JSON = (ValueError, RecursionError)
"""What the parsers raise for a text that is not JSON, not UTF-8, or nested too deeply."""
LONG_INTEGER = re.compile(rb"\d{19}")
"""orjson handles integers of up to 64 bits. A line that may hold a longer one goes to the slower json module."""


class DamagedFile(Problem, ValueError):
    """A file that is not JSON. It is a ValueError too, for those who know better what to say; as text, it is the reason."""

    def __init__(self, message: str, reason: object) -> None:
        super().__init__(message)
        self.args = (str(reason),)

    def __reduce__(self) -> Any:
        return DamagedFile, (self.messages[0], self.args[0])


def read_json(path: Path) -> Any:
    """The value in one of Loratory's own JSON files. Raises DamagedFile if it is not JSON."""
    try:
        return json.loads(path.read_bytes().decode())
    except NOT_JSON as error:
        raise _damaged(path, error) from None


def write_json(path: Path, value: Any) -> None:
    """Writes `value` indented, with the keys in insertion order."""
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8", newline="\n")


def as_json(value: Any) -> Any:
    """A value of a YAML file as it is after it was written as JSON and read back: keys become text, as do dates."""
    return json.loads(json.dumps(value, default=str))


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The rows of one of Loratory's own JSON-lines files. Only "\\n" ends a line: a string may contain U+2028."""
    try:
        return [json.loads(line) for line in path.read_bytes().decode().split("\n") if line]
    except NOT_JSON as error:
        raise _damaged(path, error) from None


def parse_line(line: bytes) -> Any:
    """The value in one line of Loratory's own JSON-lines files. Raises DamagedFile if it is not JSON."""
    try:
        return json.loads(line) if LONG_INTEGER.search(line) else orjson.loads(line)
    except NOT_JSON as error:
        shown = line[:60].decode(errors="replace").strip()
        raise DamagedFile(f"a line that is not JSON: {error}: {shown!r}; {REMEDY}", error) from None


def _damaged(path: Path, error: Exception) -> DamagedFile:
    return DamagedFile(f"{path}: not JSON: {error}; {REMEDY}", error)


def dump_line(value: Any) -> bytes:
    """One line of JSON with its newline. All text must be encodable in UTF-8."""
    try:
        return orjson.dumps(value, option=orjson.OPT_APPEND_NEWLINE)
    except TypeError:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Writes one row per line; without rows an empty line, because DVC warns of an output that is an empty file."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            write_line(file, row)
        if not file.tell():
            file.write("\n")


def write_line(file: IO[str], row: dict[str, Any]) -> None:
    """Writes one row. A lone surrogate, which UTF-8 cannot hold, stays as its \\u escape."""
    line = json.dumps(row, ensure_ascii=False)
    try:
        line.encode()
    except UnicodeEncodeError:
        line = json.dumps(row)
    file.write(line + "\n")
