"""Answers every test prompt, and the prompts of data/prompts.json, with one model."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from pydantic import Field
from transformers import AutoTokenizer
from transformers.utils import logging

from stages.core.jsonl import read_json, write_jsonl
from stages.core.output import Done, fresh_file
from stages.core.params import Section
from stages.core.progress import ProgressBar
from stages.core.provenance import fingerprint, inputs_of
from stages.core.tokens import read_tokens, stop_token_ids
from stages.generate.backend import Answer, Backend, GenerationSettings
from stages.generate.sampling import SamplingConfig
from stages.generate.transformers_backend import TransformersBackend
from stages.generate.vllm_backend import VllmBackend
from stages.model import distributed
from stages.model.checkpoints import CheckpointFolder
from stages.model.device import DtypeName


class Params(Section):
    """How prompts are answered. The names are those of Transformers' GenerationConfig where it has them."""

    removed: ClassVar[Mapping[str, str]] = {
        "preset": "write the tutorial's values instead: do_sample: true, temperature: 0.5, top_p: 0.85, "
        "repetition_penalty: 2.0, max_new_tokens: 1024"
    }

    max_new_tokens: int = Field(gt=0)
    """The longest answer, in tokens. Longer ones are cut here and counted; their `finish_reason` is "length"."""
    do_sample: bool
    """false: greedy decoding; true: sampling with temperature, top_p and seed."""
    temperature: float = Field(gt=0)
    """Sampling: the logits are divided by it. Below 1, likely tokens become more likely."""
    top_p: float = Field(gt=0, le=1)
    """Sampling: only from the most likely tokens that together have this probability."""
    repetition_penalty: float = Field(gt=0)
    """Above 1, tokens that the prompt or the answer already contains become less likely. Applies to greedy decoding too."""
    seed: int
    """Sampling: a different seed gives different answers."""
    batch_size: int = Field(gt=0)
    """Prompts per batch. Halved if memory runs out."""
    dtype: DtypeName
    """The type that the model computes in. auto: bfloat16 if the hardware supports it, otherwise float32."""
    num_processes: int = Field(gt=0)
    """GPUs of this machine; each answers its share of the prompts with its own copy of the model."""
    use_vllm: bool
    """Answer with vLLM, which must be installed. vLLM shards the model across num_processes GPUs instead."""


class Prompts(NamedTuple):
    """What `encode` wrote for this stage."""

    rows: list[dict[str, Any]]
    """{"id", "prompt", "prompt_ids", "reference"} each: the test prompts, then the extra ones."""
    test_count: int
    stop_tokens: list[int]
    """The tokens that end an answer in the chat template."""


def generate(
    params: Params,
    *,
    model: Path,
    test_prompts: Path,
    extra_prompts: Path,
    predictions: Path,
    extra_predictions: Path,
) -> Done:
    """Writes one row for each prompt, in order: `test_prompts` to `predictions`, `extra_prompts` to `extra_predictions`.

    A row: {"id", "prompt", "reference", "answer", "finish_reason": "stop" or "length", "prompt_tokens", "answer_tokens"}.
    The prompts come tokenized from `encode`, so this stage knows no template. An answer depends on its own prompt and row
    id, not on the other rows of its batch. An interrupted run resumes after the last batch that it finished.

    Raises Problem if a single prompt does not fit into memory, or if another process runs this stage on the same
    inputs.
    """
    if params.num_processes > 1:
        distributed.require_gpus(params.num_processes, "generate.num_processes")
    processes = 1 if params.use_vllm else params.num_processes
    inputs = inputs_of("generate", params.model_dump(), (model, test_prompts, extra_prompts), Path())
    prompts = read_prompts(test_prompts, extra_prompts)
    with CheckpointFolder(f"generate-{model.name}", fingerprint(inputs)) as folder:
        if processes > 1:
            distributed.launch(answer_share, processes, params, model, prompts, folder.path)
        else:
            answer_share(params, model, prompts, folder.path)
        answers: dict[int, Answer] = {}
        for rank in range(processes):
            answers |= KeptAnswers(folder.path, rank).answers
        trust = read_json(model / "manifest.json")["trust_remote_code"]
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=trust)
        done = [_prediction(row, answers[index], tokenizer=tokenizer) for index, row in enumerate(prompts.rows)]
        with fresh_file(predictions) as file, fresh_file(extra_predictions) as extra_file:
            write_jsonl(file, done[: prompts.test_count])
            write_jsonl(extra_file, done[prompts.test_count :])
        cut = sum(row["finish_reason"] == "length" for row in done)
        return Done(f"{predictions}: {len(done):,} answers, {cut:,} cut at {params.max_new_tokens} tokens", folder.remove)


