"""Answers every test prompt with one model."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from pydantic import Field
from transformers import AutoTokenizer, GenerationConfig, set_seed
from transformers.utils import logging

from stages.lib.device import DtypeName
from stages.lib.jsonl import read_json, write_jsonl
from stages.lib.model import load_model
from stages.lib.output import fresh_file
from stages.lib.params import Section
from stages.lib.tokens import read_tokens, stop_token_ids


class Params(Section):
    """How answers are drawn. GenerationConfig's names."""

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
    """Prompts answered at once."""
    dtype: DtypeName
    """The type that the model computes in; auto is bfloat16 where the hardware has it, else float32."""


def generate(params: Params, model: Path, prompts: Path, predictions: Path) -> None:
    """Writes a row for each prompt, in their order, to `predictions`.

    A row: {"id", "prompt", "reference", "answer", "finish_reason": "stop" or "length", "prompt_tokens", "answer_tokens"}.
    The prompts come tokenized from `encode`, so this stage knows no template.
    """
    logging.disable_progress_bar()
    table = read_tokens(prompts)
    rows = table.to_pylist()
    answerer = _Answerer(params, model, stop_token_ids(table))
    answers: dict[int, list[int]] = {}
    for numbers in _batches([len(row["prompt_ids"]) for row in rows], params.batch_size, padded=answerer.padded):
        new = answerer.answer([rows[number]["prompt_ids"] for number in numbers])
        answers |= zip(numbers, new, strict=True)
        print(f"generate: {model.name}: {len(answers)}/{len(rows)} prompts", flush=True)
    with fresh_file(predictions) as file:
        write_jsonl(file, (answerer.row(row, answers[number]) for number, row in enumerate(rows)))


def _batches(lengths: Sequence[int], size: int, *, padded: bool) -> Iterator[list[int]]:
    """The numbers of the prompts, in batches of like length: little padding, or none."""
    order = sorted(range(len(lengths)), key=lambda number: lengths[number])
    for _, group in groupby(order, key=lambda number: 0 if padded else lengths[number]):
        numbers = list(group)
        yield from (numbers[start : start + size] for start in range(0, len(numbers), size))


class _Answerer:
    """A loaded model with its stop tokens and generation settings."""

    def __init__(self, params: Params, folder: Path, stops: list[int]) -> None:
        set_seed(params.seed)
        trust = read_json(folder / "manifest.json")["trust_remote_code"]
        self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
        self.model = load_model(folder, params.dtype)
        # Virtual tokens stand before the padding, and PEFT then counts the padding as positions.
        self.padded = not isinstance(self.model, PeftModel)
        default = self.model.generation_config.eos_token_id
        defaults = default if isinstance(default, list) else [default]
        # The template's stop tokens, and those that the model itself came with.
        self.stops = sorted({token for token in [*stops, *defaults] if token is not None})
        sampling = {"temperature": params.temperature, "top_p": params.top_p, "top_k": 0} if params.do_sample else {}
        self.config = GenerationConfig(
            max_new_tokens=params.max_new_tokens,
            do_sample=params.do_sample,
            repetition_penalty=params.repetition_penalty,
            eos_token_id=self.stops or None,
            pad_token_id=0,
            **sampling,
        )
        # What the folder's own generation config says about sampling must not mix with params.yaml.
        self.model.generation_config = self.config

    def answer(self, prompts: list[list[int]]) -> list[list[int]]:
        """The new tokens for each prompt, the stop token included if there is one."""
        width = max(map(len, prompts))
        # Padded on the left: generation goes on from the last position.
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=self.model.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=self.model.device)
        with torch.no_grad():
            output = self.model.generate(input_ids=ids, attention_mask=mask, generation_config=self.config)
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
