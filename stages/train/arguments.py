"""Transformers' TrainingArguments: fields that are parameters of `train`, and any other field that the user sets by name."""

import dataclasses
import difflib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from transformers import HfArgumentParser, TrainingArguments

from stages.core.params import bad_param
from stages.core.problem import Problem

PASSED_ON = (
    "num_train_epochs",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "optim",
    "seed",
    "data_seed",
)
"""Parameters of `train` that are passed to TrainingArguments under the same name."""

RESERVED = (
    (
        "paths and names are set by the pipeline, or DVC would not find its outputs",
        "output_dir logging_dir resume_from_checkpoint run_name local_rank project",
    ),
    (
        "a stage writes its outputs and nothing else; publish them after the run",
        "push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision "
        "report_to trackio_space_id trackio_bucket_id trackio_static_space_id",
    ),
    (
        "the stage reports its progress itself",
        "disable_tqdm log_level log_level_replica log_on_each_node logging_strategy logging_first_step",
    ),
    (
        "a killed run must resume and end with the same bytes as an uninterrupted one",
        "save_strategy save_total_limit save_only_model save_on_each_node enable_jit_checkpoint ignore_data_skip "
        "restore_callback_states_from_checkpoint save_safetensors overwrite_output_dir",
    ),
    (
        "the stage computes the validation loss itself, over all labelled tokens",
        "eval_strategy eval_on_start eval_do_concat_batches eval_use_gather_object prediction_loss_only "
        "eval_accumulation_steps batch_eval_metrics include_for_metrics do_train do_eval do_predict label_names "
        "remove_unused_columns skip_memory_metrics use_cache include_num_input_tokens_seen",
    ),
    ("set train.dtype", "bf16 fp16 bf16_full_eval fp16_full_eval use_cpu"),
    ("set train.gradient_checkpointing", "activation_checkpointing activation_checkpointing_kwargs"),
    ("frozen weights need checkpointing that is not reentrant", "gradient_checkpointing_kwargs"),
    (
        "the order of the rows depends on train.data_seed only",
        "train_sampling_strategy group_by_length length_column_name dataloader_in_order",
    ),
    ("it would leave out rows", "dataloader_drop_last"),
    ("the batch size, and with it the result, would depend on the machine", "auto_find_batch_size"),
    ("it would hide a loss that is not finite", "logging_nan_inf_filter"),
    ("the loss is always divided by the number of labelled tokens on all processes", "average_tokens_across_devices"),
    (
        "set train.num_processes and train.fsdp",
        "fsdp_config deepspeed accelerator_config parallelism_config ddp_find_unused_parameters",
    ),
)
"""Fields that cannot be set in train.training_arguments: (why, or what to set instead; their names)."""

OWNED = {name: reason for reason, names in RESERVED for name in names.split()}
"""The same by name."""

AT_LEAST_0 = ("weight_decay", "max_grad_norm", "label_smoothing_factor", "neftune_noise_alpha")
"""Fields whose range TrainingArguments does not check."""

INTERVALS = ("logging_steps", "eval_steps", "save_steps")
"""Parameters of `train` that are numbers of optimizer steps, or shares of all of them if they are below 1."""

KEPT_CHECKPOINTS = 2
"""With only one, a run that is killed while the new checkpoint is written and the old one removed would have none."""

TEXT_OR_LIST = {
    field.name for field in dataclasses.fields(TrainingArguments) if "str" in (words := str(field.type)) and "list" in words
}
"""Fields that are a string or a list. Computed here, before HfArgumentParser overwrites the types."""


