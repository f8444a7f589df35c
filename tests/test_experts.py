"""Experts of mixture-of-experts models: quantized, adapted and merged, each beside Transformers, PEFT and bitsandbytes."""

import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from stages.core.problem import Problem
from stages.merge.layers import TrainedWeights
from stages.merge.training import Training
from stages.model import expert_quantizer, experts
from stages.model.adapter import Adapter, add_adapter, find_targets, load_adapter, save_adapter
from stages.model.experts import (
    describe_experts,
    expert_parameters,
    expert_weight,
    find_experts,
    weight_chunks,
    wrapper_factors,
    write_sum,
)
from stages.model.load import load_model
from stages.model.quantize import Quantization, load_quantized, pack_experts, quantized_bits, quantized_bytes
from stages.model.routers import CHOOSES, GATE, find_routers
from stages.train import expert_layers
from stages.train.coverage import describe_gaps, describe_weights
from stages.train.expert_layers import ExpertLayers
from tests.runs import INPUTS, run
from tests.test_adapter import SHORT, answered, few_rows, merged
from tests.tiny import Workspace

__all__ = ["few_rows"]

SIZES: dict[str, Any] = {
    "vocab_size": 400,
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
    "initializer_range": 0.1,
}
SHARED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    # Transposed, with biases, gate and up projection interleaved.
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},
    # One tensor for all experts in the files, too.
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    # Shared experts and a dense first layer, which PEFT takes for experts.
    "deepseek_v3": {
        **SHARED,
        "num_key_value_heads": 4,
        "topk_group": 1,
        "q_lora_rank": 24,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
    },
    "glm4_moe": {**SHARED, "topk_group": 1, "head_dim": 16},
}
OTHERS: dict[str, dict[str, Any]] = {
    # A forward method that Transformers has no faster one for.
    "llama4_text": {"head_dim": 16, "intermediate_size_mlp": 128, "num_local_experts": 4, "interleave_moe_layer_step": 2},
    # Linear layers as routers: in the block of experts, beside the attention, in a module of its own, as a gate.
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2, "head_dim": 16, "num_shared_expert": 1},
    "gemma4_text": {
        "enable_moe_block": True,
        "num_experts": 32,
        "top_k_experts": 2,
        "head_dim": 16,
        "global_head_dim": 16,
        "hidden_size_per_layer_input": 0,
        "layer_types": ["full_attention"] * 2,
    },
    "jetmoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "kv_channels": 16},
    "qwen2_moe": {"num_experts": 4, "num_experts_per_tok": 2, "shared_expert_intermediate_size": 32},
}
BLOCKS = "model.layers.0.mlp.experts"
IDS = torch.randint(5, 390, (2, 24), generator=torch.Generator().manual_seed(3))


