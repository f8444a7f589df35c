"""merge, the comparison: its figures are those of logits held whole, in little memory; and their standard errors."""

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptEncoderConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from stages.core.problem import Problem
from stages.merge import memory
from stages.merge.figures import TokenFigures, quantization_cost, summarize
from stages.merge.hidden_states import HiddenStates
from stages.merge.lora_weights import LoraPair
from stages.merge.parity import AnswerFigures, TrainedOutputs, compare, compare_answers, label_losses
from stages.model.collate import collate_padded
from stages.model.logits import label_logits

VOCABULARY = 300
LENGTHS = (30, 21, 9)
RANDOM = torch.Generator().manual_seed(3)
ROWS: list[dict[str, Any]] = [
    {"input_ids": ids, "labels": [-100] * 4 + ids[4:]}
    for ids in (torch.randint(4, VOCABULARY, (length,), generator=RANDOM).tolist() for length in LENGTHS)
]
LABELS = sum(LENGTHS) - 4 * len(LENGTHS)


class Capped(LlamaForCausalLM):  # type: ignore[misc]
    """Changes its logits after the output head, as Gemma does."""

    def forward(self, *given: Any, **named: Any) -> Any:
        out = super().forward(*given, **named)
        out.logits = 2 * torch.tanh(out.logits / 2)
        return out


def llama(kind: type[LlamaForCausalLM] = LlamaForCausalLM) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        initializer_range=0.3,
    )
    return kind(config).eval()


def with_lora(model: Any, **given: Any) -> Any:
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | given
    adapted = get_peft_model(model, LoraConfig(**settings))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return adapted.eval()


def with_virtual_tokens(config: type[Any], seed: int = 1) -> Any:
    model = llama()
    torch.manual_seed(seed)
    return get_peft_model(model, config(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=32)).eval()


PAIRS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "lora": lambda: (with_lora(llama()), with_lora(llama()).merge_and_unload()),
    "lora on the head": lambda: (with_lora(llama(), target_modules=["lm_head", "q_proj"]), llama()),
    "capped logits": lambda: (with_lora(llama(Capped)), llama(Capped)),
    "capped, lora on the head": lambda: (with_lora(llama(Capped), target_modules=["lm_head"]), llama(Capped)),
    "bfloat16": lambda: (with_lora(llama().bfloat16()), llama().bfloat16()),
    "p_tuning": lambda: (with_virtual_tokens(PromptEncoderConfig), with_virtual_tokens(PromptEncoderConfig, 2)),
    "prefix_tuning": lambda: (with_virtual_tokens(PrefixTuningConfig), with_lora(llama())),
}
"""A trained model, and another one to compare with it."""


@pytest.fixture
def hidden(tmp_path: Path) -> Iterator[HiddenStates]:
    with HiddenStates(tmp_path) as states:
        yield states


def run(trained: Any, hidden: HiddenStates, **given: Any) -> TrainedOutputs:
    return TrainedOutputs(trained, ROWS, hidden=hidden, **{"stops": [2], "initial": {}} | given)


