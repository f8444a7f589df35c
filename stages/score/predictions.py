"""Reads the answers of both models, and checks that they belong to the same test rows.

Of the rows only their ids and their places in the files are kept; a row is read again when it is scored or shown.
"""

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

from stages.core.jsonl import parse_line
from stages.core.problem import Problem
from stages.score.calls import Call, recovers, reference_calls
from stages.score.perplexity import TextLoss
from stages.score.systems import MODELS
from stages.score.thinking import SplitAnswer, split_thinking

SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
"""A character outside the BMP, or one half of it, as JSON may write it."""
LISTED_LINES = 5
"""Damaged lines that are listed for each file; the rest are counted."""


@dataclass(frozen=True)
class Prediction:
    """One line of a predictions file: a model's answer to one prompt."""

    id: str
    prompt: str
    """The prompt as the model reads it, rendered with the chat template."""
    reference: str
    answer: str
    finish_reason: str
    """Why the answer ended: "stop" (the model ended it) or "length" (cut at generate.max_new_tokens)."""

    @cached_property
    def split(self) -> SplitAnswer:
        """The answer's thinking, and what stands behind it."""
        return split_thinking(self.answer, self.prompt)

    @cached_property
    def split_reference(self) -> SplitAnswer:
        """The same of the reference."""
        return split_thinking(self.reference, self.prompt)


R = TypeVar("R", Prediction, TextLoss)
K = TypeVar("K")
FIELDS = tuple(field.name for field in dataclasses.fields(Prediction))


@dataclass(frozen=True)
class PredictedRow:
    """A test row with the answers of both models."""

    source: str
    """File and position of the raw row, "zh.json:17"."""
    question: str
    """The prompt as a person reads it."""
    message: dict[str, Any]
    """The reference answer as data/examples has it."""
    has_tools: bool
    """Whether the conversation has tools, or calls of tools."""
    base: Prediction
    merged: Prediction

    @property
    def reference(self) -> SplitAnswer:
        """The reference answer as the template writes it."""
        return self.merged.split_reference

    @cached_property
    def wanted_calls(self) -> list[Call] | None:
        """The calls of the reference. None if the row has no tools, or if its text does not show these calls.

        Where the calls of the reference cannot be read from its text, those of an answer cannot be either.
        """
        calls = reference_calls(self.message)
        return calls if self.has_tools and recovers(self.reference.answer, calls) else None


class RowLines(NamedTuple):
    """The lines of a test row, not yet parsed."""

    id: str
    example: bytes
    base: bytes
    merged: bytes

    def parse(self) -> PredictedRow:
        """The row. Its lines were checked when the files were read."""
        example = parse_line(self.example)
        messages = example["messages"]
        index = _answer_index(example, self.id)
        assert index is not None  # otherwise its id is unknown
        base, merged = (_parse(line) for line in (self.base, self.merged))
        assert isinstance(base, Prediction)
        assert isinstance(merged, Prediction)
        return PredictedRow(
            source=example["source"],
            question=question_of(example, index),
            message=messages[index],
            has_tools=bool(example.get("tools")) or any(message.get("tool_calls") for message in messages),
            base=base,
            merged=merged,
        )


class PredictedRows(Sequence[PredictedRow]):
    """The test rows that both models answered, in the order of the merged model's file, read on access."""

    def __init__(self, examples: Path, base: Path, merged: Path, places: Mapping[str, tuple[int, int, int]]) -> None:
        """`places` has for each id where its lines begin in the three files."""
        self._paths, self._places = (examples, base, merged), list(places.values())
        self.ids = list(places)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, at: Any) -> Any:
        """A row, or the list of those of a slice."""
        numbers = range(len(self))[at]
        rows = [lines.parse() for lines in self.lines([numbers] if isinstance(numbers, int) else numbers)]
        return rows[0] if isinstance(numbers, int) else rows

    def lines(self, numbers: Iterable[int] | None = None) -> Iterator[RowLines]:
        """The lines of the rows with these numbers, or of all."""
        with ExitStack() as stack:
            files = [stack.enter_context(path.open("rb")) for path in self._paths]
            for number in range(len(self)) if numbers is None else numbers:
                lines = (line_at(file, place) for file, place in zip(files, self._places[number], strict=True))
                yield RowLines(self.ids[number], *lines)

    def questions(self) -> Iterator[str]:
        """The prompt of each row as a person reads it."""
        with self._paths[0].open("rb") as file:
            for id, (place, _, _) in zip(self.ids, self._places, strict=True):
                example = parse_line(line_at(file, place))
                yield question_of(example, _answer_index(example, id))