def build(kind: str, **given: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SIZES | (FAMILIES | OTHERS)[kind] | given)
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("_bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def saved(folder: Path, kind: str, **given: Any) -> Path:
    build(kind, **given).save_pretrained(folder)
    (folder / "manifest.json").write_text('{"trust_remote_code": false, "model": "tiny", "revision": ""}')
    return folder


def quantization(how: str = "nf4", dtype: str = "float32", **given: Any) -> Quantization:
    settings = {"bnb_4bit_use_double_quant": True, "llm_int8_threshold": 6.0, "llm_int8_skip_modules": []}
    return Quantization(**settings | {"quantization": how, "dtype": dtype} | given)  # type: ignore[arg-type]


def wanted(workspace: Workspace, **given: Any) -> Adapter:
    section = dict(workspace.params()["train"]) | {"r": 4, "target_parameters": "all-experts"} | given
    return Adapter(**{name: section[name] for name in Adapter.model_fields})


def randomize(model: Any) -> Any:
    """Matrices B that are not zero, so that the adapter changes something."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model.eval()


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    """The weights that a model computes with, by the name of the parameter."""
    with torch.no_grad():
        return {f"{each.name}.{name}": expert_weight(each, name) for each in find_experts(model) for name in each.shapes}


def gradients(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The logits of IDS, and the gradients of the adapter by PEFT's names."""
    model.zero_grad(set_to_none=True)
    logits = model(input_ids=IDS, use_cache=False).logits
    logits.logsumexp(-1).sum().backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= tolerance * gradient.norm(), name


# Quantization


@pytest.mark.parametrize("how", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_a_loaded_model_has_the_bytes_of_bitsandbytes(tmp_path: Path, kind: str, how: str) -> None:
    settings = quantization(how)
    model = load_quantized(saved(tmp_path, kind), settings)
    plain = dict(build(kind).named_parameters())
    assert model.experts == list(expert_parameters(build(kind)))
    assert len(model.experts) == 4
    for name, weight in weights_of(model.model).items():
        data = model.model.get_parameter(name)
        if how == "int8":
            rows, scales, _ = bnb.functional.int8_vectorwise_quant(plain[name].detach().half().flatten(0, 1))
            packed, dequantized = rows.view(torch.uint8), rows.float() * (scales.view(-1, 1) / 127)
        else:
            packed, state = bnb.functional.quantize_4bit(plain[name].detach(), quant_type=how, compress_statistics=True)
            dequantized = bnb.functional.dequantize_4bit(packed, state)
        assert data.dtype == torch.uint8
        assert torch.equal(data.flatten(), packed.flatten())
        assert torch.equal(weight, dequantized.view_as(weight))


def test_loading_holds_one_parameter_in_full_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[torch.Tensor]] = []
    pack = expert_quantizer.pack

    def recording(weight: torch.Tensor, *given: Any, **named: Any) -> Any:
        assert [each for each in alive if each() is not None] == []
        alive.append(weakref.ref(weight))
        return pack(weight, *given, **named)

    monkeypatch.setattr(expert_quantizer, "pack", recording)
    load_quantized(saved(tmp_path, "qwen3_moe"), quantization())
    assert len(alive) == 4


def test_large_parameters_are_quantized_in_chunks_of_whole_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts, "CHUNK_WEIGHTS", 5000)
    weight = torch.randn(5, 48, 50, generator=torch.Generator().manual_seed(0))
    for how in ("nf4", "int8"):
        data, packed = pack_experts(weight, quantization(how))
        found = write_sum(packed.chunks(data), None, out=torch.empty(weight.shape))
        for part in (slice(0, 2), slice(2, 4), slice(4, 5)):
            alone, alone_packed = pack_experts(weight[part], quantization(how))
            expected = write_sum(alone_packed.chunks(alone), None, out=torch.empty(weight[part].shape))
            assert torch.equal(found[part], expected)
        assert (found - weight).norm() < 0.12 * weight.norm()


def test_modules_of_experts_can_be_left_in_full(tmp_path: Path) -> None:
    base = saved(tmp_path, "qwen3_moe")
    settings = quantization(llm_int8_skip_modules=["1.mlp.experts"])
    assert load_quantized(base, settings).experts == [f"{BLOCKS}.gate_up_proj", f"{BLOCKS}.down_proj"]
    bits = quantized_bits(build("qwen3_moe"), settings)
    assert [name for name in bits if "experts" in name] == [f"{BLOCKS}.gate_up_proj", f"{BLOCKS}.down_proj"]
    with pytest.raises(Problem, match=r"no linear layer 'expert'; its linear layers are experts, k_proj"):
        load_quantized(base, quantization(llm_int8_skip_modules=["expert"]))


def test_placement_and_memory_checks_count_quantized_experts(tmp_path: Path) -> None:
    base = saved(tmp_path, "qwen3_moe", num_experts=64)
    experts_alone = sum(shape.numel() for shape in expert_parameters(build("qwen3_moe", num_experts=64)).values())
    full, small = (quantized_bytes(base, quantization(how, dtype="bfloat16")) for how in ("none", "nf4"))
    assert full - small > 1.45 * experts_alone


# The forward and backward pass


