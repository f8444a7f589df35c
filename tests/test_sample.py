"""The sample in data/raw is what its generator writes, and a lookup of the nearest prompt does not solve it."""

import json
from pathlib import Path

import numpy as np

from stages.score.nearest import PromptIndex, find_pairs
from tests.tiny import PROJECT, sample


def test_the_generator_writes_the_committed_bytes(tmp_path: Path) -> None:
    sample().main(tmp_path)
    for name in ("zh.json", "en.json"):
        assert (tmp_path / name).read_bytes() == (PROJECT / "data" / "raw" / name).read_bytes()


def test_two_thirds_of_the_rows_are_chinese_and_every_answer_is_a_json_object() -> None:
    module = sample()
    assert 0.6 < module.ROWS["zh"] / sum(module.ROWS.values()) < 0.7
    for language in module.ROWS:
        rows = module.rows(language)
        assert len({row["input"] for row in rows}) == len(rows) == module.ROWS[language]
        for row in rows:
            answer = json.loads(row["output"])
            assert {"intent", "item", "count"} <= set(answer) <= {"intent", "item", "count", "city"}
            assert str(answer["item"]) in row["input"] or str(answer["item"]).capitalize() in row["input"]


def test_the_nearest_prompt_rarely_has_the_right_answer() -> None:
    rows = sample().rows("zh")
    known, queries = rows[:700], rows[700:]
    questions = find_pairs([row["input"] for row in queries])
    nearest = PromptIndex([row["input"] for row in known]).improve(questions, np.zeros(len(queries))).number
    assert (nearest >= 0).all()
    correct = sum(known[number]["output"] == row["output"] for number, row in zip(nearest, queries, strict=True))
    assert correct / len(queries) < 0.1
