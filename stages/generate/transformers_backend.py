"""Answers from a model in Transformers: with the continuous-batching decoder on a GPU, otherwise with `generate`."""

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
from stages.generate.text_losses import window_losses
from stages.model import distributed
from stages.model.compile import compile_elementwise
from stages.model.load import load_model, stop_tokens
from stages.model.placement import is_spread
from stages.model.probe import TRIAL_ERRORS, logits_match, probe_rows, reason_of


class TransformersBackend:
    """A loaded model. Uses `Decoder` on a GPU if the model fits it, otherwise Transformers' generate."""

    def __init__(self, folder: Path, settings: GenerationSettings, *, template_stops: Sequence[int]) -> None:
        """Loads the model, and prints a line if it has to use Transformers' generate.

        `template_stops` are the tokens that end an answer in the chat template. The model's own stop tokens end one too.
        """
        self.model = load_model(folder, settings.dtype)
        # PEFT puts an adapter's virtual tokens before the padding, and then counts the padding as positions.
        self.can_pad = not isinstance(self.model, PeftModel)
        self.stops = stop_tokens(folder, template_stops)
        self.settings = settings
        self.config = GenerationConfig(
            max_new_tokens=settings.max_new_tokens,
            do_sample=False,  # RowSampler draws the tokens
            eos_token_id=self.stops or None,
            pad_token_id=0,
        )
        # The sampling values in the folder's generation_config.json must not mix with those in params.yaml.
        self.model.generation_config = self.config
        self.uses_decoder: bool | None = None
        """Found out at the first prompts; the losses on raw text come before, from the model as it was loaded."""
        self._reported_sizes: set[int] = set()

    def generate(self, rows: Sequence[dict[str, Any]]) -> Iterator[list[tuple[int, Answer]]]:
        """See `Backend`."""
        if self.uses_decoder is None:
            self.prepare(len(rows[-1]["prompt_ids"]))
        for group in self._decode(rows) if self.uses_decoder else self._generate(rows):
            yield [(index, self._to_answer(tokens)) for index, tokens in group]

    def prepare(self, longest_prompt: int) -> None:
        """See `Backend`."""
        self.uses_decoder = self._prepare_decoder(longest_prompt)

    def text_losses(self, windows: Sequence[dict[str, Any]]) -> list[float]:
        """See `Backend`."""
        return window_losses(self.model, windows)

    def _prepare_decoder(self, longest_prompt: int) -> bool:
        """Optimizes the model for `Decoder` if it fits; otherwise says why not, and leaves the model as it was."""
        if self.model.device.type != "cuda":
            distributed.say_for_all("generate: no GPU: using Transformers' generate")
            return False
        longest = longest_prompt + self.settings.max_new_tokens
        reason = can_decode(self.model, longest) if self.can_pad else "its adapter is not merged"
        if reason:
            self._report(
                f"using Transformers' generate, which is slower: the model does not fit the faster decoder: {reason}"
            )
            return False
        if is_spread(self.model):
            self._report("the model is spread, so there is no CUDA graph, which is slower")
            return True
        reason = fuse_projections(self.model)
        if reason:
            self._report(f"projections are not fused, which is slower: {reason}")
        for reason in compile_elementwise(self.model).left_out:
            self._report(f"{reason}; this is slower")
        return True

    @staticmethod
    def _report(message: str) -> None:
        """Prints one line, which names the process if there are several; `generate` then compares those of all of them."""
        distributed.note(message)
        process = f" (process {distributed.rank()})" if distributed.world_size() > 1 else ""
        print(f"generate: {message}{process}", flush=True)

    def _decode(self, rows: Sequence[dict[str, Any]]) -> Iterator[list[tuple[int, list[int]]]]:
        """With `Decoder`. If memory runs out, the rows without an answer get half as many slots."""
        left, slots = list(range(len(rows))), self.settings.batch_size
        while left:
            slots, finished = min(slots, len(left)), set()
            try:
                for group in self._decode_in_slots(rows, left, slots=slots):
                    finished |= {index for index, _ in group}
                    yield group
            except torch.OutOfMemoryError:
                if slots == 1:
                    raise Problem(_out_of_memory(rows[left[-1]])) from None
                self._report_halving(slots)
                slots //= 2
            torch.cuda.empty_cache()
            left = [index for index in left if index not in finished]

    def _decode_in_slots(
        self, rows: Sequence[dict[str, Any]], indices: Sequence[int], *, slots: int
    ) -> Iterator[list[tuple[int, list[int]]]]:
        decoder = Decoder(
            self.model,
            self.settings.sampling,
            stop_tokens=self.stops,
            slots=slots,
            max_prompt_tokens=len(rows[indices[-1]]["prompt_ids"]),  # they are sorted by length
            max_new_tokens=self.settings.max_new_tokens,
            cuda_graph=self.model.device.type == "cuda" and not is_spread(self.model),
        )
        yield from decoder.decode(rows, indices)

    def _generate(self, rows: Sequence[dict[str, Any]]) -> Iterator[list[tuple[int, list[int]]]]:
        """With Transformers' generate, in batches of similar length: little padding, or none if the model takes none."""
        lengths = [len(rows[index]["prompt_ids"]) for index in (0, -1)]  # the shortest and the longest
        would_pad = self.can_pad and self.settings.batch_size > 1 and lengths[0] < lengths[1]
        reason = self._why_not_pad(lengths[1]) if would_pad else ""
        if reason:
            self._report(f"only prompts of one length are in a batch, which is slower: {reason}")
            self.can_pad = False
        for _, group in groupby(range(len(rows)), key=lambda index: 0 if self.can_pad else len(rows[index]["prompt_ids"])):
            indices = list(group)
            for start in range(0, len(indices), self.settings.batch_size):
                batch = indices[start : start + self.settings.batch_size]
                yield list(zip(batch, self._generate_halving([rows[index] for index in batch]), strict=True))

    def _why_not_pad(self, longest_prompt: int) -> str:
        """Why prompts cannot be padded; "" if the model gives the same logits then, as a recurrent model may not."""
        rows = probe_rows(self.model, longest_prompt)
        try:
            same = logits_match(self._first_logits(rows), torch.cat([self._first_logits([row]) for row in rows]))
        except TRIAL_ERRORS as error:
            return reason_of(error)
        return "" if same else "padding changes the model's answers"

    def _first_logits(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        """The logits (rows, vocabulary) of the first new token of each prompt, in one batch."""
        config = GenerationConfig(
            max_new_tokens=1, do_sample=False, pad_token_id=0, output_logits=True, return_dict_in_generate=True
        )
        with torch.no_grad():
            logits: torch.Tensor = self.model.generate(**self._pad(prompts), generation_config=config).logits[0]
        return logits.to(self.model.dtype)  # generate makes float32 of them; they are rounded as the model computes

    def _pad(self, prompts: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
        """input_ids and attention_mask, padded on the left, so that every prompt ends in the last position."""
        width = max(map(len, prompts))
        ids = [[0] * (width - len(prompt)) + list(prompt) for prompt in prompts]
        mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        device = self.model.device
        return {"input_ids": torch.tensor(ids, device=device), "attention_mask": torch.tensor(mask, device=device)}

    def _generate_halving(self, rows: Sequence[dict[str, Any]]) -> list[list[int]]:
        """The new tokens of a batch. It is split in two if memory runs out."""
        try:
            return self._generate_batch(rows)
        except torch.OutOfMemoryError:
            if len(rows) == 1:
                raise Problem(_out_of_memory(rows[0])) from None
        self._report_halving(len(rows))
        torch.cuda.empty_cache()  # after the except block, which holds the failed call's tensors
        half = len(rows) // 2
        return [*self._generate_halving(rows[:half]), *self._generate_halving(rows[half:])]

    def _generate_batch(self, rows: Sequence[dict[str, Any]]) -> list[list[int]]:
        """The new tokens of each row, padded after a stop token."""
        prompts = [row["prompt_ids"] for row in rows]
        inputs = self._pad(prompts)
        sampler = RowSampler(self.settings.sampling, [row["id"] for row in rows], prompts=prompts, device=self.model.device)
        with torch.no_grad():
            output = self.model.generate(
                **inputs,
                generation_config=self.config,
                logits_processor=LogitsProcessorList([sampler]),
            )
        new_tokens: list[list[int]] = output[:, inputs["input_ids"].shape[1] :].tolist()
        return new_tokens

    def _report_halving(self, size: int) -> None:
        """Prints a line, once for each size of a batch."""
        if size not in self._reported_sizes:
            self._reported_sizes.add(size)
            print(f"generate: out of memory with a batch of {size} prompts; continuing with {size // 2}", flush=True)

    def _to_answer(self, tokens: list[int]) -> Answer:
        """Cuts the new tokens after the first stop token; only padding follows it."""
        end = next((index for index, token in enumerate(tokens) if token in self.stops), None)
        return Answer(tokens if end is None else tokens[: end + 1], stopped=end is not None)


def _out_of_memory(row: dict[str, Any]) -> str:
    return (
        f"out of memory on a single prompt, {row['id']} with {len(row['prompt_ids'])} tokens; "
        "lower generate.max_new_tokens, or use a GPU with more memory"
    )