@pytest.mark.parametrize("kind", FAMILIES)
def test_logits_and_gradients_are_those_of_peft(workspace: Workspace, tmp_path: Path, kind: str) -> None:
    base = saved(tmp_path, kind)
    model = load_quantized(base, quantization("none")).model
    model = randomize(add_adapter(model, base, settings=quantization("none"), wanted=wanted(workspace)))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_adapter(model, adapter, {})
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter), is_trainable=True)
    expected, expected_gradients = gradients(plain.eval())
    for fast in (False, True):
        assert not fast or len(ExpertLayers(model).layers) == len(find_experts(model))
        found, found_gradients = gradients(model)
        torch.testing.assert_close(found, expected)
        assert_same_gradients(found_gradients, expected_gradients, 1e-5)


@pytest.mark.parametrize("how", ["nf4", "int8"])
@pytest.mark.parametrize("parameters", ["all-experts", ["down_proj"], []], ids=str)
@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_fast_quantized_experts_compute_what_transformers_does_with_dequantized_ones(
    workspace: Workspace, tmp_path: Path, kind: str, parameters: Any, how: str
) -> None:
    base, settings = saved(tmp_path, kind), quantization(how)
    model = load_quantized(base, settings).model
    model = randomize(add_adapter(model, base, settings=settings, wanted=wanted(workspace, target_parameters=parameters)))
    expected, expected_gradients = gradients(model)
    layers = ExpertLayers(model)
    assert (layers.skipped, list(layers.layers)) == ([], ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"])
    found, found_gradients = gradients(model)
    torch.testing.assert_close(found, expected)
    assert_same_gradients(found_gradients, expected_gradients, 1e-5)
    with model.disable_adapter():
        off = model(input_ids=IDS).logits
    torch.testing.assert_close(off, load_quantized(base, settings).model(input_ids=IDS).logits)


@pytest.mark.parametrize("how", ["nf4", "none"])
def test_in_16_bits_small_delta_weights_are_not_lost(workspace: Workspace, tmp_path: Path, how: str) -> None:
    """A delta weight a hundred times smaller than the rounding of the weights changes the outputs as in float32."""
    base = saved(tmp_path, "qwen3_moe")
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    chosen = torch.stack([torch.arange(64) % 4, (torch.arange(64) + 1) % 4], 1)
    changes = []
    for dtype in ("float32", "bfloat16"):
        settings = quantization(how, dtype=dtype)
        model = load_quantized(base, settings).model
        torch.manual_seed(0)
        model = randomize(add_adapter(model, base, settings=settings, wanted=wanted(workspace)))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.mul_(0.02)
        assert len(ExpertLayers(model).layers) == 2
        forward = find_experts(model)[0].outer.forward
        inputs = x.to(model.dtype), chosen, torch.full((64, 2), 0.5)
        with torch.no_grad():
            on = forward(*inputs).double()
            with model.disable_adapter():
                changes.append((on - forward(*inputs).double()).flatten())
    exact, rounded = changes
    assert (exact @ rounded / exact.square().sum()).item() == pytest.approx(1, abs=0.25)


@pytest.mark.parametrize("sizes", [{"moe_intermediate_size": 20}, {"r": 3}], ids=str)
def test_sizes_that_grouped_products_do_not_take(workspace: Workspace, tmp_path: Path, sizes: dict[str, int]) -> None:
    base = saved(tmp_path, "qwen3_moe", **{name: size for name, size in sizes.items() if name != "r"})
    settings = quantization("none", dtype="bfloat16" if "r" in sizes else "float32")  # so that Transformers takes them
    model = load_quantized(base, settings).model
    given = wanted(workspace, r=sizes.get("r", 4))
    model = randomize(add_adapter(model, base, settings=settings, wanted=given))
    expected, _ = gradients(model)
    assert len(ExpertLayers(model).layers) == 2
    found, found_gradients = gradients(model)
    assert (found - expected).float().std() < 0.05 * expected.float().std()
    assert all(gradient.isfinite().all() for gradient in found_gradients.values())


def test_weights_and_activations_are_not_kept(workspace: Workspace, tmp_path: Path) -> None:
    base, settings = saved(tmp_path, "qwen3_moe"), quantization()
    model = load_quantized(base, settings).model
    model = add_adapter(model, base, settings=settings, wanted=wanted(workspace))
    kept: list[torch.Size] = []
    for fast in (False, True):
        if fast:
            ExpertLayers(model)
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape) or tensor, lambda x: x):
            model(input_ids=IDS, use_cache=False)
        full = [shape for shape in kept if len(shape) == 3 and shape[0] == 4 and shape.numel() > 4000]
        rows = [shape for shape in kept if len(shape) == 2 and shape[0] == 2 * IDS.numel()]
        assert bool(full) != fast
        if fast:
            assert rows == [torch.Size((2 * IDS.numel(), 64))] * 2  # h of each layer


