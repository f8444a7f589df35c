"""merge: the merged model is the trained model, as the comparison shows; a wrong merge fails and writes nothing."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pyarrow as pa
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, ProcessorMixin

from stages.core.params import parse_section
from stages.core.problem import Problem
from stages.core.provenance import verify
from stages.core.tokens import choose_rows, read_tokens
from stages.merge import limits
from stages.merge import lora_weights as lora_weights_module
from stages.merge import merge as module
from stages.merge.lora_weights import LoraWeights
from stages.merge.merge import Params, merge
from stages.merge.parity import greedy_answer
from stages.merge.training import read_training
from stages.merge.weights import MergedWeights
from stages.model import four_bit
from stages.model.adapter import PEFT_PREFIX
from stages.model.quantize import Quantization, load_quantized
from stages.train.lora_layers import LoraLayers
from stages.train.recompute import Recompute
from tests.tiny import Workspace

PARAMS = {"base": "dequantized"}
ROWS = 8


@pytest.fixture(autouse=True)
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PARITY_ROWS", ROWS)


class Merge:
    """One merge of the workspace's adapter, or of a changed copy of it."""

    def __init__(self, workspace: Workspace, tmp_path: Path) -> None:
        self.root, self.out = workspace.root, tmp_path / "out"
        self.base = self.root / "models" / "base"
        self.tokens = self.root / "data" / "tokens" / "validation.arrow"
        self.adapter = Path(shutil.copytree(self.root / "models" / "adapter", tmp_path / "adapter"))

    def run(self, **changed: Any) -> dict[str, Any]:
        merge(
            Params(**PARAMS | changed),
            base=self.base,
            adapter=self.adapter,
            validation_tokens=self.tokens,
            chat_template=self.root / "data" / "tokens" / "chat_template.jinja",
            merged=self.out / "merged",
            report=self.out / "report.json",
        )
        report: dict[str, Any] = json.loads((self.out / "report.json").read_text())
        return report

    def message(self, **changed: Any) -> str:
        """The message of a merge that fails; it must leave no file."""
        with pytest.raises(Problem) as caught:
            self.run(**changed)
        assert not (self.out / "merged").exists()
        assert not list(self.out.glob("*"))
        return str(caught.value)

    def edit(self, name: str, **changed: Any) -> None:
        """Changes keys of a JSON file in the adapter's folder."""
        path = self.adapter / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changed))

    def edit_tensors(self, change: Any) -> None:
        path = self.adapter / "adapter_model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    def training(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.adapter / "training.json").read_text())
        return content


@pytest.fixture
def merging(workspace: Workspace, tmp_path: Path) -> Merge:
    return Merge(workspace, tmp_path)


def test_the_merged_model_is_the_trained_one(merging: Merge) -> None:
    report = merging.run()
    assert report["mean_kl"] < 1e-3
    assert report["top1_agreement"] > 0.9
    assert report["merged_layers"] == 14
    assert report["trained_loss"] == pytest.approx(report["merged_loss"], abs=0.01)
    assert report["greedy_rows"] == ROWS
    assert 0 <= report["greedy_agreement"] <= 1
    assert 0 <= report["median_kl"] <= report["p99_kl"] <= report["p99_9_kl"] <= report["max_kl"]
    assert abs(report["mean_delta_p"]) <= report["rms_delta_p"] < 0.01
    assert report["gain"] == pytest.approx(report["base_loss"] - report["trained_loss"])
    assert report["gain"] > 2 * report["standard_errors"]["gain"]
    assert report["recovery"] == pytest.approx(1, abs=0.1)
    cost = report["quantization_cost"]
    assert cost["quantized_base_loss"] == pytest.approx(report["base_loss"])
    assert cost["cost"] == pytest.approx(report["base_loss"] - base_loss(merging), rel=1e-3)
    assert cost["interval"][0] < cost["cost"] < cost["interval"][1]
    assert report["rows"] == ROWS
    assert report["validation_rows"] == read_tokens(merging.tokens).num_rows


