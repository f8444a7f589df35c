"""Answers every test prompt, and the prompts of data/prompts.json, with one model; and its losses on raw test text."""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

from pydantic import Field
from transformers import AutoTokenizer
from transformers.utils import logging

from stages.core.jsonl import read_json, write_jsonl
from stages.core.output import Done, fresh_file
from stages.core.params import Section, bad_param
from stages.core.problem import Problem
from stages.core.progress import ProgressBar
from stages.core.provenance import fingerprint, inputs_of
from stages.core.tokens import TokenRows, decode_answer, read_tokens, stop_token_ids
from stages.generate.backend import Answer, Backend, GenerationSettings
from stages.generate.checks import check_prompts
from stages.generate.sampling import SamplingConfig
from stages.generate.text_losses import count_labels, make_batches
from stages.generate.transformers_backend import TransformersBackend
from stages.generate.vllm_backend import VllmBackend
from stages.model import distributed
from stages.model.checkpoints import CheckpointFolder
from stages.model.device import DtypeName

T = TypeVar("T")


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
    """Prompts, or windows of raw text, per batch. Halved if memory runs out."""
    dtype: DtypeName
    """The type that the model computes in. auto: bfloat16 if the hardware supports it, otherwise float32."""
    num_processes: int = Field(gt=0)
    """GPUs of this machine; each answers its share of the prompts with its own copy of the model."""
    use_vllm: bool
    """Answer with vLLM, which must be installed. vLLM shards the model across num_processes GPUs instead. Not with raw text
    in the test split, whose losses need Transformers."""


class Prompts(NamedTuple):
    """What `encode` wrote for this stage."""

    rows: list[dict[str, Any]]
    """{"id", "prompt", "prompt_ids", "reference"} each: the test prompts, then the extra ones."""
    test_count: int
    stop_tokens: list[int]
    """The tokens that end an answer in the chat template."""
    text: Path
    """The windows of raw text, read where they are needed."""


def generate(
    params: Params,
    *,
    model: Path,
    test_prompts: Path,
    extra_prompts: Path,
    test_text: Path,
    predictions: Path,
    extra_predictions: Path,
    text_losses: Path,
) -> Done:
    """Writes one row for each prompt, in order: `test_prompts` to `predictions`, `extra_prompts` to `extra_predictions`.

    A row: {"id", "prompt", "reference", "answer", "finish_reason": "stop" or "length", "prompt_tokens", "answer_tokens"}.
    For each window of raw text in `test_text`, `text_losses` gets {"id", "tokens": those with a label, "loss": the sum of
    their losses in nats}. The prompts come tokenized from `encode`, so this stage knows no template. An answer depends on
    its own prompt and row id, not on the other rows of its batch. An interrupted run resumes after the last batch that it
    finished.

    Raises Problem if a single prompt does not fit into memory, if another process runs this stage on the same inputs, or
    if vLLM is to give the losses on raw text.
    """
    if params.num_processes > 1:
        distributed.require_gpus(params.num_processes, "generate.num_processes")
    processes = 1 if params.use_vllm else params.num_processes
    inputs = inputs_of("generate", params.model_dump(), (model, test_prompts, extra_prompts, test_text), Path())
    prompts = read_prompts(test_prompts, extra_prompts, test_text)
    windows = TokenRows(read_tokens(test_text))
    if params.use_vllm and len(windows):
        raise Problem(
            bad_param(
                "generate.use_vllm",
                f"true, but the losses on the {len(windows):,} windows of raw text in {test_text} are computed with "
                "Transformers; set it to false",
            )
        )
    check_prompts(model, prompts.rows, windows, max_new_tokens=params.max_new_tokens)
    with CheckpointFolder(f"generate-{model.name}", fingerprint(inputs)) as folder:
        if processes > 1:
            distributed.launch(answer_share, processes, params, model, prompts, folder.path)
        else:
            answer_share(params, model, prompts, folder.path)
        answers: dict[int, Answer] = {}
        losses: dict[int, float] = {}
        for rank in range(processes):
            answers |= kept_answers(folder.path, rank).results
            losses |= kept_losses(folder.path, rank).results
        trust = read_json(model / "manifest.json")["trust_remote_code"]
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=trust)
        done = [_prediction(row, answers[index], tokenizer=tokenizer) for index, row in enumerate(prompts.rows)]
        with ExitStack() as stack:
            file, extra_file, text_file = map(
                stack.enter_context, map(fresh_file, (predictions, extra_predictions, text_losses))
            )
            write_jsonl(file, done[: prompts.test_count])
            write_jsonl(extra_file, done[prompts.test_count :])
            write_jsonl(text_file, (_text_row(windows[index], losses[index]) for index in range(len(windows))))
        cut = sum(row["finish_reason"] == "length" for row in done)
        summary = f"{predictions}: {len(done):,} answers, {cut:,} cut at {params.max_new_tokens} tokens"
        if len(windows):
            summary += f"; {text_losses}: losses of {len(windows):,} windows of raw text"
        return Done(summary, folder.remove)


