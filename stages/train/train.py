"""Trains an adapter on the quantized base model."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from transformers import TrainingArguments, set_seed
from transformers.utils import logging

from stages.core.jsonl import read_json
from stages.core.output import Done, checkpoint_root
from stages.core.provenance import fingerprint, inputs_of
from stages.core.tokens import TokenRows, read_tokens
from stages.model import distributed
from stages.model.adapter import Adapter, add_adapter, initial_lora
from stages.model.base_weights import BaseWeights
from stages.model.checkpoints import CheckpointFolder
from stages.model.compile import compile_elementwise
from stages.model.device import pick_device, pick_dtype
from stages.model.experts import describe_experts
from stages.model.launch import launch
from stages.model.padding_free import enable_padding_free
from stages.model.placement import SPREAD, total_memory
from stages.model.quantize import Quantization, Quantized, load_quantized, quantized_bytes
from stages.model.recurrent import describe_padding, prepare_recurrent_layers
from stages.train.arguments import count_steps, make_arguments, set_intervals
from stages.train.callbacks import say
from stages.train.checkpoints import last_checkpoint, remove_unusable
from stages.train.checks import check_disk, check_learning_rate, check_parameters, check_rows, load_loss_of
from stages.train.collator import StepCollator
from stages.train.coverage import describe_gaps, describe_weights
from stages.train.effect import check_effect, weight_digests
from stages.train.expert_layers import ExpertLayers
from stages.train.fsdp import load_in_turns, make_mesh, shard_frozen, share_trained
from stages.train.gradient_checkpointing import decoder_blocks
from stages.train.loaded_model import check_causal, check_generates
from stages.train.lora_layers import LoraLayers
from stages.train.memory import use_expandable_segments
from stages.train.memory_fit import fit_memory
from stages.train.outputs import count_rows, write_adapter, write_curves, write_machine, write_report
from stages.train.recompute import Recompute
from stages.train.trainer import AdapterTrainer
from stages.train.validation import describe_validation, read_validation_rows

MOVED = {
    "weight_decay": "0.0",
    "max_grad_norm": "1.0",
    "label_smoothing_factor": "0.1",
    "neftune_noise_alpha": "5.0",
    "load_best_model_at_end": "true",
    "full_determinism": "true",
}
"""Former parameters that are fields of TrainingArguments, each with an example of a value."""


class Params(Quantization, Adapter):
    """Quantization, adapter and training, with the names of bitsandbytes, PEFT and TrainingArguments."""

    removed: ClassVar[Mapping[str, str]] = {
        name: f"it is a field of TrainingArguments; write it in train.training_arguments: {{{name}: {value}}}"
        for name, value in MOVED.items()
    }

    compute: Literal["dtype", "fp8"]
    """dtype: matrix products in `dtype`. fp8: products with frozen weights in FP8, a third faster and less exact; needs a
    Hopper GPU or later. Validation is always computed in `dtype`: it measures the model that `merge` makes."""
    num_train_epochs: float = Field(gt=0)
    """The number of passes over the training rows."""
    per_device_train_batch_size: int = Field(gt=0)
    """Rows per batch and process. On a GPU, micro-batches are as large as its memory allows."""
    gradient_accumulation_steps: int = Field(gt=0)
    """Batches per optimizer step."""
    per_device_eval_batch_size: int = Field(gt=0)
    """Rows per batch and process in validation."""
    learning_rate: float = Field(gt=0)
    """The highest learning rate."""
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup", "inverse_sqrt"]
    """How the learning rate decays after the warm-up."""
    warmup_steps: float = Field(ge=0)
    """Optimizer steps of the warm-up; below 1, a share of all steps."""
    optim: str
    """The optimizer: adamw_torch, paged_adamw_8bit, ..."""
    gradient_checkpointing: bool | Literal["auto"]
    """Recomputes activations in the backward pass instead of keeping them: less memory, slower. auto: in as many blocks as
    the GPU's memory requires."""
    logging_steps: float = Field(gt=0)
    """Optimizer steps between two points of the training curve; below 1, a share of all steps."""
    eval_steps: float = Field(gt=0)
    """Optimizer steps between two validations; below 1, a share of all steps."""
    max_eval_samples: int = Field(ge=0)
    """Validation rows on which the loss is measured, chosen by the hash of their ids; 0: all."""
    save_steps: float = Field(gt=0)
    """Optimizer steps between two checkpoints; below 1, a share of all steps. A killed run resumes from the last one."""
    seed: int = Field(ge=0, lt=2**32)
    """Random seed of the adapter's initial weights and of dropout."""
    data_seed: int
    """Random seed of the order of the rows."""
    loss: str
    """A Python file with a function `loss`, which is minimized; stages/losses/cross_entropy.py says how to write one."""
    label_weights: dict[int, float]
    """Weights of single tokens in the loss, by token id: {2: 5.0} for a stop token that the model learns too slowly. All
    other tokens have weight 1."""
    early_stopping_patience: int = Field(ge=0)
    """Stops after this number of validations in a row without a better loss; 0: never."""
    num_processes: int = Field(gt=0)
    """Processes on this machine, one GPU each. Each has its own batches: this multiplies the rows per step."""
    fsdp: bool
    """With several processes: shards the frozen weights across them, for a model that does not fit on one GPU; a layer's
    weights are gathered when it is computed. The result is the same."""
    training_arguments: dict[str, Any]
    """Other fields of Transformers' TrainingArguments, by name."""


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
) -> Done | None:
    """Trains an adapter for `base` on the rows in `train_tokens`, and measures the loss on rows of `validation_tokens`.

    `adapter` gets PEFT's adapter_config.json and adapter_model.safetensors, and training.json with what `merge` must know:
    how the base was quantized, and the amount of data. `report` gets the final losses and counts, `curves` train.csv and
    validation.csv by optimizer step. `machine` gets what differs between runs with the same inputs (time, memory, device,
    date); it is not an output for DVC.

    A run that was killed resumes from its last checkpoint and ends with the same bytes. A checkpoint is only used by a run
    with the same parameters, data, base, code and packages. Checkpoints are removed by `Done.clean_up`, which is called
    after everything else: a run that fails after its training does not have to train again.

    Raises Problem if another process runs the same training, if a parameter does not fit the model or the memory, if the
    loss is not finite, or if nothing was trained.
    """
    check_parameters(params.model_dump(), base)
    paths = _Paths(train_tokens, validation_tokens, base, adapter, report, curves, machine)
    inputs = fingerprint(inputs_of("train", params.model_dump(), (train_tokens, validation_tokens, base), Path()))
    if not distributed.is_main():
        with distributed.failures_explained():
            _train_here(params, paths, checkpoint_root() / f"train-{inputs}")
        return None
    with CheckpointFolder("train", inputs) as checkpoints:
        for line in remove_unusable(
            checkpoints.path, needs_best=bool(params.training_arguments.get("load_best_model_at_end"))
        ):
            say(f"train: {line}")
        if params.num_processes > 1 and distributed.world_size() == 1:
            launch(_train_here, params.num_processes, params, paths, checkpoints.path)
        else:
            with distributed.failures_explained():
                _train_here(params, paths, checkpoints.path)
        return Done(_summary(paths), checkpoints.remove, copy_large=True)