def test_experts_with_code_of_their_own_are_recomputed(workspace: Workspace, tmp_path: Path) -> None:
    base, settings = saved(tmp_path, "llama4_text"), quantization()
    model = load_quantized(base, settings).model
    model = randomize(add_adapter(model, base, settings=settings, wanted=wanted(workspace)))
    expected, expected_gradients = gradients(model)
    layers = ExpertLayers(model)
    assert layers.skipped == ["Llama4TextExperts, which have code of their own"]
    found, found_gradients = gradients(model)
    assert torch.equal(found, expected)
    assert_same_gradients(found_gradients, expected_gradients, 1e-6)


def test_fast_experts_that_compute_something_else_are_given_up(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, settings = saved(tmp_path, "gpt_oss"), quantization()
    model = load_quantized(base, settings).model
    model = randomize(add_adapter(model, base, settings=settings, wanted=wanted(workspace)))
    expected, _ = gradients(model)
    monkeypatch.setattr(expert_layers._FastExperts, "activate", lambda _, h: h[:, ::2].contiguous())
    layers = ExpertLayers(model)
    assert layers.skipped == ["GptOssExperts, which compute something else than their config says"]
    assert torch.equal(gradients(model)[0], expected)


# Targets


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_saved_adapter_loads_in_plain_peft_and_here(workspace: Workspace, tmp_path: Path, kind: str) -> None:
    """With ranks of its own for some layers, which PEFT must find under the names that it is given."""
    base, settings = saved(tmp_path, kind), quantization("none")
    model = load_quantized(base, settings).model
    given = wanted(workspace, rank_pattern={"down_proj": 2}, alpha_pattern={"gate_up_proj": 3, "o_proj": 5})
    model = randomize(add_adapter(model, base, settings=settings, wanted=given))
    expected = model(input_ids=IDS).logits
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_adapter(model, adapter, {})
    (adapter / "training.json").write_text(json.dumps({"experts": describe_experts(model)}))
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter)).eval()
    torch.testing.assert_close(plain(input_ids=IDS).logits, expected)
    again = load_adapter(load_quantized(base, settings).model, adapter, base=base, settings=settings)
    assert torch.equal(again(input_ids=IDS).logits, expected)


@pytest.mark.parametrize("kind", ["deepseek_v3", "glm4_moe"])
def test_layers_that_peft_takes_for_experts_are_adapted(workspace: Workspace, tmp_path: Path, kind: str) -> None:
    base, settings = saved(tmp_path, kind), quantization("none")
    model = load_quantized(base, settings).model
    targets = find_targets(model, "all-linear")
    model = add_adapter(model, base, settings=settings, wanted=wanted(workspace, target_parameters=[]))
    found = {name for name, module in model.get_base_model().named_modules() if hasattr(module, "lora_A")}
    assert found == set(targets)
    assert {"model.layers.0.mlp.gate_proj", "model.layers.1.mlp.shared_experts.up_proj"} <= found
    converted = get_peft_model(build(kind), LoraConfig(target_modules=targets))
    assert any(type(module).__name__ == "ParamWrapper" for module in converted.modules())  # what PEFT does by itself


