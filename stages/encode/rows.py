"""Turns one conversation into tokens with labels: renders it, tokenizes it and, if asked to, truncates it."""

import json
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import jinja2
import numpy as np

from stages.core.problem import Rejection
from stages.encode.mask import AnswerSpan, LabelsOn, find_answers, find_label_ranges
from stages.encode.template import ChatTemplate, Untraceable
from stages.encode.tokenizer import EncodedText, Encoder, Ids

TruncationStrategy: TypeAlias = Literal["drop", "left", "right", "error"]
CACHED_PROMPT_ENDS = 2000
"""Prompt ends whose tokens are cached. Most templates have a single one."""


class TokenRow(NamedTuple):
    """One conversation as tokens."""

    id: str
    ids: Ids
    label_ranges: list[tuple[int, int]]
    """Tokens [start, end) that are in the loss."""
    prompt_length: int
    """Tokens before the last answer."""
    reference: str
    """The text of the last answer."""
    tokens_cut: int
    """Tokens removed because the row was longer than max_length."""
    without_stop: bool
    """Whether no stop token follows the last answer."""
    prompt_mismatch: bool
    """Whether the row does not start with the tokens of the prompt for generation."""
    double_bos: bool
    """Whether the row begins with two BOS tokens."""
    special_text: bool
    """Whether a message contains the text of a special token."""
    unknown: int
    """The number of unknown tokens."""


class RenderedText(NamedTuple):
    """One conversation as text."""

    text: str
    answers: list[AnswerSpan]
    prompt_end: str
    """The end of the prompt for the last answer, after its last special token."""
    encoded: EncodedText | None
    """The tokens, if a message contains the text of a special token; else the text is yet to be tokenized."""


