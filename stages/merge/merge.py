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
from transformers.utils import logging

from stages.core.disk import check_space, merged_model
from stages.core.jsonl import read_json, write_json
from stages.core.output import Done, fresh_file, fresh_folder
from stages.core.params import Section
from stages.core.problem import Problem
from stages.core.provenance import MANIFEST, file_hashes
from stages.core.tokens import IGNORE, TokenRows, choose_rows, read_tokens, stop_token_ids
from stages.merge.card import describe_cost, write_card
from stages.merge.figures import TokenFigures, quantization_cost, summarize
from stages.merge.hidden_states import HiddenStates
from stages.merge.layers import DeltaKept, TrainedWeights
from stages.merge.limits import check_parity
from stages.merge.lora_weights import LoraWeights
from stages.merge.memory import explain_out_of_memory
from stages.merge.parity import GREEDY_ROWS, GREEDY_TOKENS, TrainedOutputs, compare, compare_answers, label_losses
from stages.merge.rounding import other_rounding
from stages.merge.training import Training, read_training
from stages.merge.weights import MergedWeights
from stages.model.adapter import load_adapter
from stages.model.load import ADAPTER, load_model
from stages.model.quantize import load_quantized

PARITY_ROWS = 64
"""Validation rows on which the merged model is compared with the trained one."""
ROUNDING_ROWS = 16
"""Rows on which the effect of rounding alone is measured: its mean KL divergence is needed to within a factor of two."""
MIN_KEPT = 0.9
"""If rounding the merged weights keeps less of the delta weight, a line says so."""
MEASURED = "the limits are measured for each model"


