"""Reads the answers of both models, and checks that they belong to the same test rows."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from stages.core.jsonl import read_jsonl
from stages.core.problem import Problem
from stages.score.systems import MODELS

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


FIELDS = tuple(field.name for field in dataclasses.fields(Prediction))


@dataclass(frozen=True)
class PredictedRow:
    """A test row with the answers of both models."""

    source: str
    """File and position of the raw row, "zh.json:17"."""
    question: str
    """The prompt as a person reads it."""
    reference: str
    base: Prediction
    merged: Prediction


class Predictions(NamedTuple):
    """What both models answered."""

    rows: list[PredictedRow]
    """One for each test row, in the order of the merged model's file."""
    extra: list[tuple[Prediction, Prediction]]
    """The answers of base and merged model to each prompt of data/prompts.json, which are shown and not scored."""


def read_predictions(
    predictions: Mapping[str, Path], extra: Mapping[str, Path], *, test_examples: Path, test_rows: int
) -> Predictions:
    """Reads the four prediction files and pairs the answers of the two models by id.

    Args:
        predictions: "base" and "merged" → the answers to the test prompts.
        extra: The same for the prompts of data/prompts.json. These files may be empty.
        test_examples: data/examples/test.jsonl, for the prompts as a person reads them.
        test_rows: Number of test prompts that `encode` wrote.

    Raises Problem if a file is damaged, or if the files do not answer the same prompts.
    """
    problems: list[str] = []
    answers = {model: _read_file(predictions[model], model, problems=problems) for model in MODELS}
    problems += [
        f"{predictions[model]}: empty, wanted {test_rows} rows; {_remedy(model)}"
        for model in MODELS
        if test_rows and not predictions[model].stat().st_size
    ]
    extra_answers = {model: _read_file(extra[model], model, problems=problems) for model in MODELS}
    if problems:  # what is missing from a damaged file would be reported a second time below
        raise Problem(*problems)
    examples = {example["id"]: example for example in read_jsonl(test_examples)}
    for model in MODELS:
        path, found = predictions[model], answers[model]
        unknown = sorted(set(found) - set(examples))
        if unknown:
            problems.append(
                f"{path}: {len(unknown)} rows are not in {test_examples}, the first is {unknown[0]}; {_remedy(model)}"
            )
        if len(found) < test_rows:
            problems.append(f"{path}: {len(found)} rows, but there are {test_rows} test prompts; {_remedy(model)}")
    problems += _find_differences(predictions, answers)
    problems += _find_differences(extra, extra_answers)
    if problems:
        raise Problem(*problems)
    rows = [
        PredictedRow(
            source=examples[id]["source"],
            question=question_of(examples[id]),
            reference=merged.reference,
            base=answers["base"][id],
            merged=merged,
        )
        for id, merged in answers["merged"].items()
    ]
    return Predictions(rows, [(extra_answers["base"][id], merged) for id, merged in extra_answers["merged"].items()])


def question_of(example: dict[str, Any]) -> str:
    """The messages of an example before its last answer, as text."""
    return "\n".join(message["content"] for message in example["messages"][:-1])


def _read_file(path: Path, model: str, *, problems: list[str]) -> dict[str, Prediction]:
    """The predictions by id. Adds a message to `problems` for each damaged line."""
    lines = path.read_bytes().split(b"\n")
    found: dict[str, Prediction] = {}
    damaged = []
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        result = _parse(line)
        if isinstance(result, Prediction):
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
    try:
        row = json.loads(line.decode())
    except (ValueError, RecursionError):
        return "not valid JSON"
    if not isinstance(row, dict):
        return "not a JSON object"
    missing = [field for field in FIELDS if field not in row]
    if missing:
        return f"lacks {', '.join(missing)}"
    not_text = [field for field in FIELDS if not isinstance(row[field], str)]
    if not_text:
        return f"wanted text in {', '.join(not_text)}, found {', '.join(json.dumps(row[field])[:40] for field in not_text)}"
    return Prediction(**{field: row[field] for field in FIELDS})


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


def _remedy(model: str = "") -> str:
    # -s runs this stage alone; with -f but without -s, dvc would train again too.
    return f"generate the answers again: dvc repro -f -s generate{model and f'@{model}'}"
