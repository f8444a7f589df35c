"""Experts of mixture-of-experts models: quantized, adapted and merged, each beside Transformers, PEFT and bitsandbytes."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

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


def build(kind: str) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES | FAMILIES[kind])).eval()


def base_of(workspace: Workspace, folder: Path, kind: str) -> Path:
    base = Path(shutil.copytree(workspace.root / INPUTS[2], folder / "base"))
    for file in base.glob("*.safetensors*"):
        file.unlink()
    build(kind).save_pretrained(base)
    return base


@pytest.mark.parametrize("kind", FAMILIES)
def test_train_merge_and_generate(workspace: Workspace, scratch: Path, kind: str) -> None:
    base = base_of(workspace, scratch, kind)
    out = run(workspace, scratch, base=base, **SHORT, quantization="nf4", target_parameters="all-experts")
    parity = merged(workspace, out, base, max_mean_kl=1e-6, min_top1_agreement=1.0, min_greedy_agreement=1.0)
    print(parity)
    assert all(row["answer_tokens"] for row in answered(workspace, out))
