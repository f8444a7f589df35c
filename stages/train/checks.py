"""What can be refused before the model is loaded: parameters that do not fit each other, the hardware or the vocabulary."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments, get_scheduler

from stages.core.disk import Write, check_space, folder_size, merge_problems
from stages.core.params import bad_param
from stages.core.problem import Problem
from stages.core.tokens import TokenRows
from stages.model import distributed
from stages.model.architecture import skeleton
from stages.model.device import pick_device, pick_dtype
from stages.model.limits import read_limits
from stages.model.placement import (
    ONE_GPU,
    SPREAD,
    Memory,
    gigabytes,
    plan_placement,
    total_memory,
    weight_bytes,
)
from stages.model.probe import last_logits, probe_ids
from stages.model.quantize import Quantization, quantized_bits
from stages.train import fp8
from stages.train.arguments import KEPT_CHECKPOINTS, count_steps, make_arguments, parse_training_arguments
from stages.train.callbacks import say
from stages.train.loss import Loss, load_loss

BYTES_FLOAT32 = 4
NOT_CAUSAL = 0.2
"""The share of the logits' standard deviation by which those of a text's start may change with its end. Measured: 0.02 in
SmolLM2 with int8, whose inputs are rounded, and 0.8 in a BERT."""


def check_parameters(section: Mapping[str, Any], base: Path) -> None:
    """Raises one Problem with everything that is wrong in the parameters of `train`, as far as no model is needed, and if
    the disk has too little space for `merge`.

    Args:
        section: The parameters of `train`.
        base: The folder of the base model, for the size of its vocabulary.
    """
    problems = [bad_param(f"train.{name}", message) for name, message in _conflicts(section)]

    def attempt(check: Callable[[], object]) -> None:
        try:
            check()
        except Problem as problem:
            problems.extend(problem.messages)

    smoothing = 0.0
    try:
        smoothing = parse_training_arguments(section).get("label_smoothing_factor", 0.0)
    except Problem as problem:
        problems.extend(problem.messages)
    else:
        # With several processes TrainingArguments would connect them, which is too early here; each makes its own later.
        # A process that only starts the others must not take a GPU: so these are for the CPU.
        if distributed.world_size() == 1:
            attempt(lambda: make_arguments(section, checkpoints=Path(), dtype=torch.float32, cpu=True))
    attempt(lambda: load_loss_of(section, base, label_smoothing_factor=smoothing))
    if distributed.world_size() == 1:
        attempt(lambda: distributed.require_gpus(section["num_processes"], "train.num_processes"))
    if distributed.is_main():
        problems += memory_problems(section, base, memory=total_memory())
        problems += merge_problems(base)  # before the training is paid for
    if problems:
        raise Problem(*problems)


def check_rows(rows: TokenRows, validation_rows: TokenRows, base: Path, *, virtual_tokens: int) -> list[str]:
    """Raises Problem if a row has a token or a position that the model does not have.

    Returns lines on rows that are longer than those that the model was made for, which it computes nevertheless.

    Args:
        rows: The training rows.
        validation_rows: The validation rows.
        base: The folder of the base model.
        virtual_tokens: Those that the adapter puts before each row.
    """
    limits, problems, lines = read_limits(base), [], []
    for name, table in (("training", rows), ("validation", validation_rows)):
        if table.largest_id >= limits.vocabulary:
            problems.append(
                f"{base}: a {name} row has the token {table.largest_id:,}, and the model's vocabulary has "
                f"{limits.vocabulary:,}; the tokenizer must be the model's own, without added tokens"
            )
        longest = int(table.lengths.max(initial=0)) + virtual_tokens
        if limits.positions is not None and longest > limits.positions:
            virtual = f" with {virtual_tokens} virtual ones" if virtual_tokens else ""
            text = f"the longest {name} row has {longest:,} tokens{virtual}, and the model {limits.positions:,} positions"
            if limits.has_position_table:
                problems.append(f"{base}: {text}; lower encode.max_length")
            else:
                lines.append(f"{text}: what is beyond them is new to it")
    if problems:
        raise Problem(*problems)
    return lines


def check_causal(model: Any, base: Path) -> None:
    """Raises Problem if later tokens change the logits of earlier ones, as in BERT, which reads in both directions.

    A model in main memory, for FSDP, is not tried: it would take long.

    Args:
        model: The base model in evaluation mode.
        base: Its folder, for the message.
    """
    if model.device.type != pick_device().type:
        return
    ids = probe_ids(model)
    with torch.no_grad():
        whole, start = (last_logits(model, [count], input_ids=ids[:, :count]) for count in (ids.shape[1], 3))
    if (start - whole[:3]).float().std() > NOT_CAUSAL * whole.float().std():
        raise Problem(
            f"{base}: later tokens change what the {type(model).__name__} predicts for earlier ones, so that it is not a "
            "causal language model, or config.json does not make it one (is_decoder); fetch a model that generates text"
        )


def memory_problems(section: Mapping[str, Any], base: Path, *, memory: Memory) -> list[str]:
    """Why this machine's memory is too small for the training or for what follows it; empty if it is not.

    `merge` and `generate` load the base's size in 16 bits, spread over GPUs and main memory if one GPU does not hold it; and
    `merge` loads the model that was trained, quantized, on the GPUs together. Prints a line if main memory is needed.

    Args:
        section: The parameters of `train`.
        base: The folder of the base model.
        memory: All memory of this machine, whatever is in use.
    """
    dtype = pick_dtype(section["dtype"], pick_device())
    one = min(memory.gpus.values()) if memory.gpus else memory.main
    if not section["fsdp"] and weight_bytes(base, dtype) <= ONE_GPU * one:
        return []
    settings = Quantization(**{name: section[name] for name in Quantization.model_fields})
    model = skeleton(base, dtype)
    merged = plan_placement(model, memory)
    trained = plan_placement(model, memory, quantized=quantized_bits(model, settings))
    gpus = " + ".join(gigabytes(size) for size in memory.gpus.values()) or "none"
    machine = f"this machine has {gigabytes(memory.main)} of main memory, GPUs: {gpus}"
    problems = []
    if "disk" in merged.sizes:
        problems.append(
            f"{base}: merge and generate could not load the merged model, {gigabytes(merged.total_bytes)} of weights in "
            f"{str(dtype).removeprefix('torch.')}: {machine}; use a machine with more of either, a smaller base"
            + (", or set train.dtype and generate.dtype to bfloat16" if dtype == torch.float32 else "")
        )
    elif memory.gpus and "cpu" in merged.sizes:
        say(f"train: merge and generate will be slow on this machine: the merged model has {merged.describe()}")
    fits_one = trained.total_bytes <= ONE_GPU * one
    if memory.gpus and not fits_one and (not section["fsdp"] or trained.gpu_bytes < trained.total_bytes):
        holder = "the GPUs together must hold" if section["fsdp"] else "one GPU must hold"
        remedy = "use more GPUs" if section["fsdp"] else "use train.fsdp with several GPUs, a GPU with more memory"
        smaller = "" if settings.quantization in ("nf4", "fp4") else ", nf4"
        problems.append(
            f"{base}: with train.quantization {settings.quantization} the model has {gigabytes(trained.total_bytes)} of "
            f"weights, which {holder} in train: {machine}; {remedy}{smaller}, or a smaller base"
        )
    if section["fsdp"] and trained.total_bytes > SPREAD * memory.main:
        problems.append(
            bad_param(
                "train.fsdp",
                "true, but each process first loads the quantized model into main memory, "
                f"{gigabytes(trained.total_bytes)}, and {machine}; use a machine with more main memory",
            )
        )
    return problems


def check_learning_rate(arguments: TrainingArguments, rows: int) -> None:
    """Raises Problem if the learning rate of every optimizer step is 0, so that nothing would be trained.

    A warm-up begins at 0: so it is with a single step.

    Args:
        arguments: Those of the training; a batch is one optimizer step.
        rows: The number of training rows.
    """
    batch, steps = arguments.per_device_train_batch_size * arguments.world_size, count_steps(arguments, rows)
    warmup = arguments.get_warmup_steps(steps)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=arguments.learning_rate)
    scheduler = get_scheduler(
        arguments.lr_scheduler_type,
        optimizer=optimizer,
        num_warmup_steps=warmup,
        num_training_steps=steps,
        scheduler_specific_kwargs=arguments.lr_scheduler_kwargs,
    )
    for _ in range(steps):  # ends at the second step, but for unusual schedules
        if scheduler.get_last_lr()[0] > 0:
            return
        optimizer.step()
        scheduler.step()
    found = f"{rows:,} training rows in batches of {batch:,} are {steps} optimizer step{'s' if steps > 1 else ''}"
    raise Problem(
        bad_param(
            "train.warmup_steps",
            f"{found}, and the learning rate is 0 in all of them, since the warm-up of {warmup} begins at 0: nothing would "
            "be trained; set it to 0, lower train.per_device_train_batch_size, raise train.num_train_epochs, or add data",
        )
    )


def check_disk(trained: int, *, optim: str, checkpoints: Path, adapter: Path) -> None:
    """Raises Problem if the disk has too little space for the checkpoints and the adapter.

    A checkpoint has the trained weights in float32, and two moments of each, as Adam keeps them. A new one is written before
    the oldest is removed.

    Args:
        trained: The number of trained parameters.
        optim: The optimizer; the moments of those with 8bit in their name take a byte each, of all others four.
        checkpoints: The folder for the checkpoints.
        adapter: The output.
    """
    weights = BYTES_FLOAT32 * trained
    checkpoint = weights + 2 * trained * (1 if "8bit" in optim else BYTES_FLOAT32)
    size = (KEPT_CHECKPOINTS + 1) * checkpoint - folder_size(checkpoints)
    check_space("train", "the training", Write(checkpoints.parent, max(0, size)), Write(adapter, weights, cached=weights))


def load_loss_of(section: Mapping[str, Any], base: Path, *, label_smoothing_factor: float) -> Loss:
    """The function that is minimized. Raises Problem if the file, the label weights or the smoothing cannot be used."""
    return load_loss(
        Path(section["loss"]),
        read_limits(base).vocabulary,
        label_weights=section["label_weights"],
        label_smoothing_factor=label_smoothing_factor,
    )


def _conflicts(section: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Parameters that do not fit another one or the hardware, and why."""
    if section["method"] == "prefix_tuning" and section["gradient_checkpointing"] is True:
        yield (
            "gradient_checkpointing",
            "must be false for prefix_tuning: the layers get the prefix as a key-value cache, and a layer that is "
            "recomputed would append to it a second time",
        )
    if section["fsdp"] and section["num_processes"] == 1:
        yield "fsdp", "must be false: train.num_processes is 1"
    if section["fsdp"] and section["quantization"] not in ("nf4", "none"):
        yield "fsdp", f"must be false: train.quantization is {section['quantization']}; nf4 or none can be sharded"
    if section["method"] == "lora" and section["target_parameters"]:
        yield from _why_not_experts(section)
    if section["compute"] == "fp8":
        yield from (("compute", f"{reason}; set it to dtype") for reason in _why_not_fp8(section))


