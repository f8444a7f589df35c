"""The Arrow files of data/tokens open with Hugging Face's `datasets` as they are."""

from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest

from stages.core.tokens import PROMPTS, TRAINING, choose_rows, open_tokens, read_tokens
from tests.tiny import Workspace

ROWS: list[tuple[pa.Schema, list[dict[str, Any]]]] = [
    (TRAINING, [{"id": "一", "input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, {"id": "b", "input_ids": [], "labels": []}]),
    (PROMPTS, [{"id": "c", "prompt": "q", "prompt_ids": [1], "reference": "答"}]),
]


@pytest.mark.parametrize(("schema", "rows"), ROWS, ids=["training", "prompts"])
def test_a_file_of_tokens_is_a_dataset(tmp_path: Path, schema: pa.Schema, rows: list[dict[str, Any]]) -> None:
    complete = [{name: row.get(name) for name in schema.names} for row in rows]
    path = tmp_path / "x.arrow"
    with open_tokens(path, schema, [2]) as stream:
        for row in complete:
            stream.write_batch(pa.RecordBatch.from_pylist([row], schema=stream_schema(schema)))
    opened = datasets.Dataset.from_file(str(path))
    assert list(opened) == complete
    assert opened.column_names == schema.names
    assert [path.name for path in tmp_path.iterdir()] == ["x.arrow"]


def stream_schema(schema: pa.Schema) -> pa.Schema:
    return schema.with_metadata({"stop_token_ids": "2"})


@pytest.mark.parametrize("name", ["train", "validation", "test", "prompts"])
def test_what_encode_writes_is_a_dataset(workspace: Workspace, name: str) -> None:
    path = workspace.root / "data" / "tokens" / f"{name}.arrow"
    opened = datasets.Dataset.from_file(str(path))
    assert len(opened) > 0 or name == "prompts"
    assert list(opened) == read_tokens(path).to_pylist()
    if name in ("train", "validation"):
        assert opened.features["input_ids"] == opened.features["labels"] == datasets.List(datasets.Value("int32"))
        tensors = opened.with_format("torch")[0]
        assert tensors["input_ids"].shape == tensors["labels"].shape


def test_chosen_rows_are_stable_and_spread() -> None:
    ids = [f"row {number}" for number in range(1000)]
    chosen = {ids[index] for index in choose_rows(ids, 100)}
    assert len(chosen) == 100
    assert choose_rows(ids, 100) == sorted(choose_rows(ids, 100))
    assert 30 < sum(index < 500 for index in choose_rows(ids, 100)) < 70  # not the first ones
    assert {ids[::-1][index] for index in choose_rows(ids[::-1], 100)} == chosen  # the order of the rows does not matter
    more = [*ids, *(f"new {number}" for number in range(1000))]
    kept = {more[index] for index in choose_rows(more, 100)}
    assert kept - chosen == {name for name in kept if name.startswith("new")}
    assert 30 < len(kept & chosen) < 70
    assert choose_rows(ids, 0) == choose_rows(ids, 1000) == choose_rows(iter(ids), 2000) == list(range(1000))
    assert choose_rows(iter(ids), 100) == choose_rows(ids, 100)
