"""The fast LoRA layers compute what PEFT's do, for every architecture; the loss in chunks; micro-batches."""
# ruff: noqa: N803, N806 (lora_A and lora_B are PEFT's names)

import weakref
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

from stages.core.problem import Problem
from stages.model import compile as compile_module
from stages.model import four_bit
from stages.model.collate import collate_padded, collate_padding_free
from stages.model.logits import label_logits
from stages.model.padding_free import enable_padding_free
from stages.train import lora_layers as lora_layers_module
from stages.train import loss as loss_module
from stages.train.batches import split
from stages.train.gradient_checkpointing import checkpoint_blocks, decoder_blocks
from stages.train.lora_layers import LoraLayers
from stages.train.loss import head_is_last, label_loss, load_loss, next_token_loss
from stages.train.recompute import Recompute
from tests.tiny import compile_as_on_gpu, make_custom_model

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


def small(name: str, **sizes: int) -> Callable[[], Any]:
    kind, config = CONFIGS[name]
    return lambda: kind(config(**SIZES | sizes))


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


def validation_loss(model: Any, batch: dict[str, Any]) -> float:
    with torch.no_grad():
        return next_token_loss(*label_logits(model, batch), LABELS).item()


def assert_close(found: Any, wanted: Any, rtol: float) -> None:
    assert found[0] == pytest.approx(wanted[0], rel=rtol)
    assert found[1].keys() == wanted[1].keys()
    for name, gradient in wanted[1].items():
        assert (found[1][name] - gradient).norm() <= rtol * gradient.norm(), name


def in_4_bits(make: Callable[[], Any]) -> Callable[[], Any]:
    """A model whose linear layers, except the output head, are quantized to 4 bits."""

    def quantize(layer: torch.nn.Linear) -> Any:
        new = bnb.nn.Linear4bit(layer.in_features, layer.out_features, bias=False, quant_type="nf4")
        new.load_state_dict({"weight": layer.weight.data})
        new.support_avx512bf16_for_cpu = False  # as `load_quantized`
        return new.to("cpu")

    def quantized() -> Any:
        model = make()
        for block in model.model.layers:
            for parent in (block.self_attn, block.mlp):
                for name, layer in list(parent.named_children()):
                    if isinstance(layer, torch.nn.Linear):
                        setattr(parent, name, quantize(layer))
        return model

    return quantized


@pytest.mark.parametrize("name", [*CONFIGS, "custom"])
def test_losses_and_gradients_equal_those_of_peft(name: str, tmp_path: Path) -> None:
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


def test_200_steps_give_the_loss_curve_of_peft() -> None:
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
    assert losses[0][-1] < losses[0][0] - 0.5, "the loss decreases"
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)


def test_kept_weights_are_computed_again_only_after_invalidate() -> None:
    model = adapted(small("llama"))
    layers = lora_layers(model)
    before, _ = losses_and_gradients(model, collate_padded(ROWS))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.mul_(-3)
    assert losses_and_gradients(model, collate_padded(ROWS))[0] == before
    layers.invalidate()
    assert losses_and_gradients(model, collate_padded(ROWS))[0] != before


