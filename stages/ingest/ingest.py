"""Turns the raw JSON files into checked, deduplicated conversations, split by hash; every row is accounted for."""

import fnmatch
import hashlib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from itertools import combinations
from pathlib import Path
from typing import IO, Any, BinaryIO, Literal, NamedTuple

from pydantic import Field

from stages.core.jsonl import dump_line, write_json, write_line
from stages.core.output import Done, fresh_file, fresh_folder
from stages.core.params import Section
from stages.core.problem import Problem, Rejection
from stages.core.progress import progress
from stages.ingest.formats import Columns, Conversation, Format, check_turns, guess_format, read_conversation
from stages.ingest.json_stream import Broken, read_values

SPLITS = ("train", "validation", "test")
FOLDERS = ("test", "validation")
"""Folders below the raw one whose files go whole into that split; they are read first, in this order."""
SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz")
PLACEHOLDER = re.compile(r"\{\{\s*[\w.]+\s*\}\}")
PERMUTATIONS = 128
SHINGLE = 5


class Params(Section):
    """How rows are read, checked and split."""

    formats: dict[str, Format]
    """File pattern to format, where the guess by a row's fields is wrong: {"old/*.json": alpaca}."""
    columns: Columns
    """Other names for the fields of the formats."""
    input_separator: str
    """What stands between `instruction` and `input` in the user's message; the tutorial and BELLE put nothing there."""
    group_by: str
    """A field whose rows must stay in one split (a customer, a document); "": the normalized first prompt."""
    validation_percent: float = Field(ge=0, lt=100)
    """Share of prompts that training never sees and that its progress is measured on."""
    test_percent: float = Field(ge=0, lt=100)
    """Share of prompts that nothing sees before `generate` and `score`."""
    split_seed: int
    """Another seed puts other prompts into validation and test."""
    near_duplicates: Literal["off", "count", "drop"]
    """Rows whose text is almost that of an earlier one: not looked for, counted, or set aside."""
    near_duplicate_similarity: float = Field(ge=0.5, le=0.95)
    """From which Jaccard similarity of five-character pieces two rows are near-duplicates."""
    reject_placeholders: bool
    """Whether a row with an unfilled {{placeholder}} is set aside."""
    max_chars: int = Field(gt=0)
    """A row with more characters is set aside; one such row is often a broken export."""
    max_rejected_percent: float = Field(ge=0, le=100)
    """The stage fails when a larger share of the rows is set aside."""


def ingest(params: Params, *, raw: Path, examples: Path, report: Path) -> Done:
    """Reads every JSON file below `raw` and writes train, validation, test and rejected .jsonl into `examples`.

    A row of a split: {"id", "source", "messages": [{"role", "content", ...}], and "tools" if there are any}. A row of
    rejected.jsonl: {"source", "reason", "detail", "raw"}. `report` gets the counts; read = kept + rejected and
    kept = train + validation + test are checked here. Rows are written as they are read: memory holds some hashes a row.

    Raises Problem if there is nothing to read, if a file cannot be read at all, or if too many rows are set aside.
    """
    files = _files(raw)
    books = _Books(params)
    with fresh_folder(examples) as folder, fresh_file(report) as report_file, ExitStack() as stack:
        out = {split: stack.enter_context((folder / f"{split}.jsonl").open("wb")) for split in SPLITS}
        rejected = stack.enter_context((folder / "rejected.jsonl").open("w", encoding="utf-8", newline="\n"))
        for row in progress(_read(params, raw, files), "ingest"):
            books.enter(row, out, rejected)
        counts = books.close()
        write_json(report_file, counts)
    return Done(
        f"{counts['rows_read']:,} rows read, {counts['rows_kept']:,} kept ("
        + ", ".join(f"{split} {counts[split]:,}" for split in SPLITS)
        + f"), {counts['rows_rejected']:,} set aside in {examples}/rejected.jsonl"
    )


# Reading


class Row(NamedTuple):
    """One raw row: where it is, what its file says about it, and its value."""

    file: str
    number: int
    """A line number in JSON lines, the element's place in an array; both from 1."""
    folder: str | None
    """The split that its folder asks for."""
    format: Format | None
    """The format that params.yaml gives for its file."""
    value: Any

    @property
    def source(self) -> str:
        """file:number, the file relative to the raw folder."""
        return f"{self.file}:{self.number}"