def base_loss(merging: Merge) -> float:
    """The loss of the base without quantization on the rows that are compared, by Transformers alone."""
    model = AutoModelForCausalLM.from_pretrained(merging.base, dtype=torch.float32).eval()
    rows = read_tokens(merging.tokens).to_pylist()
    losses = []
    for index in choose_rows([row["id"] for row in rows], ROWS):
        ids, labels = (torch.tensor([rows[index][name]]) for name in ("input_ids", "labels"))
        with torch.no_grad():
            logits = model(ids).logits[0, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits, labels[0, 1:], reduction="none")[labels[0, 1:] != -100])
    return torch.cat(losses).mean().item()


def test_the_dequantized_base_is_closer_than_the_full_one(merging: Merge) -> None:
    dequantized_kl = merging.run()["mean_kl"]
    report = merging.run(base="full")
    assert report["mean_kl"] > 10 * dequantized_kl
    # Each report also has the figures of the other choice, the same as if it had been made.
    assert report["other_base"]["base"] == "dequantized"
    assert report["other_base"]["mean_kl"] == pytest.approx(dequantized_kl, rel=1e-3)


def test_greedy_answers_follow_the_tokens_before_the_first_label(merging: Merge) -> None:
    model = AutoModelForCausalLM.from_pretrained(merging.base, dtype=torch.float32).eval()
    rows = read_tokens(merging.tokens).to_pylist()[:3]
    answers = [greedy_answer(model, row, [2]) for row in rows]
    assert [prompt for prompt, _ in answers] == [
        row["input_ids"][: next(n for n, label in enumerate(row["labels"]) if label != -100)] for row in rows
    ]


def test_provenance_and_manifest_name_every_file(workspace: Workspace) -> None:
    assert verify(workspace.root / "reports" / "provenance" / "merge.json", workspace.root) == []
    recorded = json.loads((workspace.root / "reports" / "provenance" / "merge.json").read_text())
    assert "models/adapter" in recorded["inputs"]
    assert "models/merged" in recorded["outputs"]
    manifest = json.loads((workspace.root / "models" / "merged" / "manifest.json").read_text())
    assert set(manifest["files"]) == {file.name for file in (workspace.root / "models" / "merged").iterdir()} - {
        "manifest.json"
    }


def write_tokens(path: Path, rows: list[dict[str, Any]], schema: pa.Schema) -> Path:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as stream:
        for row in rows:  # in several batches
            stream.write_table(pa.Table.from_pylist([row], schema=schema))
    return path


def test_rows_are_drawn_by_the_hash_of_their_ids_from_all_rows_with_labelled_tokens(merging: Merge, tmp_path: Path) -> None:
    table = read_tokens(merging.tokens)
    rows = table.to_pylist()
    count = len(rows)
    drawn = choose_rows([row["id"] for row in rows], ROWS)
    assert max(drawn) >= ROWS, "not the first ones"
    expected = sum(label != -100 for index in drawn for label in rows[index]["labels"])
    assert merging.run()["tokens"] == expected

    def compared() -> dict[str, Any]:
        merging.tokens = write_tokens(tmp_path / "validation.arrow", rows, table.schema)
        shutil.rmtree(merging.out)
        return merging.run()

    before = {index: rows[index]["labels"] for index in drawn}
    for index in drawn[:2]:
        rows[index] = rows[index] | {"labels": [-100] * len(rows[index]["labels"])}
    report = compared()
    assert report["rows"] == ROWS, "others are drawn for those without labels"
    assert report["validation_rows"] == count
    for index in before:
        rows[index]["labels"] = before[index]
    rows.reverse()
    assert compared()["tokens"] == expected
    shutil.rmtree(merging.out)
    rows = [row | {"labels": [-100] * len(row["labels"])} for row in rows]
    merging.tokens = write_tokens(tmp_path / "validation.arrow", rows, table.schema)
    assert "no row has labelled tokens to compare the models on" in merging.message()


