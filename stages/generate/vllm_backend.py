"""Answers from vLLM, for those who have it: its own scheduler, kernels and random numbers, the same prompts and stops."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from stages.core.jsonl import read_json
from stages.core.problem import Problem
from stages.generate.backend import Answer, GenerationSettings
from stages.generate.sampling import seed_of
from stages.model.device import pick_device, pick_dtype
from stages.model.load import ADAPTER, stop_tokens

AT_ONCE = 1024
"""Rows that vLLM gets in one call: it has no use for more, and a run that is killed loses no more."""


class VllmAnswers:
    """A sampled answer follows from its row and seed here too, but is another than Transformers' models draw."""

    def __init__(self, folder: Path, settings: GenerationSettings, stops: Sequence[int]) -> None:
        """Raises Problem if vLLM is not installed, or cannot take the model."""
        try:
            from vllm import LLM, SamplingParams
        except ImportError:
            raise Problem("params.yaml: generate.use_vllm: vLLM is not installed: pip install vllm, or false") from None
        if (folder / ADAPTER).is_dir():
            raise Problem(f"params.yaml: generate.use_vllm: must be false: vLLM does not read the adapter in {folder}")
        trust = read_json(folder / "manifest.json")["trust_remote_code"]
        vocabulary = AutoConfig.from_pretrained(folder, trust_remote_code=trust).get_text_config().vocab_size
        dtype = str(pick_dtype(settings.dtype, pick_device())).removeprefix("torch.")
        try:
            self._engine = LLM(
                model=str(folder),
                dtype=dtype,
                tensor_parallel_size=settings.num_processes,
                trust_remote_code=trust,
                generation_config="vllm",  # what the folder says about sampling must not mix with params.yaml
            )
        except (ValueError, RuntimeError) as error:
            raise Problem(f"vLLM cannot load {folder}: {error}") from None
        choice = settings.choice
        self._stops = [token for token in stop_tokens(folder, stops) if token < vocabulary]
        self._sampling = partial(
            SamplingParams,
            temperature=choice.temperature if choice.do_sample else 0.0,
            top_p=choice.top_p if choice.do_sample else 1.0,
            repetition_penalty=choice.repetition_penalty,
            max_tokens=settings.max_new_tokens,
            stop_token_ids=self._stops,
            ignore_eos=True,  # it is among the stop tokens, or is none here
            detokenize=False,
        )
        self._seed = choice.seed

    def answers(self, rows: Sequence[dict[str, Any]]) -> Iterator[list[tuple[int, Answer]]]:
        """As in `Backend`."""
        for start in range(0, len(rows), AT_ONCE):
            part = rows[start : start + AT_ONCE]
            prompts = [{"prompt_token_ids": row["prompt_ids"]} for row in part]
            sampling = [self._sampling(seed=seed_of(self._seed, row["id"])) for row in part]
            try:
                found = self._engine.generate(prompts, sampling, use_tqdm=False)
            except ValueError as error:
                raise Problem(f"vLLM: {error}") from None
            answers = (self._answer(list(output.outputs[0].token_ids)) for output in found)
            yield list(enumerate(answers, start))

    def _answer(self, new: list[int]) -> Answer:
        return Answer(new, bool(new) and new[-1] in self._stops)
