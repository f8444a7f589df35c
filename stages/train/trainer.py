"""Transformers' Trainer with Loratory's loss, order of rows, checkpoints and messages."""

import contextlib
import itertools
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from tqdm import tqdm
from transformers import EarlyStoppingCallback, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from stages.core.jsonl import read_json, write_json
from stages.core.problem import Problem
from stages.core.tokens import IGNORE, TokenRows
from stages.model.collate import collate_padded, collate_padding_free
from stages.model.logits import label_logits
from stages.train import memory
from stages.train.batches import Shuffled, split
from stages.train.checkpoints import mark_complete
from stages.train.gradient_checkpointing import checkpoint_blocks, decoder_blocks
from stages.train.lora_layers import LoraLayers
from stages.train.loss import Loss, head_is_last, label_loss, next_token_loss

TRAINABLE = "trainable.safetensors"
"""In a checkpoint: all that is learned. PEFT's own file of a p-tuning holds its result and not the network behind it."""
CURVE = "curve.json"
ADAM_BYTES = 12
"""Of a parameter that is trained: its gradient and the optimizer's two means, in float32."""
NAMED_ROWS = 16
"""So many rows of a bad batch are named."""


MULTIPLE = 64
"""Flat batches on a GPU have a multiple of so many tokens, as its matrix units like."""


