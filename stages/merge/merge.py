"""Streams the adapter into the base's weights, and proves that the merged model is the model that was trained."""

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from transformers.utils import logging

from stages.core.jsonl import read_json, write_json
from stages.core.output import Done, fresh_file, fresh_folder
from stages.core.params import Section
from stages.core.problem import Problem
from stages.core.provenance import MANIFEST, file_hashes
from stages.core.tokens import read_tokens, stop_token_ids
from stages.merge.card import write_card
from stages.merge.parity import LayerDeltas, ModelOutputs, compare, greedy_agreement
from stages.merge.weights import LoraWeights, MergedWeights
from stages.model.adapter import load_adapter
from stages.model.load import ADAPTER, load_model
from stages.model.quantize import Quantization, load_quantized

MAX_SHARE_ERROR = 0.1
"""A layer that has a tenth less or more of what training added to it is not the trained one."""
NAMED = 3
"""Layers that a message names."""


class Params(Section):
    """What the adapter is added to, and how close the result must be."""

    base: Literal["dequantized", "full"]
    """dequantized: the rounded weights that training saw; full: the original ones, which the adapter never met."""
    parity_rows: int = Field(gt=0)
    """Validation rows on which the two models are compared."""
    max_mean_kl: float = Field(gt=0)
    """The stage fails above this mean Kullback-Leibler divergence, in nats a token, from the trained model."""
    min_top1_agreement: float = Field(ge=0, le=1)
    """The stage fails if the likeliest token agrees at a smaller share of the positions."""
    min_greedy_agreement: float = Field(ge=0, le=1)
    """The stage fails if a smaller share of greedy answers is the same, token for token."""


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
    """Writes `base` + `adapter` as an ordinary Hugging Face folder, loads it again and measures it.

    Tensor by tensor, in float32, written in the base's types and sharding; no model is built for it. The folder gets the
    tokenizer, the chat `template` it was trained with, a generation config with the right stop tokens, and a README.
    `report` gets the comparison with the adapter on the quantized base, over the labelled tokens of `validation`.

    Raises Problem if a tensor of the adapter has no place in the base, or if the merged model is not the trained one: by
    what it says, or by what any layer has of its training.
    """
    logging.disable_progress_bar()
    settings = Quantization.model_validate(read_json(adapter / "training.json")["quantization"])
    table = read_tokens(validation_tokens)
    rows = table.slice(0, params.parity_rows).to_pylist()
    stops = stop_token_ids(table)
    lora = LoraWeights(adapter)
    weights = MergedWeights(base, adapter, lora, settings, params.base)
    adapted = load_adapter(load_quantized(base, settings).model, adapter, base=base, settings=settings)
    trained, additions = ModelOutputs(adapted, rows, stops), LayerDeltas(adapted, lora.first_products())
    del adapted  # its memory is for the merged model
    with fresh_folder(merged) as folder:
        weights.write(folder)
        if not lora.layers:
            _keep_beside(adapter, folder)
        _copy_the_rest(base, chat_template, stops, folder)
        write_json(folder / MANIFEST, read_json(base / MANIFEST))  # load_model reads it
        model = load_model(folder, settings.dtype)
        figures = {
            "model": read_json(base / "manifest.json")["model"],
            "base": params.base,
            "method": lora.kind.lower(),
            "merged_layers": len(lora.layers),
            "rows": len(rows),
            "tokens": len(trained.labels),
            **compare(trained, ModelOutputs(model, rows)),
            "greedy_rows": len(trained.answers),
            "greedy_agreement": greedy_agreement(trained, model),
        }
        _check_parity(params, figures, additions.shares_in(model))
        if weights.rounded_layers:
            # What the other choice of merge.base would have given.
            other = MergedWeights(base, adapter, lora, settings, _other_base(params))
            _put_weights(
                model.get_base_model() if hasattr(model, "get_base_model") else model, other, weights.rounded_layers
            )
            figures["other_base"] = {"base": _other_base(params), **compare(trained, ModelOutputs(model, rows))}
        write_card(folder, base, adapter, table.num_rows, figures)
        _write_manifest(base, folder)
    with fresh_file(report) as file:
        write_json(file, figures)
    kept = f"{len(lora.layers)} layers" if lora.layers else f"{lora.kind.lower()}, kept beside the weights,"
    return Done(
        f"{kept} into {merged}; mean KL {figures['mean_kl']:.2e}, the likeliest token agrees at "
        f"{100 * figures['top1_agreement']:.2f} % of {figures['tokens']:,} positions"
    )


