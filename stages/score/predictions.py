"""Reads the answers of both models, and checks that they belong to the same test rows."""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from stages.core.jsonl import read_jsonl
from stages.core.problem import Problem
from stages.score.calls import Call, recovers, reference_calls
from stages.score.perplexity import TextLoss
from stages.score.systems import MODELS
from stages.score.thinking import SplitAnswer, split_thinking

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


class Predictions(NamedTuple):
    """What both models answered."""

    rows: list[PredictedRow]
    """One for each test row, in the order of the merged model's file."""
    extra: list[tuple[Prediction, Prediction]]
    """The answers of base and merged model to each prompt of data/prompts.json, which are shown and not scored."""
    text_losses: dict[str, list[TextLoss]]
    """"base" and "merged" → the losses on the windows of raw text, in the same order; empty if there are none."""


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
        test_rows: Number of test prompts that `encode` wrote.

    Raises Problem if a file is damaged, or if the files do not answer the same prompts.
    """
    problems: list[str] = []
    answers = {model: _read_file(predictions[model], _parse, model, problems=problems) for model in MODELS}
    problems += [
        f"{predictions[model]}: empty, wanted {test_rows} rows; {_remedy(model)}"
        for model in MODELS
        if test_rows and predictions[model].stat().st_size <= 1
    ]
    extra_answers = {model: _read_file(extra[model], _parse, model, problems=problems) for model in MODELS}
    losses = {model: _read_file(text[model], _parse_loss, model, problems=problems) for model in MODELS}
    if problems:  # what is missing from a damaged file would be reported a second time below
        raise Problem(*problems)
    examples = {example["id"]: example for example in read_jsonl(test_examples)}
    for model in MODELS:
        path, found = predictions[model], answers[model]
        unknown = sorted(id for id in found if _find_example(examples, id) is None)
        if unknown:
            problems.append(
                f"{path}: {len(unknown)} rows are not in {test_examples}, the first is {unknown[0]}; {_remedy(model)}"
            )
        if len(found) < test_rows:
            problems.append(f"{path}: {len(found)} rows, but there are {test_rows} test prompts; {_remedy(model)}")
    problems += _find_differences(predictions, answers)
    problems += _find_differences(extra, extra_answers)
    problems += _find_text_differences(text, losses)
    if problems:
        raise Problem(*problems)
    rows = []
    for id, merged in answers["merged"].items():
        place = _find_example(examples, id)
        assert place is not None  # otherwise its id is unknown
        example, index = place
        messages = example["messages"]
        rows.append(
            PredictedRow(
                source=example["source"],
                question=question_of(example, index),
                message=messages[index],
                has_tools=bool(example.get("tools")) or any(message.get("tool_calls") for message in messages),
                base=answers["base"][id],
                merged=merged,
            )
        )
    return Predictions(
        rows,
        [(extra_answers["base"][id], merged) for id, merged in extra_answers["merged"].items()],
        {model: [losses[model][id] for id in losses["merged"]] for model in MODELS},
    )


def question_of(example: dict[str, Any], index: int = -1) -> str:
    """The messages of an example before the answer at `index`, as text."""
    return "\n".join(message["content"] for message in example["messages"][:index])


def _find_example(examples: Mapping[str, dict[str, Any]], id: str) -> tuple[dict[str, Any], int] | None:
    """The conversation of a row, and the index of the message that it answers: the last, or for "<id>.<n>" answer n."""
    if id in examples:
        return (examples[id], -1) if "messages" in examples[id] else None
    name, _, number = id.rpartition(".")
    if name not in examples or not number.isdigit():
        return None
    answers = [at for at, message in enumerate(examples[name].get("messages", [])) if message["role"] == "assistant"]
    return (examples[name], answers[int(number) - 1]) if 0 < int(number) <= len(answers) else None


def _read_file(path: Path, parse: Callable[[bytes], R | str], model: str, *, problems: list[str]) -> dict[str, R]:
    """The lines of a file by id. Adds a message to `problems` for each damaged line."""
    lines = path.read_bytes().split(b"\n")
    found: dict[str, R] = {}
    damaged = []
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        result = parse(line)
        if not isinstance(result, str):
            found[result.id] = result
        else:
            cut = " (cut off: the file does not end with a line break)" if number == len(lines) else ""
            damaged.append(f"{path}: line {number}: {result}{cut}; {_remedy(model)}")
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
    return f"lacks {', '.join(missing)}" if missing else row


def _find_differences(paths: Mapping[str, Path], answers: dict[str, dict[str, Prediction]]) -> list[str]:
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