class Predictions(NamedTuple):
    """What both models answered."""

    rows: PredictedRows
    extra: list[tuple[Prediction, Prediction]]
    """The answers of base and merged model to each prompt of data/prompts.json, which are shown and not scored."""
    text_losses: dict[str, list[TextLoss]]
    """"base" and "merged" → the losses on the windows of raw text, in the same order; empty if there are none."""
    texts: int
    """Raw texts of the test split, with and without losses."""


def read_predictions(
    predictions: Mapping[str, Path],
    extra: Mapping[str, Path],
    text: Mapping[str, Path],
    *,
    test_examples: Path,
    test_rows: int,
) -> Predictions:
    """Reads the files of `generate` and pairs what they have of the two models by id.

    Args:
        predictions: "base" and "merged" → the answers to the test prompts.
        extra: The same for the prompts of data/prompts.json. These files may be empty.
        text: "base" and "merged" → the losses on raw text. These files may be empty.
        test_examples: data/examples/test.jsonl, for the prompts as a person reads them.
        test_rows: Number of test prompts that `encode` wrote; `generate` may have answered fewer.

    Raises Problem if a file is damaged, or if the files do not answer the same prompts.
    """
    problems: list[str] = []
    answers = {model: _read_file(predictions[model], _parse, _place_of, model=model, problems=problems) for model in MODELS}
    problems += [
        f"{predictions[model]}: empty, wanted {test_rows} rows; {_remedy(model)}"
        for model in MODELS
        if test_rows and predictions[model].stat().st_size <= 1
    ]
    extra_answers = {
        model: _read_file(extra[model], _parse, lambda row, _: row, model=model, problems=problems) for model in MODELS
    }
    losses = {
        model: _read_file(text[model], _parse_loss, lambda row, _: row, model=model, problems=problems) for model in MODELS
    }
    if problems:  # what is missing from a damaged file would be reported a second time below
        raise Problem(*problems)
    examples, texts = _find_examples(test_examples, answers)
    for model in MODELS:
        path, found = predictions[model], answers[model]
        unknown = sorted(id for id in found if id not in examples)
        if unknown:
            problems.append(
                f"{path}: {len(unknown)} rows are not in {test_examples}, the first is {unknown[0]}; {_remedy(model)}"
            )
    problems += _find_differences(predictions, answers)
    problems += _find_differences(extra, extra_answers)
    problems += _find_text_differences(text, losses)
    if problems:
        raise Problem(*problems)
    places = {id: (examples[id], answers["base"][id].at, row.at) for id, row in answers["merged"].items()}
    return Predictions(
        PredictedRows(test_examples, predictions["base"], predictions["merged"], places),
        [(extra_answers["base"][id], merged) for id, merged in extra_answers["merged"].items()],
        {model: [losses[model][id] for id in losses["merged"]] for model in MODELS},
        texts,
    )


def question_of(example: dict[str, Any], index: int | None = -1) -> str:
    """The messages of an example before the answer at `index`, as text."""
    return "\n".join(message["content"] for message in example["messages"][:index])


def line_at(file: IO[bytes], place: int) -> bytes:
    """The line that begins at a place of a file."""
    file.seek(place)
    return file.readline()


class _Place(NamedTuple):
    """Where a prediction stands, and a hash of its reference."""

    at: int
    reference: bytes


def _place_of(row: Prediction, at: int) -> _Place:
    return _Place(at, hashlib.blake2b(row.reference.encode(), digest_size=8).digest())


def _find_examples(path: Path, answers: Mapping[str, Mapping[str, _Place]]) -> tuple[dict[str, int], int]:
    """The id of each answered row → where its conversation begins in data/examples/test.jsonl; and the number of raw texts.

    The row <id>.<n> is in the conversation <id>, if none has the whole name.
    """
    wanted = set().union(*answers.values())
    parts: dict[str, list[str]] = {}
    for id in wanted:
        name, _, number = id.rpartition(".")
        if name and number.isdigit():
            parts.setdefault(name, []).append(id)
    whole, of_parts, texts, at = dict[str, int](), dict[str, int](), 0, 0
    with path.open("rb") as file:
        for line in file:
            example = parse_line(line) if line.strip() else {}
            texts += "text" in example
            if "messages" in example:
                name = example["id"]
                if name in wanted:
                    whole[name] = at
                of_parts |= {id: at for id in parts.get(name, ()) if _answer_index(example, id) is not None}
            at += len(line)
    return of_parts | whole, texts