def read_prompts(test_prompts: Path, extra_prompts: Path, test_text: Path) -> Prompts:
    """Reads the two Arrow files of prompts."""
    test, extra = read_tokens(test_prompts), read_tokens(extra_prompts)
    return Prompts([*test.to_pylist(), *extra.to_pylist()], len(test), stop_token_ids(test), test_text)


def answer_share(params: Params, model: Path, prompts: Prompts, folder: Path) -> None:
    """This process's share of the prompts and of the raw text, except what `folder` already keeps.

    The arguments are positional because torch's launcher passes no others to a process.
    """
    distributed.select_gpu()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    rank, processes = distributed.rank(), distributed.world_size()
    by_length = sorted(range(len(prompts.rows)), key=lambda index: len(prompts.rows[index]["prompt_ids"]))
    share = by_length[rank::processes]
    answers, losses = kept_answers(folder, rank), kept_losses(folder, rank)
    left = [index for index in share if index not in answers.results]
    windows = TokenRows(read_tokens(prompts.text))
    batches = make_batches(windows.lengths.tolist(), batch_size=params.batch_size)[rank::processes]
    batches_left = [batch for batch in batches if batch[0] not in losses.results]
    if not left and not batches_left:
        return
    load = VllmBackend if params.use_vllm else TransformersBackend
    backend: Backend = load(model, generation_settings(params), template_stops=prompts.stop_tokens)
    desc = f"generate {model.name}" + (f" (process 0 of {processes})" if processes > 1 else "")
    hidden = not distributed.is_main()
    if batches_left:
        total, resumed = sum(map(len, batches)), sum(map(len, batches)) - sum(map(len, batches_left))
        with ProgressBar(f"{desc}, raw text", total=total, unit="windows", initial=resumed, disable=hidden) as bar:
            for batch in batches_left:
                losses.add(list(zip(batch, backend.text_losses([windows[index] for index in batch]), strict=True)))
                bar.update(len(batch))
    if left:
        resumed = len(share) - len(left)
        with ProgressBar(desc, total=len(share), unit="prompts", initial=resumed, disable=hidden) as bar:
            for group in backend.generate([prompts.rows[index] for index in left]):
                answers.add([(left[place], answer) for place, answer in group])
                bar.update(len(group))


def generation_settings(params: Params) -> GenerationSettings:
    """The part of the parameters that a backend needs."""
    values = params.model_dump()
    sampling = SamplingConfig(**{name: values[name] for name in SamplingConfig._fields})
    rest = {name: values[name] for name in GenerationSettings._fields if name != "sampling"}
    return GenerationSettings(sampling=sampling, **rest)


class KeptResults(Generic[T]):
    """The results of one process so far, in a file of the checkpoint folder, so that an interrupted run can resume.

    The file has one line of JSON for each finished batch: [[index of the prompt or window, result], ...].
    """

    def __init__(self, path: Path, read: Callable[[Any], T]) -> None:
        """Reads the results of an interrupted run; `read` makes one from its JSON.

        A process that is killed while it writes leaves a last line without its newline. The line is removed from the file,
        since the next batch would be appended to it, and its batch is computed again.
        """
        self._path = path
        self.results: dict[int, T] = {}
        """Results by index."""
        lines = self._path.read_bytes().splitlines(keepends=True) if self._path.exists() else []
        if lines and not lines[-1].endswith(b"\n"):
            lines.pop()
            self._path.write_bytes(b"".join(lines))
        for line in lines:
            self.results |= {index: read(result) for index, result in json.loads(line)}

    def add(self, batch: Sequence[tuple[int, T]]) -> None:
        """Appends the results of a batch."""
        self.results |= batch
        with self._path.open("ab") as file:
            file.write(json.dumps(batch).encode() + b"\n")


def kept_answers(folder: Path, rank: int) -> KeptResults[Answer]:
    """The answers of one process so far, by the index of their prompt."""
    return KeptResults(folder / f"{rank}.jsonl", lambda found: Answer(*found))


def kept_losses(folder: Path, rank: int) -> KeptResults[float]:
    """The losses on raw text of one process so far, by the index of their window."""
    return KeptResults(folder / f"{rank}.text.jsonl", float)


def _text_row(window: dict[str, Any], loss: float) -> dict[str, Any]:
    return {"id": window["id"], "tokens": count_labels(window), "loss": loss}


def _prediction(prompt: dict[str, Any], answer: Answer, *, tokenizer: Any) -> dict[str, Any]:
    """A row of the predictions. The stop token is counted, but it is not part of the text."""
    text = answer.tokens[:-1] if answer.stopped else answer.tokens
    return {
        "id": prompt["id"],
        "prompt": prompt["prompt"],
        "reference": prompt["reference"],
        "answer": decode_answer(tokenizer, text),
        "finish_reason": "stop" if answer.stopped else "length",
        "prompt_tokens": len(prompt["prompt_ids"]),
        "answer_tokens": len(answer.tokens),
    }
