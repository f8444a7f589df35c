"""Renders each conversation with the chat template, tokenizes it, and labels the tokens that are in the loss."""

import csv
from contextlib import ExitStack, closing
from itertools import chain, islice
from pathlib import Path
from typing import Any, ClassVar

import jinja2
from pydantic import Field

from stages.core.jsonl import write_json, write_line
from stages.core.output import Done, fresh_file, fresh_folder, kept_if_stopped
from stages.core.params import Section, bad_param
from stages.core.problem import Problem, Rejection
from stages.core.progress import progress
from stages.core.tokens import PROMPTS, TRAINING, open_tokens
from stages.encode.answers import Thinking
from stages.encode.chunks import count_rows, prompt_batch, read_sample, read_tasks
from stages.encode.counts import Counts, Gates
from stages.encode.mask import LabelsOn
from stages.encode.masks_page import render_masks_page
from stages.encode.prompts import read_prompts
from stages.encode.rows import TEST, RowMaker, TokenRow, TruncationStrategy
from stages.encode.template import fix_variables
from stages.encode.tokenizer import FastTokenizerMismatch
from stages.encode.workers import encode_chunks

LFS_POINTER = "version https://git-lfs.github.com/spec/"
"""How a file begins that git-lfs has not replaced by the file itself."""


class Params(Section):
    """How a conversation becomes tokens and labels."""

    template: str
    """Path of the chat template. Saved with the model. The base model's own is models/tokenizer/chat_template.jinja."""
    labels_on: LabelsOn
    """The tokens in the loss: "assistant" (every answer), "last_assistant", or "all" (the prompts too)."""
    template_kwargs: dict[str, Any]
    """Values of the template's variables, {"enable_thinking": False}. They are written into the saved template too."""
    thinking: Thinking
    """The reasoning of an answer is in the loss (train), only context (mask), or removed from all messages (drop)."""
    train_empty_thinking: bool
    """Whether an empty thinking block that the template writes before an answer is in the loss, not part of the prompt."""
    max_length: int = Field(gt=1)
    """Longest row in tokens."""
    truncation_strategy: TruncationStrategy
    """A longer row is rejected (drop), loses its beginning (left) or its end (right), or stops the stage (error)."""
    gates: Gates
    """Percentages of rows above which the stage fails."""

    removed: ClassVar = {
        "max_unlearned_percent": "write max_unlabelled_percent",
        "max_unstopped_percent": "write max_without_stop_percent",
        "max_double_bos_percent": "delete it: a row that begins with two BOS tokens is always an error",
    }


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
    """Writes training and validation rows (input_ids, labels) and tokenized test prompts as Arrow files into `tokens`.

    `prompts` is a JSON list of extra prompts without a reference answer: texts or lists of messages. They become
    prompts.arrow.

    `tokens` also contains text.arrow (raw text of the test split, as training rows), rejected.jsonl (rejected rows with the
    reason) and the chat template, which `merge` saves with the model. `report` contains the counts, `masks` a page that
    shows the text in the loss, `lengths` a histogram.

    Rows are encoded on all cores; the number of cores does not change the output. Of many rows, a sample is encoded first,
    so that a gate which is exceeded by far stops the stage within seconds. A stopped stage leaves rejected.jsonl and
    summary.json in reports/failed/encode.

    Raises Problem if the template, the prompts or the tokenizer cannot be used, a gate is exceeded, or no rows are left.
    """
    extra_prompts = read_prompts(prompts)
    failed = report.parent / "failed" / "encode"
    try:
        maker = _load_maker(params, tokenizer, use_fastokens=True)
        if maker.encoder.fastokens_error:
            print(f"encode: tokenizing without fastokens, which is slower: {maker.encoder.fastokens_error}", flush=True)
        counts = _write_tokens(params, maker, examples, extra_prompts, tokens=tokens, failed=failed)
    except FastTokenizerMismatch as mismatch:
        print(
            f"encode: fastokens and the model's tokenizer give different tokens for {str(mismatch)!r}; starting again "
            "without fastokens, which is slower",
            flush=True,
        )
        maker = _load_maker(params, tokenizer, use_fastokens=False)
        counts = _write_tokens(params, maker, examples, extra_prompts, tokens=tokens, failed=failed)
    for note in counts.notes(truncates=params.truncation_strategy in ("left", "right")):
        print(f"encode: {note}", flush=True)
    summary, shown = counts.report(maker.stop_token_ids), counts.previews.choose()
    with fresh_file(report) as report_file, fresh_file(masks) as masks_file, fresh_file(lengths) as lengths_file:
        write_json(report_file, summary)
        explained = [(preview, [maker.explain(preview.example, row) for row in preview.rows]) for preview in shown]
        masks_file.write_text(render_masks_page(explained), encoding="utf-8", newline="\n")
        _write_histogram(lengths_file, counts)
    trained, labelled, rejected = summary["train_tokens"], summary["train_label_tokens"], summary["rows_rejected"]
    return Done(
        f"{trained:,} tokens to train on, {labelled:,} of them in the loss (see {masks}); {rejected:,} rows rejected"
        + (f" (see {tokens}/rejected.jsonl)" if rejected else "")
    )


