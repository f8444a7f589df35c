"""A project folder for the GPU tests, without DVC and git: a tiny model, and tokens of a task that it learns quickly."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from stages.core.tokens import IGNORE, PROMPTS, TRAINING, open_tokens
from stages.generate.generate import Params as GenerateParams
from stages.generate.generate import generate
from stages.merge.merge import Params as MergeParams
from stages.merge.merge import merge
from tests.tiny import PROJECT, ProjectFolder, make_model, params_of_tests, read_params

BOS, STOP = 1, 2
FIRST, LAST = 100, 131
"""An answer counts up from the last token of the prompt to LAST, then stops: answers end at different lengths."""
MODEL = {"hidden_size": 128, "intermediate_size": 256, "initializer_range": 0.05}
"""Widths that the kernel for 4-bit weights takes: multiples of 128. Smaller weights than in other tests, so that the task is
learned and the model then predicts tokens with confidence."""
TRAIN: dict[str, Any] = {
    "per_device_train_batch_size": 16,
    "num_train_epochs": 4,
    "learning_rate": 3e-3,
    "eval_steps": 32,
    "save_steps": 32,
}
"""Parameters of `train` with which the task is learned."""
LONGEST_PROMPT = 200
"""In tokens: a slot of the decoder holds several blocks of 64."""


class Project(ProjectFolder):
    """Has what `train`, `merge` and `generate` read: data/tokens and models/base."""

    def __init__(self, root: Path, *, rows: int = 256, validation_rows: int = 64, prompts: int = 37, **given: Any) -> None:
        super().__init__(root)
        self.base = root / "models" / "base"
        make_model(self.base, **MODEL | given)
        (self.base / "manifest.json").write_text(
            json.dumps({"model": "tiny", "revision": "0", "trust_remote_code": False, "files": {}})
        )
        tokens = root / "data" / "tokens"
        tokens.mkdir(parents=True)
        self.write(params_of_tests())
        draw = random.Random(0)
        self.prompts = list(_prompts(draw, prompts))
        for name, count in (("train", rows), ("validation", validation_rows)):
            _write(tokens / f"{name}.arrow", TRAINING, [_training_row(row) for row in _prompts(draw, count)])
        for name, some in (("test", self.prompts), ("prompts", self.prompts[:3])):
            _write(tokens / f"{name}.arrow", PROMPTS, some)
        _write(tokens / "text.arrow", TRAINING, [text_window(row) for row in self.prompts[:8]])

    def merge(self, out: Path) -> dict[str, Any]:
        """Merges out/adapter into out/merged, with the values of params.yaml. Returns the report."""
        merge(
            MergeParams(**read_params()["merge"]),
            base=self.base,
            adapter=out / "adapter",
            validation_tokens=self.root / "data" / "tokens" / "validation.arrow",
            chat_template=PROJECT / "stages" / "templates" / "chatml.jinja",
            merged=out / "merged",
            report=out / "merge.json",
        ).clean_up()
        report: dict[str, Any] = json.loads((out / "merge.json").read_text())
        return report

    def generate(self, model: Path, out: Path, **given: Any) -> list[dict[str, Any]]:
        """The predictions of a model for the test prompts."""
        tokens = self.root / "data" / "tokens"
        generate(
            GenerateParams(**dict(self.params()["generate"]) | {"max_new_tokens": 40} | given),
            model=model,
            test_prompts=tokens / "test.arrow",
            extra_prompts=tokens / "prompts.arrow",
            test_text=tokens / "text.arrow",
            predictions=out / "predictions.jsonl",
            extra_predictions=out / "extra.jsonl",
            text_losses=out / "text.jsonl",
        ).clean_up()
        return [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]


def _prompts(draw: random.Random, count: int) -> Iterator[dict[str, Any]]:
    for _ in range(count):
        noise = draw.choices(range(LAST + 1, 400), k=draw.randrange(LONGEST_PROMPT - 1))
        ids = [BOS, *noise, draw.randint(FIRST, LAST)]
        yield {"id": f"{draw.getrandbits(64):016x}", "prompt": "", "prompt_ids": ids, "reference": ""}


def text_window(prompt: dict[str, Any]) -> dict[str, Any]:
    """A prompt as a window of raw text: every token but the first has a label."""
    ids = prompt["prompt_ids"]
    return {"id": prompt["id"], "input_ids": ids, "labels": [IGNORE, *ids[1:]]}


def _training_row(prompt: dict[str, Any]) -> dict[str, Any]:
    ids = prompt["prompt_ids"]
    answer = [*range(ids[-1] + 1, LAST + 1), STOP]
    return {"id": prompt["id"], "input_ids": [*ids, *answer], "labels": [IGNORE] * len(ids) + answer}


def _write(path: Path, schema: pa.Schema, rows: list[dict[str, Any]]) -> None:
    with open_tokens(path, schema, [STOP]) as stream:
        stream.write_batch(pa.RecordBatch.from_pylist(rows, schema=schema))
