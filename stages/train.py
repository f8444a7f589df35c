"""Trains a LoRA adapter on the quantized base model."""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, get_peft_model
from pydantic import Field
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from stages.lib.batch import Shuffled, flatten, pad, use_flat_rows
from stages.lib.jsonl import read_json, write_json
from stages.lib.labels import IGNORE
from stages.lib.loss import label_logits, next_token_loss
from stages.lib.output import fresh_file, fresh_folder
from stages.lib.problem import Problem
from stages.lib.quantized import Quantization, load_quantized
from stages.lib.tokens import read_tokens

KEPT_CHECKPOINTS = 2
"""With one alone, a run killed while the newer is written and the older removed would have none."""
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate")


class Params(Quantization):
    """Quantization, adapter and optimization. PEFT's and TrainingArguments' names."""

    r: int = Field(gt=0)
    """Rank of the adapter: its size, and how much it can learn."""
    lora_alpha: float = Field(gt=0)
    """The adapter's product is scaled by lora_alpha / r; usually one or two times r."""
    lora_dropout: float = Field(ge=0, lt=1)
    """Share of the adapter's inputs that are left out at random."""
    use_rslora: bool
    """Scale by lora_alpha / sqrt(r), which keeps large ranks learning."""
    target_modules: Literal["all-linear"] | list[str]
    """Which layers get an adapter: all linear ones but the output head, or a list of names (baichuan's is W_pack)."""
    num_train_epochs: float = Field(gt=0)
    """How often every row is seen."""
    per_device_train_batch_size: int = Field(gt=0)
    """Rows that go through the model at once; memory grows with it."""
    gradient_accumulation_steps: int = Field(gt=0)
    """Batches that one optimizer step adds up: rows a step = the two multiplied."""
    per_device_eval_batch_size: int = Field(gt=0)
    """The same for validation."""
    learning_rate: float = Field(gt=0)
    """Peak step size of the optimizer."""
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup", "inverse_sqrt"]
    """How it falls after the warm-up."""
    warmup_steps: float = Field(ge=0)
    """Optimizer steps over which it rises; below 1, a share of all steps."""
    weight_decay: float = Field(ge=0)
    """Pull of the adapter's weights towards zero."""
    max_grad_norm: float = Field(gt=0)
    """Longer gradients are shortened to this."""
    optim: str
    """The optimizer: adamw_torch, paged_adamw_8bit, ..."""
    gradient_checkpointing: bool
    """Compute activations twice instead of keeping them: slower, and a fraction of the memory."""
    logging_steps: int = Field(gt=0)
    """A point of the training curve every so many optimizer steps."""
    eval_steps: int = Field(gt=0)
    """A point of the validation curve every so many optimizer steps."""
    save_steps: int = Field(gt=0)
    """A checkpoint every so many optimizer steps; a killed run goes on from the last."""
    seed: int
    """For the adapter's first weights and for dropout."""
    data_seed: int
    """For the order of the rows."""
    full_determinism: bool
    """On a GPU, the same bytes at every run, at some cost in speed; the CPU needs no such switch."""


def train(params: Params, tokens: Path, validation: Path, base: Path, adapter: Path, report: Path, curves: Path) -> None:
    """Learns an adapter for `base` from the rows in `tokens`, and follows the loss on those in `validation`.

    `adapter` gets PEFT's adapter_config.json and adapter_model.safetensors, and training.json, which tells `merge` how the
    base was quantized. `report` gets the final losses and counts, `curves` train.csv and validation.csv by optimizer step.

    A run that is killed goes on from its last checkpoint and ends in the same bytes; a checkpoint is only ever used by a
    run with the same parameters, data, base, code and packages.

    Raises Problem if another process trains the same, if a parameter does not fit the model, or if the loss is not finite.
    """
    rows, validation_rows = read_tokens(tokens).to_pylist(), read_tokens(validation).to_pylist()
    with _checkpoints(_fingerprint(params, tokens, validation, base)) as checkpoints:
        set_seed(params.seed)  # before the adapter: its first weights are random
        quantized = load_quantized(base, params)
        flat = use_flat_rows(quantized.model)
        model = _with_adapter(params, quantized.model)
        arguments = _arguments(params, checkpoints, model.dtype, cpu=model.device.type == "cpu")
        trainer = _Trainer(params, model, arguments, rows, validation_rows, flat=flat)
        before = trainer.measure()
        trainer.train(resume_from_checkpoint=_last_whole_checkpoint(checkpoints))
        after = trainer.measure()
        _save(params, model, quantized.layers, adapter)
    history = trainer.state.log_history
    results = _results(model, rows, before, after, steps=trainer.state.global_step)
    with fresh_file(report) as file:
        write_json(file, results)
    with fresh_folder(curves) as folder:
        points = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
        validated = [(0, before["loss"])] + [
            (entry["step"], entry["eval_loss"]) for entry in history if "eval_loss" in entry
        ]
        validated += [(trainer.state.global_step, after["loss"])] if validated[-1][0] < trainer.state.global_step else []
        _write_curve(folder / "train.csv", points)
        _write_curve(folder / "validation.csv", validated)
    print(f"train: validation loss {before['loss']:.4f} before, {after['loss']:.4f} after {trainer.state.global_step} steps")


