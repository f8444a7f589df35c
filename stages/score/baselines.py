"""Two baselines that a fine-tuned model must beat, made from the training answers without a model.

The training file is read in parts, on all cores, and only places in it are kept: its rows need not fit into memory.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from stages.core.jsonl import parse_line
from stages.core.progress import ProgressBar
from stages.score.calls import Call, reference_calls
from stages.score.nearest import Nearest, PairSets, PromptIndex, find_pairs
from stages.score.predictions import question_of
from stages.score.workers import run_tasks

Integers: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]

PART_BYTES = 2**25
"""Bytes of the training file that one task reads."""
INDEX_CHARACTERS = 2**22
"""Characters of the prompts in one index, which takes about 60 bytes for each while it is made."""
QUESTION_CHARACTERS = 2**23
"""Characters of the questions that are looked up in one pass over the training file, about 12 bytes each."""


class TrainingAnswer(NamedTuple):
    """The last message of a training example."""

    text: str
    """The content, and a line of JSON for each call."""
    calls: list[Call]


class Baselines(NamedTuple):
    """Where in the training file the answers of the baselines stand, in bytes from its start."""

    most_frequent: int
    """The answer that most training examples have: the first of them, if there are several."""
    nearest: Integers
    """(questions,) For each question, the example with the most similar prompt: what a lookup would answer. Of several that
    are as similar, it is the first."""


class Part(NamedTuple):
    """A part of the training file, and what is known from the parts before it."""

    start: int
    end: int
    similarity: np.ndarray[Any, np.dtype[np.float64]]


class Found(NamedTuple):
    """What a part of the training file has."""

    nearest: Nearest
    """With the place of an example as its number."""
    places: Integers
    """(conversations,) Where each begins."""
    digests: Integers
    """(conversations,) A hash of 64 bits of each answer."""


def find_baselines(train: Path, questions: Iterable[str]) -> Baselines | None:
    """Looks for the answers of both baselines; None if the file has no conversation.

    The file is read in parts, on all cores, and only places in it are kept: it need not fit into memory.
    """
    most_frequent, nearest = None, []
    for texts in _groups(questions):
        with ProgressBar("nearest training prompts", train.stat().st_size, "B", unit_scale=True) as bar:
            found = _search(train, find_pairs(texts), bar)
        if found is None:
            return None
        most_frequent = found.most_frequent
        nearest.append(found.nearest)
    return None if most_frequent is None else Baselines(most_frequent, np.concatenate(nearest))


def answer_of(message: Mapping[str, Any]) -> TrainingAnswer:
    """A message of data/examples as an answer, without its thinking."""
    calls = reference_calls(message)
    lines = (json.dumps({"name": call.name, "arguments": call.arguments}, ensure_ascii=False) for call in calls)
    return TrainingAnswer("\n".join([*filter(None, [str(message["content"])]), *lines]), calls)


def _groups(questions: Iterable[str]) -> Iterator[list[str]]:
    """The questions in groups, each small enough for one pass over the training file."""
    group, characters = list[str](), 0
    for question in questions:
        group.append(question)
        characters += len(question)
        if characters >= QUESTION_CHARACTERS:
            yield group
            group, characters = [], 0
    if group:
        yield group


def _search(train: Path, questions: PairSets, bar: ProgressBar) -> Baselines | None:
    """One pass over the training file."""
    count, size = len(questions.starts) - 1, train.stat().st_size
    best = Nearest(np.zeros(count), np.full(count, -1))
    places, digests = [], []
    # A part is read as soon as a process is free, and then starts from what is known by then, which saves most of the work.
    parts = (Part(start, min(start + PART_BYTES, size), best.similarity.copy()) for start in range(0, size, PART_BYTES))
    for found in run_tasks(_search_part, parts, shared=(train, questions), alone=size <= PART_BYTES):
        better = found.nearest.similarity > best.similarity  # of equal ones, the first stays
        best.similarity[better] = found.nearest.similarity[better]
        best.number[better] = found.nearest.number[better]
        places.append(found.places)
        digests.append(found.digests)
        bar.update(min(PART_BYTES, size - bar.n))
    place = np.concatenate(places) if places else np.zeros(0, np.int64)
    if not len(place):
        return None
    _, first, counts = np.unique(np.concatenate(digests), return_index=True, return_counts=True)
    most_frequent = place[first[counts == counts.max()].min()]
    return Baselines(int(most_frequent), np.where(best.number < 0, place[0], best.number))


def _search_part(shared: tuple[Path, PairSets], part: Part) -> Found:
    train, questions = shared
    nearest = Nearest(part.similarity, np.full(len(part.similarity), -1))
    prompts, characters = list[str](), 0
    places, digests, indexed = list[int](), list[int](), 0
    for place, line in _read_part(train, part):
        example = parse_line(line)
        if "messages" not in example:  # raw text
            continue
        answer = answer_of(example["messages"][-1]).text
        places.append(place)
        digests.append(
            int.from_bytes(
                hashlib.blake2b(answer.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little", signed=True
            )
        )
        prompts.append(question_of(example))
        characters += len(prompts[-1])
        if characters >= INDEX_CHARACTERS:
            nearest = _improve(questions, nearest, prompts, places[indexed:])
            prompts, characters, indexed = [], 0, len(places)
    if prompts:
        nearest = _improve(questions, nearest, prompts, places[indexed:])
    return Found(nearest, np.array(places, np.int64), np.array(digests, np.int64))


def _improve(questions: PairSets, known: Nearest, prompts: list[str], places: list[int]) -> Nearest:
    """What is known, with the prompts that are more similar, by their places."""
    found = PromptIndex(prompts).improve(questions, known.similarity)
    better = found.number >= 0
    return Nearest(found.similarity, np.where(better, np.array(places)[found.number], known.number))


def _read_part(train: Path, part: Part) -> Iterator[tuple[int, bytes]]:
    """The lines that begin in a part, each with its place."""
    with train.open("rb") as file:
        place = part.start
        if place:
            file.seek(place - 1)
            place += len(file.readline()) - 1
        while place < part.end:
            line = file.readline()
            if line.strip():
                yield place, line
            place += len(line)