# Weights


def _keep_beside(adapter: Path, folder: Path) -> None:
    """Virtual tokens and prefixes are no part of any weight: the adapter goes along, and `generate` loads it."""
    (folder / ADAPTER).mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copyfile(adapter / name, folder / ADAPTER / name)


def _copy_the_rest(base: Path, template: Path, stops: list[int], folder: Path) -> None:
    """Config and tokenizer as they are; the chat template and the stop tokens as they were trained."""
    for file in base.iterdir():
        if file.suffix != ".safetensors" and file.name != "manifest.json":
            shutil.copyfile(file, folder / file.name)
    shutil.copyfile(template, folder / "chat_template.jinja")
    settings = folder / "tokenizer_config.json"
    if settings.exists():
        config = read_json(settings)
        if config.pop("chat_template", None) is not None:
            write_json(settings, config)
    path = folder / "generation_config.json"
    generation = read_json(path) if path.exists() else {}
    if stops:
        generation["eos_token_id"] = stops[0] if len(stops) == 1 else stops
    write_json(path, generation)


def _write_manifest(base: Path, folder: Path) -> None:
    known = read_json(base / MANIFEST)
    kept = {key: known[key] for key in ("model", "revision", "trust_remote_code")}
    write_json(folder / MANIFEST, {**kept, "files": file_hashes(folder)})


# Proof


def _other_base(params: Params) -> str:
    return "full" if params.base == "dequantized" else "dequantized"


def _put_weights(model: Any, weights: "MergedWeights", names: Iterable[str]) -> None:
    """Gives a loaded model the merged weights of these names, one at a time, in the type that a folder would hold."""
    for name in sorted(names):
        original = weights.base[name]
        model.get_parameter(name).data.copy_(weights.merged(name, original).to(original.dtype))


def _check_parity(params: Params, figures: dict[str, Any], shares: dict[str, float]) -> None:
    wrong = [name for name, share in shares.items() if abs(share - 1) > MAX_SHARE_ERROR]
    problems = [f"{name} has {shares[name]:.2f} times what training added to it" for name in wrong[:NAMED]]
    if len(wrong) > NAMED:
        problems.append(f"and so have {len(wrong) - NAMED} more of {len(shares)} layers another share than 1")
    if not figures["mean_kl"] <= params.max_mean_kl:
        problems.append(f"mean KL {figures['mean_kl']:.3e} is above merge.max_mean_kl {params.max_mean_kl:.3e}")
    if not figures["top1_agreement"] >= params.min_top1_agreement:
        problems.append(
            f"the likeliest token agrees at {figures['top1_agreement']:.4f} of the positions, merge.min_top1_agreement is "
            f"{params.min_top1_agreement}"
        )
    if not figures["greedy_agreement"] >= params.min_greedy_agreement:
        problems.append(
            f"{figures['greedy_agreement']:.4f} of the greedy answers are the same, merge.min_greedy_agreement is "
            f"{params.min_greedy_agreement}"
        )
    if problems:
        problems.append(
            f"the merged model is not the trained one (loss {figures['merged_loss']:.4f} against "
            f"{figures['trained_loss']:.4f}, largest logit difference {figures['max_abs_logit_difference']:.3f}), "
            "and was not kept. "
            + ("merge.base: dequantized is closer" if params.base == "full" else "Train again, and compare the weights")
        )
        raise Problem(*problems)
