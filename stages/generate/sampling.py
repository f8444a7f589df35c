"""Choosing the next token so that a row's answer depends on that row alone, whatever stands beside it in a batch."""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from transformers import LogitsProcessor

from stages.model.compile import compiled


class SamplingConfig(NamedTuple):
    """How a token is chosen. GenerationConfig's names."""

    do_sample: bool
    temperature: float
    top_p: float
    repetition_penalty: float
    seed: int

    @property
    def penalizes(self) -> bool:
        """Whether it matters which tokens a row has."""
        return self.repetition_penalty != 1


def penalize(scores: torch.Tensor, seen: torch.Tensor, penalty: float) -> torch.Tensor:
    """Scores (rows, vocabulary), those of the tokens in `seen` (the same shape) made less likely (Keskar et al. 2019).

    Transformers' own counts the padding of a batch among a row's tokens.
    """
    return torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)


def draw(scores: torch.Tensor, noise: torch.Tensor, choice: SamplingConfig) -> torch.Tensor:
    """Tokens (rows,) drawn from the likeliest that together have top_p.

    The Gumbel-max trick (Gumbel 1954): the place of the largest of log p + Gumbel noise is distributed as p. So a score that
    is rounded otherwise, as in a batch of another size, changes a draw hardly ever.

    Args:
        scores: (rows, vocabulary), the logarithms of something in proportion to the probabilities.
        noise: Of the same shape.
    """
    scores = scores.float() / choice.temperature
    if choice.top_p < 1:
        p = scores.softmax(-1)
        scores = scores.masked_fill(p < _least(p, choice.top_p), -torch.inf)
    return (scores + noise).argmax(-1)


def _least(p: torch.Tensor, top_p: float) -> torch.Tensor:
    """The smallest probability (rows, 1) that is kept: the larger ones are less than top_p together.

    Found by halving, on the bits of the numbers, which have the order of the positive numbers themselves; sorting a
    vocabulary takes far longer.
    """
    high = p.amax(-1, keepdim=True).view(torch.int32)
    low = torch.zeros_like(high)
    halve = compiled(_halve)
    for _ in range(30):  # 1.0 is below 2^30
        low, high = halve(p, low, high, top_p)
    return high.view(torch.float32)


def _halve(p: torch.Tensor, low: torch.Tensor, high: torch.Tensor, top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    middle = low + (high - low) // 2
    # In 64 bits, so that the order in which a device sums tells nothing.
    above = torch.where(p > middle.view(torch.float32), p, 0).sum(-1, keepdim=True, dtype=torch.float64)
    enough = above >= top_p
    return torch.where(enough, middle, low), torch.where(enough, high, middle)


def seed_of(seed: int, row: str) -> int:
    """What a row's random numbers follow from, and nothing else; 63 bits."""
    return int.from_bytes(hashlib.sha256(f"{seed} {row}".encode()).digest()[:8]) >> 1


def noise_of(seeds: torch.Tensor, steps: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """Gumbel noise (rows, vocabulary) in float32, for each row's token number `steps`; the same on every device.

    A counter that is hashed by SplitMix64 (Steele et al. 2014), since no generator can be recorded for each row of a batch.

    Args:
        seeds: (rows,) in int64, from `seed_of`.
        steps: (rows,) in int64.
    """
    noise: torch.Tensor = compiled(_noise)(seeds, steps, vocabulary)
    return noise


def _noise(seeds: torch.Tensor, steps: torch.Tensor, vocabulary: int) -> torch.Tensor:
    place = steps.unsqueeze(1) * vocabulary + torch.arange(vocabulary, device=seeds.device)
    x = seeds.unsqueeze(1) + place * -0x61C8864680B583EB  # 2^64 divided by the golden ratio, as a signed number
    x = (x ^ _right(x, 30)) * -0x40A7B892E31B1A47
    x = (x ^ _right(x, 27)) * -0x6B2FB644ECCEEE15
    uniform = (_right(x ^ _right(x, 31), 11).double() + 0.5) * 2**-53  # neither 0 nor 1
    return -torch.log(-torch.log(uniform)).float()


def _right(x: torch.Tensor, bits: int) -> torch.Tensor:
    """A shift that brings in zeros, which PyTorch's own does for negative numbers not."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


class RowSampler(LogitsProcessor):  # type: ignore[misc]
    """For Transformers' generate: leaves each row the token of its choice."""

    def __init__(
        self, choice: SamplingConfig, rows: Sequence[str], prompts: Sequence[Sequence[int]], device: torch.device
    ) -> None:
        """`rows` are the ids of the batch, `prompts` their tokens."""
        self._choice = choice
        self._seeds = torch.tensor([seed_of(choice.seed, row) for row in rows], device=device)
        self._steps = torch.zeros_like(self._seeds)
        self._prompts, self._seen = prompts, torch.zeros(0, device=device)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores (rows, vocabulary) in, the same with a chosen token's alone out."""
        if self._choice.penalizes:
            if not len(self._seen):
                self._seen = mark(self._prompts, scores)
            else:
                self._seen.scatter_(1, input_ids[:, -1:], True)
            scores = penalize(scores, self._seen, self._choice.repetition_penalty)
        if self._choice.do_sample:
            tokens = draw(scores, noise_of(self._seeds, self._steps, scores.shape[1]), self._choice)
            scores = torch.full_like(scores, -torch.inf).scatter_(1, tokens.unsqueeze(1), 0.0)
        self._steps += 1
        return scores


def mark(prompts: Sequence[Sequence[int]], scores: torch.Tensor) -> torch.Tensor:
    """Which tokens stand in which prompt, in the shape of `scores`."""
    seen = torch.zeros_like(scores, dtype=torch.bool)
    for row, prompt in zip(seen, prompts, strict=True):
        row[torch.tensor(prompt, device=scores.device)] = True
    return seen
