"""Transformers' Trainer with Loratory's loss, order of rows, micro-batches, validation and checkpoints."""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from transformers import EarlyStoppingCallback, PrinterCallback, Trainer, TrainingArguments

from stages.core.jsonl import read_json, write_json
from stages.core.problem import Problem
from stages.core.tokens import TokenRows
from stages.model.logits import label_logits
from stages.train.batches import Deal, Shuffled, validation_batches
from stages.train.callbacks import REMEDY, FiniteLoss, InvalidateWeights, Progress
from stages.train.checkpoints import load_trainable, mark_complete, save_trainable, trainable_parameters
from stages.train.collator import StepCollator
from stages.train.curves import TrainingLoss
from stages.train.fsdp import average_gradients, is_sharded
from stages.train.lora_layers import LoraLayers
from stages.train.loss import Loss, head_is_last, label_loss, next_token_loss
from stages.train.memory import explain_out_of_memory
from stages.train.signals import Interruption

CURVE = "curve.json"
"""In a checkpoint: the loss since the last point of the training curve."""


class AdapterTrainer(Trainer):  # type: ignore[misc]
    """Trains the adapter of `model`, and computes its validation loss.

    The Trainer's batch is one optimizer step of a process; `collator` splits it into micro-batches.
    """

    def __init__(
        self,
        model: Any,
        arguments: TrainingArguments,
        *,
        rows: TokenRows,
        validation_rows: TokenRows,
        loss: Loss,
        collator: StepCollator,
        lora_layers: LoraLayers | None,
        early_stopping_patience: int,
    ) -> None:
        """Args:
        arguments: With the rows of a complete step as per_device_train_batch_size.
        lora_layers: The fast layers of `model`; None if it has none.
        early_stopping_patience: Stops after this number of validations without a better loss; 0: never.
        """
        self.interruption, self.finite_loss = Interruption(), FiniteLoss()
        self.progress = Progress(float(rows.lengths.mean()))
        # The order matters: an interruption requests a checkpoint, and losses are checked before one is written.
        callbacks: list[Any] = [self.interruption, self.finite_loss, self.progress]
        if lora_layers:
            callbacks.append(InvalidateWeights(lora_layers))
        if early_stopping_patience:
            callbacks.append(EarlyStoppingCallback(early_stopping_patience))
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=rows,
            eval_dataset=validation_rows,
            data_collator=collator,
            callbacks=callbacks,
        )
        self.remove_callback(PrinterCallback)  # `Progress` prints the same
        self.collator, self.loss_function, self.lora_layers = collator, loss, lora_layers
        self.head = model.get_output_embeddings()
        # Not in float16: its range is too small for gradients that are not scaled yet.
        self.loss_in_parts = model.dtype != torch.float16 and head_is_last(model, self.head)
        self.training_loss = TrainingLoss(self.accelerator, arguments.device)
        self.sharded = is_sharded(model)
        if self.sharded:
            # Accelerate refuses DistributedDataParallel for sharded weights, so it must not wrap the model.
            self.accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)
            model._is_accelerate_prepared = True
        self._measured: tuple[int, dict[str, float]] | None = None
        """The optimizer step of the last validation, and what it found."""
        # The loss is already divided by the labels of the complete step; otherwise the Trainer would divide it again.
        self.model_accepts_loss_kwargs = True

    @property
    def unwrapped_model(self) -> Any:
        """The model without the wrappers for several processes and mixed precision."""
        return self.accelerator.unwrap_model(self.model)

    # Training

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The share of one micro-batch in the loss of the optimizer step."""
        num_items = num_items_in_batch if num_items_in_batch is not None else max(1, len(inputs["targets"]))
        if self.loss_in_parts:
            loss = label_loss(model, inputs, head=self.head, loss=self.loss_function, num_items=num_items)
        else:
            loss = self.loss_function(*label_logits(model, inputs, self.head), num_items)
        # num_items counts the labels of all processes, and the gradients are then averaged over the processes.
        loss = loss * self.accelerator.num_processes
        self.finite_loss.add(loss.detach(), inputs["ids"])
        return loss

    def training_step(
        self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None, *rest: Any, **named: Any
    ) -> Any:
        """One optimizer step of this process, forward and backward, one micro-batch after the other."""
        total = torch.zeros((), device=self.args.device)
        micro_batches = inputs["micro_batches"]
        for number, batch in enumerate(micro_batches, start=1):
            with ExitStack() as stack:
                stack.enter_context(explain_out_of_memory(batch))
                if number < len(micro_batches):
                    stack.enter_context(self.accelerator.no_sync(model))  # gradients are averaged after the last one
                total += super().training_step(model, batch, num_items_in_batch, *rest, **named)
        if self.sharded:
            average_gradients(trainable_parameters(self.unwrapped_model).values())
        self._clear_recomputed()
        self.training_loss.add(total)
        return total

    def try_batch(self, rows: Sequence[dict[str, Any]]) -> None:
        """Forward and backward pass of one micro-batch; changes nothing. Raises Problem if the memory is too small."""
        model = self.unwrapped_model
        batch = self.collator.micro_batch(rows)
        was_training = model.training
        devices = [model.device] if model.device.type == "cuda" else []
        with torch.random.fork_rng(devices), explain_out_of_memory(batch), self.compute_loss_context_manager():
            model.train()
            self.compute_loss(model, self._prepare_inputs(batch)).backward()
        self.finite_loss.clear()
        self._clear_recomputed()
        model.zero_grad(set_to_none=True)
        model.train(was_training)

    def _clear_recomputed(self) -> None:
        if self.lora_layers:
            self.lora_layers.recompute.clear()

    def _get_train_sampler(self, train_dataset: Any = None) -> Shuffled:
        count, processes = len(self.train_dataset), self.accelerator.num_processes
        if processes == 1:
            return Shuffled(count, self.args.data_seed)
        # The empty row fills the last step of an epoch; Accelerate would fill it with rows that were already used.
        rows = self.args.train_batch_size
        deal = Deal(self.train_dataset.lengths, rows, processes)
        return Shuffled(count, self.args.data_seed, fill=-count % (rows * processes), deal=deal)

    def _run_epoch(self, *arguments: Any, **named: Any) -> None:
        # The state of a checkpoint has the path of the best one. If the project was moved since, the Trainer ignores it.
        best = Path(self.args.output_dir) / f"checkpoint-{self.state.best_global_step}"
        if self.state.best_model_checkpoint is None and best.is_dir():
            self.state.best_model_checkpoint = str(best)
        # A run may have failed after its training, or be resumed from the last step of an epoch that max_steps cut short.
        # The Trainer would train one more step.
        if self.finished:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*arguments, **named)

    @property
    def finished(self) -> bool:
        """Whether all steps are done, or early stopping has ended the training."""
        stopped = any(
            isinstance(callback, EarlyStoppingCallback)
            and callback.early_stopping_patience_counter >= callback.early_stopping_patience
            for callback in self.callback_handler.callbacks
        )
        return stopped or self.state.global_step >= self.state.max_steps

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not counted: the Trainer would look for the tokens in the step, but they are in its micro-batches."""
        return 0

    def log(self, logs: dict[str, float], *rest: Any) -> None:
        """Adds a point to the curves."""
        if "loss" in logs:
            logs["loss"] = self.training_loss.point(self.state.global_step)
        super().log(logs, *rest)

    # Validation

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Computes and logs the validation loss, and returns the metrics under Transformers' names."""
        measured = self.measure()
        metrics = {"eval_loss": measured["loss"], "eval_token_accuracy": measured["token_accuracy"]}
        self.log(metrics)
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        # The last step must have a checkpoint, also if early stopping ends the training; and so must the best one.
        if self.control.should_training_stop or self.args.load_best_model_at_end:
            self.control.should_save = True
        return metrics

    def measure(self) -> dict[str, float]:
        """Mean cross-entropy per label, and the share of labels that are the top-1 token, over the validation rows.

        Each process computes a part. At the step of the last validation its result is returned again. Raises Problem if
        the loss is not finite.
        """
        if self._measured is None or self._measured[0] != self.state.global_step:
            self._measured = self.state.global_step, self._measure()
        return self._measured[1]

    def _measure(self) -> dict[str, float]:
        model, rows = self.unwrapped_model, self.eval_dataset
        was_training = model.training
        model.eval()
        sums = torch.zeros(3, dtype=torch.float64, device=model.device)
        batches = validation_batches(
            rows.lengths,
            self.args.eval_batch_size,
            process=self.accelerator.process_index,
            processes=self.accelerator.num_processes,
        )
        with torch.no_grad(), self.compute_loss_context_manager():
            for numbers in batches:
                batch = self.collator.micro_batch([rows[number] for number in numbers])
                logits, labels = label_logits(model, self._prepare_inputs(batch), self.head)
                found = torch.stack([next_token_loss(logits, labels, 1), (logits.argmax(-1) == labels).sum()])
                sums += torch.cat([found.double(), sums.new_tensor([len(labels)])])
        model.train(was_training)
        loss, right, count = self.accelerator.reduce(sums, "sum").tolist()
        if not torch.isfinite(torch.tensor(loss)):
            raise Problem(f"the validation loss is {loss} at step {self.state.global_step}; {REMEDY}")
        return {"loss": loss / count, "token_accuracy": right / count}

    # Checkpoints

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        save_trainable(self.unwrapped_model, Path(output_dir or self.args.output_dir))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        curve = self.training_loss.state()
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()  # each process writes the state of its own random numbers
        if self.is_world_process_zero():
            folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            write_json(folder / CURVE, curve)
            mark_complete(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        self._load_trainable(folder)
        self.training_loss.load(read_json(folder / CURVE))

    def _load_best_model(self) -> None:
        self._load_trainable(Path(self.state.best_model_checkpoint))

    def _load_trainable(self, checkpoint: Path) -> None:
        self._measured = None
        load_trainable(self.unwrapped_model, checkpoint)
        if self.lora_layers:
            self.lora_layers.invalidate()
