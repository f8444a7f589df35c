"""Tiny models of many architectures: padded or padding-free, adapted and decoded, each against Transformers and PEFT."""

from typing import Any, NamedTuple

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from stages.generate.backend import GenerationSettings
from stages.generate.decoder import Decoder, can_decode
from stages.generate.fused_projections import fuse_projections
from stages.generate.sampling import SamplingConfig
from stages.generate.transformers_backend import TransformersBackend
from stages.model.adapter import find_targets, unsuitable_layers
from stages.model.collate import collate_padded, collate_padding_free
from stages.model.logits import label_logits
from stages.model.padding_free import enable_padding_free
from stages.train.lora_layers import LoraLayers
from stages.train.loss import next_token_loss
from stages.train.recompute import Recompute
from tests.tiny import compile_as_on_gpu

WINDOW = 16
SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
DIFFER = "its logits differ from those of single rows"
OWN = "the model has its own attention code"


class Family(NamedTuple):
    """What is expected of an architecture."""

    config: dict[str, Any]
    padded: str = ""
    """Why its rows are padded; "" if they are padding-free."""
    left_out: tuple[str, ...] = ()
    """The layers that get no adapter."""
    skipped: tuple[str, ...] = ()
    """Why layers keep PEFT's implementation."""
    ignores_padding: bool = True
    decodes: bool = True


