"""Runs the stages with a model on one checkpoint, and checks their results against plain Transformers and PEFT.

Shared by tools/sweep.py, which does it for every architecture, and tests/test_family_chains.py. What is checked:

- rows in one batch have the logits of single rows, also where they are longer than the model's windows;
- the gradient of every trained matrix is the one that PEFT computes;
- Transformers loads the merged folder with no key missing or left over; it has the base's files, names, dtypes and config;
- no bit has changed but in tensors that are adapted or quantized; what has changed computes what was trained;
- the answers are those of Transformers' `generate` for each prompt by itself; the losses on raw text are right.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import transformers
from safetensors import safe_open
from torch.nn.functional import cross_entropy
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from stages.core.params import parse_section, read_yaml
from stages.core.problem import Problem
from stages.core.tokens import IGNORE, PROMPTS, TRAINING, open_tokens, read_tokens
from tests.families import FIRST_WORD, LAST_WORD, STOP
from tests.tiny import PROJECT

NEW_TOKENS = 12
HASH_WANTED = re.compile(r"the hash of .* is ([0-9a-f]{64})")
WRITTEN_BY_MERGE = {"README.md", "manifest.json", "chat_template.jinja", "generation_config.json", "tokenizer_config.json"}
"""Files of a merged model that the base lacks, or has with another content."""
NOT_QUANTIZED = r"emb|wte|wpe|lm_head|^head\.|bias|conv|time_mix|vision|visual|audio|projector"
"""What a tensor is named that is no weight of a layer of the language model."""
SPECIAL = {"<pad>": 0, "<s>": 1, "</s>": STOP, "<unk>": 3}
WORD = r"w\d+|</?\w+>"
"""A token in an answer."""


class Refused(Exception):
    """The pipeline ended with a Problem before the first training step."""

    def __init__(self, stage: str, messages: Sequence[str]) -> None:
        super().__init__("\n".join(messages))
        self.stage, self.messages = stage, messages


class Failed(Exception):
    """A result is wrong, or the pipeline ended with a Problem after the training had begun."""


def run_chain(release: Path, work: Path, facts: dict[str, Any], *, quantization: str = "nf4", experts: bool = True) -> None:
    """Fetches, trains, merges and generates, on the CPU and in float32; then checks what came out.

    The working directory must be the project, and the environment variable DVC_ROOT name a folder for checkpoints.

    Args:
        release: The checkpoint's folder, as from `families.write_release`.
        work: An empty folder for all outputs.
        facts: Gets what is found about the architecture, as far as it came.
        quantization: As in params.yaml.
        experts: Whether experts get an adapter too, if the model has any.

    Raises Refused, Failed, or whatever a stage raises that is not a Problem.
    """
    base, adapter, merged = work / "base", work / "adapter", work / "merged"
    write_tokens(work)
    with stage("fetch", facts):
        _fetch(release, base, work / "tokenizer")
    if json.loads((release / "config.json").read_text()).get("quantization_config"):
        facts["dequantized"] = check_dequantized(release, base)
    params = train_params(quantization=quantization, target_parameters="all-experts" if experts else [])
    with stage("train", facts):
        try:
            _train(params, base, work)
        except Problem as problem:
            if not experts or "train.target_parameters" not in str(problem):
                raise
            params = train_params(quantization=quantization)
            _train(params, base, work)
    require(not facts.get("unfit"), f"train: has trained, though {facts.get('unfit')}")
    # int8 rounds the inputs of its layers too, and a router may then choose other experts.
    check_training(params, base, adapter, facts, tolerance=math.inf if quantization == "int8" else 1e-3)
    with stage("merge", facts):
        _merge(base, work)
    facts |= check_merged(base, merged, adapter)
    if quantization != "int8":
        check_trained_is_merged(base, merged, adapter, report=work / "train.json")
    for folder in (base, merged):
        with stage("generate", facts):
            _generate(folder, work)
        check_answers(folder, work)
    facts["decoder"] = check_decoder(merged)


# Data


def make_rows(count: int, *, seed: int, shortest: int, longest: int) -> list[list[int]]:
    """Tokens of few kinds, in each row with a beat of its own, so that something is learned in a few steps."""
    random = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        length, beat = int(random.integers(shortest, longest)), random.integers(FIRST_WORD, 60, 5)
        row = np.tile(beat, length // 5 + 1)[:length]
        noise = random.random(length) < 0.2
        row[noise] = random.integers(FIRST_WORD, LAST_WORD, noise.sum())
        rows.append(row.tolist())
    return rows


CHECKED_ROWS = make_rows(3, seed=7, shortest=40, longest=70) + make_rows(1, seed=8, shortest=5, longest=9)
PROMPT_ROWS = make_rows(5, seed=3, shortest=4, longest=60)


def write_tokens(folder: Path) -> None:
    """The files of `encode`: training and validation rows, prompts, and raw text."""
    for name, rows in (
        ("train", make_rows(24, seed=1, shortest=30, longest=90)),
        ("validation", make_rows(6, seed=2, shortest=30, longest=90)),
        ("text", make_rows(2, seed=4, shortest=20, longest=60)),
    ):
        labels = [[IGNORE] * (1 + len(row) // 3) + row[1 + len(row) // 3 :] for row in rows]
        _write(folder / f"{name}.arrow", TRAINING, [[f"{name}-{index}" for index in range(len(rows))], rows, labels])
    for name, rows in (("test", PROMPT_ROWS[:3]), ("prompts", PROMPT_ROWS[3:])):
        ids = [f"{name}-{index}" for index in range(len(rows))]
        _write(
            folder / f"{name}.arrow",
            PROMPTS,
            [ids, [" ".join(f"w{token}" for token in row) for row in rows], rows, ["w11 w12"] * len(rows)],
        )


def _write(path: Path, schema: pa.Schema, columns: Sequence[Sequence[Any]]) -> None:
    arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
    with open_tokens(path, schema, [STOP]) as stream:
        stream.write_batch(pa.record_batch(arrays, schema=schema))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of `encode`."""
    rows: list[dict[str, Any]] = read_tokens(path).to_pylist()
    return rows


