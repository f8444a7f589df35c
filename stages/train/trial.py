"""Trial steps of training, which show whether faster layers compute what the model's own do."""

from typing import Any, NamedTuple

import torch

from stages.model.probe import TRIAL_ERRORS, logits_match, probe_ids, reason_of


class Trial(NamedTuple):
    """What a forward and backward pass of a few tokens give."""

    logits: torch.Tensor
    """(1, tokens, vocabulary)"""
    gradients: torch.Tensor
    """Those of all trained parameters, one after the other."""


def try_training(adapted: Any) -> Trial:
    """A forward and backward pass of the model in evaluation mode; removes gradients, and changes nothing else."""
    was_training = adapted.training
    adapted.eval()
    adapted.zero_grad(set_to_none=True)
    logits = adapted(input_ids=probe_ids(adapted), use_cache=False).logits
    logits.float().logsumexp(-1).sum().backward()
    gradients = [parameter.grad.float().flatten().cpu() for parameter in adapted.parameters() if parameter.grad is not None]
    adapted.zero_grad(set_to_none=True)
    adapted.train(was_training)
    return Trial(logits.detach(), torch.cat([torch.zeros(0), *gradients]))


def why_different(adapted: Any, expected: Trial, *, in_fp8: bool = False) -> str:
    """Why the model, with faster layers, does not compute what it did without them; "" if it does.

    Args:
        adapted: The model.
        expected: From `try_training`, before.
        in_fp8: Whether products are in FP8, which is too inexact for a comparison: then it need only run.
    """
    try:
        found = try_training(adapted)
    except TRIAL_ERRORS as error:
        return reason_of(error)
    if not in_fp8 and not logits_match(found.logits, expected.logits):
        return "its logits differ"
    if in_fp8 or expected.logits.dtype == torch.float16:  # too inexact, and too small a range without scaling
        return ""
    tolerance = 1e-2 if expected.logits.dtype == torch.float32 else 0.3
    same_size = found.gradients.shape == expected.gradients.shape
    close = same_size and (found.gradients - expected.gradients).norm() <= tolerance * expected.gradients.norm()
    return "" if close else "its gradients differ"