def whole_logits(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits (labels, vocabulary) of all rows at once, in float64, and the labels."""
    with torch.no_grad():
        parts = [label_logits(model, collate_padded([row])) for row in ROWS]
    return torch.cat([logits for logits, _ in parts]).double(), torch.cat([labels for _, labels in parts])


@pytest.mark.parametrize("max_logits", [7 * VOCABULARY, memory.MAX_LOGITS])
@pytest.mark.parametrize("kind", PAIRS)
def test_the_figures_are_those_of_logits_held_whole(
    hidden: HiddenStates, monkeypatch: pytest.MonkeyPatch, kind: str, max_logits: int
) -> None:
    monkeypatch.setattr(memory, "MAX_LOGITS", max_logits)
    trained, merged = PAIRS[kind]()
    (t, labels), (m, _) = whole_logits(trained), whole_logits(merged)
    with trained.disable_adapter():
        base, _ = whole_logits(trained)
    found = compare(run(trained, hidden), merged, ROWS)
    p, q = t.log_softmax(-1), m.log_softmax(-1)
    at = labels[:, None]
    atol = 2e-2 if kind == "bfloat16" else 2e-5

    def assert_close(values: Any, wanted: torch.Tensor) -> None:
        np.testing.assert_allclose(values, wanted.numpy(), rtol=1e-3, atol=atol)

    assert found.row.tolist() == [number for number, length in enumerate(LENGTHS) for _ in range(length - 4)]
    assert_close(found.kl, (p.exp() * (p - q)).sum(-1))
    assert_close(found.delta_p, (q.exp() - p.exp()).gather(-1, at)[:, 0])
    assert_close(found.logit_difference, (t - m).abs().amax(-1))
    assert_close(found.trained_loss, -p.gather(-1, at)[:, 0])
    assert_close(found.merged_loss, -q.gather(-1, at)[:, 0])
    assert_close(found.base_loss, -base.log_softmax(-1).gather(-1, at)[:, 0])
    assert found.same_top.tolist() == (t.argmax(-1) == m.argmax(-1)).double().tolist()
    assert found.kl.max() > 0


def test_a_model_does_not_differ_from_itself(hidden: HiddenStates) -> None:
    model = with_lora(llama())
    found = compare(run(model, hidden), model, ROWS)
    assert found.kl.max() == found.logit_difference.max() == abs(found.delta_p).max() == 0
    assert found.same_top.all()


def test_the_base_of_pissa_and_olora_has_the_initial_matrices(hidden: HiddenStates) -> None:
    """They were subtracted from the base: without them it is another model."""
    base, initial = llama(), {}
    wanted, _ = whole_logits(base)
    adapted = with_lora(base, target_modules=["q_proj", "up_proj"])
    for name, layer in adapted.get_base_model().named_modules():
        if hasattr(layer, "lora_A"):
            lora_a, lora_b = torch.randn(4, 64), torch.randn(len(layer.lora_B["default"].weight), 4)
            initial[f"{name}.weight"] = LoraPair(lora_a, lora_b)
            layer.base_layer.weight.data -= layer.scaling["default"] * lora_b @ lora_a
    before = copy.deepcopy(adapted.state_dict())
    found = run(adapted, hidden, initial=initial)
    losses = -wanted.log_softmax(-1).gather(-1, torch.cat([torch.tensor(row["labels"][4:]) for row in ROWS])[:, None])
    np.testing.assert_allclose(found.base_losses, losses[:, 0], atol=1e-3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapted.state_dict().items())


def test_the_trained_model_is_not_kept(hidden: HiddenStates) -> None:
    model = with_lora(llama())
    body = weakref.ref(model.get_base_model().model)
    outputs = run(model, hidden)
    del model
    gc.collect()
    assert body() is None
    assert compare(outputs, llama(), ROWS).kl.max() > 0


def test_no_more_logits_than_those_of_a_chunk_are_computed(hidden: HiddenStates, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "MAX_LOGITS", 5 * VOCABULARY)
    trained, merged = with_lora(llama()), llama()
    sizes = []
    for model in (trained, merged):
        model.get_output_embeddings().register_forward_hook(lambda _module, _inputs, out: sizes.append(out[..., 0].numel()))
    outputs = run(trained, hidden)
    compare(outputs, merged, ROWS)
    assert max(sizes) == 5
    assert compare_answers(outputs, merged, 0.0).different
    assert max(sizes) == 5


def test_the_losses_of_another_model_are_those_of_whole_logits() -> None:
    model = llama()
    logits, labels = whole_logits(model)
    wanted = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    np.testing.assert_allclose(label_losses(model, ROWS), wanted, rtol=1e-4)


# Greedy answers


def test_greedy_answers_are_compared_token_for_token_and_near_ties_do_not_count(hidden: HiddenStates) -> None:
    trained = with_lora(llama())
    outputs = run(trained, hidden)
    assert compare_answers(outputs, trained, 0.0) == AnswerFigures(same=3, near_ties=0, different=0)
    other = llama()
    wanted = []
    for prompt, answer in outputs.answers:
        row = {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}
        with torch.no_grad():
            (own, _), (theirs, _) = (label_logits(model, collate_padded([row])) for model in (trained, other))
        first = next(n for n, token in enumerate(answer) if theirs[n].argmax() != token)
        margin = own[first, answer[first]] - own[first, theirs[first].argmax()]
        assert margin >= 0, "the trained model's own choice"
        wanted.append(margin.item())
    for tolerance in (0.0, *wanted):
        near = sum(margin <= tolerance for margin in wanted)
        found = compare_answers(outputs, other, tolerance / 2 * (1 + 1e-4))
        assert found == AnswerFigures(same=0, near_ties=near, different=3 - near)


# Memory


def limit_labels(model: Any, limit: int, error: Exception) -> None:
    """Makes the output head fail for more labels than that; for the tokens of a row it does not."""

    def fail(_module: Any, inputs: Any) -> None:
        if inputs[0].dim() == 2 and len(inputs[0]) > limit:
            raise error

    model.get_output_embeddings().register_forward_pre_hook(fail)


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory."),
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried ..."),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=repr)
def test_fewer_labels_are_compared_at_a_time_if_memory_runs_out(
    hidden: HiddenStates, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    trained, merged = with_lora(llama()), llama()
    outputs = run(trained, hidden)
    wanted = compare(outputs, merged, ROWS)
    capsys.readouterr()
    monkeypatch.setattr(memory, "MAX_LOGITS", 20 * VOCABULARY)
    limit_labels(merged, 6, error)
    found = compare(outputs, merged, ROWS)
    assert capsys.readouterr().out == (
        "merge: out of memory with 20 labels at a time; continuing with 10\n"
        "merge: out of memory with 10 labels at a time; continuing with 5\n"
    )
    np.testing.assert_allclose(found.kl, wanted.kl, atol=1e-6)


@pytest.mark.parametrize(
    ("error", "message"), list(zip(OUT_OF_MEMORY, ["the GPU's", "main", "main"], strict=True)), ids=repr
)
def test_a_row_for_which_memory_does_not_suffice_is_a_problem(hidden: HiddenStates, error: Exception, message: str) -> None:
    model = with_lora(llama())
    layer, limit = model.get_base_model().model.layers[0], LENGTHS[0]

    def fail(_module: Any, inputs: Any) -> None:
        if inputs[0].shape[1] == limit:
            raise error

    layer.register_forward_pre_hook(fail)
    with pytest.raises(Problem, match=rf"out of {message} memory while comparing the models on a row of 30 tokens; close"):
        run(model, hidden)


def test_another_error_is_not_taken_for_one_of_memory(hidden: HiddenStates) -> None:
    model = with_lora(llama())
    limit_labels(model, 5, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="mat1"):
        run(model, hidden)


def test_hidden_states_are_in_a_file_without_a_name(tmp_path: Path) -> None:
    tensors = [torch.randn(3, 5), torch.randn(2, 5).bfloat16(), torch.randn(4, 10)[:, ::2]]
    with HiddenStates(tmp_path / "new") as hidden:
        for tensor in tensors:
            hidden.append(tensor)
        assert not list((tmp_path / "new").iterdir())
        for number in (2, 0, 1):
            assert torch.equal(hidden[number], tensors[number])
            assert hidden[number].dtype == tensors[number].dtype


# Figures


def figures(rows: int, tokens: int, *, by_row: float = 0.0, gain: float = 0.5) -> TokenFigures:
    """Random values, with a part that all tokens of a row share."""
    random = np.random.default_rng(0)
    row = np.repeat(np.arange(rows), tokens)
    noise = random.normal(size=(8, rows * tokens)) + by_row * random.normal(size=(8, rows))[:, row]
    trained = 1 + 0.1 * noise[0]
    return TokenFigures(
        row=row,
        kl=np.exp(noise[1]),
        delta_p=0.01 * noise[2],
        same_top=(noise[3] > -2).astype(float),
        logit_difference=abs(noise[4]),
        trained_loss=trained,
        merged_loss=trained + 0.01 * noise[5],
        base_loss=trained + gain + 0.1 * noise[6],
    )


def test_the_figures_are_those_of_all_tokens() -> None:
    tokens = figures(50, 40)
    found = summarize(tokens)
    assert found["mean_kl"] == pytest.approx(tokens.kl.mean())
    assert found["median_kl"] == sorted(tokens.kl)[999]
    assert found["p99_kl"] == sorted(tokens.kl)[1979]
    assert found["p99_9_kl"] == sorted(tokens.kl)[1997]
    assert found["max_kl"] == tokens.kl.max()
    assert found["rms_delta_p"] == pytest.approx(np.sqrt((tokens.delta_p**2).mean()))
    assert found["mean_delta_p"] == pytest.approx(tokens.delta_p.mean())
    assert found["top1_agreement"] == pytest.approx(tokens.same_top.mean())
    assert found["max_abs_logit_difference"] == tokens.logit_difference.max()
    base, trained, merged = (losses.mean() for losses in (tokens.base_loss, tokens.trained_loss, tokens.merged_loss))
    assert [found[f"{name}_loss"] for name in ("base", "trained", "merged")] == pytest.approx([base, trained, merged])
    assert found["loss_difference"] == pytest.approx(merged - trained)
    assert found["gain"] == pytest.approx(base - trained)
    assert found["recovery"] == pytest.approx((base - merged) / (base - trained))
    assert found == summarize(tokens)
    assert found.keys() - found["standard_errors"].keys() == {"max_kl", "max_abs_logit_difference", "standard_errors"}


def test_the_standard_errors_are_those_of_independent_rows() -> None:
    tokens = figures(400, 5, by_row=3.0)
    errors = summarize(tokens)["standard_errors"]
    for name, values in (("trained_loss", tokens.trained_loss), ("mean_delta_p", tokens.delta_p)):
        row_means = values.reshape(400, 5).mean(1)
        assert errors[name] == pytest.approx(row_means.std(ddof=1) / 20, rel=0.1)
        assert errors[name] > 1.5 * values.std() / len(values) ** 0.5, "tokens of a row are not independent"
    # The median's error, from the density of the logarithm at 0; and the recovery's, by the delta method.
    tokens = figures(2000, 1)
    errors = summarize(tokens)["standard_errors"]
    assert errors["median_kl"] == pytest.approx(np.sqrt(np.pi / 2) / 2000**0.5, rel=0.3)
    gain = tokens.base_loss - tokens.trained_loss
    residual = (tokens.base_loss - tokens.merged_loss) - gain * summarize(tokens)["recovery"]
    assert errors["recovery"] == pytest.approx(residual.std() / gain.mean() / 2000**0.5, rel=0.1)


def test_the_cost_of_quantization_is_paired_by_row() -> None:
    tokens = figures(400, 5, by_row=3.0)
    full = tokens.base_loss - 0.2 - 0.01 * np.random.default_rng(1).normal(size=2000)
    found = quantization_cost(tokens, full)
    assert found["full_base_loss"] == pytest.approx(full.mean())
    assert found["quantized_base_loss"] == pytest.approx(tokens.base_loss.mean())
    assert found["cost"] == pytest.approx((tokens.base_loss - full).mean())
    row_means = (tokens.base_loss - full).reshape(400, 5).mean(1)
    assert found["standard_error"] == pytest.approx(row_means.std(ddof=1) / 20, rel=0.1)
    ends = [found["cost"] + side * 1.96 * found["standard_error"] for side in (-1, 1)]
    assert found["interval"] == pytest.approx(ends, rel=0.01)
    assert found == quantization_cost(tokens, full)
    one = quantization_cost(figures(1, 10), np.zeros(10))
    assert one["standard_error"] is one["interval"] is None


def test_there_is_no_recovery_without_a_gain() -> None:
    for gain in (0.0, -0.5):
        found = summarize(figures(30, 10, gain=gain))
        assert found["recovery"] is None
        assert "recovery" not in found["standard_errors"]


def test_one_row_has_no_standard_errors() -> None:
    found = summarize(figures(1, 10))
    assert set(found["standard_errors"].values()) == {None}
    assert found["recovery"] is None
    assert found["mean_kl"] > 0