def _files(raw: Path) -> list[Path]:
    """The JSON files below `raw`, sorted by path, those of the forced splits first.

    Raises Problem if there are none, or others that would go unread.
    """
    entries = sorted(raw.rglob("*"))
    below = [path for path in entries if path.is_file()]
    visible = [path for path in below if not any(part.startswith(".") for part in path.relative_to(raw).parts)]
    files = [path for path in visible if path.name.endswith(SUFFIXES)]
    # A pointer of `dvc add` is no data.
    others = [path for path in visible if path not in files and path.suffix != ".dvc"]
    problems = [f"{path}: not one of {', '.join(SUFFIXES)}; convert it, or move it out of {raw}" for path in others]
    problems += [
        f"{path}: a link to a folder, or to nothing; put the files here, or link each of them"
        for path in entries
        if path.is_symlink() and not path.is_file()
    ]
    problems += [f"{name!r}: the name is not UTF-8; rename it" for name in map(str, below) if not _is_utf8(name)]
    if not files:
        problems.append(f"{raw}: holds no {', '.join(SUFFIXES)} file; put your data there")
    for path in files:
        try:
            path.open("rb").close()
        except PermissionError:
            problems.append(f"{path}: no permission to read it")
    if problems:
        raise Problem(*problems)
    return sorted(files, key=lambda path: (*FOLDERS, None).index(_folder(raw, path)))


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _folder(raw: Path, path: Path) -> str | None:
    first = path.relative_to(raw).parts[0]
    return first if first in FOLDERS else None


def _read(params: Params, raw: Path, files: list[Path]) -> Iterator[Row]:
    for path in files:
        name = path.relative_to(raw).as_posix()
        folder = _folder(raw, path)
        given = next((kind for pattern, kind in params.formats.items() if fnmatch.fnmatch(name, pattern)), None)
        for number, value in read_values(path):
            yield Row(name, number, folder, given, value)


# Checking


class Example(NamedTuple):
    """One conversation that is in order, and what decides its split."""

    conversation: Conversation
    format: Format
    prompt: bytes
    """Hash of the normalized first prompt: what two splits must not share."""
    group: str
    """What the split follows."""
    digest: bytes
    """Hash of all texts, normalized: equal for rows that differ at most in white space, case and character width."""
    normalized: list[str]
    """The text of each message without such differences."""


def _check(params: Params, row: Row) -> Example:
    """The conversation in a row. Raises Rejection."""
    value = row.value
    if isinstance(value, Broken):
        raise Rejection("not_json", value.detail)
    if not isinstance(value, dict):
        raise Rejection("not_an_object", f"found {type(value).__name__}")
    kind = row.format or guess_format(value, params.columns)
    conversation = read_conversation(value, kind, params.columns, params.input_separator)
    check_turns(conversation.messages, conversation.tools)
    texts = [message["content"] for message in conversation.messages]
    length = sum(map(len, texts))
    if length > params.max_chars:
        raise Rejection("too_long", f"{length} characters, ingest.max_chars is {params.max_chars}")
    if params.reject_placeholders:
        for text in texts:
            if found := PLACEHOLDER.search(text):
                raise Rejection("placeholder", found[0])
    normalized = [_normalize(text) for text in texts]
    first = next(n for n, message in enumerate(conversation.messages) if message["role"] == "user")
    prompt = normalized[first]
    group = _group(params, value, prompt)
    return Example(conversation, kind, _hash(prompt), group, _digest(conversation, normalized), normalized)


def _group(params: Params, value: dict[str, Any], prompt: str) -> str:
    if not params.group_by:
        return prompt
    if params.group_by not in value:
        raise Rejection("missing_field", params.group_by)
    try:
        return json.dumps(value[params.group_by], sort_keys=True)
    except RecursionError:
        raise Rejection("wrong_type", f"{params.group_by}: nested too deep") from None


def _digest(conversation: Conversation, normalized: list[str]) -> bytes:
    parts = []
    for message, text in zip(conversation.messages, normalized, strict=True):
        parts += [message["role"], text]
        if "tool_calls" in message:
            parts.append(json.dumps(message["tool_calls"], sort_keys=True))
    if conversation.tools:
        parts.append(json.dumps(conversation.tools, sort_keys=True))
    return _hash("\0".join(f"{len(part)} {part}" for part in parts))


