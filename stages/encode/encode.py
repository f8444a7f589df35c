"""Renders each conversation with the prompt template, tokenizes it, and labels the tokens that are learned."""

import gc
import multiprocessing
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pyarrow as pa
from pydantic import Field

from stages.core.jsonl import parse_line, read_json, write_json, write_line
from stages.core.output import Done, fresh_file, fresh_folder
from stages.core.params import Section
from stages.core.problem import Problem, Rejection
from stages.core.progress import progress
from stages.core.tokens import IGNORE, PROMPTS, TRAINING, open_tokens
from stages.encode.counts import SPLITS, Chunk, Gates, Tally
from stages.encode.mask import LabelsOn
from stages.encode.rows import Row, RowMaker, TruncationStrategy
from stages.encode.tokenizer import EngineDiffersError

ROWS_PER_CHUNK = 500
"""Rows that are encoded together, and stand together in the Arrow file; the same whatever the number of processes."""
SHOWN_ROWS = 12
PAGE = Path(__file__).with_name("masks.html.jinja")


class Params(Section):
    """How a conversation becomes tokens and labels."""

    template: str
    """The file of the chat template; the model is saved with it. models/tokenizer/chat_template.jinja is the base's own."""
    labels_on: LabelsOn
    """What is learned: "assistant" (every answer), "last_assistant", or "all" (the prompts too)."""
    max_length: int = Field(gt=1)
    """Longest row in tokens."""
    truncation_strategy: TruncationStrategy
    """A longer row is set aside (drop), loses its beginning (left) or its end (right), or stops the stage (error)."""
    gates: Gates
    """What the token rows must not be."""


def encode(
    params: Params,
    *,
    examples: Path,
    prompts: Path,
    tokenizer: Path,
    tokens: Path,
    report: Path,
    masks: Path,
    lengths: Path,
) -> Done:
    """Writes train and validation rows (input_ids, labels) and tokenized test prompts as Arrow files into `tokens`.

    `prompts` is a JSON list of further prompts, texts or lists of messages, which have no right answer; they become
    prompts.arrow.

    `tokens` also gets rejected.jsonl (rows that do not fit, with the reason) and the template's text, which `merge` saves
    with the model. `report` gets counts, `masks` a page of what is learned, `lengths` a histogram.

    Several processes encode, and the bytes do not depend on their number.

    Raises Problem if the template or the tokenizer cannot be used, if a gate does not hold, or if no row is left.
    """
    further, template = _read_prompts(prompts), Path(params.template)
    maker = _load(params, tokenizer, template, use_engine=True)
    try:
        tally = _write_tokens(params, maker, examples, further, template, tokens)
    except EngineDiffersError as text:
        print(
            f"encode: fastokens and the tokenizer differ in {str(text)!r}; begins again with the tokenizer alone", flush=True
        )
        maker = _load(params, tokenizer, template, use_engine=False)
        tally = _write_tokens(params, maker, examples, further, template, tokens)
    counts = tally.report(maker.stop_token_ids)
    with fresh_file(report) as report_file, fresh_file(masks) as masks_file, fresh_file(lengths) as lengths_file:
        write_json(report_file, counts)
        masks_file.write_text(_page(tally.shown), encoding="utf-8", newline="\n")
        lengths_file.write_text(tally.histogram(), encoding="utf-8", newline="\n")
    return Done(
        f"{counts['train_tokens']:,} tokens to train on, {counts['train_label_tokens']:,} of them learned; "
        f"{counts['rows_rejected']:,} rows set aside in {tokens}/rejected.jsonl; look at {masks}"
    )


def _load(params: Params, tokenizer: Path, template: Path, *, use_engine: bool) -> RowMaker:
    """Raises Problem if the template or the tokenizer cannot be read."""
    try:
        return RowMaker(
            tokenizer,
            template.read_text(encoding="utf-8"),
            params.labels_on,
            params.max_length,
            params.truncation_strategy,
            use_engine=use_engine,
        )
    except FileNotFoundError as error:
        raise Problem(f"{error.filename}: not found; see encode.template, and run fetch for the tokenizer") from None
    except UnicodeDecodeError as error:
        raise Problem(f"{template}: not UTF-8 at byte {error.start + 1}") from None
    except jinja2.TemplateSyntaxError as error:
        raise Problem(f"{template}: line {error.lineno}: {error.message}") from None


