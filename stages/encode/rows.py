"""One conversation as tokens with labels: rendered once, tokenized once, and cut to length where that is asked for."""

import json
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import jinja2
import numpy as np

from stages.core.problem import Rejection
from stages.encode.mask import LabelsOn, Span, find_answers, learned_ranges
from stages.encode.template import ChatTemplate, Untraceable
from stages.encode.tokenizer import Encoded, Encoder, Ids

TruncationStrategy: TypeAlias = Literal["drop", "left", "right", "error"]
KEPT_TAILS = 2000
"""Prompt endings whose tokens are remembered; most templates have one."""


class Row(NamedTuple):
    """One conversation as tokens."""

    id: str
    ids: Ids
    ranges: list[tuple[int, int]]
    """Tokens [first, last) that are learned."""
    prompt_length: int
    """Tokens before the last answer."""
    reference: str
    cut: int
    """Tokens that were cut off for their number."""
    unstopped: bool
    mismatched: bool
    double_bos: bool
    special_text: bool
    unknown: int


class Rendered(NamedTuple):
    """One conversation as text."""

    text: str
    spans: list[Span]
    tail: str
    """The end of the prompt for the last answer, from its last special token on."""
    special: Encoded | None
    """The tokens, where a user's text has the letters of a special token in it."""


