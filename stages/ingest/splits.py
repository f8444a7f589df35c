"""Decides the split of each example. No prompt is in two splits, and new rows do not move old ones."""

import hashlib
from itertools import combinations

from stages.core.problem import Rejection
from stages.ingest.example import Example

SPLITS = ("train", "validation", "test")


class Splits:
    """Computes splits from a hash of the group, and remembers which prompts each split has."""

    def __init__(self, *, seed: int, validation_percent: float, test_percent: float, grouped: bool) -> None:
        """`grouped`: whether the groups come from a field of the rows; otherwise each prompt is its own group."""
        self._seed = seed
        self._validation_percent = validation_percent
        self._test_percent = test_percent
        self._grouped = grouped
        self._forced_groups: dict[str, str] = {}
        self._prompts: dict[str, set[bytes]] = {split: set() for split in SPLITS}

    def choose(self, example: Example, *, forced: str | None) -> str:
        """The split of an example; `forced` is the one that its folder names.

        Raises Rejection if its prompt or its group is in another split already.
        """
        split = forced or self._forced_groups.get(example.group) or self._hashed_split(example.group)
        if forced and self._grouped:
            group_split = self._forced_groups.setdefault(example.group, forced)
            if group_split != forced:
                raise Rejection("group_in_another_split", f"rows of its group are in {group_split}")
        prompt_split = next((name for name in SPLITS if example.prompt in self._prompts[name]), None)
        if prompt_split is None or prompt_split == split:
            return split
        if self._grouped:
            raise Rejection("prompt_in_another_split", f"its prompt is in {prompt_split}, its group in {split}")
        # Equal prompts have equal hashes, so this prompt was in a forced split. Its other rows follow.
        return prompt_split

    def add(self, example: Example, split: str) -> None:
        """Records that an example was kept in a split."""
        self._prompts[split].add(example.prompt)

    def count_leaked_prompts(self) -> int:
        """The number of prompts that are in two splits."""
        return sum(len(self._prompts[a] & self._prompts[b]) for a, b in combinations(SPLITS, 2))

    def _hashed_split(self, group: str) -> str:
        digest = hashlib.sha256(f"{self._seed}\n{group}".encode("utf-8", "surrogatepass")).digest()
        percent = int.from_bytes(digest[:8]) / 2**64 * 100
        if percent < self._test_percent:
            return "test"
        return "validation" if percent < self._test_percent + self._validation_percent else "train"