def test_peft_must_adapt_what_it_was_told_to(workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, settings = saved(tmp_path, "qwen3_moe"), quantization("none")
    convert = "peft.utils.transformers_weight_conversion.convert_peft_config_for_transformers"

    def add(**given: Any) -> Any:
        return add_adapter(load_quantized(base, settings).model, base, settings=settings, wanted=wanted(workspace, **given))

    add(target_modules=["q_proj"])
    monkeypatch.setattr(
        "stages.model.adapter.targets_as_given",
        pytest.MonkeyPatch.context,  # which changes nothing
    )
    monkeypatch.setattr(convert, lambda config, **_: config.target_modules.remove("model.layers.0.self_attn.q_proj"))
    with pytest.raises(Problem, match=r"^PEFT \d.*: model\.layers\.0\.self_attn\.q_proj has no adapter \(1 such layers\)"):
        add(target_modules=["q_proj"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"target_parameters": ["up_proj"]},
            "target_parameters: up_proj is no parameter of experts; those here: down_proj,",
        ),
        ({"target_parameters": ["experts.down"]}, "target_parameters: experts.down is no parameter of experts"),
    ],
)
def test_unknown_parameters_are_refused(workspace: Workspace, tmp_path: Path, given: dict[str, Any], message: str) -> None:
    base, settings = saved(tmp_path, "qwen3_moe"), quantization("none")
    with pytest.raises(Problem, match=rf"^params\.yaml: train\.{message}"):
        add_adapter(load_quantized(base, settings).model, base, settings=settings, wanted=wanted(workspace, **given))


def test_what_peft_has_for_layers_alone_is_refused_at_the_start(workspace: Workspace, scratch: Path) -> None:
    given = {"target_parameters": "all-experts", "use_dora": True, "lora_dropout": 0.1, "init_lora_weights": "pissa"}
    with pytest.raises(Problem) as caught:
        run(workspace, scratch, **given)
    assert [message.partition(": must be")[0] for message in caught.value.messages] == [
        f"params.yaml: train.{name}" for name in ("use_dora", "lora_dropout", "init_lora_weights")
    ]
    with pytest.raises(Problem, match=r"train\.target_parameters: must be \[\]: LlamaForCausalLM keeps no experts"):
        run(workspace, scratch, target_parameters="all-experts")


def test_experts_alone_can_be_adapted(workspace: Workspace, tmp_path: Path) -> None:
    base, settings = saved(tmp_path, "qwen3_moe"), quantization("none")
    given = wanted(workspace, target_modules=[], target_parameters=["0.mlp.experts.down_proj"])
    model = add_adapter(load_quantized(base, settings).model, base, settings=settings, wanted=given)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained == [f"base_model.model.{BLOCKS}.lora_{matrix}.default.weight" for matrix in "AB"]


@pytest.mark.parametrize(
    ("kind", "routers"),
    [
        ("hunyuan_v1_moe", {"mlp.gate.wg": CHOOSES}),
        ("gemma4_text", {"router.proj": CHOOSES}),  # the key projection has as many outputs
        ("jetmoe", {"mlp.router.layer": CHOOSES, "self_attention.experts.router.layer": CHOOSES}),
        ("qwen2_moe", {"mlp.shared_expert_gate": GATE}),
        ("mixtral", {}),
    ],
)
def test_routers_are_neither_quantized_nor_adapted(
    workspace: Workspace, tmp_path: Path, kind: str, routers: dict[str, str]
) -> None:
    expected = {f"model.layers.{layer}.{name}": reason for layer in (0, 1) for name, reason in routers.items()}
    quantized = load_quantized(saved(tmp_path, kind), quantization())
    assert find_routers(quantized.model) == expected
    assert not expected.keys() & set(quantized.layers)
    assert not expected.keys() & set(find_targets(quantized.model, "all-linear"))
    lines = list(describe_gaps(quantized, quantization(), wanted(workspace)))
    assert [line for line in lines if CHOOSES in line or GATE in line] == [
        f"{'.'.join(name.split('.')[-2:])} gets no adapter: {reason}"
        for name, reason in sorted({name.split(".experts.")[-1]: reason for name, reason in routers.items()}.items())
        if kind != "jetmoe" or name == "mlp.router.layer"
    ]


