"""Fixed tokens for trial runs of a model, which show what its code does."""

import re
from collections.abc import Sequence
from typing import Any

import torch

PROBE_ROWS = ((5, 6, 7, 8, 9), (9, 5, 8))
"""Two short rows of different lengths. Every vocabulary has these ids."""
KEPT = 8
"""The last tokens of a row whose logits are compared: a row may be long, and the vocabulary large."""
TRIAL_ERRORS = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)
"""What a model's code raises if it cannot compute in another way than its own."""


def probe_ids(model: Any) -> torch.Tensor:
    """(1, tokens) in int64 on the model's device: the first row."""
    return torch.tensor([PROBE_ROWS[0]], device=model.device)


def probe_rows(model: Any, longest_row: int) -> list[list[int]]:
    """PROBE_ROWS, and a row that is longer than the windows of the model's attention, if rows of the data are.

    A window or chunk of 4,096 tokens shows only in longer rows. The row is up to twice as long as the largest one that
    matters. Its beginning has other tokens than its end, so that it makes a difference whether a token attends to it.

    Args:
        model: Its config gives the sizes of the windows.
        longest_row: Tokens of the longest row that the model will compute.
    """
    config = model.config.get_text_config().to_dict()
    windows = [value for name, value in config.items() if _is_window(name) and type(value) is int]
    too_small = [window for window in windows if 1 < window < longest_row]
    rows = [list(row) for row in PROBE_ROWS]
    if too_small:
        length = min(longest_row, 2 * max(too_small))
        rows.append([5 + 5 * position // length for position in range(length)])
    return rows


def _is_window(name: str) -> bool:
    """Whether a config's field gives a number of tokens; Qwen's max_window_layers counts layers."""
    return re.search("window|chunk", name) is not None and not name.endswith("layers")


def last_logits(model: Any, rows: Sequence[int], **inputs: Any) -> torch.Tensor:
    """The logits (tokens, vocabulary) of the last KEPT tokens, or of all, of each row of a batch.

    Args:
        model: A causal language model.
        rows: Tokens of each row; the batch is one row that holds them one after the other.
        inputs: The model's.
    """
    ends = [sum(rows[: number + 1]) for number in range(len(rows))]
    kept = [place for end, row in zip(ends, rows, strict=True) for place in range(end - min(row, KEPT), end)]
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, given: (given[0][:, kept], *given[1:]))
    try:
        logits: torch.Tensor = model(**inputs, use_cache=False).logits[0]
    finally:
        hook.remove()
    return logits


def logits_match(logits: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether logits, or other outputs, differ by no more than rounding.

    Their difference has 1 % of the logits' standard deviation after many layers in 16 bits, and about half of it if a row
    attends to another row.
    """
    if logits.shape != expected.shape:
        return False
    tolerance = 1e-3 if expected.dtype == torch.float32 else 0.1
    return bool((logits - expected).float().std() <= tolerance * expected.float().std())


def reason_of(error: Exception) -> str:
    """Why a trial failed, in one line: the first of the error's message, with its class if that does not say it."""
    text = str(error).partition("\n")[0]
    return text if isinstance(error, NotImplementedError) and text else f"{type(error).__name__}: {text}"
