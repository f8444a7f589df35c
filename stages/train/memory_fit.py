"""Fits a training into the GPU's memory: trial batches show what it needs, and the fastest plan that fits is chosen."""

import itertools
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch

from stages.core.problem import Problem
from stages.core.tokens import IGNORE, TokenRows
from stages.model import distributed
from stages.train import memory
from stages.train.callbacks import say
from stages.train.gradient_checkpointing import checkpoint_blocks, decoder_blocks
from stages.train.memory import Known, Need, Plan
from stages.train.trainer import AdapterTrainer

RowNumbers: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]
ADAM_BYTES = 12
"""Bytes per trained parameter: its gradient and Adam's two moments, in float32."""


def fit_memory(trainer: AdapterTrainer, checkpointed_blocks: int | None) -> None:
    """Chooses how a step uses the memory, and runs a forward and backward pass of the largest micro-batch as a trial.

    So a lack of memory shows before the first step; the trial changes nothing else. There is a choice only on a GPU
    (memory.py). Elsewhere a micro-batch has the number of rows that the user has set.

    Args:
        checkpointed_blocks: The number of blocks with gradient checkpointing. None leaves it to the memory; where there is
            no choice, it means none.

    Raises Problem if the memory is too small.
    """
    rows: TokenRows = trainer.train_dataset
    longest_first = np.argsort(-rows.lengths, kind="stable")
    checkpoint_blocks(trainer.unwrapped_model, checkpointed_blocks or 0)
    if not _has_choice(trainer):
        trainer.try_batch([rows[number] for number in longest_first[: trainer.collator.rows].tolist()])
        return
    blocks, longest = len(decoder_blocks(trainer.unwrapped_model)), int(rows.lengths.max())
    plan = _choose(trainer, checkpointed_blocks, blocks=blocks, longest=longest)
    # All processes wait for the slowest, so all take the plan of the one with the least memory, which fits them all.
    _, _, plan = min(distributed.gather((memory.free_bytes(), distributed.rank(), plan)))
    if plan is None:  # the smallest one; the trial shows whether it fits
        plan = Plan(longest, blocks if checkpointed_blocks is None else checkpointed_blocks, keeps_dequantized=False)
    checkpoint_blocks(trainer.unwrapped_model, plan.checkpointed_blocks)
    if trainer.lora_layers:
        trainer.lora_layers.keep_dequantized(plan.keeps_dequantized)
    tokens = distributed.smallest(_try_largest_batch(trainer, plan.tokens, longest_first))
    trainer.collator.tokens = tokens
    if trainer.is_world_process_zero():
        weights = ""
        if trainer.lora_layers and trainer.lora_layers.dequantized_bytes:
            weights = f"; dequantized weights are {'kept' if plan.keeps_dequantized else 'computed again at each use'}"
        checkpointed = f"gradient checkpointing in {plan.checkpointed_blocks} of {blocks} blocks"
        say(f"train: micro-batches of up to {tokens:,} tokens; {checkpointed}{weights}")


def _has_choice(trainer: AdapterTrainer) -> bool:
    """Whether micro-batches may depend on the memory.

    With sharded weights all processes must compute the same number of micro-batches; and the same bytes in every run need
    the same micro-batches.
    """
    return trainer.args.device.type == "cuda" and not trainer.args.full_determinism and not trainer.sharded


def _choose(trainer: AdapterTrainer, checkpointed_blocks: int | None, *, blocks: int, longest: int) -> Plan | None:
    """The plan for this GPU, from trial batches; None if no plan seems to fit."""
    rows: TokenRows = trainer.train_dataset
    if trainer.lora_layers:
        trainer.lora_layers.keep_dequantized(False)  # the trials must not count kept weights, which are added later
    checkpointed, plain = _need(trainer, blocks), _need(trainer, 0)
    if checkpointed is None:
        return None
    trained = sum(p.numel() for p in trainer.unwrapped_model.parameters() if p.requires_grad)
    step_rows = trainer.args.train_batch_size
    return memory.choose_plan(
        Known(
            free_bytes=memory.free_bytes() - trained * ADAM_BYTES,
            plain=plain,
            checkpointed=checkpointed,
            dequantized_bytes=trainer.lora_layers.dequantized_bytes if trainer.lora_layers else 0,
            blocks=blocks,
            # Two standard deviations above the mean: 39 of 40 steps have fewer tokens.
            step_tokens=int(step_rows * rows.lengths.mean() + 2 * step_rows**0.5 * rows.lengths.std()),
            longest_row=longest,
            checkpointed_blocks=checkpointed_blocks,
        )
    )


def _need(trainer: AdapterTrainer, checkpointed_blocks: int) -> Need | None:
    """What micro-batches need with this number of checkpointed blocks; None if even the trial batches do not fit."""
    checkpoint_blocks(trainer.unwrapped_model, checkpointed_blocks)
    few, many = _trial_batches(int(trainer.train_dataset.lengths.max()))
    try:
        trainer.try_batch(few)  # compiles kernels, which takes memory too
        return Need.of(*((_tokens(batch), _peak_bytes(trainer, batch)) for batch in (few, many)))
    except Problem:
        return None


def _trial_batches(longest: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Two batches of about `memory.PROBES` tokens, in rows of one length that are no longer than those of the data.

    The model may have no more positions, and attention to a longer row would take more memory. Both batches have the same
    number of labels, so that the memory of the logits does not count as memory of the tokens.
    """
    length = min(longest, memory.PROBES[0])
    ids = np.arange(length) % 2 + 5
    labelled, unlabelled = np.where(np.arange(length) > 0, ids, IGNORE), np.full(length, IGNORE)
    few, many = (tokens // length for tokens in memory.PROBES)
    rows = [{"id": "trial", "input_ids": ids, "labels": labelled}] * few
    return rows, rows + [{"id": "trial", "input_ids": ids, "labels": unlabelled}] * (many - few)


def _tokens(batch: Sequence[dict[str, Any]]) -> int:
    return sum(len(row["input_ids"]) for row in batch)


def _peak_bytes(trainer: AdapterTrainer, rows: Sequence[dict[str, Any]]) -> int:
    """GPU memory that a micro-batch needs at its peak."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    trainer.try_batch(rows)
    return torch.cuda.max_memory_allocated() - before


def _try_largest_batch(trainer: AdapterTrainer, tokens: int, longest_first: RowNumbers) -> int:
    """The tokens of a micro-batch: `tokens`, or fewer if that does not fit after all.

    Raises Problem if a single row does not fit.
    """
    longest = int(trainer.train_dataset.lengths[longest_first[0]])
    while True:
        try:
            trainer.try_batch(_largest_batch(trainer, tokens, longest_first))
            return tokens
        except Problem:
            if tokens <= longest:
                raise
        tokens = max(longest, int(0.8 * tokens))


def _largest_batch(trainer: AdapterTrainer, tokens: int, longest_first: RowNumbers) -> list[dict[str, Any]]:
    """The longest rows, as many as `tokens` allows; repeated if there are too few."""
    rows: TokenRows = trainer.train_dataset
    batch: list[dict[str, Any]] = []
    size = 0
    for number in map(int, itertools.cycle(longest_first)):
        size += int(rows.lengths[number if trainer.collator.padding_free else longest_first[0]])
        if batch and size > tokens:
            break
        batch.append(rows[number])
    return batch
