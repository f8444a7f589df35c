"""merge: the written model is the trained one, proven by measuring it; a damaged one is not let through."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from stages.core.problem import Problem
from stages.core.provenance import verify
from stages.core.tokens import read_tokens
from stages.merge import merge as module
from stages.merge.merge import Params, merge
from stages.merge.parity import ModelOutputs, compare, greedy_agreement
from tests.tiny import Workspace

PARAMS = {
    "base": "dequantized",
    "parity_rows": 8,
    "max_mean_kl": 1e-3,
    "min_top1_agreement": 0.9,
    "min_greedy_agreement": 0.0,
}


class Merge:
    """One merge of the workspace's adapter, or of a changed copy of it."""

    def __init__(self, workspace: Workspace, tmp_path: Path) -> None:
        self.root, self.out = workspace.root, tmp_path / "out"
        self.base = self.root / "models" / "base"
        self.adapter = Path(shutil.copytree(self.root / "models" / "adapter", tmp_path / "adapter"))

    def run(self, **given: Any) -> dict[str, Any]:
        tokens = self.root / "data" / "tokens"
        merge(
            Params(**PARAMS | given),
            base=self.base,
            adapter=self.adapter,
            validation_tokens=tokens / "validation.arrow",
            chat_template=tokens / "chat_template.jinja",
            merged=self.out / "merged",
            report=self.out / "report.json",
        )
        report: dict[str, Any] = json.loads((self.out / "report.json").read_text())
        return report

    def refused(self, **given: Any) -> str:
        with pytest.raises(Problem) as caught:
            self.run(**given)
        assert not (self.out / "merged").exists()
        assert not list(self.out.glob("*"))
        return str(caught.value)

    def edit_config(self, **given: Any) -> None:
        path = self.adapter / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | given))

    def edit_tensors(self, change: Any) -> None:
        path = self.adapter / "adapter_model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)


@pytest.fixture
def merging(workspace: Workspace, tmp_path: Path) -> Merge:
    return Merge(workspace, tmp_path)


def test_the_merged_model_is_the_trained_one(merging: Merge) -> None:
    report = merging.run()
    assert report["mean_kl"] < 1e-3
    assert report["top1_agreement"] > 0.9
    assert report["merged_layers"] == 14
    assert report["trained_loss"] == pytest.approx(report["merged_loss"], abs=0.01)
    assert report["greedy_rows"] == 8
    assert 0 <= report["greedy_agreement"] <= 1


def test_the_dequantized_base_is_closer_than_the_full_one(merging: Merge) -> None:
    close = merging.run()["mean_kl"]
    report = merging.run(base="full", max_mean_kl=100, min_top1_agreement=0)
    assert report["mean_kl"] > 10 * close
    # Each report has the figures of the other choice too, and they are the ones that it would have given.
    assert report["other_base"]["base"] == "dequantized"
    assert report["other_base"]["mean_kl"] == pytest.approx(close, rel=1e-3)


