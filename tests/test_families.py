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
from stages.generate.transformers_backend import OWN_CACHE, TransformersBackend
from stages.generate.trials import cache_is_exact, try_batches
from stages.model.adapter import find_targets, unsuitable_layers
from stages.model.collate import collate_padded, collate_padding_free
from stages.model.logits import label_logits
from stages.model.padding_free import OWN_CODE, enable_padding_free
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
ONE_LENGTH = "only prompts of one length are in a batch, which is slower: padding changes the model's answers"
ONE_PROMPT = "one prompt is answered at a time, which is slower: a batch changes the model's answers"


class Family(NamedTuple):
    """What is expected of an architecture."""

    config: dict[str, Any]
    padded: str = ""
    """Why its rows are padded; "" if they are padding-free."""
    left_out: tuple[str, ...] = ()
    """The layers that get no adapter."""
    skipped: tuple[str, ...] = ()
    """Why layers keep PEFT's implementation."""
    batches: str = ""
    """What is said of prompts that cannot be in one batch."""
    exact: bool = True
    """Whether Transformers' generate gives the logits of whole rows."""
    decodes: bool = True


LOCAL = ["sliding_attention", "full_attention"]
DELTA_NET = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
}
STATE_SPACE = {
    "mamba_d_state": 16,
    "mamba_expand": 2,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 16,
}
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
    "qwen2_moe": Family(
        {
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "layer_types": LOCAL,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 64,
        },
        DIFFER,
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
    "falcon": Family({"multi_query": True, "bias": False, "new_decoder_architecture": False}, OWN_CODE, decodes=False),
    # Norms with two inputs, and a recurrent state.
    "qwen3_5_text": Family({"head_dim": 16, **DELTA_NET}, decodes=False),
    "olmo_hybrid": Family(
        {**DELTA_NET, "linear_num_value_heads": 2, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
        decodes=False,
    ),
    # A delta rule with a gate for each channel.
    "kimi_linear": Family(
        {
            "layer_types": ["linear_attention", "full_attention"],
            "num_key_value_heads": 4,
            "num_experts": 4,
            "num_experts_per_token": 2,
            "moe_intermediate_size": 32,
            "kv_lora_rank": 16,
            "q_lora_rank": None,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 8,
            "v_head_dim": 16,
            "head_dim": 16,
        },
        decodes=False,
    ),
    # State spaces, beside attention or in turns with it.
    "falcon_h1": Family(
        {"head_dim": 16, **STATE_SPACE, "mamba_d_ssm": 64, "mamba_expand": 1, "mamba_n_heads": 4},
        left_out=("out_proj",),
        decodes=False,
    ),
    "granitemoehybrid": Family(
        {**STATE_SPACE, "layer_types": ["mamba", "attention"], "num_local_experts": 4, "num_experts_per_tok": 2},
        decodes=False,
    ),
    # Short convolutions.
    "lfm2": Family({"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}, decodes=False),
    # Padding changes its answers, though not their first tokens.
    "minimax": Family(
        {"layer_types": ["linear_attention", "full_attention"], "num_local_experts": 4, "head_dim": 16, "block_size": 16},
        DIFFER,
        batches=ONE_LENGTH,
        decodes=False,
    ),
    # Its window is in the cache alone.
    "moshi": Family({"head_dim": 16, "ffn_dim": 128, "sliding_window": WINDOW}, exact=False),
    # Keeps a state in its layers.
    "recurrent_gemma": Family(
        {"lru_width": 64, "attention_window_size": WINDOW, "head_dim": 16, "block_types": ["recurrent", "attention"]},
        DIFFER,
        batches=ONE_LENGTH,
        decodes=False,
    ),
    # A norm of queries and keys with two results.
    "zaya": Family(
        {"num_experts": 4, "num_experts_per_tok": 1, "moe_intermediate_size": 32, "head_dim": 16}, DIFFER, decodes=False
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
    "mamba": Family({"state_size": 8, "time_step_rank": 4}, OWN_CODE, left_out=("dt_proj", "out_proj"), decodes=False),
    # Padding on the left goes into its state, and in a batch each new token is mixed with the tokens of all rows.
    "rwkv": Family({"attention_hidden_size": 64, "context_length": 128}, OWN_CODE, batches=ONE_PROMPT, decodes=False),
}
RANDOM = torch.Generator().manual_seed(3)
TOKENS = [torch.randint(4, 128, (length,), generator=RANDOM).tolist() for length in (50, 7, 33)]
ROWS: list[dict[str, Any]] = [{"input_ids": ids, "labels": [-100, *ids[1:]]} for ids in TOKENS]
LABELS = 87
# A single token, and two prompts of one length.
PROMPTS = [[9], *TOKENS, torch.randint(4, 128, (33,), generator=RANDOM).tolist()]
NEW_TOKENS = 8
GREEDY = SamplingConfig(do_sample=False, temperature=1.0, top_p=1.0, repetition_penalty=1.0, seed=0)


def build(name: str) -> Any:
    """A random model in evaluation mode, whose logits differ from token to token."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **{**SIZES, **FAMILIES[name].config}))
    for parameter_name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        elif "bias" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.1)
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
            for index, ids in enumerate(PROMPTS)
        }
    backend = TransformersBackend.__new__(TransformersBackend)  # without a folder
    settings = GenerationSettings(GREEDY, max_new_tokens=NEW_TOKENS, batch_size=3, dtype="float32", num_processes=1)
    backend.__dict__.update(
        model=model, settings=settings, stops=[2], can_pad=True, uses_decoder=False, _reported_sizes=set()
    )
    backend.config = model.generation_config = type(model.generation_config)(
        max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=2, pad_token_id=0
    )
    order = sorted(range(len(PROMPTS)), key=lambda index: len(PROMPTS[index]))
    rows = [{"id": str(index), "prompt_ids": PROMPTS[index]} for index in order]
    found = {order[place]: answer.tokens for group in backend.generate(rows) for place, answer in group}
    assert found == wanted
    said = [] if FAMILIES[name].exact else [f"generate: {OWN_CACHE}; the answers are those of generate"]
    assert capsys.readouterr().out.splitlines() == [
        *said,
        *(f"generate: {line}" for line in [FAMILIES[name].batches] if line),
    ]
    assert cache_is_exact(model, 50) == FAMILIES[name].exact

    reason = can_decode(model, 50 + NEW_TOKENS)
    assert (reason == "") == FAMILIES[name].decodes, reason
    assert fuse_projections(model) == ""
    assert compile_as_on_gpu(model, monkeypatch).left_out == []
    if not reason and FAMILIES[name].exact:
        decoder = Decoder(
            model, GREEDY, stop_tokens=[2], slots=2, max_prompt_tokens=50, max_new_tokens=NEW_TOKENS, cuda_graph=False
        )
        prompts = [{"id": str(index), "prompt_ids": ids} for index, ids in enumerate(PROMPTS)]
        assert dict(pair for group in decoder.decode(prompts, range(len(prompts))) for pair in group) == wanted


def test_padding_is_tried_in_the_models_own_dtype() -> None:
    assert try_batches(build("mistral").to(torch.bfloat16), 50).padded
