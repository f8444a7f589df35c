"""Two baselines that a fine-tuned model must beat, made from the training answers without a model."""

import json
from array import array
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from stages.score.calls import Call, reference_calls
from stages.score.predictions import question_of


class TrainingAnswer(NamedTuple):
    """The last message of a training example."""

    text: str
    """The content, and a line of JSON for each call."""
    calls: list[Call]


def most_frequent_answer(examples: Sequence[dict[str, Any]]) -> TrainingAnswer:
    """The answer that most training examples have; the first of them if there are several."""
    answers = {answer.text: answer for answer in (answer_of(example["messages"][-1]) for example in reversed(examples))}
    return answers[Counter(answer_of(example["messages"][-1]).text for example in examples).most_common(1)[0][0]]


def nearest_answers(examples: Sequence[dict[str, Any]], questions: Sequence[str]) -> list[TrainingAnswer]:
    """For each question, the answer of the training example with the most similar prompt: what a lookup would answer."""
    nearest = NearestPrompt([question_of(example) for example in examples])
    return [answer_of(examples[nearest.find(question)]["messages"][-1]) for question in questions]


def answer_of(message: Mapping[str, Any]) -> TrainingAnswer:
    """A message of data/examples as an answer, without its thinking."""
    calls = reference_calls(message)
    lines = (json.dumps({"name": call.name, "arguments": call.arguments}, ensure_ascii=False) for call in calls)
    return TrainingAnswer("\n".join([*filter(None, [str(message["content"])]), *lines]), calls)


class NearestPrompt:
    """Finds the most similar of the known texts for a text.

    The similarity is Dice's coefficient (Dice 1945) over pairs of neighbouring characters: twice the number of shared pairs,
    divided by the number of pairs in both texts. The first text wins a tie.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self._sizes = np.zeros(len(texts))
        rows: defaultdict[str, array[int]] = defaultdict(lambda: array("L"))
        for number, text in enumerate(texts):
            pairs = _pairs(text)
            self._sizes[number] = len(pairs)
            for pair in pairs:
                rows[pair].append(number)
        self._rows = {pair: np.array(numbers) for pair, numbers in rows.items()}

    def find(self, text: str) -> int:
        """The index of the most similar known text."""
        pairs = _pairs(text)
        shared = np.zeros(len(self._sizes))
        for pair in pairs:
            if pair in self._rows:
                shared[self._rows[pair]] += 1
        return int(np.argmax(2 * shared / (self._sizes + len(pairs))))


def _pairs(text: str) -> set[str]:
    return {text[at : at + 2] for at in range(max(1, len(text) - 1))}
