"""Answers test prompts, and the prompts of data/prompts.json, with one model; and its losses on raw test text."""

import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, TypeVar

import numpy as np
from pydantic import Field
from transformers import AutoTokenizer
from transformers.utils import logging

from stages.core.jsonl import read_json, write_jsonl
from stages.core.output import Done, fresh_file
from stages.core.params import Section, bad_param
from stages.core.problem import Problem
from stages.core.progress import ProgressBar
from stages.core.provenance import fingerprint, inputs_of
from stages.core.tokens import decode_answer
from stages.generate.backend import Answer, Backend, GenerationSettings
from stages.generate.checks import check_prompts
from stages.generate.rows import PromptRows, Rows, read_rows
from stages.generate.sampling import SamplingConfig
from stages.generate.text_losses import count_labels, make_batches
from stages.generate.transformers_backend import TransformersBackend
from stages.generate.vllm_backend import VllmBackend
from stages.model import distributed
from stages.model.checkpoints import CheckpointFolder
from stages.model.device import DtypeName, pick_device, pick_dtype
from stages.model.launch import launch
from stages.model.load import one_copy_each
from stages.model.placement import total_memory, weight_bytes

T = TypeVar("T")
CHECKSUM = 9
"""Bytes before the JSON of a kept result: eight hex digits and a space."""


class Params(Section):
    """How prompts are answered. The names are those of Transformers' GenerationConfig where it has them."""

    removed: ClassVar[Mapping[str, str]] = {
        "preset": "write the tutorial's values instead: do_sample: true, temperature: 0.5, top_p: 0.85, "
        "repetition_penalty: 2.0, max_new_tokens: 1024"
    }

    max_predict_samples: int = Field(ge=0)
    """Test prompts that are answered, and documents of raw text that are measured, chosen by the hash of their ids; 0: all.
    Of raw text, at most four times as many windows. The prompts of data/prompts.json are always answered."""
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


class Files(NamedTuple):
    """What `encode` wrote for this stage, read in every process."""

    test_prompts: Path
    extra_prompts: Path
    test_text: Path


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
    """Answers chosen ones of `test_prompts` in `predictions`, and all of `extra_prompts` in `extra_predictions`, in order.

    A row: {"id", "prompt", "reference", "answer", "finish_reason": "stop" or "length", "prompt_tokens", "answer_tokens"}.
    For each chosen window of raw text in `test_text`, `text_losses` gets {"id", "tokens": those with a label, "loss": the
    sum of their losses in nats}. Which rows are chosen depends on their ids alone, so all models answer the same ones. The
    prompts come tokenized from `encode`, so this stage knows no template. An answer depends on its own prompt and row id,
    not on the other rows of its batch. An interrupted run resumes after the last batch that it finished. Prompts stay in
    their file, and answers in that of the checkpoint, so the memory does not grow with their number.

    Raises Problem if a single prompt does not fit into memory, if another process runs this stage on the same inputs, or
    if vLLM is to give the losses on raw text.
    """
    if params.num_processes > 1:
        distributed.require_gpus(params.num_processes, "generate.num_processes")
        if not params.use_vllm:
            _require_one_copy_each(model, params)
    processes = 1 if params.use_vllm else params.num_processes
    inputs = inputs_of("generate", params.model_dump(), (model, test_prompts, extra_prompts, test_text), Path())
    files = Files(test_prompts, extra_prompts, test_text)
    rows = read_rows(*files, at_most=params.max_predict_samples)
    windows = rows.windows
    if params.use_vllm and len(windows):
        raise Problem(
            bad_param(
                "generate.use_vllm",
                f"true, but the losses on the {rows.all_windows_count:,} windows of raw text in {test_text} are computed "
                "with Transformers; set it to false",
            )
        )
    check_prompts(model, rows.prompts, windows, max_new_tokens=params.max_new_tokens)
    if rows.test_count < rows.all_test_count:
        print(f"generate: answering {_describe(rows)} (generate.max_predict_samples)", flush=True)
    with CheckpointFolder(f"generate-{model.name}", fingerprint(inputs)) as folder:
        if processes > 1:
            launch(answer_share, processes, params, model, files, folder.path)
        else:
            answer_share(params, model, files, folder.path)
        answers = [kept_answers(folder.path, rank) for rank in range(processes)]
        losses = [kept_losses(folder.path, rank) for rank in range(processes)]
        trust = read_json(model / "manifest.json")["trust_remote_code"]
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=trust)
        made = _Predictions(rows.prompts, answers, tokenizer=tokenizer)
        with ExitStack() as stack:
            file, extra_file, text_file = map(
                stack.enter_context, map(fresh_file, (predictions, extra_predictions, text_losses))
            )
            write_jsonl(file, made.make(range(rows.test_count)))
            write_jsonl(extra_file, made.make(range(rows.test_count, len(rows.prompts))))
            write_jsonl(text_file, (_text_row(windows[index], find_result(losses, index)) for index in range(len(windows))))
        summary = f"{predictions}: {_describe(rows)} answered, {made.cut:,} cut at {params.max_new_tokens} tokens"
        if len(windows):
            of_all = f" of {rows.all_windows_count:,}" if len(windows) < rows.all_windows_count else ""
            summary += f"; {text_losses}: losses of {len(windows):,}{of_all} windows of raw text"
        return Done(summary, folder.remove)