class _Paths(NamedTuple):
    """The paths of the stage, for the processes that it starts."""

    train_tokens: Path
    validation_tokens: Path
    base: Path
    adapter: Path
    report: Path
    curves: Path
    machine: Path


def _train_here(params: Params, paths: _Paths, checkpoints: Path) -> None:
    """Trains in this process, which may be one of several. The order of these steps matters where a comment says so."""
    started = time.monotonic()
    use_expandable_segments()  # before anything is allocated on the GPU
    distributed.init_processes(cpu=not torch.cuda.is_available())
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # The name of the folder has a fingerprint of all that the stage reads; two machines may hold different copies.
    distributed.require_same({"the data, parameters, code or packages (fingerprint)": checkpoints.name})
    rows = TokenRows(read_tokens(paths.train_tokens))
    validation_rows, all_validation_rows = read_validation_rows(paths.validation_tokens, params.max_eval_samples)
    arguments = _make_arguments(params, checkpoints)  # what is wrong in them is found before the model is loaded
    check_learning_rate(arguments, len(rows))
    virtual_tokens = 0 if params.method == "lora" else params.num_virtual_tokens
    lines = check_rows(rows, validation_rows, paths.base, virtual_tokens=virtual_tokens)
    for line in lines:
        distributed.say_for_all(f"train: {line}")
    steps = count_steps(arguments, len(rows))
    set_intervals(arguments, steps)
    for line in describe_validation(
        arguments, steps=steps, rows=rows, validation_rows=validation_rows, all_rows=all_validation_rows
    ):
        distributed.say_for_all(f"train: {line}")

    set_seed(params.seed)  # before the adapter is added: its initial weights are random
    quantized, model = _load_sharded(params, paths.base) if params.fsdp else _load(params, paths.base)
    if distributed.is_main():
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        check_disk(trained, optim=params.optim, checkpoints=checkpoints, adapter=paths.adapter)
    # Before the layers are made faster: padding-free attention is tried on the unchanged model.
    longest = int(max(each.lengths.max(initial=0) for each in (rows, validation_rows)))
    model.eval()
    if params.method == "lora":  # with virtual tokens a row has more logits than tokens
        check_causal(model)
    if not params.fsdp:  # each token would gather all shards
        check_generates(model)
    padding_free = _enable_padding_free(params, arguments, model, longest)
    initial_weights = initial_lora(model, params)  # before they are trained
    lora_layers = _make_faster(params, model)

    trainer = AdapterTrainer(
        model,
        arguments,
        rows=rows,
        validation_rows=validation_rows,
        loss=load_loss_of(params.model_dump(), paths.base, label_smoothing_factor=arguments.label_smoothing_factor),
        collator=StepCollator(
            params.per_device_train_batch_size,
            padding_free=padding_free,
            pad_to_multiple_of=64 if model.device.type == "cuda" else 1,  # matrix units of a GPU compute blocks of tokens
        ),
        lora_layers=lora_layers,
        early_stopping_patience=params.early_stopping_patience,
    )
    _require_same_way(trainer)
    # Before anything is measured: the largest batch shows whether the memory is enough.
    fit_memory(trainer, _checkpointed_blocks(params, model))
    before = trainer.measure()
    initial = weight_digests(model) if distributed.is_main() else {}
    resumed_from = _run_training(trainer, checkpoints)
    after = trainer.measure()

    if not distributed.is_main():
        return
    check_effect(model, initial, steps=trainer.state.global_step, learning_rate=params.learning_rate)
    if after["loss"] == before["loss"]:
        say(
            f"train: the validation loss, {after['loss']:.4f}, has not changed by a bit: the weights have changed too little"
        )
    training = _describe_training(params, model, quantized, rows=rows, lora_layers=lora_layers)
    write_adapter(paths.adapter, model, initial_lora=initial_weights, training=training)
    write_report(paths.report, trainer, validation_rows=all_validation_rows, before=before, after=after)
    write_curves(paths.curves, trainer, before=before, after=after)
    write_machine(paths.machine, trainer, seconds=time.monotonic() - started, resumed_from=resumed_from)


