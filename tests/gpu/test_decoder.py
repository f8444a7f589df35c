"""The decoder on a GPU against Transformers' generate, in float32."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from stages.generate.backend import Answer, GenerationSettings
from stages.generate.sampling import SamplingConfig
from stages.generate.transformers_backend import TransformersBackend
from tests.gpu.project import Project, text_window

STOPS = range(0, 800, 12)
"""Some tokens, so that answers of a random model end at different lengths; half of them are not in its vocabulary."""
MAX_NEW_TOKENS = 90
"""More than a block of 64 tokens in a slot."""
GREEDY: dict[str, Any] = {"do_sample": False, "temperature": 1.0, "top_p": 1.0, "repetition_penalty": 1.0, "seed": 0}
SAMPLING = GREEDY | {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.3}


@pytest.fixture(scope="module")
def random_project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A model with large weights, whose answers wander."""
    return Project(tmp_path_factory.mktemp("random"), rows=1, validation_rows=1, initializer_range=0.3)


def decode(folder: Path, rows: list[dict[str, Any]], *, slots: int, **sampling: Any) -> list[Answer]:
    settings = GenerationSettings(
        sampling=SamplingConfig(**GREEDY | sampling),
        max_new_tokens=MAX_NEW_TOKENS,
        batch_size=slots,
        dtype="float32",
        num_processes=1,
    )
    backend = TransformersBackend(folder, settings, template_stops=list(STOPS))
    answers = {index: answer for group in backend.generate(rows) for index, answer in group}
    if backend.model.device.type == "cuda":
        assert backend.uses_decoder
    return [answers[index] for index in range(len(rows))]


def generate(folder: Path, rows: list[dict[str, Any]], device: torch.device, **given: Any) -> list[list[int]]:
    """The new tokens of each row, one row at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().to(device)
    vocabulary = model.config.vocab_size
    stops = [token for token in (*STOPS, 2) if token < vocabulary]  # 2 is the model's own
    found = []
    for row in rows:
        ids = torch.tensor([row["prompt_ids"]], device=device)
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=False,
            eos_token_id=stops,
            pad_token_id=0,
            **given,
        )
        found.append(out[0, ids.shape[1] :].tolist())
    return found


def assert_equal(found: list[Answer], wanted: list[list[int]], what: str) -> None:
    wrong = [index for index, (answer, ids) in enumerate(zip(found, wanted, strict=True)) if answer.tokens != ids]
    details = "\n".join(f"row {index}: found {found[index].tokens}, wanted {wanted[index]}" for index in wrong[:3])
    assert not wrong, f"{what}: {len(wrong)} of {len(wanted)} answers differ\n{details}"


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_answers_are_those_of_transformers_generate(random_project: Project, device: torch.device, penalty: float) -> None:
    rows = sorted(random_project.prompts[:24], key=lambda row: len(row["prompt_ids"]))
    wanted = generate(random_project.base, rows, device, repetition_penalty=penalty)
    lengths = {len(answer) for answer in wanted}
    assert len(lengths) > 5, f"answers end at different lengths, found {sorted(lengths)}"
    for slots in (5, 64):  # continuous batching with more rows than slots, and one batch with all rows
        found = decode(random_project.base, rows, slots=slots, repetition_penalty=penalty)
        assert_equal(found, wanted, f"{slots} slots")
        assert [answer.stopped for answer in found] == [ids[-1] in (*STOPS, 2) for ids in wanted]


def test_sampled_answers_depend_on_the_seed_and_not_on_the_batch(random_project: Project) -> None:
    rows = sorted(random_project.prompts[:24], key=lambda row: len(row["prompt_ids"]))
    first = decode(random_project.base, rows, slots=5, **SAMPLING)
    assert decode(random_project.base, rows, slots=5, **SAMPLING) == first, "the same seed"
    assert_equal(decode(random_project.base, rows, slots=64, **SAMPLING), [answer.tokens for answer in first], "64 slots")
    other = decode(random_project.base, rows, slots=5, **SAMPLING | {"seed": 1})
    assert sum(a.tokens != b.tokens for a, b in zip(first, other, strict=True)) > len(rows) // 2


def test_sampled_answers_are_those_of_transformers_generate(
    random_project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = sorted(random_project.prompts[:24], key=lambda row: len(row["prompt_ids"]))[:16]
    found = decode(random_project.base, rows, slots=5, **SAMPLING)
    monkeypatch.setattr(TransformersBackend, "_prepare_decoder", lambda *_: False)
    settings = GenerationSettings(SamplingConfig(**SAMPLING), MAX_NEW_TOKENS, 1, "float32", 1)
    backend = TransformersBackend(random_project.base, settings, template_stops=list(STOPS))
    wanted = {index: answer.tokens for group in backend.generate(rows) for index, answer in group}
    assert_equal(found, [wanted[index] for index in range(len(rows))], "sampling")


def test_the_losses_of_raw_text_are_those_of_single_windows(random_project: Project, device: torch.device) -> None:
    windows = [text_window(row) for row in random_project.prompts[:8]]
    settings = GenerationSettings(SamplingConfig(**GREEDY), MAX_NEW_TOKENS, 8, "float32", 1)
    found = TransformersBackend(random_project.base, settings, template_stops=[]).text_losses(windows)
    model = AutoModelForCausalLM.from_pretrained(random_project.base, dtype=torch.float64).eval().to(device)
    wanted = []
    for window in windows:
        ids = torch.tensor([window["input_ids"]], device=device)
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1]
        wanted.append(float(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum")))
    assert found == pytest.approx(wanted, rel=1e-4), "float32 logits of up to 50"
