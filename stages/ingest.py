"""Turns the raw JSON files into checked, deduplicated conversations, split by hash; every row is accounted for."""

import gzip
import hashlib
import json
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from pydantic import Field

from stages.lib.jsonl import write_json, write_jsonl
from stages.lib.output import fresh_file, fresh_folder
from stages.lib.params import Section
from stages.lib.problem import Problem
from stages.lib.rejection import Rejection

SPLITS = ("train", "validation", "test")
SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz")
ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}

Message: TypeAlias = dict[str, Any]


class Params(Section):
    """How rows are checked and split."""

    input_separator: str
    """What stands between `instruction` and `input` in the user's message; the tutorial and BELLE put nothing there."""
    validation_percent: float = Field(ge=0, lt=100)
    """Share of prompts that training never sees and that its progress is measured on."""
    test_percent: float = Field(ge=0, lt=100)
    """Share of prompts that nothing sees before `generate` and `score`."""
    split_seed: int
    """Another seed puts other prompts into validation and test."""
    max_chars: int = Field(gt=0)
    """A row with more characters is set aside; one such row is often a broken export."""
    max_rejected_percent: float = Field(ge=0, le=100)
    """The stage fails when a larger share of the rows is set aside."""


@dataclass(frozen=True)
class Row:
    """One raw row: where it is, the split that its folder asks for, and its value."""

    source: str
    """file:row, the file relative to the raw folder; a line number in JSON lines, the element's number in an array."""
    forced_split: str | None
    value: Any