def test_layers_that_share_an_input_are_computed_together(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(small("llama"))
    lora_layers(model)
    calls, real = [], lora_layers_module._LoraProducts.forward

    def counted(ctx: Any, x: torch.Tensor, layers: Any, *rest: Any) -> Any:
        calls.append(len(layers))
        return real(ctx, x, layers, *rest)

    monkeypatch.setattr(lora_layers_module._LoraProducts, "forward", staticmethod(counted))
    losses_and_gradients(model, collate_padded(ROWS))
    assert calls == [3, 1, 2, 1] * 3, "query, key and value; output; gate and up; down"


@pytest.mark.parametrize(
    ("given", "reason"),
    [({"lora_dropout": 0.1}, "lora_dropout"), ({"use_dora": True}, "DoRA"), ({"lora_bias": True}, "lora_bias")],
)
def test_unsupported_layers_keep_pefts_forward_and_the_reason_is_reported(given: dict[str, Any], reason: str) -> None:
    model = adapted(small("llama"), **given)
    torch.manual_seed(1)
    wanted = losses_and_gradients(model, collate_padded(ROWS))
    layers = lora_layers(model)
    assert not layers.layers
    assert layers.skipped == [reason]
    torch.manual_seed(1)
    assert_close(losses_and_gradients(model, collate_padded(ROWS)), wanted, 0.0)


def test_errors_of_bfloat16_and_fp8_are_those_of_their_rounding() -> None:
    exact = losses_and_gradients(adapted(small("llama")), collate_padded(ROWS))

    def error(model: Any) -> float:
        loss, gradients = losses_and_gradients(model, collate_padded(ROWS))
        assert loss == pytest.approx(exact[0], rel=2e-3)
        difference = sum(float((gradients[name].float() - g).norm() ** 2) for name, g in exact[1].items())
        return float((difference / sum(float(g.norm() ** 2) for g in exact[1].values())) ** 0.5)

    peft = error(adapted(small("llama"), torch.bfloat16))
    bfloat16, in_fp8 = adapted(small("llama"), torch.bfloat16), adapted(small("llama"), torch.bfloat16)
    assert not any(layer.includes_lora for layer in lora_layers(bfloat16).layers.values()), "rounding would lose its delta"
    lora_layers(in_fp8, fp8=True)
    assert error(bfloat16) < 1.5 * peft < 0.05
    assert 2 * peft < error(in_fp8) < 0.2


def test_fp8_is_only_used_in_training_and_by_all_layers_that_share_an_input_or_none() -> None:
    batch = collate_padded(ROWS)

    def classes(layers: LoraLayers, *projections: str) -> set[str]:
        return {type(layer).__name__ for name, layer in layers.layers.items() if name.endswith(projections)}

    plain, in_fp8, odd = (adapted(small("llama"), torch.bfloat16) for _ in range(3))
    lora_layers(plain)
    all_in_fp8 = lora_layers(in_fp8, fp8=True)
    assert classes(all_in_fp8, "_proj") == {"_Fp8Weight"}
    assert all_in_fp8.without_fp8 == []
    assert validation_loss(in_fp8, batch) == validation_loss(plain, batch), "validation measures the model that merge writes"
    assert losses_and_gradients(in_fp8, batch)[0] != validation_loss(in_fp8, batch)

    for block in odd.get_base_model().model.layers:
        block.self_attn.v_proj.base_layer.in_features = 60  # not a multiple of 16
    layers = lora_layers(odd, fp8=True)
    assert classes(layers, "q_proj", "v_proj") == {"_SeparateProduct"}
    assert classes(layers, "down_proj") == {"_Fp8Weight"}
    names = ("k_proj", "q_proj", "v_proj")
    assert layers.without_fp8 == [f"model.layers.{number}.self_attn.{name}" for number in range(3) for name in names]


def test_4_bit_weights_are_summed_in_float32_and_rounded_once() -> None:
    layer = bnb.nn.Linear4bit(128, 96, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    torch.manual_seed(0)
    layer.load_state_dict({"weight": 0.02 * torch.randn(96, 128)})
    layer.to("cpu")
    lora_B, lora_A = 1e-4 * torch.randn(96, 4), 1e-2 * torch.randn(4, 128)
    delta = 2.0 * lora_B @ lora_A
    exact = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float() + delta

    def rounded_sum(lora_B: torch.Tensor) -> torch.Tensor:
        out = torch.empty(96, 128, dtype=torch.bfloat16)
        return four_bit.dequantize_and_add_lora(layer, out, lora_A=lora_A, lora_B=lora_B, scaling=2.0)

    found, without = rounded_sum(lora_B), rounded_sum(torch.zeros_like(lora_B))
    assert torch.equal(found, exact.bfloat16())
    spacing = exact[exact.abs() > 1e-3].abs() * 2**-8  # between neighbours in bfloat16
    assert delta.std() < 0.2 * spacing.median(), "most of the delta weight is below the rounding"
    moved = ((found.float() - without.float()) * delta).sum() / (delta * delta).sum()
    assert 0.6 < moved < 1.4, "on average it is not lost"


def test_layers_summed_in_float32_are_named_as_in_the_base_model() -> None:
    layers = lora_layers(adapted(in_4_bits(small("llama")), target_modules=["up_proj", "q_proj"]))
    names = [f"model.layers.{number}.{name}" for number in range(3) for name in ("mlp.up_proj", "self_attn.q_proj")]
    assert layers.summed_in_float32 == names
    assert layers.dequantized_bytes == 4 * 3 * (64 * 64 + 128 * 64)
    assert lora_layers(adapted(small("llama"))).summed_in_float32 == []
    assert lora_layers(adapted(small("llama"), torch.bfloat16)).summed_in_float32 == []


# Compiled elementwise parts, and activations that are recomputed


def test_elementwise_parts_and_recomputed_activations_change_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in CONFIGS:
        model = adapted(small(name))
        assert enable_padding_free(model.eval()) == ""
        batch = collate_padding_free(ROWS)
        wanted = losses_and_gradients(model, batch)
        recompute = CountingRecompute()
        done = compile_as_on_gpu(model, monkeypatch, recompute.remember)
        parts = ["norms", "rotary positions"] if name == "phi3" else ["activations", "norms", "rotary positions"]
        assert done == (parts, [])
        lora_layers(model, recompute=recompute)
        recompute.computed = 0  # without those of the trial
        assert_close(losses_and_gradients(model, batch), wanted, 1e-5)
        # The inputs of q, k, v and of gate and up are norms; the input of down is a gated activation.
        recomputed = 3 * (2 if name == "phi3" else 3)
        assert recompute.computed == recomputed
        assert_close(losses_and_gradients(model, batch), wanted, 1e-5)
        assert recompute.computed == 2 * recomputed
        checkpoint_blocks(model, 2)
        assert_close(losses_and_gradients(model, batch), wanted, 1e-5)
        assert recompute.computed == 3 * recomputed
        recompute.clear()


class CountingRecompute(Recompute):
    """Counts the tensors that are recomputed."""

    def __init__(self) -> None:
        super().__init__()
        self.computed = 0

    def remember(self, result: torch.Tensor, function: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        def counted(*values: torch.Tensor) -> Any:
            self.computed += 1
            return function(*values)

        super().remember(result, counted, inputs)


def test_what_the_compiler_gets_wrong_is_left_out_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(small("qwen3"))
    wanted = losses_and_gradients(model, collate_padded(ROWS))

    def compiled(function: Any) -> Any:
        def call(*given: Any, **named: Any) -> Any:
            if function is compile_module._activate:
                raise RuntimeError("no kernel\nfor this")
            return 1.1 * function(*given, **named) if function.__name__ == "forward" else function(*given, **named)

        return call

    parts, left_out = compile_as_on_gpu(model, monkeypatch, compiled=compiled)
    assert parts == ["rotary positions"]
    assert left_out == [
        "Qwen3RMSNorm is not compiled: its output differs",
        "Qwen3MLP is not compiled: RuntimeError: no kernel",
    ]
    assert_close(losses_and_gradients(model, collate_padded(ROWS)), wanted, 1e-5)


def test_layers_that_compute_something_else_than_pefts_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    real, wanted = lora_layers_module._forward, losses_and_gradients(adapted(small("llama")), collate_padded(ROWS))
    changes: list[tuple[Any, str]] = [
        (lambda outs: [2 * out for out in outs], "its logits differ"),
        (lambda outs: [out.detach() + 0 * out for out in outs], "its gradients differ"),
        (lambda outs: [out.view(-1) for out in outs], "RuntimeError: The size of tensor"),
    ]
    for change, reason in changes:
        monkeypatch.setattr(lora_layers_module, "_forward", lambda *given, change=change: change(real(*given)))
        model = adapted(small("llama"))
        layers = lora_layers(model)
        assert layers.layers == {}
        assert len(layers.skipped) == 1
        assert layers.skipped[0].startswith(f"all of this model, because {reason}")
        assert_close(losses_and_gradients(model, collate_padded(ROWS)), wanted, 1e-5)


def test_nothing_is_compiled_on_the_cpu() -> None:
    assert compile_module.compile_elementwise(small("llama")()) == ([], [])


def test_a_recipe_lives_as_long_as_its_tensor() -> None:
    recompute = Recompute()
    x = torch.ones(3)
    result = x * 2
    recompute.remember(result, torch.add, (x, x))
    recipe = recompute.recipe_of(result)
    assert recipe is not None
    assert recipe.inputs == (x, x)
    assert recompute.recipe_of(x * 2) is None, "an equal tensor is another tensor"
    del recipe
    inputs = weakref.ref(x)
    del x
    assert inputs() is not None
    del result
    assert inputs() is None, "neither the recipe nor its inputs are kept"


def test_the_last_recomputed_tensor_is_kept_until_clear() -> None:
    recompute = CountingRecompute()
    x = torch.ones(3)
    results = [x * 2, x * 2]
    for result in results:
        recompute.remember(result, torch.add, (x, x))
    first, second = (recompute.recipe_of(result) for result in results)
    assert first is not None
    assert second is not None
    assert recompute.recall(first) is recompute.recall(first)
    assert recompute.computed == 1
    assert torch.equal(recompute.recall(second), results[1]), "another recipe, with the same inputs"
    assert recompute.computed == 2
    recompute.clear()
    recompute.recall(second)
    assert recompute.computed == 3


# The loss in chunks


@pytest.mark.parametrize("max_logits", [1, 300 * 7, 1 << 28])
def test_the_loss_in_chunks_is_that_of_all_labels(monkeypatch: pytest.MonkeyPatch, max_logits: int) -> None:
    monkeypatch.setattr(loss_module, "MAX_LOGITS", max_logits)
    model = adapted(small("llama"))
    assert enable_padding_free(model.eval()) == ""
    batch = collate_padding_free(ROWS)
    wanted = losses_and_gradients(model, batch)
    model.zero_grad()
    loss = label_loss(model, batch, head=model.get_output_embeddings(), loss=next_token_loss, num_items=LABELS)
    (3 * loss).backward()  # type: ignore[no-untyped-call]
    gradients = {name: p.grad / 3 for name, p in model.named_parameters() if p.grad is not None}
    assert_close((loss.item(), gradients), wanted, 1e-5)


def test_a_head_that_is_trained_or_not_the_last_operation_is_detected() -> None:
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


OWN_LOSS = "def loss(logits, labels, num_items):\n    return logits.sum() / num_items\n"
UNSET: dict[str, Any] = {"label_weights": {}, "label_smoothing_factor": 0.0}


def test_a_loss_file_may_have_any_name(tmp_path: Path) -> None:
    file = tmp_path / 'mein "neuer" 损失 \'s folder' / "focal loss 'v2'.py"
    file.parent.mkdir()
    file.write_text(OWN_LOSS)
    loss = load_loss(file, 400, **UNSET)
    assert loss(torch.ones(2, 3), torch.zeros(2), 3).item() == 2
    file.write_text("loss = 3")
    with pytest.raises(Problem, match=r"损失 's folder/focal loss 'v2'\.py: has no function `loss`"):
        load_loss(file, 400, **UNSET)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import sys; sys.exit(2)", "cannot be imported: SystemExit: 2"),
        ("open('missing.json')", "cannot be imported: FileNotFoundError: .*missing.json"),
        ("loss = type", "`loss` must be a Python function"),
    ],
)
def test_a_loss_file_that_fails_is_one_message(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "own.py").write_text(text)
    with pytest.raises(Problem, match=rf"^params\.yaml: train\.loss: .*own\.py: {message}"):
        load_loss(tmp_path / "own.py", 400, **UNSET)


def test_a_loss_must_be_an_existing_python_file(tmp_path: Path) -> None:
    (tmp_path / "loss.txt").write_text(OWN_LOSS)
    for path, message in ((tmp_path / "loss.txt", "must end in .py"), (tmp_path, "not found"), (Path("\0.py"), "not found")):
        with pytest.raises(Problem, match=message):
            load_loss(path, 400, **UNSET)


def test_all_problems_of_a_loss_are_reported_together(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN_LOSS)
    with pytest.raises(Problem) as caught:
        load_loss(tmp_path / "own.py", 400, label_weights={400: 2.0}, label_smoothing_factor=0.1)
    assert len(caught.value.messages) == 3


# Micro-batches


def test_a_step_is_split_into_parts_of_similar_size_with_every_row_once() -> None:
    random = torch.Generator().manual_seed(0)
    for _ in range(200):
        lengths = torch.randint(1, 400, (int(torch.randint(1, 40, (1,), generator=random)),), generator=random).tolist()
        for padded in (False, True):
            cuts = split(lengths, 4, 600, padded=padded)
            parts = [lengths[cut] for cut in cuts]
            assert [length for part in parts for length in part] == lengths
            sizes = [max(part) * len(part) if padded else sum(part) for part in parts]
            assert all(size <= 600 or len(part) == 1 for size, part in zip(sizes, parts, strict=True))
    assert split([100] * 10, 4, 600) == [slice(0, 5), slice(5, 10)], "two equal parts, not 6 and 4 rows"
    assert split([100] * 10, 4) == [slice(0, 4), slice(4, 8), slice(8, 12)]
