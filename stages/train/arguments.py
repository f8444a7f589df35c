"""Transformers' TrainingArguments: those that have a parameter of Loratory's, and any other that a user sets by its name."""

import dataclasses
import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from transformers import HfArgumentParser, TrainingArguments

from stages.core.problem import Problem

KEPT_CHECKPOINTS = 2
"""With one alone, a run killed while the newer is written and the older removed would have none."""

TEXT_OR_LIST = {
    field.name for field in dataclasses.fields(TrainingArguments) if "str" in (words := str(field.type)) and "list" in words
}
"""Fields that are a text or a list; found before a parser is made, which overwrites the types."""

OWNED = {
    **dict.fromkeys(
        ("output_dir", "logging_dir", "resume_from_checkpoint", "run_name", "local_rank", "project"),
        "paths and names are the pipeline's, or DVC would not find its outputs",
    ),
    **dict.fromkeys(
        (
            *(
                "push_to_hub",
                "hub_token",
                "hub_private_repo",
                "hub_model_id",
                "hub_strategy",
                "hub_always_push",
                "hub_revision",
            ),
            *("report_to", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
        ),
        "a stage writes its outputs and nothing else; publish them after the run",
    ),
    **dict.fromkeys(
        ("disable_tqdm", "log_level", "log_level_replica", "log_on_each_node", "logging_strategy", "logging_first_step"),
        "the stage reports its progress itself",
    ),
    **dict.fromkeys(
        (
            *("save_strategy", "save_total_limit", "save_only_model", "save_on_each_node", "enable_jit_checkpoint"),
            *("ignore_data_skip", "restore_callback_states_from_checkpoint", "save_safetensors", "overwrite_output_dir"),
        ),
        "checkpoints are kept so that a killed run ends in the bytes of one never killed",
    ),
    **dict.fromkeys(
        (
            *("eval_strategy", "eval_on_start", "eval_do_concat_batches", "eval_use_gather_object", "prediction_loss_only"),
            *("eval_accumulation_steps", "batch_eval_metrics", "include_for_metrics", "do_train", "do_eval", "do_predict"),
            *("label_names", "remove_unused_columns", "skip_memory_metrics", "use_cache", "include_num_input_tokens_seen"),
        ),
        "the stage measures in its own way, without padding and over all labels",
    ),
    **dict.fromkeys(("bf16", "fp16", "bf16_full_eval", "fp16_full_eval", "use_cpu"), "set train.dtype"),
    **dict.fromkeys(("activation_checkpointing", "activation_checkpointing_kwargs"), "set train.gradient_checkpointing"),
    "gradient_checkpointing_kwargs": "checkpoints are not reentrant, which frozen weights need",
    **dict.fromkeys(
        ("train_sampling_strategy", "group_by_length", "length_column_name", "dataloader_in_order"),
        "the order of the rows follows from train.data_seed alone",
    ),
    "dataloader_drop_last": "it would leave rows out",
    "auto_find_batch_size": "the batch size would follow from the machine, and the result with it",
    "logging_nan_inf_filter": "it would hide a loss that is not finite",
    "average_tokens_across_devices": "the loss is divided by the labels of all processes",
    **dict.fromkeys(
        ("fsdp_config", "deepspeed", "accelerator_config", "parallelism_config", "ddp_find_unused_parameters"),
        "set train.num_processes and train.fsdp",
    ),
}
"""Fields that a user cannot set below train.training_arguments, and why, or what to set in their place."""


def make_arguments(
    given: Mapping[str, Any], further: Mapping[str, Any], checkpoints: Path, dtype: torch.dtype, *, cpu: bool
) -> TrainingArguments:
    """The arguments of one training.

    Args:
        given: Parameters of `train` that are fields of TrainingArguments.
        further: train.training_arguments.
        checkpoints: Where checkpoints go.
        dtype: The model's.

    Raises Problem with every value that is not one of Transformers', or is the pipeline's own.
    """
    passed = dict(given)
    passed["neftune_noise_alpha"] = passed["neftune_noise_alpha"] or None
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
            metric_for_best_model=further.get("metric_for_best_model", "eval_loss"),
            report_to=[],
            disable_tqdm=True,
            logging_nan_inf_filter=False,
            remove_unused_columns=False,
            ddp_find_unused_parameters=False,
            **passed,
            **{name: value for name, value in read_further(given, further).items() if name != "metric_for_best_model"},
        )
    except ValueError as error:
        raise Problem(f"params.yaml: train: {' '.join(str(error).split())}") from None
    # One process drives one GPU. The Trainer would split each batch over all that it sees, with DataParallel.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def read_further(given: Mapping[str, Any], further: Mapping[str, Any]) -> dict[str, Any]:
    """The values of train.training_arguments in the types of their fields, read by Transformers' own parser.

    Raises Problem with every name that is unknown, taken or refused, and every value of a wrong type.
    """
    where, problems, values = "params.yaml: train.training_arguments", [], {}
    parser = _Parser(TrainingArguments, allow_abbrev=False)
    for name, value in further.items():
        if name in given:
            problems.append(f"{where}.{name}: has a parameter of its own, train.{name}")
        elif name in OWNED:
            problems.append(f"{where}.{name}: not to be set here: {OWNED[name]}")
        elif name not in field_names():
            near = difflib.get_close_matches(name, field_names(), n=1)
            problems.append(
                f"{where}.{name}: no field of TrainingArguments" + (f"; did you mean {near[0]!r}?" if near else "")
            )
        elif isinstance(value, list) and name in TEXT_OR_LIST:
            values[name] = value  # the parser knows one type a field, and takes the text of "text or a list"
        else:
            try:
                parsed = parser.parse_args(["--output_dir", "", f"--{name}", *_words(value)])
                values[name] = getattr(parsed, name)
            except ValueError as error:
                problems.append(f"{where}.{name}: found {value!r}: {error}")
    if problems:
        raise Problem(*problems)
    return values


def field_names() -> list[str]:
    """The fields of TrainingArguments in the installed version."""
    return [field.name for field in dataclasses.fields(TrainingArguments)]


class _Parser(HfArgumentParser):  # type: ignore[misc]
    """Raises instead of ending the program."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def _words(value: Any) -> list[str]:
    """A value of params.yaml as it would stand on a command line."""
    if isinstance(value, list):
        return [word for inner in value for word in _words(inner)]
    return [json.dumps(value) if isinstance(value, dict | bool) else str(value)]