# Stages


@contextmanager
def stage(name: str, facts: dict[str, Any]) -> Iterator[None]:
    """Makes Refused of a Problem before the first training step, and Failed of one after it."""
    facts["stage"] = name
    with _counted_steps() as steps:
        try:
            yield
        except Problem as problem:
            if name == "fetch" or (name == "train" and not steps):
                raise Refused(name, problem.messages) from None
            raise Failed(f"{name}, after the training had begun: {' | '.join(problem.messages)}") from None


@contextmanager
def _counted_steps() -> Iterator[list[Any]]:
    """Yields a list that gets an entry for each training step."""
    from stages.train.trainer import AdapterTrainer

    steps: list[Any] = []
    plain = AdapterTrainer.training_step

    def training_step(self: Any, *arguments: Any, **named: Any) -> Any:
        steps.append(self.state.global_step)
        return plain(self, *arguments, **named)

    AdapterTrainer.training_step = training_step  # type: ignore[method-assign]
    try:
        yield steps
    finally:
        AdapterTrainer.training_step = plain  # type: ignore[method-assign]


def _params(name: str, kind: Any, **changed: Any) -> Any:
    return parse_section(name, kind, {**read_yaml(PROJECT / "params.yaml")[name], **changed})


def _fetch(release: Path, base: Path, tokenizer: Path) -> None:
    from stages.fetch.fetch import Params, fetch

    def run(revision: str) -> None:
        values = {"source": "folder", "model_name_or_path": str(release), "revision": revision}
        fetch(_params("fetch", Params, **values), base=base, tokenizer=tokenizer).clean_up()

    try:
        run("")
    except Problem as problem:  # the hash is in the message, and all other checks come before it
        found = HASH_WANTED.search("\n".join(problem.messages))
        if found is None:
            raise
        run(found[1])


def train_params(**changed: Any) -> Any:
    """The parameters of `train` for a few steps in float32."""
    from stages.train.train import Params

    few: dict[str, Any] = {
        "dtype": "float32",
        "r": 4,
        "lora_alpha": 8,
        "num_train_epochs": 2,
        "per_device_train_batch_size": 6,
        "per_device_eval_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 2,
        "eval_steps": 100,
        "save_steps": 100,
    }
    return _params("train", Params, **few, **changed)


def _train(params: Any, base: Path, work: Path) -> None:
    from stages.train.train import train

    train(
        params,
        train_tokens=work / "train.arrow",
        validation_tokens=work / "validation.arrow",
        base=base,
        adapter=work / "adapter",
        report=work / "train.json",
        curves=work / "loss",
        machine=work / "machine.json",
    ).clean_up()


