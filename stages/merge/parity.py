"""Compares the merged model with the trained one: logits, greedy answers, and the outputs of every adapted layer."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn.functional import log_softmax

from stages.core.tokens import IGNORE
from stages.model.collate import collate_padded
from stages.model.logits import label_logits

GREEDY_ROWS = 16
"""The number of rows whose prompts are answered."""
GREEDY_TOKENS = 32
"""The maximum number of tokens of an answer that are compared."""
LAYER_INPUTS = 16
"""The number of input vectors on which each layer is compared."""
NOISE_SIGMAS = 6
"""A layer's error counts only if it is larger than this many standard deviations of rounding noise."""


class ModelOutputs:
    """The outputs of one model on some rows."""

    logits: torch.Tensor
    """(labels, vocabulary) in float32 on the CPU: the logits that predict the labelled tokens of all rows."""
    labels: torch.Tensor
    """(labels,) on the CPU."""
    answers: list[tuple[list[int], list[int]]]
    """(prompt, greedy answer) in tokens, of the first rows."""

    def __init__(self, model: Any, rows: Sequence[dict[str, Any]], *, stops: Sequence[int] | None = None) -> None:
        """Runs the model.

        Args:
            model: In evaluation mode.
            rows: Each with "input_ids" and "labels", at least one of them labelled.
            stops: The tokens that end an answer. None: no answers.
        """
        logits, labels = [], []
        with torch.no_grad():
            for row in rows:  # not in batches: padding may change the last bits
                batch = {name: tensor.to(model.device) for name, tensor in collate_padded([row]).items()}
                row_logits, row_labels = label_logits(model, batch)
                logits.append(row_logits.float().cpu())
                labels.append(row_labels.cpu())
        self.logits, self.labels = torch.cat(logits), torch.cat(labels)
        self.answers = [] if stops is None else [_answer(model, row, stops) for row in rows[:GREEDY_ROWS]]


def _answer(model: Any, row: dict[str, Any], stops: Sequence[int]) -> tuple[list[int], list[int]]:
    """The tokens before the first label, and the model's greedy answer to them."""
    first = next(position for position, label in enumerate(row["labels"]) if label != IGNORE)
    prompt = list(row["input_ids"][:first])
    ids = torch.tensor([prompt], device=model.device)
    with torch.no_grad():
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=GREEDY_TOKENS,
            do_sample=False,
            repetition_penalty=1.0,
            eos_token_id=list(stops) or None,
            pad_token_id=0,
        )
    return prompt, out[0, len(prompt) :].tolist()


def compare(trained: ModelOutputs, merged: ModelOutputs) -> dict[str, Any]:
    """How much the logits of two models differ on the same rows.

    Returns:
        mean_kl and max_kl, the Kullback-Leibler divergence of the merged model's distribution from the trained model's, in
        nats per token; top1_agreement, the share of labelled tokens for which both predict the same most likely token;
        max_abs_logit_difference; trained_loss and merged_loss, the cross-entropy in nats per token.
    """
    p, q = log_softmax(trained.logits, -1), log_softmax(merged.logits, -1)
    kl = (p.exp() * (p - q)).sum(-1)
    labels = trained.labels.unsqueeze(-1)
    return {
        "mean_kl": kl.mean().item(),
        "max_kl": kl.max().item(),
        "top1_agreement": (p.argmax(-1) == q.argmax(-1)).float().mean().item(),
        "max_abs_logit_difference": (trained.logits - merged.logits).abs().max().item(),
        "trained_loss": -p.gather(-1, labels).mean().item(),
        "merged_loss": -q.gather(-1, labels).mean().item(),
    }


def greedy_agreement(trained: ModelOutputs, model: Any) -> float:
    """The share of the trained model's greedy answers that `model` would give token for token.

    It gives the same answer if, after the prompt and each part of the answer, its most likely token is the next one. So one
    forward pass over prompt and answer is enough.
    """
    same = 0
    for prompt, answer in trained.answers:
        with torch.no_grad():
            ids = torch.tensor([[*prompt, *answer]], device=model.device)
            logits = model(input_ids=ids, use_cache=False).logits[0, -len(answer) - 1 : -1]
        same += logits.argmax(-1).tolist() == answer
    return same / len(trained.answers)


class LayerDeltas:
    """What training changed in the outputs of every adapted layer.

    The logits do not show one layer whose delta weight is missing: of 14 layers of a test model, left out one at a time, 13
    changed the logits by a mean KL divergence below 1e-3, the least by 5e-6.
    """

    def __init__(self, adapted: Any, initial: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Runs each layer on a few inputs, with and without its adapter.

        Args:
            adapted: The PEFT model.
            initial: lora_A (r, in) and scaling · lora_B (out, r) at the start of training, by layer, if they were
                subtracted from the base (PiSSA, OLoRA); they do not count as changed by training.
        """
        self._layers: dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
        """By layer: inputs (inputs, in), outputs (inputs, out), and the part of the outputs that training added."""
        for name, layer in adapted.get_base_model().named_modules():
            if not hasattr(layer, "lora_A"):
                continue
            matrix = layer.lora_A["default"].weight
            with torch.no_grad():
                # Orthonormal vectors in the row space of lora_A. On others the delta weight is zero, and rounding larger.
                inputs = torch.linalg.qr(matrix.float().T)[0].T[:LAYER_INPUTS].to(adapted.dtype)
                before, after = layer.base_layer(inputs).float(), layer(inputs).float()
                if name in initial:
                    initial_a, initial_b = (tensor.to(before) for tensor in initial[name])
                    before += inputs.float() @ initial_a.T @ initial_b.T
            self._layers[name] = inputs.cpu(), after.cpu(), (after - before).cpu()

    def shares_in(self, model: Any) -> dict[str, float]:
        """How much of its delta each layer of `model` has: 1 for all of it, 0 for none.

        The error of a layer's outputs is projected onto the delta. If the projection is no larger than that of rounding
        noise of the same size could be, the share is 1.
        """
        shares = {}
        for name, (inputs, outputs, delta) in self._layers.items():
            with torch.no_grad():
                error = model.get_submodule(name)(inputs.to(model.device, model.dtype)).float().cpu() - outputs
            projection = (error * delta).sum() / delta.norm()
            noise = error.norm() / error.numel() ** 0.5
            shares[name] = 1 + (projection / delta.norm()).item() if projection.abs() > NOISE_SIGMAS * noise else 1.0
        return shares
