"""What can be refused before the model is loaded: prompts and windows that do not fit it."""

from pathlib import Path

from stages.core.jsonl import read_json
from stages.core.params import bad_param
from stages.core.problem import Problem
from stages.core.tokens import TokenRows
from stages.generate.rows import PromptRows
from stages.model.limits import read_limits
from stages.model.load import ADAPTER


def check_prompts(model: Path, prompts: PromptRows, windows: TokenRows, *, max_new_tokens: int) -> None:
    """Raises Problem if a prompt, its answer or a window of raw text has a token or a position that the model does not have.

    Prints a line if the model computes positions that it was not made for.

    Args:
        model: The model's folder.
        prompts: The prompts to answer.
        windows: The windows of raw text.
        max_new_tokens: Of each answer.
    """
    limits, problems, lines = read_limits(model), [], []
    adapter = model / ADAPTER / "adapter_config.json"
    virtual_tokens = read_json(adapter)["num_virtual_tokens"] if adapter.exists() else 0
    largest = max(windows.largest_id, prompts.largest_id)
    if largest >= limits.vocabulary:
        problems.append(
            f"{model}: a prompt or a window of raw text has the token {largest:,}, and the model's vocabulary has "
            f"{limits.vocabulary:,}; the tokenizer must be the model's own, without added tokens"
        )
    if limits.positions is not None:
        positions = limits.positions - virtual_tokens
        longest = int(prompts.lengths.max(initial=0))
        if longest + max_new_tokens > positions:
            too_long = int((prompts.lengths + max_new_tokens > positions).sum())
            text = (
                f"with {max_new_tokens:,} new tokens, {too_long:,} of {len(prompts):,} answers could need more than the "
                f"{positions:,} positions of {model}"
            )
            remedy = (
                f"the longest prompt has {longest:,} tokens: set it to at most {max(1, positions - longest):,}, or lower "
                "encode.max_length"
            )
            if limits.has_position_table:
                problems.append(bad_param("generate.max_new_tokens", f"{text}; {remedy}"))
            else:
                lines.append(f"{text}, and what is beyond them is new to it")
        window = int(windows.lengths.max(initial=0))
        if window > positions:
            text = f"the longest window of raw text has {window:,} tokens, and {model} {positions:,} positions"
            if limits.has_position_table:
                problems.append(f"{text}; lower encode.max_length")
            else:
                lines.append(f"{text}: what is beyond them is new to it")
    if problems:
        raise Problem(*problems)
    for line in lines:
        print(f"generate: {line}", flush=True)
