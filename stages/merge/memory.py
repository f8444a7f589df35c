"""What to do when memory runs out while models are compared: fewer labels at a time, then a Problem."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from accelerate.utils.memory import should_reduce_batch_size

from stages.core.problem import Problem

MAX_LOGITS = 1 << 23
"""Logits of a model that are in memory at a time: 32 MiB in float32. Comparing two models takes about six times that."""


class LabelChunks:
    """Computes something for a chunk of labels at a time, with chunks half as large from then on if memory runs out."""

    def __init__(self, vocabulary: int) -> None:
        """Chooses as many labels as have MAX_LOGITS logits.

        Args:
            vocabulary: The number of logits of a label.
        """
        self.size = max(1, MAX_LOGITS // vocabulary)

    def map(self, compute: Callable[[slice], torch.Tensor], labels: int) -> torch.Tensor:
        """compute(labels start:stop), each (..., stop - start), for all labels: (..., labels) on the CPU.

        Raises what `compute` raises if memory does not even suffice for one label.
        """
        parts, start = [], 0
        while start < labels:
            try:
                parts.append(compute(slice(start, min(start + self.size, labels))).cpu())
                start += self.size
                continue
            except (RuntimeError, MemoryError) as error:
                if not _is_out_of_memory(error) or self.size == 1:
                    raise
            # After the except block, which holds the failed call's tensors.
            torch.cuda.empty_cache()
            print(f"merge: out of memory with {self.size} labels at a time; continuing with {self.size // 2}", flush=True)
            self.size //= 2
        return torch.cat(parts, -1)


@contextmanager
def explain_out_of_memory(doing: str) -> Iterator[None]:
    """Raises Problem instead of a framework's out-of-memory error.

    Args:
        doing: What is done in the block: "out of memory while {doing}".
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        of_gpu = isinstance(error, torch.OutOfMemoryError)
        memory, remedy = ("the GPU's", "a GPU") if of_gpu else ("main", "a machine")
        raise Problem(
            f"out of {memory} memory while {doing}; close other programs that use it, use {remedy} with more of it, or "
            "lower encode.max_length, which trains again; the adapter is kept, and dvc repro continues with this stage"
        ) from None


def _is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out, on the GPU or on the CPU, where PyTorch raises RuntimeError and Python MemoryError."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or should_reduce_batch_size(error)
