"""What training minimizes. For a loss of your own: copy this file, change it, and name the copy in train.loss.

Each optimizer step adds up what the function returns for its micro-batches, on all processes. A loss that is a sum over
labels, divided by `num_items`, so weighs every label of the step the same, however the rows are spread over micro-batches.
"""

import torch

from stages.train.loss import next_token_loss


def loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    num_items: torch.Tensor | int,
    label_weights: torch.Tensor | None,
    label_smoothing_factor: float,
) -> torch.Tensor:
    """Next-token cross-entropy.

    A function of your own may leave the last two parameters out; train then refuses values for them.

    Args:
        logits: (labels, vocabulary) What the model says where something is learned, each beside the token that follows.
        labels: (labels,) Those tokens.
        num_items: The labels of the whole optimizer step.
        label_weights: (vocabulary,) in float32, or None: how much each token counts; from train.label_weights.
        label_smoothing_factor: Share of the target that is spread over all tokens; from the parameter of this name.

    Returns:
        A scalar to call backward on.
    """
    return next_token_loss(logits, labels, num_items, label_weights, label_smoothing_factor)