def _merge(base: Path, work: Path) -> None:
    from stages.merge.merge import Params, merge

    merge(
        _params("merge", Params),
        base=base,
        adapter=work / "adapter",
        validation_tokens=work / "validation.arrow",
        chat_template=PROJECT / "stages/templates/chatml.jinja",
        merged=work / "merged",
        report=work / "merge.json",
    ).clean_up()


def _generate(model: Path, work: Path) -> None:
    from stages.generate.generate import Params, generate

    generate(
        _params("generate", Params, max_new_tokens=NEW_TOKENS, batch_size=3, dtype="float32"),
        model=model,
        test_prompts=work / "test.arrow",
        extra_prompts=work / "prompts.arrow",
        test_text=work / "text.arrow",
        predictions=work / "predictions.jsonl",
        extra_predictions=work / "extra.jsonl",
        text_losses=work / "text.jsonl",
    ).clean_up()


# Plain Transformers


def load_plain(folder: Path, class_name: str = "", **options: Any) -> tuple[Any, dict[str, Any]]:
    """The model as Transformers loads it in float32, and the keys that are missing or left over.

    Args:
        folder: Its folder.
        class_name: An auto class; by default the one for text, if it knows the model type.
    """
    kind = read_config(folder)["model_type"]
    if not class_name:
        class_name = "AutoModelForCausalLM" if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else "AutoModelForImageTextToText"
    model, found = getattr(transformers, class_name).from_pretrained(
        folder, **{"dtype": torch.float32, "output_loading_info": True} | options
    )
    return model.eval(), {key: sorted(map(str, value)) for key, value in found.items() if value}


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def row_logits(model: Any, row: Sequence[int]) -> torch.Tensor:
    """(tokens, vocabulary) of one row by itself."""
    logits: torch.Tensor = model(input_ids=torch.tensor([row]), use_cache=False).logits[0]
    return logits.float()


def row_loss(model: Any, rows: Sequence[Mapping[str, Any]]) -> torch.Tensor:
    """The mean loss of a label, in nats, row by row."""
    total, count = torch.zeros(()), 0
    for row in rows:
        labels = torch.tensor(row["labels"])[1:]
        total = total + cross_entropy(row_logits(model, row["input_ids"])[:-1], labels, reduction="sum", ignore_index=IGNORE)
        count += int((labels != IGNORE).sum())
    return total / count


def require(condition: bool, message: str) -> None:
    """Raises Failed."""
    if not condition:
        raise Failed(message)


def is_causal(model: Any) -> bool:
    """Whether the logits of a token do not depend on those that follow it."""
    row = CHECKED_ROWS[0]
    changed = row[:20] + [token + 1 for token in row[20:]]
    with torch.no_grad():
        first, second = row_logits(model, row)[:20], row_logits(model, changed)[:20]
    return bool((first - second).std() < 1e-3 * first.std())


def look_at(release: Path) -> dict[str, Any]:
    """What plain Transformers makes of a checkpoint that is not quantized. Raises if it cannot load or compute it.

    Returns why it cannot be trained as a causal language model; "" if it can.
    """
    if read_config(release).get("quantization_config"):
        return {"unfit": ""}
    try:
        model, keys = load_plain(release)
    except ImportError as error:
        return {"unfit": f"Transformers needs another package: {error}"}
    with torch.no_grad():
        logits = row_logits(model, CHECKED_ROWS[0])
    if not bool(logits.isfinite().all()):
        raise ValueError("its logits are not finite")
    if not is_causal(model):
        return {"unfit": "it is not causal: later tokens change the logits of earlier ones"}
    lost = {kind: names for kind, names in keys.items() if kind != "unexpected_keys"}
    return {"unfit": f"Transformers finds {lost}" if lost else ""}


# Checks


def check_dequantized(release: Path, base: Path) -> str:
    """The weights that `fetch` dequantized are right within the rounding to bfloat16. Returns how they were quantized."""
    method = read_config(release)["quantization_config"]["quant_method"]
    if method == "fp8":  # Transformers gets blocks wrong that a matrix does not fill
        found, wanted = read_values(base), _from_fp8(read_values(release))
    else:
        settings = {"quantization_config": transformers.Mxfp4Config(dequantize=True)} if method == "mxfp4" else {}
        model, _ = load_plain(release, dtype=torch.bfloat16, **settings)
        model = model.dequantize() if method == "bitsandbytes" else model
        found, wanted = load_plain(base)[0].state_dict(), model.float().state_dict()
    require(found.keys() == wanted.keys(), f"fetch: other tensors: {sorted(found.keys() ^ wanted.keys())[:3]}")
    for name, weight in wanted.items():
        error = (found[name].float() - weight).norm() / weight.norm().clamp(min=1e-9)
        require(bool(error < 5e-3), f"fetch: {name} differs from the weight that it should be by {error:.4f}")
    return method