def _load(params: Params, base: Path) -> tuple[Quantized, Any]:
    """The quantized model, and the same one with a new adapter."""
    quantized = load_quantized(base, params, on_cpu=params.fsdp, one_gpu=True)
    BaseWeights(base).require(
        [*(f"{layer}.weight" for layer in quantized.layers), *quantized.experts],
        "into which merge would write the quantized weight",
    )
    for line in describe_gaps(quantized, params, params):
        distributed.say_for_all(f"train: {line}")
    model = add_adapter(quantized.model, base, settings=params, wanted=params)
    distributed.say_for_all(f"train: {describe_weights(quantized, model, settings=params, wanted=params)}")
    return quantized, model


def _load_sharded(params: Params, base: Path) -> tuple[Quantized, Any]:
    """As `_load`, with sharded weights: before the first forward pass, since until then the model is in main memory."""
    device = pick_device()
    mesh = make_mesh(device)

    def load() -> tuple[Quantized, Any]:
        quantized, model = _load(params, base)
        shard_frozen(model, mesh, device)
        return quantized, model

    size = quantized_bytes(base, params)
    at_a_time = distributed.smallest(max(1, int(SPREAD * total_memory().main) // size))  # machines may differ
    quantized, model = load_in_turns(load, at_a_time)
    share_trained(model)
    return quantized, model


def _make_arguments(params: Params, checkpoints: Path) -> TrainingArguments:
    device = pick_device()
    dtype = pick_dtype(params.dtype, device)
    return make_arguments(params.model_dump(), checkpoints=checkpoints, dtype=dtype, cpu=device.type == "cpu")


def _enable_padding_free(params: Params, arguments: TrainingArguments, model: Any, longest_row: int) -> bool:
    """Whether rows are concatenated instead of padded. If they are padded, a line says why."""
    functions = prepare_recurrent_layers(model)
    if params.method != "lora":
        reason = f"{params.method} puts virtual tokens before each row"
    elif arguments.neftune_noise_alpha:
        reason = "neftune_noise_alpha scales its noise by the length of a padded row"
    else:
        reason = enable_padding_free(model, longest_row)
    if reason:
        distributed.say_for_all(f"train: rows are padded, not padding-free: {reason}")
    else:
        for line in describe_padding(functions):
            distributed.say_for_all(f"train: {line}; this is slower")
    return not reason


def _make_faster(params: Params, model: Any) -> LoraLayers | None:
    """Replaces what can be computed faster with the same result within rounding, and says what cannot."""
    recompute = Recompute()
    lora = params.method == "lora"
    compiled = compile_elementwise(model, recompute.remember if lora else None)  # only LoRA layers recompute
    if compiled.parts:
        distributed.say_for_all(f"train: compiled: {', '.join(compiled.parts)}")
    for reason in compiled.left_out:
        distributed.say_for_all(f"train: {reason}; this is slower")
    experts = ExpertLayers(model)
    if experts.skipped:
        distributed.say_for_all(f"train: experts are computed twice, which is slower: {'; '.join(experts.skipped)}")
    if not lora:
        return None
    layers = LoraLayers(
        model,
        fp8=params.compute == "fp8",
        keep_dequantized=not params.fsdp,  # each process would keep all weights, not only its shard
        recompute=recompute,
    )
    if layers.skipped:
        distributed.say_for_all(f"train: some layers use PEFT's slower implementation: {', '.join(layers.skipped)}")
    if params.compute == "fp8" and layers.without_fp8:
        distributed.say_for_all(
            f"train: not in FP8, because a dimension is not a multiple of 16: {', '.join(layers.without_fp8)}"
        )
    return layers


def _require_same_way(trainer: AdapterTrainer) -> None:
    """Raises Problem if the processes do not all compute in the same way, with what differs."""
    model = trainer.unwrapped_model
    distributed.require_same(
        {
            "the device": model.device.type,
            "the dtype": str(model.dtype).removeprefix("torch."),
            "whether the loss is computed in parts": trainer.loss_in_parts,
            "the number of trained parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        }
    )
    distributed.require_same_notes()


def _checkpointed_blocks(params: Params, model: Any) -> int | None:
    """The number of blocks with gradient checkpointing; None if it is chosen by the memory."""
    if params.gradient_checkpointing == "auto":
        return None
    return len(decoder_blocks(model)) if params.gradient_checkpointing else 0


def _run_training(trainer: AdapterTrainer, checkpoints: Path) -> str | None:
    """Trains from the last checkpoint on, and returns its path; None if there was none.

    Raises KeyboardInterrupt(number of the signal) if the training was interrupted; its checkpoint is then saved.
    """
    trainer.accelerator.wait_for_everyone()  # all processes must look for checkpoints before one of them writes a new one
    last = last_checkpoint(checkpoints)
    if last and distributed.is_main():
        say(f"train: resuming from {Path(last).name}")
    with trainer.interruption.handled():
        trainer.train(resume_from_checkpoint=last)
    if trainer.interruption.requested and not trainer.finished:
        distributed.wait_for_all()  # the others must not see this process end before the checkpoint is complete
        raise KeyboardInterrupt(trainer.interruption.requested)
    return last


def _describe_training(
    params: Params, model: Any, quantized: Quantized, *, rows: TokenRows, lora_layers: LoraLayers | None
) -> dict[str, Any]:
    """The content of training.json."""
    settings = params.model_dump(include=set(Quantization.model_fields))
    settings["dtype"] = str(model.dtype).removeprefix("torch.")  # the type that was used if params.yaml has "auto"
    return {
        "quantization": settings,
        "quantized_layers": quantized.layers,
        "transposed_layers": quantized.transposed,
        "experts": describe_experts(model),
        # Layers that were trained with round(W + scaling * B A), summed in float32 from 4-bit weights.
        "summed_in_float32": lora_layers.summed_in_float32 if lora_layers else [],
        "data": count_rows(rows),
    }


def _summary(paths: _Paths) -> str:
    report = read_json(paths.report)
    return (
        f"{paths.adapter}: validation loss {report['validation_loss_before']:.4f} before, "
        f"{report['validation_loss']:.4f} after {report['steps']} steps"
    )
