"""Finds the most similar of many texts for many others: exactly, in bounded memory, without comparing all pairs of them.

The similarity is Dice's coefficient (Dice 1945) over pairs of neighbouring characters: twice the number of shared pairs,
divided by the number of pairs in both texts.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from scipy import sparse  # type: ignore[import-untyped]

Integers: TypeAlias = np.ndarray[Any, np.dtype[np.integer[Any]]]
Floats: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]

BITS = 21
"""A character has at most 21 bits; a pair of them is one integer of 42."""
NOTHING = 2**BITS - 1
"""Stands in the place of a character that a text of fewer than two does not have."""
SEED_PLACES = 2000
"""Places of the rarest pairs at which a first similar text is looked for."""
SLACK = 1e-6
"""What the bound of a candidate may lack by rounding."""


class PairSets(NamedTuple):
    """The different pairs of neighbouring characters in each of some texts."""

    pairs: Integers
    """(distinct,) int64, sorted."""
    numbers: Integers
    """(occurrences,) For one text after the other, the positions of its pairs in `pairs`."""
    starts: Integers
    """(texts + 1,) Where the pairs of each text begin in `numbers`."""


def find_pairs(texts: Sequence[str]) -> PairSets:
    """The pairs of each text. That of a single character, or of an empty text, is this text itself."""
    count = len(texts)
    lengths = np.fromiter(map(len, texts), np.int64, count)
    characters = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.int64)
    owner = np.repeat(np.arange(count), lengths)
    within = owner[:-1] == owner[1:]
    short = np.flatnonzero(lengths < 2)
    single = np.full(len(short), NOTHING)
    single[lengths[short] == 1] = characters[np.cumsum(lengths)[short[lengths[short] == 1]] - 1]
    pairs = np.concatenate([(characters[:-1] << BITS | characters[1:])[within], single << BITS | NOTHING])
    owner = np.concatenate([owner[:-1][within], short])
    del characters, within
    pairs, numbers = np.unique(pairs, return_inverse=True)
    keys = np.unique(owner * len(pairs) + numbers)
    owner, numbers = np.divmod(keys, max(1, len(pairs)))
    starts = np.concatenate([[0], np.cumsum(np.bincount(owner, minlength=count))])
    return PairSets(pairs, numbers.astype(np.int32), starts)


class Nearest(NamedTuple):
    """The most similar known text of each question."""

    similarity: Floats
    """(questions,) 0 if no text has a pair in common with the question."""
    number: Integers
    """(questions,) The number of the text, of the first of several that are as similar; -1 if there is none."""


class PromptIndex:
    """Known texts, by the pairs that they have."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._pairs, self._numbers, self._starts = find_pairs(texts)
        self._sizes = np.diff(self._starts)
        """(texts,) The number of pairs of each text."""
        ones = np.ones(len(self._numbers), np.int8)
        by_pair = sparse.csr_matrix((ones, self._numbers, self._starts), (len(texts), len(self._pairs))).tocsc()
        self._texts, self._ends = by_pair.indices, by_pair.indptr
        """The texts of the first pair, then those of the second, and so on; and where those of each pair begin."""
        self._wanted = np.zeros(len(self._pairs), bool)

    def improve(self, questions: PairSets, known: Floats) -> Nearest:
        """The text of this index that is nearest to each question, if it is more similar than what is `known` already.

        Otherwise the similarity is the known one, and the number -1.
        """
        similarity, number = known.copy(), np.full(len(known), -1)
        for at, floor in enumerate(known.tolist()):
            pairs = questions.pairs[questions.numbers[questions.starts[at] : questions.starts[at + 1]]]
            found = self._find(pairs, floor)
            if found[0] > floor:
                similarity[at], number[at] = found
        return Nearest(similarity, number)

    def _find(self, pairs: Integers, floor: float) -> tuple[float, int]:
        """The similarity and number of the text that is most similar to one with these pairs; 0 and -1 if none is
        above `floor`.

        The texts of the rarest pairs are counted first. A text without any of these shares at most the others, which are
        the ones with long lists, so that most of these are never looked at.
        """
        size = len(pairs)
        found = np.minimum(np.searchsorted(self._pairs, pairs), len(self._pairs) - 1)
        found = found[self._pairs[found] == pairs]
        if 2 * len(found) / (size + len(found)) <= floor:  # also if there is none
            return 0.0, -1
        counts = self._ends[found + 1] - self._ends[found]
        order = np.argsort(counts, kind="stable")
        found, totals = found[order], np.cumsum(counts[order])
        reached = floor
        if not floor:
            seeds = int(np.searchsorted(totals, SEED_PLACES)) + 1
            texts, shared = np.unique(self._texts_of(found[:seeds]), return_counts=True)
            seed = texts[[np.argmax(2 * shared / (size + self._sizes[texts]))]]
            reached = float(self._compare(found, seed, size)[0])
        # A text with none of the rarest pairs shares at most the `rest`: less than `reached` if 2 rest / (size + rest) is.
        smallest = reached * size / (2 - reached) - SLACK
        rest = min(len(found) - 1, max(0, int(np.ceil(smallest)) - 1))
        rare = len(found) - rest
        shared = np.bincount(self._texts_of(found[:rare]), minlength=len(self._sizes))
        candidates = np.flatnonzero(shared >= (reached / 2) * self._sizes + (reached * size / 2 - rest - SLACK))
        candidates = candidates[self._sizes[candidates] >= smallest]
        if not len(candidates):
            return 0.0, -1
        if self._sizes[candidates].sum() < totals[-1] - totals[rare - 1]:
            similarities = self._compare(found, candidates, size)
        else:
            if rest:
                shared += np.bincount(self._texts_of(found[rare:]), minlength=len(self._sizes))
            similarities = 2 * shared[candidates] / (size + self._sizes[candidates])
        best = np.argmax(similarities)
        return float(similarities[best]), int(candidates[best])

    def _texts_of(self, pairs: Integers) -> Integers:
        """The texts of each pair, one list after the other."""
        return np.concatenate([self._texts[self._ends[pair] : self._ends[pair + 1]] for pair in pairs])

    def _compare(self, pairs: Integers, texts: Integers, size: int) -> Floats:
        """The similarity of some texts to one with `size` pairs, of which this index knows `pairs`."""
        sizes = self._sizes[texts]
        ends = np.cumsum(sizes)
        places = np.arange(ends[-1]) + np.repeat(self._starts[texts] - ends + sizes, sizes)
        self._wanted[pairs] = True
        shared = np.add.reduceat(self._wanted[self._numbers[places]], ends - sizes, dtype=np.int64)
        self._wanted[pairs] = False
        similarities: Floats = 2 * shared / (size + sizes)
        return similarities
