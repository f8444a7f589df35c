"""Turns a conversation or a raw text into tokens with labels: renders it, tokenizes it and, if asked to, truncates it."""

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import jinja2
import numpy as np

from stages.core.problem import Rejection
from stages.encode.answers import AnswerFinder, Conversation, RenderedRow, Thinking, fields_of
from stages.encode.conventions import PROBE_CALL, PROBE_TOOL
from stages.encode.mask import AnswerSpan, LabelsOn, find_label_ranges
from stages.encode.pieces import KindSpan, Piece, cut_pieces, kind_spans, text_spans
from stages.encode.required import tool_result_forms
from stages.encode.spans import LeftOut, Untraceable
from stages.encode.template import ChatTemplate
from stages.encode.tokenizer import EncodedText, Encoder, Ids

TruncationStrategy: TypeAlias = Literal["drop", "left", "right", "error"]
CACHED_PROMPT_ENDS = 2000
"""Prompt ends whose tokens are cached. Most templates have a single one."""
TEST = "test"
"""The split whose rows become prompts."""


class TokenRow(NamedTuple):
    """One row as tokens."""

    id: str
    source: str
    format: str
    """The format of the raw row; "text" for raw text."""
    ids: Ids
    label_ranges: list[tuple[int, int]]
    """Tokens [start, end) that are in the loss."""
    prompt_length: int
    """Tokens before the last answer; 0 for raw text."""
    answer_end: int
    """The end of the last answer's tokens, without its stop token and before truncation; only in rows of the test split."""
    tokens_cut: int
    """Tokens removed because the row was longer than max_length."""
    without_stop: bool
    """Whether no stop token follows an answer that is in the loss."""
    prompt_mismatch: bool
    """Whether an answer is not behind the tokens of the prompt for generation."""
    double_bos: bool
    """Whether the row begins with two BOS tokens."""
    special_text: bool
    """Whether a message contains the text of a special token."""
    unknown: int
    """The number of unknown tokens."""
    thinking: bool
    """Whether the conversation has reasoning."""
    tools: bool
    """Whether the conversation has tools."""
    tools_left_out: bool
    """Whether its prompt does not say which, since the template has no place for them."""
    untrained: bool
    """Whether the conversation has an answer with `"train": false`."""
    turns: int
    """Answers in the conversation."""
    number: int
    """Its number among the rows of the conversation, from 1."""
    split_answers: int
    """The number of rows that the conversation became."""


class TooLong(Rejection):
    """A row with more tokens than max_length."""

    def __init__(self, tokens: int, max_length: int, more: str = "") -> None:
        super().__init__("too_long", f"{tokens} tokens, encode.max_length is {max_length}{more}")
        self.tokens = tokens


