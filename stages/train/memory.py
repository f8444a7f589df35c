"""How a step uses a GPU's memory for speed: tokens in a micro-batch, gradient checkpointing, dequantized weights.

An optimizer step has the same rows whatever is chosen here, so the choice changes the result only by rounding.
"""

import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from stages.core.problem import Problem

PROBES = (2048, 4096)
"""Tokens of the two trial batches, at most, from which the memory of larger ones is extrapolated."""
RESERVE = 0.06
"""Share of the GPU's memory that is left free, for fragmentation and for what the trial batches did not show."""
CHECKPOINTING = 0.30
"""Cost of gradient checkpointing in all blocks, as a share of the step. This and the next two were measured on an H100; on
other GPUs they differ, but so does the time of a token, in which they are expressed."""
DEQUANTIZING = 100
"""Cost of dequantizing all weights once, in tokens that are trained in the same time."""
MICRO_BATCH = 300
"""Cost of a micro-batch in addition to its tokens, in the same unit."""


def use_expandable_segments() -> None:
    """Lets PyTorch reuse memory for tensors of another size. Call it before the GPU is used.

    Batches differ in their number of tokens. With segments of fixed size, memory of one batch would be of no use to the
    next, and would be returned and allocated again while the GPU waits.
    """
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the variable's name before PyTorch 2.9
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


class Plan(NamedTuple):
    """How a step is computed."""

    tokens: int
    """The maximum number of tokens in a micro-batch."""
    checkpointed_blocks: int
    """The number of decoder layers with gradient checkpointing."""
    keeps_dequantized: bool
    """Whether dequantized weights are kept from one use to the next."""


class Need(NamedTuple):
    """Memory that a micro-batch needs, in bytes: fixed + tokens * slope."""

    fixed: float
    slope: float

    @classmethod
    def of(cls, few: tuple[int, int], many: tuple[int, int]) -> "Need":
        """Extrapolates from two trial batches, each given as its tokens and its peak memory in bytes."""
        slope = (many[1] - few[1]) / (many[0] - few[0])
        return cls(max(0.0, few[1] - slope * few[0]), slope)


@dataclass(frozen=True, kw_only=True)
class Known:
    """What a plan is chosen from."""

    free_bytes: float
    """Memory that may be used."""
    plain: Need | None
    """What a micro-batch needs without gradient checkpointing; None if even the trial batches did not fit."""
    checkpointed: Need
    """What it needs with gradient checkpointing in all blocks."""
    dequantized_bytes: int
    """Size of the dequantized weights; 0 if there are none to keep."""
    blocks: int
    """The number of decoder layers."""
    step_tokens: int
    """Tokens of a large optimizer step."""
    longest_row: int
    """Tokens of the longest row."""
    checkpointed_blocks: int | None = None
    """The number of blocks with gradient checkpointing, if the user has set it; None leaves it to the plan."""


def choose_plan(known: Known) -> Plan | None:
    """The fastest plan that fits into the memory; None if none fits."""
    fitting = [plan for plan in _candidates(known) if _bytes(plan, known) <= known.free_bytes]
    return min(fitting, key=lambda plan: _cost(plan, known), default=None)


def _candidates(known: Known) -> Iterator[Plan]:
    step, longest = known.step_tokens, known.longest_row
    sizes = {max(longest, -(-step // parts)) for parts in range(1, max(2, -(-step // longest) + 1))}
    counts = range(known.blocks + 1) if known.checkpointed_blocks is None else [known.checkpointed_blocks]
    for tokens in sizes:
        for count in counts:
            for keeps in (True, False) if known.dequantized_bytes else (False,):
                yield Plan(tokens, count, keeps)


def _bytes(plan: Plan, known: Known) -> float:
    """Memory that a plan needs."""
    kept = known.dequantized_bytes * plan.keeps_dequantized
    plain, checkpointed = known.plain, known.checkpointed
    if plan.checkpointed_blocks == known.blocks:
        return checkpointed.fixed + plan.tokens * checkpointed.slope + kept
    if plain is None:
        return math.inf
    slope = plain.slope + plan.checkpointed_blocks / known.blocks * (checkpointed.slope - plain.slope)
    return max(plain.fixed, checkpointed.fixed) + plan.tokens * slope + kept


def _cost(plan: Plan, known: Known) -> float:
    """Time of a step, in tokens of a step without any of the three costs."""
    share, micro_batches = plan.checkpointed_blocks / known.blocks, -(-known.step_tokens // plan.tokens)
    # Once a step if they are kept; otherwise forward, backward and again where activations are recomputed.
    dequantizations = 1 if plan.keeps_dequantized else (2 + share) * micro_batches
    dequantizing = DEQUANTIZING * dequantizations if known.dequantized_bytes else 0
    return known.step_tokens * (1 + CHECKPOINTING * share) + MICRO_BATCH * micro_batches + dequantizing


def free_bytes() -> float:
    """GPU memory that this process may still use, including what PyTorch holds but does not use."""
    free, total = torch.cuda.mem_get_info()
    unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return free + unused - RESERVE * total


@contextmanager
def explain_out_of_memory(batch: Mapping[str, Any]) -> Iterator[None]:
    """Raises Problem with the size of the batch and the remedies instead of a framework's out-of-memory error."""
    try:
        yield
    except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
        found = re.search(r"[Tt]ried to allocate ([\d.]+ ?\w+)(?:.*?of which ([\d.]+ ?\w+) is free)?", str(error), re.DOTALL)
        if not found and not isinstance(error, torch.OutOfMemoryError | MemoryError):
            raise
        rows, tokens = len(batch["ids"]), batch["input_ids"].numel()
        requested = f": {found[1]} were requested" if found else ""
        free = f", {found[2]} were free" if found and found[2] else ""
        raise Problem(
            f"out of memory on a batch of {rows} rows, {tokens:,} tokens{requested}{free}. Set "
            "train.gradient_checkpointing to true, or lower train.per_device_train_batch_size and raise "
            "train.gradient_accumulation_steps by the same factor (the result stays the same), or lower encode.max_length"
        ) from None
