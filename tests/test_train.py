"""Training: the loss, the order of rows, padding-free batches, quantization, and the outputs of a run."""

import io
import json
import random
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from stages.core.problem import Problem
from stages.core.tokens import IGNORE, TRAINING, TokenRows, choose_rows, open_tokens, read_ids, read_tokens
from stages.model import limits
from stages.model.adapter import find_targets
from stages.model.collate import collate_padded, collate_padding_free
from stages.model.limits import read_limits
from stages.model.logits import label_logits
from stages.model.padding_free import enable_padding_free
from stages.model.quantize import Quantization, Quantized, load_quantized, round_trip
from stages.train.batches import Deal, Shuffled, validation_batches
from stages.train.callbacks import Progress
from stages.train.checks import check_rows
from stages.train.coverage import describe_gaps
from stages.train.loss import next_token_loss
from stages.train.train import train
from stages.train.trainer import AdapterTrainer
from stages.train.validation import describe_validation
from tests.runs import INPUTS, params, paths, run
from tests.tiny import Workspace

ROWS = [
    {"input_ids": [5, 6, 7, 8, 9], "labels": [IGNORE, IGNORE, 7, 8, 9]},
    {"input_ids": [11, 12, 13], "labels": [IGNORE, 12, IGNORE]},
    {"input_ids": [21, 22, 23, 24, 25, 26, 27], "labels": [IGNORE, IGNORE, IGNORE, IGNORE, IGNORE, 26, 27]},
]


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()


# Loss


def test_the_loss_is_that_of_transformers(model: Any) -> None:
    batch = collate_padded(ROWS)
    logits, labels = label_logits(model, batch)
    assert labels.tolist() == [7, 8, 9, 12, 26, 27]
    assert logits.shape == (6, model.config.vocab_size)
    ours = next_token_loss(logits, labels, len(labels))
    theirs = model(**batch).loss
    torch.testing.assert_close(ours, theirs)


def test_the_output_head_is_unchanged_after_it_computed_only_the_labelled_positions(model: Any) -> None:
    label_logits(model, collate_padded(ROWS))
    assert model(input_ids=torch.tensor([[5, 6, 7]])).logits.shape == (1, 3, model.config.vocab_size)


def test_rows_have_the_same_weight_in_one_batch_and_in_several(model: Any) -> None:
    weight = model.model.layers[0].self_attn.q_proj.weight
    total = sum(label != IGNORE for row in ROWS for label in row["labels"])
    gradients = []
    for batches in ([ROWS], [[row] for row in ROWS]):
        weight.grad = None
        for rows in batches:
            next_token_loss(*label_logits(model, collate_padded(rows)), total).backward()
        gradients.append(weight.grad.clone())
    torch.testing.assert_close(*gradients)
    assert gradients[0].abs().max() > 1e-3


def test_padding_is_masked_and_has_no_labels() -> None:
    batch = collate_padded(ROWS)
    assert batch["attention_mask"].sum(1).tolist() == [5, 3, 7]
    assert batch["labels"][1].tolist() == [IGNORE, 12, *[IGNORE] * 5]
    assert batch["input_ids"].shape == (3, 7)


# Order


def test_every_row_comes_once_per_epoch_in_an_order_that_depends_on_the_seed() -> None:
    order = Shuffled(203, seed=1)
    first = list(order)
    assert sorted(first) == list(range(203))
    assert first != list(range(203))
    assert len(order) == 203
    assert list(order) == first
    order.set_epoch(1)
    assert list(order) != first
    assert list(Shuffled(203, seed=2)) != first


