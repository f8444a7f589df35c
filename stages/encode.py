"""Renders each conversation with the prompt template, tokenizes it, and labels the tokens that are learned."""

from collections import Counter
from pathlib import Path
from typing import Any

import jinja2
from pydantic import Field
from transformers import AutoTokenizer
from transformers.utils import logging

from stages.lib.jsonl import read_json, read_jsonl, write_json, write_jsonl
from stages.lib.mask import IGNORE, LabelsOn, Untraceable, find_answers, make_labels, prompt_length
from stages.lib.output import fresh_file, fresh_folder
from stages.lib.params import Section
from stages.lib.problem import Problem
from stages.lib.rejection import Rejection
from stages.lib.tokens import PROMPTS, TRAINING, write_tokens

PREVIEW_ROWS = 5
HISTOGRAM_BINS = 20


class Params(Section):
    """How a conversation becomes tokens and labels."""

    template: str
    """The file of the chat template; the model is saved with it. models/tokenizer/chat_template.jinja is the base's own."""
    labels_on: LabelsOn
    """What is learned: "assistant" (every answer), "last_assistant", or "all" (the prompts too)."""
    max_length: int = Field(gt=1)
    """Longest row in tokens. Longer ones are set aside and counted, never cut."""


def encode(
    params: Params, examples: Path, tokenizer: Path, template: Path, tokens: Path, report: Path, preview: Path, lengths: Path
) -> None:
    """Writes train and validation rows (input_ids, labels) and tokenized test prompts as Arrow files into `tokens`.

    `tokens` also gets rejected.jsonl (rows that do not fit, with the reason) and the template's text, which `merge` saves
    with the model. `report` gets counts, `preview` the first rows with the learned text marked, `lengths` a histogram.

    Raises Problem if the template or the tokenizer cannot be used, or if no row is left to train on.
    """
    encoder = _Encoder(params, tokenizer, template.read_text(encoding="utf-8"))
    rows: dict[str, list[dict[str, Any]]] = {}
    rejected = []
    for split in ("train", "validation", "test"):
        rows[split] = []
        for example in read_jsonl(examples / f"{split}.jsonl"):
            try:
                rows[split].append(encoder.row(example))
            except Rejection as why:
                rejected.append(
                    {"id": example["id"], "source": example["source"], "split": split}
                    | {"reason": why.reason, "detail": why.detail}
                )
    counts = _counts(rows, rejected, sorted(encoder.stop_token_ids))
    _check_not_empty(rows, rejected, template)
    with fresh_folder(tokens) as folder:
        stops = sorted(encoder.stop_token_ids)
        for split, schema in (("train", TRAINING), ("validation", TRAINING), ("test", PROMPTS)):
            write_tokens(folder / f"{split}.arrow", schema, [_columns(row, schema) for row in rows[split]], stops)
        write_jsonl(folder / "rejected.jsonl", rejected)
        (folder / "chat_template.jinja").write_text(encoder.template, encoding="utf-8", newline="\n")
    with fresh_file(report) as file:
        write_json(file, counts)
    with fresh_file(preview) as file:
        file.write_text(_preview(encoder, rows["train"]), encoding="utf-8", newline="\n")
    with fresh_file(lengths) as file:
        file.write_text(_histogram([len(row["input_ids"]) for row in rows["train"]]), encoding="utf-8", newline="\n")
    print(
        f"encode: {counts['train_tokens']:,} tokens to train on, {counts['train_label_tokens']:,} of them learned; "
        f"{len(rejected):,} rows set aside in {tokens}/rejected.jsonl; look at {preview}"
    )


