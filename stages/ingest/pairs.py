"""Reads questions with their answers: instruction and output under any name."""

import re

from stages.core.problem import Rejection
from stages.ingest.lists import messages_of
from stages.ingest.row import Row
from stages.ingest.tools import Message, parse_json
from stages.ingest.turns import read_answer

TURN = re.compile(r"^[ \t]*(Human|Assistant)[:：]", re.MULTILINE)


def read_pair(row: Row) -> list[Message]:
    """Alpaca's instruction, input, output and history, under any of their names, with the thinking behind the answer."""
    messages = _history(row) if "history" in row.fields else []
    instruction = row.text("instruction")
    query = row.text("input", default="") if "input" in row.fields else ""
    user: Message = {"role": "user", "content": instruction}
    if query:  # in fields of their own too, for chat templates that place them separately
        content = instruction + (row.settings.input_separator if instruction else "") + query
        user = {"role": "user", "content": content, "instruction": instruction, "input": query}
    return [*messages, user, read_answer(row.text("output"), row.field("output"), thinking=_reasoning(row))]


def _history(row: Row) -> list[Message]:
    """Earlier turns: [question, answer] pairs, or a list of turns."""
    field, history = row.field("history"), row.get("history") or []
    if isinstance(history, str):  # a cell of a CSV file
        history = parse_json(history, f"{field}: wanted a list of [question, answer] pairs")
    if isinstance(history, list) and history and all(isinstance(turn, dict) for turn in history):
        return messages_of(history, field, row)
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise Rejection("wrong_type", f"{field}: wanted a list of [question, answer] pairs")
    messages: list[Message] = []
    for question, reply in history:
        if not isinstance(question, str) or not isinstance(reply, str):
            raise Rejection("wrong_type", f"{field}: wanted pairs of text")
        messages += [{"role": "user", "content": question}, read_answer(reply, field)]
    return messages


def _reasoning(row: Row) -> str:
    """The thinking in a field of its own; s1K has a list of one text."""
    if "reasoning" not in row.fields:
        return ""
    found = row.get("reasoning")
    if isinstance(found, list):
        if len(found) > 1:
            raise Rejection("wrong_type", f"{row.field('reasoning')}: wanted one text, found {len(found)}")
        found = found[0] if found else None
    return found.strip() if isinstance(found, str) else ""


def is_multiturn(row: Row) -> bool:
    """Whether an instruction is a conversation without its last answer, as in BELLE's multi-turn data."""
    instruction = row.get("instruction")
    if not isinstance(instruction, str) or "ssistant" not in instruction[-12:] or row.get("input"):
        return False
    text = instruction.strip()
    return text.startswith(("Human:", "Human：")) and text.endswith(("Assistant:", "Assistant："))


def read_belle_multiturn(row: Row) -> list[Message]:
    """The instruction holds all turns as Human:…\\nAssistant:…; the output is the last answer."""
    before, *names_and_texts = TURN.split(row.text("instruction"))
    if before.strip():
        raise Rejection("roles_out_of_order", f"{row.field('instruction')}: text before the first Human:")
    turns = [(name, text.strip()) for name, text in zip(names_and_texts[::2], names_and_texts[1::2], strict=True)]
    if not turns or turns[-1] != ("Assistant", ""):
        raise Rejection("no_answer_at_the_end", f"{row.field('instruction')}: does not end in Assistant:")
    turns[-1] = ("Assistant", row.text("output"))
    field = row.field("instruction")
    return [{"role": "user", "content": text} if name == "Human" else read_answer(text, field) for name, text in turns]
