"""Trains an adapter on the quantized base model."""

import platform
import resource
import subprocess
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field
from transformers import set_seed
from transformers.utils import logging

from stages.core.jsonl import read_json, write_json
from stages.core.output import Done, fresh_file, fresh_folder
from stages.core.problem import Problem
from stages.core.provenance import fingerprint, inputs_of
from stages.core.tokens import TokenRows, read_tokens
from stages.model import distributed
from stages.model.adapter import Adapter, add_adapter, initial_lora, save_adapter
from stages.model.checkpoints import CheckpointFolder, checkpoint_root
from stages.model.compile import compile_elementwise
from stages.model.device import pick_device
from stages.model.padding_free import enable_padding_free
from stages.model.quantize import Quantization, Quantized, load_quantized
from stages.train import fp8, memory
from stages.train.arguments import make_arguments
from stages.train.checkpoints import last_checkpoint, remove_incomplete
from stages.train.fsdp import shard_frozen
from stages.train.gradient_checkpointing import decoder_blocks
from stages.train.lora_layers import LoraLayers
from stages.train.loss import load_loss
from stages.train.recompute import Recompute
from stages.train.trainer import AdapterTrainer


class Params(Quantization, Adapter):
    """Quantization, adapter and optimization. PEFT's and TrainingArguments' names."""

    compute: Literal["dtype", "fp8"]
    """dtype: products in `dtype`. fp8: those with frozen weights in FP8, a third faster on a Hopper GPU and less exact;
    but not in validation, which measures the model that `merge` makes."""
    num_train_epochs: float = Field(gt=0)
    """How often every row is seen."""
    per_device_train_batch_size: int = Field(gt=0)
    """Rows that go through the model at once. On a GPU, rows laid end to end go through in whatever parts fit the memory."""
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
    gradient_checkpointing: bool | Literal["auto"]
    """Compute activations twice instead of keeping them: slower, and a fraction of the memory. auto: in as many blocks as
    the GPU's memory asks for."""
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
    loss: str
    """A Python file with a function `loss`: what is minimized; stages/losses/cross_entropy.py says how to write another."""
    label_weights: dict[int, float]
    """Token id to how much it counts in the loss, where that is not 1: {2: 5.0} for a stop token that is learned late."""
    label_smoothing_factor: float = Field(ge=0, lt=1)
    """Share of the target that is spread over all tokens; the validation loss is measured without."""
    neftune_noise_alpha: float = Field(ge=0)
    """Noise on the embeddings (Jain et al. 2023): 5 is usual, 0 is none; rows are then padded, which is slower."""
    early_stopping_patience: int = Field(ge=0)
    """Stops when the validation loss was not the best so many times in a row; 0: never."""
    load_best_model_at_end: bool
    """Keeps the adapter of the checkpoint with the best validation loss, not the last; eval_steps must divide save_steps."""
    num_processes: int = Field(gt=0)
    """GPUs of this machine to train on, each with its own batches: rows a step are so many times as many."""
    fsdp: bool
    """With several processes: each keeps a part of the frozen weights and gathers a layer's as it computes; for a model that
    one GPU does not hold. The result is the same."""
    training_arguments: dict[str, Any]
    """Any other field of Transformers' TrainingArguments, by its name."""
    full_determinism: bool
    """On a GPU, the same bytes at every run, at some cost in speed; the CPU needs no such switch."""


OURS = (
    "compute",
    "gradient_checkpointing",
    "loss",
    "label_weights",
    "early_stopping_patience",
    "num_processes",
    "fsdp",
    "training_arguments",
)
"""Parameters of `Params` itself that are no fields of TrainingArguments."""


def train(
    params: Params,
    *,
    train_tokens: Path,
    validation_tokens: Path,
    base: Path,
    adapter: Path,
    report: Path,
    curves: Path,
    machine: Path,
) -> Done:
    """Trains an adapter for `base` on the rows in `train_tokens`, and follows the loss on those in `validation_tokens`.

    `adapter` gets PEFT's adapter_config.json and adapter_model.safetensors, and training.json, which tells `merge` how the
    base was quantized and how much data was read. `report` gets the final losses and counts, `curves` train.csv and
    validation.csv by optimizer step. `machine` gets what differs between equal runs (time, memory, device, date); it is no
    output for DVC.

    A run that was killed resumes from its last checkpoint and ends in the same bytes; a checkpoint is only ever used by a
    run with the same parameters, data, base, code and packages. The checkpoints are removed by `Done.clean_up`.

    Raises Problem if another process runs the same training, if a parameter does not fit the model or the memory, or if
    the loss is not finite.
    """
    _check_together(params)
    paths = _Paths(train_tokens, validation_tokens, base, adapter, report, curves, machine)
    read = inputs_of("train", params.model_dump(), paths[:3], Path())
    if not distributed.is_main():
        return _train_here(params, paths, checkpoint_root() / f"train-{fingerprint(read)}")
    with CheckpointFolder("train", fingerprint(read)) as checkpoints:
        remove_incomplete(checkpoints.path)
        if params.num_processes > 1 and distributed.world_size() == 1:
            distributed.require_gpus(params.num_processes, "train.num_processes")
            distributed.launch(_train_here, params.num_processes, params, paths, checkpoints.path)
            return Done(_summary(paths), checkpoints.remove)
        return _train_here(params, paths, checkpoints.path)._replace(clean_up=checkpoints.remove)