def _with_adapter(params: Params, model: Any) -> Any:
    """The model with a fresh LoRA adapter in float32. Raises Problem if target_modules do not fit it."""
    if params.gradient_checkpointing:
        model.enable_input_require_grads()
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=params.r,
        lora_alpha=params.lora_alpha,
        lora_dropout=params.lora_dropout,
        use_rslora=params.use_rslora,
        target_modules=params.target_modules,
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        names = sorted({name.rpartition(".")[2] for name, layer in model.named_modules() if _is_linear(layer)})
        raise Problem(
            f"params.yaml: train.target_modules: {' '.join(str(error).split())} Linear layers here: {', '.join(names)}"
        ) from None


def _is_linear(layer: torch.nn.Module) -> bool:
    return isinstance(layer, torch.nn.Linear)


def _arguments(params: Params, checkpoints: Path, dtype: torch.dtype, *, cpu: bool) -> TrainingArguments:
    """Transformers' arguments. Raises Problem if a value is not one of theirs."""
    passed = params.model_dump(exclude={*Quantization.model_fields, *LORA_FIELDS, "gradient_checkpointing"})
    if params.gradient_checkpointing:
        # Transformers 5.23 renames it, and warns of the name that 5.17 needs.
        names = {field.name for field in dataclasses.fields(TrainingArguments)}
        prefix = "activation" if "activation_checkpointing" in names else "gradient"
        passed |= {f"{prefix}_checkpointing": True, f"{prefix}_checkpointing_kwargs": {"use_reentrant": False}}
    try:
        arguments = TrainingArguments(
            output_dir=str(checkpoints),
            use_cpu=cpu,
            bf16=dtype == torch.bfloat16,
            fp16=dtype == torch.float16,
            eval_strategy="steps",
            save_strategy="steps",
            save_total_limit=KEPT_CHECKPOINTS,
            report_to=[],
            disable_tqdm=not sys.stderr.isatty(),
            logging_nan_inf_filter=False,
            remove_unused_columns=False,
            **passed,
        )
    except ValueError as error:
        raise Problem(f"params.yaml: train: {' '.join(str(error).split())}") from None
    # One process drives one GPU. The Trainer would split each batch over all that it sees, with DataParallel.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


LORA_FIELDS = ("r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules")


