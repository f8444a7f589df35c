"""Merges the adapter into the base's weights, and compares the merged model with the trained one."""

import gc
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import torch
from peft import PeftModel
from pydantic import Field
from transformers.utils import logging

from stages.core.disk import check_space, merged_model
from stages.core.jsonl import read_json, write_json
from stages.core.output import Done, fresh_file, fresh_folder
from stages.core.params import Section
from stages.core.problem import Problem
from stages.core.provenance import MANIFEST, file_hashes
from stages.core.tokens import TokenRows, choose_rows, read_tokens, stop_token_ids
from stages.merge.card import write_card
from stages.merge.figures import summarize
from stages.merge.hidden_states import HiddenStates
from stages.merge.layers import LayerDeltas
from stages.merge.lora_weights import LoraWeights
from stages.merge.memory import explain_out_of_memory
from stages.merge.parity import TrainedOutputs, compare, greedy_agreement
from stages.merge.training import Training, read_training
from stages.merge.weights import MergedWeights
from stages.model.adapter import load_adapter
from stages.model.load import ADAPTER, load_model
from stages.model.quantize import load_quantized

PARITY_ROWS = 64
"""Validation rows on which the merged model is compared with the trained one."""
MAX_DELTA_ERROR = 0.1
"""The stage fails if a merged layer has 10 % less or more of its delta weight than the trained one."""
NAMED_LAYERS = 3
"""The maximum number of layers that a message names."""


class Params(Section):
    """What the adapter is merged into, and how close the merged model must be to the trained one."""

    removed: ClassVar[Mapping[str, str]] = {"parity_rows": f"delete the line; {PARITY_ROWS} validation rows are compared"}

    base: Literal["dequantized", "full"]
    """dequantized: the base's weights quantized and dequantized, with which the adapter was trained; full: its original
    weights."""
    max_mean_kl: float = Field(gt=0)
    """The stage fails if the mean Kullback-Leibler divergence from the trained model is higher, in nats per token."""
    min_top1_agreement: float = Field(ge=0, le=1)
    """The stage fails if the most likely token agrees for a smaller share of the labelled tokens."""
    min_greedy_agreement: float = Field(ge=0, le=1)
    """The stage fails if a smaller share of the greedy answers is identical, token for token."""


def merge(
    params: Params,
    *,
    base: Path,
    adapter: Path,
    validation_tokens: Path,
    chat_template: Path,
    merged: Path,
    report: Path,
) -> Done:
    """Merges an adapter into its base model, and checks that the result computes the same as the trained model.

    Args:
        params: What to merge into, and the limits of the comparison.
        base: The base model's folder.
        adapter: The adapter's folder, from `train`.
        validation_tokens: The rows to compare on, and the stop tokens.
        chat_template: The template that the adapter was trained with.
        merged: Gets an ordinary Hugging Face folder: safetensors files with the dtypes and sharding of the base, the
            tokenizer with the chat template, a generation config with the stop tokens, README.md and manifest.json.
        report: Gets the comparison with the adapter on the quantized base, over the labelled tokens of some of the rows.

    Raises Problem if the adapter does not fit the base, or if the merged model is not the trained one: if its logits or
    greedy answers differ by more than the limits, or if any layer lacks its delta weight. Then nothing is written.
    """
    logging.disable_progress_bar()
    check_space("merge", "the merged model", merged_model(base, merged))
    training, lora = read_training(adapter), LoraWeights(adapter)
    weights = MergedWeights(base, lora, training=training, dequantized=params.base == "dequantized")
    table = read_tokens(validation_tokens)
    rows, stops = _parity_rows(table, validation_tokens), stop_token_ids(table)
    with HiddenStates(merged.parent) as hidden:
        trained, deltas = _run_trained_model(base, lora, training=training, rows=rows, stops=stops, hidden=hidden)
        gc.collect()  # parts of the trained model refer to each other
        torch.cuda.empty_cache()
        with fresh_folder(merged) as folder, fresh_file(report) as file:
            _write_model(folder, base, weights=weights, chat_template=chat_template, stops=stops)
            with explain_out_of_memory("loading the merged model"):
                model = load_model(folder, training.settings.dtype)
            figures = {
                "model": read_json(base / MANIFEST)["model"],
                "base": params.base,
                "method": lora.method,
                "merged_layers": len(lora.pairs),
                "rows": len(rows),
                "validation_rows": table.num_rows,
                "tokens": len(trained.base_losses),
                **summarize(compare(trained, model, rows)),
                "greedy_rows": len(trained.answers),
                "greedy_agreement": greedy_agreement(trained.answers, model),
            }
            _check_parity(params, figures, deltas.shares_in(model))
            if training.quantized:
                other = "full" if params.base == "dequantized" else "dequantized"
                other_weights = MergedWeights(base, lora, training=training, dequantized=other == "dequantized")
                if _replace_quantized(model, other_weights):
                    figures["other_base"] = {"base": other, **summarize(compare(trained, model, rows))}
            write_card(folder, base, adapter=adapter, training=training, figures=figures)
            _write_manifest(folder, base)
            write_json(file, figures)
    return Done(_summary(merged, figures))


def _parity_rows(table: pa.Table, path: Path) -> list[dict[str, Any]]:
    """At most PARITY_ROWS of the rows that have labelled tokens. Raises Problem if there is none."""
    rows = TokenRows(table)
    labelled = np.flatnonzero(rows.label_counts)
    if not len(labelled):
        raise Problem(f"{path}: no row has labelled tokens to compare the models on; raise ingest.validation_percent")
    chosen = choose_rows(table["id"].take(labelled).to_pylist(), PARITY_ROWS)
    return [rows[int(labelled[index])] for index in chosen]


