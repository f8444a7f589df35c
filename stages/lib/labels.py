"""The labels of token rows, and what is learned by default."""

from collections.abc import Sequence

IGNORE = -100
"""The label that the loss leaves out (PyTorch's `ignore_index`)."""


def make_labels(input_ids: Sequence[int], ranges: Sequence[tuple[int, int]]) -> list[int]:
    """The labels of one row: the token's id in the ranges [first, last), IGNORE elsewhere."""
    labels = [IGNORE] * len(input_ids)
    for first, last in ranges:
        labels[first:last] = input_ids[first:last]
    return labels
