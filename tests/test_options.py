"""train's options: own losses, weights and smoothing, any TrainingArguments, the best checkpoint, noise, bad values."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, TrainingArguments

from stages.core.problem import Problem
from stages.core.tokens import TokenRows, read_tokens
from stages.model.collate import collate_padded
from stages.model.logits import label_logits
from stages.train.arguments import OWNED, field_names, read_further
from stages.train.loss import load_loss, next_token_loss
from stages.train.train import OURS
from tests.runs import INPUTS, params, run
from tests.tiny import PROJECT, Workspace

CROSS_ENTROPY = PROJECT / "stages" / "losses" / "cross_entropy.py"
FEW = {"training_arguments": {"max_steps": 4}}


def report(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "report.json").read_text())
    return found


def weights(out: Path) -> bytes:
    return (out / "adapter" / "adapter_model.safetensors").read_bytes()


# Loss


LOGITS = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([1, 1, 3, 6, 0])


def test_the_default_loss_is_cross_entropy_over_the_labels_of_the_step() -> None:
    loss = load_loss(CROSS_ENTROPY, 7, {}, 0.0)
    torch.testing.assert_close(loss(LOGITS, LABELS, 5), torch.nn.functional.cross_entropy(LOGITS, LABELS))
    torch.testing.assert_close(loss(LOGITS, LABELS, 10), torch.nn.functional.cross_entropy(LOGITS, LABELS) / 2)


def test_weights_and_smoothing_count_as_in_torch() -> None:
    weight = torch.tensor([1.0, 3.0, 1, 0.5, 1, 1, 1])
    loss = load_loss(CROSS_ENTROPY, 7, {1: 3.0, 3: 0.5}, 0.1)
    wanted = torch.nn.functional.cross_entropy(LOGITS, LABELS, weight=weight, label_smoothing=0.1, reduction="sum") / 5
    torch.testing.assert_close(loss(LOGITS, LABELS, 5), wanted)
    by_hand = -(LOGITS.log_softmax(-1)[range(5), LABELS] * weight[LABELS]).sum() / 5
    torch.testing.assert_close(load_loss(CROSS_ENTROPY, 7, {1: 3.0, 3: 0.5}, 0.0)(LOGITS, LABELS, 5), by_hand)


def test_smoothing_is_transformers_own(tiny_model: Path) -> None:
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


def test_a_loss_of_ones_own_trains(workspace: Workspace, scratch: Path) -> None:
    (scratch / "focal.py").write_text(OWN)
    own = run(workspace, scratch / "own", **FEW, loss=str(scratch / "focal.py"))
    usual = run(workspace, scratch / "usual", **FEW)
    assert weights(own) != weights(usual)
    assert report(own)["validation_loss"] < report(own)["validation_loss_before"]
    assert report(own)["validation_loss_before"] == report(usual)["validation_loss_before"]  # measured as ever
    smooth = run(workspace, scratch / "smooth", **FEW, label_smoothing_factor=0.1, label_weights={2: 4.0})
    assert weights(smooth) not in (weights(own), weights(usual))


@pytest.mark.parametrize(
    ("text", "given", "said"),
    [
        (None, {}, r"train\.loss: .*own\.py: not found"),
        ("def loss(:", {}, r"own\.py: cannot be imported: SyntaxError"),
        ("import no_such_module", {}, r"cannot be imported: ModuleNotFoundError: No module named 'no_such_module'"),
        ("loss = 3", {}, "has no function `loss`; stages/losses/cross_entropy.py shows"),
        (OWN, {"label_smoothing_factor": 0.1}, r"train\.label_smoothing_factor: the loss in .* does not take it"),
        (OWN, {"label_weights": {1: 2.0}}, r"train\.label_weights: the loss in .* does not take it"),
        (OWN, {"label_weights": {400: 2.0, -1: 1.0}}, r"train\.label_weights: 400, -1: no such token; there are 400"),
    ],
)
def test_a_loss_that_cannot_be_used_is_one_message(tmp_path: Path, text: str | None, given: Any, said: str) -> None:
    if text is not None:
        (tmp_path / "own.py").write_text(text)
    settings = {"label_weights": {}, "label_smoothing_factor": 0.0} | given
    with pytest.raises(Problem, match=said):
        load_loss(tmp_path / "own.py", 400, **settings)


# TrainingArguments


def test_fields_of_training_arguments_come_in_their_own_types() -> None:
    given = {
        "adam_beta2": 0.95,
        "max_steps": 7,
        "optim_args": "rank=4",
        "dataloader_num_workers": 0,
        "torch_compile": False,
        "lr_scheduler_kwargs": {"num_cycles": 2},
        "optim_target_modules": ["q_proj", "v_proj"],
    }
    read = read_further({}, given)
    assert read["adam_beta2"] == 0.95
    assert read["max_steps"] == 7
    assert read["torch_compile"] is False
    assert read["optim_target_modules"] == ["q_proj", "v_proj"]
    arguments = TrainingArguments(output_dir="x", use_cpu=True, **read)
    assert arguments.lr_scheduler_kwargs == {"num_cycles": 2}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {"adam_beta22": 0.95},
            r"training_arguments\.adam_beta22: no field .*; did you mean 'adam_beta2'\?",
        ),
        ({"max_steps": "many"}, r"training_arguments\.max_steps: found 'many': argument --max_steps.*invalid int value"),
        ({"learning_rate": 1e-4}, r"training_arguments\.learning_rate: has a parameter of its own, train\.learning_rate"),
        ({"output_dir": "x"}, r"training_arguments\.output_dir: not to be set here: paths and names are the pipeline's"),
        ({"bf16": True}, r"training_arguments\.bf16: not to be set here: set train\.dtype"),
    ],
)
def test_other_fields_are_answered_with_the_reason(workspace: Workspace, given: dict[str, Any], said: str) -> None:
    with pytest.raises(Problem, match=said):
        read_further(params(workspace).model_dump(), given)


def test_all_that_is_wrong_is_said_at_once(workspace: Workspace) -> None:
    with pytest.raises(Problem) as caught:
        read_further(params(workspace).model_dump(), {"seed": 1, "max_step": 3, "report_to": "wandb", "adam_beta1": "x"})
    assert len(caught.value.messages) == 4


def test_every_field_is_a_parameter_refused_or_may_be_set(workspace: Workspace) -> None:
    own = set(params(workspace).model_dump())
    free = set(field_names()) - own - OWNED.keys()
    assert {"adam_beta1", "adam_epsilon", "max_steps", "torch_compile", "lr_scheduler_kwargs", "use_liger_kernel"} <= free
    assert not {name for name in free if name.startswith(("hub_", "eval_do", "save_", "fsdp", "log_", "trackio"))}
    assert not own & OWNED.keys()
    assert own >= set(OURS)


def test_a_further_field_reaches_the_training(workspace: Workspace, scratch: Path) -> None:
    out = run(workspace, scratch, training_arguments={"max_steps": 3, "adam_beta1": 0.5})
    assert report(out)["steps"] == 3
    other = run(workspace, scratch / "other", training_arguments={"max_steps": 3})
    assert weights(out) != weights(other)


# Options


def test_the_best_checkpoint_is_kept_and_a_run_that_gets_worse_stops(workspace: Workspace, scratch: Path) -> None:
    given = {"eval_steps": 2, "save_steps": 2, "num_train_epochs": 6, "learning_rate": 3e-2, "lr_scheduler_type": "constant"}
    out = run(workspace, scratch, load_best_model_at_end=True, early_stopping_patience=2, **given)
    found = report(out)
    curve = [line.split(",") for line in (out / "loss" / "validation.csv").read_text().splitlines()[1:]]
    losses = {int(step): float(loss) for step, loss in curve if step != "0"}
    best = min(losses, key=lambda step: losses[step])
    assert found["best_step"] == best
    assert found["validation_loss"] == pytest.approx(losses[best], rel=1e-6)
    assert found["steps"] == best + 4, "two validations without a better loss"
    assert found["steps"] < 6 * -(-found["rows"] // 4)


def test_the_best_of_checkpoints_needs_a_loss_for_each(workspace: Workspace, scratch: Path) -> None:
    with pytest.raises(Problem, match=r"train\.save_steps: 3 is no multiple of train\.eval_steps, 2; load_best"):
        run(workspace, scratch, load_best_model_at_end=True, eval_steps=2, save_steps=3)
    with pytest.raises(Problem, match=r"train\.gradient_checkpointing: must be false for prefix_tuning: "):
        run(workspace, scratch, method="prefix_tuning", gradient_checkpointing=True)


def test_noise_changes_the_training_and_not_the_measure(workspace: Workspace, scratch: Path) -> None:
    plain, noisy = run(workspace, scratch / "a", **FEW), run(workspace, scratch / "b", **FEW, neftune_noise_alpha=5.0)
    assert weights(plain) != weights(noisy)
    before = [report(out)["validation_loss_before"] for out in (plain, noisy)]
    assert before[0] == pytest.approx(before[1], rel=1e-5)


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adafactor", "lion_8bit", "sgd"])
@pytest.mark.parametrize("schedule", ["constant_with_warmup"])
def test_other_optimizers_and_schedules_train(workspace: Workspace, scratch: Path, optim: str, schedule: str) -> None:
    given = {"learning_rate": 1e-3 if optim != "sgd" else 1.0, "lr_scheduler_type": schedule, "warmup_steps": 1}
    found = report(run(workspace, scratch, **FEW, optim=optim, **given))
    assert found["validation_loss"] < found["validation_loss_before"]


def test_batches_of_4_and_4_accumulated_ones_of_1_train_the_same(workspace: Workspace, scratch: Path) -> None:
    runs = [
        run(workspace, scratch / "a", **FEW),
        run(workspace, scratch / "b", **FEW, per_device_train_batch_size=1, gradient_accumulation_steps=4),
    ]
    assert report(runs[0])["validation_loss"] == pytest.approx(report(runs[1])["validation_loss"], rel=1e-5)


# Rows


def test_rows_are_read_as_they_are_asked_for(workspace: Workspace) -> None:
    table = read_tokens(workspace.root / INPUTS[0])
    rows = TokenRows(table)
    wanted = table.to_pylist()
    assert len(rows) == len(wanted)
    for number in (0, 1, len(wanted) - 1):
        row = rows[number]
        assert row["id"] == wanted[number]["id"]
        assert row["input_ids"].tolist() == wanted[number]["input_ids"]
        assert row["labels"].tolist() == wanted[number]["labels"]
    assert rows.lengths.tolist() == [len(row["input_ids"]) for row in wanted]
    assert rows.label_tokens == sum(label != -100 for row in wanted for label in row["labels"])
    assert rows[len(wanted)]["labels"].tolist() == [-100]


def test_a_batch_without_a_label_has_no_loss_and_no_gradient(tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    logits, labels = label_logits(model, collate_padded([{"input_ids": [0], "labels": [-100]}]))
    loss = next_token_loss(logits, labels, 7)
    loss.backward()
    assert loss.item() == 0
    assert model.model.layers[0].mlp.up_proj.weight.grad.abs().max() == 0