def _require_one_copy_each(model: Path, params: Params) -> None:
    """Raises Problem if one GPU does not hold the model, of which each process would load a copy."""
    gpus = total_memory().gpus
    size = weight_bytes(model, pick_dtype(params.dtype, pick_device()))
    if gpus and size > min(gpus.values()):
        raise Problem(one_copy_each(model, size, min(gpus.values())))


def _describe(rows: Rows) -> str:
    """The prompts that are answered, in words."""
    of_all = f" of {rows.all_test_count:,}" if rows.test_count < rows.all_test_count else ""
    extra = len(rows.prompts) - rows.test_count
    return f"{rows.test_count:,}{of_all} test rows" + (f" and {extra:,} other prompts" if extra else "")


def answer_share(params: Params, model: Path, files: Files, folder: Path) -> None:
    """This process's share of the prompts and of the raw text, except what `folder` already keeps.

    The arguments are positional because `launch` passes no others to a process.
    """
    distributed.select_gpu()
    distributed.init_exchange()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    rank, processes = distributed.rank(), distributed.world_size()
    rows = read_rows(*files, at_most=params.max_predict_samples)
    share = np.argsort(rows.prompts.lengths, kind="stable")[rank::processes]
    answers, losses = kept_answers(folder, rank), kept_losses(folder, rank)
    if damaged := answers.damaged + losses.damaged:
        print(f"generate: {damaged:,} results of an earlier run are damaged in {folder}, and are computed again", flush=True)
    left = share[[index not in answers for index in share.tolist()]]
    windows = rows.windows
    batches = make_batches(windows.lengths.tolist(), batch_size=params.batch_size)[rank::processes]
    batches_left = [batch for batch in batches if not all(index in losses for index in batch)]
    if not len(left) and not batches_left:
        distributed.require_same_notes(took_part=False)
        return
    load = VllmBackend if params.use_vllm else TransformersBackend
    backend: Backend = load(model, generation_settings(params), template_stops=rows.stop_tokens)
    desc = f"generate {model.name}" + (f" (process 0 of {processes})" if processes > 1 else "")
    hidden = not distributed.is_main()
    if batches_left:
        total, resumed = sum(map(len, batches)), sum(map(len, batches)) - sum(map(len, batches_left))
        with ProgressBar(f"{desc}, raw text", total=total, unit="windows", initial=resumed, disable=hidden) as bar:
            for batch in batches_left:
                losses.add(list(zip(batch, backend.text_losses([windows[index] for index in batch]), strict=True)))
                bar.update(len(batch))
    if len(left):
        backend.prepare(int(rows.prompts.lengths.max()))  # of all prompts: the same decisions in all processes
    distributed.require_same_notes(took_part=len(left) > 0)
    if len(left):
        resumed = len(share) - len(left)
        with ProgressBar(desc, total=len(share), unit="prompts", initial=resumed, disable=hidden) as bar:
            for group in backend.generate(rows.prompts.select(left)):
                answers.add([(int(left[place]), answer) for place, answer in group])
                bar.update(len(group))


