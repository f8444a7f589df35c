"""Finds rows that are equal, or almost equal, to an earlier row."""

from typing import Any

from stages.core.problem import Rejection
from stages.ingest.example import Example

SIMILARITY = 0.85
"""Two rows are near-duplicates if the Jaccard similarity of their shingles is at least this."""
SHINGLE_CHARS = 5
"""A shingle is a substring of this length."""
PERMUTATIONS = 128
"""Hash functions of a MinHash sketch; the estimated similarity has a standard error of at most 0.5 / sqrt(128) = 0.044."""


class Duplicates:
    """Rejects rows whose complete conversation is equal to an earlier one."""

    def __init__(self) -> None:
        self._sources: dict[bytes, str] = {}

    def check(self, example: Example) -> None:
        """Raises Rejection if an equal example was added before."""
        if earlier := self._sources.get(example.digest):
            raise Rejection("duplicate", f"of {earlier}")

    def add(self, example: Example, source: str) -> None:
        """Records an example that was kept."""
        self._sources[example.digest] = source


class NearDuplicates:
    """Counts or rejects rows that are similar to an earlier one, by MinHash (Broder 1997) and locality-sensitive hashing."""

    def __init__(self, *, drop: bool) -> None:
        from datasketch import MinHash, MinHashLSH  # takes a second to import, and most runs do not need it

        self._drop = drop
        self._new_sketch = MinHash
        self._index = MinHashLSH(threshold=SIMILARITY, num_perm=PERMUTATIONS)
        self._sketches: dict[str, Any] = {}
        self._splits: dict[str, str] = {}
        self._found = 0
        self._leaks = 0

    def add(self, example: Example, source: str, *, split: str) -> None:
        """Compares an example with all earlier ones and records it. Raises Rejection if near-duplicates are dropped."""
        sketch = self._sketch("\n".join(example.texts))
        # The index proposes candidates; their estimated similarity decides.
        similar = [other for other in self._index.query(sketch) if self._sketches[other].jaccard(sketch) >= SIMILARITY]
        if similar:
            self._found += 1
            if self._drop:
                raise Rejection("near_duplicate", f"of {min(similar)}")
            self._leaks += any((self._splits[other] == "train") != (split == "train") for other in similar)
        self._index.insert(source, sketch)
        self._sketches[source] = sketch
        self._splits[source] = split

    def counts(self) -> dict[str, int]:
        """Near-duplicates, and how many of them have one row in train and a similar one in validation or test."""
        return {"near_duplicates": self._found, "near_duplicate_leaks": self._leaks}

    def _sketch(self, text: str) -> Any:
        sketch = self._new_sketch(num_perm=PERMUTATIONS)
        starts = range(max(1, len(text) - SHINGLE_CHARS + 1))
        sketch.update_batch({text[start : start + SHINGLE_CHARS].encode() for start in starts})
        return sketch