def test_the_rows_of_a_step_are_dealt_to_the_processes_by_length() -> None:
    lengths = [random.Random(row).randrange(1, 500) for row in range(230)]
    rows, processes = 8, 4
    plain, dealt = (
        Shuffled(230, seed=1, fill=26, deal=deal) for deal in (None, Deal(np.array(lengths, np.int32), rows, processes))
    )
    assert len(dealt) == len(list(dealt)) == 256
    assert list(dealt) == list(dealt)
    worst = []
    for start in range(0, 256, rows * processes):
        before, after = (list(order)[start : start + rows * processes] for order in (plain, dealt))
        assert sorted(before) == sorted(after), "the same rows in each step"
        tokens = [[([*lengths, 1])[row] for row in step] for step in (before, after)]
        sums = [[sum(step[part : part + rows]) for part in range(0, len(step), rows)] for step in tokens]
        worst.append([max(each) / (sum(each) / processes) for each in sums])
    assert sum(old for old, _ in worst) / len(worst) > 1.2, "otherwise the next line shows nothing"
    assert max(new for _, new in worst[:-1]) < 1.02  # the last one has six rows for four processes
    assert Deal([5, 4, 3, 2, 2, 2], 3, 2).deal(range(6)) == [[0, 3, 4], [1, 2, 5]]
    assert Deal([9, 1, 1, 1], 2, 2).deal([3, 2, 1, 0]) == [[0, 1], [3, 2]], "each gets its number of rows"


def test_all_processes_get_the_same_number_of_validation_batches() -> None:
    lengths = [5, 1, 4, 2, 3]
    assert list(validation_batches(lengths, 2, process=0, processes=1)) == [[1, 3], [4, 2], [0]]
    both = [list(validation_batches(lengths, 2, process=process, processes=2)) for process in (0, 1)]
    assert both == [[[1, 3], [0]], [[4, 2], [5]]], "5 is the empty row"


# Validation


@pytest.mark.parametrize("processes", [1, 2])
def test_the_loss_is_measured_on_rows_chosen_by_their_ids(workspace: Workspace, scratch: Path, processes: int) -> None:
    table = read_tokens(workspace.root / INPUTS[1])
    chosen = [table["id"][index].as_py() for index in choose_rows(read_ids(table), 3)]
    some = scratch / "validation.arrow"
    with open_tokens(some, TRAINING, [2]) as stream:
        stream.write_batch(pa.RecordBatch.from_pylist([r for r in table.to_pylist() if r["id"] in chosen], schema=TRAINING))
    few = {"training_arguments": {"max_steps": 2}, "eval_steps": 1, "num_processes": processes}
    reports = []
    for name, rows, at_most in (("all", None, 0), ("some", None, 3), ("only", some, 0)):
        given = paths(workspace, scratch / name)
        train(params(workspace, max_eval_samples=at_most, **few), **given | ({"validation_tokens": rows} if rows else {}))
        reports.append(json.loads((scratch / name / "report.json").read_text()))
    assert [(found["eval_rows"], found["validation_rows"]) for found in reports] == [
        (len(table), len(table)),
        (3, len(table)),
        (3, 3),
    ]
    figures = [{name: value for name, value in found.items() if name.startswith("validation_")} for found in reports]
    for found in figures:
        del found["validation_rows"]
    assert figures[1] == figures[2] != figures[0]