class _Encoder:
    """The tokenizer and the template, and the rule that makes a row of them."""

    def __init__(self, params: Params, folder: Path, template: str) -> None:
        self.params = params
        self.template = template
        logging.set_verbosity_error()  # it warns of rows longer than the model's context, which are counted here
        self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=_trusts_code(folder))
        if not self.tokenizer.is_fast:
            raise Problem(f"{folder}: this tokenizer has no fast version, which gives the place of each token in the text")
        self.special_tokens = [token for token in self.tokenizer.all_special_tokens if token]
        self.special_tokens += [str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        self.stop_token_ids: set[int] = set()
        # Some tokenizers put a BOS before every text; then the model expects one.
        bos = self.tokenizer.bos_token_id
        self.bos_ids = [bos] if bos is not None and self.tokenizer("")["input_ids"][:1] == [bos] else []

    def row(self, example: dict[str, Any]) -> dict[str, Any]:
        """One conversation as tokens and labels. Raises Rejection."""
        messages = example["messages"]
        for message in messages:
            found = [token for token in self.special_tokens if token in message["content"]]
            if found:
                raise Rejection("special_token_in_text", f"{found[0]} in a {message['role']} text")
        try:
            text, spans = find_answers(self.render, messages, self.special_tokens)
        except Untraceable as error:
            raise Rejection("answer_not_traceable", str(error)) from None
        except jinja2.TemplateError as error:
            raise Rejection("not_in_template", str(error)) from None
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        input_ids, offsets = list(encoded["input_ids"]), list(encoded["offset_mapping"])
        if self.bos_ids and input_ids[:1] != self.bos_ids:
            input_ids, offsets = self.bos_ids + input_ids, [(0, 0), *offsets]
        if len(input_ids) > self.params.max_length:
            raise Rejection("too_long", f"{len(input_ids)} tokens, encode.max_length is {self.params.max_length}")
        labels = make_labels(input_ids, offsets, spans, self.params.labels_on)
        if all(label == IGNORE for label in labels):
            raise Rejection("nothing_to_learn", "no answer of this row is trained")
        self.stop_token_ids |= {self.tokenizer.convert_tokens_to_ids(span.stop) for span in spans if span.stop}
        length = prompt_length(offsets, spans)
        return {
            "id": example["id"],
            "input_ids": input_ids,
            "labels": labels,
            "prompt": self.tokenizer.decode(input_ids[:length]),
            "prompt_ids": input_ids[:length],
            "reference": messages[-1]["content"],
            "stopped": bool(spans[-1].stop),
        }

    def render(self, messages: list[dict[str, Any]]) -> str:
        """The template's text for the messages, as the saved model will render it."""
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, chat_template=self.template))


def _trusts_code(tokenizer: Path) -> bool:
    # fetch brings code along only where params.yaml trusts it.
    return "auto_map" in read_json(tokenizer / "config.json")


def _columns(row: dict[str, Any], schema: Any) -> dict[str, Any]:
    return {name: row[name] for name in schema.names}


def _check_not_empty(rows: dict[str, list[dict[str, Any]]], rejected: list[dict[str, Any]], template: Path) -> None:
    empty = [split for split, kept in rows.items() if not kept]
    if empty:
        first = {row["reason"]: f"{row['reason']}: {row['source']}: {row['detail']}" for row in reversed(rejected)}
        raise Problem(f"no rows left for {' and '.join(empty)} with the template {template}", *first.values())


def _counts(
    rows: dict[str, list[dict[str, Any]]], rejected: list[dict[str, Any]], stop_token_ids: list[int]
) -> dict[str, Any]:
    counts: dict[str, Any] = {}
    for split, kept in rows.items():
        counts[f"{split}_rows"] = len(kept)
        counts[f"{split}_tokens"] = sum(len(row["input_ids"]) for row in kept)
        counts[f"{split}_label_tokens"] = sum(label != IGNORE for row in kept for label in row["labels"])
    counts["longest_row"] = max((len(row["input_ids"]) for kept in rows.values() for row in kept), default=0)
    counts["rows_without_stop_token"] = sum(not row["stopped"] for kept in rows.values() for row in kept)
    counts["stop_token_ids"] = stop_token_ids
    counts["rows_rejected"] = len(rejected)
    counts["rejected_by_reason"] = dict(sorted(Counter(row["reason"] for row in rejected).items()))
    return counts


def _preview(encoder: _Encoder, rows: list[dict[str, Any]]) -> str:
    """The first rows as text; what is learned stands in ⟦ ⟧."""
    parts = []
    for row in rows[:PREVIEW_ROWS]:
        text, learning = "", False
        run: list[int | None] = []
        for token, label in [*zip(row["input_ids"], row["labels"], strict=True), (None, IGNORE)]:
            if token is None or (label != IGNORE) != learning:
                piece = encoder.tokenizer.decode(run)
                text += f"⟦{piece}⟧" if learning else piece
                learning, run = label != IGNORE, []
            run.append(token)
        parts.append(f"--- {row['id']}: {len(row['input_ids'])} tokens\n{text}\n")
    return "\n".join(parts)


def _histogram(lengths: list[int]) -> str:
    """How many training rows have how many tokens, as CSV. The ranges have leading zeros: DVC sorts them as text."""
    width = max(1, -(-max(lengths) // HISTOGRAM_BINS))
    bins = Counter((length - 1) // width for length in lengths)
    digits = len(str((max(bins) + 1) * width))
    lines = [
        f"{at * width + 1:0{digits}}-{(at + 1) * width:0{digits}},{bins[at]}\n" for at in range(min(bins), max(bins) + 1)
    ]
    return "tokens,rows\n" + "".join(lines)
