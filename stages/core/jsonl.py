"""JSON as Loratory writes it: the same values are always the same bytes, and Chinese is readable in an editor."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import orjson

LONG_INTEGER = re.compile(rb"\d{19}")
"""orjson handles integers of up to 64 bits. A line that may hold a longer one goes to the slower json module."""


def read_json(path: Path) -> Any:
    """The value in one of Loratory's own JSON files."""
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Writes `value` indented, with the keys in insertion order."""
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8", newline="\n")


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The rows of one of Loratory's own JSON-lines files. Only "\\n" ends a line: a string may contain U+2028."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def parse_line(line: bytes) -> Any:
    """The value in one line of Loratory's own JSON-lines files."""
    return json.loads(line) if LONG_INTEGER.search(line) else orjson.loads(line)


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
