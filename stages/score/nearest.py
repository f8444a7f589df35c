"""The baseline that a fine-tuned model must beat: the answer of the training prompt that looks most like the question."""

from array import array
from collections import defaultdict
from collections.abc import Sequence

import numpy as np


class NearestPrompt:
    """Finds, for a text, the most similar of the known texts, by the character pairs that they share (Dice's measure).

    Dice, L. R. (1945): twice the shared pairs, over the pairs of both. Among equals the first wins.
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
        """The place of the most similar known text."""
        pairs = _pairs(text)
        shared = np.zeros(len(self._sizes))
        for pair in pairs:
            if pair in self._rows:
                shared[self._rows[pair]] += 1
        return int(np.argmax(2 * shared / (self._sizes + len(pairs))))


def _pairs(text: str) -> set[str]:
    return {text[at : at + 2] for at in range(max(1, len(text) - 1))}