class _Paths(NamedTuple):
    """The paths of the stage, for the processes that it starts."""

    train_tokens: Path
    validation_tokens: Path
    base: Path
    adapter: Path
    report: Path
    curves: Path
    machine: Path


def _summary(paths: _Paths) -> str:
    report = read_json(paths.report)
    return (
        f"{paths.adapter}: validation loss {report['validation_loss_before']:.4f} before, "
        f"{report['validation_loss']:.4f} after {report['steps']} steps"
    )


def _train_here(params: Params, paths: _Paths, checkpoints: Path) -> Done:
    """Trains in this process, alone or as one of several."""
    memory.grow_in_place()
    distributed.init_processes(cpu=not torch.cuda.is_available())
    started = time.monotonic()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    rows, validation_rows = TokenRows(read_tokens(paths.train_tokens)), TokenRows(read_tokens(paths.validation_tokens))
    set_seed(params.seed)  # before the adapter: its first weights are random
    quantized = load_quantized(paths.base, params, in_main_memory=params.fsdp)
    model = add_adapter(quantized.model, paths.base, params, params)
    if params.fsdp:
        shard_frozen(model, pick_device())
    flat = params.method == "lora" and not params.neftune_noise_alpha and not enable_padding_free(model.eval())
    first = initial_lora(model, params)
    low_rank = _quicken(params, model)
    given = params.model_dump(exclude={*Quantization.model_fields, *Adapter.model_fields, *OURS})
    # The Trainer's batch is a whole step, which AdapterTrainer cuts into parts.
    given["per_device_train_batch_size"] *= given["gradient_accumulation_steps"]
    given["gradient_accumulation_steps"] = 1
    arguments = make_arguments(given, params.training_arguments, checkpoints, model.dtype, cpu=model.device.type == "cpu")
    function = load_loss(
        Path(params.loss),
        model.config.vocab_size,
        label_weights=params.label_weights,
        label_smoothing_factor=params.label_smoothing_factor,
    )
    trainer = AdapterTrainer(
        model,
        arguments,
        rows,
        validation_rows,
        function,
        rows_at_once=params.per_device_train_batch_size,
        flat=flat,
        low_rank=low_rank,
        early_stopping_patience=params.early_stopping_patience,
    )
    chosen = params.gradient_checkpointing
    trainer.fit_memory(None if chosen == "auto" else len(decoder_blocks(model)) * chosen)
    before = trainer.measure()
    trainer.accelerator.wait_for_everyone()
    last = last_checkpoint(checkpoints)
    if last and distributed.is_main():
        print(f"train: resuming from {Path(last).name}", flush=True)
    with trainer.interruptible():
        trainer.train(resume_from_checkpoint=last)
    after = trainer.measure()
    if not distributed.is_main():
        return Done("")
    _save(params, model, quantized, first, rows, paths.adapter)
    _write_report(trainer, rows, before, after, paths.report)
    _write_curves(trainer, before, after, paths.curves)
    _write_machine(trainer, started, last, paths.machine)
    return Done(_summary(paths))


def _check_together(params: Params) -> None:
    """Raises Problem with all values that cannot stand together."""
    problems = []
    if params.method == "prefix_tuning" and params.gradient_checkpointing is True:
        problems.append(
            "params.yaml: train.gradient_checkpointing: must be false for prefix_tuning: the prefix is handed to the layers "
            "as a cache, which a layer that is computed twice would read twice"
        )
    if params.fsdp and params.num_processes == 1:
        problems.append("params.yaml: train.fsdp: must be false: train.num_processes is 1")
    if params.fsdp and params.quantization not in ("nf4", "none"):
        problems.append(
            f"params.yaml: train.fsdp: must be false: train.quantization is {params.quantization}; nf4 or none can be parted"
        )
    if params.load_best_model_at_end and params.save_steps % params.eval_steps:
        problems.append(
            f"params.yaml: train.save_steps: {params.save_steps} is no multiple of train.eval_steps, {params.eval_steps}; "
            "load_best_model_at_end needs a loss for every checkpoint"
        )
    if problems:
        raise Problem(*problems)