def test_the_hidden_states_are_removed_also_after_a_failure(merging: Merge, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = []

    def fail(trained: Any, *_: Any, **__: Any) -> None:
        kept.append(trained.hidden)
        raise Problem("a failure")

    monkeypatch.setattr(module, "compare", fail)
    assert "a failure" in merging.message()
    with pytest.raises(ValueError, match="closed file"):
        kept[0][0]


def test_a_model_that_is_not_all_in_memory_is_compared_with_one_base(
    merging: Merge, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    in_memory = merging.run()
    shutil.rmtree(merging.out)
    monkeypatch.setattr(module, "load_model", load_partly_on_disk)
    report = merging.run()
    assert "only one merge.base is compared" in capsys.readouterr().out
    assert "other_base" not in report
    for name, value in report.items():
        if isinstance(value, float):
            assert value == pytest.approx(in_memory[name], rel=1e-3, abs=1e-6), name


def test_a_base_that_cannot_be_loaded_costs_an_unknown_loss(
    merging: Merge, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    load = module.load_model

    def refuse(folder: Path, dtype: Any) -> Any:
        if folder == merging.base:
            raise Problem(f"{folder}: too large for this machine")
        return load(folder, dtype)

    monkeypatch.setattr(module, "load_model", refuse)
    report = merging.run()
    reason = f"{merging.base}: too large for this machine"
    assert report["quantization_cost"] == {"cost": None, "not_measured": reason}
    assert f"merge: the cost of quantization is not measured: {reason}\n" in capsys.readouterr().out
    assert "Before the training, the cost of nf4 was not measured." in (merging.out / "merged" / "README.md").read_text()


def load_partly_on_disk(folder: Path, _dtype: str) -> Any:
    """The model with layers that are read from disk when they are used, as Accelerate does for one that is too large."""
    places = dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.norm", "lm_head"), "cpu")
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, device_map=places | {"model.layers.1": "disk"}, offload_folder=folder / "offload"
    )
    assert model.get_parameter("model.layers.1.mlp.up_proj.weight").is_meta
    shutil.rmtree(folder / "offload", ignore_errors=True)
    return model.eval()


# Weights


def test_the_weights_are_those_of_peft_on_an_unquantized_base(merging: Merge) -> None:
    quantization = merging.training()["quantization"] | {"quantization": "none"}
    merging.edit("training.json", quantization=quantization, quantized_layers=[])
    merging.run(base="full")
    merged = load_file(merging.out / "merged" / "model.safetensors")
    base = AutoModelForCausalLM.from_pretrained(merging.base, dtype=torch.float32)
    expected = PeftModel.from_pretrained(base, str(merging.adapter)).merge_and_unload().state_dict()
    original = load_file(merging.base / "model.safetensors")
    assert set(merged) == set(original)
    for name, weight in merged.items():
        assert weight.dtype == original[name].dtype
        assert torch.equal(weight, expected[name].to(weight.dtype)), name
    changed = [name for name in merged if not torch.equal(merged[name], original[name])]
    assert len(changed) == 14


def dequantize(weight: torch.Tensor) -> torch.Tensor:
    """A weight quantized to NF4 with double quantization, and dequantized to float32 by the definition of the format."""
    packed, state = bnb.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    codes = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], dim=1).flatten()
    blocks = bnb.functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    return (state.code[codes.int()].view(len(blocks), -1) * blocks[:, None]).view(weight.shape)


