"""The rows of validation, and what validation costs."""

from pathlib import Path

from transformers import TrainingArguments

from stages.core.tokens import TokenRows, choose_rows, read_ids, read_tokens

EXPENSIVE = 0.2
"""Tokens of all validations, as a share of the trained ones, above which a line says what makes validation cheaper. With
frozen weights a forward pass is about half of a training step, so this is a tenth of the training's time."""
FEW_ROWS = 20_000
"""Rows of all validations together for which no such line is needed. The default parameters read at most 11,000."""


def read_validation_rows(path: Path, at_most: int) -> tuple[TokenRows, int]:
    """The rows on which the loss is measured, and the number of all rows in the file.

    Args:
        path: A file of training rows.
        at_most: The number of rows to choose by the hash of their ids; 0: all.
    """
    table = read_tokens(path)
    chosen = choose_rows(read_ids(table), at_most) if 0 < at_most < len(table) else None
    return TokenRows(table, chosen), len(table)


def describe_validation(
    arguments: TrainingArguments, *, steps: int, rows: TokenRows, validation_rows: TokenRows, all_rows: int
) -> list[str]:
    """What is said about validation before the training: one line, and another one if it is expensive.

    Args:
        arguments: Those of the training, with whole numbers of steps; a batch is one optimizer step.
        steps: The number of all optimizer steps.
        rows: The training rows.
        validation_rows: Those on which the loss is measured.
        all_rows: The number of all validation rows.
    """
    # Before the first step, and after the last one.
    times = 1 + -(-steps // arguments.eval_steps)
    used, tokens = len(validation_rows), int(validation_rows.lengths.sum())
    trained = steps * arguments.per_device_train_batch_size * arguments.world_size * float(rows.lengths.mean())
    of_all = f" of {all_rows:,}" if used < all_rows else ""
    share = times * tokens / trained
    lines = [
        f"validation on {used:,}{of_all} rows, every {arguments.eval_steps:,} of {steps:,} steps: {times} times {tokens:,} "
        f"tokens, {100 * share:.1f} % of the number that is trained on"
    ]
    if share > EXPENSIVE and times * used > FEW_ROWS:
        lines.append(
            f"validation adds about {50 * share:.0f} % to the time; lower train.max_eval_samples, or raise train.eval_steps"
        )
    return lines
