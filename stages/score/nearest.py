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
FREQUENT = 16
"""Pairs that more than one text in FREQUENT has also have a row with a byte for each text, since adding such a row to the
counts is as fast as counting a list of that length."""
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
    keys = owner * len(pairs) + numbers
    keys.sort()
    keys = keys[np.concatenate([[True], keys[1:] != keys[:-1]])[: len(keys)]]  # np.unique takes four times as long
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
        found = find_pairs(texts)
        self._order = np.argsort(np.diff(found.starts), kind="stable")
        """The numbers of the texts, from the one with the fewest pairs to that with the most: their order in this index."""
        self._sizes = np.diff(found.starts)[self._order]
        """(texts,) The number of pairs of each text."""
        self._pairs = found.pairs
        ones = np.ones(len(found.numbers), np.int8)
        by_text = sparse.csr_matrix((ones, found.numbers, found.starts), (len(texts), len(found.pairs)))[self._order]
        self._numbers, self._starts = by_text.indices, by_text.indptr.astype(np.int64)
        by_pair = by_text.tocsc()
        self._texts, self._ends = by_pair.indices.astype(np.int64), by_pair.indptr
        """The texts of the first pair, then those of the second, and so on; and where those of each pair begin."""
        counts = np.diff(self._ends)
        frequent = np.flatnonzero(counts > len(texts) // FREQUENT)
        self._row_of = np.full(len(self._pairs), -1)
        self._row_of[frequent] = np.arange(len(frequent))
        self._rows = by_pair[:, frequent].T.toarray().view(np.uint8)
        """(frequent pairs, texts) 1 where a text has the pair."""
        self._costs = np.minimum(counts, len(texts) // FREQUENT + 1)
        """(pairs,) What it takes to count the texts of a pair."""
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
        found: Integers = np.minimum(np.searchsorted(self._pairs, pairs), len(self._pairs) - 1)
        found = found[self._pairs[found] == pairs]
        if 2 * len(found) / (size + len(found)) <= floor:  # also if there is none
            return 0.0, -1
        found = found[np.argsort(self._ends[found + 1] - self._ends[found], kind="stable")]
        costs = np.cumsum(self._costs[found])
        reached = floor
        if not floor:
            seeds = int(np.searchsorted(costs, SEED_PLACES)) + 1
            texts, hits = np.unique(self._texts_of(found[:seeds]), return_counts=True)
            seed = texts[[np.argmax(2 * hits / (size + self._sizes[texts]))]]
            reached = float(self._compare(found, seed, size)[0])
        # A text with none of the rarest pairs shares at most the `rest`: less than `reached` if 2 rest / (size + rest) is.
        smallest = reached * size / (2 - reached) - SLACK
        rest = min(len(found) - 1, max(0, int(np.ceil(smallest)) - 1))
        rare = len(found) - rest
        # Nor can one with so few pairs, or so many, that the similarity is less even if all pairs of the smaller are shared.
        start = int(np.searchsorted(self._sizes, smallest))
        end = int(np.searchsorted(self._sizes, size * (2 - reached) / reached + SLACK, "right"))
        shared, sizes = self._count(found[:rare], start, end), self._sizes[start:end]
        candidates = np.flatnonzero(shared >= (reached / 2) * sizes + (reached * size / 2 - rest - SLACK))
        if not len(candidates):
            return 0.0, -1
        if sizes[candidates].sum() < costs[-1] - costs[rare - 1]:
            similarities = self._compare(found, start + candidates, size)
        else:
            all_shared = (shared + self._count(found[rare:], start, end))[candidates]
            similarities = 2 * all_shared / (size + sizes[candidates])
        best = similarities.max()
        return float(best), int(self._order[start + candidates[similarities == best]].min())

    def _count(self, pairs: Integers, start: int, end: int) -> Integers:
        """(end - start,) How many of the pairs each of these texts has."""
        rows = self._row_of[pairs]
        lists = pairs[rows < 0]
        shared = np.bincount(self._texts_of(lists) if len(lists) else lists, minlength=len(self._sizes))[start:end]
        rows = rows[rows >= 0]
        for at in range(0, len(rows), 255):  # as many as a byte can count
            shared += self._rows[rows[at : at + 255], start:end].sum(0, dtype=np.uint8)
        return shared

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