def test_layers_summed_in_float32_in_training_are_merged_the_same_way(merging: Merge) -> None:
    quantization = merging.training()["quantization"] | {"dtype": "bfloat16"}
    layers = merging.training()["quantized_layers"]
    summed = [layer for layer in layers if "layers.1" in layer]
    assert len(summed) == 7
    merging.edit("training.json", quantization=quantization, summed_in_float32=summed)
    merging.run()
    merged, base = (load_file(folder / "model.safetensors") for folder in (merging.out / "merged", merging.base))
    tensors = load_file(merging.adapter / "adapter_model.safetensors")
    config = json.loads((merging.adapter / "adapter_config.json").read_text())
    scaling = config["lora_alpha"] / config["r"]
    for layer in layers:
        lora_a, lora_b = (tensors[f"base_model.model.{layer}.lora_{matrix}.weight"] for matrix in "AB")
        original = base[f"{layer}.weight"]
        weight = dequantize(original.bfloat16())
        rounded_twice = torch.addmm(weight.bfloat16().float(), lora_b, lora_a, alpha=scaling).to(original.dtype)
        rounded_once = torch.addmm(weight, lora_b, lora_a, alpha=scaling).to(original.dtype)
        assert not torch.equal(rounded_once, rounded_twice)
        assert torch.equal(merged[f"{layer}.weight"], rounded_once if layer in summed else rounded_twice), layer


@pytest.mark.parametrize(("quantization", "on_cpu"), [("nf4", True), ("fp4", True), ("nf4", False), ("none", False)])
def test_the_merged_weights_are_those_of_the_layers_in_training(merging: Merge, quantization: str, on_cpu: bool) -> None:
    """Bit for bit. With `on_cpu` the layers keep their 4-bit weights, as on a GPU."""
    settings = merging.training()["quantization"] | {"quantization": quantization}
    trained = load_quantized(merging.base, Quantization.model_validate(settings), on_cpu=on_cpu)
    adapted = PeftModel.from_pretrained(trained.model, str(merging.adapter), is_trainable=True)
    layers = LoraLayers(adapted, fp8=False, keep_dequantized=False, recompute=Recompute())
    assert len(layers.summed_in_float32) == (14 if on_cpu or (torch.cuda.is_available() and quantization == "nf4") else 0)
    merging.edit(
        "training.json",
        quantization=settings,
        quantized_layers=trained.layers,
        summed_in_float32=layers.summed_in_float32,
    )
    training, lora = read_training(merging.adapter), LoraWeights(merging.adapter)
    weights = MergedWeights(merging.base, lora, training=training, dequantized=True)
    for name, layer in layers.layers.items():
        merged = weights.read(name.removeprefix(PEFT_PREFIX) + ".weight")
        assert torch.equal(merged, layer.weight().to(merged.dtype)), name


def test_training_and_merging_call_the_same_function(merging: Merge, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    add = four_bit.add_lora_to_4bit

    def count(*given: Any, **named: Any) -> torch.Tensor:
        calls.append(named["scaling"])
        return add(*given, **named)

    for place in (four_bit, lora_weights_module):
        monkeypatch.setattr(place, "add_lora_to_4bit", count)
    layers = merging.training()["quantized_layers"]
    merging.edit("training.json", summed_in_float32=layers)
    training, lora = read_training(merging.adapter), LoraWeights(merging.adapter)
    weights = MergedWeights(merging.base, lora, training=training, dequantized=True)
    name = f"{layers[0]}.weight"
    weights.read(name)
    assert calls == [lora.scaling[name]]
    trained = load_quantized(merging.base, training.settings, on_cpu=True)
    adapted = PeftModel.from_pretrained(trained.model, str(merging.adapter), is_trainable=True)
    fast = LoraLayers(adapted, fp8=False, keep_dequantized=False, recompute=Recompute())
    calls.clear()
    fast.layers[PEFT_PREFIX + layers[0]].weight()
    assert calls == [lora.scaling[name]]


@pytest.mark.parametrize("rslora", [True, False])
def test_the_scaling_is_that_of_peft(merging: Merge, rslora: bool) -> None:
    merging.edit("adapter_config.json", use_rslora=rslora, lora_alpha=8)
    assert merging.run()["mean_kl"] < 2e-3  # PEFT reads the same config for the trained model


# Wrong merges


def break_lora(monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], object]) -> None:
    """Makes every merge use the adapter as `change` leaves it."""
    init = LoraWeights.__init__

    def broken(self: Any, adapter: Path) -> None:
        init(self, adapter)
        change(self)

    monkeypatch.setattr(LoraWeights, "__init__", broken)


