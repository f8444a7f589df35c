"""Chooses the next token of each row from its logits. The choice depends only on the row, not on the rest of the batch."""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from transformers import LogitsProcessor

from stages.model.compile import compiled


class SamplingConfig(NamedTuple):
    """How a token is chosen. The names are those of Transformers' GenerationConfig."""

    do_sample: bool
    """False: greedy; temperature, top_p and seed are then unused."""
    temperature: float
    top_p: float
    repetition_penalty: float
    """Applies to greedy answers too; 1 is no penalty."""
    seed: int

    @property
    def penalizes(self) -> bool:
        """Whether the tokens of a row so far change its scores."""
        return self.repetition_penalty != 1


def penalize(scores: torch.Tensor, seen: torch.Tensor, *, penalty: float) -> torch.Tensor:
    """The repetition penalty (Keskar et al. 2019, CTRL): lowers the scores of tokens that the row already contains.

    Transformers' implementation also penalizes the padding token of a padded row.

    Args:
        scores: (rows, vocabulary).
        seen: (rows, vocabulary), bool: the tokens in the row's prompt and answer so far.

    Returns:
        (rows, vocabulary).
    """
    return torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)


def draw(scores: torch.Tensor, noise: torch.Tensor, *, sampling: SamplingConfig) -> torch.Tensor:
    """Draws a token for each row by temperature and top-p (nucleus) sampling (Holtzman et al. 2020).

    It is drawn with the Gumbel-max trick (Gumbel 1954): argmax(log p + Gumbel noise) is distributed as p. A small rounding
    difference in the scores, as between batch sizes, therefore hardly ever changes the token that is drawn.

    Args:
        scores: (rows, vocabulary), logits.
        noise: (rows, vocabulary), from `gumbel_noise`.

    Returns:
        (rows,) in int64.
    """
    scores = scores.float() / sampling.temperature
    if sampling.top_p < 1:
        p = scores.softmax(-1)
        scores = scores.masked_fill(p < _top_p_threshold(p, sampling.top_p), -torch.inf)
    return (scores + noise).argmax(-1)


def _top_p_threshold(p: torch.Tensor, top_p: float) -> torch.Tensor:
    """The smallest probability in the nucleus, (rows, 1): all larger probabilities sum to less than top_p.

    Found by bisection on the bits of the float32 numbers: read as integers, positive floats have the same order. Sorting the
    vocabulary would take far longer.
    """
    high = p.amax(-1, keepdim=True).view(torch.int32)
    low = torch.zeros_like(high)
    bisect = compiled(_bisect)
    for _ in range(30):  # the bits of 1.0, the largest probability, are below 2^30
        low, high = bisect(p, low, high, top_p)
    return high.view(torch.float32)


def _bisect(p: torch.Tensor, low: torch.Tensor, high: torch.Tensor, top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Halves the interval (low, high]; both (rows, 1) in int32, the bits of a float32."""
    middle = low + (high - low) // 2
    # Summed in float64: the order of the summation, which depends on the device, then does not change the comparison.
    above = torch.where(p > middle.view(torch.float32), p, 0).sum(-1, keepdim=True, dtype=torch.float64)
    enough = above >= top_p
    return torch.where(enough, middle, low), torch.where(enough, high, middle)


def row_seed(seed: int, row_id: str) -> int:
    """The seed of one row's random numbers, 63 bits: a hash of `generate.seed` and the row's id."""
    return int.from_bytes(hashlib.sha256(f"{seed} {row_id}".encode()).digest()[:8]) >> 1


def gumbel_noise(seeds: torch.Tensor, steps: torch.Tensor, *, vocabulary: int) -> torch.Tensor:
    """Gumbel noise for the next token of each row; the same on every device.

    A counter-based generator: position `step * vocabulary + token` of the SplitMix64 sequence of the row's seed (Steele, Lea
    & Flood 2014). torch.Generator has one state for a whole batch, and CUDA graphs need a function without any state.

    Args:
        seeds: (rows,) in int64, from `row_seed`.
        steps: (rows,) in int64: how many tokens each row's answer has so far.

    Returns:
        (rows, vocabulary) in float32.
    """
    noise: torch.Tensor = compiled(_gumbel_noise)(seeds, steps, vocabulary)
    return noise


def _gumbel_noise(seeds: torch.Tensor, steps: torch.Tensor, vocabulary: int) -> torch.Tensor:
    counter = steps.unsqueeze(1) * vocabulary + torch.arange(vocabulary, device=seeds.device)
    # SplitMix64's constants as signed 64-bit integers: PyTorch has no unsigned multiplication, and both wrap the same way.
    x = seeds.unsqueeze(1) + counter * -0x61C8864680B583EB  # 0x9E3779B97F4A7C15: 2^64 / golden ratio
    x = (x ^ _logical_shift_right(x, 30)) * -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9
    x = (x ^ _logical_shift_right(x, 27)) * -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB
    bits = _logical_shift_right(x ^ _logical_shift_right(x, 31), 11)  # the 53 bits that a float64 holds
    uniform = (bits.double() + 0.5) * 2**-53  # never exactly 0 or 1
    return -torch.log(-torch.log(uniform)).float()


def _logical_shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Shifts in zeros; PyTorch's >> shifts in the sign bit."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


class RowSampler(LogitsProcessor):  # type: ignore[misc]
    """For Transformers' generate in greedy mode: applies the repetition penalty and, if sampling, draws each row's token.

    A drawn token gets the score 0 and every other token -inf, so that greedy generate takes the drawn one.
    """

    def __init__(
        self, sampling: SamplingConfig, row_ids: Sequence[str], *, prompts: Sequence[Sequence[int]], device: torch.device
    ) -> None:
        """`row_ids` and `prompts` (tokens) are those of one batch. Use a new sampler for each batch."""
        self._sampling = sampling
        self._seeds = torch.tensor([row_seed(sampling.seed, row_id) for row_id in row_ids], device=device)
        self._steps = torch.zeros_like(self._seeds)
        self._prompts = prompts
        self._seen: torch.Tensor | None = None  # made at the first call, which knows the size of the vocabulary

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Called by `generate` once for each new token.

        Args:
            input_ids: (rows, tokens): padding, prompt and answer so far.
            scores: (rows, vocabulary).

        Returns:
            (rows, vocabulary).
        """
        if self._sampling.penalizes:
            if self._seen is None:
                self._seen = tokens_in(self._prompts, scores)
            else:
                self._seen.scatter_(1, input_ids[:, -1:], True)
            scores = penalize(scores, self._seen, penalty=self._sampling.repetition_penalty)
        if self._sampling.do_sample:
            noise = gumbel_noise(self._seeds, self._steps, vocabulary=scores.shape[1])
            tokens = draw(scores, noise, sampling=self._sampling)
            scores = torch.full_like(scores, -torch.inf).scatter_(1, tokens.unsqueeze(1), 0.0)
        self._steps += 1
        return scores


def tokens_in(prompts: Sequence[Sequence[int]], scores: torch.Tensor) -> torch.Tensor:
    """(rows, vocabulary), bool, in the shape of `scores`: which tokens each prompt contains."""
    seen = torch.zeros_like(scores, dtype=torch.bool)
    for row, prompt in zip(seen, prompts, strict=True):
        row[torch.tensor(prompt, device=scores.device)] = True
    return seen