class _Trainer(Trainer):  # type: ignore[misc]
    """Transformers' Trainer with Loratory's loss, order of rows and measure."""

    def __init__(
        self,
        params: Params,
        model: Any,
        arguments: TrainingArguments,
        rows: list[dict[str, Any]],
        validation: list[dict[str, Any]],
        *,
        flat: bool,
    ) -> None:
        super().__init__(
            model=model,
            args=arguments,
            train_dataset=rows,
            eval_dataset=validation,
            data_collator=flatten if flat else pad,
            callbacks=[_Watch(rows)],
        )
        self.remove_callback(PrinterCallback)  # _Watch says the same in words
        self.params = params
        # The loss below divides by the labels of the whole step; without this the Trainer would divide once more.
        self.model_accepts_loss_kwargs = True

    def compute_loss(
        self, model: Any, inputs: dict[str, torch.Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        logits, labels = label_logits(self.accelerator.unwrap_model(model), inputs)
        loss = next_token_loss(logits, labels, num_items_in_batch if num_items_in_batch is not None else len(labels))
        return (loss, {"logits": logits}) if return_outputs else loss

    def _get_train_sampler(self, train_dataset: Any = None) -> Shuffled:
        return Shuffled(len(self.train_dataset), self.params.data_seed)

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        measured = self.measure()
        metrics = {"eval_loss": measured["loss"], "eval_token_accuracy": measured["token_accuracy"]}
        self.log(metrics)
        self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def measure(self) -> dict[str, float]:
        """Loss a label and share of labels that are the likeliest token, over all labels of validation."""
        model = self.accelerator.unwrap_model(self.model)
        was_training = model.training
        model.eval()
        loss, right, labels_seen = 0.0, 0, 0
        rows = sorted(self.eval_dataset, key=lambda row: len(row["input_ids"]))
        size = self.params.per_device_eval_batch_size
        with torch.no_grad(), self.compute_loss_context_manager():
            for start in range(0, len(rows), size):
                batch = {
                    name: tensor.to(model.device) for name, tensor in self.data_collator(rows[start : start + size]).items()
                }
                logits, labels = label_logits(model, batch)
                loss += next_token_loss(logits, labels, 1).item()
                right += int((logits.argmax(-1) == labels).sum())
                labels_seen += len(labels)
        model.train(was_training)
        return {"loss": loss / labels_seen, "token_accuracy": right / labels_seen}


class _Watch(TrainerCallback):  # type: ignore[misc]
    """Marks whole checkpoints, stops at a loss that is not finite, and tells how it goes where there is no bar."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.mean_tokens = sum(len(row["input_ids"]) for row in rows) / len(rows)
        self.started: tuple[int, float] | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.started = self.started or (state.global_step, time.monotonic())

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        loss = logs.get("loss", 0.0)
        if not torch.isfinite(torch.tensor(loss)):
            raise Problem(
                f"the loss is {loss} at step {state.global_step}; lower train.learning_rate, or set train.dtype to bfloat16 "
                "or float32"
            )
        if "loss" in logs and args.disable_tqdm and self.started:
            first, since = self.started
            seconds = time.monotonic() - since
            rows = (state.global_step - first) * args.train_batch_size * args.gradient_accumulation_steps
            left = seconds / max(1, state.global_step - first) * (state.max_steps - state.global_step)
            print(
                f"train: step {state.global_step}/{state.max_steps}, loss {loss:.4f}, "
                f"{rows * self.mean_tokens / seconds:,.0f} tokens/s, {left / 60:.1f} min left",
                flush=True,
            )

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        for file in folder.iterdir():
            with file.open("rb") as written:
                os.fsync(written.fileno())
        with (folder / WHOLE).open("wb") as mark:
            os.fsync(mark.fileno())


WHOLE = "whole"
"""The file that is written last into a checkpoint."""


def _last_whole_checkpoint(checkpoints: Path) -> str | None:
    for folder in checkpoints.glob("checkpoint-*"):
        if not (folder / WHOLE).exists():
            shutil.rmtree(folder)
    last: str | None = get_last_checkpoint(str(checkpoints))
    if last:
        print(f"train: goes on from {Path(last).name}")
    return last


def _fingerprint(params: Params, *inputs: Path) -> str:
    """Names all that the training reads, so that no other run takes up its checkpoints."""
    digest = hashlib.sha256(params.model_dump_json().encode())
    digest.update(" ".join(f"{package}=={version(package)}" for package in PACKAGES).encode())
    code = [Path(__file__), *sorted((Path(__file__).parent / "lib").glob("*.py"))]
    manifests = [path / "manifest.json" if path.is_dir() else path for path in inputs]
    for file in [*code, *manifests]:
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def _checkpoints(fingerprint: str) -> Iterator[Path]:
    """The folder for this run's checkpoints, held against a second trainer, and removed when the run ends well.

    It lies outside every output, since DVC deletes those before a stage runs, and below DVC_ROOT, which in a run of
    `dvc exp run --temp` or of the queue is still the project's own folder.
    """
    folder = Path(os.environ.get("DVC_ROOT", ".")) / ".checkpoints" / fingerprint
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise Problem(
                f"process {lock.read().strip()} is training the very same (same data, base, code and parameters); wait for "
                f"it, or end it with: kill {lock.read().strip()}"
            ) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        yield folder
    shutil.rmtree(folder)


def _save(params: Params, model: Any, quantized_layers: list[str], adapter: Path) -> None:
    """PEFT's two files and ours, the same bytes for the same adapter."""
    with fresh_folder(adapter) as folder:
        model.save_pretrained(folder)
        (folder / "README.md").unlink(missing_ok=True)
        config = read_json(folder / "adapter_config.json")
        for key, value in config.items():
            if isinstance(value, list):
                config[key] = sorted(value)  # PEFT writes sets, in an order that changes from run to run
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        settings = params.model_dump(include=set(Quantization.model_fields))
        settings["dtype"] = str(model.dtype).removeprefix("torch.")  # what "auto" came to here
        packages = {package: version(package) for package in PACKAGES}
        training = {"quantization": settings, "quantized_layers": quantized_layers, "packages": packages}
        write_json(folder / "training.json", training)


def _results(
    model: Any, rows: list[dict[str, Any]], before: dict[str, float], after: dict[str, float], steps: int
) -> dict[str, Any]:
    return {
        "rows": len(rows),
        "tokens": sum(len(row["input_ids"]) for row in rows),
        "label_tokens": sum(label != IGNORE for row in rows for label in row["labels"]),
        "steps": steps,
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "validation_loss_before": before["loss"],
        "validation_loss": after["loss"],
        "validation_token_accuracy_before": before["token_accuracy"],
        "validation_token_accuracy": after["token_accuracy"],
    }


def _write_curve(path: Path, points: list[tuple[int, float]]) -> None:
    lines = "".join(f"{step},{loss}\n" for step, loss in points)
    path.write_text("step,loss\n" + lines, encoding="utf-8", newline="\n")