def _why_not_experts(section: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Parameters that PEFT has for linear layers alone."""
    if section["use_dora"]:
        yield "use_dora", "must be false with train.target_parameters: PEFT has DoRA for linear layers alone"
    if section["lora_dropout"] > 0:
        yield "lora_dropout", "must be 0 with train.target_parameters: PEFT has dropout for linear layers alone"
    how = section["init_lora_weights"]
    if isinstance(how, str) and how != "gaussian":
        yield "init_lora_weights", f"must be true, false or gaussian with train.target_parameters, found {how}"


def _why_not_fp8(section: Mapping[str, Any]) -> Iterator[str]:
    """Why products cannot be in FP8: only plain LoRA layers have it, and only on a Hopper GPU or later."""
    unsupported = fp8.why_unsupported(pick_device())
    if unsupported:
        yield unsupported
    if section["fsdp"]:
        yield "fp8 does not work with train.fsdp"
    if section["method"] != "lora":
        yield f"fp8 needs the method lora, found train.method {section['method']}"
        return
    if section["quantization"] == "int8":
        yield "fp8 does not work with train.quantization int8"
    if section["use_dora"]:
        yield "fp8 does not work with train.use_dora"
    if section["lora_dropout"] > 0:
        yield "fp8 does not work with train.lora_dropout above 0"
