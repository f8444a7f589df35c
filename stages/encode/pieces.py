"""Explains a training row: what each piece of its text is, and whether and why it is in the loss. For the masks page."""

from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np

Kind: TypeAlias = Literal["template", "system", "user", "tool", "answer", "reasoning", "call", "stop", "text", "cut"]
Why: TypeAlias = Literal["trained", "prompt", "context", "untrained", "not_chosen", "removed"]
"""trained: in the loss. Else: given to the model as prompt; an earlier answer; an answer with `"train": false`; a part that
encode.thinking or encode.labels_on leave out; removed by truncation."""

ROLE_KINDS: Mapping[str, Kind] = {"system": "system", "user": "user", "tool": "tool", "assistant": "answer"}


class Piece(NamedTuple):
    """Consecutive tokens of one kind, as text."""

    text: str
    kind: Kind
    why: Why


class KindSpan(NamedTuple):
    """The kind of the characters [start, end) of a rendered conversation, and the message that they are from."""

    start: int
    end: int
    kind: Kind
    message: int


def explain(
    ids: Sequence[int] | np.ndarray[Any, np.dtype[np.int32]],
    label_ranges: Sequence[tuple[int, int]],
    spans: Sequence[tuple[tuple[int, int], Kind, int]],
    *,
    messages: Sequence[Mapping[str, Any]],
    trained: set[int],
    cut: tuple[int, int],
    decode: Callable[[Any], str],
) -> list[Piece]:
    """The row's text in pieces.

    Args:
        ids: The row's tokens.
        label_ranges: Tokens [start, end) in the loss.
        spans: Tokens [start, end) of the row with their kind and the number of their message (-1 for none); a later span
            overrides an earlier one. Other tokens are of the template.
        messages: The conversation.
        trained: The numbers of the messages whose answer this row trains.
        cut: Tokens that truncation removed at the beginning and at the end.
        decode: Tokens to text.
    """
    kinds: list[tuple[Kind, int]] = [("template", -1)] * len(ids)
    for (start, end), kind, message in spans:
        for at in range(max(start, 0), min(end, len(ids))):
            kinds[at] = (kind, message)
    in_loss = np.zeros(len(ids), dtype=bool)
    for start, end in label_ranges:
        in_loss[start:end] = True
    pieces = [Piece(f"{cut[0]:,}", "cut", "removed")] if cut[0] else []
    for key, group in groupby(range(len(ids)), key=lambda at: (kinds[at], bool(in_loss[at]))):
        numbers = list(group)
        (kind, message), labelled = key
        why = "trained" if labelled else _why_not(kind, message, messages, trained)
        pieces.append(Piece(decode(ids[numbers[0] : numbers[-1] + 1]), kind, why))
    return [*pieces, Piece(f"{cut[1]:,}", "cut", "removed")] if cut[1] else pieces


def _why_not(kind: Kind, message: int, messages: Sequence[Mapping[str, Any]], trained: set[int]) -> Why:
    """Why a piece is not in the loss."""
    if kind not in ("answer", "reasoning", "call", "stop") or message < 0:
        return "prompt"
    if not messages[message].get("train", True):
        return "untrained"
    return "not_chosen" if message in trained else "context"
