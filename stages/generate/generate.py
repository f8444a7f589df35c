"""Answers every test prompt, and the prompts of data/prompts.json, with one model."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from transformers import AutoTokenizer
from transformers.utils import logging

from stages.core.jsonl import read_json, write_jsonl
from stages.core.output import Done, fresh_file
from stages.core.params import Section
from stages.core.provenance import fingerprint, inputs_of
from stages.core.tokens import read_tokens, stop_token_ids
from stages.generate.backend import Answer, GenerationSettings
from stages.generate.sampling import SamplingConfig
from stages.generate.transformers_backend import TransformersAnswers
from stages.generate.vllm_backend import VllmAnswers
from stages.model import distributed
from stages.model.checkpoints import CheckpointFolder
from stages.model.device import DtypeName

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
    num_processes: int = Field(gt=0)
    """GPUs of this machine to answer on, each with its own part of the prompts."""
    use_vllm: bool
    """Answer with vLLM, which has to be installed; it parts the model, and not the prompts, among num_processes GPUs."""


def generate(
    params: Params,
    *,
    model: Path,
    test_prompts: Path,
    extra_prompts: Path,
    predictions: Path,
    extra_predictions: Path,
) -> Done:
    """Writes a row for each prompt, in order: for `test_prompts` to `predictions`, for `extra_prompts` to the other file.

    A row: {"id", "prompt", "reference", "answer", "finish_reason": "stop" or "length", "prompt_tokens", "answer_tokens"}.
    The prompts come tokenized from `encode`, so this stage knows no template. An answer depends on its own prompt and row
    alone, not on those beside it. A run that was killed resumes after the last batch that it answered.

    Raises Problem if the memory does not suffice for one prompt, or if another process answers the same prompts.
    """
    inputs = (model, test_prompts, extra_prompts)
    read = inputs_of("generate", params.model_dump(), inputs, Path())
    processes = 1 if params.use_vllm else params.num_processes
    tables = [read_tokens(test_prompts), read_tokens(extra_prompts)]
    with CheckpointFolder(f"generate-{model.name}", fingerprint(read)) as folder:
        work = (params, *inputs, folder.path)
        if processes > 1:
            distributed.require_gpus(processes, "generate.num_processes")
            distributed.launch(answer_share, processes, *work)
        else:
            answer_share(*work)
        kept = [_Finished(folder.path, process) for process in range(processes)]
        answers = {number: answer for part in kept for number, answer in part.answers.items()}
        trust = read_json(model / "manifest.json")["trust_remote_code"]
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=trust)
        done = [_row(tokenizer, row, answers[number]) for number, row in enumerate(_rows(tables))]
        with fresh_file(predictions) as file, fresh_file(extra_predictions) as extra_file:
            write_jsonl(file, done[: len(tables[0])])
            write_jsonl(extra_file, done[len(tables[0]) :])
        cut = sum(row["finish_reason"] == "length" for row in done)
        return Done(f"{predictions}: {len(done):,} answers, {cut:,} cut at {params.max_new_tokens} tokens", folder.remove)


def answer_share(params: Params, model: Path, prompts: Path, extra: Path, kept: Path) -> None:
    """Backend this process's share of the prompts into the folder `kept`; what is there already is left out."""
    distributed.select_gpu()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    tables = [read_tokens(prompts), read_tokens(extra)]
    rows = _rows(tables)
    finished = _Finished(kept, distributed.rank())
    share = sorted(range(len(rows)), key=lambda n: len(rows[n]["prompt_ids"]))[
        distributed.rank() :: distributed.world_size()
    ]
    left = [number for number in share if number not in finished.answers]
    if not left:
        return
    answerer = (VllmAnswers if params.use_vllm else TransformersAnswers)(model, _settings(params), stop_token_ids(tables[0]))
    for found in answerer.answers([rows[number] for number in left]):
        finished.add([(left[number], answer) for number, answer in found])
        if distributed.is_main():
            of_all = f", of {distributed.world_size()} processes the first" * (distributed.world_size() > 1)
            print(f"generate: {model.name}: {len(finished.answers)}/{len(share)} prompts{of_all}", flush=True)


def _settings(params: Params) -> GenerationSettings:
    values = params.model_dump() | (TUTORIAL if params.preset == "tutorial" else {})
    choice = SamplingConfig(**{name: values[name] for name in SamplingConfig._fields})
    return GenerationSettings(choice, **{name: values[name] for name in GenerationSettings._fields if name != "choice"})


def _rows(tables: Sequence[Any]) -> list[dict[str, Any]]:
    return [row for table in tables for row in table.to_pylist()]


def _row(tokenizer: Any, prompt: dict[str, Any], answer: Answer) -> dict[str, Any]:
    text = answer.tokens[:-1] if answer.stopped else answer.tokens
    return {
        "id": prompt["id"],
        "prompt": prompt["prompt"],
        "reference": prompt["reference"],
        "answer": tokenizer.decode(text, skip_special_tokens=True),
        "finish_reason": "stop" if answer.stopped else "length",
        "prompt_tokens": len(prompt["prompt_ids"]),
        "answer_tokens": len(answer.tokens),
    }


class _Finished:
    """A process's answers, kept until all are there; only a run that reads the very same takes them up."""

    def __init__(self, folder: Path, process: int) -> None:
        self.path = folder / f"{process}.jsonl"
        self.answers: dict[int, Answer] = {}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        whole = b""
        for line in self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else ():
            if not line.endswith(b"\n"):
                break  # a batch that was being written
            whole += line
            self.answers |= {number: Answer(*answer) for number, answer in json.loads(line)}
        self.path.write_bytes(whole)

    def add(self, batch: Sequence[tuple[int, Answer]]) -> None:
        """Keeps the answers of a batch by their numbers."""
        self.answers |= batch
        with self.path.open("ab") as file:
            file.write(json.dumps(batch).encode() + b"\n")