def _read_prompts(path: Path) -> list[dict[str, Any]]:
    """The prompts of a JSON file as rows of data/examples, with an answer that is not used. Raises Problem."""
    wanted = 'wanted a list of texts, or of lists of {"role", "content"} that end with a user message'
    try:
        found = read_json(path)
    except FileNotFoundError:
        raise Problem(f"{path}: not found; it may be an empty list, []") from None
    except ValueError as error:
        raise Problem(f"{path}: not JSON: {error}; {wanted}") from None
    if not isinstance(found, list):
        raise Problem(f"{path}: found {type(found).__name__}, {wanted}")
    rows, problems = [], []
    for number, entry in enumerate(found, 1):
        messages = [{"role": "user", "content": entry}] if isinstance(entry, str) else entry
        try:
            texts = [(message["role"], message["content"].strip()) for message in messages]
            if not texts or texts[-1][0] != "user" or not texts[-1][1] or texts[-1][1].encode() == b"":
                raise ValueError
        except (AttributeError, KeyError, TypeError, ValueError):
            problems.append(f"{path}: entry {number}: found {str(entry)[:60]!r}, {wanted}")
            continue
        answered = [*messages, {"role": "assistant", "content": "."}]
        rows.append({"id": f"prompt-{number}", "source": f"{path.name}:{number}", "messages": answered})
    if problems:
        raise Problem(*problems)
    return rows


def _write_prompts(maker: RowMaker, rows: list[dict[str, Any]], path: Path) -> None:
    """Writes the prompts as training would see them. Raises Problem if the template has no place for one."""
    made = list(maker.rows(rows))
    problems = [
        f"{row['source']}: {found.reason}: {found.detail}"
        for row, found in zip(rows, made, strict=True)
        if isinstance(found, Rejection)
    ]
    if problems:
        raise Problem(*problems)
    prompts = [row._replace(reference="") for row in made if isinstance(row, Row)]
    with open_tokens(path, PROMPTS, maker.stop_token_ids) as stream:
        stream.write_batch(_prompt_batch(maker, prompts))


def _write_tokens(
    params: Params, maker: RowMaker, examples: Path, further: list[dict[str, Any]], template: Path, tokens: Path
) -> Tally:
    """Fills the folder `tokens`. Raises Problem if a gate does not hold, and EngineDiffersError."""
    tally = Tally()
    count = sum(_count_lines(examples / f"{split}.jsonl") for split in SPLITS)
    with _workers(maker, count) as pool, ExitStack() as stack:
        folder = stack.enter_context(fresh_folder(tokens))
        out = {
            split: stack.enter_context(
                open_tokens(folder / f"{split}.arrow", PROMPTS if split == "test" else TRAINING, maker.stop_token_ids)
            )
            for split in SPLITS
        }
        rejected = stack.enter_context((folder / "rejected.jsonl").open("w", encoding="utf-8", newline="\n"))
        for chunk in progress(_chunks(pool, maker, examples), "encode", total=count, size=lambda chunk: chunk.rows):
            if chunk.batch.num_rows:
                out[chunk.split].write_batch(chunk.batch)
            for row in chunk.rejected:
                write_line(rejected, row)
            tally.add(chunk)
        tally.check(template, params.gates, cut_is_error=params.truncation_strategy == "error")
        _write_prompts(maker, further, folder / "prompts.arrow")
        (folder / "chat_template.jinja").write_text(maker.template.source, encoding="utf-8", newline="\n")
    return tally


# Chunks


def _encode_chunk(maker: RowMaker, split: str, lines: list[bytes], show: int) -> Chunk:
    examples = [parse_line(line) for line in lines]
    rejected, rows = [], []
    for example, row in zip(examples, maker.rows(examples), strict=True):
        if isinstance(row, Rejection):
            entry = {"id": example["id"], "source": example["source"], "split": split}
            rejected.append(entry | {"reason": row.reason, "detail": row.detail})
        else:
            rows.append(row)
    counts = Counter(row["reason"] for row in rejected)
    counts["label_tokens"] = sum(last - first for row in rows for first, last in row.ranges)
    counts["rows_cut"] = sum(row.cut > 0 for row in rows)
    counts["tokens_cut"] = sum(row.cut for row in rows)
    for name in ("unstopped", "mismatched", "double_bos", "special_text", "unknown"):
        counts[name] = sum(getattr(row, name) for row in rows)
    return Chunk(
        split=split,
        rows=len(lines),
        batch=_prompt_batch(maker, rows) if split == "test" else _training_batch(rows),
        rejected=rejected,
        counts=counts,
        lengths=np.array([len(row.ids) for row in rows], dtype=np.int32),
        shown=[(row.id, _pieces(maker, row)) for row in rows[:show]],
    )