def _quicken(params: Params, model: Any) -> LoraLayers | None:
    """Replaces what can be computed faster, with the same numbers within rounding, and says what cannot."""
    recompute = Recompute()
    fused = compile_elementwise(model, recompute.remember)
    if params.method != "lora":
        return None
    in_fp8 = params.compute == "fp8" and fp8.supported(model.device) and not params.fsdp
    # kept weights would be whole in every process
    low_rank = LoraLayers(model, fp8=in_fp8, keep_dequantized=not params.fsdp, recompute=recompute)
    if distributed.is_main():
        if fused:
            print(f"train: compiled: {', '.join(fused)}", flush=True)
        if low_rank.skipped:
            print(f"train: PEFT's slower way, for {', '.join(low_rank.skipped)}", flush=True)
        if params.compute == "fp8" and not in_fp8:
            print(
                f"train: products in {model.dtype}: FP8 needs a GPU of NVIDIA's Hopper kind or later, and no fsdp",
                flush=True,
            )
    return low_rank


# Outputs


def _save(
    params: Params,
    model: Any,
    quantized: Quantized,
    first: dict[str, torch.Tensor],
    rows: TokenRows,
    adapter: Path,
) -> None:
    settings = params.model_dump(include=set(Quantization.model_fields))
    settings["dtype"] = str(model.dtype).removeprefix("torch.")  # what "auto" came to here
    with fresh_folder(adapter) as folder:
        save_adapter(model, folder, first)
        training = {
            "quantization": settings,
            "quantized_layers": quantized.layers,
            "transposed_layers": quantized.transposed,
            "data": _counts(rows),
        }
        write_json(folder / "training.json", training)


def _counts(rows: TokenRows) -> dict[str, int]:
    return {"rows": len(rows), "tokens": int(rows.lengths.sum()), "label_tokens": rows.label_tokens}


def _write_report(
    trainer: AdapterTrainer, rows: TokenRows, before: dict[str, float], after: dict[str, float], report: Path
) -> None:
    counts = _counts(rows) | {
        "steps": trainer.state.global_step,
        "trainable_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
    }
    best = trainer.state.best_model_checkpoint if trainer.args.load_best_model_at_end else None
    if best:
        counts["best_step"] = int(Path(best).name.rpartition("-")[2])
    losses = {
        "validation_loss_before": before["loss"],
        "validation_loss": after["loss"],
        "validation_token_accuracy_before": before["token_accuracy"],
        "validation_token_accuracy": after["token_accuracy"],
    }
    with fresh_file(report) as file:
        write_json(file, counts | losses)


def _write_curves(trainer: AdapterTrainer, before: dict[str, float], after: dict[str, float], curves: Path) -> None:
    history, last = trainer.state.log_history, trainer.state.global_step
    points = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    validated = [(0, before["loss"])] + [(entry["step"], entry["eval_loss"]) for entry in history if "eval_loss" in entry]
    if validated[-1][0] < last and not trainer.args.load_best_model_at_end:
        validated.append((last, after["loss"]))
    with fresh_folder(curves) as folder:
        for name, curve in (("train", points), ("validation", validated)):
            lines = "".join(f"{step},{loss}\n" for step, loss in curve)
            (folder / f"{name}.csv").write_text("step,loss\n" + lines, encoding="utf-8", newline="\n")


def _commit() -> str:
    """The commit that is checked out; "" without git, or outside a repository."""
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip()


def _write_machine(trainer: AdapterTrainer, started: float, resumed: str | None, machine: Path) -> None:
    """What differs between equal runs."""
    device = pick_device()
    gpu = device.type == "cuda"
    peak = torch.cuda.max_memory_allocated() if gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    with fresh_file(machine) as file:
        write_json(
            file,
            {
                "date": datetime.now(UTC).isoformat(timespec="seconds"),
                "commit": _commit(),
                "device": torch.cuda.get_device_name() if gpu else platform.processor() or platform.machine(),
                "processes": trainer.accelerator.num_processes,
                "seconds": round(time.monotonic() - started, 1),
                "tokens_per_second": round(trainer.watch.tokens_per_second, 1),
                "peak_memory_bytes": peak,
                "resumed_from": Path(resumed).name if resumed else None,
            },
        )