LOCAL = ["sliding_attention", "full_attention"]
FAMILIES = {
    "gpt2": Family({"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}, skipped=("Conv1D layers",)),
    "mistral": Family({"sliding_window": WINDOW}),
    "phi3": Family({"sliding_window": WINDOW}),
    "gemma3_text": Family({"head_dim": 16, "sliding_window": WINDOW, "layer_types": LOCAL}),
    # The window is in the mask alone; a router that is a linear layer and returns a tuple.
    "phimoe": Family(
        {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": WINDOW},
        DIFFER,
        left_out=("router",),
        decodes=False,
    ),
    # Attention sinks.
    "gpt_oss": Family(
        {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": WINDOW, "layer_types": LOCAL},
        "its attention uses attention sinks",
        decodes=False,
    ),
    # Keys and values of different sizes.
    "minicpm3": Family(
        {
            "num_key_value_heads": 4,
            "q_lora_rank": 24,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "v_head_dim": 8,
        },
        decodes=False,
    ),
    # Another such router; attention in chunks.
    "llama4_text": Family(
        {
            "head_dim": 16,
            "intermediate_size_mlp": 128,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 2,
            "attention_chunk_size": WINDOW,
        },
        DIFFER,
        left_out=("router",),
        decodes=False,
    ),
    # Layers whose output is changed in place, and that are no nn.Linear.
    "falcon": Family({"multi_query": True, "bias": False, "new_decoder_architecture": False}, OWN, decodes=False),
    # Norms with two inputs, and a recurrent state.
    "qwen3_5_text": Family(
        {
            "head_dim": 16,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "layer_types": ["linear_attention", "full_attention"],
        },
        OWN,
        decodes=False,
    ),
    # A rotary function of another signature; outputs that are changed in place.
    "gemma3n_text": Family(
        {
            "head_dim": 16,
            "num_hidden_layers": 4,
            "intermediate_size": [128] * 4,
            "hidden_size_per_layer_input": 16,
            "vocab_size_per_layer_input": 128,
            "num_kv_shared_layers": 0,
            "laurel_rank": 8,
            "altup_num_inputs": 2,
            "activation_sparsity_pattern": [0.0] * 4,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        },
    ),
    "mamba": Family({"state_size": 8, "time_step_rank": 4}, OWN, left_out=("dt_proj", "out_proj"), decodes=False),
    # Padding on the left goes into its state.
    "rwkv": Family({"attention_hidden_size": 64, "context_length": 128}, OWN, ignores_padding=False, decodes=False),
}
RANDOM = torch.Generator().manual_seed(3)
TOKENS = [torch.randint(4, 128, (length,), generator=RANDOM).tolist() for length in (50, 7, 33)]
ROWS: list[dict[str, Any]] = [{"input_ids": ids, "labels": [-100, *ids[1:]]} for ids in TOKENS]
LABELS = 87
NEW_TOKENS = 8
GREEDY = SamplingConfig(do_sample=False, temperature=1.0, top_p=1.0, repetition_penalty=1.0, seed=0)


def build(name: str) -> Any:
    """A random model in evaluation mode, whose logits differ from token to token."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **{**SIZES, **FAMILIES[name].config}))
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    return model.eval()


def adapted(name: str) -> Any:
    model = build(name)
    torch.manual_seed(1)
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=find_targets(model, "all-linear")))
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model.eval()


@pytest.mark.parametrize("name", FAMILIES)
def test_padding_free_rows_longer_than_a_window_have_the_logits_of_single_rows(name: str) -> None:
    model = build(name)
    alone = torch.cat([label_logits(model, collate_padded([row]))[0] for row in ROWS])
    reason = enable_padding_free(model, longest_row=50)
    assert reason == FAMILIES[name].padded
    collate = collate_padded if reason else collate_padding_free
    torch.testing.assert_close(label_logits(model, collate(ROWS))[0], alone, rtol=1e-3, atol=1e-4)


def gradients(model: Any, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    next_token_loss(*label_logits(model, batch), LABELS).backward()  # type: ignore[no-untyped-call]
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_the_gradients_of_all_that_is_replaced_are_those_of_peft(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(name)
    left_out = {full.rpartition(".")[2] for full in unsuitable_layers(build(name))}
    assert left_out == set(FAMILIES[name].left_out)
    wanted = gradients(model, collate_padded(ROWS))
    reason = enable_padding_free(model, longest_row=50)
    recompute = Recompute()
    assert compile_as_on_gpu(model, monkeypatch, recompute.remember).left_out == []
    layers = LoraLayers(model, fp8=False, keep_dequantized=True, recompute=recompute)
    assert layers.skipped == list(FAMILIES[name].skipped)
    assert layers.skipped or 2 * len(layers.layers) == len(wanted)
    found = gradients(model, (collate_padded if reason else collate_padding_free)(ROWS))
    assert found.keys() == wanted.keys()
    scale = max(float(gradient.norm()) for gradient in wanted.values())
    for parameter, gradient in wanted.items():
        assert (found[parameter] - gradient).norm() <= 1e-3 * gradient.norm() + 1e-5 * scale, parameter


@pytest.mark.parametrize("name", FAMILIES)
def test_answers_are_those_of_transformers_generate(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = build(name)
    with torch.no_grad():
        wanted = {
            index: model.generate(
                input_ids=torch.tensor([ids]), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=2, pad_token_id=0
            )[0, len(ids) :].tolist()
            for index, ids in enumerate(TOKENS)
        }
    backend = TransformersBackend.__new__(TransformersBackend)  # without a folder
    settings = GenerationSettings(GREEDY, max_new_tokens=NEW_TOKENS, batch_size=3, dtype="float32", num_processes=1)
    backend.__dict__.update(
        model=model, settings=settings, stops=[2], can_pad=True, uses_decoder=False, _reported_sizes=set()
    )
    backend.config = model.generation_config = type(model.generation_config)(
        max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=2, pad_token_id=0
    )
    order = sorted(range(len(TOKENS)), key=lambda index: len(TOKENS[index]))
    rows = [{"id": str(index), "prompt_ids": TOKENS[index]} for index in order]
    found = {order[place]: answer.tokens for group in backend.generate(rows) for place, answer in group}
    assert found == wanted
    assert ("padding changes the model's answers" in capsys.readouterr().out) != FAMILIES[name].ignores_padding

    reason = can_decode(model, 50 + NEW_TOKENS)
    assert (reason == "") == FAMILIES[name].decodes, reason
    assert fuse_projections(model) == ""
    assert compile_as_on_gpu(model, monkeypatch).left_out == []
    if not reason:
        decoder = Decoder(
            model, GREEDY, stop_tokens=[2], slots=2, max_prompt_tokens=50, max_new_tokens=NEW_TOKENS, cuda_graph=False
        )
        prompts = [{"id": str(index), "prompt_ids": ids} for index, ids in enumerate(TOKENS)]
        assert dict(pair for group in decoder.decode(prompts, range(len(prompts))) for pair in group) == wanted


def test_padding_is_tried_in_the_models_own_dtype() -> None:
    backend = TransformersBackend.__new__(TransformersBackend)  # without a folder
    backend.__dict__.update(model=build("mistral").to(torch.bfloat16))
    assert backend._why_not_pad(50) == ""
