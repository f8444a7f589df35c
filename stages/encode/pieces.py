"""Explains a training row: what each piece of its text is, and why it is or is not in the loss. For the masks page."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np

from stages.encode.answers import RenderedRow
from stages.encode.forms import BLOCK_END
from stages.encode.required import tool_result_forms

Kind: TypeAlias = Literal["template", "system", "user", "tool", "answer", "reasoning", "call", "stop", "text", "cut"]
Why: TypeAlias = Literal["trained", "prompt", "context", "untrained", "left_out", "removed"]
"""trained: in the loss. Else: part of the prompt; an answer that is trained in another row, or not chosen by
`encode.labels_on`; an answer with `"train": false`; a part of a trained answer that `encode.thinking` leaves out; removed by
truncation."""
OF_AN_ANSWER = ("answer", "reasoning", "call", "stop")


class Piece(NamedTuple):
    """Consecutive tokens of one kind, as text."""

    text: str
    """For "cut", the number of tokens that were removed."""
    kind: Kind
    why: Why


class KindSpan(NamedTuple):
    """What the characters, or the tokens, [start, end) of a row are, and which message they are from; -1: none."""

    start: int
    end: int
    kind: Kind
    message: int


def kind_spans(row: RenderedRow, messages: Sequence[Mapping[str, Any]]) -> Iterator[KindSpan]:
    """The characters of a rendered row that are not the template's own. A later span overrides an earlier one."""
    for answer in row.answers:
        if messages[answer.message].get("tool_calls"):
            start = max([answer.label_start, *(span.end for span in row.spans if span.message == answer.message)])
            closing = BLOCK_END.match(row.text, start)  # of the reasoning
            yield KindSpan(closing.end() if closing else start, answer.stop_start, "call", answer.message)
        yield KindSpan(answer.stop_start, answer.end, "stop", answer.message)
    ends = {answer.message: answer.end for answer in row.answers}
    for span in row.spans:
        ends[span.message] = max(ends.get(span.message, 0), span.end)
        role = messages[span.message]["role"]
        kind: Kind = "reasoning" if span.field == "reasoning_content" else "answer" if role == "assistant" else role
        yield KindSpan(span.start, span.end, kind, span.message)
    for number, message in enumerate(messages):
        if message["role"] == "tool":
            after = max((end for other, end in ends.items() if other < number), default=0)
            for form in tool_result_forms(message["content"]):
                if form and (start := row.text.find(form, after)) >= 0:
                    ends[number] = start + len(form)
                    yield KindSpan(start, start + len(form), "tool", number)
                    break


def text_spans(ids: np.ndarray[Any, Any], end_of_text: int | None) -> list[KindSpan]:
    """The tokens of a window of raw text, which may end with the end of the text."""
    ended = len(ids) > 1 and int(ids[-1]) == end_of_text
    spans = [KindSpan(0, len(ids), "text", -1)]
    return [*spans, KindSpan(len(ids) - 1, len(ids), "stop", -1)] if ended else spans


def cut_pieces(
    ids: np.ndarray[Any, np.dtype[np.int32]],
    label_ranges: Sequence[tuple[int, int]],
    spans: Sequence[KindSpan],
    *,
    messages: Sequence[Mapping[str, Any]],
    trained: set[int],
    cut: tuple[int, int],
    decode: Callable[[Any], str],
) -> list[Piece]:
    """Cuts a row into pieces.

    Args:
        ids: The row's tokens.
        label_ranges: Tokens [start, end) in the loss.
        spans: What the tokens [start, end) are; the others are the template's.
        messages: The conversation.
        trained: The numbers of the messages whose answer this row trains.
        cut: Tokens that truncation removed at the beginning and at the end.
        decode: Tokens to text.
    """
    kinds: list[tuple[Kind, int]] = [("template", -1)] * len(ids)
    for start, end, kind, message in spans:
        for at in range(start, min(end, len(ids))):
            kinds[at] = (kind, message)
    in_loss = np.zeros(len(ids), dtype=bool)
    for start, end in label_ranges:
        in_loss[start:end] = True
    if len(ids) > 1 and kinds[0] == kinds[1]:
        in_loss[0] = in_loss[1]  # The first token never has a label. A piece of half a character would not explain that.
    pieces = [Piece(f"{cut[0]:,}", "cut", "removed")] if cut[0] else []
    for ((kind, message), is_labelled), group in groupby(range(len(ids)), key=lambda at: (kinds[at], bool(in_loss[at]))):
        numbers = list(group)
        why = "trained" if is_labelled else _why_not(kind, message, messages, trained)
        pieces.append(Piece(decode(ids[numbers[0] : numbers[-1] + 1]), kind, why))
    return [*pieces, Piece(f"{cut[1]:,}", "cut", "removed")] if cut[1] else pieces


def _why_not(kind: Kind, message: int, messages: Sequence[Mapping[str, Any]], trained: set[int]) -> Why:
    if kind not in OF_AN_ANSWER or message < 0:
        return "prompt"
    if not messages[message].get("train", True):
        return "untrained"
    return "left_out" if message in trained else "context"
