"""Answers every test prompt, and the prompts of data/prompts.json, with one model."""

import json
import os
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from pydantic import Field
from transformers import AutoTokenizer, GenerationConfig, LogitsProcessorList
from transformers.utils import logging

from stages.lib.decode import Decoder, can_decode
from stages.lib.device import DtypeName
from stages.lib.fused import fuse
from stages.lib.jsonl import read_json, write_jsonl
from stages.lib.model import load_model
from stages.lib.output import fresh_file
from stages.lib.params import Section
from stages.lib.problem import Problem
from stages.lib.provenance import fingerprint, inputs_of
from stages.lib.sampling import Choice, RowSampler
from stages.lib.tokens import read_tokens, stop_token_ids

TUTORIAL = {
    "do_sample": True,
    "temperature": 0.5,
    "top_p": 0.85,
    "repetition_penalty": 2.0,
    "max_new_tokens": 1024,
}


class Params(Section):
    """How answers are drawn. GenerationConfig's names."""

    preset: Literal["own", "tutorial"]
    """own: the values below; tutorial: temperature 0.5, top_p 0.85, repetition_penalty 2.0, max_new_tokens 1024, sampled."""
    max_new_tokens: int = Field(gt=0)
    """An answer that is longer is cut there, and counted as not stopped."""
    do_sample: bool
    """false: always the likeliest token (greedy); true: drawn at random, with the three values below."""
    temperature: float = Field(gt=0)
    """Sampling: below 1, likely tokens become likelier."""
    top_p: float = Field(gt=0, le=1)
    """Sampling: only the likeliest tokens that together have this probability."""
    repetition_penalty: float = Field(gt=0)
    """Above 1, tokens that already stand in the text become less likely; 1 leaves them alone."""
    seed: int
    """Sampling: another seed draws other answers."""
    batch_size: int = Field(gt=0)
    """Prompts answered at once; halved where the memory does not suffice."""
    dtype: DtypeName
    """The type that the model computes in; auto is bfloat16 where the hardware has it, else float32."""


def generate(params: Params, model: Path, prompts: Path, extra: Path, predictions: Path, extra_predictions: Path) -> None:
    """Writes a row for each prompt, in their order: those of `prompts` to `predictions`, of `extra` to `extra_predictions`.

    A row: {"id", "prompt", "reference", "answer", "finish_reason": "stop" or "length", "prompt_tokens", "answer_tokens"}.
    The prompts come tokenized from `encode`, so this stage knows no template. An answer depends on its own prompt and row
    alone, not on those beside it. A run that is killed goes on behind the last batch that it answered.

    Raises Problem if the memory does not suffice for one prompt.
    """
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    read = inputs_of("generate", params.model_dump(), {path.name: path for path in (model, prompts, extra)}, Path())
    finished = _Finished(fingerprint(read))
    tables = [read_tokens(prompts), read_tokens(extra)]
    rows = [row for table in tables for row in table.to_pylist()]
    answerer = _Answerer(params, model, stop_token_ids(tables[0]))
    answers = finished.answers
    left = sorted((number for number in range(len(rows)) if number not in answers), key=lambda n: len(rows[n]["prompt_ids"]))
    for found in answerer.answers([rows[number] for number in left]):
        finished.add([(left[number], tokens) for number, tokens in found])
        print(f"generate: {model.name}: {len(answers)}/{len(rows)} prompts", flush=True)
    done = [answerer.row(row, answers[number]) for number, row in enumerate(rows)]
    with fresh_file(predictions) as file, fresh_file(extra_predictions) as extra_file:
        write_jsonl(file, done[: len(tables[0])])
        write_jsonl(extra_file, done[len(tables[0]) :])
    finished.remove()


TOO_LITTLE = "out of memory on a single prompt"
REMEDY = "lower generate.max_new_tokens, or use a GPU with more memory"


class _Finished:
    """The answers so far, kept beside the outputs until all are there; only a run that reads the very same takes them up."""

    def __init__(self, name: str) -> None:
        self.path = Path(os.environ.get("DVC_ROOT", ".")) / ".checkpoints" / f"generate-{name}.jsonl"
        self.answers: dict[int, list[int]] = {}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        whole = b""
        for line in self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else ():
            if not line.endswith(b"\n"):
                break  # a batch that was being written
            whole += line
            self.answers |= dict(json.loads(line))
        self.path.write_bytes(whole)

    def add(self, batch: Any) -> None:
        """Keeps the answers of a batch, (number, tokens) each."""
        pairs = list(batch)
        self.answers |= pairs
        with self.path.open("ab") as file:
            file.write(json.dumps(pairs).encode() + b"\n")

    def remove(self) -> None:
        self.path.unlink()


