"""Answers from vLLM, which is optional: the same prompts and stop tokens, with vLLM's scheduler, kernels and sampling."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from stages.core.jsonl import read_json
from stages.core.params import bad_param
from stages.core.problem import Problem
from stages.generate.backend import Answer, GenerationSettings
from stages.generate.sampling import row_seed
from stages.model.device import pick_device, pick_dtype
from stages.model.load import ADAPTER, stop_tokens

ROWS_PER_CALL = 1024
"""vLLM is no faster with more, and a killed run loses the answers of one call."""


class VllmBackend:
    """A model loaded by vLLM. A sampled answer depends only on its row and the seed, but differs from Transformers'."""

    def __init__(self, folder: Path, settings: GenerationSettings, *, template_stops: Sequence[int]) -> None:
        """Arguments as for `TransformersBackend`. Raises Problem if vLLM is not installed or cannot load the model."""
        try:
            from vllm import LLM, SamplingParams
        except ImportError:
            raise Problem(
                bad_param("generate.use_vllm", "true, but vLLM is not installed; pip install vllm, or set it to false")
            ) from None
        if (folder / ADAPTER).is_dir():
            raise Problem(
                bad_param("generate.use_vllm", f"true, but vLLM does not read the adapter in {folder}; set it to false")
            )
        trust = read_json(folder / "manifest.json")["trust_remote_code"]
        vocabulary = AutoConfig.from_pretrained(folder, trust_remote_code=trust).get_text_config().vocab_size
        dtype = str(pick_dtype(settings.dtype, pick_device())).removeprefix("torch.")
        try:
            self._engine = LLM(
                model=str(folder),
                dtype=dtype,
                tensor_parallel_size=settings.num_processes,
                trust_remote_code=trust,
                generation_config="vllm",  # the sampling values in the folder must not mix with those in params.yaml
            )
        except (ValueError, RuntimeError) as error:
            raise Problem(f"vLLM cannot load {folder}: {error}") from None
        sampling = settings.sampling
        self._stops = [token for token in stop_tokens(folder, template_stops) if token < vocabulary]
        self._sampling_params = partial(
            SamplingParams,
            temperature=sampling.temperature if sampling.do_sample else 0.0,
            top_p=sampling.top_p if sampling.do_sample else 1.0,
            repetition_penalty=sampling.repetition_penalty,
            max_tokens=settings.max_new_tokens,
            stop_token_ids=self._stops,
            ignore_eos=True,  # an EOS token that ends an answer is among the stop tokens
            detokenize=False,
        )
        self._seed = sampling.seed

    def prepare(self, longest_prompt: int) -> None:
        """Nothing is to be chosen: vLLM has one way."""

    def generate(self, rows: Sequence[dict[str, Any]]) -> Iterator[list[tuple[int, Answer]]]:
        """See `Backend`."""
        for start in range(0, len(rows), ROWS_PER_CALL):
            batch = rows[start : start + ROWS_PER_CALL]
            prompts = [{"prompt_token_ids": row["prompt_ids"]} for row in batch]
            sampling_params = [self._sampling_params(seed=row_seed(self._seed, row["id"])) for row in batch]
            try:
                outputs = self._engine.generate(prompts, sampling_params, use_tqdm=False)
            except ValueError as error:
                raise Problem(f"vLLM: {error}") from None
            answers = (self._to_answer(list(output.outputs[0].token_ids)) for output in outputs)
            yield list(enumerate(answers, start))

    def text_losses(self, windows: Sequence[dict[str, Any]]) -> list[float]:
        """Not called: `generate` refuses raw text with vLLM, whose log-probabilities of a prompt nothing here checks."""
        raise NotImplementedError

    def _to_answer(self, tokens: list[int]) -> Answer:
        return Answer(tokens, stopped=bool(tokens) and tokens[-1] in self._stops)