def read_prompts(test_prompts: Path, extra_prompts: Path) -> Prompts:
    """Reads the two Arrow files of prompts."""
    test, extra = read_tokens(test_prompts), read_tokens(extra_prompts)
    return Prompts([*test.to_pylist(), *extra.to_pylist()], len(test), stop_token_ids(test))


def answer_share(params: Params, model: Path, prompts: Prompts, folder: Path) -> None:
    """Answers this process's share of the prompts, except those whose answers `folder` already keeps.

    The arguments are positional because torch's launcher passes no others to a process.
    """
    distributed.select_gpu()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    rank, processes = distributed.rank(), distributed.world_size()
    by_length = sorted(range(len(prompts.rows)), key=lambda index: len(prompts.rows[index]["prompt_ids"]))
    share = by_length[rank::processes]
    kept = KeptAnswers(folder, rank)
    left = [index for index in share if index not in kept.answers]
    if not left:
        return
    load = VllmBackend if params.use_vllm else TransformersBackend
    backend: Backend = load(model, generation_settings(params), template_stops=prompts.stop_tokens)
    desc = f"generate {model.name}" + (f" (process 0 of {processes})" if processes > 1 else "")
    resumed = len(share) - len(left)
    with ProgressBar(desc, total=len(share), unit="prompts", initial=resumed, disable=not distributed.is_main()) as bar:
        for group in backend.generate([prompts.rows[index] for index in left]):
            kept.add([(left[place], answer) for place, answer in group])
            bar.update(len(group))


def generation_settings(params: Params) -> GenerationSettings:
    """The part of the parameters that a backend needs."""
    values = params.model_dump()
    sampling = SamplingConfig(**{name: values[name] for name in SamplingConfig._fields})
    rest = {name: values[name] for name in GenerationSettings._fields if name != "sampling"}
    return GenerationSettings(sampling=sampling, **rest)


class KeptAnswers:
    """The answers of one process so far, in a file of the checkpoint folder, so that an interrupted run can resume.

    The file has one line of JSON for each finished batch: [[index of the prompt, [tokens, stopped]], ...].
    """

    def __init__(self, folder: Path, rank: int) -> None:
        """Reads the answers of an interrupted run.

        A process that is killed while it writes leaves a last line without its newline. The line is removed from the file,
        since the next batch would be appended to it, and its batch is answered again.
        """
        self._path = folder / f"{rank}.jsonl"
        self.answers: dict[int, Answer] = {}
        """Answers by the index of their prompt."""
        lines = self._path.read_bytes().splitlines(keepends=True) if self._path.exists() else []
        if lines and not lines[-1].endswith(b"\n"):
            lines.pop()
            self._path.write_bytes(b"".join(lines))
        for line in lines:
            self.answers |= {index: Answer(*answer) for index, answer in json.loads(line)}

    def add(self, batch: Sequence[tuple[int, Answer]]) -> None:
        """Appends the answers of a batch."""
        self.answers |= batch
        with self._path.open("ab") as file:
            file.write(json.dumps(batch).encode() + b"\n")


def _prediction(prompt: dict[str, Any], answer: Answer, *, tokenizer: Any) -> dict[str, Any]:
    """A row of the predictions. The stop token is counted, but it is not part of the text."""
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