@dataclass(frozen=True)
class Example:
    """One conversation that is kept."""

    source: str
    forced_split: str | None
    messages: list[Message]

    @property
    def prompt(self) -> str:
        """The first user message, normalized: what a split must not share with another."""
        return _normalize(next(message["content"] for message in self.messages if message["role"] == "user"))

    @property
    def digest(self) -> str:
        """Equal for conversations that differ at most in white space, case and character width."""
        text = json.dumps([[m["role"], _normalize(m["content"])] for m in self.messages], ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()


def ingest(params: Params, raw: Path, examples: Path, report: Path) -> None:
    """Reads every JSON file below `raw` and writes train, validation, test and rejected .jsonl into `examples`.

    A row of a split: {"id", "source", "messages": [{"role", "content"}]}. A row of rejected.jsonl: {"source", "reason",
    "detail", "raw"}. `report` gets the counts; read = kept + rejected and kept = train + validation + test are checked here.

    Raises Problem if there is nothing to read, if a file cannot be read at all, or if too many rows are set aside.
    """
    kept: dict[str, Example] = {}
    rejected: list[dict[str, Any]] = []
    for row in _read(raw, _files(raw)):
        try:
            example = _check(params, row)
            twin = kept.setdefault(example.digest, example)
            if twin is not example:
                raise Rejection("duplicate", f"of {twin.source}")
        except Rejection as why:
            value = row.value.text if isinstance(row.value, Broken) else row.value
            rejected.append({"source": row.source, "reason": why.reason, "detail": why.detail, "raw": value})
    splits = _split(params, list(kept.values()))
    counts = _counts(splits, rejected)
    _check_share(params, counts, rejected)
    with fresh_folder(examples) as folder, fresh_file(report) as report_file:
        for split in SPLITS:
            write_jsonl(folder / f"{split}.jsonl", (_as_row(example) for example in splits[split]))
        write_jsonl(folder / "rejected.jsonl", rejected)
        write_json(report_file, counts)
    print(
        f"ingest: {counts['rows_read']:,} rows read, {counts['rows_kept']:,} kept ("
        + ", ".join(f"{split} {counts[split]:,}" for split in SPLITS)
        + f"), {counts['rows_rejected']:,} set aside in {examples}/rejected.jsonl"
    )


# Reading


@dataclass(frozen=True)
class Broken:
    """A piece of a file that is not JSON, and why."""

    reason: str
    text: str
    detail: str


def _files(raw: Path) -> list[Path]:
    """The JSON files below `raw`, sorted by path. Raises Problem if there are none, or others that would go unread."""
    below = [path for path in sorted(raw.rglob("*")) if path.is_file()]
    visible = [path for path in below if not any(part.startswith(".") for part in path.relative_to(raw).parts)]
    files = [path for path in visible if path.name.endswith(SUFFIXES)]
    # A pointer of `dvc add` and its .gitignore are no data.
    others = [path for path in visible if path not in files and path.suffix != ".dvc"]
    problems = [f"{path}: not one of {', '.join(SUFFIXES)}; convert it, or move it out of {raw}" for path in others]
    if not files:
        problems.append(f"{raw}: holds no {', '.join(SUFFIXES)} file; put your data there")
    if problems:
        raise Problem(*problems)
    return files


def _read(raw: Path, files: list[Path]) -> Iterator[Row]:
    """The rows of all files. A row that is not JSON comes as a Broken."""
    for path in files:
        name = path.relative_to(raw).as_posix()
        folder = name.split("/")[0]
        forced = folder if "/" in name and folder in ("validation", "test") else None
        for number, value in _values(path):
            yield Row(f"{name}:{number}", forced, value)


def _values(path: Path) -> Iterator[tuple[int, Any]]:
    """Numbered values of an array or of JSON lines; which of the two is told by the first character."""
    data = _bytes(path)
    text = data.decode("utf-8-sig", errors="surrogateescape")
    start = len(text) - len(text.lstrip())
    yield from _array(text, start) if text[start : start + 1] == "[" else _lines(text)


def _bytes(path: Path) -> bytes:
    try:
        data = path.read_bytes()
        return gzip.decompress(data) if path.suffix == ".gz" else data
    except PermissionError:
        raise Problem(f"{path}: no permission to read it") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise Problem(f"{path}: not a whole gzip file ({error}); copy it again") from None


def _lines(text: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, _parse(line)


def _array(text: str, start: int) -> Iterator[tuple[int, Any]]:
    """The elements of an array, one by one: where it breaks off, those before are kept and the rest is one Broken."""
    position, number = _skip(text, start + 1), 1
    while text[position : position + 1] != "]":
        try:
            value, end = DECODER.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            yield number, Broken("not_json", text[position:], str(error))
            return
        yield number, value
        position, number = _skip(text, end), number + 1
        if text[position : position + 1] == ",":
            position = _skip(text, position + 1)
        elif text[position : position + 1] != "]":
            yield number, Broken("not_json", text[position:], "the array is not closed")
            return
    rest = text[position + 1 :].strip()
    if rest:
        yield number, Broken("not_json", rest, "text after the end of the array")


def _skip(text: str, position: int) -> int:
    while text[position : position + 1].isspace():
        position += 1
    return position


def _parse(line: str) -> Any:
    try:
        value, end = DECODER.raw_decode(line, _skip(line, 0))
    except (ValueError, RecursionError) as error:
        return Broken("not_json", line, str(error))
    return value if not line[end:].strip() else Broken("not_json", line, f"text after the object, at character {end + 1}")


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


DECODER = json.JSONDecoder(parse_constant=_no_constant)


# Checking


def _check(params: Params, row: Row) -> Example:
    """The conversation in a row. Raises Rejection."""
    value = row.value
    if isinstance(value, Broken):
        raise Rejection(value.reason, value.detail)
    if not isinstance(value, dict):
        raise Rejection("not_an_object", f"found {type(value).__name__}")
    if "conversations" in value:
        messages = _from_sharegpt(value)
    elif "messages" in value:
        messages = _from_messages(value)
    elif "instruction" in value or "output" in value:
        messages = _from_alpaca(params, value)
    else:
        raise Rejection("unknown_format", f"fields {', '.join(sorted(map(str, value))) or 'none'}")
    _check_turns(messages)
    length = sum(len(message["content"]) for message in messages)
    if length > params.max_chars:
        raise Rejection("too_long", f"{length} characters, ingest.max_chars is {params.max_chars}")
    return Example(row.source, row.forced_split, messages)


def _from_alpaca(params: Params, value: dict[str, Any]) -> list[Message]:
    """instruction, input, output; system and history if there."""
    messages: list[Message] = []
    if _text(value, "system", default=""):
        messages.append({"role": "system", "content": value["system"]})
    history = value.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise Rejection("wrong_type", "history: wanted a list of [question, answer] pairs")
    for question, answer in history:
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer})
    instruction, query = _text(value, "instruction"), _text(value, "input", default="")
    separator = params.input_separator if query else ""
    user: Message = {"role": "user", "content": instruction + separator + query}
    if query:
        user |= {"instruction": instruction, "input": query}  # for templates that place them apart
    return [*messages, user, {"role": "assistant", "content": _text(value, "output")}]


def _from_sharegpt(value: dict[str, Any]) -> list[Message]:
    """conversations: a list of {"from", "value"}."""
    return _turns(value, "conversations", "from", "value")


def _from_messages(value: dict[str, Any]) -> list[Message]:
    """messages: a list of {"role", "content"}, with an optional "train": false."""
    return _turns(value, "messages", "role", "content")


def _turns(value: dict[str, Any], field: str, role_field: str, content_field: str) -> list[Message]:
    turns = value[field]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise Rejection("wrong_type", f"{field}: wanted a list of objects")
    messages: list[Message] = []
    for turn in turns:
        role = _text(turn, role_field)
        if role not in ROLES:
            raise Rejection("unknown_role", f"{role_field}: {role!r}")
        message: Message = {"role": ROLES[role], "content": _text(turn, content_field)}
        if turn.get("train") is False:
            message["train"] = False
        messages.append(message)
    return messages