def _from_fp8(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights from those in FP8 and their scales, one for each block of 128 x 128."""
    found = {name: tensor.float() for name, tensor in tensors.items() if not name.endswith("_scale_inv")}
    for name in found:
        if f"{name}_scale_inv" in tensors:
            scales = tensors[f"{name}_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)
            found[name] *= scales[: found[name].shape[0], : found[name].shape[1]]
    return found


def load_trained(base: Path, adapter: Path) -> Any:
    """The model that was trained, as PEFT computes it, with its adapter trainable."""
    from stages.merge.training import read_training
    from stages.model.adapter import load_adapter
    from stages.model.quantize import load_quantized

    settings = read_training(adapter).settings
    model = load_adapter(load_quantized(base, settings).model, adapter, base=base, settings=settings)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return model


def check_training(params: Any, base: Path, adapter: Path, facts: dict[str, Any], *, tolerance: float = 1e-3) -> None:
    """Logits of rows in one batch, and gradients, against PEFT's of single rows. `facts` gets how they were computed.

    `tolerance` is that of a gradient, in parts of its norm.
    """
    from stages.model.collate import collate_padded, collate_padding_free
    from stages.model.logits import label_logits
    from stages.model.padding_free import enable_padding_free
    from stages.train.loss import next_token_loss
    from stages.train.train import _make_faster

    model = load_trained(base, adapter)
    rows: list[dict[str, Any]] = [{"input_ids": row, "labels": [IGNORE, *row[1:]]} for row in CHECKED_ROWS]
    wanted = torch.cat([row_logits(model, row)[:-1] for row in CHECKED_ROWS]).detach()
    row_loss(model, rows).backward()
    gradients = _take_gradients(model)
    facts["padded"] = padded = enable_padding_free(model, longest_row=max(map(len, CHECKED_ROWS)))
    batch = (collate_padded if padded else collate_padding_free)(rows)
    with torch.no_grad():
        found = label_logits(model, batch)[0].float()
    difference = float((found - wanted).abs().max() / wanted.std())
    how = "padded batch" if padded else "padding-free batch"
    require(
        difference < 10 * tolerance,
        f"train: logits of rows in a {how} differ from those of single rows by {difference:.1e} std",
    )
    layers = _make_faster(params, model)
    facts |= {"peft": ", ".join(layers.skipped), "adapted": len(gradients) // 2}
    next_token_loss(*label_logits(model, batch), len(batch["targets"])).backward()  # type: ignore[no-untyped-call]
    _compare_gradients(_take_gradients(model), gradients, tolerance)


def _take_gradients(model: Any) -> dict[str, torch.Tensor]:
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def _compare_gradients(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor], tolerance: float) -> None:
    require(bool(wanted), "train: PEFT computes no gradient at all")
    scale = max(float(gradient.norm()) for gradient in wanted.values())
    missing = [name for name, gradient in wanted.items() if name not in found and gradient.norm() > 1e-5 * scale]
    require(not missing, f"train: {len(missing)} matrices get no gradient, which they have with PEFT: {missing[:2]}")
    for name, gradient in wanted.items():
        if name in found:
            error = float((found[name] - gradient).norm() / (gradient.norm() + 1e-2 * scale))
            require(error < tolerance, f"train: the gradient of {name} differs from PEFT's by {error:.1e}")


def read_tensors(folder: Path) -> dict[str, tuple[str, torch.Tensor]]:
    """The file's name and the value of every tensor in a folder."""
    found = {}
    for shard in sorted(folder.glob("*.safetensors")):
        with safe_open(shard, framework="pt") as file:
            found |= {name: (shard.name, file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118 (no mapping)
    return found


def read_values(folder: Path) -> dict[str, torch.Tensor]:
    """The value of every tensor in a folder."""
    return {name: tensor for name, (_, tensor) in read_tensors(folder).items()}


def check_merged(base: Path, merged: Path, adapter: Path) -> dict[str, Any]:
    """The folder against the base's, tensor by tensor, and as Transformers loads it. Returns how much has changed."""
    before, after = read_tensors(base), read_tensors(merged)
    require(before.keys() == after.keys(), f"merge: other tensors: {sorted(before.keys() ^ after.keys())[:3]}")
    for name, (shard, tensor) in before.items():
        same = after[name][0] == shard and after[name][1].dtype == tensor.dtype and after[name][1].shape == tensor.shape
        require(same, f"merge: {name} has another file, dtype or shape")
    changed = [name for name, (_, tensor) in before.items() if not torch.equal(tensor, after[name][1])]
    require(bool(changed), "merge: nothing has changed")
    meant, names = changed_on_purpose(adapter), loaded_names(base)
    beyond = [name for name in changed if name not in names or not meant(names[name])]
    require(not beyond, f"merge: has changed {len(beyond)} tensors that are neither adapted nor quantized: {beyond[:3]}")
    require(read_config(base) == read_config(merged), "merge: config.json is another one")
    kept = {file.name for file in base.iterdir()} - WRITTEN_BY_MERGE
    lost = [name for name in sorted(kept) if not (merged / name).is_file()]
    require(not lost, f"merge: the merged folder lacks {lost}")
    # Of a model with towers for images, the class for text alone knows no more of the base's tensors than of the merged.
    keys = load_plain(merged)[1]
    require(keys == load_plain(base)[1], f"merge: Transformers finds {keys}")
    if read_config(base)["model_type"] in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        keys = load_plain(merged, "AutoModelForImageTextToText")[1]
        require(not keys, f"merge: loaded with AutoModelForImageTextToText, Transformers finds {keys}")
    layers = [name for name in names if before[name][1].dim() > 1 and not re.search(NOT_QUANTIZED, name)]
    experts = [name for name in layers if is_expert(name, before[name][1])]
    return {"changed": _share(changed, layers, before), "experts": _share(changed, experts, before) if experts else None}


def is_expert(name: str, tensor: torch.Tensor) -> bool:
    """Whether a matrix of the files is that of one expert, or of all that a layer has."""
    stacked = tensor.dim() == 3 and len(tensor) > 1 and re.search("moe|mlp|ffn|feed_forward", name) is not None
    return stacked or re.search(r"(?<!shared_)experts\.", name) is not None


def _share(changed: Sequence[str], names: Sequence[str], tensors: Mapping[str, tuple[str, torch.Tensor]]) -> float:
    size = {name: tensors[name][1].numel() for name in names}
    return round(sum(size[name] for name in names if name in set(changed)) / max(1, sum(size.values())), 3)


def changed_on_purpose(adapter: Path) -> Any:
    """Whether a parameter of the model, by its name, is adapted or was quantized."""
    lists = (value for value in json.loads((adapter / "training.json").read_text()).values() if isinstance(value, list))
    # Layers by their name; parameters of experts in a dict with more than the name.
    names = {each["name"] if isinstance(each, dict) else each for value in lists for each in value}
    with safe_open(adapter / "adapter_model.safetensors", framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 (no mapping)
            names.add(key.removeprefix("base_model.model.").partition(".lora_")[0].replace(".base_layer", ""))
    return lambda parameter: any(parameter == name or parameter.startswith(f"{name}.") for name in names)


def loaded_names(base: Path) -> dict[str, str]:
    """The parameter that each tensor of the files becomes, or becomes a part of, in the model that Transformers loads."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    model, _ = load_plain(base)
    conversions = get_model_conversion_mapping(model) or []
    renamings = [each for each in conversions if not isinstance(each, WeightConverter)]
    converters = [each for each in conversions if isinstance(each, WeightConverter)]
    state, prefix = model.state_dict(), model.base_model_prefix
    found = {name: rename_source_key(name, renamings, converters, prefix, state)[0] for name in read_tensors(base)}
    return {name: parameter for name, parameter in found.items() if parameter in state}


def check_trained_is_merged(base: Path, merged: Path, adapter: Path, *, report: Path) -> None:
    """The merged model, loaded by Transformers, computes what PEFT computes, and has the loss that `train` reported.

    Within the rounding to the dtype of its files, of which a router may make another choice of experts.
    """
    exact = all(tensor.dtype != torch.bfloat16 for tensor in read_values(merged).values())
    most_kl, most_loss = (1e-5, 2e-3) if exact else (2e-2, 2e-2)
    model, trained = load_plain(merged)[0], load_trained(base, adapter)
    with torch.no_grad():
        for row in CHECKED_ROWS[:2]:
            found, wanted = row_logits(model, row).log_softmax(-1), row_logits(trained, row).log_softmax(-1)
            kl = float((wanted.exp() * (wanted - found)).sum(-1).mean())
            require(kl < most_kl, f"merge: the merged model's mean KL from the trained one is {kl:.1e}")
        loss = float(row_loss(model, read_rows(report.parent / "validation.arrow")))
    told = json.loads(report.read_text())["validation_loss"]
    require(
        abs(loss - told) < most_loss, f"train: reports the validation loss {told:.4f}, and the merged model has {loss:.4f}"
    )


def check_answers(folder: Path, work: Path) -> None:
    """The predictions against Transformers' greedy `generate`, prompt by prompt; the losses against single rows'."""
    model = load_plain(folder)[0]
    told = [*_read_jsonl(work / "predictions.jsonl"), *_read_jsonl(work / "extra.jsonl")]
    for prompt, row in zip(PROMPT_ROWS, told, strict=True):
        found = [SPECIAL[word] if word in SPECIAL else int(word[1:]) for word in re.findall(WORD, row["answer"])]
        wanted = greedy_answer(model, prompt)
        if wanted and wanted[-1] == STOP:
            wanted = wanted[:-1]
        while wanted and wanted[-1] in (0, STOP):
            wanted.pop()
        place = next((index for index, pair in enumerate(zip(found, wanted, strict=False)) if pair[0] != pair[1]), None)
        if place is None:
            require(
                len(found) == len(wanted), f"generate: an answer of {folder.name} has {len(found)} tokens, not {len(wanted)}"
            )
            continue
        with torch.no_grad():
            logits = row_logits(model, prompt + wanted[:place])[-1]
        gap = float((logits[wanted[place]] - logits[found[place]]).abs() / logits.std())
        require(
            gap < 1e-3,
            f"generate: an answer of {folder.name} to a prompt of {len(prompt)} tokens differs from Transformers' at token "
            f"{place + 1}, by {gap:.3f} std in the logits",
        )
    for row, loss in zip(read_rows(work / "text.arrow"), _read_jsonl(work / "text.jsonl"), strict=True):
        with torch.no_grad():
            own = float(row_loss(model, [row])) * loss["tokens"]
        require(abs(own - loss["loss"]) < 1e-3 * own + 1e-2, f"generate: loss {loss['loss']:.3f} on a text, not {own:.3f}")


def _read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def greedy_answer(model: Any, prompt: Sequence[int]) -> list[int]:
    """At most NEW_TOKENS tokens, as Transformers generates them for a prompt without padding."""
    ids = torch.tensor([prompt])
    with torch.no_grad():
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=[STOP],
            pad_token_id=0,
        )
    answer: list[int] = out[0, len(prompt) :].tolist()
    return answer


def check_decoder(folder: Path) -> str:
    """The answers of the decoder that GPUs use, if it takes the model; otherwise returns why it does not."""
    from stages.generate.decoder import Decoder, can_decode
    from stages.generate.sampling import SamplingConfig

    model = load_plain(folder)[0]
    longest = max(map(len, PROMPT_ROWS))
    reason = can_decode(model, longest + NEW_TOKENS)
    if reason:
        return reason
    wanted = [greedy_answer(model, prompt) for prompt in PROMPT_ROWS]
    greedy = SamplingConfig(do_sample=False, temperature=1.0, top_p=1.0, repetition_penalty=1.0, seed=0)
    decoder = Decoder(
        model,
        greedy,
        stop_tokens=[STOP],
        slots=2,
        max_prompt_tokens=longest,
        max_new_tokens=NEW_TOKENS,
        cuda_graph=False,
    )
    order = sorted(range(len(PROMPT_ROWS)), key=lambda index: len(PROMPT_ROWS[index]))
    rows = [{"id": str(index), "prompt_ids": PROMPT_ROWS[index]} for index in order]
    found = dict(pair for group in decoder.decode(rows, range(len(rows))) for pair in group)
    for place, index in enumerate(order):
        require(found[place] == wanted[index], f"generate: the decoder answers {found[place]}, not {wanted[index]}")
    return ""