def _load_maker(params: Params, tokenizer: Path, *, use_fastokens: bool) -> RowMaker:
    """Raises Problem if the template or the tokenizer cannot be used."""
    try:
        return RowMaker(
            tokenizer,
            _fix_variables(params),
            labels_on=params.labels_on,
            thinking=params.thinking,
            train_empty_thinking=params.train_empty_thinking,
            max_length=params.max_length,
            truncation_strategy=params.truncation_strategy,
            use_fastokens=use_fastokens,
        )
    except jinja2.TemplateSyntaxError as error:
        raise Problem(f"{params.template}: line {error.lineno}: {error.message}") from None


def _fix_variables(params: Params) -> str:
    """The template with the values of `template_kwargs`. Raises Problem, and jinja2.TemplateSyntaxError."""
    source = _read_template(params.template)
    try:
        return fix_variables(source, params.template_kwargs)
    except ValueError as error:
        raise Problem(*(bad_param("encode.template_kwargs", problem) for problem in str(error).splitlines())) from None


def _read_template(path: str) -> str:
    """The template's text. Raises Problem if it is not a text file."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        if not text.startswith(LFS_POINTER):
            return text
        message = "is a git-lfs pointer and not the template itself; fetch the file with: git lfs pull"
    except (FileNotFoundError, NotADirectoryError):
        message = "not found; write the path of a chat template, such as stages/templates/chatml.jinja"
    except IsADirectoryError:
        message = "is a folder; write the path of a chat template in it"
    except UnicodeDecodeError as error:
        message = f"not UTF-8 at byte {error.start + 1}; save it as UTF-8"
    except (OSError, ValueError) as error:  # a path that is too long, or contains a null character
        message = f"cannot be read: {getattr(error, 'strerror', None) or error}"
    raise Problem(bad_param("encode.template", f"{path!r}: {message}"))


def _write_tokens(
    params: Params, maker: RowMaker, examples: Path, extra_prompts: list[dict[str, Any]], *, tokens: Path, failed: Path
) -> Counts:
    """Writes the folder `tokens`. Raises Problem if a gate is exceeded, and FastTokenizerMismatch."""
    rows_by_split = count_rows(examples)
    rows = sum(rows_by_split.values())
    sample = read_sample(examples, rows_by_split)
    of_sample, counts = Counts(), Counts()
    template, long_row_is_error = Path(params.template), params.truncation_strategy == "error"
    with ExitStack() as stack:
        folder = stack.enter_context(fresh_folder(tokens))
        rejected_file = folder / "rejected.jsonl"
        kept = kept_if_stopped(failed, rejected_file, summary=lambda: counts.summary() or of_sample.summary())
        stack.enter_context(kept)
        schemas = {"train": TRAINING, "validation": TRAINING, "test": PROMPTS, "text": TRAINING}
        out = {
            name: stack.enter_context(open_tokens(folder / f"{name}.arrow", schema, maker.stop_token_ids))
            for name, schema in schemas.items()
        }
        rejected = stack.enter_context(rejected_file.open("w", encoding="utf-8", newline="\n"))
        chunks = stack.enter_context(closing(encode_chunks(maker, chain(sample, read_tasks(examples)), rows=rows)))
        for chunk in islice(chunks, len(sample)):
            of_sample.add(chunk)
            for row in chunk.rejected:
                write_line(rejected, row)
        of_sample.check_sample(template, params.gates, rows=rows, long_row_is_error=long_row_is_error)
        rejected.seek(0)
        rejected.truncate()
        for chunk in progress(chunks, "encode", total=rows, size=lambda chunk: chunk.rows):
            for name, batch in ((chunk.split, chunk.batch), ("text", chunk.text)):
                if batch.num_rows:
                    out[name].write_batch(batch)
            for row in chunk.rejected:
                write_line(rejected, row)
            counts.add(chunk)
        counts.check(template, params.gates, long_row_is_error=long_row_is_error)
        _write_prompts(maker, extra_prompts, folder / "prompts.arrow")
        (folder / "chat_template.jinja").write_text(maker.template.source, encoding="utf-8", newline="\n")
    return counts


def _write_prompts(maker: RowMaker, prompts: list[dict[str, Any]], path: Path) -> None:
    """Writes the extra prompts as training would see them. Raises Problem with every prompt that cannot be encoded."""
    results = [row for rows in maker.rows(prompts, TEST) for row in rows]
    problems = [
        f"{prompt['source']}: {result.reason}: {result.detail}"
        for prompt, result in zip(prompts, results, strict=True)
        if isinstance(result, Rejection)
    ]
    if problems:
        raise Problem(*problems)
    rows = [row._replace(answer_end=row.prompt_length) for row in results if isinstance(row, TokenRow)]
    with open_tokens(path, PROMPTS, maker.stop_token_ids) as stream:
        stream.write_batch(prompt_batch(maker, rows))


def _write_histogram(path: Path, counts: Counts) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("tokens", "rows"))
        writer.writerows(counts.histogram())
