"""What can be refused once the model is loaded: one in which a token sees later tokens, or that cannot generate."""

from typing import Any

import torch

from stages.core.problem import Problem
from stages.model.probe import TRIAL_ERRORS, last_logits, probe_ids, reason_of

SEEN = 3
"""The tokens of the trial row that are also computed by themselves."""
LARGEST_CHANGE = 0.2
"""Of their logits, in standard deviations. Measured: 0.02 in SmolLM2 with int8, whose inputs are rounded; 0.8 in a BERT. A
wrong refusal would cost more than a missed one."""


def check_causal(model: Any) -> None:
    """Raises Problem if later tokens of a row change the logits of earlier ones, or if the model fails on a row.

    Such a model, as an encoder with `is_decoder` false in its config, would be trained to copy the token that it is to
    predict. Transformers loads some as causal models.

    Args:
        model: In evaluation mode.
    """
    ids = probe_ids(model)
    try:
        with torch.no_grad():
            alone = last_logits(model, [SEEN], input_ids=ids[:, :SEEN])
            within = last_logits(model, [ids.shape[1]], input_ids=ids)[:SEEN]
    except TRIAL_ERRORS as error:
        raise Problem(
            f"the base model fails on a row of {ids.shape[1]} tokens: {reason_of(error)}; fetch another base"
        ) from error
    if (within - alone).float().std() > LARGEST_CHANGE * alone.float().std():
        raise Problem(
            "the base model is not causal: later tokens of a row change the logits of earlier ones, so it cannot learn to "
            "predict them; fetch a causal language model, or set is_decoder in its config.json if it is an encoder"
        )


def check_generates(model: Any) -> None:
    """Raises Problem if Transformers cannot generate text with the model.

    Of some models it makes no key-value cache. `merge` and `generate`, which follow the training, need answers.

    Args:
        model: In evaluation mode.
    """
    ids = probe_ids(model)
    try:
        with torch.no_grad():
            model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=2,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
    except torch.OutOfMemoryError:
        raise
    except TRIAL_ERRORS as error:
        raise Problem(
            f"Transformers cannot generate text with the base model: {reason_of(error)}; fetch another base"
        ) from error
