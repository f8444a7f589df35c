"""generate: an answer depends on its prompt alone, and says why it ended."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

import stages.generate as module
from stages.generate import TUTORIAL, Params, generate
from stages.lib.problem import Problem
from stages.lib.sampling import RowSampler
from stages.lib.tokens import PROMPTS, open_tokens, read_tokens
from tests.tiny import Workspace

PARAMS: dict[str, Any] = {
    "preset": "own",
    "max_new_tokens": 8,
    "do_sample": False,
    "temperature": 0.5,
    "top_p": 0.85,
    "repetition_penalty": 1.0,
    "seed": 0,
    "batch_size": 4,
    "dtype": "float32",
}


def answer(workspace: Workspace, out: Path, rows: list[dict[str, Any]] | None = None, **given: Any) -> list[dict[str, Any]]:
    tokens = workspace.root / "data" / "tokens"
    prompts = tokens / "test.arrow"
    if rows is not None:
        prompts = out.with_suffix(".arrow")
        with open_tokens(prompts, PROMPTS, [2]) as stream:
            stream.write_batch(pa.RecordBatch.from_pylist(rows, schema=PROMPTS))
    extra = out.with_suffix(".extra.jsonl")
    generate(Params(**PARAMS | given), workspace.root / "models" / "merged", prompts, tokens / "prompts.arrow", out, extra)
    assert [json.loads(line)["id"] for line in extra.read_text().splitlines()] == ["prompt-1", "prompt-2", "prompt-3"]
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


def test_batch_size_and_order_change_no_answer(workspace: Workspace, tmp_path: Path) -> None:
    rows = read_tokens(workspace.root / "data" / "tokens" / "test.arrow").to_pylist()
    assert len({len(row["prompt_ids"]) for row in rows}) > 3
    together = answer(workspace, tmp_path / "a.jsonl", rows, batch_size=16)
    alone = answer(workspace, tmp_path / "b.jsonl", rows, batch_size=1)
    backwards = answer(workspace, tmp_path / "c.jsonl", rows[::-1], batch_size=3)
    assert together == alone == backwards[::-1]
    assert [row["id"] for row in together] == [row["id"] for row in rows]
    assert len({row["answer"] for row in together}) > 1


def test_an_answer_is_the_greedy_continuation_token_by_token(workspace: Workspace, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    merged = workspace.root / "models" / "merged"
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(merged)
    rows = read_tokens(workspace.root / "data" / "tokens" / "test.arrow").to_pylist()[:3]
    for row, found in zip(rows, answer(workspace, tmp_path / "a.jsonl", rows), strict=True):
        ids: list[int] = list(row["prompt_ids"])
        while (len(ids) < len(row["prompt_ids"]) + 8 and ids[-1] != 2) or len(ids) == len(row["prompt_ids"]):
            with torch.no_grad():
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        new = ids[len(row["prompt_ids"]) :]
        assert found["answer_tokens"] == len(new)
        assert found["finish_reason"] == ("stop" if new[-1] == 2 else "length")
        assert found["answer"] == tokenizer.decode(new, skip_special_tokens=True)
        assert (found["prompt"], found["reference"]) == (row["prompt"], row["reference"])


def test_sampling_is_repeatable_and_follows_its_seed(workspace: Workspace, tmp_path: Path) -> None:
    given = {"do_sample": True, "temperature": 5.0, "top_p": 1.0}
    first = answer(workspace, tmp_path / "a.jsonl", **given)
    assert answer(workspace, tmp_path / "b.jsonl", **given) == first
    assert answer(workspace, tmp_path / "c.jsonl", **given, seed=1) != first


def test_a_drawn_answer_does_not_depend_on_its_neighbours(workspace: Workspace, tmp_path: Path) -> None:
    rows = read_tokens(workspace.root / "data" / "tokens" / "test.arrow").to_pylist()
    given = {"do_sample": True, "temperature": 2.0, "top_p": 0.95}
    together = answer(workspace, tmp_path / "a.jsonl", rows, batch_size=16, **given)
    assert answer(workspace, tmp_path / "b.jsonl", rows, batch_size=1, **given) == together
    assert answer(workspace, tmp_path / "c.jsonl", rows[:3], batch_size=3, **given) == together[:3]
    assert len({row["answer"] for row in together}) > len(rows) // 2


def test_draws_follow_the_distribution() -> None:
    scores = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).log_softmax(-1)
    wanted = torch.nn.functional.softmax(scores / 0.7, -1)[0]
    sampler = RowSampler(["x"], 0.7, 1.0, torch.device("cpu"))
    drawn = torch.stack([sampler(torch.zeros(1, 1, dtype=torch.long), scores).argmax(-1) for _ in range(20_000)])
    shares = torch.bincount(drawn.flatten(), minlength=4) / len(drawn)
    torch.testing.assert_close(shares, wanted, atol=0.015, rtol=0)
    cut = RowSampler(["x"], 0.7, 0.5, torch.device("cpu"))
    assert {int(cut(torch.zeros(1, 1, dtype=torch.long), scores).argmax(-1)) for _ in range(200)} == {0}


def test_the_tutorials_settings_have_a_name(workspace: Workspace, tmp_path: Path) -> None:
    rows = read_tokens(workspace.root / "data" / "tokens" / "test.arrow").to_pylist()[:2]
    given = TUTORIAL | {"max_new_tokens": 1024}
    assert TUTORIAL == {
        "do_sample": True,
        "temperature": 0.5,
        "top_p": 0.85,
        "repetition_penalty": 2.0,
        "max_new_tokens": 1024,
    }
    prompt = {name: value[-1:] if name == "prompt_ids" else value for name, value in rows[0].items()}
    named = answer(workspace, tmp_path / "a.jsonl", [prompt], preset="tutorial")
    assert named == answer(workspace, tmp_path / "b.jsonl", [prompt], **given)


# Interrupted, and short of memory


def test_a_killed_run_goes_on_behind_the_last_batch_and_ends_in_the_same_bytes(
    workspace: Workspace, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer(workspace, scratch / "whole.jsonl")
    calls: list[int] = []
    batch = module._Answerer.answer

    def killed(self: Any, rows: Any) -> Any:
        calls.append(len(rows))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return batch(self, rows)

    monkeypatch.setattr(module._Answerer, "answer", killed)
    with pytest.raises(KeyboardInterrupt):
        answer(workspace, scratch / "out.jsonl")
    assert not (scratch / "out.jsonl").exists()
    (kept,) = (scratch / ".checkpoints").glob("generate-*.jsonl")
    assert len(kept.read_bytes().splitlines()) == 2
    with kept.open("ab") as file:
        file.write(b"[[0, [1, 2")  # a batch that was being written
    calls.clear()
    with pytest.raises(KeyboardInterrupt):  # other parameters begin anew
        answer(workspace, scratch / "other.jsonl", max_new_tokens=7)
    calls.extend([0] * 9)
    first = len(calls)
    answer(workspace, scratch / "out.jsonl")
    assert len(calls) - first == len(set(_numbers(kept, workspace)))
    assert (scratch / "out.jsonl").read_bytes() == (scratch / "whole.jsonl").read_bytes()
    assert not kept.exists()


def _numbers(kept: Path, workspace: Workspace) -> range:
    """The batches that were left: all but two."""
    count = len(read_tokens(workspace.root / "data" / "tokens" / "test.arrow")) + 3
    return range(-(-count // 4) - 2)


def test_a_batch_that_is_too_large_is_halved(workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = answer(workspace, tmp_path / "a.jsonl")
    sizes, real = [], module._Answerer._answer

    def small(self: Any, rows: Any) -> Any:
        sizes.append(len(rows))
        if len(rows) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(self, rows)

    monkeypatch.setattr(module._Answerer, "_answer", small)
    assert answer(workspace, tmp_path / "b.jsonl", batch_size=8) == wanted
    assert {8, 4, 2} <= set(sizes)

    def none(self: Any, rows: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(module._Answerer, "_answer", none)
    with pytest.raises(Problem, match=r"out of memory on a single prompt, [\w-]+ with \d+ tokens"):
        answer(workspace, tmp_path / "c.jsonl")


@pytest.mark.parametrize("field", ["max_new_tokens", "batch_size", "temperature", "top_p"])
def test_senseless_settings_are_refused(field: str) -> None:
    with pytest.raises(ValueError, match=field):
        Params(**PARAMS | {field: 0})
