"""Reads lists of turns: `messages`, `conversations` and the like, TRL's prompt and completion, lists of texts."""

from typing import Any

from stages.core.problem import Rejection
from stages.ingest.columns import PRIMARY
from stages.ingest.row import Row
from stages.ingest.suggest import roles_line, suggest_roles
from stages.ingest.tools import Message, parse_json
from stages.ingest.turns import ANSWER_KEYS, CONTENT_KEYS, ROLE_KEYS, ROLES, add_system, read_answer, read_turns

TURN_KEYS = frozenset((*ROLE_KEYS, *CONTENT_KEYS, *ANSWER_KEYS))


def is_from_value(row: Row) -> bool:
    """Whether the first turn is ShareGPT's {"from", "value"}."""
    first = row.get("messages")[0]
    return "from" in first or "value" in first


def system_of(row: Row) -> str:
    """The system text beside the turns: a text, Gemini's object with parts, or Bedrock's list of parts."""
    found = row.get("system")
    if isinstance(found, str) or found is None:
        return found or ""
    if isinstance(found, dict):
        found = next((found[key] for key in ("parts", "content", "text") if found.get(key) is not None), None)
    messages = messages_of([{"role": "system", "content": found}], row.field("system"), row)
    return "".join(message["content"] for message in messages)


def is_list(row: Row) -> bool:
    """Whether a list of objects is one of turns: by its name, or because the first object has a text of a known name."""
    return row.field("messages").casefold() in PRIMARY["messages"] or not TURN_KEYS.isdisjoint(row.get("messages")[0])


def read_list(row: Row) -> list[Message]:
    """The messages of a list of turns; CSV files hold the JSON text of one."""
    return messages_of(row.get("messages"), row.field("messages"), row)


def messages_of(turns: Any, field: str, row: Row) -> list[Message]:
    """The messages of turns; what they say about tools and unread keys goes into `row`."""
    if isinstance(turns, str):
        turns = parse_json(turns, f"{field}: wanted a list of objects")
    turns = _with_usual_fields(turns, row)
    try:
        found = read_turns(turns, field, roles=row.settings.roles, has_tools=bool(row.tools))
    except Rejection as rejection:
        if rejection.reason != "unknown_role":
            raise
        raise Rejection("unknown_role", f"{rejection.detail.split(';')[0]}; {_roles(turns, row)}") from None
    row.tools += found.tools
    row.unread += found.unread
    row.changes += found.changes
    return found.messages


def _with_usual_fields(turns: Any, row: Row) -> Any:
    """The turns with the fields that `ingest.columns` names for role and content under their usual names."""
    role, content = row.settings.turn_fields
    if not (role or content) or not isinstance(turns, list):
        return turns
    usual = {role: "role", content: "content"}
    return [
        {usual.get(key, key): value for key, value in turn.items()} if isinstance(turn, dict) else turn for turn in turns
    ]


def _roles(turns: list[dict[str, Any]], row: Row) -> str:
    names = [next((turn[key] for key in ROLE_KEYS if turn.get(key) is not None), None) for turn in turns]
    known = {**ROLES, **{name.casefold(): role for name, role in row.settings.roles.items()}}
    found = suggest_roles([name for name in names if isinstance(name, str)], known)
    return roles_line({**row.settings.roles, **found})


def is_question_list(row: Row) -> bool:
    """Whether the first turn is a question with its answer."""
    return bool({"question", "answer"} <= row.get("messages")[0].keys())


def read_coig(row: Row) -> list[Message]:
    """COIG: an instruction for the whole conversation, beside its questions and answers."""
    return add_system(read_list(row), row.text("task"), row.changes)


def read_xlam(row: Row) -> list[Message]:
    """xLAM's function calling: a query, and the calls that answer it as JSON text."""
    calls = {"role": "function_call", "content": row.get("calls")}
    return messages_of([{"role": "user", "content": row.text("query")}, calls], row.field("calls"), row)


def read_prompt_completion(row: Row) -> list[Message]:
    """TRL's conversational prompt and completion: each a text or a list of turns."""
    prompt, completion = row.get("instruction"), row.get("output")
    before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    after = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
    for field, turns in ((row.field("instruction"), before), (row.field("output"), after)):
        if not isinstance(turns, list):
            raise Rejection("wrong_type", f"{field}: wanted text or a list of turns")
    return messages_of([*before, *after], row.field("instruction"), row)


def read_text_list(row: Row) -> list[Message]:
    """A list of texts, of the user and the assistant by turns, as in UltraChat and LIMA."""
    field, texts = row.field("texts"), row.get("texts")
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise Rejection("wrong_type", f"{field}: wanted a list of texts, of the user and the assistant by turns")
    if len(texts) % 2:
        raise Rejection("no_answer_at_the_end", f"{field}: {len(texts)} texts, of the user and the assistant by turns")
    return [
        read_answer(text, f"{field}[{number}]") if number % 2 == 0 else {"role": "user", "content": text}
        for number, text in enumerate(texts, 1)
    ]