def double_scaling(lora: Any) -> None:
    lora.scaling = {name: 2 * scaling for name, scaling in lora.scaling.items()}


def damage_one_layer(lora: Any) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    lora.pairs[name] = lora.pairs[name]._replace(lora_B=torch.randn_like(lora.pairs[name].lora_B))


def forget_the_mlp(lora: Any) -> None:
    for name in [name for name in lora.pairs if "mlp" in name]:
        del lora.pairs[name]


@pytest.mark.parametrize("layer", ["layers.0.self_attn.k_proj", "layers.1.mlp.gate_proj"])
def test_a_single_missing_layer_is_named_even_if_the_logits_are_within_the_limits(
    merging: Merge, monkeypatch: pytest.MonkeyPatch, layer: str
) -> None:
    for limit in ("MEAN_KL", "OTHER_TOP", "DIFFERENT_ANSWERS"):
        monkeypatch.setattr(limits, limit, 1000)
    merging.run()
    shutil.rmtree(merging.out)
    break_lora(monkeypatch, lambda lora: lora.pairs.pop(f"model.{layer}.weight"))
    message = merging.message()
    assert re.search(rf"model\.{layer}: has -?0\.0\d of the delta weight that was trained, and an error of 1\.0", message)
    assert message.count("of the delta weight that was trained") == 1


@pytest.mark.parametrize("change", [double_scaling, damage_one_layer, forget_the_mlp])
def test_a_wrong_merge_fails(merging: Merge, monkeypatch: pytest.MonkeyPatch, change: Any) -> None:
    break_lora(monkeypatch, change)
    message = merging.message()
    assert re.search(r"of the delta weight that was trained, and an error of [0-9.]+ of it; wanted 1 and 0", message)
    assert "the merged model is not the trained one" in message


