"""Compiled functions against the same functions without compilation: parts of models, the loss, sampling."""

import sys
from typing import Any

import pytest
import torch

from stages.generate.sampling import SamplingConfig, draw, gumbel_noise, row_seed
from stages.model import compile as compile_module
from stages.model.collate import collate_padding_free
from stages.model.padding_free import enable_padding_free
from stages.train.gradient_checkpointing import checkpoint_blocks
from stages.train.loss import _sum, next_token_loss
from tests.gpu.close import assert_within
from tests.test_lora_layers import ROWS, CountingRecompute, adapted, assert_close, lora_layers, losses_and_gradients, small


def on(device: torch.device, batch: dict[str, Any]) -> dict[str, Any]:
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


@pytest.mark.parametrize("name", ["qwen3", "phi3"])
def test_compiled_parts_and_recomputed_activations_change_no_result(
    device: torch.device, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(small(name)).to(device)
    module = sys.modules[type(model.get_base_model()).__module__]
    rotate = module.apply_rotary_pos_emb  # perhaps already compiled, by another test; restored after this one
    monkeypatch.setattr(module, "apply_rotary_pos_emb", getattr(rotate, "original", rotate))
    assert enable_padding_free(model.eval()) == ""
    # The second batch has another size, for which the functions are compiled with dynamic shapes.
    batches = [on(device, collate_padding_free(rows, 64)) for rows in (ROWS, ROWS * 5)]
    wanted = [losses_and_gradients(model, batch) for batch in batches]
    recompute = CountingRecompute()
    done = compile_module.compile_elementwise(model, recompute.remember)
    if device.type == "cuda":
        parts = ["norms", "rotary positions"] if name == "phi3" else ["activations", "norms", "rotary positions"]
        assert done == (parts, [])
    lora_layers(model, recompute=recompute)
    # Compiled code is float32 too, but sums in another order and fuses multiplication with addition: 2^-24 in each step.
    for batch, expected in zip(batches, wanted, strict=True):
        assert_close(losses_and_gradients(model, batch), expected, 1e-4)
        recompute.clear()
    assert (recompute.computed > 0) == (device.type == "cuda")
    checkpoint_blocks(model, 2)
    assert_close(losses_and_gradients(model, batches[0]), wanted[0], 1e-4)


@pytest.mark.parametrize("given", [{}, {"label_weights": True, "label_smoothing_factor": 0.1}])
def test_the_compiled_loss_and_its_gradient(device: torch.device, given: dict[str, Any]) -> None:
    torch.manual_seed(0)
    given = dict(given)
    weights = torch.rand(1000, device=device) if given.pop("label_weights", False) else None
    for labels, dtype in ((1, torch.bfloat16), (37, torch.bfloat16), (300, torch.float32)):
        logits: Any = (4 * torch.randn(labels, 1000, device=device)).to(dtype).requires_grad_()
        exact: Any = logits.detach().double().requires_grad_()
        targets = torch.randint(1000, (labels,), device=device)
        found: Any = next_token_loss(logits, targets, 7, weights, **given)
        smoothing = given.get("label_smoothing_factor", 0.0)
        wanted: Any = torch.nn.functional.cross_entropy(
            exact,
            targets,
            weight=None if weights is None else weights.double(),
            label_smoothing=smoothing,
            reduction="sum",
        )
        found.backward()
        (wanted / 7).backward()
        assert found.item() == pytest.approx(wanted.item() / 7, rel=1e-5), "float32 sums of 1,000 terms"
        # Computed in float32, then rounded to the dtype of the logits.
        bound = (2**-8 if dtype == torch.bfloat16 else 0) * exact.grad.abs() + 1e-6
        assert_within(logits.grad, exact.grad, bound, what=f"gradient of {labels} labels in {dtype}")
        plain = _sum(logits.detach(), targets, weights, smoothing) / 7
        assert found.item() == pytest.approx(plain.item(), rel=1e-5)


# Sampling


def test_noise_is_the_same_as_on_the_cpu(device: torch.device) -> None:
    seeds, steps = torch.tensor([row_seed(0, "x"), row_seed(1, "y"), 2**63 - 1]), torch.tensor([0, 5, 1 << 20])
    for vocabulary in (400, 152_000):
        found = gumbel_noise(seeds.to(device), steps.to(device), vocabulary=vocabulary)
        wanted = gumbel_noise(seeds, steps, vocabulary=vocabulary)
        # Logarithms in float64 may differ in their last bit, and then, rarely, the float32 that they are rounded to.
        assert_within(found, wanted, 2**-22 * wanted.abs() + 1e-9, what=f"noise for {vocabulary} tokens")
        assert (found.cpu() != wanted).float().mean() < 1e-4


@pytest.mark.parametrize("top_p", [1.0, 0.85, 0.3])
def test_tokens_are_drawn_as_on_the_cpu(device: torch.device, top_p: float) -> None:
    torch.manual_seed(0)
    sampling = SamplingConfig(do_sample=True, temperature=0.7, top_p=top_p, repetition_penalty=1.0, seed=0)
    scores = 2 * torch.randn(512, 1000)
    noise = gumbel_noise(torch.arange(512) * 7919, torch.arange(512), vocabulary=1000)
    wanted = draw(scores, noise, sampling=sampling)
    found = draw(scores.to(device), noise.to(device), sampling=sampling).cpu()
    # The probabilities differ in their last bits. So one token in a thousand rows may be in the nucleus on one side only.
    assert (found != wanted).sum() <= 1, f"{int((found != wanted).sum())} of 512 tokens differ"
    assert len(set(wanted.tolist())) > 100


def test_frequencies_of_drawn_tokens_are_their_probabilities(device: torch.device) -> None:
    count = 20_000
    scores = torch.tensor([[1.0, 2.0, -1.0, 0.0]], device=device).expand(count, 4)
    sampling = SamplingConfig(do_sample=True, temperature=0.7, top_p=1.0, repetition_penalty=1.0, seed=0)
    seeds = torch.full((count,), row_seed(0, "x"), device=device)
    noise = gumbel_noise(seeds, torch.arange(count, device=device), vocabulary=4)
    frequencies = torch.bincount(draw(scores, noise, sampling=sampling), minlength=4).cpu() / count
    # Four standard deviations of a frequency near 1/2 in 20,000 draws.
    assert_within(frequencies, (scores[0] / 0.7).softmax(-1), 0.015, what="frequencies")