class Params(Section):
    """What the adapter is merged into.

    There are no limits to set. The stage fails if any merged weight is not the trained one, rounded as the files round it.
    What rounding does to logits and answers depends on the model and is measured for each; the stage also fails if they
    differ by more (see limits.py).
    """

    removed: ClassVar[Mapping[str, str]] = {
        "parity_rows": f"delete the line; {PARITY_ROWS} validation rows are compared",
        "max_mean_kl": f"delete the line; {MEASURED}",
        "min_top1_agreement": f"delete the line; {MEASURED}",
        "min_greedy_agreement": f"delete the line; {MEASURED}, and near ties do not count",
    }

    base: Literal["dequantized", "full"]
    """dequantized: the base's weights quantized and dequantized, with which the adapter was trained; full: its original
    weights."""


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
        params: What to merge into.
        base: The base model's folder.
        adapter: The adapter's folder, from `train`.
        validation_tokens: The rows to compare on, and the stop tokens.
        chat_template: The template that the adapter was trained with.
        merged: Gets an ordinary Hugging Face folder: safetensors files with the dtypes and sharding of the base, the
            tokenizer with the chat template, a generation config with the stop tokens, README.md and manifest.json.
        report: Gets the comparison with the adapter on the quantized base, over the labelled tokens of some of the rows;
            and what quantizing the base costs.

    Raises Problem if the adapter does not fit the base, or if the merged model is not the trained one: if a merged weight is
    wrong, or if logits or greedy answers differ by more than rounding explains. Then nothing is written.
    """
    logging.disable_progress_bar()
    training, lora = read_training(adapter), LoraWeights(adapter)
    weights = MergedWeights(base, lora, training=training, dequantized=params.base == "dequantized")
    table = read_tokens(validation_tokens)
    rows, stops = _parity_rows(table, validation_tokens), stop_token_ids(table)
    check_space("merge", "the merged model", merged_model(base, merged, tokens=_kept_tokens(rows)))
    with HiddenStates(merged.parent) as hidden:
        trained, right, rounding = _run_trained_model(
            base, lora, params=params, training=training, rows=rows, stops=stops, hidden=hidden
        )
        _free_memory()
        with fresh_folder(merged) as folder, fresh_file(report) as file:
            _write_model(folder, base, weights=weights, chat_template=chat_template, stops=stops)
            with explain_out_of_memory("loading the merged model"):
                model = load_model(folder, training.settings.dtype)
            tokens = compare(trained, model, rows)
            layers = right.check(model)
            figures = {
                "model": read_json(base / MANIFEST)["model"],
                "base": params.base,
                "method": lora.method,
                "merged_layers": len(lora.pairs),
                "rows": len(rows),
                "validation_rows": table.num_rows,
                "tokens": len(trained.base_losses),
                **summarize(tokens),
                "rounding": {"mean_kl": float(rounding.kl.mean()), "top1_agreement": float(rounding.same_top.mean())},
                "largest_weight_error": max((check.error for check in layers.values()), default=0.0),
                "delta_kept": right.kept._asdict() if right.kept else None,
                **_answer_figures(trained, model, tokens),
                "quantization": training.settings.quantization,
                "quantization_cost": None,
            }
            check_parity(figures, layers, right.outputs, base=params.base)
            if training.quantized:
                other = "full" if params.base == "dequantized" else "dequantized"
                other_weights = MergedWeights(base, lora, training=training, dequantized=other == "dequantized")
                if _replace_quantized(model, other_weights):
                    figures["other_base"] = {"base": other, **summarize(compare(trained, model, rows))}
                del model
                _free_memory()
                figures["quantization_cost"] = _measure_quantization(base, training, rows=rows, tokens=tokens)
            write_card(folder, base, adapter=adapter, training=training, figures=figures)
            _write_manifest(folder, base)
            write_json(file, figures)
    if right.kept and right.kept.share < MIN_KEPT:
        print(_explain_loss(right.kept), flush=True)
    return Done(_summary(merged, figures))


def _parity_rows(table: pa.Table, path: Path) -> list[dict[str, Any]]:
    """At most PARITY_ROWS of the rows that have labelled tokens. Raises Problem if there is none."""
    rows = TokenRows(table)
    labelled = np.flatnonzero(rows.label_counts)
    if not len(labelled):
        raise Problem(f"{path}: no row has labelled tokens to compare the models on; raise ingest.validation_percent")
    chosen = choose_rows(table["id"].take(labelled).to_pylist(), PARITY_ROWS)
    return [rows[int(labelled[index])] for index in chosen]


def _kept_tokens(rows: Sequence[dict[str, Any]]) -> int:
    """At most as many tokens have their hidden states kept."""
    labels = sum(int((np.asarray(row["labels"]) != IGNORE).sum()) for row in rows)
    return labels + GREEDY_ROWS * GREEDY_TOKENS


def _free_memory() -> None:
    gc.collect()  # parts of a model refer to each other
    torch.cuda.empty_cache()


def _run_trained_model(
    base: Path,
    lora: LoraWeights,
    *,
    params: Params,
    training: Training,
    rows: Sequence[dict[str, Any]],
    stops: Sequence[int],
    hidden: HiddenStates,
) -> tuple[TrainedOutputs, TrainedWeights, TokenFigures]:
    """The outputs and weights of the adapter on the quantized base, and what rounding alone makes of its outputs.

    The model itself is not kept.
    """
    with explain_out_of_memory("loading the trained model"):
        quantized = load_quantized(base, training.settings).model
        model = load_adapter(quantized, lora.adapter, base=base, settings=training.settings)
    outputs = TrainedOutputs(model, rows, hidden=hidden, stops=stops, initial=lora.initial)
    with explain_out_of_memory("computing the trained weights"):
        weights = TrainedWeights(
            model,
            base,
            training=training,
            dequantized=params.base == "dequantized",
            initial=lora.initial_deltas(),
            row=rows[0],
        )
    with other_rounding(model, weights.noise):
        rounding = compare(outputs, model, rows[:ROUNDING_ROWS], name="rounding alone")
    return outputs, weights, rounding


def _summary(merged: Path, figures: dict[str, Any]) -> str:
    how = f"{figures['merged_layers']} layers merged"
    if not figures["merged_layers"]:
        how = f"{figures['method']} cannot be merged, so the adapter is in {merged / ADAPTER}"
    recovery = "" if figures["recovery"] is None else f", recovery {100 * figures['recovery']:.1f} %"
    if figures["quantization_cost"]:
        recovery += f"; {describe_cost(figures)}"
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
    """Writes chat_template.jinja, and removes the base's template from the other files that may have it.

    Transformers' processors, of multimodal models, would prefer those.
    """
    shutil.copyfile(chat_template, folder / "chat_template.jinja")
    (folder / "chat_template.json").unlink(missing_ok=True)
    for name in ("tokenizer_config.json", "processor_config.json"):
        path = folder / name
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


def _answer_figures(trained: TrainedOutputs, model: Any, tokens: TokenFigures) -> dict[str, Any]:
    answers = compare_answers(trained, model, float(tokens.logit_difference.max()))
    return {
        "greedy_rows": len(trained.answers),
        "greedy_agreement": answers.same / len(trained.answers),
        "greedy_near_ties": answers.near_ties,
        "greedy_different": answers.different,
    }


def _explain_loss(kept: DeltaKept) -> str:
    return (
        f"merge: rounding the merged weights to {kept.dtype}, the dtype of the base's files, keeps "
        f"{100 * kept.share:.0f} % of what was trained ({100 * kept.smallest:.0f} % in the layer that loses most): the "
        "training changed them by less than a step of this dtype; train for longer, or with a higher train.learning_rate"
    )


# Quantization


def _measure_quantization(
    base: Path, training: Training, *, rows: Sequence[dict[str, Any]], tokens: TokenFigures
) -> dict[str, Any]:
    """The loss of the base as it is, beside that of the quantized base: `quantization_cost`.

    The base is loaded anew, as a user would load it: a large one is spread over GPUs, main memory and disk. If even they do
    not hold it, cost is None and not_measured says why.
    """
    try:
        with explain_out_of_memory("loading the base that is not quantized"):
            model = load_model(base, training.settings.dtype)
        full_loss = label_losses(model, rows)
    except Problem as problem:
        reason = problem.messages[0]
        print(f"merge: the cost of quantization is not measured: {reason}", flush=True)
        return {"cost": None, "not_measured": reason}
    return quantization_cost(tokens, full_loss.double().numpy())
