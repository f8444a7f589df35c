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
from stages.generate.trials import cache_is_exact, pad_left, try_batches
from stages.model import distributed
from stages.model.compile import compile_elementwise
from stages.model.load import load_model, stop_tokens
from stages.model.placement import is_spread

OWN_CACHE = "Transformers' generate gives other logits than the model without a cache"


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
        if not reason and not cache_is_exact(self.model, longest_prompt):
            reason = OWN_CACHE
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
        size = self._choose_batches(len(rows[-1]["prompt_ids"]))
        for _, group in groupby(range(len(rows)), key=lambda index: 0 if self.can_pad else len(rows[index]["prompt_ids"])):
            indices = list(group)
            for start in range(0, len(indices), size):
                batch = indices[start : start + size]
                yield list(zip(batch, self._generate_halving([rows[index] for index in batch]), strict=True))

    def _choose_batches(self, longest_prompt: int) -> int:
        """The most prompts in a batch. Tries what the model takes, and says what it does not."""
        if not self.can_pad:
            return self.settings.batch_size
        found = try_batches(self.model, longest_prompt)
        if not cache_is_exact(self.model, longest_prompt):
            self._report(f"{OWN_CACHE}; the answers are those of generate")
        if self.settings.batch_size == 1 or found.padded:
            return self.settings.batch_size
        self.can_pad = False
        if found.same_length:
            self._report(f"only prompts of one length are in a batch, which is slower: {found.reason}")
            return self.settings.batch_size
        self._report(f"one prompt is answered at a time, which is slower: {found.reason}")
        return 1

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
        inputs = pad_left(prompts, self.model.device)
        sampler = RowSampler(self.settings.sampling, [row["id"] for row in rows], prompts=prompts, device=self.model.device)
        with torch.no_grad():
            if inputs["input_ids"].shape[1] == 1 and self.model._is_stateful:
                # RecurrentGemma takes a single token for the next one of the last prompt; this clears its state.
                self.model(**inputs, use_cache=False)
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
