"""Two baselines that a fine-tuned model must beat, made from the training answers without a model."""

from array import array
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from stages.score.predictions import question_of


def most_frequent_answer(examples: Sequence[dict[str, Any]]) -> str:
    """The answer that most training examples have; the first of them if there are several."""
    return Counter(_answer_of(example) for example in examples).most_common(1)[0][0]


def nearest_answers(examples: Sequence[dict[str, Any]], questions: Sequence[str]) -> list[str]:
    """For each question, the answer of the training example with the most similar prompt: what a lookup would answer."""
    nearest = NearestPrompt([question_of(example) for example in examples])
    return [_answer_of(examples[nearest.find(question)]) for question in questions]


def _answer_of(example: dict[str, Any]) -> str:
    return str(example["messages"][-1]["content"])


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