def test_the_last_step_is_validated_once(workspace: Workspace, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    measure = AdapterTrainer._measure

    def counted(trainer: AdapterTrainer) -> dict[str, float]:
        steps.append(trainer.state.global_step)
        return measure(trainer)

    monkeypatch.setattr(AdapterTrainer, "_measure", counted)
    run(workspace, scratch / "a", eval_steps=2, training_arguments={"max_steps": 5})
    assert steps == [0, 2, 4, 5]
    steps.clear()
    best = {"max_steps": 4, "load_best_model_at_end": True}
    run(workspace, scratch / "b", eval_steps=2, training_arguments=best)
    assert steps == [0, 2, 4, 4], "the weights of the best step are measured again"


class EqualRows:
    """Rows of 230 tokens."""

    def __init__(self, count: int) -> None:
        self.lengths = np.full(count, 230)

    def __len__(self) -> int:
        return len(self.lengths)


def validation_lines(evaluate: int, *, used: int = 1000, all_rows: int = 25_549) -> list[str]:
    arguments: Any = SimpleNamespace(eval_steps=evaluate, per_device_train_batch_size=16, world_size=1)
    rows: list[Any] = [EqualRows(350_000), EqualRows(used)]
    return describe_validation(arguments, steps=21_875, rows=rows[0], validation_rows=rows[1], all_rows=all_rows)


def test_a_line_says_what_validation_costs_and_a_second_one_what_makes_it_cheaper() -> None:
    assert validation_lines(2188) == [
        "validation on 1,000 of 25,549 rows, every 2,188 of 21,875 steps: 11 times 230,000 tokens, 3.1 % of the number that "
        "is trained on"
    ]
    first, second = validation_lines(25, used=25_549)
    assert first == (
        "validation on 25,549 rows, every 25 of 21,875 steps: 876 times 5,876,270 tokens, 6394.5 % of the number that is "
        "trained on"
    )
    assert second == "validation adds about 3197 % to the time; lower train.max_eval_samples, or raise train.eval_steps"
    assert len(validation_lines(2188, used=25_549)) == 2
    assert len(validation_lines(25)) == 2
    assert len(validation_lines(2188, used=80, all_rows=80)) == 1


# Padding-free rows


@pytest.fixture(scope="module")
def padding_free_model(tiny_model: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    assert enable_padding_free(model) == ""
    return model


def test_padding_free_rows_have_the_logits_of_single_rows(model: Any, padding_free_model: Any) -> None:
    together, labels = label_logits(padding_free_model, collate_padding_free(ROWS))
    alone = [label_logits(model, collate_padded([row])) for row in ROWS]
    torch.testing.assert_close(together, torch.cat([logits for logits, _ in alone]))
    assert labels.tolist() == [7, 8, 9, 12, 26, 27]


def test_no_row_of_a_padding_free_batch_attends_to_another(padding_free_model: Any) -> None:
    before, _ = label_logits(padding_free_model, collate_padding_free(ROWS))
    other = [{"input_ids": [30, 31, 32, 33, 34], "labels": ROWS[0]["labels"]}, *ROWS[1:]]
    after, _ = label_logits(padding_free_model, collate_padding_free(other))
    assert torch.equal(before[3:], after[3:])
    assert not torch.allclose(before[:3], after[:3])


def test_padding_free_rows_have_the_gradients_of_padded_rows(model: Any, padding_free_model: Any) -> None:
    gradients = []
    for each, batch in ((model, collate_padded(ROWS)), (padding_free_model, collate_padding_free(ROWS))):
        weight = each.model.layers[0].self_attn.k_proj.weight
        weight.grad = None
        next_token_loss(*label_logits(each, batch), 6).backward()
        gradients.append(weight.grad.clone())
    torch.testing.assert_close(*gradients)


def test_a_model_with_another_kind_of_attention_is_unchanged() -> None:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "head_dim": 16}
    torch.manual_seed(0)
    capped = Gemma2ForCausalLM(
        Gemma2Config(vocab_size=40, num_key_value_heads=2, attn_logit_softcapping=5.0, **sizes)
    ).eval()
    before = capped.config._attn_implementation
    assert enable_padding_free(capped) == "its attention uses logit soft-capping"
    assert capped.config._attn_implementation == before


# Quantization


@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8", "none"])
@pytest.mark.parametrize("double", [True, False])
def test_round_trip_returns_the_weights_that_the_quantized_model_computes_with(
    workspace: Workspace, quantization: Any, double: bool
) -> None:
    base = workspace.root / "models" / "base"
    settings = Quantization(
        quantization=quantization,
        bnb_4bit_use_double_quant=double,
        llm_int8_threshold=6.0,
        dtype="float32",
        llm_int8_skip_modules=[],
    )
    loaded = load_quantized(base, settings)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    assert len(loaded.layers) == (0 if quantization == "none" else 14)
    assert not any("lm_head" in name for name in loaded.layers)
    inputs = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    for name in loaded.layers:
        original = plain.get_submodule(name)
        rounded = round_trip(original.weight.data, settings)
        assert not torch.equal(rounded, original.weight)
        if original.in_features == 64:
            through = loaded.model.get_submodule(name)(inputs)
            tolerance = {"rtol": 0.02, "atol": 0.15} if quantization == "int8" else {"rtol": 1e-5, "atol": 1e-5}
            torch.testing.assert_close(through, inputs @ rounded.T, **tolerance)
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())


# Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_shows_a_bar_and_a_log_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], terminal: bool
) -> None:
    screen = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr("sys.stderr", screen)
    device = torch.device("cpu")
    args = SimpleNamespace(device=device, train_batch_size=4, gradient_accumulation_steps=1, world_size=1)
    state = SimpleNamespace(global_step=3, max_steps=8, is_world_process_zero=True)
    progress = Progress(mean_row_tokens=10.0)
    progress.on_train_begin(args, state, None)
    for _ in range(2):
        progress.on_step_begin(args, state, None)
        state.global_step += 1
        progress.on_step_end(args, state, None)
        progress.on_log(args, state, None, {"loss": 1.25})
    progress.on_train_end()
    line = capsys.readouterr().out
    assert progress.tokens_per_second > 0
    if terminal:
        assert line == ""
        assert "train:  62%" in screen.getvalue()
        assert "5/8" in screen.getvalue()
        assert "loss 1.2500, " in screen.getvalue()
    else:
        assert screen.getvalue() == ""
        assert re.fullmatch(r"train: step 5/8, loss 1\.2500, [\d,]+ tokens/s, 0\.0 min left\n", line)


# Runs


def test_the_adapter_folder_has_two_files_of_peft_and_training_json(workspace: Workspace) -> None:
    adapter = workspace.root / "models" / "adapter"
    assert {file.name for file in adapter.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "training.json",
    }
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(config["target_modules"])
    assert {name.rpartition(".")[2] for name in config["target_modules"]} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    }
    training = json.loads((adapter / "training.json").read_text())
    assert training["quantization"]["quantization"] == "nf4"
    assert training["summed_in_float32"] == [], "on the CPU 4-bit weights are dequantized when the model is loaded"
    assert training["quantization"]["dtype"] in ("float32", "bfloat16")
    assert str(workspace.root) not in "".join(file.read_text() for file in adapter.glob("*.json"))


def test_the_report_counts_the_rows_and_the_loss_falls(workspace: Workspace) -> None:
    report = json.loads((workspace.root / "reports" / "train.json").read_text())
    rows = read_tokens(workspace.root / "data/tokens/train.arrow").to_pylist()
    assert report["rows"] == len(rows)
    assert report["tokens"] == sum(len(row["input_ids"]) for row in rows)
    assert report["label_tokens"] == sum(label != IGNORE for row in rows for label in row["labels"])
    assert report["steps"] == -(-len(rows) // 4)
    assert report["validation_loss"] < report["validation_loss_before"] - 0.1
    curve = (workspace.root / "reports/loss/validation.csv").read_text().splitlines()
    assert curve[1] == f"0,{report['validation_loss_before']}"
    assert curve[-1] == f"{report['steps']},{report['validation_loss']}"
    steps = [int(line.split(",")[0]) for line in (workspace.root / "reports/loss/train.csv").read_text().splitlines()[1:]]
    assert steps == list(range(2, report["steps"] + 1, 2))


def test_an_unknown_layer_or_optimizer_is_refused(workspace: Workspace, scratch: Path) -> None:
    with pytest.raises(Problem, match=r"train\.target_modules: W_pack is not .* layers here: down_proj, gate_proj, k_proj"):
        run(workspace, scratch / "out", target_modules=["W_pack"])
    with pytest.raises(Problem, match=r"params\.yaml: train: adam is not a valid OptimizerNames"):
        run(workspace, scratch / "out", optim="adam")
    assert not (scratch / "out").exists()


def test_rows_that_the_model_has_no_tokens_or_positions_for_are_refused(
    workspace: Workspace, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "_has_position_table", lambda *_, **__: True)
    base = Path(shutil.copytree(workspace.root / "models" / "base", scratch / "base"))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"vocab_size": 90, "max_position_embeddings": 20}))
    with pytest.raises(Problem) as problem:
        run(workspace, scratch / "out", base=base, method="p_tuning")
    assert len(problem.value.messages) == 4
    token, positions = problem.value.messages[:2]
    assert re.match(rf"{base}: a training row has the token \d+, and the model's vocabulary has 90; ", token)
    message = rf"{base}: the longest training row has \d+ tokens with 20 virtual ones, and the model 20 positions; "
    assert re.match(message, positions)


