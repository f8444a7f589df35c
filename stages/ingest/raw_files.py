"""Finds the raw files and reads their rows."""

import fnmatch
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from stages.ingest.formats import Format
from stages.ingest.json_stream import read_values

SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz")
FORCED_SPLITS = ("test", "validation")
"""Every file in a folder of this name, directly in the raw folder, goes into that split. Read first, in this order."""


class RawRow(NamedTuple):
    """One row of a raw file."""

    file: str
    """Path of its file, relative to the raw folder."""
    source: str
    """file:number. The number is the line in JSON lines and the position in an array; both count from 1."""
    forced_split: str | None
    """The split that its folder names."""
    format: Format | None
    """The format that params.yaml gives for its file."""
    value: Any
    """The JSON value, or a Broken."""


def find_files(raw: Path) -> tuple[list[Path], list[str]]:
    """Lists the JSON files below `raw`.

    Returns:
        The files in reading order: those of a forced split first, then by path; and one message for everything below
        `raw` that cannot be read.
    """
    entries = sorted(raw.rglob("*"))
    all_files = [path for path in entries if path.is_file()]
    visible = [path for path in all_files if not any(part.startswith(".") for part in path.relative_to(raw).parts)]
    files = [path for path in visible if path.name.endswith(SUFFIXES)]
    # A .dvc file is the pointer that `dvc add` writes next to the data.
    others = [path for path in visible if not path.name.endswith(SUFFIXES) and path.suffix != ".dvc"]
    links = [path for path in entries if path.is_symlink() and not path.is_file()]
    problems = [
        *(f"{path}: not one of {', '.join(SUFFIXES)}; convert it, or move it out of {raw}" for path in others),
        *(f"{path}: a link to a folder, or to nothing; put the files here, or link each file" for path in links),
        *(f"{str(path)!r}: the name is not UTF-8; rename it" for path in all_files if not _has_utf8_name(path)),
        *(f"{path}: no permission to read it; change its mode" for path in files if not _may_read(path)),
    ]
    if not files:
        problems.append(f"{raw}: no {', '.join(SUFFIXES)} file found; put your data there")
    files.sort(key=lambda path: (*FORCED_SPLITS, None).index(_forced_split(raw, path)))
    return files, problems


def read_rows(raw: Path, files: Iterable[Path], *, formats: Mapping[str, Format]) -> Iterator[RawRow]:
    """Yields every row of the files. The first pattern in `formats` that matches a file's path gives its format."""
    for path in files:
        file = path.relative_to(raw).as_posix()
        forced_split = _forced_split(raw, path)
        file_format = next((name for pattern, name in formats.items() if fnmatch.fnmatch(file, pattern)), None)
        for number, value in read_values(path):
            yield RawRow(file, f"{file}:{number}", forced_split, file_format, value)


def _forced_split(raw: Path, path: Path) -> str | None:
    top = path.relative_to(raw).parts[0]
    return top if top in FORCED_SPLITS else None


def _has_utf8_name(path: Path) -> bool:
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def _may_read(path: Path) -> bool:
    try:
        path.open("rb").close()
    except PermissionError:
        return False
    return True