def _normalize(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


# Splitting and counting


class _Books:
    """Decides each row's place, writes it there, and counts."""

    def __init__(self, params: Params) -> None:
        self.params = params
        self.groups: dict[str, str] = {}
        self.seen: dict[bytes, tuple[str, int]] = {}
        self.prompts: dict[str, set[bytes]] = {split: set() for split in SPLITS}
        self.reasons: Counter[str] = Counter()
        self.first: dict[str, str] = {}
        self.files: dict[str, Counter[str]] = {}
        self.kept: Counter[str] = Counter()
        self.read = 0
        self.near = _NearDuplicates(params) if params.near_duplicates != "off" else None

    def enter(self, row: Row, out: Mapping[str, BinaryIO], rejected: IO[str]) -> None:
        """Writes one row to a split or to the rejected ones."""
        self.read += 1
        file = self.files.setdefault(row.file, Counter())
        file["rows_read"] += 1
        try:
            example = _check(self.params, row)
            split = self._place(row, example)
        except Rejection as why:
            self.reasons[why.reason] += 1
            self.first.setdefault(why.reason, f"{row.source}: {why.detail}")
            raw = row.value.text if isinstance(row.value, Broken) else row.value
            write_line(rejected, {"source": row.source, "reason": why.reason, "detail": why.detail, "raw": raw})
            return
        self.seen[example.digest] = (row.file, row.number)
        self.prompts[split].add(example.prompt)
        self.kept[split] += 1
        file["rows_kept"] += 1
        file[example.format] += 1
        out[split].write(dump_line(_as_row(row, example)))

    def _place(self, row: Row, example: Example) -> str:
        """The split of a row. Raises Rejection if it is a duplicate, or would take its prompt into a second split."""
        twin = self.seen.get(example.digest)
        if twin:
            raise Rejection("duplicate", f"of {twin[0]}:{twin[1]}")
        home = next((split for split in SPLITS if example.prompt in self.prompts[split]), None)
        # Without groups the same prompt has the same hash, so only a forced split can lead elsewhere: the first wins.
        split = row.folder or self.groups.get(example.group) or _split_of(self.params, example.group)
        if row.folder and self.params.group_by and self.groups.setdefault(example.group, split) != split:
            raise Rejection("group_in_another_split", f"rows of its group are in {self.groups[example.group]}")
        if home and home != split:
            if self.params.group_by:
                raise Rejection("prompt_in_another_split", f"its prompt is in {home}, its group in {split}")
            split = home
        if self.near:
            self.near.enter(row.source, split, example)
        return split

    def close(self) -> dict[str, Any]:
        """The counts. Raises Problem if too many rows were set aside, or if a split is empty."""
        rejected = sum(self.reasons.values())
        kept = sum(self.kept.values())
        # If the books do not balance, it is a defect here, and nothing is written.
        assert self.read == kept + rejected
        leaks = sum(len(self.prompts[a] & self.prompts[b]) for a, b in combinations(SPLITS, 2))
        assert leaks == 0
        self._check_share(rejected)
        counts: dict[str, Any] = {
            "rows_read": self.read,
            "rows_kept": kept,
            "rows_rejected": rejected,
            "rejected_by_reason": dict(sorted(self.reasons.items())),
            "duplicates": self.reasons["duplicate"],
            **{split: self.kept[split] for split in SPLITS},
            "leaked_prompts": leaks,
        }
        if self.near:
            counts |= {"near_duplicates": self.near.found, "near_duplicate_leaks": self.near.leaks}
        return counts | {"files": {name: dict(sorted(file.items())) for name, file in sorted(self.files.items())}}

    def _check_share(self, rejected: int) -> None:
        percent = 100 * rejected / max(1, self.read)
        if percent > self.params.max_rejected_percent:
            raise Problem(
                f"{rejected} of {self.read} rows ({percent:.1f} %) would be set aside, ingest.max_rejected_percent is "
                f"{self.params.max_rejected_percent:g}",
                *(f"{why}: {count} rows, the first {self.first[why]}" for why, count in sorted(self.reasons.items())),
            )
        empty = [split for split in SPLITS if not self.kept[split]]
        if empty:
            raise Problem(
                f"no rows for {' and '.join(empty)}; add data, or change ingest.validation_percent and test_percent"
            )


def _split_of(params: Params, group: str) -> str:
    digest = hashlib.sha256(f"{params.split_seed}\n{group}".encode("utf-8", "surrogatepass")).digest()
    percent = int.from_bytes(digest[:8]) / 2**64 * 100
    if percent < params.test_percent:
        return "test"
    return "validation" if percent < params.test_percent + params.validation_percent else "train"


class _NearDuplicates:
    """Finds rows that are almost an earlier one, by MinHash (Broder 1997) with locality-sensitive hashing."""

    def __init__(self, params: Params) -> None:
        from datasketch import MinHash, MinHashLSH  # it takes a second to load, and most runs do without

        self._drop = params.near_duplicates == "drop"
        self._minhash = MinHash
        self._index = MinHashLSH(threshold=params.near_duplicate_similarity, num_perm=PERMUTATIONS)
        self._similarity = params.near_duplicate_similarity
        self._rows: dict[str, tuple[str, Any]] = {}
        self.found = 0
        self.leaks = 0

    def enter(self, source: str, split: str, example: Example) -> None:
        """Counts the row if it is near an earlier one. Raises Rejection if such rows are to be set aside."""
        text = "\n".join(example.normalized)
        sketch = self._minhash(num_perm=PERMUTATIONS)
        sketch.update_batch({text[at : at + SHINGLE].encode() for at in range(max(1, len(text) - SHINGLE + 1))})
        near = [twin for twin in self._index.query(sketch) if self._rows[twin][1].jaccard(sketch) >= self._similarity]
        if near:
            self.found += 1
            if self._drop:
                raise Rejection("near_duplicate", f"of {min(near)}")
            self.leaks += any({self._rows[twin][0], split} in ({"train", "test"}, {"train", "validation"}) for twin in near)
        self._index.insert(source, sketch)
        self._rows[source] = (split, sketch)


def _as_row(row: Row, example: Example) -> dict[str, Any]:
    messages, tools = example.conversation
    written: dict[str, Any] = {"messages": messages} | ({"tools": tools} if tools else {})
    return {"id": hashlib.sha256(dump_line(written)).hexdigest()[:16], "source": row.source, **written}
