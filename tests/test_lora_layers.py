"""The fast layers: the numbers of PEFT's, for every architecture, or PEFT's layers themselves."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from stages.model import compile as compile_module
from stages.model.collate import collate_padded, collate_padding_free
from stages.model.logits import label_logits
from stages.model.padding_free import enable_padding_free
from stages.train import four_bit
from stages.train import lora_layers as lora_layers_module
from stages.train.batches import split
from stages.train.gradient_checkpointing import checkpoint_blocks, decoder_blocks
from stages.train.lora_layers import LoraLayers
from stages.train.loss import head_is_last, label_loss, next_token_loss
from stages.train.recompute import Recompute
from tests.tiny import make_custom_model

SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
CONFIGS = {
    "llama": (LlamaForCausalLM, LlamaConfig),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config),  # biases
    "qwen3": (Qwen3ForCausalLM, Qwen3Config),  # norms within attention
    "phi3": (Phi3ForCausalLM, Phi3Config),  # fused projections
}
RANDOM = torch.Generator().manual_seed(3)
TOKENS = [torch.randint(4, 300, (length,), generator=RANDOM).tolist() for length in (30, 21, 9, 16)]
ROWS: list[dict[str, Any]] = [{"id": "", "input_ids": ids, "labels": [-100, *ids[1:]]} for ids in TOKENS]
LABELS = 72


def adapted(make: Callable[[], Any], dtype: torch.dtype = torch.float32, **given: Any) -> Any:
    torch.manual_seed(0)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | given
    model = get_peft_model(make().to(dtype), LoraConfig(**settings))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def lora_layers(model: Any, *, fp8: bool = False, recompute: Recompute | None = None) -> LoraLayers:
    return LoraLayers(model, fp8=fp8, keep_dequantized=True, recompute=recompute or Recompute())


def small(name: str) -> Callable[[], Any]:
    kind, config = CONFIGS[name]
    return lambda: kind(config(**SIZES))


def custom(folder: Path) -> Callable[[], Any]:
    make_custom_model(folder)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    return lambda: AutoModelForCausalLM.from_config(config, trust_remote_code=True)


def losses_and_gradients(model: Any, batch: dict[str, Any]) -> tuple[float, dict[str, torch.Tensor]]:
    model.train()
    model.zero_grad()
    loss = next_token_loss(*label_logits(model, batch), LABELS)
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_close(found: Any, wanted: Any, rtol: float) -> None:
    assert found[0] == pytest.approx(wanted[0], rel=rtol)
    assert found[1].keys() == wanted[1].keys()
    for name, gradient in wanted[1].items():
        assert (found[1][name] - gradient).norm() <= rtol * gradient.norm(), name


@pytest.mark.parametrize("name", [*CONFIGS, "custom"])
def test_losses_and_gradients_are_pefts_layer_by_layer(name: str, tmp_path: Path) -> None:
    model = adapted(custom(tmp_path / "model") if name == "custom" else small(name))
    batch = collate_padded(ROWS)
    wanted = losses_and_gradients(model, batch)
    layers = lora_layers(model)
    assert len(layers.layers) == len(wanted[1]) / 2 > 3
    assert not layers.skipped
    assert_close(losses_and_gradients(model, batch), wanted, 1e-5)
    layers.keep_dequantized(False)
    assert_close(losses_and_gradients(model, batch), wanted, 1e-5)
    checkpoint_blocks(model, len(decoder_blocks(model)) - 1)
    assert_close(losses_and_gradients(model, batch), wanted, 1e-5)


def test_two_hundred_steps_end_where_pefts_do() -> None:
    losses = []
    for fast in (False, True):
        model = adapted(small("llama"))
        layers = lora_layers(model) if fast else None
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
        curve = []
        for step in range(200):
            loss, _ = losses_and_gradients(model, collate_padded(ROWS[step % 2 :: 2]))
            optimizer.step()
            if layers:
                layers.invalidate()
            curve.append(loss)
        losses.append(curve)
    assert losses[0][-1] < losses[0][0] - 0.5, "it learns"
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)


def test_weights_that_are_kept_follow_the_adapter_only_when_told() -> None:
    model = adapted(small("llama"))
    layers = lora_layers(model)
    before, _ = losses_and_gradients(model, collate_padded(ROWS))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.mul_(-3)
    assert losses_and_gradients(model, collate_padded(ROWS))[0] == before
    layers.invalidate()
    assert losses_and_gradients(model, collate_padded(ROWS))[0] != before


def test_layers_that_read_the_same_are_computed_together(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(small("llama"))
    lora_layers(model)
    calls, real = [], lora_layers_module._Products.forward

    def counted(ctx: Any, x: torch.Tensor, members: Any, *rest: Any) -> Any:
        calls.append(len(members))
        return real(ctx, x, members, *rest)

    monkeypatch.setattr(lora_layers_module._Products, "forward", staticmethod(counted))
    losses_and_gradients(model, collate_padded(ROWS))
    assert calls == [3, 1, 2, 1] * 3, "query, key and value; output; gate and up; down"


@pytest.mark.parametrize(
    ("given", "reason"),
    [({"lora_dropout": 0.1}, "lora_dropout"), ({"use_dora": True}, "DoRA"), ({"lora_bias": True}, "lora_bias")],
)
def test_what_it_cannot_compute_stays_pefts_and_is_named(given: dict[str, Any], reason: str) -> None:
    model = adapted(small("llama"), **given)
    torch.manual_seed(1)
    wanted = losses_and_gradients(model, collate_padded(ROWS))
    layers = lora_layers(model)
    assert not layers.layers
    assert layers.skipped == [reason]
    torch.manual_seed(1)
    assert_close(losses_and_gradients(model, collate_padded(ROWS)), wanted, 0.0)


def test_sixteen_bit_weights_and_fp8_are_as_near_to_float32_as_their_rounding() -> None:
    exact = losses_and_gradients(adapted(small("llama")), collate_padded(ROWS))

    def off(model: Any) -> float:
        loss, gradients = losses_and_gradients(model, collate_padded(ROWS))
        assert loss == pytest.approx(exact[0], rel=2e-3)
        difference = sum(float((gradients[name].float() - g).norm() ** 2) for name, g in exact[1].items())
        return float((difference / sum(float(g.norm() ** 2) for g in exact[1].values())) ** 0.5)

    peft = off(adapted(small("llama"), torch.bfloat16))
    beside, in_fp8 = adapted(small("llama"), torch.bfloat16), adapted(small("llama"), torch.bfloat16)
    assert not any(frozen.summed for frozen in lora_layers(beside).frozen), "bfloat16 weights would swallow a small product"
    lora_layers(in_fp8, fp8=True)
    assert off(beside) < 1.5 * peft < 0.05
    assert 2 * peft < off(in_fp8) < 0.2


def test_fp8_is_for_training_alone_and_for_all_or_none_that_read_the_same() -> None:
    batch = collate_padded(ROWS)

    def validated(model: Any) -> float:
        with torch.no_grad():
            return next_token_loss(*label_logits(model, batch), LABELS).item()

    plain, in_fp8, odd = (adapted(small("llama"), torch.bfloat16) for _ in range(3))
    lora_layers(plain)
    kinds = {type(frozen).__name__ for frozen in lora_layers(in_fp8, fp8=True).frozen}
    assert kinds == {"_Fp8"}
    assert validated(in_fp8) == validated(plain), "validation measures the model that merge makes"
    assert losses_and_gradients(in_fp8, batch)[0] != validated(in_fp8)

    for layer in odd.get_base_model().model.layers:
        layer.self_attn.v_proj.base_layer.in_features = 60  # what the hardware does not take
    frozen = lora_layers(odd, fp8=True).frozen
    for layer in odd.get_base_model().model.layers:
        kinds = {type(f).__name__ for f in frozen if f.layer in (layer.self_attn.q_proj, layer.self_attn.v_proj)}
        assert kinds == {"_Beside"}
        assert {type(f).__name__ for f in frozen if f.layer is layer.mlp.down_proj} == {"_Fp8"}


def test_4_bit_weights_are_summed_in_float32_and_rounded_once() -> None:
    layer = bnb.nn.Linear4bit(128, 96, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    torch.manual_seed(0)
    layer.load_state_dict({"weight": 0.02 * torch.randn(96, 128)})
    layer.to("cpu")
    state = layer.weight.quant_state
    up, down = 1e-4 * torch.randn(96, 4), 1e-2 * torch.randn(4, 128)
    exact = bnb.functional.dequantize_4bit(layer.weight.data, state).float() + 2.0 * up @ down
    found = four_bit.unpack_sum(layer, up, down, 2.0, torch.empty(96, 128, dtype=torch.bfloat16))
    assert torch.equal(found, exact.bfloat16())
    without = four_bit.unpack_sum(layer, torch.zeros_like(up), down, 2.0, torch.empty(96, 128, dtype=torch.bfloat16))
    product = 2.0 * up @ down
    steps = exact[exact.abs() > 1e-3].abs() * 2**-8  # between neighbours in bfloat16
    assert product.std() < 0.2 * steps.median(), "far below the rounding"
    moved = ((found.float() - without.float()) * product).sum() / (product * product).sum()
    assert 0.6 < moved < 1.4, "and yet it is there on the average"


def test_fused_parts_give_the_same_numbers_and_keep_recipes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_module, "compiled", lambda function: function)
    for name in CONFIGS:
        model = adapted(small(name))
        assert enable_padding_free(model.eval()) == ""
        batch = collate_padding_free(ROWS)
        wanted = losses_and_gradients(model, batch)
        rotary = __import__("sys").modules[type(model.get_base_model()).__module__]
        original = rotary.apply_rotary_pos_emb
        recompute = Recompute()
        found = compile_module.compile_elementwise(_OnGpu(model), recompute.remember)
        assert found == (["norms", "rotary positions"] if name == "phi3" else ["activations", "norms", "rotary positions"])
        lora_layers(model, recompute=recompute)
        assert_close(losses_and_gradients(model, batch), wanted, 1e-5)
        checkpoint_blocks(model, 2)
        assert_close(losses_and_gradients(model, batch), wanted, 1e-5)
        recompute.clear()
        rotary.apply_rotary_pos_emb = original


class _OnGpu:
    """A model that says so."""

    def __init__(self, model: Any) -> None:
        self.device, self.modules = torch.device("cuda"), model.modules


def test_nothing_is_compiled_on_the_cpu() -> None:
    assert compile_module.compile_elementwise(small("llama")()) == []


# The loss in parts


@pytest.mark.parametrize("logits", [1, 300 * 7, 1 << 28])
def test_a_loss_in_parts_is_the_whole_one(monkeypatch: pytest.MonkeyPatch, logits: int) -> None:
    import stages.train.loss as module

    monkeypatch.setattr(module, "LOGITS", logits)
    model = adapted(small("llama"))
    assert enable_padding_free(model.eval()) == ""
    batch = collate_padding_free(ROWS)
    wanted = losses_and_gradients(model, batch)
    model.zero_grad()
    loss = label_loss(model, batch, model.get_output_embeddings(), next_token_loss, LABELS)
    (3 * loss).backward()  # type: ignore[no-untyped-call]
    gradients = {name: p.grad / 3 for name, p in model.named_parameters() if p.grad is not None}
    assert_close((loss.item(), gradients), wanted, 1e-5)


def test_a_head_that_is_not_the_last_or_not_frozen_is_seen() -> None:
    plain = small("llama")().requires_grad_(False)
    assert head_is_last(plain, plain.get_output_embeddings())
    with_adapter = adapted(small("llama"), target_modules=["lm_head"])
    assert not head_is_last(with_adapter, with_adapter.get_output_embeddings())

    class Capped(LlamaForCausalLM):  # type: ignore[misc]
        def forward(self, *given: Any, **named: Any) -> Any:
            out = super().forward(*given, **named)
            out.logits = 5 * torch.tanh(out.logits / 5)
            return out

    capped = Capped(LlamaConfig(**SIZES)).requires_grad_(False)
    assert not head_is_last(capped, capped.get_output_embeddings())


# Micro-batches


def test_a_step_is_cut_into_parts_of_like_size_that_hold_every_row_once() -> None:
    random = torch.Generator().manual_seed(0)
    for _ in range(200):
        lengths = torch.randint(1, 400, (int(torch.randint(1, 40, (1,), generator=random)),), generator=random).tolist()
        for padded in (False, True):
            cuts = split(lengths, 4, 600, padded=padded)
            parts = [lengths[cut] for cut in cuts]
            assert [length for part in parts for length in part] == lengths
            sizes = [max(part) * len(part) if padded else sum(part) for part in parts]
            assert all(size <= 600 or len(part) == 1 for size, part in zip(sizes, parts, strict=True))
    assert split([100] * 10, 4, 600) == [slice(0, 5), slice(5, 10)], "two alike, and not six and four"
    assert split([100] * 10, 4) == [slice(0, 4), slice(4, 8), slice(8, 12)]