def test_the_lines_at_the_start(workspace: Workspace, tmp_path: Path) -> None:
    base, settings = saved(tmp_path, "qwen3_moe", num_experts=64), quantization(dtype="bfloat16")
    lines = {}
    for parameters in ("all-experts", []):
        quantized, given = load_quantized(base, settings), wanted(workspace, target_parameters=parameters)
        gaps = list(describe_gaps(quantized, settings, given))
        model = add_adapter(quantized.model, base, settings=settings, wanted=given)
        lines[str(parameters)] = [*gaps, describe_weights(quantized, model, settings=settings, wanted=given)]
    start = "871 k weights: 811 k in nf4 (0.0 GB), 59.8 k in bfloat16 (0.0 GB: embeddings, output head, routers); adapter: "
    assert lines == {
        "all-experts": [f"{start}r 4 on 8 layers and 4 parameters of experts, 118 k weights trained"],
        "[]": [
            "786 k weights of experts get no adapter; train.target_parameters: all-experts would train 115 k weights more",
            f"{start}r 4 on 8 layers, 3.6 k weights trained",
        ],
    }
    quantized = load_quantized(base, quantization("int8"))
    assert "the weights of experts are in 8 bits" in next(describe_gaps(quantized, quantization("int8"), given))
    quantized = load_quantized(base, quantization("none", dtype="bfloat16"))
    line = describe_weights(quantized, quantized.model, settings=quantization("none"), wanted=given)
    assert line.startswith("871 k weights: 871 k in bfloat16 (0.0 GB); adapter: r 4 on 0 layers")


# The chain


def base_of(workspace: Workspace, folder: Path, kind: str) -> Path:
    """The workspace's base with another model in it."""
    base = Path(shutil.copytree(workspace.root / INPUTS[2], folder / "base"))
    for file in base.glob("*.safetensors*"):
        file.unlink()
    build(kind).save_pretrained(base)
    return base


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        *((kind, {}) for kind in FAMILIES),
        ("qwen3_moe", {"quantization": "int8", "target_parameters": ["down_proj"]}),
        ("gpt_oss", {"quantization": "none", "target_modules": [], "use_rslora": True}),
        ("qwen3_moe", {"target_parameters": []}),
        ("llama4_text", {"quantization": "fp4", "bnb_4bit_use_double_quant": False}),
        ("jetmoe", {}),
    ],
    ids=str,
)
def test_the_merged_model_is_the_trained_one_to_the_bit(
    workspace: Workspace, scratch: Path, kind: str, given: dict[str, Any]
) -> None:
    base = base_of(workspace, scratch, kind)
    out = run(workspace, scratch, base, **SHORT | {"quantization": "nf4", "target_parameters": "all-experts"} | given)
    parity = merged(workspace, out, base)
    if given.get("quantization") != "int8":
        assert parity["mean_kl"] < 1e-6
        assert (parity["top1_agreement"], parity["greedy_different"]) == (1, 0)
    settings = Quantization.model_validate(json.loads((out / "adapter" / "training.json").read_text())["quantization"])
    trained = load_adapter(load_quantized(base, settings).model, out / "adapter", base=base, settings=settings)
    merged_model = load_model(out / "merged", "float32")
    original = dict(build(kind).named_parameters())
    for name, weight in weights_of(trained).items():
        assert torch.equal(merged_model.get_parameter(name), weight), name
        assert not torch.equal(weight, original[name])
    assert parity["merged_layers"] == sum(
        name.endswith(".lora_A.weight") for name in load_file(out / "adapter" / "adapter_model.safetensors")
    )
    assert all(row["answer_tokens"] for row in answered(workspace, out))


