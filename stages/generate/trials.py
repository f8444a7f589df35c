"""Trials of Transformers' generate: which prompts can share a batch, and whether its cache gives the model's own logits."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from stages.core.problem import Problem
from stages.model.probe import PROBE_ROWS, TRIAL_ERRORS, last_logits, logits_match, probe_rows, reason_of

NEXT_TOKEN = 6
"""The token that every trial answer begins with."""


class Batching(NamedTuple):
    """Which prompts can be answered in one batch without a change of their answers."""

    padded: bool
    """Prompts of different lengths, padded on the left."""
    same_length: bool
    """Prompts of one length."""
    reason: str
    """Why not all prompts; "" if all can."""


def try_batches(model: Any, longest_prompt: int) -> Batching:
    """Finds out whether a prompt has the same logits in a batch as by itself, after it and after a first new token.

    Padding goes into the state of some recurrent models; others mix up the prompts of a batch when they add a token (RWKV).

    Args:
        model: A causal language model in evaluation mode.
        longest_prompt: Tokens of the longest prompt: with longer ones than a model's window more can go wrong.

    Raises Problem if the model cannot answer a single prompt.
    """
    rows = probe_rows(model, longest_prompt)
    try:
        alone = torch.cat([generate_logits(model, [row]) for row in rows])
    except TRIAL_ERRORS as error:
        raise Problem(
            f"Transformers' generate fails with this model, on a prompt of {len(rows[-1])} tokens: {reason_of(error)}"
        ) from error
    reason = _why_different(model, rows, alone)
    if not reason:
        return Batching(padded=True, same_length=True, reason="")
    same = [list(PROBE_ROWS[0]), list(reversed(PROBE_ROWS[0]))]
    mixed = _why_different(model, same, torch.cat([generate_logits(model, [row]) for row in same]))
    if mixed:
        return Batching(padded=False, same_length=False, reason=mixed.replace("padding", "a batch"))
    return Batching(padded=False, same_length=True, reason=reason)


def cache_is_exact(model: Any, longest_prompt: int) -> bool:
    """Whether generate, which reads the keys and states of former tokens from a cache, gives the logits of whole rows.

    Also True if generate fails.
    """
    rows = probe_rows(model, longest_prompt)
    try:
        cached = torch.cat([generate_logits(model, [row]) for row in rows])
        with torch.no_grad():
            whole = [
                last_logits(model, [len(row) + 1], input_ids=torch.tensor([[*row, NEXT_TOKEN]], device=model.device))[-2:]
                for row in rows
            ]
    except TRIAL_ERRORS:
        return True
    return logits_match(cached, torch.stack(whole))


def _why_different(model: Any, rows: Sequence[Sequence[int]], alone: torch.Tensor) -> str:
    """Why the rows in one batch do not have the logits `alone`; "" if they have."""
    try:
        return "" if logits_match(generate_logits(model, rows), alone) else "padding changes the model's answers"
    except TRIAL_ERRORS as error:
        return reason_of(error)


def generate_logits(model: Any, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
    """The logits (prompts, 2, vocabulary) after each prompt, and after NEXT_TOKEN behind it, in one batch."""
    config = GenerationConfig(
        max_new_tokens=2, do_sample=False, pad_token_id=0, output_logits=True, return_dict_in_generate=True
    )
    with torch.no_grad():
        output = model.generate(
            **pad_left(prompts, model.device),
            generation_config=config,
            logits_processor=LogitsProcessorList([_ChooseNextToken()]),
        )
    return torch.stack(output.logits, 1).to(model.dtype)  # generate makes float32 of them; they are rounded as computed


class _ChooseNextToken(LogitsProcessor):  # type: ignore[misc]
    """So that what follows does not depend on rounding."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        chosen = torch.full_like(scores, float("-inf"))
        chosen[:, NEXT_TOKEN] = 0
        return chosen


def pad_left(prompts: Sequence[Sequence[int]], device: torch.device) -> dict[str, torch.Tensor]:
    """input_ids and attention_mask, so that every prompt ends in the last position."""
    width = max(map(len, prompts))
    ids = [[0] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return {"input_ids": torch.tensor(ids, device=device), "attention_mask": torch.tensor(mask, device=device)}