def _text(value: dict[str, Any], field: str, default: str | None = None) -> str:
    found = value.get(field, default)
    if found is None and default is not None:
        return default
    if field not in value and default is None:
        raise Rejection("missing_field", field)
    if not isinstance(found, str):
        raise Rejection("wrong_type", f"{field}: wanted text, found {type(found).__name__}")
    return found


def _check_turns(messages: list[Message]) -> None:
    """An optional system message, then user and assistant in turn, the assistant last; none of them empty."""
    for message in messages:
        if not isinstance(message["content"], str):
            raise Rejection("wrong_type", f"history: wanted text, found {type(message['content']).__name__}")
        try:
            message["content"].encode()
        except UnicodeEncodeError as error:
            raise Rejection(
                "bad_encoding", f"not UTF-8 at character {error.start + 1} of a {message['role']} text"
            ) from None
    turns = [message for message in messages if message["role"] != "system"]
    if any(message["role"] == "system" for message in messages[1:]):
        raise Rejection("roles_out_of_order", "a system message after the first place")
    for number, message in enumerate(turns):
        if message["role"] != ("user", "assistant")[number % 2]:
            raise Rejection("roles_out_of_order", " ".join(message["role"] for message in messages))
    if not turns or turns[-1]["role"] != "assistant":
        raise Rejection("no_answer_at_the_end", " ".join(message["role"] for message in messages) or "no messages")
    for message in turns:
        if not message["content"].strip():
            raise Rejection(f"empty_{'answer' if message['role'] == 'assistant' else 'prompt'}", repr(message["content"]))


# Splitting and counting


def _normalize(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _split(params: Params, examples: list[Example]) -> dict[str, list[Example]]:
    """Each prompt goes, whole, where its hash says, so a new row moves no old one; a file's folder goes before the hash."""
    forced = {example.prompt: example.forced_split for example in examples if example.forced_split == "validation"}
    forced |= {example.prompt: example.forced_split for example in examples if example.forced_split == "test"}
    splits: dict[str, list[Example]] = {split: [] for split in SPLITS}
    for example in examples:
        prompt = example.prompt
        splits[forced.get(prompt) or _split_of(params, prompt)].append(example)
    return splits


def _split_of(params: Params, prompt: str) -> str:
    digest = hashlib.sha256(f"{params.split_seed}\n{prompt}".encode()).digest()
    percent = int.from_bytes(digest[:8]) / 2**64 * 100
    if percent < params.test_percent:
        return "test"
    return "validation" if percent < params.test_percent + params.validation_percent else "train"


def _counts(splits: dict[str, list[Example]], rejected: list[dict[str, Any]]) -> dict[str, Any]:
    """The books. They must balance; if they do not, it is a defect here and nothing is written."""
    reasons = Counter(row["reason"] for row in rejected)
    sizes = {split: len(splits[split]) for split in SPLITS}
    kept = sum(sizes.values())
    prompts = {split: {example.prompt for example in splits[split]} for split in SPLITS}
    leaks = sum(
        len(prompts[a] & prompts[b]) for a, b in (("train", "validation"), ("train", "test"), ("validation", "test"))
    )
    assert leaks == 0, f"{leaks} prompts stand in two splits"
    return {
        "rows_read": kept + len(rejected),
        "rows_kept": kept,
        "rows_rejected": len(rejected),
        "rejected_by_reason": dict(sorted(reasons.items())),
        "duplicates": reasons["duplicate"],
        **sizes,
        "leaked_prompts": leaks,
    }


def _check_share(params: Params, counts: dict[str, Any], rejected: list[dict[str, Any]]) -> None:
    percent = 100 * counts["rows_rejected"] / max(1, counts["rows_read"])
    if percent > params.max_rejected_percent:
        first = {row["reason"]: row for row in reversed(rejected)}
        raise Problem(
            f"{counts['rows_rejected']} of {counts['rows_read']} rows ({percent:.1f} %) would be set aside, "
            f"ingest.max_rejected_percent is {params.max_rejected_percent:g}",
            *(
                f"{reason}: {count} rows, the first {first[reason]['source']}: {first[reason]['detail']}"
                for reason, count in counts["rejected_by_reason"].items()
            ),
        )
    empty = [split for split in SPLITS if not counts[split]]
    if empty:
        raise Problem(f"no rows for {' and '.join(empty)}; add data, or change ingest.validation_percent and test_percent")


def _as_row(example: Example) -> dict[str, Any]:
    text = json.dumps(example.messages, ensure_ascii=False, sort_keys=True)
    return {
        "id": hashlib.sha256(text.encode()).hexdigest()[:16],
        "source": example.source,
        "messages": example.messages,
    }