def _run_trained_model(
    base: Path,
    lora: LoraWeights,
    *,
    training: Training,
    rows: Sequence[dict[str, Any]],
    stops: Sequence[int],
    hidden: HiddenStates,
) -> tuple[TrainedOutputs, LayerDeltas]:
    """The outputs of the adapter on the quantized base; the model itself is not kept."""
    with explain_out_of_memory("loading the trained model"):
        quantized = load_quantized(base, training.settings).model
        model = load_adapter(quantized, lora.adapter, base=base, settings=training.settings)
    outputs = TrainedOutputs(model, rows, hidden=hidden, stops=stops, initial=lora.initial)
    return outputs, LayerDeltas(model, lora.initial_deltas())


def _summary(merged: Path, figures: dict[str, Any]) -> str:
    how = f"{figures['merged_layers']} layers merged"
    if not figures["merged_layers"]:
        how = f"{figures['method']} cannot be merged, so the adapter is in {merged / ADAPTER}"
    recovery = "" if figures["recovery"] is None else f", recovery {100 * figures['recovery']:.1f} %"
    return (
        f"{merged}: {how}; mean KL {figures['mean_kl']:.2e}, the most likely token agrees for "
        f"{100 * figures['top1_agreement']:.2f} % of {figures['tokens']:,} tokens{recovery}"
    )


# The merged model's folder


def _write_model(folder: Path, base: Path, *, weights: MergedWeights, chat_template: Path, stops: list[int]) -> None:
    """Writes everything that `load_model` needs. Virtual tokens are not part of any weight: their adapter is copied."""
    weights.write(folder)
    if not weights.lora.pairs:
        (folder / ADAPTER).mkdir()
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copyfile(weights.lora.adapter / name, folder / ADAPTER / name)
    for file in base.iterdir():
        if file.is_file() and file.suffix != ".safetensors":
            shutil.copyfile(file, folder / file.name)
    _set_chat_template(folder, chat_template)
    _set_stop_tokens(folder, stops)


def _set_chat_template(folder: Path, chat_template: Path) -> None:
    """Writes chat_template.jinja, and removes the base's template from tokenizer_config.json."""
    shutil.copyfile(chat_template, folder / "chat_template.jinja")
    path = folder / "tokenizer_config.json"
    if path.exists():
        config = read_json(path)
        if config.pop("chat_template", None) is not None:
            write_json(path, config)


def _set_stop_tokens(folder: Path, stops: list[int]) -> None:
    path = folder / "generation_config.json"
    config = read_json(path) if path.exists() else {}
    if stops:
        config["eos_token_id"] = stops[0] if len(stops) == 1 else stops
    write_json(path, config)


def _write_manifest(folder: Path, base: Path) -> None:
    """The base's manifest.json, with the hashes of the merged files."""
    manifest = read_json(base / MANIFEST)
    kept = {key: manifest[key] for key in ("model", "revision", "trust_remote_code")}
    write_json(folder / MANIFEST, {**kept, "files": file_hashes(folder)})


# Comparison


def _replace_quantized(model: Any, weights: MergedWeights) -> bool:
    """Replaces the weights of the quantized layers in a loaded model, one at a time; not if it is not all in memory."""
    model = model.get_base_model() if isinstance(model, PeftModel) else model
    parameters = {name: model.get_parameter(name) for name in sorted(weights.training.quantized)}
    if any(parameter.is_meta for parameter in parameters.values()):
        print("merge: the model is larger than the GPUs' memory, so only one merge.base is compared", flush=True)
        return False
    for name, parameter in parameters.items():
        parameter.data.copy_(weights.read(name))
    return True


def _check_parity(params: Params, figures: dict[str, Any], shares: dict[str, float]) -> None:
    """Raises Problem with all limits that are exceeded.

    Args:
        params: The limits.
        figures: The stage's report.
        shares: From LayerDeltas.shares_in.
    """
    wrong = [name for name, share in shares.items() if abs(share - 1) > MAX_DELTA_ERROR]
    problems = [
        f"{name}: has {shares[name]:.2f} of the delta weight that was trained; wanted 1" for name in wrong[:NAMED_LAYERS]
    ]
    if len(wrong) > NAMED_LAYERS:
        problems.append(f"{len(wrong) - NAMED_LAYERS} more of {len(shares)} layers have a wrong delta weight")
    if not figures["mean_kl"] <= params.max_mean_kl:
        problems.append(f"mean KL {figures['mean_kl']:.3e} is above merge.max_mean_kl {params.max_mean_kl:.3e}")
    if not figures["top1_agreement"] >= params.min_top1_agreement:
        problems.append(
            f"the most likely token agrees for {figures['top1_agreement']:.4f} of the labelled tokens, below "
            f"merge.min_top1_agreement {params.min_top1_agreement}"
        )
    if not figures["greedy_agreement"] >= params.min_greedy_agreement:
        problems.append(
            f"{figures['greedy_agreement']:.4f} of the greedy answers are identical, below merge.min_greedy_agreement "
            f"{params.min_greedy_agreement}"
        )
    if problems:
        remedy = "set merge.base to dequantized, which is closer" if params.base == "full" else "train again"
        problems.append(
            f"the merged model is not the trained one (loss {figures['merged_loss']:.4f}, trained "
            f"{figures['trained_loss']:.4f}, largest logit difference {figures['max_abs_logit_difference']:.3f}) and was "
            f"not written; {remedy}"
        )
        raise Problem(*problems)
