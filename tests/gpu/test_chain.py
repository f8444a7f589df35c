"""train, merge and generate on a GPU in bfloat16."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from stages.core.tokens import decode_answer
from stages.train import fp8
from tests.gpu.project import STOP, TRAIN, Project
from tests.runs import run

ANSWERS = 20
"""Transformers answers slowly, one prompt at a time."""


def greedy_answers(folder: Path, project: Project, device: torch.device) -> list[list[int]]:
    """The new tokens of each prompt in float32, one prompt at a time, with Transformers' generate."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().to(device)
    answers = []
    for row in project.prompts[:ANSWERS]:
        ids = torch.tensor([row["prompt_ids"]], device=device)
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False, eos_token_id=STOP
        )
        answers.append(out[0, ids.shape[1] :].tolist())
    return answers


@pytest.mark.parametrize(
    "given",
    [
        {"quantization": "nf4"},
        {"quantization": "int8"},
        {"quantization": "none"},
        {"quantization": "nf4", "compute": "fp8"},
    ],
    ids=lambda given: "-".join(map(str, given.values())),
)
def test_the_merged_model_is_the_trained_one_and_answers_like_transformers(
    project: Project, scratch: Path, device: torch.device, capsys: pytest.CaptureFixture[str], given: dict[str, Any]
) -> None:
    if given.get("compute") == "fp8" and fp8.why_unsupported(device):
        pytest.skip(fp8.why_unsupported(device))
    run(project, scratch, dtype="bfloat16", **TRAIN | given)
    said = capsys.readouterr().out
    if device.type == "cuda":
        assert "train: compiled: activations, norms" in said
        assert "train: micro-batches of up to" in said
        assert ("PEFT's slower implementation: Linear8bitLt layers" in said) == (given["quantization"] == "int8")
    report = json.loads((scratch / "report.json").read_text())
    losses = {name: report[name] for name in ("validation_loss_before", "validation_loss")}
    assert losses["validation_loss"] < 0.5 * losses["validation_loss_before"], f"{losses}\n{said}"

    figures = project.merge(scratch)  # raises Problem if it is another model
    assert figures["merged_layers"] == 14
    assert figures["largest_weight_error"] < 0.05, "single weights, by another order of adding or TF32"
    assert figures["mean_kl"] < 4 * max(figures["rounding"]["mean_kl"], 1e-5)
    assert figures["trained_loss"] == pytest.approx(losses["validation_loss"], rel=0.05), "measured on the same rows"

    found = project.generate(scratch / "merged", scratch)
    said = capsys.readouterr().out
    assert "using Transformers' generate" not in said or device.type == "cpu"
    tokenizer = AutoTokenizer.from_pretrained(scratch / "merged")
    wanted = greedy_answers(scratch / "merged", project, device)
    assert len({len(answer) for answer in wanted}) > 5, "answers end at different lengths"
    for row, answer in zip(found[:ANSWERS], wanted, strict=True):
        stopped = answer[-1] == STOP
        assert (row["answer_tokens"], row["finish_reason"]) == (len(answer), "stop" if stopped else "length"), row["id"]
        assert row["answer"] == decode_answer(tokenizer, answer[:-1] if stopped else answer), row["id"]
