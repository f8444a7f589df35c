"""Compares the merged model with the trained one: logits and greedy answers.

The two models are not in memory at the same time, and neither are the logits of more than a few labels: a row of 2,000
labels has 1.2 GB of them in float32, with a vocabulary of 152,000. What is kept of the trained model is its output head, and
what the head gets for each labelled token; its logits are computed from that again.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.functional import cross_entropy, log_softmax

from stages.core.progress import progress
from stages.core.tokens import IGNORE
from stages.merge.devices import move_to
from stages.merge.figures import TokenFigures
from stages.merge.hidden_states import HiddenStates
from stages.merge.lora_weights import LoraPair
from stages.merge.memory import LabelChunks, explain_out_of_memory
from stages.model.collate import collate_padded
from stages.model.logits import is_head_last, label_hidden_states, logits_of, modify_head_input
from stages.model.probe import TRIAL_ERRORS, reason_of

GREEDY_ROWS = 16
"""The number of rows whose prompts are answered."""
GREEDY_TOKENS = 32
"""The maximum number of tokens of an answer that are compared."""


class TrainedOutputs:
    """What is left of a trained model: enough to compute its logits on some rows again."""

    head: torch.nn.Module
    """Its output head, with the head's adapter if it has one."""
    hidden: HiddenStates
    """What the head gets for each labelled token, (labels, hidden size), by row."""
    base_losses: torch.Tensor
    """(labels of all rows,) in float32 on the CPU: the loss of the base without the adapter, in nats."""
    answers: list[tuple[list[int], list[int]]]
    """(prompt, greedy answer) in tokens, of the first rows. What the head gets for each token of the answers follows that
    of the rows in `hidden`."""

    def __init__(
        self,
        model: Any,
        rows: Sequence[dict[str, Any]],
        *,
        hidden: HiddenStates,
        stops: Sequence[int],
        initial: Mapping[str, LoraPair],
    ) -> None:
        """Runs the model on each row, with the adapter and without.

        Args:
            model: The PEFT model in evaluation mode.
            rows: Each with "input_ids" and "labels", at least one of them labelled.
            hidden: An empty file.
            stops: The tokens that end an answer.
            initial: The LoRA matrices at the start of training, by weight, if they were subtracted from the base (PiSSA,
                OLoRA).

        Raises Problem if memory runs out.
        """
        self.head, self.hidden = model.get_output_embeddings(), hidden
        logits, base_losses = _LabelLogits(model), []
        for row in progress(rows, "merge: trained model", len(rows)):  # not in batches: padding may change the last bits
            with torch.no_grad(), _explain_row(row):
                batch = _batch(row, model)
                hidden.append(label_hidden_states(model, batch))
                with _without_adapter(model, initial):
                    base_losses.append(logits.losses(label_hidden_states(model, batch), batch["targets"]))
        self.base_losses = torch.cat(base_losses)
        with explain_out_of_memory("answering prompts with the trained model"):
            self.answers = [greedy_answer(model, row, stops) for row in rows[:GREEDY_ROWS]]
        for prompt, answer in self.answers:
            row = _answered(prompt, answer)
            with torch.no_grad(), _explain_row(row):
                hidden.append(label_hidden_states(model, _batch(row, model)))


def compare(
    trained: TrainedOutputs, model: Any, rows: Sequence[dict[str, Any]], *, name: str = "merged model"
) -> TokenFigures:
    """How much the logits of a model differ from those of the trained one, at each labelled token.

    Args:
        trained: Its outputs on `rows`.
        model: The merged model in evaluation mode.
        rows: The same rows, or the first of them.
        name: What `model` is, for the progress bar.

    Raises Problem if memory runs out.
    """
    logits, found = _LabelLogits(model), []
    for number, row in enumerate(progress(rows, f"merge: {name}", len(rows))):
        with torch.no_grad(), _explain_row(row):
            batch = _batch(row, model)
            found.append(
                logits.compare(label_hidden_states(model, batch), batch["targets"], trained.hidden[number], trained.head)
            )
    kl, delta_p, same_top, logit_difference, trained_loss, merged_loss = torch.cat(found, 1).double().numpy()
    return TokenFigures(
        row=np.repeat(np.arange(len(rows)), [part.shape[1] for part in found]),
        kl=kl,
        delta_p=delta_p,
        same_top=same_top,
        logit_difference=logit_difference,
        trained_loss=trained_loss,
        merged_loss=merged_loss,
        base_loss=trained.base_losses[: len(kl)].double().numpy(),
    )