def test_a_missing_delta_weight_of_one_expert_is_found(workspace: Workspace, tmp_path: Path) -> None:
    base, settings = saved(tmp_path, "gpt_oss"), quantization()
    model = load_quantized(base, settings).model
    model = randomize(add_adapter(model, base, settings=settings, wanted=wanted(workspace)))
    names = frozenset(weights_of(model))
    training = Training(settings, names, frozenset(), frozenset(), experts=names, rows=1, tokens=3, label_tokens=2)
    row = {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}
    right = TrainedWeights(model, base, training=training, dequantized=True, initial={}, row=row)
    trained = weights_of(model)
    with model.disable_adapter():
        without = weights_of(model)
    plain = build("gpt_oss")
    for name, weight in trained.items():
        plain.get_parameter(name).data.copy_(weight)
    experts = {f"{name}[{number}]" for name in names for number in range(4)}
    checks = right.check(plain)
    assert experts <= checks.keys()
    assert all(checks[name].error < 1e-3 and checks[name].share == pytest.approx(1, abs=1e-3) for name in experts)
    name = "model.layers.1.mlp.experts.down_proj"
    plain.get_parameter(name).data[2] = without[name][2]
    checks = right.check(plain)
    assert checks[f"{name}[2]"].share == pytest.approx(0, abs=1e-3)
    assert {each for each in experts if checks[each].error > 0.5} == {f"{name}[2]"}


def test_experts_in_full_may_be_trained_in_another_dtype_than_that_of_the_files(
    workspace: Workspace, tmp_path: Path
) -> None:
    base, settings = saved(tmp_path, "qwen3_moe"), quantization("none", "bfloat16")
    model = load_quantized(base, settings).model
    model = add_adapter(model, base, settings=settings, wanted=wanted(workspace))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data += 1e-4 * torch.randn_like(parameter).sign()
    deltas = {f"{each.name}.{name}": wrapper_factors(each, name) for each in find_experts(model) for name in each.shapes}
    training = Training(settings, *[frozenset[str]()] * 3, experts=frozenset(deltas), rows=1, tokens=3, label_tokens=2)
    row = {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}
    right = TrainedWeights(model, base, training=training, dequantized=True, initial={}, row=row)
    plain = build("qwen3_moe")
    for name, factors in deltas.items():
        weight = plain.get_parameter(name).data
        write_sum(weight_chunks(weight), factors, out=weight)
    checks = right.check(plain.to(torch.bfloat16))
    assert max(checks[f"{name}[{number}]"].error for name in deltas for number in range(4)) < 1e-3


def test_checkpointing_and_resuming_give_the_same_bytes(workspace: Workspace, scratch: Path) -> None:
    base = base_of(workspace, scratch, "qwen3_moe")
    given = {"quantization": "nf4", "target_parameters": "all-experts", "training_arguments": {"max_steps": 3}}
    outs = [
        run(workspace, scratch / str(checkpointing), base, gradient_checkpointing=checkpointing, **given)
        for checkpointing in (False, True)
    ]
    for name in ("adapter/adapter_model.safetensors", "report.json", "loss/train.csv"):
        assert (outs[0] / name).read_bytes() == (outs[1] / name).read_bytes(), name


def test_sharded_experts_train_to_the_same_bytes(workspace: Workspace, scratch: Path) -> None:
    base = base_of(workspace, scratch, "qwen3_moe")
    given = {"quantization": "nf4", "target_parameters": "all-experts", "training_arguments": {"max_steps": 2}}
    outs = [
        run(workspace, scratch / str(fsdp), base, fsdp=fsdp, num_processes=2, per_device_train_batch_size=2, **given)
        for fsdp in (False, True)
    ]
    for name in ("adapter/adapter_model.safetensors", "report.json"):
        assert (outs[0] / name).read_bytes() == (outs[1] / name).read_bytes(), name
