"""Which characters of a rendered conversation are learned, and which tokens those are.

A conversation is rendered once and tokenized once, as a whole. The answers are found by their place in the text, never by
a search for token patterns, and padding plays no part, so the stop token is learned even where it is the pad token too.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

IGNORE = -100
"""The label that the loss leaves out (PyTorch's `ignore_index`)."""

LabelsOn: TypeAlias = Literal["assistant", "last_assistant", "all"]


class Span(NamedTuple):
    """One answer in the text: characters [start, end), the stop token's included, and whether it is learned."""

    start: int
    end: int
    learned: bool
    stop: str
    """The special token that ends the answer, "" if the template puts none there."""


class Untraceable(ValueError):
    """The template changes the answers, so that they cannot be found in the text that it renders."""


def find_answers(
    render: Callable[[list[dict[str, Any]]], str], messages: list[dict[str, Any]], special_tokens: Sequence[str]
) -> tuple[str, list[Span]]:
    """The rendered conversation, and where its answers are.

    The template is rendered a second time with a mark in place of each answer; what stands between the marks is the
    template's own text. A template may strip an answer's white space, but not change it in any other way.

    Args:
        render: The template: messages to text.
        messages: Rows of `messages`: role, content, and `"train": False` for an answer that is not learned.
        special_tokens: The texts of the tokenizer's special tokens.

    Raises:
        Untraceable: If the answers do not stand in the text as they are.
    """
    answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    marks = {number: f"\ue000{number}\ue001" for number in answers}
    marked = render([m | {"content": marks[n]} if n in marks else m for n, m in enumerate(messages)])
    between = []
    for number in answers:
        head, mark, marked = marked.partition(marks[number])
        if not mark:
            raise Untraceable(f"the template leaves out the answer in message {number + 1}")
        between.append(head)
    between.append(marked)
    text = render(messages)
    for change in (lambda content: content, str.strip):
        contents = [change(messages[number]["content"]) for number in answers]
        if text == "".join(a + b for a, b in zip(between, [*contents, ""], strict=True)):
            return text, _spans(messages, answers, between, contents, special_tokens)
    raise Untraceable("the template changes the text of an answer")


def _spans(
    messages: list[dict[str, Any]],
    answers: list[int],
    between: list[str],
    contents: list[str],
    special_tokens: Sequence[str],
) -> list[Span]:
    spans, position = [], 0
    for number, head, content, tail in zip(answers, between, contents, between[1:], strict=False):
        start = position + len(head)
        stop = max((token for token in special_tokens if tail.startswith(token)), key=len, default="")
        position = start + len(content)
        spans.append(Span(start, position + len(stop), messages[number].get("train", True), stop))
    return spans


def make_labels(
    input_ids: Sequence[int], offsets: Sequence[tuple[int, int]], spans: Sequence[Span], labels_on: LabelsOn
) -> list[int]:
    """The labels of one row: the token's id where it is learned, IGNORE elsewhere.

    A token that an answer shares with the text before it (" Yes" after "Assistant:") belongs to the answer. The first
    token has no label, as nothing predicts it.

    Args:
        input_ids: (tokens,) The row.
        offsets: (tokens,) Characters [start, end) of each token; empty for tokens that stand for no text.
        spans: The answers, from `find_answers`.
        labels_on: "assistant": every answer; "last_assistant": the last one; "all": every token, as a plain language model.
    """
    if labels_on == "all":
        return [IGNORE, *input_ids[1:]]
    learned = [span for span in (spans if labels_on == "assistant" else spans[-1:]) if span.learned]
    labels = [
        token if any(start < span.end and end > span.start for span in learned) else IGNORE
        for token, (start, end) in zip(input_ids, offsets, strict=True)
    ]
    return [IGNORE, *labels[1:]]


def prompt_length(offsets: Sequence[tuple[int, int]], spans: Sequence[Span]) -> int:
    """How many of a row's tokens come before its last answer: the prompt that `generate` continues."""
    return next(number for number, (_, end) in enumerate(offsets) if end > spans[-1].start)
