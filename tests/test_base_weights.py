"""Bases whose files name or arrange their tensors in another way than the model, and bases whose files do not fit it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    FalconConfig,
    Gemma3Config,
    GPT2Config,
    Llama4Config,
    Mistral3Config,
    Qwen3_5Config,
)

from stages.core.problem import Problem
from stages.model.adapter import find_targets
from stages.model.architecture import computes_linear, load_pretrained, outside_language_model, skeleton
from stages.model.base_weights import BaseWeights
from stages.model.quantize import Quantization, load_quantized, quantized_bits
from stages.train.gradient_checkpointing import decoder_blocks

TEXT: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 16,
}
LINEAR_ATTENTION = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


def text_model(kind: str, **given: Any) -> Any:
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **TEXT | given))


def wrapper(config: Any) -> Any:
    return AutoModelForImageTextToText.from_config(config)


MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: text_model("llama"),
    "llama, tied": lambda: text_model("llama", tie_word_embeddings=True),
    "gpt2": lambda: AutoModelForCausalLM.from_config(
        GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=128, vocab_size=128)
    ),
    "qwen3_moe": lambda: text_model("qwen3_moe", **EXPERTS),  # one file tensor for each expert's projection
    "mixtral": lambda: text_model("mixtral", **EXPERTS),
    "gpt_oss": lambda: text_model("gpt_oss", **EXPERTS, layer_types=["sliding_attention", "full_attention"]),
    "qwen3_5": lambda: wrapper(
        Qwen3_5Config(
            text_config={**TEXT, **LINEAR_ATTENTION},
            vision_config={"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64},
        )
    ),
    "gemma3": lambda: wrapper(
        Gemma3Config(
            text_config={**TEXT, "layer_types": ["sliding_attention", "full_attention"]},
            vision_config={**VISION, "model_type": "siglip_vision_model", "image_size": 64},
            mm_tokens_per_image=4,
        )
    ),
    "mistral3": lambda: wrapper(
        Mistral3Config(
            text_config={**TEXT, "model_type": "mistral", "sliding_window": None},
            vision_config={**VISION, "model_type": "pixtral", "head_dim": 16},
            image_token_index=100,
        )
    ),
    "llama4": lambda: wrapper(
        Llama4Config(
            text_config={**TEXT, "intermediate_size_mlp": 128, **EXPERTS, "interleave_moe_layer_step": 2},
            vision_config={
                **VISION,
                "vision_output_dim": 32,
                "projector_input_dim": 32,
                "projector_output_dim": 32,
                "pixel_shuffle_ratio": 0.5,
            },
        )
    ),
}
TOWERS = {"gemma3": {"vision_tower"}, "mistral3": {"vision_tower", "multi_modal_projector"}}
"""What is loaded beside the language model. Qwen3.5 and Llama 4 have a class for the language model alone."""


def save(model: Any, folder: Path) -> Path:
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    (folder / "manifest.json").write_text(json.dumps({"trust_remote_code": False}))
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_every_weight_is_found_and_written_back(name: str, tmp_path: Path) -> None:
    folder = save(MODELS[name](), tmp_path)
    loaded, weights = load_pretrained(folder, dtype=torch.float32), BaseWeights(folder)
    names = [each for each, _ in loaded.named_parameters(remove_duplicate=False)]
    for each in names:
        torch.testing.assert_close(weights[each], loaded.get_parameter(each), rtol=0, atol=0)
    weights.require(names, "for a test")
    files = load_file(folder / "model.safetensors")
    for conversion in weights.conversions(names):
        changed = {each: loaded.get_parameter(each).detach() + 1 for each in conversion.names}
        for key, tensor in weights.to_files(conversion, changed).items():
            torch.testing.assert_close(tensor, files[key] + 1, rtol=0, atol=0)


def test_names_without_the_prefix_of_the_model_are_found(tmp_path: Path) -> None:
    folder = save(MODELS["gpt2"](), tmp_path)  # as the hub has GPT-2
    tensors = load_file(folder / "model.safetensors")
    short = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    assert short.keys() != tensors.keys()
    save_file(short, folder / "model.safetensors", {"format": "pt"})
    weights = BaseWeights(folder)
    [conversion] = weights.conversions(["transformer.h.0.attn.c_attn.weight"])
    assert conversion.keys == ("h.0.attn.c_attn.weight",)
    assert torch.equal(weights["transformer.h.0.attn.c_attn.weight"], short["h.0.attn.c_attn.weight"])


def test_a_weight_that_is_written_over_several_tensors_and_cannot_be_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = BaseWeights(save(MODELS["qwen3_moe"](), tmp_path))
    name = "model.layers.0.mlp.experts.gate_up_proj"
    weights.require([name], "for a test")
    monkeypatch.setattr(
        weights, "to_files", lambda conversion, made: {key: next(iter(made.values())) for key in conversion.keys}
    )
    with pytest.raises(
        Problem, match=rf"makes {name} of .*experts\.0\.gate_proj\.weight \(and 7 more\) .* cannot be reversed"
    ):
        weights.require([name], "for a test")


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_files_that_do_not_fit_the_model_are_refused(quantization: str, tmp_path: Path) -> None:
    folder = save(MODELS["llama"](), tmp_path)
    settings = Quantization(
        quantization=quantization,
        bnb_4bit_use_double_quant=True,
        llm_int8_threshold=6.0,
        llm_int8_skip_modules=[],
        dtype="float32",
    )
    tensors = load_file(folder / "model.safetensors")

    def refused(changed: dict[str, torch.Tensor], message: str) -> None:
        save_file(changed, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(Problem, match=message):
            load_quantized(folder, settings)

    lost, shorter = "model.layers.1.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"
    refused({name: tensors[name] for name in tensors if name != lost}, rf"the files lack 1 tensor \({lost}\) of the Llama")
    scale = {f"{shorter}_scale_inv": torch.ones(1)}
    refused(tensors | scale, rf"the files have 1 tensor \({shorter}_scale_inv\) that the LlamaForCausalLM .* does not know")
    refused(
        tensors | {shorter: tensors[shorter][:64].clone()},
        rf"{shorter} has the shape \(64, 64\); config\.json says \(128, 64\)",
    )
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    load_quantized(folder, settings)


@pytest.mark.parametrize("name", ["qwen3_5", "gemma3", "mistral3", "llama4"])
def test_of_a_model_with_a_vision_tower_the_language_model_alone_is_quantized_and_adapted(name: str, tmp_path: Path) -> None:
    folder = save(MODELS[name](), tmp_path)
    settings = Quantization(
        quantization="nf4", bnb_4bit_use_double_quant=True, llm_int8_threshold=6.0, llm_int8_skip_modules=[], dtype="float32"
    )
    quantized = load_quantized(folder, settings)
    outside = outside_language_model(quantized.model)
    assert {each.removeprefix("model.").partition(".")[0] for each in outside} == TOWERS.get(name, set())
    targets = find_targets(quantized.model, "all-linear")
    assert len(targets) >= 7
    assert len(quantized.layers) >= 7
    for names in (targets, quantized.layers):
        assert not set(names) & set(outside)
    weights = {*(f"{each}.weight" for each in quantized.layers), *quantized.experts}
    assert weights == quantized_bits(skeleton(folder, torch.float32), settings).keys()

    class Adapted:
        @staticmethod
        def get_base_model() -> Any:
            return quantized.model

    assert len(decoder_blocks(Adapted)) == 2


def test_a_linear_layer_of_the_models_own_class_is_quantized_if_it_computes_what_nn_linear_does(tmp_path: Path) -> None:
    falcon = AutoModelForCausalLM.from_config(
        FalconConfig(vocab_size=128, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, multi_query=True)
    )
    folder = save(falcon, tmp_path)
    settings = Quantization(
        quantization="nf4", bnb_4bit_use_double_quant=True, llm_int8_threshold=6.0, llm_int8_skip_modules=[], dtype="float32"
    )
    quantized = load_quantized(folder, settings)
    assert len(quantized.layers) == 8
    assert {f"{each}.weight" for each in quantized.layers} == quantized_bits(
        skeleton(folder, torch.float32), settings
    ).keys()
    routed = skeleton(save(text_model("phimoe", **EXPERTS), tmp_path / "phimoe"), torch.float32)
    routers = [each for each in routed.modules() if type(each).__name__ == "PhimoeTopKRouter"]
    assert routers
    assert not any(map(computes_linear, routers))