def label_losses(model: Any, rows: Sequence[dict[str, Any]]) -> torch.Tensor:
    """(labels of all rows,) in float32 on the CPU: a model's loss of each label in nats.

    Args:
        model: In evaluation mode.
        rows: As for TrainedOutputs.

    Raises Problem if memory runs out.
    """
    logits, losses = _LabelLogits(model), []
    for row in progress(rows, "merge: base, not quantized", len(rows)):
        with torch.no_grad(), _explain_row(row):
            batch = _batch(row, model)
            losses.append(logits.losses(label_hidden_states(model, batch), batch["targets"]))
    return torch.cat(losses)


class _LabelLogits:
    """The logits of one model for its hidden states, in chunks of labels."""

    def __init__(self, model: Any) -> None:
        self._model, self._head = model, model.get_output_embeddings()
        with explain_out_of_memory("running the model on a few tokens"):
            self._head_is_last = is_head_last(model, self._head)
        self._chunks = LabelChunks(self._head.weight.shape[0])

    def losses(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """(labels,) in float32 on the CPU: the loss of each label in nats.

        Args:
            hidden: (labels, hidden size), from `label_hidden_states`.
            targets: (labels,)
        """

        def compute(chunk: slice) -> torch.Tensor:
            logits = self._logits(hidden[chunk]).float()
            return cross_entropy(logits, targets[chunk].to(logits.device), reduction="none")

        return self._chunks.map(compute, len(targets))

    def compare(
        self, hidden: torch.Tensor, targets: torch.Tensor, trained_hidden: torch.Tensor, trained_head: torch.nn.Module
    ) -> torch.Tensor:
        """The fields of TokenFigures from `kl` to `merged_loss`, (6, labels) in float32 on the CPU.

        Args:
            hidden: (labels, hidden size) Of this model, the merged one.
            targets: (labels,)
            trained_hidden: (labels, hidden size) Of the trained model.
            trained_head: The trained model's output head.
        """

        def compute(chunk: slice) -> torch.Tensor:
            merged = self._logits(hidden[chunk])
            trained = self._logits(trained_hidden[chunk], trained_head).to(merged.device)
            return _compare_logits(trained, merged, targets[chunk].to(merged.device))

        return self._chunks.map(compute, len(targets))

    def first_difference(
        self, hidden: torch.Tensor, trained_hidden: torch.Tensor, trained_head: torch.nn.Module
    ) -> float | None:
        """Where this model's most likely token is first another one than the trained model's: by how much the trained
        model's logit of its own token is above that of the other one. None if there is no difference.

        Args:
            hidden: (tokens of the answer, hidden size) Of this model.
            trained_hidden: As `hidden`, of the trained model.
            trained_head: The trained model's output head.
        """

        def compute(chunk: slice) -> torch.Tensor:
            top = self._logits(hidden[chunk]).argmax(-1, keepdim=True)
            trained = self._logits(trained_hidden[chunk], trained_head).float().to(top.device)
            wanted = trained.argmax(-1, keepdim=True)
            margin = trained.gather(-1, wanted) - trained.gather(-1, top)
            return torch.stack([(top != wanted).float(), margin]).squeeze(-1)

        differs, margin = self._chunks.map(compute, len(hidden))
        return float(margin[int(differs.argmax())]) if differs.any() else None

    def _logits(self, hidden: torch.Tensor, head: torch.nn.Module | None = None) -> torch.Tensor:
        """(labels, vocabulary), with another model's head if one is given."""
        if self._head_is_last:
            head = head or self._head
            logits: torch.Tensor = head(move_to(head, hidden))
            return logits
        if head is None:
            return logits_of(self._model, hidden)
        # What the model does after its head, it does to the logits of the other one.
        others = head(move_to(head, hidden)).unsqueeze(0)
        hook = self._head.register_forward_hook(lambda _module, _inputs, own: others.to(own.device))
        try:
            return logits_of(self._model, move_to(self._head, hidden[:1]))
        finally:
            hook.remove()


def _compare_logits(trained: torch.Tensor, merged: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """As `_LabelLogits.compare`, from logits (labels, vocabulary) of both models in any dtype."""
    trained, merged = trained.float(), merged.float()
    same_top = trained.argmax(-1) == merged.argmax(-1)
    logit_difference = (trained - merged).abs_().amax(-1)
    trained, merged = log_softmax(trained, -1), log_softmax(merged, -1)
    at = targets.unsqueeze(-1)
    trained_label, merged_label = trained.gather(-1, at).squeeze(-1), merged.gather(-1, at).squeeze(-1)
    kl = merged.neg_().add_(trained).mul_(trained.exp_()).sum(-1)  # in place: these are the largest tensors
    delta_p = merged_label.exp() - trained_label.exp()
    return torch.stack([kl, delta_p, same_top.float(), logit_difference, -trained_label, -merged_label])


@contextmanager
def _without_adapter(model: Any, initial: Mapping[str, LoraPair]) -> Iterator[None]:
    """Makes a PEFT model the base for a while.

    The base of PiSSA and OLoRA is what was left of it after the subtraction, together with the initial matrices.
    """
    if not initial:
        with model.disable_adapter():
            yield
        return
    modules = {name: model.get_base_model().get_submodule(name.removesuffix(".weight")) for name in initial}
    trained = {name: (_matrices(module), module.lora_variant) for name, module in modules.items()}
    try:
        for name, module in modules.items():
            _set_matrices(module, initial[name])
            module.lora_variant = {}  # DoRA, which changes nothing at the start of training
        yield
    finally:
        for name, module in modules.items():
            matrices, module.lora_variant = trained[name]
            _set_matrices(module, matrices)


def _matrices(module: Any) -> LoraPair:
    return LoraPair(module.lora_A["default"].weight.data, module.lora_B["default"].weight.data)


def _set_matrices(module: Any, matrices: LoraPair) -> None:
    for parameter, matrix in (
        (module.lora_A["default"].weight, matrices.lora_A),
        (module.lora_B["default"].weight, matrices.lora_B),
    ):
        parameter.data = matrix.to(parameter)


def _batch(row: dict[str, Any], model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.to(model.device) for name, tensor in collate_padded([row]).items()}


@contextmanager
def _explain_row(row: dict[str, Any]) -> Iterator[None]:
    with explain_out_of_memory(f"comparing the models on a row of {len(row['input_ids']):,} tokens"):
        yield


# Greedy answers


def greedy_answer(model: Any, row: dict[str, Any], stops: Sequence[int]) -> tuple[list[int], list[int]]:
    """The tokens before the first label, and the model's greedy answer to them.

    If the model's own code cannot generate, the answer is the row's own, and a line says so.
    """
    first = int(np.flatnonzero(np.asarray(row["labels"]) != IGNORE)[0])
    prompt = [int(token) for token in row["input_ids"][:first]]
    ids = torch.tensor([prompt], device=model.device)
    # Not the logits of the whole prompt, which only some models leave out by themselves.
    try:
        with torch.no_grad(), modify_head_input(model.get_output_embeddings(), lambda hidden: hidden[:, -1:]):
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=GREEDY_TOKENS,
                do_sample=False,
                repetition_penalty=1.0,
                eos_token_id=list(stops) or None,
                pad_token_id=0,
            )
    except torch.OutOfMemoryError:
        raise
    except TRIAL_ERRORS as error:
        print(f"merge: the trained model cannot generate: {reason_of(error)}; a row's own answer is compared", flush=True)
        return prompt, [int(token) for token in row["input_ids"][first:][:GREEDY_TOKENS]]
    return prompt, out[0, len(prompt) :].tolist()


class AnswerFigures(NamedTuple):
    """How many of the trained model's greedy answers another model gives too."""

    same: int
    """Token for token."""
    near_ties: int
    """Up to a token for which the trained model's own choice is one that rounding can turn."""
    different: int


def compare_answers(trained: TrainedOutputs, model: Any, logit_difference: float) -> AnswerFigures:
    """How many of the trained model's greedy answers `model` would give.

    It gives the same answer if, after the prompt and each part of the answer, its most likely token is the trained
    model's. So one forward pass over prompt and answer is enough. What follows a different token is not compared.

    Let a be the trained model's token, and b the other one's. If no logit of the two models differs by more than d, then b
    can be on top only if the trained model's logits of a and b differ by at most 2 d: a near tie.

    Args:
        trained: Its answers.
        model: In evaluation mode.
        logit_difference: d, the largest difference of two logits on the labelled tokens, whose KL divergence is judged.

    Raises Problem if memory runs out.
    """
    logits, margins = _LabelLogits(model), []
    first = len(trained.hidden) - len(trained.answers)
    for number, (prompt, answer) in enumerate(trained.answers, first):
        row = _answered(prompt, answer)
        with torch.no_grad(), _explain_row(row):
            batch = _batch(row, model)
            hidden = label_hidden_states(model, batch)
            margins.append(logits.first_difference(hidden, trained.hidden[number], trained.head))
    near_ties = sum(margin is not None and margin <= 2 * logit_difference for margin in margins)
    same = margins.count(None)
    return AnswerFigures(same, near_ties, len(margins) - same - near_ties)


def _answered(prompt: list[int], answer: list[int]) -> dict[str, Any]:
    """A prompt with its answer as a row; the answer is labelled."""
    return {"input_ids": [*prompt, *answer], "labels": [IGNORE] * len(prompt) + answer}
