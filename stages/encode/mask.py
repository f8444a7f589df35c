"""Which characters of a rendered conversation are in the loss, and which tokens those are.

A row is rendered and tokenized as a whole. The answers are found by their position in the text, not by
searching for token patterns, and labels do not depend on padding. So the stop token is in the loss even if it is also the
pad token.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple, TypeAlias

LabelsOn: TypeAlias = Literal["assistant", "last_assistant", "all"]


class SpecialTokens:
    """Finds special tokens in a text; where several match, the longest one counts."""

    def __init__(self, tokens: Iterable[str]) -> None:
        ordered = sorted({token for token in tokens if token}, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, ordered)) or r"(?!)")

    def first_in(self, text: str) -> str | None:
        """The first special token in a text, None if there is none."""
        found = self._pattern.search(text)
        return found[0] if found else None

    def at(self, text: str, position: int) -> str:
        """The special token that starts at a character, "" if none does."""
        found = self._pattern.match(text, position)
        return found[0] if found else ""

    def split(self, text: str) -> list[str]:
        """The pieces of a text between its special tokens."""
        return self._pattern.split(text)

    def last(self, text: str, start: int, end: int) -> tuple[int, int]:
        """The characters [start, end) of the last special token within a range, (start, start) if there is none."""
        last = (start, start)
        for found in self._pattern.finditer(text, start, end):
            last = found.span()
        return last


class AnswerSpan(NamedTuple):
    """One answer in the rendered text: everything that follows the prompt for it, [start, end), with the stop token."""

    message: int
    """Its number, from 0."""
    start: int
    label_start: int
    """Where the loss begins; behind `start` if the answer's reasoning is not in the loss."""
    stop_start: int
    """Where the stop token begins; equal to `end` if there is none."""
    end: int
    in_loss: bool
    """False if the message has `"train": False`."""
    stop: str
    """The special token that ends the answer, "" if the template writes none there."""
    follows_prompt: bool
    """Whether the text before the answer is the prompt that the template renders for it."""


def token_range(start: int, end: int, offsets: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The tokens [start, end) of the characters [start, end).

    A token that overlaps the start of an answer (" Yes" after "Assistant:") belongs to it, and so does one that overlaps
    its end.

    Args:
        start: The first character.
        end: The character after the last one.
        offsets: (tokens,) Characters [start, end) of each token; empty ranges for tokens without text.
    """
    inside = [n for n, (first, last) in enumerate(offsets) if first < end and last > start]
    return (inside[0], inside[-1] + 1) if inside else (len(offsets), len(offsets))


def find_label_ranges(
    answers: Sequence[AnswerSpan], ranges: Sequence[tuple[int, int]], *, length: int, labels_on: LabelsOn
) -> list[tuple[int, int]]:
    """The tokens [start, end) of a row that have a label. The first token never has one: no token before it predicts it.

    Args:
        answers: The answers of the row.
        ranges: The tokens of each answer's part from `label_start` on.
        length: The number of tokens in the row.
        labels_on: "assistant": every answer; "last_assistant": the last one; "all": every token, as in pretraining.
    """
    if labels_on == "all":
        return [(1, length)] if length > 1 else []
    chosen = list(zip(answers, ranges, strict=True))[-1 if labels_on == "last_assistant" else 0 :]
    return [(max(start, 1), end) for answer, (start, end) in chosen if answer.in_loss and end > max(start, 1)]