def test_rows_beyond_rotary_positions_are_described(workspace: Workspace, tmp_path: Path) -> None:
    base = Path(shutil.copytree(workspace.root / "models" / "base", tmp_path / "base"))
    config = json.loads((base / "config.json").read_text()) | {"max_position_embeddings": 20}
    (base / "config.json").write_text(json.dumps(config))
    tokens = workspace.root / "data" / "tokens"
    rows = [TokenRows(read_tokens(tokens / f"{split}.arrow")) for split in ("train", "validation")]
    lines = check_rows(*rows, base, virtual_tokens=0)
    assert re.match(r"the longest training row has \d+ tokens, and the model 20 positions: what is beyond", lines[0])


@pytest.mark.parametrize(
    ("kind", "given", "has_table"),
    [
        ("GPT2", {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 48}, True),
        ("OPT", {"hidden_size": 32, "ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 48}, True),
        ("GPTJ", {"n_embd": 32, "n_layer": 1, "n_head": 2, "rotary_dim": 8, "n_positions": 48}, True),
        # Nothing but the number of positions is 48, and then everything is.
        ("Llama", {"hidden_size": 32, "intermediate_size": 40, "max_position_embeddings": 48}, False),
        ("Llama", {"hidden_size": 48, "intermediate_size": 48, "max_position_embeddings": 48, "vocab_size": 48}, False),
    ],
)
def test_a_table_of_positions_is_found(tmp_path: Path, kind: str, given: dict[str, Any], has_table: bool) -> None:
    small = {"vocab_size": 40, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    getattr(transformers, f"{kind}Config")(**small | given, architectures=[f"{kind}ForCausalLM"]).save_pretrained(tmp_path)
    (tmp_path / "manifest.json").write_text('{"trust_remote_code": false}')
    assert read_limits(tmp_path) == (given.get("vocab_size", 40), 48, has_table)


def test_what_is_not_quantized_or_not_adapted_is_described() -> None:
    from transformers import MambaConfig, MambaForCausalLM

    model = MambaForCausalLM(MambaConfig(vocab_size=40, hidden_size=32, state_size=4, num_hidden_layers=2))
    given: dict[str, Any] = {"quantization": "nf4", "method": "lora", "target_modules": "all-linear"}
    quantized = Quantized(model, ["backbone.layers.0.mixer.in_proj"], [], [])
    lines = list(describe_gaps(quantized, SimpleNamespace(**given), SimpleNamespace(**given)))
    assert re.fullmatch(
        r"\d+% of the weights of the layers are quantized; not quantized: mixer\.(in|out)_proj, .*", lines[0]
    )
    assert lines[1:] == [
        "dt_proj gets no adapter: the model does not call it",
        "out_proj gets no adapter: PEFT refuses it, since Mamba's kernels would pass the adapter by",
    ]
    with pytest.raises(Problem, match=r"train\.target_modules: out_proj cannot have an adapter: PEFT refuses it"):
        find_targets(model, ["in_proj", "out_proj"])


def test_gradient_checkpointing_changes_the_result_only_by_rounding(workspace: Workspace, scratch: Path) -> None:
    runs = [
        run(workspace, scratch / "plain", per_device_train_batch_size=4),
        run(workspace, scratch / "checkpointed", per_device_train_batch_size=4, gradient_checkpointing=True),
    ]
    reports = [json.loads((out / "report.json").read_text()) for out in runs]
    assert reports[0]["validation_loss"] == pytest.approx(reports[1]["validation_loss"], rel=1e-4)