def _answer_index(example: dict[str, Any], id: str) -> int | None:
    """The index of the message that a row answers: the last, or for "<id>.<n>" answer n. None if there is none."""
    if id == example["id"]:
        return -1
    number = id.rpartition(".")[2]
    answers = [at for at, message in enumerate(example["messages"]) if message["role"] == "assistant"]
    return answers[int(number) - 1] if number.isdigit() and 0 < int(number) <= len(answers) else None


def _read_file(
    path: Path, parse: Callable[[bytes], R | str], keep: Callable[[R, int], K], *, model: str, problems: list[str]
) -> dict[str, K]:
    """What `keep` makes of each line of a file and its place, by id. Adds a message to `problems` for each damaged line."""
    found: dict[str, K] = {}
    damaged, at = list[str](), 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            result = parse(line.removesuffix(b"\n")) if line != b"\n" else None
            if result is not None and not isinstance(result, str) and result.id in found:
                result = f"the id {result.id} is in an earlier line too"
            if isinstance(result, str):
                cut = "" if line.endswith(b"\n") else " (cut off: the file does not end with a line break)"
                damaged.append(f"{path}: line {number}: {result}{cut}; {_remedy(model)}")
            elif result is not None:
                found[result.id] = keep(result, at)
            at += len(line)
    problems += damaged[:LISTED_LINES]
    if len(damaged) > LISTED_LINES:
        problems.append(f"{path}: {len(damaged) - LISTED_LINES} more lines are damaged; {_remedy(model)}")
    return found


def _parse(line: bytes) -> Prediction | str:
    """The prediction in one line, or what is wrong with the line."""
    row = _parse_fields(line, FIELDS)
    if isinstance(row, str):
        return row
    not_text = [field for field in FIELDS if not isinstance(row[field], str)]
    if not_text:
        return f"wanted text in {', '.join(not_text)}, found {', '.join(json.dumps(row[field])[:40] for field in not_text)}"
    return Prediction(**{field: row[field] for field in FIELDS})


def _parse_loss(line: bytes) -> TextLoss | str:
    """The losses of one window, or what is wrong with the line."""
    row = _parse_fields(line, ("id", "tokens", "loss"))
    if isinstance(row, str):
        return row
    match row:
        case {"id": str(id), "tokens": int(tokens), "loss": float(loss) | int(loss)} if tokens >= 0 and math.isfinite(loss):
            return TextLoss(id, tokens, loss)
    return "wanted a text in id, and numbers in tokens and loss"


def _parse_fields(line: bytes, fields: Sequence[str]) -> dict[str, Any] | str:
    try:
        row = json.loads(line.decode())
    except (ValueError, RecursionError):
        return "not valid JSON"
    if not isinstance(row, dict):
        return "not a JSON object"
    missing = [field for field in fields if field not in row]
    if missing:
        return f"lacks {', '.join(missing)}"
    halves = [field for field in fields if _has_lone_surrogate(row[field])] if SURROGATE.search(line) else []
    return f"has a lone surrogate, which is no character, in {', '.join(halves)}" if halves else row


def _has_lone_surrogate(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


def _find_differences(paths: Mapping[str, Path], answers: Mapping[str, Mapping[str, _Place | Prediction]]) -> list[str]:
    """The prompts that only one model answered, or that have two references."""
    base, merged = answers["base"], answers["merged"]
    files = f"{paths['base']} and {paths['merged']}"
    found = []
    single = sorted(set(base) ^ set(merged))
    if single:
        found.append(f"{files}: {len(single)} rows are in only one of the files, the first is {single[0]}; {_remedy()}")
    edited = sorted(id for id in set(base) & set(merged) if base[id].reference != merged[id].reference)
    if edited:
        found.append(f"{files}: {len(edited)} rows differ in `reference`, the first is {edited[0]}; {_remedy()}")
    return found


def _find_text_differences(paths: Mapping[str, Path], losses: Mapping[str, Mapping[str, TextLoss]]) -> list[str]:
    """The windows of raw text that only one model has, or that have another number of tokens."""
    base, merged = losses["base"], losses["merged"]
    tokens = [{id: row.tokens for id, row in rows.items()} for rows in (base, merged)]
    wrong = sorted({id for id, _ in tokens[0].items() ^ tokens[1].items()})
    if not wrong:
        return []
    files = f"{paths['base']} and {paths['merged']}"
    return [f"{files}: {len(wrong)} windows of raw text differ, the first is {wrong[0]}; {_remedy()}"]


def _remedy(model: str = "") -> str:
    # -s runs this stage alone; with -f but without -s, dvc would train again too.
    return f"generate the answers again: dvc repro -f -s generate{model and f'@{model}'}"