def _training_batch(rows: list[Row]) -> pa.RecordBatch:
    lengths = np.array([0, *(len(row.ids) for row in rows)], dtype=np.int32)
    ends = np.cumsum(lengths, dtype=np.int32)
    ids = np.concatenate([np.array([], dtype=np.int32), *(row.ids for row in rows)])
    labels = np.full_like(ids, IGNORE)
    for start, row in zip(ends.tolist(), rows, strict=False):
        for first, last in row.ranges:
            labels[start + first : start + last] = ids[start + first : start + last]
    return pa.RecordBatch.from_arrays(
        [
            pa.array([row.id for row in rows], pa.string()),
            pa.ListArray.from_arrays(pa.array(ends), pa.array(ids), type=pa.list_(pa.int32())),
            pa.ListArray.from_arrays(pa.array(ends), pa.array(labels), type=pa.list_(pa.int32())),
        ],
        schema=TRAINING,
    )


def _prompt_batch(maker: RowMaker, rows: list[Row]) -> pa.RecordBatch:
    columns = [
        {
            "id": row.id,
            "prompt": maker.encoder.decode(row.ids[: row.prompt_length]),
            "prompt_ids": row.ids[: row.prompt_length],
            "reference": row.reference,
        }
        for row in rows
    ]
    return pa.RecordBatch.from_pylist(columns, schema=PROMPTS)


def _pieces(maker: RowMaker, row: Row) -> list[tuple[str, bool]]:
    pieces, at = [], 0
    for first, last in row.ranges:
        pieces += [(maker.encoder.decode(row.ids[at:first]), False), (maker.encoder.decode(row.ids[first:last]), True)]
        at = last
    return [*pieces, (maker.encoder.decode(row.ids[at:]), False)]


def _chunks(pool: Executor | None, maker: RowMaker, examples: Path) -> Iterator[Chunk]:
    """The chunks of all splits, in order, while the processes work ahead a little."""
    tasks = (
        (split, lines, SHOWN_ROWS if split == "train" and not number else 0)
        for split in SPLITS
        for number, lines in enumerate(_read_chunks(examples / f"{split}.jsonl"))
    )
    if pool is None:
        yield from (_encode_chunk(maker, *task) for task in tasks)
        return
    waiting = [pool.submit(_encode_here, *task) for task in islice(tasks, 4 * (os.cpu_count() or 1))]
    while waiting:
        try:
            yield waiting.pop(0).result()
        except BrokenProcessPool:
            raise Problem("a process that encodes was killed; if it was for memory, run it again with more") from None
        waiting += [pool.submit(_encode_here, *task) for task in islice(tasks, 1)]


def _read_chunks(path: Path) -> Iterator[list[bytes]]:
    with path.open("rb") as file:
        while lines := list(islice(file, ROWS_PER_CHUNK)):
            yield lines


def _count_lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(1 for _ in file)


_here: RowMaker
"""The row maker of this process, taken over from the one that forked it."""


def _encode_here(split: str, lines: list[bytes], show: int) -> Chunk:
    return _encode_chunk(_here, split, lines, show)


def _workers(maker: RowMaker, rows: int) -> Any:
    """A pool of forked processes, one a core; None where there is too little to do."""
    global _here  # noqa: PLW0603
    _here = maker
    cores = len(os.sched_getaffinity(0))
    if cores == 1 or rows < 4 * ROWS_PER_CHUNK:
        return nullcontext()
    # Each process tokenizes by itself; threads do not survive a fork.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["RAYON_NUM_THREADS"] = "1"
    gc.collect()
    gc.freeze()  # else the collector's marks on all that is loaded would give each process a copy of it
    return ProcessPoolExecutor(cores, mp_context=multiprocessing.get_context("fork"))


def _page(rows: list[tuple[str, list[tuple[str, bool]]]]) -> str:
    return jinja2.Environment(autoescape=True).from_string(PAGE.read_text(encoding="utf-8")).render(rows=rows)