class _Answerer:
    """A loaded model with its stop tokens and generation settings."""

    def __init__(self, params: Params, folder: Path, stops: list[int]) -> None:
        trust = read_json(folder / "manifest.json")["trust_remote_code"]
        self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
        self.model = load_model(folder, params.dtype)
        # Virtual tokens stand before the padding, and PEFT then counts the padding as positions.
        self.padded = not isinstance(self.model, PeftModel)
        default = self.model.generation_config.eos_token_id
        defaults = default if isinstance(default, list) else [default]
        # The template's stop tokens, and those that the model itself came with.
        self.stops = sorted({token for token in [*stops, *defaults] if token is not None})
        self.params = params.model_copy(update=TUTORIAL) if params.preset == "tutorial" else params
        self.choice = Choice(**self.params.model_dump(include=set(Choice._fields)))
        self.config = GenerationConfig(
            max_new_tokens=self.params.max_new_tokens,
            do_sample=False,  # RowSampler leaves each row one token to choose
            eos_token_id=self.stops or None,
            pad_token_id=0,
        )
        # What the folder's own generation config says about sampling must not mix with params.yaml.
        self.model.generation_config = self.config

    def answers(self, rows: Sequence[dict[str, Any]]) -> Iterator[list[tuple[int, list[int]]]]:
        """The rows' numbers and their new tokens, the stop token included if there is one, as they are finished.

        Raises Problem if the memory does not suffice for one row.
        """
        if self.model.device.type == "cuda" and self.padded and rows and can_decode(self.model):
            fuse(self.model)
            yield from self._decoded(rows)
        else:
            yield from self._generated(rows)

    def _decoded(self, rows: Sequence[dict[str, Any]]) -> Iterator[list[tuple[int, list[int]]]]:
        """With lib/decode.py."""
        prompts = [row["prompt_ids"] for row in rows]
        decoder = self._decoder(min(self.params.batch_size, len(rows)), max(map(len, prompts)), rows[0]["id"])
        for finished in decoder.answers(prompts, [row["id"] for row in rows]):
            yield [(number, self._cut(tokens)) for number, tokens in finished]

    def _decoder(self, slots: int, longest: int, name: str) -> Decoder:
        while True:
            try:
                new = self.params.max_new_tokens
                return Decoder(self.model, self.choice, self.stops, slots, longest, new, recorded=True)
            except torch.OutOfMemoryError:
                if slots == 1:
                    raise Problem(f"{TOO_LITTLE}, {name} with {longest} tokens; {REMEDY}") from None
            torch.cuda.empty_cache()
            slots //= 2

    def _generated(self, rows: Sequence[dict[str, Any]]) -> Iterator[list[tuple[int, list[int]]]]:
        """With Transformers' generate, in batches of like length: little padding, or none where a model takes none."""
        lengths = [len(row["prompt_ids"]) for row in rows]
        for _, group in groupby(range(len(rows)), key=lambda number: 0 if self.padded else lengths[number]):
            numbers = list(group)
            for start in range(0, len(numbers), self.params.batch_size):
                batch = numbers[start : start + self.params.batch_size]
                yield list(zip(batch, self._batch([rows[number] for number in batch]), strict=True))

    def _batch(self, rows: Sequence[dict[str, Any]]) -> list[list[int]]:
        try:
            return self._generate(rows)
        except torch.OutOfMemoryError:
            if len(rows) == 1:
                raise Problem(f"{TOO_LITTLE}, {rows[0]['id']} with {len(rows[0]['prompt_ids'])} tokens; {REMEDY}") from None
        torch.cuda.empty_cache()
        half = len(rows) // 2
        return [*self._batch(rows[:half]), *self._batch(rows[half:])]

    def _generate(self, rows: Sequence[dict[str, Any]]) -> list[list[int]]:
        prompts = [row["prompt_ids"] for row in rows]
        width = max(map(len, prompts))
        # Padded on the left: generation goes on from the last position.
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=self.model.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=self.model.device)
        names = [row["id"] for row in rows]
        sampler = RowSampler(self.choice, names, prompts, self.model.device)
        with torch.no_grad():
            output = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=self.config,
                logits_processor=LogitsProcessorList([sampler]),
            )
        return [self._cut(new) for new in output[:, width:].tolist()]

    def _cut(self, new: list[int]) -> list[int]:
        """Up to and with the first stop token; behind it there is only padding."""
        end = next((number for number, token in enumerate(new) if token in self.stops), len(new) - 1)
        return new[: end + 1]

    def row(self, prompt: dict[str, Any], new: list[int]) -> dict[str, Any]:
        stopped = new[-1:] != [] and new[-1] in self.stops
        return {
            "id": prompt["id"],
            "prompt": prompt["prompt"],
            "reference": prompt["reference"],
            "answer": self.tokenizer.decode(new[:-1] if stopped else new, skip_special_tokens=True),
            "finish_reason": "stop" if stopped else "length",
            "prompt_tokens": len(prompt["prompt_ids"]),
            "answer_tokens": len(new),
        }