def make_arguments(section: Mapping[str, Any], *, checkpoints: Path, dtype: torch.dtype, cpu: bool) -> TrainingArguments:
    """The TrainingArguments of one training.

    Args:
        section: The parameters of `train`.
        checkpoints: The folder for checkpoints.
        dtype: The model's.
        cpu: Whether to train on the CPU.

    Raises Problem with every value that TrainingArguments does not accept or that the pipeline sets itself.
    """
    further = parse_training_arguments(section)
    values = {name: section[name] for name in (*PASSED_ON, *INTERVALS)}
    # With load_best_model_at_end TrainingArguments wants save_steps to be a multiple of eval_steps. There is no need:
    # `AdapterTrainer.evaluate` then has every validation followed by a checkpoint.
    values["save_steps"] = section["eval_steps"]
    # One batch of the Trainer is one optimizer step of a process; the collator splits it into micro-batches.
    values["per_device_train_batch_size"] *= section["gradient_accumulation_steps"]
    values |= {"gradient_accumulation_steps": 1, "metric_for_best_model": "eval_loss"}
    values |= further
    values["neftune_noise_alpha"] = further.get("neftune_noise_alpha") or None
    try:
        arguments = TrainingArguments(
            output_dir=str(checkpoints),
            use_cpu=cpu,
            bf16=dtype == torch.bfloat16,
            fp16=dtype == torch.float16,
            eval_strategy="steps",
            save_strategy="steps",
            save_total_limit=KEPT_CHECKPOINTS,
            restore_callback_states_from_checkpoint=True,
            report_to=[],
            disable_tqdm=True,
            logging_nan_inf_filter=False,
            remove_unused_columns=False,
            ddp_find_unused_parameters=False,
            **values,
        )
    except ValueError as error:
        raise Problem(bad_param("train", " ".join(str(error).split()))) from None
    arguments.save_steps = section["save_steps"]
    # One process uses one GPU. With several visible, the Trainer would split each batch over them (DataParallel).
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def parse_training_arguments(section: Mapping[str, Any]) -> dict[str, Any]:
    """The values of train.training_arguments, converted to the types of their fields by Transformers' own parser.

    Args:
        section: The parameters of `train`.

    Raises Problem with every name that is unknown, reserved or a parameter of `train`, and every value that does not fit.
    """
    parser = _Parser(TrainingArguments, allow_abbrev=False)
    values: dict[str, Any] = {}
    problems: list[str] = []
    for name, found in section["training_arguments"].items():
        wrong = _why_not(name, section)
        if not wrong:
            try:
                values[name] = _parse(parser, name, found)
                wrong = _out_of_range(name, values[name])
            except ValueError as error:
                wrong = f"found {found!r}: {error}"
        if wrong:
            problems.append(bad_param(f"train.training_arguments.{name}", wrong))
    problems += (
        bad_param(f"train.{name}", f"found {section[name]:g}; wanted a whole number of steps, or a share of all below 1")
        for name in INTERVALS
        if section[name] > 1 and section[name] % 1
    )
    if problems:
        raise Problem(*problems)
    return values


def count_steps(arguments: TrainingArguments, rows: int) -> int:
    """The number of optimizer steps that the Trainer makes.

    Args:
        arguments: Those of the training; a batch is one optimizer step.
        rows: The number of training rows.
    """
    if arguments.max_steps > 0:
        return int(arguments.max_steps)
    epochs, batch = float(arguments.num_train_epochs), int(arguments.per_device_train_batch_size * arguments.world_size)
    return math.ceil(epochs * -(-rows // batch))


def set_intervals(arguments: TrainingArguments, steps: int) -> None:
    """Turns the shares among INTERVALS into whole numbers of steps, rounded up, so at least 1. So does Transformers.

    Args:
        arguments: Changed in place.
        steps: The number of all optimizer steps.
    """
    for name in INTERVALS:
        value = getattr(arguments, name)
        # Rounded first, since 0.07 * 100 is 7.000000000000001. A tiny share is still a step.
        setattr(arguments, name, max(1, math.ceil(round(value * steps, 6))) if value < 1 else int(value))


def field_names() -> list[str]:
    """The fields of TrainingArguments in the installed version."""
    return [field.name for field in dataclasses.fields(TrainingArguments)]


def _why_not(name: str, section: Mapping[str, Any]) -> str:
    """Why a field cannot be set in train.training_arguments; "" if it can."""
    if name in section:
        return f"set the parameter train.{name} instead"
    if name in OWNED:
        return f"cannot be set here: {OWNED[name]}"
    if name not in field_names():
        near = difflib.get_close_matches(name, field_names(), n=1)
        return "TrainingArguments has no such field" + (f"; did you mean {near[0]!r}?" if near else "")
    return ""


def _out_of_range(name: str, value: Any) -> str:
    if name in AT_LEAST_0 and value is not None and not value >= 0:
        return f"found {value}; wanted at least 0"
    if name == "label_smoothing_factor" and value >= 1:
        return f"found {value}; wanted less than 1"
    return ""


class _Parser(HfArgumentParser):  # type: ignore[misc]
    """Raises ValueError instead of ending the program."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def _parse(parser: _Parser, name: str, value: Any) -> Any:
    """A value in the type of its field. Raises ValueError if it does not fit."""
    if isinstance(value, list) and name in TEXT_OR_LIST:
        return value  # the parser knows one type per field, and takes "str" for "str or list"
    return getattr(parser.parse_args(["--output_dir", "", f"--{name}", *_words(value)]), name)


def _words(value: Any) -> list[str]:
    """A value of params.yaml as the words of a command line."""
    if isinstance(value, list):
        return [word for inner in value for word in _words(inner)]
    return [json.dumps(value) if isinstance(value, dict | bool) else str(value)]
