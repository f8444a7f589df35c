"""The loss that training minimizes. To use your own: copy this file, change the function, and set train.loss to the copy.

The function is called for each micro-batch of an optimizer step, on every process, and the results are added up. For large
vocabularies it is called for several chunks of a micro-batch. A sum over the labels, divided by `num_items`, gives the same
result however the labels are split.
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

    Your function may omit the last two parameters if train.label_weights is {} and train.training_arguments has no
    label_smoothing_factor.

    Args:
        logits: (labels, vocabulary) The model's prediction for each labelled token.
        labels: (labels,) The labelled tokens.
        num_items: The number of labels in the optimizer step, over all micro-batches and processes.
        label_weights: (vocabulary,) in float32: the weight of each token as a label, from train.label_weights. None if that
            is empty.
        label_smoothing_factor: Share of the target distribution that is spread evenly over the vocabulary; from
            train.training_arguments, 0 if it is not set there.

    Returns:
        A scalar, on which `backward` is called.
    """
    return next_token_loss(logits, labels, num_items, label_weights, label_smoothing_factor)