class RowMaker:
    """Makes token rows with one tokenizer and one template."""

    def __init__(
        self,
        tokenizer: Path,
        template: str,
        *,
        labels_on: LabelsOn,
        max_length: int,
        truncation_strategy: TruncationStrategy,
        use_fastokens: bool,
    ) -> None:
        """Reads the tokenizer's folder. Raises jinja2.TemplateSyntaxError if `template` is not valid Jinja source."""
        self.labels_on, self.max_length, self.truncation_strategy = labels_on, max_length, truncation_strategy
        self.encoder = Encoder(tokenizer, use_fastokens=use_fastokens)
        self.template = ChatTemplate(template, self.encoder.template_variables)
        self.stop_token_ids = self._find_stop_tokens()
        self._prompt_ends: dict[str, list[int]] = {}

    def _find_stop_tokens(self) -> list[int]:
        """The special tokens that the template writes after an answer, found with two small conversations."""
        turns = [{"role": ("user", "assistant")[number % 2], "content": str(number)} for number in range(4)]
        found = set()
        for messages in (turns[:2], turns):
            try:
                _, answers, _ = find_answers(self.template, messages, tools=[], special=self.encoder.special)
            except (Untraceable, jinja2.TemplateError):
                continue  # The template may need more than these messages. Each row is checked on its own later.
            found |= {answer.stop for answer in answers if answer.stop}
        return sorted(self.encoder.id_of(token) for token in found)

    def rows(self, examples: Sequence[dict[str, Any]]) -> Iterator[TokenRow | Rejection]:
        """The token rows of some conversations of `data/examples`, in order; a Rejection for each rejected one.

        Raises FastTokenizerMismatch.
        """
        rendered = [self._render(example) for example in examples]
        texts = [found.text for found in rendered if not isinstance(found, Rejection) and found.encoded is None]
        encoded = iter(self.encoder.encode_batch(texts))
        self._encode_prompt_ends({found.prompt_end for found in rendered if not isinstance(found, Rejection)})
        for example, found in zip(examples, rendered, strict=True):
            try:
                yield found if isinstance(found, Rejection) else self._row(example, found, found.encoded or next(encoded))
            except Rejection as rejection:
                yield rejection

    def _render(self, example: dict[str, Any]) -> RenderedText | Rejection:
        messages, tools = example["messages"], example.get("tools", [])
        try:
            text, answers, text_spans = find_answers(self.template, messages, tools=tools, special=self.encoder.special)
        except Untraceable as error:
            return Rejection("answer_not_traceable", str(error))
        except jinja2.TemplateError as error:
            return Rejection("not_in_template", str(error))
        missing = next((part for part in _required_texts(messages, tools) if part not in text), None)
        if missing is not None:
            return Rejection("not_in_template", f"the template leaves out {missing[:60]!r}")
        contents = [message["content"] for message in messages]
        if text_spans is None:
            contents.append(json.dumps([tools, [message.get("tool_calls") for message in messages]], ensure_ascii=False))
        if not any(map(self.encoder.special.first_in, contents)):
            return RenderedText(text, answers, self._prompt_end(text, answers[-1]), None)
        if text_spans is None:
            return Rejection("special_token_in_text", "a conversation with tools contains the text of a special token")
        edges = [edge for span in text_spans for edge in (span.start, span.end)]
        edges += [edge for answer in answers for edge in (answer.start, answer.end)]
        pieces = []
        for start, end in pairwise(sorted({0, len(text), *edges})):
            from_message = any(span.start <= start < span.end for span in text_spans)
            pieces.append((text[start:end], not from_message))
        return RenderedText(text, answers, "", self.encoder.encode_pieces(pieces))

    def _prompt_end(self, text: str, answer: AnswerSpan) -> str:
        """The end of the prompt for an answer, after its last special token.

        Tokenizers split a text at special tokens, and up to the last one the row and its prompt are the same text. So
        tokenizing this end, for most templates a word or two, is enough to see whether the row starts with its prompt's
        tokens.
        """
        return text[self.encoder.special.last(text, 0, answer.start)[1] : answer.start]

    def _encode_prompt_ends(self, ends: set[str]) -> None:
        new = sorted(ends - self._prompt_ends.keys())
        if len(self._prompt_ends) + len(new) > CACHED_PROMPT_ENDS:
            self._prompt_ends, new = {}, sorted(ends)
        self._prompt_ends |= zip(new, (encoded.ids.tolist() for encoded in self.encoder.encode_batch(new)), strict=True)

    def _row(self, example: dict[str, Any], rendered: RenderedText, encoded: EncodedText) -> TokenRow:
        """Raises Rejection."""
        ids = encoded.ids
        last_answer = rendered.answers[-1]
        try:
            ranges = [encoded.token_range(answer) for answer in rendered.answers]
        except ValueError as error:
            raise Rejection("answer_not_traceable", f"the tokenizer changes the text: {error}") from None
        prompt_length = ranges[-1][0]
        has_special_text = rendered.encoded is not None
        prompt_end = self._prompt_ends[rendered.prompt_end]
        prompt_mismatch = not last_answer.follows_prompt or (
            not has_special_text and ids[prompt_length - len(prompt_end) : prompt_length].tolist() != prompt_end
        )
        bos = self.encoder.bos_id
        if self.encoder.bos_ids and not (len(ids) and ids[0] == bos):
            ids = np.concatenate([np.array(self.encoder.bos_ids, dtype=np.int32), ids])
            ranges = [(start + 1, end + 1) for start, end in ranges]
            prompt_length += 1
        label_ranges = find_label_ranges(rendered.answers, ranges, length=len(ids), labels_on=self.labels_on)
        ids, label_ranges, prompt_length, cut = self._truncate(ids, label_ranges, prompt_length)
        if cut and prompt_length <= len(self.encoder.bos_ids):
            raise Rejection("too_long", "no token of the prompt is left after truncation")
        if not label_ranges:
            raise Rejection("no_labels", "the row has no labelled tokens" + (" after truncation" if cut else ""))
        written = rendered.text[last_answer.start : last_answer.end - len(last_answer.stop)]
        return TokenRow(
            id=example["id"],
            ids=ids,
            label_ranges=label_ranges,
            prompt_length=prompt_length,
            reference=example["messages"][-1]["content"] or written,
            tokens_cut=cut,
            without_stop=not last_answer.stop or (self.truncation_strategy == "right" and cut > 0),
            prompt_mismatch=prompt_mismatch,
            double_bos=bos is not None and len(ids) > 1 and bool(ids[0] == bos == ids[1]),
            special_text=has_special_text,
            unknown=int(np.count_nonzero(ids == self.encoder.unk_id)) if self.encoder.unk_id is not None else 0,
        )

    def _truncate(
        self, ids: Ids, label_ranges: list[tuple[int, int]], prompt_length: int
    ) -> tuple[Ids, list[tuple[int, int]], int, int]:
        """Truncates a row to max_length: its ids, label ranges and prompt length, and the number of tokens removed.

        Raises Rejection if the row is too long and the strategy is not to truncate it.
        """
        cut = len(ids) - self.max_length
        if cut <= 0:
            return ids, label_ranges, prompt_length, 0
        match self.truncation_strategy:
            case "left":
                kept = len(self.encoder.bos_ids)
                if kept and ids[kept + cut] == self.encoder.bos_id:
                    cut += 1  # A template that begins every turn with BOS must not leave two of them here.
                ids = np.concatenate([ids[:kept], ids[kept + cut :]])
                label_ranges = [(max(start - cut, kept, 1), end - cut) for start, end in label_ranges]
                prompt_length = max(prompt_length - cut, kept)
            case "right":
                ids = ids[: self.max_length]
                label_ranges = [(start, min(end, len(ids))) for start, end in label_ranges]
            case "drop" | "error":
                raise Rejection("too_long", f"{len(ids)} tokens, encode.max_length is {self.max_length}")
        return ids, [(start, end) for start, end in label_ranges if end > start], prompt_length, cut


def _required_texts(messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> Iterator[str]:
    """What the rendered text must contain: system and tool messages, tool names and, with tools, the user's messages."""
    for message in messages:
        if message["role"] in ("system", "tool") or (tools and message["role"] == "user"):
            yield message["content"].strip()
    for tool in tools:
        yield str(tool.get("function", {}).get("name", ""))
