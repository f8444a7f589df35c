"""Models that one GPU does not hold: where their weights are placed, what is refused, and that the results are the same."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, LlamaConfig

import stages.generate.generate as generate_module
from stages.core.problem import Problem
from stages.core.tokens import TokenRows, read_tokens
from stages.generate.decoder import can_decode
from stages.generate.text_losses import window_losses
from stages.generate.transformers_backend import TransformersBackend
from stages.model import load, quantize
from stages.model.adapter import add_adapter
from stages.model.architecture import skeleton
from stages.model.load import load_model
from stages.model.placement import Memory, is_spread, plan_placement, weight_bytes
from stages.model.quantize import Quantization, load_quantized, quantized_bits
from stages.train import fsdp
from stages.train.checks import memory_problems
from stages.train.collator import StepCollator
from stages.train.loss import next_token_loss
from stages.train.train import _make_arguments
from stages.train.trainer import AdapterTrainer
from tests.runs import params as train_params
from tests.test_generate import PARAMS, answer
from tests.test_merge import Merge
from tests.tiny import Workspace

LAYERS = 8
NO_GPU_AND_LITTLE_MEMORY = Memory({}, 300_000)
"""Holds the embeddings of the tiny model in float32, and one of its two layers at a time."""


@pytest.fixture(scope="module")
def model() -> Any:
    """A Llama of eight layers, each of 1/8 of what its embeddings and its head leave, on the meta device in bfloat16."""
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def total(model: Any) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def test_a_model_that_one_gpu_holds_is_on_one_device(model: Any) -> None:
    plan = plan_placement(model, Memory({0: 2 * total(model)}, 0))
    assert plan.device_map == {"": 0}
    assert plan.total_bytes == plan.gpu_bytes == pytest.approx(total(model), rel=0.01)
    assert plan_placement(model, Memory({}, 2 * total(model))).device_map == {"": "cpu"}


def test_a_model_is_spread_over_the_gpus_in_whole_layers_before_main_memory_is_used(model: Any) -> None:
    size = total(model)
    plan = plan_placement(model, Memory({0: int(0.8 * size), 1: int(0.8 * size)}, 10 * size))
    assert set(plan.sizes) == {0, 1}
    assert min(plan.sizes.values()) > 0.3 * size, "balanced"
    placed = [plan.device_map[f"model.layers.{number}"] for number in range(LAYERS)]
    assert placed == sorted(placed), "in the order of the layers, so that activations move once"
    assert set(placed) == {0, 1}
    plan = plan_placement(model, Memory({0: int(0.4 * size), 1: int(0.4 * size)}, 10 * size))
    assert set(plan.sizes) == {0, 1, "cpu"}
    assert all(plan.sizes[gpu] <= 0.4 * size for gpu in (0, 1))
    assert "in main memory, which every token reads over the bus" in plan.describe()
    plan = plan_placement(model, Memory({0: int(0.5 * size)}, int(0.4 * size)))
    assert set(plan.sizes) == {0, "cpu", "disk"}
    assert "on the disk, which every token reads: very slow" in plan.describe()


def test_layers_are_whole_in_a_model_that_does_not_name_them_too(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = Memory({0: int(0.8 * total(model)), 1: int(0.8 * total(model))}, 0)
    named = plan_placement(model, memory)
    monkeypatch.setattr(model, "_no_split_modules", None)
    assert plan_placement(model, memory) == named


def test_quantized_weights_count_with_their_scales(model: Any) -> None:
    settings = {"bnb_4bit_use_double_quant": True, "llm_int8_threshold": 6.0, "llm_int8_skip_modules": [], "dtype": "auto"}
    sizes = {}
    for quantization, double in (("nf4", True), ("nf4", False), ("int8", True), ("none", True)):
        given = Quantization(**settings | {"quantization": quantization, "bnb_4bit_use_double_quant": double})
        plan = plan_placement(model, Memory({0: 10**9}, 0), quantized=quantized_bits(model, given))
        sizes[quantization, double] = plan.total_bytes
    linear = sum(p.numel() for name, p in model.named_parameters() if ".layers." in name and p.ndim == 2)
    rest = total(model) - 2 * linear
    # The estimate counts the scales for all weights, so that it is never too small.
    assert linear / 2 + rest < sizes["nf4", True] < 1.05 * (linear * 4.127 / 8 + rest)
    assert sizes["nf4", True] < sizes["nf4", False] < sizes["int8", True] < sizes["none", True]
    skipping = Quantization(**settings | {"quantization": "nf4", "llm_int8_skip_modules": ["gate_proj"]})
    assert set(quantized_bits(model, skipping)) == {
        f"{name}.weight"
        for name, layer in model.named_modules()
        if isinstance(layer, torch.nn.Linear) and not name.endswith(("gate_proj", "lm_head"))
    }


def test_the_size_of_a_folder_is_that_of_its_model(workspace: Workspace) -> None:
    base = workspace.root / "models" / "base"
    model = skeleton(base, torch.float32)
    assert weight_bytes(base, torch.float32) == total(model) == 2 * weight_bytes(base, torch.bfloat16)


# What is refused


def memory_message(workspace: Workspace, memory: Memory, **given: Any) -> list[str]:
    section = train_params(workspace, **given).model_dump()
    return memory_problems(section, workspace.root / "models" / "base", memory=memory)


def test_a_training_whose_model_could_not_be_merged_is_refused(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    size = weight_bytes(workspace.root / "models" / "base", torch.float32)
    assert memory_message(workspace, Memory({0: 2 * size}, 0)) == []
    assert memory_message(workspace, Memory({}, 2 * size)) == []
    assert capsys.readouterr().out == ""
    assert memory_message(workspace, Memory({0: int(0.9 * size), 1: int(0.9 * size)}, 0)) == []
    assert capsys.readouterr().out == ""
    # nf4 fits the GPU, the merged model only together with main memory
    assert memory_message(workspace, Memory({0: int(0.95 * size)}, 2 * size)) == []
    assert "merge and generate will be slow on this machine" in capsys.readouterr().out
    (message,) = memory_message(workspace, Memory({0: int(0.95 * size)}, 1000))
    assert "merge and generate could not load the merged model, 0.0 GB of weights in float32: this machine has" in message
    (message,) = memory_message(workspace, Memory({0: int(0.5 * size)}, 2 * size), quantization="none")
    assert "with train.quantization none the model has" in message
    assert "which one GPU must hold in train" in message
    assert ", nf4, or a smaller base" in message


def test_sharded_training_needs_main_memory_for_one_copy(workspace: Workspace) -> None:
    size = weight_bytes(workspace.root / "models" / "base", torch.float32)
    memory = Memory({0: 2 * size, 1: 2 * size}, size // 3)
    (message,) = memory_message(workspace, memory, fsdp=True, num_processes=2)
    assert "train.fsdp: true, but each process first loads the quantized model into main memory" in message
    assert memory_message(workspace, memory._replace(main=size), fsdp=True, num_processes=2) == []


def test_a_trained_model_that_the_gpus_do_not_hold_is_refused(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize, "pick_device", lambda: torch.device("cuda", 0))
    monkeypatch.setattr(quantize, "free_memory", lambda: Memory({0: 150_000, 1: 1000}, 10**9))
    with pytest.raises(
        Problem, match=r"the model that was trained, in train\.quantization nf4, has .* which the GPUs together must"
    ):
        load_quantized(workspace.root / "models" / "base", train_params(workspace))


def test_processes_of_generate_need_a_gpu_for_each_copy(
    workspace: Workspace, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generate_module, "total_memory", lambda: Memory({0: 1000, 1: 1000}, 10**9))
    with pytest.raises(
        Problem, match=r"generate\.num_processes: each process has its own copy .* set it to 1, which spreads"
    ):
        answer(workspace, scratch / "a.jsonl", num_processes=2)
    monkeypatch.setattr(load, "free_memory", lambda: NO_GPU_AND_LITTLE_MEMORY)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "0")
    with pytest.raises(Problem, match=r"generate\.num_processes: each process has its own copy"):
        load_model(workspace.root / "models" / "merged", "float32")


def test_a_machine_that_does_not_hold_the_embeddings_is_refused(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "free_memory", lambda: Memory({}, 1000))
    with pytest.raises(Problem, match="the memory does not even hold its input embeddings"):
        load_model(workspace.root / "models" / "merged", "float32")


# A spread model computes the same. Without a GPU it lies in main memory and on the disk, with the same hooks of Accelerate.


def test_a_spread_model_gives_the_same_logits_losses_and_answers(
    workspace: Workspace, scratch: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    merged = workspace.root / "models" / "merged"
    rows = TokenRows(read_tokens(workspace.root / "data" / "tokens" / "validation.arrow"))
    windows = [rows[number] for number in range(4)]
    ids = torch.tensor([[5, 6, 7, 8]])
    whole = load_model(merged, "float32")
    assert not is_spread(whole)
    with torch.no_grad():
        expected, losses = whole(input_ids=ids).logits, window_losses(whole, windows)
    answers = answer(workspace, scratch / "a.jsonl")
    capsys.readouterr()
    monkeypatch.setattr(load, "free_memory", lambda: NO_GPU_AND_LITTLE_MEMORY)
    spread = load_model(merged, "float32")
    assert "on the disk, which every token reads: very slow" in capsys.readouterr().out
    assert is_spread(spread)
    assert spread.device.type == "cpu"
    assert any(parameter.is_meta for parameter in spread.parameters())
    with torch.no_grad():
        assert torch.equal(spread(input_ids=ids).logits, expected)
        assert window_losses(spread, windows) == losses
    assert answer(workspace, scratch / "b.jsonl") == answers


def test_the_decoder_gives_the_same_answers_with_a_spread_model(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    merged = workspace.root / "models" / "merged"
    rows = read_tokens(workspace.root / "data" / "tokens" / "test.arrow").to_pylist()
    rows.sort(key=lambda row: len(row["prompt_ids"]))  # as `generate` gives them
    settings = generate_module.generation_settings(generate_module.Params(**PARAMS))
    found = []
    for memory in (Memory({}, 10**9), NO_GPU_AND_LITTLE_MEMORY):
        monkeypatch.setattr(load, "free_memory", lambda memory=memory: memory)
        backend = TransformersBackend(merged, settings, template_stops=[2])
        assert can_decode(backend.model) == ""
        found.append(sorted(pair for group in backend._decode(rows) for pair in group))
    assert is_spread(backend.model)
    assert found[0] == found[1]


def test_the_proof_of_a_spread_merged_model_is_the_same(
    workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merging = Merge(workspace, tmp_path)
    expected = merging.run()
    monkeypatch.setattr(load, "free_memory", lambda: NO_GPU_AND_LITTLE_MEMORY)
    found = merging.run()
    for report in (expected, found):
        report.pop("other_base", None)  # the other weights are not put in place of those on the disk
    assert found == expected


# Sharded training


def test_accelerate_does_not_wrap_a_model_with_sharded_weights(
    workspace: Workspace, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On GPUs it raises ValueError where it would use DistributedDataParallel."""
    given = train_params(workspace, fsdp=True, num_processes=2)
    base = workspace.root / "models" / "base"
    rows = TokenRows(read_tokens(workspace.root / "data" / "tokens" / "train.arrow"))
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        adapted = add_adapter(load_quantized(base, given, on_cpu=True).model, base, settings=given, wanted=given)
        assert not fsdp.is_sharded(adapted)
        device = torch.device("cpu")
        fsdp.shard_frozen(adapted, fsdp.make_mesh(device), device)
        assert fsdp.is_sharded(adapted)
        trainer = AdapterTrainer(
            adapted,
            _make_arguments(given, scratch),
            rows=rows,
            validation_rows=rows,
            loss=next_token_loss,
            collator=StepCollator(2, padding_free=False, pad_to_multiple_of=1),
            lora_layers=None,
            early_stopping_patience=0,
        )
        monkeypatch.setattr(Accelerator, "multi_device", True)  # as on GPUs
        assert trainer.accelerator.prepare(adapted) is adapted
        assert trainer.unwrapped_model is adapted
    finally:
        torch.distributed.destroy_process_group()


def test_unused_parameters_take_part_in_the_average() -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        used, unused = (torch.nn.Parameter(torch.ones(2, 3)) for _ in range(2))
        used.grad = torch.full((2, 3), 5.0)
        fsdp.average_gradients([used, unused])
    finally:
        torch.distributed.destroy_process_group()
    assert torch.equal(used.grad, torch.full((2, 3), 5.0))
    assert unused.grad is not None
    assert torch.equal(unused.grad, torch.zeros(2, 3))
