"""Answers every test prompt, and the prompts of data/prompts.json, with one model."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from transformers import AutoTokenizer
from transformers.utils import logging

from stages.lib import distributed
from stages.lib.answering import Answer, Settings
from stages.lib.device import DtypeName
from stages.lib.jsonl import read_json, write_jsonl
from stages.lib.output import fresh_file
from stages.lib.params import Section
from stages.lib.provenance import fingerprint, inputs_of
from stages.lib.sampling import Choice
from stages.lib.tokens import read_tokens, stop_token_ids
from stages.lib.transformers_answers import TransformersAnswers
from stages.lib.vllm_answers import VllmAnswers

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


def generate(params: Params, model: Path, prompts: Path, extra: Path, predictions: Path, extra_predictions: Path) -> None:
    """Writes a row for each prompt, in their order: those of `prompts` to `predictions`, of `extra` to `extra_predictions`.

    A row: {"id", "prompt", "reference", "answer", "finish_reason": "stop" or "length", "prompt_tokens", "answer_tokens"}.
    The prompts come tokenized from `encode`, so this stage knows no template. An answer depends on its own prompt and row
    alone, not on those beside it. A run that is killed goes on behind the last batch that it answered.

    Raises Problem if the memory does not suffice for one prompt.
    """
    read = inputs_of("generate", params.model_dump(), {path.name: path for path in (model, prompts, extra)}, Path())
    work = (params, model, prompts, extra, fingerprint(read))
    processes = 1 if params.use_vllm else params.num_processes
    if processes > 1:
        distributed.check_gpus(processes, "generate.num_processes")
        distributed.launch(answer_share, processes, *work)
    else:
        answer_share(*work)
    tables = [read_tokens(prompts), read_tokens(extra)]
    trust = read_json(model / "manifest.json")["trust_remote_code"]
    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=trust)
    kept = [_Finished(fingerprint(read), process) for process in range(processes)]
    answers = {number: answer for part in kept for number, answer in part.answers.items()}
    done = [_row(tokenizer, row, answers[number]) for number, row in enumerate(_rows(tables))]
    with fresh_file(predictions) as file, fresh_file(extra_predictions) as extra_file:
        write_jsonl(file, done[: len(tables[0])])
        write_jsonl(extra_file, done[len(tables[0]) :])
    for part in kept:
        part.remove()


def answer_share(params: Params, model: Path, prompts: Path, extra: Path, name: str) -> None:
    """Answers this process's share of the prompts, and keeps the answers under `name`; what is kept already is left out."""
    distributed.take_gpu()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    tables = [read_tokens(prompts), read_tokens(extra)]
    rows = _rows(tables)
    finished = _Finished(name, distributed.rank())
    share = sorted(range(len(rows)), key=lambda n: len(rows[n]["prompt_ids"]))[distributed.rank() :: distributed.count()]
    left = [number for number in share if number not in finished.answers]
    if not left:
        return
    answerer = (VllmAnswers if params.use_vllm else TransformersAnswers)(model, _settings(params), stop_token_ids(tables[0]))
    for found in answerer.answers([rows[number] for number in left]):
        finished.add([(left[number], answer) for number, answer in found])
        if distributed.is_main():
            of_all = f", of {distributed.count()} processes the first" * (distributed.count() > 1)
            print(f"generate: {model.name}: {len(finished.answers)}/{len(share)} prompts{of_all}", flush=True)


def _settings(params: Params) -> Settings:
    values = params.model_dump() | (TUTORIAL if params.preset == "tutorial" else {})
    choice = Choice(**{name: values[name] for name in Choice._fields})
    return Settings(choice, **{name: values[name] for name in Settings._fields if name != "choice"})


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

    def __init__(self, name: str, process: int) -> None:
        self.path = Path(os.environ.get("DVC_ROOT", ".")) / ".checkpoints" / f"generate-{name}-{process}.jsonl"
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

    def remove(self) -> None:
        self.path.unlink()
