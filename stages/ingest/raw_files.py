"""Finds the raw files, says which split each belongs to, and reads their rows."""

import ast
import fnmatch
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from stages.ingest.byte_chunks import ByteChunks
from stages.ingest.encodings import guess_other_encoding
from stages.ingest.formats import Format
from stages.ingest.json_stream import MAX_BROKEN_CHARS, Broken, Place, has_split_lists, is_json, read_values
from stages.ingest.split_names import PARTS, split_in_name, split_named, split_of_path
from stages.ingest.tables import CSV_SUFFIXES, TABLE_SUFFIXES, describe_header, find_table_problem, read_table

JSON_SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz")
TEXT_SUFFIXES = (".txt", ".txt.gz")
SUFFIXES = (*JSON_SUFFIXES, *TABLE_SUFFIXES, *TEXT_SUFFIXES)
HELD_OUT = ("test", "validation")
"""The splits that a name can choose, read first and in this order. Of the other files, `train` in the name or not, the
shares of `validation_percent` and `test_percent` are held out, where no file is named for them."""
HUB = "hub"
"""What the names of files that fetch_data downloaded begin with."""
SIGNATURES = {
    b"PAR1": "it is a Parquet file; name it .parquet",
    b"\x1f\x8b": "it is compressed with gzip; add .gz to its name",
    b"PK\x03\x04": "it is a zip archive or an Excel file; unpack it, or save the sheet as CSV",
    b"\x28\xb5\x2f\xfd": "it is compressed with Zstandard; decompress it with: zstd -d",
    b"BZh": "it is compressed with bzip2; decompress it with: bunzip2",
    b"\xfd7zXZ": "it is compressed with xz; decompress it with: unxz",
    b"version https://git-lfs": "it is a pointer of Git LFS and not the data; get the data with: git lfs pull",
    b"ARROW1": "it is an Arrow file; write it as Parquet",
    b"SQLite format 3": "it is an SQLite database; export the table as CSV",
}
"""How files of other formats begin, and what to do with them."""
EVALUATION = frozenset(("eval", "evaluation"))
"""Parts of a name that choose no split; the user is told."""
LINES_LOOKED_AT = 20
ABOUT_DATA = ("readme", "license", "licence", "notice", "changelog", "sources", "requirements")
"""Texts of these names tell about data; a document to train on has another name."""


class RawFile(NamedTuple):
    """A file to read, or the part of it that belongs to one split."""

    path: Path
    name: str
    """Its path relative to the raw folder; "hub/..." for a file that fetch_data downloaded."""
    split: str | None
    """The split that its name chooses, one of HELD_OUT."""
    part: str | None = None
    """The split whose lists are read, if the file has a list for each split; "" for the lists of no held-out split."""


class RawRow(NamedTuple):
    """One row of a raw file."""

    file: str
    """The name of its file."""
    source: str
    """file:number. The number is the line in JSON lines, and elsewhere the position; both count from 1."""
    forced_split: str | None
    """The split that its name chooses."""
    format: Format | None
    """The format that params.yaml gives for its file."""
    value: Any
    """The JSON value, or a Broken."""