def generation_settings(params: Params) -> GenerationSettings:
    """The part of the parameters that a backend needs."""
    values = params.model_dump()
    sampling = SamplingConfig(**{name: values[name] for name in SamplingConfig._fields})
    rest = {name: values[name] for name in GenerationSettings._fields if name != "sampling"}
    return GenerationSettings(sampling=sampling, **rest)


class KeptResults(Mapping[int, T]):
    """The results of one process so far by index, in a file of the checkpoint folder: an interrupted run can resume.

    The file has a line for each result: its CRC-32, and JSON: [index of the prompt or window, result]. A result is read when
    it is asked for; memory holds only where its line begins.
    """

    damaged: int
    """Lines that are not what was written. They are not used, so that their prompts are answered again."""

    def __init__(self, path: Path, read: Callable[[Any], T]) -> None:
        """Opens the results of an interrupted run; `read` makes one from its JSON.

        A process that is killed while it writes leaves a last line without its newline. The line is removed from the file,
        since the next one would be appended to it, and its prompt is answered again.
        """
        self._path, self._read = path, read
        self._starts: dict[int, int] = {}
        self.damaged = 0
        path.touch()
        with path.open("rb+") as file:
            start = 0
            for line in file:
                if not line.endswith(b"\n"):
                    file.truncate(start)
                    break
                if _is_whole(line):
                    self._starts[json.loads(line[CHECKSUM:])[0]] = start
                else:
                    self.damaged += 1
                start += len(line)
        self._end = start

    def __getitem__(self, index: int) -> T:
        with self._path.open("rb") as file:
            file.seek(self._starts[index])
            return self._read(json.loads(file.readline()[CHECKSUM:])[1])

    def __contains__(self, index: object) -> bool:
        return index in self._starts

    def __iter__(self) -> Iterator[int]:
        return iter(self._starts)

    def __len__(self) -> int:
        return len(self._starts)

    def add(self, batch: Sequence[tuple[int, T]]) -> None:
        """Appends the results of a batch."""
        lines = [_with_checksum(json.dumps(result).encode() + b"\n") for result in batch]
        with self._path.open("ab") as file:
            file.write(b"".join(lines))
        for (index, _), line in zip(batch, lines, strict=True):
            self._starts[index] = self._end
            self._end += len(line)


def _with_checksum(line: bytes) -> bytes:
    return f"{zlib.crc32(line):08x} ".encode() + line


def _is_whole(line: bytes) -> bool:
    return line == _with_checksum(line[CHECKSUM:])


def kept_answers(folder: Path, rank: int) -> KeptResults[Answer]:
    """The answers of one process so far, by the index of their prompt."""
    return KeptResults(folder / f"{rank}.jsonl", lambda found: Answer(*found))


def kept_losses(folder: Path, rank: int) -> KeptResults[float]:
    """The losses on raw text of one process so far, by the index of their window."""
    return KeptResults(folder / f"{rank}.text.jsonl", float)


def find_result(kept: Sequence[KeptResults[T]], index: int) -> T:
    """The result of a prompt or window, which one of the processes has kept."""
    return next(results[index] for results in kept if index in results)


def _text_row(window: dict[str, Any], loss: float) -> dict[str, Any]:
    return {"id": window["id"], "tokens": count_labels(window), "loss": loss}


class _Predictions:
    """The rows of the predictions, made one after the other as they are written."""

    def __init__(self, prompts: PromptRows, answers: Sequence[KeptResults[Answer]], *, tokenizer: Any) -> None:
        self._prompts, self._answers, self._tokenizer = prompts, answers, tokenizer
        self.cut = 0
        """Answers made so far that are cut at max_new_tokens."""

    def make(self, indices: Sequence[int]) -> Iterator[dict[str, Any]]:
        """The rows of the prompts with these indices. The stop token is counted, but it is not part of the text."""
        for index in indices:
            prompt, answer = self._prompts[index], find_result(self._answers, index)
            self.cut += not answer.stopped
            yield {
                "id": prompt["id"],
                "prompt": prompt["prompt"],
                "reference": prompt["reference"],
                "answer": decode_answer(self._tokenizer, answer.tokens[:-1] if answer.stopped else answer.tokens),
                "finish_reason": "stop" if answer.stopped else "length",
                "prompt_tokens": len(prompt["prompt_ids"]),
                "answer_tokens": len(answer.tokens),
            }