def test_a_merge_that_fails_keeps_the_previous_outputs(merging: Merge, monkeypatch: pytest.MonkeyPatch) -> None:
    merging.run()
    before = {path: path.read_bytes() for path in merging.out.rglob("*") if path.is_file()}
    with monkeypatch.context() as patched:
        patched.setattr(limits, "DIFFERENT_ANSWERS", -1)
        with pytest.raises(Problem, match=r"of 8 greedy answers differ by more than a near tie"):
            merging.run()
    monkeypatch.setattr(module, "write_card", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        merging.run()
    assert {path: path.read_bytes() for path in merging.out.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("stale_from", ["the base", "another adapter"])
def test_a_stale_shard_fails(merging: Merge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stale_from: str) -> None:
    merging.base = Path(shutil.copytree(merging.base, tmp_path / "base"))
    AutoModelForCausalLM.from_pretrained(merging.base).save_pretrained(merging.base, max_shard_size="80KB")
    (merging.base / "model.safetensors").unlink(missing_ok=True)
    shard = sorted(merging.base.glob("*.safetensors"))[-1].name
    stale = merging.base / shard
    if stale_from == "another adapter":
        before = (merging.adapter / "adapter_model.safetensors").read_bytes()
        merging.edit_tensors(lambda tensors: tensors.update({name: -tensors[name] for name in tensors if "_B." in name}))
        merging.run()
        stale = Path(shutil.copy(merging.out / "merged" / shard, tmp_path))
        (merging.adapter / "adapter_model.safetensors").write_bytes(before)
    merging.run()
    shutil.rmtree(merging.out)
    write = MergedWeights.write

    def keep_one(self: Any, folder: Path) -> None:
        write(self, folder)
        shutil.copy(stale, folder / shard)

    monkeypatch.setattr(MergedWeights, "write", keep_one)
    assert "the merged model is not the trained one" in merging.message()


def test_a_layer_of_another_base_is_named(merging: Merge) -> None:
    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if "layers.1.self_attn.q_proj" in name]:
            tensors[name.replace("layers.1", "layers.7")] = tensors.pop(name)

    merging.edit_tensors(rename)
    assert "trained model.layers.7.self_attn.q_proj.weight, which" in merging.message()


def test_a_weight_in_another_dtype_is_named(merging: Merge, tmp_path: Path) -> None:
    merging.base = Path(shutil.copytree(merging.base, tmp_path / "base"))
    name = "model.layers.0.mlp.up_proj.weight"
    tensors = load_file(merging.base / "model.safetensors")
    tensors[name] = tensors[name].double()
    save_file(tensors, merging.base / "model.safetensors", {"format": "pt"})
    assert f"{name} has the dtype F64; merge can only change BF16, F16, F32" in merging.message()


def test_incomplete_layers_and_unknown_adapters_are_refused(merging: Merge) -> None:
    merging.edit("adapter_config.json", use_dora=True)
    assert re.search(r"adapter_model\.safetensors: model\.layers\.0.* has no magnitude; train again", merging.message())
    merging.edit("adapter_config.json", use_dora=False, peft_type="LOHA")
    assert "cannot merge LOHA" in merging.message()
    merging.edit("adapter_config.json", peft_type="LORA", modules_to_save=["embed_tokens"])
    assert "cannot merge LORA with modules_to_save" in merging.message()
    merging.edit("adapter_config.json", modules_to_save=None)
    merging.edit_tensors(lambda tensors: tensors.__setitem__("stray", torch.zeros(1)))
    assert "stray is not a LoRA tensor" in merging.message()


def test_removed_parameters_are_explained() -> None:
    removed = {"parity_rows": 64, "max_mean_kl": 0.001, "min_top1_agreement": 0.99, "min_greedy_agreement": 0.9}
    with pytest.raises(
        Problem, match=r"^params\.yaml: merge\.parity_rows: removed; delete the line; 64 validation rows"
    ) as caught:
        parse_section("merge", Params, {**PARAMS, **removed})
    assert [re.findall(r"merge\.(\w+): removed; delete the line; ", message) for message in caught.value.messages] == [
        [name] for name in removed
    ]


# The folder


def test_the_folder_is_a_complete_model_with_the_template_and_stop_tokens_of_its_training(workspace: Workspace) -> None:
    merged = workspace.root / "models" / "merged"
    tokenizer = AutoTokenizer.from_pretrained(merged)
    assert tokenizer.chat_template == (workspace.root / "stages/templates/chatml.jinja").read_text(encoding="utf-8")
    model = AutoModelForCausalLM.from_pretrained(merged)
    assert model.generation_config.eos_token_id == 2
    card = (merged / "README.md").read_text()
    assert "the mean KL divergence is" in card
    train, validation = (read_tokens(workspace.root / f"data/tokens/{name}.arrow") for name in ("train", "validation"))
    tokens = sum(map(len, train["input_ids"].to_pylist()))
    assert f"Trained on {train.num_rows} rows with {tokens:,} tokens, " in card
    assert f"; validated on {validation.num_rows} other rows" in card
    assert str(workspace.root) not in "".join(path.read_text() for path in merged.glob("*.json"))


def test_the_template_of_a_multimodal_base_is_replaced_everywhere(tmp_path: Path) -> None:
    folder, template = tmp_path / "merged", tmp_path / "template.jinja"
    folder.mkdir()
    template.write_text("trained")
    for name in ("chat_template.json", "tokenizer_config.json", "processor_config.json"):
        (folder / name).write_text(json.dumps({"chat_template": "base", "processor_class": "Gemma3Processor"}))
    module._set_chat_template(folder, template)
    from_files, _ = ProcessorMixin.get_processor_dict(folder)
    assert from_files["chat_template"] == "trained"
    assert not [path.name for path in folder.iterdir() if "base" in path.read_text()]