class _Text(NamedTuple):
    """One row as text."""

    row: RenderedRow
    prompt_ends: list[str]
    """For each answer the end of the prompt for it, after the last special token."""
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
        thinking: Thinking,
        train_empty_thinking: bool,
        max_length: int,
        truncation_strategy: TruncationStrategy,
        use_fastokens: bool,
    ) -> None:
        """Reads the tokenizer's folder. Raises jinja2.TemplateSyntaxError if `template` is not valid Jinja source."""
        self._thinking = thinking
        self.labels_on, self.max_length, self.truncation_strategy = labels_on, max_length, truncation_strategy
        self.encoder = Encoder(tokenizer, use_fastokens=use_fastokens)
        variables = self.encoder.template_variables
        self.template = ChatTemplate(template, variables)
        self._finder = AnswerFinder(
            self.template,
            self.encoder.special,
            bos=str(variables.get("bos_token", "")),
            thinking=thinking,
            train_empty_thinking=train_empty_thinking,
        )
        self.stop_token_ids = self._find_stop_tokens()
        self._prompt_ends: dict[str, list[int]] = {}

    def _find_stop_tokens(self) -> list[int]:
        """The special tokens that the template writes after an answer or a call, found with small conversations."""
        turns = [{"role": ("user", "assistant")[number % 2], "content": str(number)} for number in range(4)]
        result = {"role": "tool", "content": "2", "tool_call_id": PROBE_CALL["tool_calls"][0]["id"], "name": "look_up"}
        found = set()
        for conversation in (
            Conversation(turns[:2], []),
            Conversation(turns, []),
            Conversation([turns[0], PROBE_CALL], [PROBE_TOOL]),
            Conversation([turns[0], PROBE_CALL, result, turns[3]], [PROBE_TOOL]),
        ):
            try:
                rows, _ = self._finder.rows(conversation, last_only=False)
            except (Untraceable, jinja2.TemplateError):
                continue  # The template may need more than these messages. Each row is checked on its own later.
            found |= {answer.stop for row in rows for answer in row.answers if answer.stop}
        return sorted(self.encoder.id_of(token) for token in found)

    def rows(self, examples: Sequence[dict[str, Any]], split: str) -> Iterator[list[TokenRow | Rejection]]:
        """The token rows of each line of `data/examples`, in order.

        A conversation or a text may become several rows. A Rejection stands for a row, or for the line if it is alone.

        Args:
            examples: Lines of one split.
            split: Rows of "test" have one prompt each, that of the last answer, which is never truncated.

        Raises FastTokenizerMismatch.
        """
        rendered = [self._render(example, split) for example in examples]
        found = [text for texts in rendered for text in texts if isinstance(text, _Text)]
        encoded = iter(self.encoder.encode_batch([text.row.text for text in found if text.encoded is None]))
        self._encode_prompt_ends({end for text in found for end in text.prompt_ends})
        for example, texts in zip(examples, rendered, strict=True):
            made: list[TokenRow | Rejection] = []
            for number, text in enumerate(texts, 1):
                if isinstance(text, Rejection):
                    made.append(text)
                    continue
                tokens = text.encoded or next(encoded)
                if "text" in example:
                    made += self._windows(example, tokens, has_special_text=text.encoded is not None)
                else:
                    made.append(self._row_or_rejection(example, text, tokens, split=split, number=number, rows=len(texts)))
            yield made

    def explain(self, example: dict[str, Any], row: TokenRow) -> list[Piece]:
        """The text of a row in pieces, each with what it is and why it is or is not in the loss.

        Args:
            example: The line of `data/examples` that the row was made of, in a split that is trained.
            row: The row.
        """
        texts = self._render(example, "train")
        assert not isinstance(texts, Rejection)  # as it was not when the row was made
        kept = len(self.encoder.bos_ids)
        cut = row.tokens_cut if self.truncation_strategy == "left" else 0
        spans: list[KindSpan]
        if "text" in example:
            spans, messages, trained, moved = text_spans(row.ids, self.encoder.tokenizer.eos_token_id), [], set[int](), 0
        else:
            text = texts[row.number - 1]
            assert not isinstance(text, Rejection)
            encoded = text.encoded or self.encoder.encode_batch([text.row.text])[0]
            messages, trained = example["messages"], {answer.message for answer in text.row.answers if answer.in_loss}
            moved = len(row.ids) + row.tokens_cut - len(encoded.ids)  # 1 if a BOS token was put before the text
            spans = [
                span._replace(start=max(start + moved - cut, kept), end=end + moved - cut)
                for span in kind_spans(text.row, messages)
                for start, end in [encoded.token_range(span.start, span.end)]
            ]
        return cut_pieces(
            row.ids,
            row.label_ranges,
            spans,
            messages=messages,
            trained=trained,
            cut=(cut, row.tokens_cut - cut),
            decode=self.encoder.decode,
        )

    # Rendering

    def _render(self, example: dict[str, Any], split: str) -> list[_Text | Rejection]:
        if "text" in example:
            return [self._plain(example["text"])]
        conversation = Conversation(example["messages"], example.get("tools", []))
        last_only = split == TEST or self.labels_on != "assistant"
        has_tools = conversation.has_tools
        if has_tools and self.encoder.special.first_in(_tool_texts(conversation)):
            return [Rejection("special_token_in_text", "a tool, a call or a result contains the text of a special token")]
        try:
            rows, problems = self._finder.rows(conversation, last_only=last_only)
        except (Untraceable, jinja2.TemplateError) as error:
            return [_rejection(error)]
        if has_tools:
            missing = _missing_result(rows[-1].text, conversation.messages[: rows[-1].answers[-1].message])
            if missing is not None:
                return [Rejection("not_in_template", f"the template leaves out {missing}")]
        all_texts = "\0".join(text for message in conversation.messages for text in _texts(message))
        has_special_text = self.encoder.special.first_in(all_texts) is not None
        texts = [self._encode_pieces(row) if has_special_text else self._with_prompt_ends(row) for row in rows]
        return [*texts, *map(_rejection, problems)]

    def _with_prompt_ends(self, row: RenderedRow) -> _Text:
        befores = [0, *(answer.stop_start for answer in row.answers)]
        ends = [
            self._prompt_end(row.text, before, answer.start) for before, answer in zip(befores, row.answers, strict=False)
        ]
        return _Text(row, ends, None)

    def _plain(self, text: str) -> _Text:
        """Raw text, in which the text of a special token is plain text too."""
        has_special = self.encoder.special.first_in(text) is not None
        return _Text(RenderedRow(text, [], []), [], self.encoder.encode_pieces([(text, False)]) if has_special else None)

    def _encode_pieces(self, row: RenderedRow) -> _Text:
        """A row in which a message contains the text of a special token, with its tokens."""
        edges = {0, len(row.text)}
        edges |= {edge for span in row.spans for edge in (span.start, span.end)}
        edges |= {
            edge for answer in row.answers for edge in (answer.start, answer.label_start, answer.stop_start, answer.end)
        }
        pieces = []
        for start, end in pairwise(sorted(edges)):
            from_message = any(span.start <= start < span.end for span in row.spans)
            pieces.append((row.text[start:end], not from_message))
        return _Text(row, ["" for _ in row.answers], self.encoder.encode_pieces(pieces))

    def _prompt_end(self, text: str, before: int, start: int) -> str:
        """The end of the prompt for an answer, after its last special token.

        Tokenizers split a text at special tokens, and up to the last one the row and its prompt are the same text. So
        tokenizing this end, for most templates a word or two, is enough to see whether the row starts with its prompt's
        tokens.

        Args:
            text: The row.
            before: Where to look for the special token first: the end of the answer before.
            start: Where the answer starts.
        """
        at, end = self.encoder.special.last(text, before, start)
        if at == end:
            _, end = self.encoder.special.last(text, 0, start)
        return text[end:start]

    def _encode_prompt_ends(self, ends: set[str]) -> None:
        new = sorted(ends - self._prompt_ends.keys())
        if len(self._prompt_ends) + len(new) > CACHED_PROMPT_ENDS:
            self._prompt_ends, new = {}, sorted(ends)
        self._prompt_ends |= zip(new, (encoded.ids.tolist() for encoded in self.encoder.encode_batch(new)), strict=True)

    # Tokens

    def _row_or_rejection(
        self, example: dict[str, Any], text: _Text, encoded: EncodedText, *, split: str, number: int, rows: int
    ) -> TokenRow | Rejection:
        try:
            return self._row(example, text, encoded, split=split, number=number, rows=rows)
        except Rejection as rejection:
            return rejection

    def _row(
        self, example: dict[str, Any], text: _Text, encoded: EncodedText, *, split: str, number: int, rows: int
    ) -> TokenRow:
        """Raises Rejection."""
        ids, answers, messages = encoded.ids, text.row.answers, example["messages"]
        last = answers[-1]
        try:
            ranges = [encoded.token_range(answer.label_start, answer.end) for answer in answers]
            starts = [
                start if answer.start == answer.label_start else encoded.token_range(answer.start, answer.end)[0]
                for answer, (start, _) in zip(answers, ranges, strict=True)
            ]
            answer_end = encoded.token_range(last.start, last.stop_start)[1] if split == TEST else len(ids)
        except ValueError as error:
            raise Rejection("answer_not_traceable", f"the tokenizer changes the text: {error}") from None
        has_special_text = text.encoded is not None
        prompt_mismatch = any(
            self._is_mismatch(ids[:start], answer, end=None if has_special_text else end)
            for start, answer, end in zip(starts, answers, text.prompt_ends, strict=True)
            if answer.in_loss or split == TEST
        )
        prompt_length, bos = starts[-1], self.encoder.bos_id
        if self.encoder.bos_ids and not (len(ids) and ids[0] == bos):
            ids = np.concatenate([np.array(self.encoder.bos_ids, dtype=np.int32), ids])
            ranges = [(start + 1, end + 1) for start, end in ranges]
            prompt_length, answer_end = prompt_length + 1, answer_end + 1
        label_ranges = find_label_ranges(answers, ranges, length=len(ids), labels_on=self.labels_on)
        prompt_or_answer_cut = self.truncation_strategy == "left" or prompt_length >= self.max_length
        if split == TEST and label_ranges and len(ids) > self.max_length and prompt_or_answer_cut:
            raise TooLong(len(ids), self.max_length, "; the prompt or all of the answer would be cut")
        cut = 0
        if split != TEST or self.truncation_strategy != "right":  # a model is compared with the whole reference answer
            ids, label_ranges, prompt_length, cut = self._truncate(ids, label_ranges, prompt_length)
        if cut and prompt_length <= len(self.encoder.bos_ids):
            raise Rejection("too_long", "no token of the prompt is left after truncation")
        if not label_ranges:
            raise Rejection("no_labels", "the row has no labelled tokens" + (" after truncation" if cut else ""))
        stopped = all(answer.stop for answer in answers if answer.in_loss) and bool(answers[-1].stop)
        fields = fields_of(messages)
        return TokenRow(
            id=example["id"] if rows == 1 else f"{example['id']}.{number}",
            source=example["source"],
            format=example.get("format", ""),
            ids=ids,
            label_ranges=label_ranges,
            prompt_length=prompt_length,
            answer_end=answer_end,
            tokens_cut=cut,
            without_stop=not stopped or (self.truncation_strategy == "right" and cut > 0),
            prompt_mismatch=prompt_mismatch,
            double_bos=bos is not None and len(ids) > 1 and bool(ids[0] == bos == ids[1]),
            special_text=has_special_text,
            unknown=self._count_unknown(ids),
            thinking=self._thinking != "drop" and "reasoning_content" in fields,
            tools=bool(example.get("tools")) or "tool_calls" in fields,
            tools_left_out=text.row.tools_left_out,
            untrained="train" in fields,
            turns=[message["role"] for message in messages].count("assistant"),
            number=number,
            split_answers=rows,
        )

    def _is_mismatch(self, before: Ids, answer: AnswerSpan, *, end: str | None) -> bool:
        """Whether the tokens before an answer do not end with those of its prompt's end."""
        if not answer.follows_prompt or end is None:
            return not answer.follows_prompt
        wanted = self._prompt_ends[end]
        return bool(before[len(before) - len(wanted) :].tolist() != wanted)

    def _count_unknown(self, ids: Ids) -> int:
        return int(np.count_nonzero(ids == self.encoder.unk_id)) if self.encoder.unk_id is not None else 0

    def _windows(
        self, example: dict[str, Any], encoded: EncodedText, *, has_special_text: bool
    ) -> list[TokenRow | Rejection]:
        """The windows of a raw text, each of at most max_length tokens. All of its tokens and its end are in the loss.

        Consecutive windows share a token: it is the last label of one and, without a label, the context of the next.
        """
        eos = self.encoder.tokenizer.eos_token_id
        if eos is None:
            return [Rejection("no_end_of_text", "the tokenizer has no eos_token, which must end a raw text")]
        ids = np.array([*self.encoder.bos_ids, *encoded.ids.tolist(), eos], dtype=np.int32)
        if len(ids) == 1:
            return [Rejection("no_labels", "the text has no tokens")]
        step = self.max_length - 1
        starts = range(0, max(1, len(ids) - 1), step)
        return [
            TokenRow(
                id=example["id"] if len(starts) == 1 else f"{example['id']}.{number}",
                source=example["source"],
                format="text",
                ids=ids[start : start + self.max_length],
                label_ranges=[(1, min(self.max_length, len(ids) - start))],
                prompt_length=0,
                answer_end=0,
                tokens_cut=0,
                without_stop=False,
                prompt_mismatch=False,
                double_bos=False,
                special_text=has_special_text,
                unknown=self._count_unknown(ids[start : start + self.max_length]),
                thinking=False,
                tools=False,
                tools_left_out=False,
                untrained=False,
                turns=0,
                number=number,
                split_answers=1,
            )
            for number, start in enumerate(starts, 1)
        ]

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
                raise TooLong(len(ids), self.max_length)
        return ids, [(start, end) for start, end in label_ranges if end > start], prompt_length, cut


def _rejection(error: Exception) -> Rejection:
    """What is counted for a conversation, or an answer, that the template cannot write."""
    unchanged = isinstance(error, Untraceable) and not isinstance(error, LeftOut)
    return Rejection("answer_not_traceable" if unchanged else "not_in_template", str(error))


def _texts(message: Mapping[str, Any]) -> Iterator[str]:
    """The texts of a message that the template writes unchanged."""
    if message["role"] != "tool":
        yield message["content"]
        if "reasoning_content" in message:
            yield message["reasoning_content"]


def _tool_texts(conversation: Conversation) -> str:
    """All that is said of tools, calls and results."""
    calls = [message.get("tool_calls") for message in conversation.messages]
    results = [message["content"] for message in conversation.messages if message["role"] == "tool"]
    return json.dumps([conversation.tools, calls, results], ensure_ascii=False)


def _missing_result(text: str, messages: Sequence[Mapping[str, Any]]) -> str | None:
    """The first result of a call that the rendered text of the messages lacks; None if it has them all."""
    for message in messages:
        if message["role"] == "tool" and not any(form in text for form in tool_result_forms(message["content"])):
            return f"the tool result {message['content'][:60]!r}"
    return None
