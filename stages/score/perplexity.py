"""The perplexity of both models on the raw text of the test split."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from stages.score.intervals import Floats, Interval, resampled_interval


@dataclass(frozen=True)
class TextLoss:
    """One line of a file of losses: a window of raw text."""

    id: str
    """The document's id; "<id>.<n>" if it has several windows, n from 1."""
    tokens: int
    """Tokens with a loss."""
    loss: float
    """The sum of their losses in nats."""

    @property
    def document(self) -> str:
        """The id of the document."""
        document, _, number = self.id.rpartition(".")
        return document if document and number.isdigit() else self.id


class Perplexity(NamedTuple):
    """exp(loss per token) on raw text; lower is better. The intervals resample documents, the same ones for both models."""

    base: Interval
    merged: Interval
    difference: Interval
    """Fine-tuned minus base."""
    ratio: Interval
    """Fine-tuned divided by base."""
    documents: int
    tokens: int


def measure_perplexity(losses: Mapping[str, Sequence[TextLoss]]) -> Perplexity | None:
    """The perplexity per token, from "base" and "merged" → the same windows; None if there is no token."""
    numbers = {document: number for number, document in enumerate(dict.fromkeys(row.document for row in losses["base"]))}
    sums = np.zeros((len(numbers), 3))
    """(documents, 3) For each document: tokens, loss of base, loss of merged."""
    for row, other in zip(losses["base"], losses["merged"], strict=True):
        sums[numbers[row.document]] += row.tokens, row.loss, other.loss
    sums = sums[sums[:, 0] > 0]
    if not len(sums):
        return None

    def perplexities(totals: Floats) -> Floats:
        base, merged = (np.exp(totals[..., column] / totals[..., 0]) for column in (1, 2))
        return np.stack([base, merged, merged - base, merged / base], -1)

    base, merged, difference, ratio = resampled_interval(sums, perplexities)
    return Perplexity(base, merged, difference, ratio, documents=len(sums), tokens=int(sums[:, 0].sum()))