class AdapterTrainer(Trainer):  # type: ignore[misc]
    """Trains what can be trained of `model` on `rows`, and measures it on `validation`.

    A batch, for the Trainer, is an optimizer step of this process. It is cut into micro-batches here.
    """

    def __init__(
        self,
        model: Any,
        arguments: TrainingArguments,
        rows: TokenRows,
        validation: TokenRows,
        loss: Loss,
        *,
        rows_at_once: int,
        flat: bool,
        low_rank: LoraLayers | None,
        early_stopping_patience: int,
    ) -> None:
        """Args:
        arguments: With the rows of a step as per_device_train_batch_size.
        rows_at_once: Rows of a micro-batch, where `fit_memory` does not choose another size.
        flat: Whether rows are laid end to end.
        low_rank: The fast layers of `model`.
        """
        watch = _Watch(rows, low_rank)
        stopping = [EarlyStoppingCallback(early_stopping_patience)] if early_stopping_patience else []
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=rows,
            eval_dataset=validation,
            data_collator=self._step,
            callbacks=[watch, *stopping],
        )
        self.remove_callback(PrinterCallback)  # _Watch says the same in words
        self.watch, self.loss_function = watch, loss
        self.rows_at_once, self.flat, self.low_rank = rows_at_once, flat, low_rank
        self.plan: memory.Plan | None = None
        self.head = model.get_output_embeddings()
        # float16 has too small a range for gradients that are not scaled yet.
        self.in_parts = model.dtype != torch.float16 and head_is_last(model, self.head)
        # Transformers forgets, when it resumes, what was added up since the last point of the curve.
        self.loss_since_log, self.last_logged = torch.zeros((), device=arguments.device), 0
        # The loss is divided by the labels of the whole step; without this the Trainer would divide once more.
        self.model_accepts_loss_kwargs = True

    def _step(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The rows of a step as micro-batches; the Trainer counts "labels", in some versions without the first."""
        lengths = [len(row["input_ids"]) for row in rows]
        cuts = split(lengths, self.rows_at_once, self.plan and self.plan.tokens, padded=not self.flat)
        micro = [self._micro_batch(rows[cut]) for cut in cuts]
        return {"micro": micro, "labels": torch.cat([torch.tensor([IGNORE]), *(batch["targets"] for batch in micro)])}

    def _micro_batch(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        on_gpu = self.args.device.type == "cuda"
        batch = collate_padding_free(rows, MULTIPLE if on_gpu else 1) if self.flat else collate_padded(rows)
        return {**batch, "ids": [row["id"] for row in rows]}

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of one micro-batch: its part of the optimizer step's."""
        num_items = num_items_in_batch if num_items_in_batch is not None else max(1, len(inputs["targets"]))
        if self.in_parts:
            loss = label_loss(model, inputs, self.head, self.loss_function, num_items)
        else:
            loss = self.loss_function(*label_logits(model, inputs, self.head), num_items)
        # Each process has the labels of all of them in num_items, and the gradients are then averaged.
        loss = loss * self.accelerator.num_processes
        self.watch.seen.append((loss.detach(), inputs["ids"]))
        return loss

    def _get_train_sampler(self, train_dataset: Any = None) -> Shuffled:
        count, at_once = len(self.train_dataset), self.args.train_batch_size * self.accelerator.num_processes
        # Accelerate would fill the last batches of an epoch with rows that were seen before.
        fill = -count % at_once if self.accelerator.num_processes > 1 else 0
        return Shuffled(count, self.args.data_seed, fill)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Measures, logs, and returns the metrics under Transformers' names."""
        measured = self.measure()
        metrics = {"eval_loss": measured["loss"], "eval_token_accuracy": measured["token_accuracy"]}
        self.log(metrics)
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def measure(self) -> dict[str, float]:
        """Cross-entropy a label, and share of labels that are the likeliest token, over all labels of validation.

        Each process measures a part. Raises Problem if the loss is not finite.
        """
        model = self.accelerator.unwrap_model(self.model)
        was_training = model.training
        model.eval()
        sums = torch.zeros(3, dtype=torch.float64, device=model.device)
        with torch.no_grad(), self.compute_loss_context_manager():
            for batch in self._validation_batches():
                logits, labels = label_logits(model, self._prepare_inputs(batch), self.head)
                found = torch.stack([next_token_loss(logits, labels, 1), (logits.argmax(-1) == labels).sum()])
                sums += torch.cat([found.double(), sums.new_tensor([len(labels)])])
        model.train(was_training)
        loss, right, count = self.accelerator.reduce(sums, "sum").tolist()
        if not torch.isfinite(torch.tensor(loss)):
            raise Problem(f"the validation loss is {loss} at step {self.state.global_step}; {REMEDY}")
        return {"loss": loss / count, "token_accuracy": right / count}

    def _validation_batches(self) -> Iterator[dict[str, Any]]:
        rows, size = self.eval_dataset, self.args.eval_batch_size
        order = sorted(range(len(rows)), key=lambda number: int(rows.lengths[number]))
        index, processes = self.accelerator.process_index, self.accelerator.num_processes
        # As many for each process, since all must take part where weights are gathered; the empty row has no label.
        for start in range(index * size, -(-len(order) // (size * processes)) * size * processes, size * processes):
            yield self._micro_batch([rows[number] for number in order[start : start + size] or [len(rows)]])

    def fit_memory(self, recomputed: int | None) -> None:
        """Chooses how a step is computed, and sends the largest micro-batch through the model and back.

        Nothing else changes, and too little memory shows now. On a GPU the micro-batch is what fits (lib/memory.py);
        elsewhere it is `rows_at_once`.

        Args:
            recomputed: Blocks to compute twice; None leaves it to the memory, or is none where nothing is chosen.

        Raises Problem if the memory does not suffice.
        """
        rows, model = self.train_dataset, self.accelerator.unwrap_model(self.model)
        longest = sorted(range(len(rows)), key=lambda number: -int(rows.lengths[number]))
        checkpoint_blocks(model, recomputed or 0)
        if not self._may_choose():
            self._try([rows[number] for number in longest[: self.rows_at_once]])
            return
        most, count = int(rows.lengths.max()), len(decoder_blocks(model))
        plan = self._choose(recomputed, most, count) or memory.Plan(most, count if recomputed is None else recomputed, False)
        checkpoint_blocks(model, plan.recomputed)
        if self.low_rank:
            self.low_rank.keep_dequantized(plan.keeps_weights)
        plan = self._try_plan(plan, [rows[number] for number in longest])
        if self.is_world_process_zero():
            print(
                f"train: micro-batches of up to {plan.tokens:,} tokens; {plan.recomputed} of {count} blocks computed twice; "
                f"unpacked weights are {'kept' if plan.keeps_weights else 'made again at each use'}",
                flush=True,
            )
        self.plan = plan

    def _choose(self, recomputed: int | None, most: int, count: int) -> memory.Plan | None:
        """The plan for this GPU, from trial batches; None if nothing seems to fit."""
        rows, model = self.train_dataset, self.accelerator.unwrap_model(self.model)
        if self.low_rank:
            self.low_rank.keep_dequantized(False)  # kept weights are counted apart
        twice, kept = self._need(count), self._need(0)
        if twice is None:
            return None
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        at_once = self.args.train_batch_size
        step = int(at_once * rows.lengths.mean() + 2 * at_once**0.5 * rows.lengths.std())  # 39 of 40 are smaller
        free = memory.free_bytes() - trained * ADAM_BYTES
        packed = self.low_rank.dequantized_bytes if self.low_rank else 0
        return memory.choose(free, kept, twice, packed, count, step, most, recomputed)

    def _need(self, recomputed: int) -> memory.Need | None:
        """What micro-batches need if so many blocks are computed twice, None if it is too much even for few tokens."""
        checkpoint_blocks(self.accelerator.unwrap_model(self.model), recomputed)
        row = np.arange(memory.PROBES[1]) % 2 + 5
        # As many labels in either, so that the logits do not count for the tokens.
        labels = np.where(np.arange(len(row)) < memory.PROBES[0], row, IGNORE)
        labels[0] = IGNORE
        trials = [{"id": "trial", "input_ids": row[:tokens], "labels": labels[:tokens]} for tokens in memory.PROBES]
        try:
            self._try(trials[:1])  # kernels are compiled in the first
            return memory.Need.of(*(self._peak([trial]) for trial in trials))
        except Problem:
            return None

    def _try_plan(self, plan: memory.Plan, rows: list[dict[str, Any]]) -> memory.Plan:
        """The plan, with fewer tokens if it did not fit after all. Raises Problem if one row alone is too much."""
        most = len(rows[0]["input_ids"])
        while True:
            batch: list[dict[str, Any]] = []
            size = 0
            for row in itertools.cycle(rows):
                size += len(row["input_ids"]) if self.flat else most
                if batch and size > plan.tokens:
                    break
                batch.append(row)
            try:
                self._try(batch)
                return plan
            except Problem:
                if plan.tokens <= most:
                    raise
            plan = plan._replace(tokens=max(most, int(0.8 * plan.tokens)))

    def _may_choose(self) -> bool:
        """Processes that gather weights must compute as many micro-batches, and the same bytes ask for the same ones."""
        gathered = any(isinstance(p, DTensor) for p in self.model.parameters())
        return self.args.device.type == "cuda" and not self.args.full_determinism and not gathered

    def _peak(self, rows: list[dict[str, Any]]) -> int:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self._try(rows)
        return torch.cuda.max_memory_allocated() - before

    def _try(self, rows: list[dict[str, Any]]) -> None:
        model = self.accelerator.unwrap_model(self.model)
        batch = self._micro_batch(rows)
        was_training = model.training
        devices = [model.device] if model.device.type == "cuda" else []
        with torch.random.fork_rng(devices), self.out_of_memory_told(batch), self.compute_loss_context_manager():
            model.train()
            self.compute_loss(model, self._prepare_inputs(batch)).backward()
        self.watch.seen.clear()
        if self.low_rank:
            self.low_rank.recompute.clear()
        model.zero_grad(set_to_none=True)
        model.train(was_training)

    def training_step(
        self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None, *rest: Any, **named: Any
    ) -> Any:
        """One optimizer step of this process, forward and back, micro-batch by micro-batch."""
        total = torch.zeros((), device=self.args.device)
        for number, batch in enumerate(inputs["micro"], start=1):
            with contextlib.ExitStack() as stack:
                stack.enter_context(self.out_of_memory_told(batch))
                if number < len(inputs["micro"]):
                    stack.enter_context(self.accelerator.no_sync(model))
                total += super().training_step(model, batch, num_items_in_batch, *rest, **named)
        if self.low_rank:
            self.low_rank.recompute.clear()
        self.loss_since_log += total
        return total

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not counted: the Trainer would look for the tokens of a batch where they do not stand."""
        return 0

    def log(self, logs: dict[str, float], *rest: Any) -> None:
        """Puts a point of the curve into the history: the mean loss of the steps since the last one."""
        if "loss" in logs:
            logs["loss"] = self._mean_loss_since_log() / (self.state.global_step - self.last_logged)
            self.loss_since_log.zero_()
            self.last_logged = self.state.global_step
        super().log(logs, *rest)

    def _mean_loss_since_log(self) -> float:
        return float(self.accelerator.reduce(self.loss_since_log.clone(), "mean"))

    @contextmanager
    def out_of_memory_told(self, batch: dict[str, Any]) -> Iterator[None]:
        """Raises Problem in place of a framework's error."""
        try:
            yield
        except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
            asked = re.search(
                r"[Tt]ried to allocate ([\d.]+ ?\w+)(?:.*?of which ([\d.]+ ?\w+) is free)?", str(error), re.DOTALL
            )
            if not asked and not isinstance(error, torch.OutOfMemoryError | MemoryError):
                raise
            rows, tokens = len(batch["ids"]), batch["input_ids"].numel()
            wanted = f"asked for {asked[1]}" if asked else "too much was asked for"
            free = f", {asked[2]} were free" if asked and asked[2] else ""
            raise Problem(
                f"out of memory on a batch of {rows} rows, {tokens:,} tokens: {wanted}{free}. Set "
                "train.gradient_checkpointing to true, or lower train.per_device_train_batch_size and raise "
                "train.gradient_accumulation_steps by as much (the result stays the same), or lower encode.max_length"
            ) from None

    # Checkpoints

    def _trainable(self) -> dict[str, torch.Tensor]:
        model = self.accelerator.unwrap_model(self.model)
        return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: p.detach().contiguous() for name, p in self._trainable().items()}, folder / TRAINABLE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        self._load_trainable(folder)
        curve = read_json(folder / CURVE)
        self.loss_since_log.fill_(curve["loss_since_log"])
        self.last_logged = curve["last_logged"]

    def _load_trainable(self, folder: Path) -> None:
        saved, ours = load_file(folder / TRAINABLE), self._trainable()
        assert saved.keys() == ours.keys()
        with torch.no_grad():
            for name, parameter in ours.items():
                parameter.copy_(saved[name])
        if self.low_rank:
            self.low_rank.invalidate()

    def _load_best_model(self) -> None:
        self._load_trainable(Path(self.state.best_model_checkpoint))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        since_log = self._mean_loss_since_log()
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()  # each process writes the state of its own random numbers
        if self.is_world_process_zero():
            folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            write_json(folder / CURVE, {"loss_since_log": since_log, "last_logged": self.last_logged})
            mark_complete(folder)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Within it, Ctrl-C or SIGTERM ends the training behind a checkpoint; a second one ends it at once.

        Raises KeyboardInterrupt when it leaves, if there was one.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def stop(_number: int, _frame: FrameType | None) -> None:
            if self.watch.interrupted:
                raise KeyboardInterrupt
            self.watch.interrupted = True
            print("train: interrupted; saves a checkpoint at the end of this step", flush=True)

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if self.watch.interrupted and self.state.global_step < self.state.max_steps:
            raise KeyboardInterrupt


REMEDY = "lower train.learning_rate, or set train.dtype to bfloat16 or float32"


class _Watch(TrainerCallback):  # type: ignore[misc]
    """Stops at a loss that is not finite, ends on request, and tells how it goes: a bar on a terminal, else a line."""

    def __init__(self, rows: TokenRows, low_rank: LoraLayers | None) -> None:
        self.low_rank = low_rank
        self.mean_tokens = float(rows.lengths.mean())
        self.started: tuple[int, float] | None = None
        self.ended = 0
        self.seen: list[tuple[torch.Tensor, Sequence[str]]] = []
        """Loss and rows of each micro-batch since the last look; a look makes a GPU wait."""
        self.interrupted = False
        self.bar: Any = None
        self.tokens_per_second = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if sys.stderr.isatty() and state.is_world_process_zero:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="train", unit="step", dynamic_ncols=True)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        if self.bar is not None:
            self.bar.close()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.started = self.started or (state.global_step, time.monotonic())

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        if self.low_rank:
            self.low_rank.invalidate()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.ended += 1
        if self.ended == 1 and state.global_step < state.max_steps:
            # The first step warms up, and a GPU's work lies in its queue.
            if args.device.type == "cuda":
                torch.cuda.synchronize()
            self.started = (state.global_step, time.monotonic())
        if self.bar is not None:
            self.bar.update()
        if self.interrupted:
            control.should_save = control.should_training_stop = True
        if control.should_log or control.should_save or control.should_evaluate or control.should_training_stop:
            self.check_finite(state.global_step)

    def check_finite(self, step: int) -> None:
        seen, self.seen = self.seen, []
        for loss, ids in seen:
            if not torch.isfinite(loss):
                rows = ", ".join(ids[:NAMED_ROWS]) + (", ..." if len(ids) > NAMED_ROWS else "")
                raise Problem(
                    f"the loss is {loss.item()} in a batch before step {step}, in the rows {rows} of data/examples; {REMEDY}"
                )

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        if "loss" not in logs or not self.started:
            return
        first, since = self.started
        if state.global_step == first:
            return
        seconds, steps = time.monotonic() - since, state.global_step - first
        rows = steps * args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        self.tokens_per_second = rows * self.mean_tokens / seconds
        if self.bar is not None:
            self.bar.set_postfix_str(f"loss {logs['loss']:.4f}, {self.tokens_per_second:,.0f} tokens/s")
        elif state.is_world_process_zero:
            left = seconds / max(1, steps) * (state.max_steps - state.global_step)
            print(
                f"train: step {state.global_step}/{state.max_steps}, loss {logs['loss']:.4f}, "
                f"{self.tokens_per_second:,.0f} tokens/s, {left / 60:.1f} min left",
                flush=True,
            )
