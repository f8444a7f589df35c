"""merge, the check of each weight: mistakes are found in every layer, however little was trained, and right merges pass."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from stages.core.provenance import MANIFEST
from stages.core.tokens import TokenRows, read_tokens
from stages.merge import limits
from stages.merge import merge as module
from stages.merge.layers import TrainedWeights
from stages.merge.lora_weights import LoraWeights
from stages.merge.merge import Params, merge
from stages.merge.right_weight import LayerCheck
from stages.merge.training import read_training
from stages.merge.weights import MergedWeights
from stages.model.adapter import Adapter, add_adapter, initial_lora, load_adapter, save_adapter
from stages.model.experts import describe_experts
from stages.model.load import load_model
from stages.model.quantize import Quantization, load_quantized
from tests.runs import params
from tests.tiny import Workspace

SIZES: dict[str, Any] = {
    "vocab_size": 400,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    # A routed token can change its expert.
    "qwen3_moe": {"head_dim": 16, "moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2},
    # Small layers feed a recurrent state.
    "qwen3_5_text": {
        "head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "layer_types": ["linear_attention", "full_attention"],
    },
}
BARELY, LONG = 1e-4, 5e-2
"""lora_B after one step with a learning rate of 1e-4, and after a long training."""


class Chain:
    """A random base and an adapter on it, which has random matrices instead of a training."""

    def __init__(
        self,
        workspace: Workspace,
        folder: Path,
        family: str = "llama",
        *,
        files: torch.dtype = torch.bfloat16,
        size: float = LONG,
        summed_in_float32: bool = False,
        **given: Any,
    ) -> None:
        self.root, self.folder = workspace.root, folder
        self.base, self.adapter = folder / "base", folder / "adapter"
        shutil.copytree(workspace.root / "models" / "base", self.base)
        self._write_base(family, files)
        wanted = params(workspace, **{"dtype": "bfloat16", "r": 4} | given)
        self.settings = Quantization(**{name: getattr(wanted, name) for name in Quantization.model_fields})
        quantized = load_quantized(self.base, self.settings)
        torch.manual_seed(1)
        settings = Adapter(**{name: getattr(wanted, name) for name in Adapter.model_fields})
        adapted = add_adapter(quantized.model, self.base, settings=self.settings, wanted=settings)
        initial = initial_lora(adapted, settings)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.data += size * torch.randn_like(parameter).sign()
        self.adapter.mkdir()
        save_adapter(adapted, self.adapter, initial)
        training = {
            "quantization": self.settings.model_dump(),
            "quantized_layers": quantized.layers,
            "transposed_layers": quantized.transposed,
            "experts": describe_experts(adapted),
            "summed_in_float32": quantized.layers if summed_in_float32 else [],
            "data": {"rows": 1, "tokens": 1, "label_tokens": 1},
        }
        (self.adapter / "training.json").write_text(json.dumps(training))
        self.training = read_training(self.adapter)

    def _write_base(self, family: str, files: torch.dtype) -> None:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**SIZES, **FAMILIES[family]}))
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        (self.base / "model.safetensors").unlink()
        model.to(files).save_pretrained(self.base)

    @property
    def tokens(self) -> Path:
        return self.root / "data" / "tokens" / "validation.arrow"

    def trained_weights(self, *, dequantized: bool = True) -> TrainedWeights:
        model = load_adapter(
            load_quantized(self.base, self.settings).model, self.adapter, base=self.base, settings=self.settings
        )
        return TrainedWeights(
            model,
            self.base,
            training=self.training,
            dequantized=dequantized,
            initial=LoraWeights(self.adapter).initial_deltas(),
            row=TokenRows(read_tokens(self.tokens))[0],
        )

    def check(
        self, right: TrainedWeights, change: Callable[[Any], object] = lambda _: None, *, dequantized: bool = True
    ) -> dict[str, LayerCheck]:
        """The merged weights, with the adapter as `change` leaves it."""
        lora = LoraWeights(self.adapter)
        change(lora)
        merged = self.folder / "merged"
        shutil.rmtree(merged, ignore_errors=True)
        merged.mkdir()
        MergedWeights(self.base, lora, training=self.training, dequantized=dequantized).write(merged)
        for name in ("config.json", MANIFEST):
            shutil.copy(self.base / name, merged)
        return right.check(load_model(merged, self.settings.dtype))

    def merge(self, base: str = "dequantized") -> dict[str, Any]:
        out = self.folder / "out"
        merge(
            Params(base=base),  # type: ignore[arg-type]
            base=self.base,
            adapter=self.adapter,
            validation_tokens=self.tokens,
            chat_template=self.root / "data" / "tokens" / "chat_template.jinja",
            merged=out / "merged",
            report=out / "report.json",
        )
        report: dict[str, Any] = json.loads((out / "report.json").read_text())
        return report


def scale(lora: Any, factor: float) -> None:
    lora.scaling = {name: factor * scaling for name, scaling in lora.scaling.items()}


def exchange(lora: Any) -> None:
    """Every layer gets lora_A of another one."""
    by_shape: dict[Any, list[str]] = {}
    for name, pair in lora.pairs.items():
        by_shape.setdefault(pair.lora_A.shape, []).append(name)
    pairs = dict(lora.pairs)
    for names in by_shape.values():
        assert len(names) > 1
        for name, other in zip(names, names[1:] + names[:1], strict=True):
            lora.pairs[name] = pairs[name]._replace(lora_A=pairs[other].lora_A)


def change_a_row(lora: Any) -> None:
    for name, pair in lora.pairs.items():
        lora_b = pair.lora_B.clone()
        lora_b[1] *= -1
        lora_b[0] *= 2 + len(lora_b) ** 0.5 / 5
        lora.pairs[name] = pair._replace(lora_B=lora_b)


MISTAKES: dict[str, Callable[[Any], object]] = {
    "left out": lambda lora: lora.pairs.clear(),
    "doubled": lambda lora: scale(lora, 2),
    "scaled by 1.2": lambda lora: scale(lora, 1.2),
    "scaled by 0.8": lambda lora: scale(lora, 0.8),
    "of another layer": exchange,
    "two rows wrong": change_a_row,
}

CHAINS: dict[str, dict[str, Any]] = {
    "nf4": {},
    "nf4, barely trained": {"size": BARELY},
    "nf4, float32 files": {"files": torch.float32},
    "nf4, float32 files, barely trained": {"files": torch.float32, "size": BARELY},
    "nf4, float32, barely trained": {"files": torch.float32, "dtype": "float32", "size": BARELY},
    "nf4, summed in float32, barely trained": {"summed_in_float32": True, "size": BARELY},
    "int8": {"quantization": "int8"},
    "int8, barely trained": {"quantization": "int8", "size": BARELY},
    "none, barely trained": {"quantization": "none", "size": BARELY},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa", "size": 1e-2},
    "moe": {"family": "qwen3_moe"},
    "moe in int8, barely trained": {"family": "qwen3_moe", "quantization": "int8", "size": BARELY},
    "hybrid": {"family": "qwen3_5_text"},
    "hybrid, barely trained": {"family": "qwen3_5_text", "size": BARELY},
    "hybrid in int8, barely trained": {"family": "qwen3_5_text", "quantization": "int8", "size": BARELY},
}


@pytest.mark.parametrize("dequantized", [True, False], ids=["dequantized", "full"])
@pytest.mark.parametrize("given", CHAINS.values(), ids=CHAINS)
def test_mistakes_are_found_in_every_layer(
    workspace: Workspace, tmp_path: Path, given: dict[str, Any], dequantized: bool
) -> None:
    chain = Chain(workspace, tmp_path, **given)
    right = chain.trained_weights(dequantized=dequantized)
    assert max((abs(share - 1) for share in right.outputs.values()), default=0) <= limits.MAX_OUTPUT_ERROR
    adapted = set(LoraWeights(chain.adapter).pairs)
    found = chain.check(right, dequantized=dequantized)
    weights = {name.partition("[")[0] if name.endswith("]") else f"{name}.weight" for name in found}
    assert weights == adapted | set(chain.training.quantized)
    assert max(check.error for check in found.values()) < 1e-3
    for name, mistake in MISTAKES.items():
        if given.get("use_dora") and name not in ("left out", "of another layer"):
            continue  # DoRA's magnitudes, which the mistakes leave, are a part of the change
        found = chain.check(right, mistake, dequantized=dequantized)
        missed = {
            layer: check for layer, check in found.items() if check.share is not None and check.error <= limits.MAX_ERROR
        }
        assert not missed, name


def test_the_share_of_a_layer_is_that_of_what_rounding_leaves(workspace: Workspace, tmp_path: Path) -> None:
    chain = Chain(workspace, tmp_path, size=BARELY)
    right = chain.trained_weights()
    assert right.kept is not None
    assert right.kept.smallest < right.kept.share < 0.5
    assert right.kept.dtype == "bfloat16"
    for change, share in ((None, 1.0), ("left out", 0.0)):
        for check in chain.check(right, MISTAKES[change] if change else lambda _: None).values():
            assert check.share == pytest.approx(share, abs=0.05)
    tensors = load_file(chain.folder / "merged" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_what_float32_files_keep_is_all(workspace: Workspace, tmp_path: Path) -> None:
    kept = Chain(workspace, tmp_path, files=torch.float32, size=BARELY).trained_weights().kept
    assert kept is not None
    assert kept.share == pytest.approx(1, abs=1e-3)
    assert kept.dtype == "float32"


@pytest.mark.parametrize(
    "given",
    [
        {"quantization": "none"},
        {"quantization": "none", "init_lora_weights": "pissa"},
        {"llm_int8_skip_modules": ["q_proj"]},
    ],
    ids=["none", "none with pissa", "a layer that is not quantized"],
)
def test_layers_in_full_may_be_trained_in_another_dtype_than_that_of_the_files(
    workspace: Workspace, tmp_path: Path, given: dict[str, Any]
) -> None:
    chain = Chain(workspace, tmp_path, files=torch.float32, size=BARELY, **given)
    assert max(check.error for check in chain.check(chain.trained_weights()).values()) < 1e-3


def test_a_quantized_layer_without_an_adapter_is_checked_too(workspace: Workspace, tmp_path: Path) -> None:
    chain = Chain(workspace, tmp_path, target_modules=["q_proj"])
    right = chain.trained_weights()
    found = chain.check(right)
    assert len(found) == 14
    assert {name for name, check in found.items() if check.share is not None} == {name for name in found if "q_proj" in name}
    assert max(check.error for check in found.values()) <= limits.MAX_ERROR
    wrong = {name for name, check in chain.check(right, dequantized=False).items() if check.error > limits.MAX_ERROR}
    assert wrong == set(found), "the weights before quantization"


def test_the_initial_matrices_of_pissa_are_no_training(workspace: Workspace, tmp_path: Path) -> None:
    chain = Chain(workspace, tmp_path, init_lora_weights="pissa", size=1e-2)
    right = chain.trained_weights()
    for check in chain.check(right, lambda lora: lora.pairs.update(lora.initial)).values():
        assert check.error > 0.9


def test_outputs_that_are_not_those_of_the_adapters_tensors_are_found(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft.tuners.lora.layer import Linear

    chain = Chain(workspace, tmp_path)
    forward = Linear.forward
    monkeypatch.setattr(
        Linear, "forward", lambda self, x: self.base_layer(x) + 1.2 * (forward(self, x) - self.base_layer(x)).to(x)
    )
    right = chain.trained_weights()
    assert all(share == pytest.approx(1.2, abs=0.02) for share in right.outputs.values())
    with pytest.raises(
        module.Problem, match=r"q_proj: the outputs of the trained layer have 1\.2\d of what its adapter should"
    ):
        chain.merge()


# The whole stage


@pytest.mark.parametrize("size", [LONG, BARELY])
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_right_merges_of_models_that_answer_rounding_strongly_pass(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, quantization: str, size: float
) -> None:
    monkeypatch.setattr(module, "PARITY_ROWS", 8)
    report = Chain(workspace, tmp_path, family, quantization=quantization, size=size).merge()
    most = 20 if (family, quantization) == ("qwen3_moe", "nf4") else 4  # few tokens change their expert, and by chance
    assert report["rounding"]["mean_kl"] / 4 < report["mean_kl"] < most * report["rounding"]["mean_kl"], (
        "it is the right measure"
    )
    assert report["largest_weight_error"] < 1e-3
    assert report["greedy_different"] == 0
    cost = report["quantization_cost"]
    assert cost["cost"] == pytest.approx(report["base_loss"] - cost["full_base_loss"])
    assert cost["interval"][0] < cost["cost"] < cost["interval"][1]


def test_a_lost_delta_weight_is_said(workspace: Workspace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = Chain(workspace, tmp_path, size=BARELY).merge()
    kept = report["delta_kept"]
    said = capsys.readouterr().out
    assert "merge: rounding the merged weights to bfloat16, the dtype of the base's files, keeps" in said
    assert f"keeps {100 * kept['share']:.0f} % of what was trained" in said
    assert f"keeps {100 * kept['share']:.1f} % of the delta weights" in (tmp_path / "out/merged/README.md").read_text()


def test_damage_that_no_merged_weight_shows_is_found_by_the_logits(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain = Chain(workspace, tmp_path)
    write = MergedWeights.write

    def damage(self: Any, folder: Path) -> None:
        write(self, folder)
        tensors = load_file(folder / "model.safetensors")
        tensors["model.layers.0.input_layernorm.weight"] *= 1.5
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    monkeypatch.setattr(MergedWeights, "write", damage)
    with pytest.raises(module.Problem, match=r"mean KL \S+ is above \S+; rounding alone makes \S+ here") as caught:
        chain.merge()
    assert "delta weight" not in str(caught.value)