def test_the_greedy_answers_of_the_trained_model_are_compared_token_for_token(
    merging: Merge, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "of the greedy answers are the same, merge.min_greedy_agreement is 1" in merging.refused(min_greedy_agreement=1)
    model = AutoModelForCausalLM.from_pretrained(merging.base, dtype=torch.float32).eval()
    rows = read_tokens(merging.root / "data" / "tokens" / "validation.arrow").to_pylist()[:3]
    said = ModelOutputs(model, rows, [2])
    assert [prompt for prompt, _ in said.answers] == [
        row["input_ids"][: next(n for n, label in enumerate(row["labels"]) if label != -100)] for row in rows
    ]
    assert greedy_agreement(said, model) == 1.0
    said.answers[0][1][-1] = (said.answers[0][1][-1] + 1) % 400
    assert greedy_agreement(said, model) == pytest.approx(2 / 3)
    assert compare(said, said)["mean_kl"] == 0


def test_the_folder_says_what_made_it(workspace: Workspace) -> None:
    assert verify(workspace.root / "reports" / "provenance" / "merge.json", workspace.root) == []
    recorded = json.loads((workspace.root / "reports" / "provenance" / "merge.json").read_text())
    assert "models/adapter" in recorded["inputs"]
    assert "models/merged" in recorded["outputs"]
    manifest = json.loads((workspace.root / "models" / "merged" / "manifest.json").read_text())
    assert set(manifest["files"]) == {file.name for file in (workspace.root / "models" / "merged").iterdir()} - {
        "manifest.json"
    }


def test_the_weights_are_pefts_own_on_an_unquantized_base(merging: Merge) -> None:
    training = json.loads((merging.adapter / "training.json").read_text())
    training["quantization"]["quantization"], training["quantized_layers"] = "none", []
    (merging.adapter / "training.json").write_text(json.dumps(training))
    merging.run(base="full", min_top1_agreement=0.5, max_mean_kl=1)
    ours = load_file(merging.out / "merged" / "model.safetensors")
    base = AutoModelForCausalLM.from_pretrained(merging.base, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(base, str(merging.adapter)).merge_and_unload().state_dict()
    original = load_file(merging.base / "model.safetensors")
    assert set(ours) == set(original)
    for name, weight in ours.items():
        assert weight.dtype == original[name].dtype
        assert torch.equal(weight, theirs[name].to(weight.dtype)), name
    changed = [name for name in ours if not torch.equal(ours[name], original[name])]
    assert len(changed) == 14


@pytest.mark.parametrize("rslora", [True, False])
def test_the_scale_is_pefts(merging: Merge, rslora: bool) -> None:
    merging.edit_config(use_rslora=rslora, lora_alpha=8)
    assert merging.run(max_mean_kl=2e-3)["mean_kl"] < 2e-3  # PEFT reads the same config for the trained side


def lose(monkeypatch: pytest.MonkeyPatch, wrong: Callable[[Any], object]) -> None:
    """Lets every merge read the adapter as `wrong` leaves it."""
    init = module._Lora.__init__

    def broken(self: Any, adapter: Path) -> None:
        init(self, adapter)
        wrong(self)

    monkeypatch.setattr(module._Lora, "__init__", broken)


def doubled(lora: Any) -> None:
    lora.scales = {name: 2 * scale for name, scale in lora.scales.items()}


def damaged(lora: Any) -> None:
    layer = lora.layers["model.layers.1.mlp.up_proj.weight"]
    layer["B"] = torch.randn_like(layer["B"])


def forgetful(lora: Any) -> None:
    for name in [name for name in lora.layers if "mlp" in name]:
        del lora.layers[name]


@pytest.mark.parametrize("layer", ["layers.0.self_attn.k_proj", "layers.1.mlp.gate_proj"])
def test_a_single_missed_layer_is_named_whatever_the_logits_say(
    merging: Merge, monkeypatch: pytest.MonkeyPatch, layer: str
) -> None:
    loose = {"max_mean_kl": 1000, "min_top1_agreement": 0}
    merging.run(**loose)
    shutil.rmtree(merging.out)
    lose(monkeypatch, lambda lora: lora.layers.pop(f"model.{layer}.weight"))
    said = merging.refused(**loose)
    assert re.search(rf"model\.{layer} has -?0\.0\d times what training added to it", said)
    assert said.count("times what training added") == 1


@pytest.mark.parametrize("wrong", [doubled, damaged, forgetful])
def test_a_wrong_merge_would_not_pass(merging: Merge, monkeypatch: pytest.MonkeyPatch, wrong: Any) -> None:
    lose(monkeypatch, wrong)
    said = merging.refused()
    assert "is above merge.max_mean_kl" in said
    assert "the merged model is not the trained one" in said


@pytest.mark.parametrize("of", ["the base", "another adapter"])
def test_a_stale_shard_would_not_pass(merging: Merge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, of: str) -> None:
    merging.base = Path(shutil.copytree(merging.base, tmp_path / "base"))
    AutoModelForCausalLM.from_pretrained(merging.base).save_pretrained(merging.base, max_shard_size="80KB")
    (merging.base / "model.safetensors").unlink(missing_ok=True)
    shard = sorted(merging.base.glob("*.safetensors"))[-1].name
    stale = merging.base / shard
    if of == "another adapter":
        before = (merging.adapter / "adapter_model.safetensors").read_bytes()
        merging.edit_tensors(lambda tensors: tensors.update({name: -tensors[name] for name in tensors if "_B." in name}))
        merging.run()
        stale = Path(shutil.copy(merging.out / "merged" / shard, tmp_path))
        (merging.adapter / "adapter_model.safetensors").write_bytes(before)
    merging.run()
    shutil.rmtree(merging.out)
    write = module._Weights.write

    def keep_one(self: Any, folder: Path) -> None:
        write(self, folder)
        shutil.copy(stale, folder / shard)

    monkeypatch.setattr(module._Weights, "write", keep_one)
    assert "the merged model is not the trained one" in merging.refused()


def test_a_layer_of_another_base_is_named(merging: Merge) -> None:
    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if "layers.1.self_attn.q_proj" in name]:
            tensors[name.replace("layers.1", "layers.7")] = tensors.pop(name)

    merging.edit_tensors(rename)
    assert "trained model.layers.7.self_attn.q_proj.weight, which" in merging.refused()


def test_half_a_pair_and_unknown_kinds_are_refused(merging: Merge) -> None:
    merging.edit_config(use_dora=True)
    assert "that are no LoRA pair" in merging.refused()
    merging.edit_config(use_dora=False, peft_type="LOHA")
    assert "cannot merge LOHA" in merging.refused()
    merging.edit_config(peft_type="LORA", modules_to_save=["embed_tokens"])
    assert "cannot merge LORA with modules_to_save" in merging.refused()
    merging.edit_config(modules_to_save=None)
    merging.edit_tensors(lambda tensors: tensors.__setitem__("stray", torch.zeros(1)))
    assert "holds stray, which is no part of a LoRA" in merging.refused()


def test_the_folder_is_a_whole_model_with_the_template_and_stop_tokens_of_its_training(workspace: Workspace) -> None:
    merged = workspace.root / "models" / "merged"
    tokenizer = AutoTokenizer.from_pretrained(merged)
    assert tokenizer.chat_template == (workspace.root / "stages/templates/chatml.jinja").read_text(encoding="utf-8")
    model = AutoModelForCausalLM.from_pretrained(merged)
    assert model.generation_config.eos_token_id == 2
    card = (merged / "README.md").read_text()
    assert "mean KL" in card
    train, validation = (read_tokens(workspace.root / f"data/tokens/{name}.arrow") for name in ("train", "validation"))
    tokens = sum(map(len, train["input_ids"].to_pylist()))
    assert f"Trained on {train.num_rows} rows of {tokens:,} tokens, of which " in card
    assert f"; {validation.num_rows} further rows for validation" in card
    assert str(workspace.root) not in "".join(path.read_text() for path in merged.glob("*.json"))
