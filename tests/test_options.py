"""The options of `train`: loss functions, label weights, TrainingArguments, the best checkpoint, and bad values."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML
from transformers import AutoModelForCausalLM, TrainerState, TrainingArguments

from stages.core.params import parse_section
from stages.core.problem import Problem
from stages.core.tokens import TokenRows, read_tokens
from stages.model.collate import collate_padded
from stages.model.logits import label_logits
from stages.train.arguments import (
    OWNED,
    PASSED_ON,
    count_steps,
    field_names,
    make_arguments,
    parse_training_arguments,
    set_intervals,
)
from stages.train.checks import check_learning_rate
from stages.train.loss import load_loss, next_token_loss
from stages.train.train import MOVED, Params
from tests.runs import INPUTS, params, run
from tests.tiny import PROJECT, Workspace

CROSS_ENTROPY = PROJECT / "stages" / "losses" / "cross_entropy.py"
FEW = {"training_arguments": {"max_steps": 4}}


def few(**further: Any) -> dict[str, Any]:
    """The parameters of a short training with further TrainingArguments."""
    return {"training_arguments": {"max_steps": 4, **further}}


def report(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "report.json").read_text())
    return found


def weights(out: Path) -> bytes:
    return (out / "adapter" / "adapter_model.safetensors").read_bytes()


# Loss


LOGITS = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([1, 1, 3, 6, 0])


def test_the_default_loss_is_cross_entropy_over_the_labels_of_the_step() -> None:
    loss = load_loss(CROSS_ENTROPY, 7, label_weights={}, label_smoothing_factor=0.0)
    torch.testing.assert_close(loss(LOGITS, LABELS, 5), torch.nn.functional.cross_entropy(LOGITS, LABELS))
    torch.testing.assert_close(loss(LOGITS, LABELS, 10), torch.nn.functional.cross_entropy(LOGITS, LABELS) / 2)


def test_label_weights_and_smoothing_are_those_of_torch() -> None:
    weight = torch.tensor([1.0, 3.0, 1, 0.5, 1, 1, 1])
    loss = load_loss(CROSS_ENTROPY, 7, label_weights={1: 3.0, 3: 0.5}, label_smoothing_factor=0.1)
    expected = torch.nn.functional.cross_entropy(LOGITS, LABELS, weight=weight, label_smoothing=0.1, reduction="sum") / 5
    torch.testing.assert_close(loss(LOGITS, LABELS, 5), expected)
    by_hand = -(LOGITS.log_softmax(-1)[range(5), LABELS] * weight[LABELS]).sum() / 5
    loss = load_loss(CROSS_ENTROPY, 7, label_weights={1: 3.0, 3: 0.5}, label_smoothing_factor=0.0)
    torch.testing.assert_close(loss(LOGITS, LABELS, 5), by_hand)


def test_label_smoothing_is_that_of_transformers(tiny_model: Path) -> None:
    from transformers.trainer_pt_utils import LabelSmoother

    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    batch = collate_padded(
        [{"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]}, {"input_ids": [9, 5], "labels": [-100, 5]}]
    )
    outputs = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    theirs = LabelSmoother(0.2)({"logits": outputs.logits}, batch["labels"], shift_labels=True)
    logits, labels = label_logits(model, batch)
    torch.testing.assert_close(next_token_loss(logits, labels, len(labels), None, 0.2), theirs)


OWN = '''
import torch


def loss(logits, labels, num_items):
    """Focal loss (Lin et al. 2017), gamma 2."""
    log = torch.log_softmax(logits.float(), -1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    return -((1 - log.exp()) ** 2 * log).sum() / num_items
'''


def test_a_custom_loss_is_trained_with(workspace: Workspace, scratch: Path) -> None:
    (scratch / "focal.py").write_text(OWN)
    custom = run(workspace, scratch / "custom", **FEW, loss=str(scratch / "focal.py"))
    default = run(workspace, scratch / "default", **FEW)
    assert weights(custom) != weights(default)
    assert report(custom)["validation_loss"] < report(custom)["validation_loss_before"]
    # Validation always measures the cross-entropy.
    assert report(custom)["validation_loss_before"] == report(default)["validation_loss_before"]
    smooth = run(workspace, scratch / "smooth", **few(label_smoothing_factor=0.1))
    weighted = run(workspace, scratch / "weighted", **few(label_smoothing_factor="0.1"), label_weights={2: 4.0})
    assert len({weights(custom), weights(default), weights(smooth), weights(weighted)}) == 4
    assert report(smooth)["validation_loss_before"] == report(default)["validation_loss_before"]


@pytest.mark.parametrize(
    ("text", "given", "message"),
    [
        (None, {}, r"train\.loss: .*own\.py: not found"),
        ("def loss(:", {}, r"own\.py: cannot be imported: SyntaxError"),
        ("import no_such_module", {}, r"cannot be imported: ModuleNotFoundError: No module named 'no_such_module'"),
        ("loss = 3", {}, "has no function `loss`; stages/losses/cross_entropy.py shows"),
        (OWN, {"label_smoothing_factor": 0.1}, r"label_smoothing_factor: the loss in .* does not take it"),
        (OWN, {"label_weights": {1: 2.0}}, r"train\.label_weights: the loss in .* does not take it"),
        (OWN, {"label_weights": {400: 2.0, -1: 1.0}}, r"train\.label_weights: 400, -1: no such token; there are 400"),
    ],
)
def test_a_loss_that_cannot_be_used_is_one_message(tmp_path: Path, text: str | None, given: Any, message: str) -> None:
    if text is not None:
        (tmp_path / "own.py").write_text(text)
    settings = {"label_weights": {}, "label_smoothing_factor": 0.0} | given
    with pytest.raises(Problem, match=message):
        load_loss(tmp_path / "own.py", 400, **settings)


# TrainingArguments


def test_training_arguments_get_the_types_of_their_fields(workspace: Workspace) -> None:
    given = {
        "adam_beta2": 0.95,
        "max_steps": 7,
        "optim_args": "rank=4",
        "dataloader_num_workers": 0,
        "torch_compile": False,
        "lr_scheduler_kwargs": {"num_cycles": 2},
        "optim_target_modules": ["q_proj", "v_proj"],
    }
    read = parse(workspace, given)
    assert read["adam_beta2"] == 0.95
    assert read["max_steps"] == 7
    assert read["torch_compile"] is False
    assert read["optim_target_modules"] == ["q_proj", "v_proj"]
    arguments = TrainingArguments(output_dir="x", use_cpu=True, **read)
    assert arguments.lr_scheduler_kwargs == {"num_cycles": 2}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"adam_beta22": 0.95},
            r"training_arguments\.adam_beta22: TrainingArguments has no such field; did you mean 'adam_beta2'\?",
        ),
        ({"max_steps": "many"}, r"training_arguments\.max_steps: found 'many': argument --max_steps.*invalid int value"),
        ({"learning_rate": 1e-4}, r"training_arguments\.learning_rate: set the parameter train\.learning_rate instead"),
        (
            {"output_dir": "x"},
            r"training_arguments\.output_dir: cannot be set here: paths and names are set by the pipeline",
        ),
        ({"bf16": True}, r"training_arguments\.bf16: cannot be set here: set train\.dtype"),
        ({"fsdp": "full_shard"}, r"training_arguments\.fsdp: set the parameter train\.fsdp instead"),
        ({"weight_decay": -0.1}, r"training_arguments\.weight_decay: found -0\.1; wanted at least 0"),
        ({"label_smoothing_factor": 1}, r"training_arguments\.label_smoothing_factor: found 1\.0; wanted less than 1"),
    ],
)
def test_other_fields_are_refused_with_the_reason(workspace: Workspace, given: dict[str, Any], message: str) -> None:
    with pytest.raises(Problem, match=r"params\.yaml: train\." + message):
        parse(workspace, given)


def parse(workspace: Workspace, given: dict[str, Any]) -> dict[str, Any]:
    return parse_training_arguments(params(workspace, training_arguments=given, eval_steps=2).model_dump())


def test_all_bad_training_arguments_are_reported_in_one_problem(workspace: Workspace) -> None:
    with pytest.raises(Problem) as caught:
        parse(workspace, {"seed": 1, "max_step": 3, "report_to": "wandb", "adam_beta1": "x"})
    assert len(caught.value.messages) == 4


def test_everything_that_needs_no_model_is_reported_in_one_problem_before_it_is_loaded(
    workspace: Workspace, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stages.train.train.load_quantized", lambda *_, **__: pytest.fail("the model was loaded"))
    with pytest.raises(Problem) as caught:
        run(
            workspace,
            scratch / "out",
            fsdp=True,
            quantization="int8",
            compute="fp8",
            method="prefix_tuning",
            gradient_checkpointing=True,
            loss="missing.py",
            training_arguments={"seed": 1, "weight_decay": "much"},
        )
    found = [message.split(": ")[1] for message in caught.value.messages]
    assert found == [
        "train.gradient_checkpointing",
        "train.fsdp",
        "train.fsdp",
        "train.compute",
        "train.compute",
        "train.compute",
        "train.training_arguments.seed",
        "train.training_arguments.weight_decay",
        "train.loss",
    ]
    assert all(message.startswith("params.yaml: train.") for message in caught.value.messages)
    with pytest.raises(Problem, match=r"params\.yaml: train: adam is not a valid OptimizerNames"):
        run(workspace, scratch / "out", optim="adam")
    assert not (scratch / ".checkpoints").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "FP8 needs an NVIDIA GPU, found cpu; set it to dtype"),
        ({"fsdp": True, "num_processes": 2}, "fp8 does not work with train.fsdp"),
        ({"method": "p_tuning"}, "fp8 needs the method lora, found train.method p_tuning"),
        ({"use_dora": True}, "fp8 does not work with train.use_dora"),
        ({"lora_dropout": 0.1}, "fp8 does not work with train.lora_dropout above 0"),
        ({"quantization": "int8"}, "fp8 does not work with train.quantization int8"),
    ],
)
def test_fp8_is_refused_where_it_would_not_be_used(workspace: Workspace, scratch: Path, given: Any, message: str) -> None:
    with pytest.raises(Problem) as caught:
        run(workspace, scratch / "out", compute="fp8", **given)
    assert any(line.startswith(f"params.yaml: train.compute: {message}") for line in caught.value.messages)


def test_a_moved_parameter_says_where_it_is_now(workspace: Workspace) -> None:
    section = dict(workspace.params()["train"])
    for name in MOVED:
        with pytest.raises(Problem) as caught:
            parse_section("train", Params, section | {name: 0.0})
        (message,) = caught.value.messages
        wanted = f"params.yaml: train.{name}: removed; it is a field of TrainingArguments; write it in "
        assert message.startswith(f"{wanted}train.training_arguments: {{{name}: ")
        (example,) = YAML(typ="safe").load(message.partition("train.training_arguments: ")[2]).items()
        assert parse(workspace, dict([example])) == {name: example[1]}


def test_every_field_is_a_parameter_or_reserved_or_may_be_set(workspace: Workspace) -> None:
    own = set(params(workspace).model_dump())
    free = set(field_names()) - own - OWNED.keys()
    assert {"adam_beta1", "adam_epsilon", "max_steps", "torch_compile", "lr_scheduler_kwargs", "use_liger_kernel"} <= free
    assert free >= MOVED.keys()
    assert not {name for name in free if name.startswith(("hub_", "eval_do", "save_", "fsdp", "log_", "trackio"))}
    assert not own & OWNED.keys()
    assert own >= set(PASSED_ON)


def test_training_arguments_reach_the_training(workspace: Workspace, scratch: Path) -> None:
    out = run(workspace, scratch, training_arguments={"max_steps": 3, "adam_beta1": 0.5})
    assert report(out)["steps"] == 3
    other = run(workspace, scratch / "other", training_arguments={"max_steps": 3})
    assert weights(out) != weights(other)


@pytest.mark.parametrize("given", [{"weight_decay": 5.0}, {"max_grad_norm": 1e-4}])
def test_a_moved_parameter_still_works(workspace: Workspace, scratch: Path, given: dict[str, Any]) -> None:
    default = run(workspace, scratch / "default", **few())
    defaults = {"weight_decay": 0.0, "max_grad_norm": 1.0, "label_smoothing_factor": 0.0, "neftune_noise_alpha": 0.0}
    same = run(workspace, scratch / "same", **few(load_best_model_at_end=False, full_determinism=False, **defaults))
    assert weights(same) == weights(default)
    assert weights(run(workspace, scratch / "other", **few(**given))) != weights(default)


@pytest.mark.parametrize(
    ("rows", "given", "steps"),
    [
        (12, {}, 1),  # a warm-up of 0.05 is one step, and the only one
        (1, {"warmup_steps": 1}, 1),
        (16, {"lr_scheduler_type": "inverse_sqrt"}, 1),
        (500, {"training_arguments": {"max_steps": 1}}, 1),
        (12, {"warmup_steps": 0}, 0),
        (12, {"lr_scheduler_type": "constant"}, 0),
        (17, {}, 0),
        (12, {"num_train_epochs": 2}, 0),
        (12, {"num_train_epochs": 0.5, "gradient_accumulation_steps": 4}, 1),
        (17, {"gradient_accumulation_steps": 2}, 1),
        (17, {"num_train_epochs": 2, "warmup_steps": 4}, 0),
    ],
)
def test_a_training_whose_learning_rate_is_always_0_is_refused(
    tmp_path: Path, rows: int, given: dict[str, Any], steps: int
) -> None:
    section = YAML(typ="safe").load(PROJECT / "params.yaml")["train"] | given
    arguments = make_arguments(section, checkpoints=tmp_path, dtype=torch.float32, cpu=True)
    if not steps:
        check_learning_rate(arguments, rows)
        return
    with pytest.raises(Problem) as caught:
        check_learning_rate(arguments, rows)
    (line,) = caught.value.messages
    batch = arguments.per_device_train_batch_size
    assert line.startswith(
        f"params.yaml: train.warmup_steps: {rows} training rows in batches of {batch} are 1 optimizer step"
    )
    assert "set it to 0, lower train.per_device_train_batch_size" in line


def test_a_warm_up_longer_than_the_training_is_refused(tmp_path: Path) -> None:
    section = YAML(typ="safe").load(PROJECT / "params.yaml")["train"] | {"num_train_epochs": 1, "warmup_steps": 3}

    def check(**given: Any) -> None:
        arguments = make_arguments(section | given, checkpoints=tmp_path, dtype=torch.float32, cpu=True)
        check_learning_rate(arguments, 2 * arguments.per_device_train_batch_size)

    with pytest.raises(Problem, match=r"train\.warmup_steps: 3, but .* are 2 optimizer steps: .* set it to 0 or to a share"):
        check()
    check(warmup_steps=2)
    check(lr_scheduler_type="constant")  # which has no warm-up


def test_it_is_refused_before_the_model_is_loaded(
    workspace: Workspace, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stages.train.train.load_quantized", None)
    with pytest.raises(Problem, match=r"train\.warmup_steps: .* 1 optimizer step, and the learning rate is 0"):
        run(workspace, scratch, per_device_train_batch_size=1000)


def test_full_determinism_is_switched_on(workspace: Workspace, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []
    monkeypatch.setattr("transformers.trainer.enable_full_determinism", seeds.append)
    run(workspace, scratch, **few(full_determinism=True))
    assert seeds
    assert set(seeds) == {0}


# Steps


def arguments(**given: Any) -> Any:
    values = {"per_device_train_batch_size": 16, "num_train_epochs": 1, "report_to": [], "use_cpu": True, **given}
    return TrainingArguments(output_dir="x", **values)


@pytest.mark.parametrize("rows", [1, 16, 48, 1129, 350_000])
@pytest.mark.parametrize("share", [1e-7, 0.01, 0.05, 0.1, 0.3, 0.999])
def test_a_share_of_the_steps_is_rounded_up_as_by_transformers(rows: int, share: float) -> None:
    given = arguments(eval_steps=share, save_steps=2 * share if share < 0.5 else 7, logging_steps=3)
    steps = count_steps(given, rows)
    assert steps == -(-rows // 16)
    state = TrainerState()
    state.compute_steps(given, steps)
    set_intervals(given, steps)
    assert given.logging_steps == 3
    for name in ("eval_steps", "save_steps"):
        found, theirs = getattr(given, name), getattr(state, name)
        assert isinstance(found, int)
        assert found >= 1
        assert found in (theirs, theirs - 1), "a whole number of steps is not rounded up"


def test_steps_are_counted_as_the_trainer_does() -> None:
    assert count_steps(arguments(num_train_epochs=2.5), 350_000) == 54_688
    assert count_steps(arguments(max_steps=7), 350_000) == 7
    given = arguments(eval_steps=0.07, save_steps=1, logging_steps=0.002)
    set_intervals(given, 100)
    assert (given.eval_steps, given.save_steps, given.logging_steps) == (7, 1, 1)


@pytest.mark.parametrize("name", ["logging_steps", "eval_steps", "save_steps"])
def test_half_a_step_is_refused(workspace: Workspace, scratch: Path, name: str) -> None:
    message = rf"params\.yaml: train\.{name}: found 2\.5; wanted a whole number of steps, or a share of all below 1"
    with pytest.raises(Problem, match=message):
        run(workspace, scratch, **{name: 2.5})


def test_a_run_of_three_steps_has_three_validations_and_ends_as_with_whole_numbers(
    workspace: Workspace, scratch: Path
) -> None:
    three = {"training_arguments": {"max_steps": 3}}
    shares = run(workspace, scratch / "a", eval_steps=0.1, save_steps=0.05, logging_steps=0.01, **three)
    whole = run(workspace, scratch / "b", eval_steps=1, save_steps=1, logging_steps=1, **three)
    for name in ("report.json", "loss/train.csv", "loss/validation.csv", "adapter/adapter_model.safetensors"):
        assert (shares / name).read_bytes() == (whole / name).read_bytes(), name
    steps = [line.split(",")[0] for line in (shares / "loss/validation.csv").read_text().splitlines()[1:]]
    assert steps == ["0", "1", "2", "3"]


# Options


def test_the_best_checkpoint_is_kept_and_training_stops_early(workspace: Workspace, scratch: Path) -> None:
    given = {"eval_steps": 2, "save_steps": 2, "num_train_epochs": 6, "learning_rate": 3e-2, "lr_scheduler_type": "constant"}
    best_at_end = {"training_arguments": {"load_best_model_at_end": True}}
    out = run(workspace, scratch, early_stopping_patience=2, **given, **best_at_end)
    found = report(out)
    curve = [line.split(",") for line in (out / "loss" / "validation.csv").read_text().splitlines()[1:]]
    losses = {int(step): float(loss) for step, loss in curve if step != "0"}
    best = min(losses, key=lambda step: losses[step])
    assert found["best_step"] == best
    assert found["validation_loss"] == pytest.approx(losses[best], rel=1e-6)
    assert found["steps"] == best + 4, "two validations without a better loss"
    assert found["steps"] < 6 * -(-found["rows"] // 4)


@pytest.mark.parametrize(("evaluate", "save", "best"), [(2, 50, 4), (3, 4, 6), (0.2, 0.3, 4)])
def test_the_best_model_has_a_checkpoint_whatever_save_steps_is(
    workspace: Workspace, scratch: Path, monkeypatch: pytest.MonkeyPatch, evaluate: float, save: float, best: int
) -> None:
    def measure(trainer: Any) -> dict[str, float]:
        return {"loss": abs(trainer.state.global_step - 5), "token_accuracy": 0.0}

    monkeypatch.setattr("stages.train.trainer.AdapterTrainer._measure", measure)
    best_at_end = {"training_arguments": {"load_best_model_at_end": True, "max_steps": 10}}
    out = run(workspace, scratch, eval_steps=evaluate, save_steps=save, **best_at_end)
    assert report(out)["best_step"] == best


def test_parameters_that_exclude_each_other_are_refused(workspace: Workspace, scratch: Path) -> None:
    with pytest.raises(Problem, match=r"train\.gradient_checkpointing: must be false for prefix_tuning: "):
        run(workspace, scratch, method="prefix_tuning", gradient_checkpointing=True)


def test_noise_changes_the_training_and_not_the_validation(
    workspace: Workspace, scratch: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = run(workspace, scratch / "a", **FEW)
    assert "rows are padded" not in capsys.readouterr().out
    noisy = run(workspace, scratch / "b", **few(neftune_noise_alpha=5.0))
    assert "train: rows are padded, not padding-free: neftune_noise_alpha scales its noise by" in capsys.readouterr().out
    assert weights(plain) != weights(noisy)
    before = [report(out)["validation_loss_before"] for out in (plain, noisy)]
    assert before[0] == pytest.approx(before[1], rel=1e-5)


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adafactor", "lion_8bit", "sgd"])
@pytest.mark.parametrize("schedule", ["constant_with_warmup"])
def test_other_optimizers_and_schedules_train(workspace: Workspace, scratch: Path, optim: str, schedule: str) -> None:
    given = {"learning_rate": 1e-3 if optim != "sgd" else 1.0, "lr_scheduler_type": schedule, "warmup_steps": 1}
    found = report(run(workspace, scratch, **FEW, optim=optim, **given))
    assert found["validation_loss"] < found["validation_loss_before"]


def test_one_batch_of_4_rows_trains_as_4_accumulated_batches_of_1(workspace: Workspace, scratch: Path) -> None:
    runs = [
        run(workspace, scratch / "a", **FEW),
        run(workspace, scratch / "b", **FEW, per_device_train_batch_size=1, gradient_accumulation_steps=4),
    ]
    assert report(runs[0])["validation_loss"] == pytest.approx(report(runs[1])["validation_loss"], rel=1e-5)


# Rows


def test_token_rows_are_those_of_the_table(workspace: Workspace) -> None:
    table = read_tokens(workspace.root / INPUTS[0])
    rows = TokenRows(table)
    expected = table.to_pylist()
    assert len(rows) == len(expected)
    for number in (0, 1, len(expected) - 1):
        row = rows[number]
        assert row["id"] == expected[number]["id"]
        assert row["input_ids"].tolist() == expected[number]["input_ids"]
        assert row["labels"].tolist() == expected[number]["labels"]
    assert rows.lengths.tolist() == [len(row["input_ids"]) for row in expected]
    assert rows.label_counts.tolist() == [sum(label != -100 for label in row["labels"]) for row in expected]
    assert rows.label_tokens == sum(rows.label_counts)
    assert rows[len(expected)]["labels"].tolist() == [-100]
    some = TokenRows(table, [1, 4, 5])
    assert [some[number]["id"] for number in range(len(some))] == [expected[number]["id"] for number in (1, 4, 5)]
    assert some.lengths.tolist() == [len(expected[number]["input_ids"]) for number in (1, 4, 5)]
    assert some.label_tokens == sum(label != -100 for number in (1, 4, 5) for label in expected[number]["labels"])
    assert some[3]["labels"].tolist() == [-100]


def test_a_batch_without_a_label_has_no_loss_and_no_gradient(tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    logits, labels = label_logits(model, collate_padded([{"input_ids": [0], "labels": [-100]}]))
    loss = next_token_loss(logits, labels, 7)
    loss.backward()
    assert loss.item() == 0
    assert model.model.layers[0].mlp.up_proj.weight.grad.abs().max() == 0
