"""Two models side by side: what each says at every learned token, how they answer, and what training added to each layer."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn.functional import log_softmax

from stages.core.tokens import IGNORE
from stages.model.collate import collate_padded
from stages.model.logits import label_logits

GREEDY_ROWS, GREEDY_TOKENS = 16, 32
"""Rows that are answered, and tokens of an answer that are compared; each is a pass through the model."""
PROBES = 16
"""Inputs of each layer on which it is compared."""
CHANCE = 6
"""Deviations are told from rounding by so many of its standard deviations."""


class ModelOutputs:
    """What a model says of some rows: its logits at the labelled tokens, and the likeliest answer to the row's prompt."""

    def __init__(self, model: Any, rows: Sequence[dict[str, Any]], stops: Sequence[int] | None = None) -> None:
        """With `stops`, the tokens that end an answer, the first rows are answered too."""
        logits, labels = [], []
        with torch.no_grad():
            for row in rows:  # one by one: padding may change the last bits, and this is about the last bits
                batch = {name: tensor.to(model.device) for name, tensor in collate_padded([row]).items()}
                found, wanted = label_logits(model, batch)
                logits.append(found.float().cpu())
                labels.append(wanted.cpu())
        self.logits, self.labels = torch.cat(logits), torch.cat(labels)
        """(labels, vocabulary) in float32 on the CPU, and (labels,)."""
        self.answers = [_answer(model, row, stops) for row in rows[:GREEDY_ROWS]] if stops is not None else []
        """(prompt, answer) tokens of each row that was answered."""


def _answer(model: Any, row: dict[str, Any], stops: Sequence[int]) -> tuple[list[int], list[int]]:
    learned = [place for place, label in enumerate(row["labels"]) if label != IGNORE]
    prompt = list(row["input_ids"][: learned[0]])
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
    """How far one model is from the other; Kullback-Leibler divergence and losses in nats a token."""
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
    """The share of `trained`'s answers that `model` would give too.

    It would, if and only if at each token of the answer that token is its likeliest: one pass an answer tells.
    """
    same = 0
    for prompt, answer in trained.answers:
        with torch.no_grad():
            ids = torch.tensor([[*prompt, *answer]], device=model.device)
            logits = model(input_ids=ids, use_cache=False).logits[0, -len(answer) - 1 : -1]
        same += logits.argmax(-1).tolist() == answer
    return same / len(trained.answers)


class LayerDeltas:
    """What an adapter adds to the outputs of its layers.

    The logits alone would miss a layer: of 14 of the sample's, left out one at a time, 13 moved them by a mean KL
    below 1e-3, the least by 5e-6.
    """

    def __init__(self, adapted: Any, first: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
        """`first`: A (r, in) and scale · B (out, r) of the layers with whose own part the adapter began (PiSSA, OLoRA)."""
        self._layers: dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
        for name, layer in adapted.get_base_model().named_modules():
            if not hasattr(layer, "lora_A"):
                continue
            a = layer.lora_A["default"].weight
            with torch.no_grad():
                # Orthonormal, and from the space on which the product acts: elsewhere rounding is the larger part.
                inputs = torch.linalg.qr(a.float().T)[0].T[:PROBES].to(adapted.dtype)
                before, after = layer.base_layer(inputs).float(), layer(inputs).float()
                if name in first:
                    first_a, first_b = (factor.to(before) for factor in first[name])
                    before += inputs.float() @ first_a.T @ first_b.T
            self._layers[name] = inputs.cpu(), after.cpu(), (after - before).cpu()

    def shares_in(self, model: Any) -> dict[str, float]:
        """How much of its addition each layer of `model` has, by its name: 1 where all, or where rounding hides the rest."""
        shares = {}
        for name, (inputs, wanted, added) in self._layers.items():
            with torch.no_grad():
                error = model.get_submodule(name)(inputs.to(model.device, model.dtype)).float().cpu() - wanted
            along = (error * added).sum() / added.norm()
            by_chance = error.norm() / error.numel() ** 0.5
            shares[name] = 1 + (along / added.norm()).item() if along.abs() > CHANCE * by_chance else 1.0
        return shares
