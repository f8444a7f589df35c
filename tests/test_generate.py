"""generate: an answer depends on its prompt alone, and says why it ended."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from stages.generate import Params, generate
from stages.lib.tokens import PROMPTS, open_tokens, read_tokens
from tests.tiny import Workspace

PARAMS = {
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
    prompts = workspace.root / "data" / "tokens" / "test.arrow"
    if rows is not None:
        prompts = out.with_suffix(".arrow")
        with open_tokens(prompts, PROMPTS, [2]) as stream:
            stream.write_batch(pa.RecordBatch.from_pylist(rows, schema=PROMPTS))
    generate(Params(**PARAMS | given), workspace.root / "models" / "merged", prompts, out)
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
    import torch
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


@pytest.mark.parametrize("field", ["max_new_tokens", "batch_size", "temperature", "top_p"])
def test_senseless_settings_are_refused(field: str) -> None:
    with pytest.raises(ValueError, match=field):
        Params(**PARAMS | {field: 0})
