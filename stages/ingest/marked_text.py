"""Reads conversations that stand in one text with marks between the turns: guanaco, OIG, HH; and MOSS's two forms."""

import re
from typing import Any

from stages.core.problem import Rejection
from stages.ingest.row import Row
from stages.ingest.tools import Message
from stages.ingest.turns import read_answer

MARKS = (
    (re.compile(r"###[ \t]*(?:Human|User)[:：]"), re.compile(r"###[ \t]*Assistant[:：]")),  # guanaco; within a line too
    (re.compile(r"^[ \t]*<human>:", re.MULTILINE), re.compile(r"^[ \t]*<bot>:", re.MULTILINE)),  # OIG
    (re.compile(r"^[ \t]*(?:Human|User)[:：]", re.MULTILINE), re.compile(r"^[ \t]*Assistant[:：]", re.MULTILINE)),  # HH
)
"""The marks of the user's and the assistant's turns."""
RENDERED = re.compile(
    r"\s*(?:<s>|<bos>|<\|begin_of_text\|>|<\|endoftext\|>)?\s*(<\|im_start\|>|\[INST\]|<\|start_header_id\|>|<start_of_turn>"
    r"|<\|(?:user|system|assistant|start_of_role)\|>|<｜User｜>|### ?Instruction:|(?:USER|SYSTEM): "
    r"|Below is an instruction that describes a task)",
    re.IGNORECASE,
)
"""How a conversation begins that a chat template has written, or a script before there were templates."""
MOSS_ROUND = re.compile(r"turn_(\d+)")
MOSS_TURN = re.compile(r"\[(Human|MOSS)\][:：]\s*(.*?)\s*<eo[ham]>", re.DOTALL)
MOSS_MARKS = re.compile(r"<\|[\w ]+\|>[:：]|<eo[a-z]>")
MOSS_PARTS = ("Human", "Inner Thoughts", "Commands", "Tool Responses", "MOSS")


def is_marked(row: Row) -> bool:
    """Whether a text starts with the mark of a user's turn and has the assistant's too."""
    text = row.get("text")
    return isinstance(text, str) and marks_of(text) is not None


def marks_of(text: str) -> tuple[re.Pattern[str], re.Pattern[str]] | None:
    """The marks that a text has, if it is a conversation."""
    start = text.lstrip()[:20]
    return next((pair for pair in MARKS if pair[0].match(start) and pair[1].search(text)), None)


def rendered_mark(text: str) -> str:
    """The mark of a template with which a text begins; "" if it does not."""
    found = RENDERED.match(text)
    return found[1].strip() if found else ""


def read_marked(row: Row) -> list[Message]:
    """`### Human: … ### Assistant: …`, as in the guanaco file of OpenAssistant."""
    return split_marked(row.text("text"), row.field("text"))


def split_marked(text: str, field: str) -> list[Message]:
    """The turns of a text with marks."""
    marks = marks_of(text)
    if marks is None:
        raise Rejection("wrong_type", f"{field}: wanted a text with ### Human: and ### Assistant:")
    found = sorted(
        (match.start(), match.end(), role)
        for pattern, role in zip(marks, ("user", "assistant"), strict=True)
        for match in pattern.finditer(text)
    )
    ends = [start for start, _, _ in found[1:]] + [len(text)]
    messages = [_message(role, text[start:end].strip(), field) for (_, start, role), end in zip(found, ends, strict=True)]
    # The guanaco file cuts conversations in places: a question at the end has no answer to train.
    while messages and messages[-1] == {"role": "user", "content": ""}:
        messages.pop()
    return messages


def read_moss(row: Row) -> list[Message]:
    """MOSS's `chat`: {"turn_1": {"Human", "Inner Thoughts", "Commands", "Tool Responses", "MOSS"}, …}."""
    field, rounds = row.field("rounds"), row.get("rounds")
    numbered = []
    for name, turn in rounds.items() if isinstance(rounds, dict) else [("", None)]:
        number = MOSS_ROUND.fullmatch(name.strip())
        if number is None or not isinstance(turn, dict):
            raise Rejection("wrong_type", f'{field}: wanted {{"turn_1": {{"Human": …, "MOSS": …}}, …}}')
        numbered.append((int(number[1]), name, turn))
    messages: list[Message] = []
    for _, name, turn in sorted(numbered, key=lambda item: item[0]):
        where = f"{field}.{name.strip()}"
        row.books(turn, MOSS_PARTS, where)
        human, thoughts, commands, results, reply = (_moss_text(turn, part, where) for part in MOSS_PARTS)
        if commands or results:
            # The commands are programs of MOSS's own plugins, not calls with named arguments.
            raise Rejection("unread_field", f"{where}.Commands: calls of MOSS's plugins cannot be read as tool calls")
        messages += [{"role": "user", "content": human}, read_answer(reply, where, thinking=thoughts)]
    return messages


def _moss_text(turn: dict[str, Any], part: str, where: str) -> str:
    text = turn.get(part) or ""
    if not isinstance(text, str):
        raise Rejection("wrong_type", f"{where}.{part}: wanted text, found {type(text).__name__}")
    text = MOSS_MARKS.sub("", text).strip()
    return "" if text == "None" and part not in ("Human", "MOSS") else text


def is_moss_text(row: Row) -> bool:
    """Whether a text is one of the older MOSS data: [Human]: …<eoh> [MOSS]: …<eoa>."""
    text = row.get("plain_text")
    return isinstance(text, str) and "[MOSS]" in text


def read_moss_text(row: Row) -> list[Message]:
    """MOSS 002's `plain_text`."""
    field = row.field("plain_text")
    return [
        _message("user" if name == "Human" else "assistant", text, field)
        for name, text in MOSS_TURN.findall(row.text("plain_text"))
    ]


def _message(role: str, text: str, where: str) -> Message:
    return read_answer(text, where) if role == "assistant" else {"role": role, "content": text}