class RowMaker:
    """The tokenizer and the template, and the rule that makes rows with them."""

    def __init__(
        self,
        tokenizer: Path,
        template: str,
        labels_on: LabelsOn,
        max_length: int,
        truncation_strategy: TruncationStrategy,
        *,
        use_engine: bool,
    ) -> None:
        """Reads the tokenizer's folder. Raises jinja2.TemplateSyntaxError if `template`, Jinja source, is none."""
        self.labels_on, self.max_length, self.truncation_strategy = labels_on, max_length, truncation_strategy
        self.encoder = Encoder(tokenizer, use_engine=use_engine)
        self.template = ChatTemplate(template, self.encoder.template_variables)
        self.stop_token_ids = self._find_stop_tokens()
        self._tails: dict[str, list[int]] = {}

    def _find_stop_tokens(self) -> list[int]:
        """The special tokens that the template puts behind an answer, seen on two small conversations."""
        turns = [{"role": ("user", "assistant")[number % 2], "content": str(number)} for number in range(4)]
        found = set()
        for messages in (turns[:2], turns):
            try:
                _, spans, _ = find_answers(self.template, messages, [], self.encoder.special)
            except (Untraceable, jinja2.TemplateError):
                continue  # it may want more than these; each row is looked at by itself
            found |= {span.stop for span in spans if span.stop}
        return sorted(self.encoder.id_of(token) for token in found)

    def rows(self, examples: Sequence[dict[str, Any]]) -> Iterator[Row | Rejection]:
        """The token rows of some conversations of `data/examples`, in order; a Rejection where one is set aside.

        Raises EngineDiffersError.
        """
        rendered = [self._render(example) for example in examples]
        texts = [found.text for found in rendered if not isinstance(found, Rejection) and found.special is None]
        encoded = iter(self.encoder.encode_batch(texts))
        self._encode_tails({found.tail for found in rendered if not isinstance(found, Rejection)})
        for example, found in zip(examples, rendered, strict=True):
            try:
                yield found if isinstance(found, Rejection) else self._row(example, found, found.special or next(encoded))
            except Rejection as why:
                yield why

    def _render(self, example: dict[str, Any]) -> Rendered | Rejection:
        messages, tools = example["messages"], example.get("tools", [])
        try:
            text, spans, places = find_answers(self.template, messages, tools, self.encoder.special)
        except Untraceable as error:
            return Rejection("answer_not_traceable", str(error))
        except jinja2.TemplateError as error:
            return Rejection("not_in_template", str(error))
        missing = next((part for part in _must_show(messages, tools) if part not in text), None)
        if missing is not None:
            return Rejection("not_in_template", f"the template leaves out {missing[:60]!r}")
        written = [message["content"] for message in messages]
        if places is None:
            written.append(json.dumps([tools, [message.get("tool_calls") for message in messages]], ensure_ascii=False))
        if not any(map(self.encoder.special.first_in, written)):
            return Rendered(text, spans, self._tail(text, spans[-1]), None)
        if places is None:
            return Rejection("special_token_in_text", "in a conversation with tools")
        edges = [edge for place in places for edge in (place.start, place.end)]
        edges += [edge for span in spans for edge in (span.start, span.end)]
        cuts = sorted({0, len(text), *edges})
        pieces = [
            (text[start:end], not any(place.start <= start < place.end for place in places)) for start, end in pairwise(cuts)
        ]
        return Rendered(text, spans, "", self.encoder.encode_pieces(pieces))

    def _tail(self, text: str, span: Span) -> str:
        """The end of the prompt for an answer, from its last special token on.

        A special token is a border that no token crosses, and up to it the row and its prompt are the same text. So to know
        whether a row begins with its prompt's tokens, it is enough to tokenize the tail: for most templates a word or two.
        """
        return text[self.encoder.special.last(text, 0, span.start)[1] : span.start]

    def _encode_tails(self, tails: set[str]) -> None:
        new = sorted(tails - self._tails.keys())
        if len(self._tails) + len(new) > KEPT_TAILS:
            self._tails, new = {}, sorted(tails)
        self._tails |= zip(new, (encoded.ids.tolist() for encoded in self.encoder.encode_batch(new)), strict=True)

    def _row(self, example: dict[str, Any], rendered: Rendered, encoded: Encoded) -> Row:
        """Raises Rejection."""
        text, spans, tail, special = rendered
        ids = encoded.ids
        answers = [encoded.range_of(span) for span in spans]
        first = answers[-1][0]
        wanted = self._tails[tail]
        mismatched = not spans[-1].prompted or (special is None and ids[first - len(wanted) : first].tolist() != wanted)
        bos = self.encoder.bos_id
        if self.encoder.bos_ids and not (len(ids) and ids[0] == bos):
            ids = np.concatenate([np.array(self.encoder.bos_ids, dtype=np.int32), ids])
            answers = [(first + 1, last + 1) for first, last in answers]
        ranges = learned_ranges(spans, answers, len(ids), self.labels_on)
        prompt_length = answers[-1][0]
        ids, ranges, prompt_length, cut = self._fit(ids, ranges, prompt_length)
        if cut and prompt_length <= len(self.encoder.bos_ids):
            raise Rejection("too_long", "no token of the prompt is left beside the answer")
        if not ranges:
            raise Rejection("nothing_to_learn", "no token of this row is learned" + (" after it was cut" if cut else ""))
        reference = example["messages"][-1]["content"] or text[spans[-1].start : spans[-1].end - len(spans[-1].stop)]
        return Row(
            id=example["id"],
            ids=ids,
            ranges=ranges,
            prompt_length=prompt_length,
            reference=reference,
            cut=cut,
            unstopped=not spans[-1].stop or (self.truncation_strategy == "right" and cut > 0),
            mismatched=mismatched,
            double_bos=bos is not None and len(ids) > 1 and bool(ids[0] == bos == ids[1]),
            special_text=special is not None,
            unknown=int(np.count_nonzero(ids == self.encoder.unk_id)) if self.encoder.unk_id is not None else 0,
        )

    def _fit(
        self, ids: Ids, ranges: list[tuple[int, int]], prompt_length: int
    ) -> tuple[Ids, list[tuple[int, int]], int, int]:
        """A row no longer than max_length, and how many tokens that cost. Raises Rejection if rows are not to be cut."""
        cut = len(ids) - self.max_length
        if cut <= 0:
            return ids, ranges, prompt_length, 0
        match self.truncation_strategy:
            case "left":
                kept = len(self.encoder.bos_ids)
                ids = np.concatenate([ids[:kept], ids[kept + cut :]])
                ranges = [(max(first - cut, kept, 1), last - cut) for first, last in ranges]
                prompt_length = max(prompt_length - cut, kept)
            case "right":
                ids = ids[: self.max_length]
                ranges = [(first, min(last, len(ids))) for first, last in ranges]
            case "drop" | "error":
                raise Rejection("too_long", f"{len(ids)} tokens, encode.max_length is {self.max_length}")
        return ids, [(first, last) for first, last in ranges if last > first], prompt_length, cut


def _must_show(messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> Iterator[str]:
    """What a template with a place for it shows: system, user and tool texts, and the names of tools."""
    for message in messages:
        if message["role"] in ("system", "tool") or (tools and message["role"] == "user"):
            yield message["content"].strip()
    for tool in tools:
        yield str(tool.get("function", {}).get("name", ""))
