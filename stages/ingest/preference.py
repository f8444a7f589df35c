"""Recognizes preference data: two answers of which one is preferred (DPO), or one answer with a label (KTO).

Supervised training can use one side of it, and only the user can say which: `ingest.preference`.
"""

from typing import Any

from stages.core.params import bad_param
from stages.core.problem import Rejection
from stages.ingest.lists import messages_of, read_list, read_prompt_completion
from stages.ingest.marked_text import marks_of, split_marked
from stages.ingest.pairs import read_pair
from stages.ingest.row import Row
from stages.ingest.tools import Message, read_tools

OTHER_SIDE = "other_side"
"""The reason of rows that `ingest.preference` leaves out: the user chose it, so they do not count towards the limit."""


class PreferenceFound(Exception):
    """A row holds preference data, and params.yaml does not say which side is trained. It ends the run."""

    def __init__(self, what: str) -> None:
        super().__init__(what)
        self.what = what

    def problem(self, source: str) -> str:
        """The message for a user; `source` is the row's."""
        return bad_param(
            "ingest.preference",
            f"{source} is preference data: {self.what}. Supervised training can use one side of it. To train on the "
            "preferred answers, write preference: chosen below ingest; or move such files out of the raw folder",
        )


def read_label(row: Row) -> bool:
    """The label of a KTO row: whether its answer is a good one. Raises Rejection if the other side is trained."""
    label, side = row.get("label"), row.settings.preference
    if side == "error":
        raise PreferenceFound(f"{row.field('label')} says whether its answer is a good one")
    if not isinstance(label, bool):
        raise Rejection("wrong_type", f"{row.field('label')}: wanted true or false, found {label!r}")
    if label != (side == "chosen"):
        raise Rejection(OTHER_SIDE, f"{row.field('label')} is {str(label).lower()}, ingest.preference is {side}")
    return label


def answer_field(row: Row) -> str:
    """The column of the side that is trained, chosen or rejected. Raises PreferenceFound if params.yaml names none."""
    side = row.settings.preference
    if side == "error":
        raise PreferenceFound(f"{row.field('chosen')} and {row.field('rejected')} are two answers to one prompt")
    return side


def read_kto(row: Row) -> list[Message]:
    """A question and its answer, or a list of turns, where the label is that of the side that is trained."""
    read_label(row)
    if "messages" in row.fields:
        return read_list(row)
    lists = isinstance(row.get("instruction"), list) or isinstance(row.get("output"), list)
    return read_prompt_completion(row) if lists else read_pair(row)


def read_preference(row: Row) -> list[Message]:
    """The conversation with the side of `chosen` and `rejected` that is trained."""
    return messages_of(turns_of(row), row.field(row.settings.preference), row)


def read_rejected_beside(row: Row) -> list[Message]:
    """A whole conversation, whose last answer is preferred to the one in a field of its own, as ms-swift writes it."""
    side, turns = row.settings.preference, row.get("messages")
    if side == "error":
        raise PreferenceFound(
            f"{row.field('rejected')} is another answer than the last of {row.field('messages')}, which is preferred"
        )
    if side == "chosen":
        return read_list(row)
    worse, field = row.get("rejected"), row.field("rejected")
    if isinstance(worse, str):
        worse = {"role": "assistant", "content": worse}
    if isinstance(worse, list) and len(worse) > 1:  # a whole conversation too
        return messages_of(worse, field, row)
    return messages_of([*turns[:-1], *([worse] if isinstance(worse, dict) else worse)], field, row)


def turns_of(row: Row) -> list[Any]:
    """The turns of a row with chosen and rejected, with the side that is trained as the answer.

    Either side is a text, a turn or a list of turns; the prompt is a text, a list of turns, an object with `messages`
    (OpenAI), or stands at the beginning of both sides (UltraFeedback, HH).
    """
    side = answer_field(row)
    answer, field = row.get(side), row.field(side)
    before = _prompt(row)
    if isinstance(answer, str):
        if before is None:
            if marks_of(answer) is None:
                raise Rejection("missing_field", f"a prompt beside {row.field('chosen')} and {row.field('rejected')}")
            return split_marked(answer, field)
        return [*before, {"role": "assistant", "content": answer}]
    turns = [answer] if isinstance(answer, dict) else answer
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise Rejection("wrong_type", f"{field}: wanted text or a list of turns")
    # A side with more than the answer holds the whole conversation, whose prompt is then said twice.
    is_whole = len(turns) > 1 and str(turns[0].get("role", turns[0].get("from"))).casefold() in ("user", "human", "system")
    return turns if is_whole or before is None else [*before, *turns]


def _prompt(row: Row) -> list[Any] | None:
    """The turns before the answer; None if the row has no field for them."""
    prompt = row.get("prompt")
    if isinstance(prompt, dict):
        row.books(prompt, ("messages", "tools"), row.field("prompt"))
        row.tools = row.tools or read_tools(prompt.get("tools"), f"{row.field('prompt')}.tools")
        prompt = prompt.get("messages")
    if prompt is None:
        prompt = row.get("messages")
    if isinstance(prompt, str) and marks_of(prompt):
        turns = split_marked(prompt, row.field("prompt"))
        if turns[-1] == {"role": "assistant", "content": ""}:  # HH's prompts end in "Assistant:"
            return turns[:-1]
    if isinstance(prompt, str):
        query = row.text("input", default="") if row.field("input") != row.field("prompt") else ""
        return [{"role": "user", "content": prompt + (row.settings.input_separator if query else "") + query}]
    if isinstance(prompt, list) and all(isinstance(turn, dict) for turn in prompt):
        return prompt
    if prompt is None:
        return None
    raise Rejection("wrong_type", f"{row.field('prompt')}: wanted text or a list of turns")