def find_files(raw: Path, hub: Path) -> tuple[list[RawFile], list[str]]:
    """Lists the files below `raw` and `hub`.

    Returns:
        The files in reading order: those of test and validation first, then by path; and one message for everything
        below the two folders that cannot be read.
    """
    problems = []
    files = []
    for folder, prefix in ((raw, ""), (hub, f"{HUB}/")):
        entries = sorted(folder.rglob("*"))
        all_files = [path for path in entries if path.is_file()]
        visible = [path for path in all_files if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
        readable = [path for path in visible if path.name.endswith(SUFFIXES)]
        # A .dvc file is the pointer that `dvc add` writes next to the data.
        others = [path for path in visible if not path.name.endswith(SUFFIXES) and path.suffix != ".dvc"]
        links = [path for path in entries if path.is_symlink() and not path.is_file()]
        problems += [
            *(f"{path}: not one of {', '.join(SUFFIXES)}; convert it, or move it out of {folder}" for path in others),
            *(f"{path}: a link to a folder, or to nothing; put the files here, or link each file" for path in links),
            *(f"{str(path)!r}: the name is not UTF-8; rename it" for path in all_files if not _has_utf8_name(path)),
        ]
        for path in readable:
            if problem := _find_problem(path):
                problems.append(f"{path}: {problem}")
            else:
                files += _parts(path, prefix + path.relative_to(folder).as_posix())
    if not files and not problems:
        problems.append(
            f"{raw}: no {', '.join(SUFFIXES)} file found; put your data there, or name it in fetch_data.datasets"
        )
    files.sort(key=lambda file: (*HELD_OUT, None).index(file.split))
    return files, problems


def describe_files(files: Iterable[RawFile]) -> list[str]:
    """What was taken from the names and first lines of the files, one line each."""
    lines = []
    for split in HELD_OUT:
        named = [file.name for file in files if file.split == split]
        if named:
            shown = ", ".join(named[:3]) + (f" and {len(named) - 3} more" if len(named) > 3 else "")
            lines.append(f"{split}: by name, the rows of {shown}; {split}_percent takes no others")
    for file in files:
        if file.split is None and not EVALUATION.isdisjoint(PARTS.findall(file.name.lower())):
            lines.append(f"{file.name}: `eval` may mean validation or test; its rows are split as those of other files")
        if not file.path.stat().st_size:
            lines.append(f"{file.name}: an empty file; it has no rows")
        elif file.name.endswith(CSV_SUFFIXES) and (note := describe_header(file.path)):
            lines.append(f"{file.name}: {note}")
    return lines


def read_rows(files: Iterable[RawFile], *, formats: Mapping[str, Format]) -> Iterator[RawRow]:
    """Yields every row of the files. The first pattern in `formats` that matches a file's name gives its format."""
    for file in files:
        file_format = next((name for pattern, name in formats.items() if fnmatch.fnmatch(file.name, pattern)), None)
        for place, value in _read_file(file):
            yield RawRow(file.name, f"{file.name}:{place}", file.split, file_format, value)


def _read_file(file: RawFile) -> Iterator[tuple[Place, Any]]:
    if file.path.name.endswith(TABLE_SUFFIXES):
        yield from read_table(file.path)
    elif file.path.name.endswith(TEXT_SUFFIXES):
        chunks = ByteChunks(file.path)
        text = b"".join(chunks).decode("utf-8", "surrogateescape")
        yield 1, Broken(text[:MAX_BROKEN_CHARS], chunks.gzip_error, "not_text") if chunks.gzip_error else {"text": text}
    else:
        yield from (
            (place, value) for place, value in read_values(file.path) if file.part is None or file.part == _part_of(place)
        )


def _parts(path: Path, name: str) -> list[RawFile]:
    """A file, or its parts if it has lists for several splits and its name chooses none."""
    at = PurePosixPath(name)
    # fetch_data makes a folder for each split: hub/owner--name/test_sft/...
    split = _held_out(split_in_name(at.parts[2]) if at.parts[0] == HUB and len(at.parts) > 3 else split_of_path(at))
    if split or not path.name.endswith(JSON_SUFFIXES) or not has_split_lists(path):
        return [RawFile(path, name, split)]
    parts = {_part_of(place) for place, _ in read_values(path)}
    return [RawFile(path, name, part or None, part) for part in sorted(parts)] or [RawFile(path, name, None)]


def _part_of(place: Place) -> str:
    """The held-out split in whose list a row is; "" if it is in none."""
    return _held_out(split_named(place.partition(":")[0])) or "" if isinstance(place, str) else ""


def _held_out(split: str) -> str | None:
    return split if split in HELD_OUT else None


def _find_problem(path: Path) -> str:
    """Why nothing in a file could be read, and what to do; "" if there is no such reason."""
    try:
        chunks = ByteChunks(path)
    except PermissionError:
        return "no permission to read it; change its mode"
    head = chunks.raw_head
    if path.name.endswith(TEXT_SUFFIXES) and path.name.lower().startswith(ABOUT_DATA):
        return "each .txt file is a document to train on, and this one seems to tell about the data; move or rename it"
    if path.name.endswith(TEXT_SUFFIXES) and _is_object(chunks.head):
        return "it begins with a JSON object, and .txt is a text to train on as it is; if it has rows, name it .jsonl"
    if path.suffix != ".parquet":
        for start, remedy in SIGNATURES.items():
            if head.startswith(start):
                return remedy
        if encoding := guess_other_encoding(head):
            command = f"iconv -f {encoding} -t UTF-8 {path.name} > new.{path.name}"
            return f"not UTF-8; it looks like {encoding}. Convert it with: {command}"
    if path.name.endswith(TABLE_SUFFIXES):
        return find_table_problem(path)
    return _not_json(chunks.head) if path.name.endswith(JSON_SUFFIXES) else ""


def _is_object(head: bytes) -> bool:
    """Whether the first line of a text is a JSON object."""
    line = head.strip().partition(b"\n")[0].decode("utf-8", "replace")
    return line.startswith("{") and is_json(line)


def _not_json(head: bytes) -> str:
    """What is wrong with a JSON file that has no JSON in its first lines."""
    lines = [line.strip() for line in head.decode("utf-8", "replace").splitlines()[:LINES_LOOKED_AT]]
    lines = [line for line in lines if line]
    if not lines:
        return ""
    if lines[0][0] in "{[" and _is_python(lines[0]):
        return "written in Python's notation, with single quotes, and not in JSON; write it with json.dumps"
    if lines[0][0] in "{[" or any(map(is_json, lines)):
        return ""
    return f"no JSON in its first lines, which begin with {lines[0][:40]!r}; if it is CSV or text, name it so"


def _is_python(line: str) -> bool:
    """Whether a line is a Python value that is no JSON."""
    if is_json(line) or "'" not in line[:4]:
        return False
    try:
        ast.literal_eval(line.rstrip(","))
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return False
    return True


def _has_utf8_name(path: Path) -> bool:
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True
