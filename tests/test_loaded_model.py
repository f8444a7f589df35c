"""A model in which tokens see later ones, or whose code cannot be trained, is refused in one sentence."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertLMHeadModel, LlamaConfig, LlamaForCausalLM

from stages.core.problem import Problem
from stages.model.adapter import find_targets
from stages.train.loaded_model import check_causal, check_generates
from stages.train.lora_layers import LoraLayers
from stages.train.recompute import Recompute

SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


@pytest.mark.parametrize("is_decoder", [True, False])
def test_an_encoder_is_refused(is_decoder: bool) -> None:
    torch.manual_seed(0)
    model = BertLMHeadModel(BertConfig(is_decoder=is_decoder, initializer_range=0.5, **SIZES)).eval()
    if is_decoder:
        check_causal(model)
        return
    with pytest.raises(Problem, match=r"^the base model is not causal: .* set is_decoder"):
        check_causal(model)


class FailsOnRows(LlamaForCausalLM):  # type: ignore[misc]
    """Does not compute rows."""

    def forward(self, *_: Any, **__: Any) -> Any:
        raise ValueError("rows must have 64 tokens")


def test_a_model_that_fails_on_a_short_row_is_refused() -> None:
    model = FailsOnRows(LlamaConfig(**SIZES)).eval()
    assert find_targets(model, ["q_proj"]), "what comes before does not fail"
    with pytest.raises(Problem, match=r"^the base model fails on a row of 5 tokens: ValueError: rows must have 64 tokens"):
        check_causal(model)


class Detached(LlamaForCausalLM):  # type: ignore[misc]
    """Cannot be trained: its logits have no gradient."""

    def forward(self, *arguments: Any, **named: Any) -> Any:
        output = super().forward(*arguments, **named)
        output.logits = output.logits.detach()
        return output


def test_a_model_without_gradients_is_refused() -> None:
    model = get_peft_model(Detached(LlamaConfig(**SIZES)), LoraConfig(target_modules=["q_proj"])).eval()
    with pytest.raises(Problem, match=r"^the base model cannot be trained: its own code fails: RuntimeError: element 0"):
        LoraLayers(model, fp8=False, keep_dequantized=True, recompute=Recompute())


class WithoutCache(LlamaForCausalLM):  # type: ignore[misc]
    """Of its config no cache can be made."""

    def _prepare_cache_for_generation(self, *_: Any, **__: Any) -> Any:
        raise AttributeError("no num_hidden_layers")


def test_a_model_that_cannot_generate_is_refused() -> None:
    check_generates(LlamaForCausalLM(LlamaConfig(**SIZES)).eval())
    model = WithoutCache(LlamaConfig(**SIZES)).eval()
    with pytest.raises(Problem, match=r"^Transformers cannot generate text with the base model: .*no num_hidden_layers"):
        check_generates(model)
