"""A GPU's memory, spent on speed: tokens at once, blocks that keep their activations, weights that stay unpacked.

An optimizer step is the same rows whatever is chosen here, so the choice changes the result by rounding alone.
"""

import math
import os
from collections.abc import Iterator
from typing import NamedTuple

import torch

PROBES = (2048, 4096)
"""Tokens of the two trial batches, from which the memory of larger ones follows."""
RESERVE = 0.06
"""Share of the card that is left free: fragments, and what the trial batches did not show."""
TWICE = 0.30
"""What computing a block twice costs, as a share of the step. With the next two measured on an H100; on other cards they are
other, but so is everything alike."""
UNPACKING = 100
"""What unpacking all weights once costs, in tokens of training in the same time."""
LAUNCHING = 300
"""What a micro-batch costs beside its tokens."""


def grow_in_place() -> None:
    """Lets PyTorch give memory of one size to tensors of another; to be called before a GPU is used.

    Batches differ in their tokens. In segments of fixed sizes the memory of one would lie idle beside that of the next, and
    be given back and asked for again, while the GPU waits.
    """
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the name that it had before PyTorch 2.9
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


class Plan(NamedTuple):
    """How a step is computed."""

    tokens: int
    """The most in a micro-batch."""
    recomputed: int
    """So many blocks are computed twice."""
    keeps_weights: bool
    """Whether unpacked weights are kept from one use to the next."""


class Need(NamedTuple):
    """Bytes of one micro-batch: fixed + tokens * slope."""

    fixed: float
    slope: float

    @classmethod
    def of(cls, few: int, many: int) -> "Need":
        """What follows from the peaks of the two trial batches."""
        slope = (many - few) / (PROBES[1] - PROBES[0])
        return cls(max(0.0, few - slope * PROBES[0]), slope)


def choose(
    free: float, kept: Need | None, twice: Need, weights: int, blocks: int, step: int, longest: int, recomputed: int | None
) -> Plan | None:
    """The plan with the least time of those that fit, None if there is none.

    Args:
        free: Bytes that may be used.
        kept: What micro-batches need if all blocks keep their activations, None if it is too much.
        twice: And if none does.
        weights: Bytes of the unpacked weights, 0 if nothing is packed.
        blocks: How many there are.
        step: Tokens of a large optimizer step.
        longest: Tokens of the longest row.
        recomputed: Blocks to compute twice, where that is not left to the plan.
    """
    plans = _plans(blocks, step, longest, recomputed, packed=weights > 0)
    fitting = [plan for plan in plans if _bytes(plan, kept, twice, weights, blocks) <= free]
    return min(fitting, key=lambda plan: _cost(plan, step, blocks, packed=weights > 0), default=None)


def _plans(blocks: int, step: int, longest: int, recomputed: int | None, *, packed: bool) -> Iterator[Plan]:
    sizes = {max(longest, -(-step // parts)) for parts in range(1, max(2, -(-step // longest) + 1))}
    for tokens in sizes:
        for count in range(blocks + 1) if recomputed is None else [recomputed]:
            for keeps in (True, False) if packed else (False,):
                yield Plan(tokens, count, keeps)


def _bytes(plan: Plan, kept: Need | None, twice: Need, weights: int, blocks: int) -> float:
    held = weights * plan.keeps_weights
    if plan.recomputed == blocks:
        return twice.fixed + plan.tokens * twice.slope + held
    if kept is None:
        return math.inf
    slope = kept.slope + plan.recomputed / blocks * (twice.slope - kept.slope)
    return max(kept.fixed, twice.fixed) + plan.tokens * slope + held


def _cost(plan: Plan, step: int, blocks: int, *, packed: bool) -> float:
    """In tokens of a step that has none of the three."""
    share, parts = plan.recomputed / blocks, -(-step // plan.tokens)
    unpacked = (1 if plan.keeps_weights else (2 + share) * parts) * packed
    return step * (1 + TWICE * share) + parts * LAUNCHING + unpacked * UNPACKING


def free_bytes() -> float:
    """What this process may still take of the GPU, its own unused part included."""
    free, total = torch.cuda.mem_get_info()
    own = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return free + own - RESERVE * total
