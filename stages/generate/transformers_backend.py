"""Answers from Transformers' models."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import GenerationConfig, LogitsProcessorList

from stages.core.problem import Problem
from stages.generate.backend import Answer, GenerationSettings
from stages.generate.decoder import Decoder, can_decode
from stages.generate.fused_projections import fuse_projections
from stages.generate.sampling import RowSampler
from stages.model.compile import compile_elementwise
from stages.model.load import load_model, stop_tokens


class TransformersAnswers:
    """On a GPU with lib/decode.py where the model fits it, otherwise with Transformers' generate."""

    def __init__(self, folder: Path, settings: GenerationSettings, stops: Sequence[int]) -> None:
        """`stops` are the tokens that end an answer by the template; the model's own do so too."""
        self.model = load_model(folder, settings.dtype)
        # Virtual tokens stand before the padding, and PEFT then counts the padding as positions.
        self.padded = not isinstance(self.model, PeftModel)
        self.stops = stop_tokens(folder, stops)
        self.settings = settings
        self.config = GenerationConfig(
            max_new_tokens=settings.max_new_tokens,
            do_sample=False,  # RowSampler leaves each row one token to choose
            eos_token_id=self.stops or None,
            pad_token_id=0,
        )
        # What the folder's own generation config says about sampling must not mix with params.yaml.
        self.model.generation_config = self.config
        self.decodes = self.model.device.type == "cuda" and self.padded and can_decode(self.model)
        if self.decodes:
            fuse_projections(self.model)
            compile_elementwise(self.model)

    def answers(self, rows: Sequence[dict[str, Any]]) -> Iterator[list[tuple[int, Answer]]]:
        """As in `Backend`."""
        for found in self._decoded(rows) if self.decodes else self._generated(rows):
            yield [(number, self._cut(tokens)) for number, tokens in found]

    def _decoded(self, rows: Sequence[dict[str, Any]]) -> Iterator[list[tuple[int, list[int]]]]:
        """With lib/decode.py; in half as many slots where the memory does not suffice."""
        left, slots = list(range(len(rows))), self.settings.batch_size
        while left:
            slots, finished = min(slots, len(left)), set()
            try:
                for found in self._in_slots([rows[number] for number in left], slots):
                    finished |= {left[place] for place, _ in found}
                    yield [(left[place], tokens) for place, tokens in found]
            except torch.OutOfMemoryError:
                if slots == 1:
                    raise Problem(_too_little(rows[left[-1]])) from None
                slots //= 2
            torch.cuda.empty_cache()
            left = [number for number in left if number not in finished]

    def _in_slots(self, rows: Sequence[dict[str, Any]], slots: int) -> Iterator[list[tuple[int, list[int]]]]:
        prompts, new = [row["prompt_ids"] for row in rows], self.settings.max_new_tokens
        recorded = self.model.device.type == "cuda"
        longest = max(map(len, prompts))
        decoder = Decoder(self.model, self.settings.choice, self.stops, slots, longest, new, recorded=recorded)
        yield from decoder.answers(prompts, [row["id"] for row in rows])

    def _generated(self, rows: Sequence[dict[str, Any]]) -> Iterator[list[tuple[int, list[int]]]]:
        """With Transformers' generate, in batches of like length: little padding, or none where a model takes none."""
        lengths = [len(row["prompt_ids"]) for row in rows]
        for _, group in groupby(range(len(rows)), key=lambda number: 0 if self.padded else lengths[number]):
            numbers = list(group)
            for start in range(0, len(numbers), self.settings.batch_size):
                batch = numbers[start : start + self.settings.batch_size]
                yield list(zip(batch, self._batch([rows[number] for number in batch]), strict=True))

    def _batch(self, rows: Sequence[dict[str, Any]]) -> list[list[int]]:
        try:
            return self._generate(rows)
        except torch.OutOfMemoryError:
            if len(rows) == 1:
                raise Problem(_too_little(rows[0])) from None
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
        sampler = RowSampler(self.settings.choice, names, prompts, self.model.device)
        with torch.no_grad():
            output = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=self.config,
                logits_processor=LogitsProcessorList([sampler]),
            )
        found: list[list[int]] = output[:, width:].tolist()
        return found

    def _cut(self, new: list[int]) -> Answer:
        """Up to and with the first stop token; behind it there is only padding."""
        end = next((number for number, token in enumerate(new) if token in self.stops), None)
        return Answer(new if end is None else new[: end + 1], end is not None)


def _too_little(row: dict[str, Any]) -> str:
    return (
        f"out of memory on a single prompt, {row['id']} with {len(row['prompt_ids'])} tokens; "
        "lower generate.max_new_tokens, or use a GPU with more memory"
    )
