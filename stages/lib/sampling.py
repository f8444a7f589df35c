"""Drawing tokens so that a row's answer depends on that row alone, whatever stands beside it in a batch."""

import hashlib
from collections.abc import Sequence

import torch
from transformers import LogitsProcessor, TemperatureLogitsWarper, TopPLogitsWarper


class RowSampler(LogitsProcessor):  # type: ignore[misc]
    """Adds noise to the scores, from each row's own generator, so that the largest is a draw from their distribution.

    The Gumbel-max trick (Gumbel 1954): the place of the largest of log p + Gumbel noise is distributed as p. Transformers'
    own sampling draws for the whole batch from one generator, so there an answer changes with its neighbours.
    """

    def __init__(self, seeds: Sequence[str], temperature: float, top_p: float, device: torch.device) -> None:
        """One seed a row of the batch."""
        self._warpers = [TemperatureLogitsWarper(temperature), *([TopPLogitsWarper(top_p)] if top_p < 1 else [])]
        self._generators = [torch.Generator(device).manual_seed(_number(seed)) for seed in seeds]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores (rows, vocabulary) in, the same with noise out."""
        for warp in self._warpers:
            scores = warp(input_ids, scores)
        size = scores.shape[-1]
        # Not 0, of which there is no logarithm, and in float64, whose steps are finer than any token's probability.
        uniform = torch.stack(
            [torch.rand(size, generator=each, dtype=torch.float64, device=scores.device) for each in self._generators]
        ).clamp_min(torch.finfo(torch.float64).tiny)
        return (scores.double() - (-uniform.log()).log()).float()


def _number(seed: str) -> int:
    return int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8]) >> 1
