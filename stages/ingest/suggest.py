"""Guesses which fields of an unknown row hold the conversation, and writes the line of params.yaml that says so.

The names below are hints for a message only: nothing is read because of them.
"""

import glob
import re
from collections.abc import Iterator, Mapping
from typing import Any

from stages.ingest.columns import USUAL
from stages.ingest.keys import CARRY_NOTHING

ANSWER = re.compile(
    r"answer|reply|replies|output|completion|respon|target|tgt|solution|summary|result|ideal|expected|gold|reference|assistant"
    r"|bot$|gpt|generat|synthes|translation|translated|sql|code|antwort|lösung|loesung|ausgabe|respuesta|salida|répon|repon|sortie"
    r"|rispost|respost|saída|ответ|回答|答案|答|回复|输出|輸出|出力|응답|답변|译文",
    re.IGNORECASE,
)
QUESTION = re.compile(
    r"question|prompt|instruct|query|ask|input|source|src|user|human|problem|task|request|frage|eingabe|aufgabe"
    r"|pregunta|entrada|domanda|pergunta|вопрос|问题|提问|问|指令|指示|输入|質問|入力|질문|原文",
    re.IGNORECASE,
)
CONTEXT = re.compile(
    r"context|passage|kontext|background|paragraph|schema|document|contexte|contexto|材料|文章|背景|上下文", re.IGNORECASE
)
ROLE = re.compile(r"role|from|speaker|author|sender|who|name|actor|rolle|sprecher|user|角色|说话人", re.IGNORECASE)
USER = re.compile(
    r"user|human|customer|client|patient|question|asker|student|kunde|nutzer|cliente|用户|客户|病人|患者|人类|问|학생",
    re.IGNORECASE,
)
WORSE = re.compile(r"(?:^|[_ .-])(?:neg|negatives?|incorrect|wrong|rejected|worse|worst|bad|distractors?)(?:$|[_ .-])", re.I)
"""An answer that nobody wants to train."""
BESIDE = re.compile(r"expla|comment|title|rationale|statement|feedback|critique", re.IGNORECASE)
"""A text about an answer, which is the answer only if nothing else is."""
TALK = re.compile(r"conv|dialog|chat|message|utteranc|对话", re.IGNORECASE)
"""A list of texts under another name is one of questions, or of answers."""
SEVERAL = re.compile(r"answer|completion|respon|repl|candidate|choice|option|passage|generation|output", re.IGNORECASE)
"""A list of objects under such a name has several answers to one question, and no turns."""
RIVAL = re.compile(r"(?:[_ .-]?\d+|[_ .-][ab])$", re.IGNORECASE)
"""The end of the names of several things of one kind: response_0 and response_1, human_ref_A and human_ref_B."""
NO_TEXT = re.compile(r"(?:[0-9a-f-]{16,}|[^\s/]*(?:/[^\s/]+)+\.?[^\s/]*|https?:\S+)", re.IGNORECASE)
"""A hash, a path or an address."""
NO_NAMES = re.compile(
    r"(?:^|[_ ])(?:ids?|sha|hexsha|ext|repo|repo_name|repository|repository_name|labels?)$|^max_\w+_repo_", re.I
)
TURN_FIELDS = ({"from", "value"}, {"role", "content"})
MAX_DEPTH = 4
PLAIN = re.compile(r"(?!\d)(?!(?i:null|true|false|yes|no|on|off|y|n)$)[\w.]+(?: [\w.]+)*")
"""A YAML scalar that is certainly text without quotation marks."""


def suggest_columns(value: Mapping[str, Any]) -> dict[str, str]:
    """The most probable columns of a row whose fields have no usual names; empty if nothing in it looks like text."""
    leaves = [(path, found) for path, found in _leaves(value, "", 0)]
    columns: dict[str, str] = {}
    for path, found in leaves:
        if columns := _turns(path, found):
            break
    texts = _texts(leaves)
    if columns and "history" in _last(columns["messages"]).casefold() and len(texts) > 1:
        return {**_pair(texts), "history": columns["messages"]}
    if not columns and len(texts) > 1:
        columns = _pair(texts)
        if _several(leaves) and _in_list(columns["output"]):  # the answers stand there
            return {}
    elif not columns and texts:
        columns = {"text": texts[0][0]}
        if _several(leaves) or _in_list(columns["text"]) or QUESTION.search(_last(columns["text"])):
            return {}  # a question, whose answer is elsewhere
    return {} if _rivals(columns, leaves) else columns


def why_no_columns(value: Mapping[str, Any]) -> str:
    """Why there is no line for a row, and what to do."""
    leaves = [(path, found) for path, found in _leaves(value, "", 0)]
    texts = _texts(leaves)
    for columns in (*(_turns(path, found) for path, found in leaves), _pair(texts) if len(texts) > 1 else {}):
        if rivals := _rivals(columns, leaves):
            return (
                f"{' and '.join(rivals)} are of one kind, and only you know which to train: name it in ingest.columns, or, "
                "if one is preferred, write the two as chosen and rejected"
            )
    if several := _several(leaves):
        return f"{several} has several objects; write a row for each one that is to be trained"
    return "none of them looks like a text, a question with its answer, or a list of turns"


def _texts(leaves: list[tuple[str, Any]]) -> list[tuple[str, str]]:
    """The texts that may be a question or an answer."""
    texts = [(path, found) for path, found in leaves if isinstance(found, str) and found.strip()]
    texts = [(path, found) for path, found in texts if _last(path).casefold() not in USUAL["system"]]
    texts = [(path, found) for path, found in texts if not WORSE.search(path)]
    said = [
        (path, found)
        for path, found in texts
        if _last(path).casefold() not in CARRY_NOTHING and not NO_NAMES.search(_last(path)) and not NO_TEXT.fullmatch(found)
    ]
    return said or (texts if len(texts) > 1 else [])


def _several(leaves: list[tuple[str, Any]]) -> str:
    """The path of the first list of several objects; "" if there is none."""
    return next((path for path, found in leaves if isinstance(found, list) and found[1:] and isinstance(found[0], dict)), "")


def _rivals(columns: Mapping[str, str], leaves: list[tuple[str, Any]]) -> list[str]:
    """Fields of a row that have the same name as one of the columns but for its end; [] if there are none."""
    names = [path for path, _ in leaves if not _last_is_position(path)]
    for field in columns.values():
        start = RIVAL.sub("", field)
        rivals = [name for name in names if RIVAL.search(name) and RIVAL.sub("", name) == start]
        if start != field and len(rivals) > 1:
            return rivals
    return []


def _pair(texts: list[tuple[str, str]]) -> dict[str, str]:
    """A question and its answer among two or more texts: by their names, else by their order and length."""
    names = [name for name, _ in texts]
    # A path is called by its last name, or by all of them: answers.text.0.
    called = {name: _last(name) if _last(name).casefold() not in ("text", "value", "content") else name for name in names}
    contexts = [name for name in names if CONTEXT.search(called[name])] if len(names) > 2 else []
    said = [name for name in names if name not in contexts]
    if {"query", "question"} <= set(said):  # Spider, and other data of SQL
        return {"instruction": "question", "output": "query"}
    answers = [name for name in said if _end(ANSWER, called[name]) > _end(QUESTION, called[name])]
    questions = [name for name in said if name not in answers and QUESTION.search(called[name])]
    length = {name: len(text) for name, text in texts}
    answers = [name for name in answers if not BESIDE.search(called[name])] or answers
    # Of several answers the longest: a short one is often the result alone.
    answer = max(answers, key=length.__getitem__) if answers else None
    question = next((name for name in questions if name != answer), None)
    others = [name for name in names if name not in (question, answer)]
    plain = [name for name in others if not CONTEXT.search(name)] or others
    if question is None:
        # A context without a question is one itself.
        question = next((name for name in (*plain, *others) if not _in_list(name)), others[0])
        others.remove(question)
        plain = [name for name in plain if name != question]
    if answer is None:
        left = plain or others
        answer = max([name for name in left if not BESIDE.search(called[name])] or left, key=length.__getitem__)
        others.remove(answer)
    context = next((name for name in others if CONTEXT.search(name)), None)
    found: dict[str, str] = {"instruction": question}
    if context:
        found["input"] = context
    return found | {"output": answer}


def _last_is_position(path: str) -> bool:
    return path.rpartition(".")[2].isdecimal()


def _in_list(path: str) -> bool:
    return any(step.isdecimal() for step in path.split("."))


def _end(words: re.Pattern[str], name: str) -> int:
    """Where the last of the words in a name ends, or 0: in sql_prompt, the last says what it is."""
    return max((match.end() for match in words.finditer(name)), default=0)


def _last(path: str) -> str:
    """The last name of a path that is no position."""
    return next((step for step in reversed(path.split(".")) if not step.isdecimal()), path)


def _turns(path: str, found: Any) -> dict[str, str]:
    """The columns of a list of turns, if `found` looks like one."""
    if not isinstance(found, list) or not found:
        return {}
    if all(isinstance(text, str) for text in found):
        long = (
            bool(TALK.search(_last(path)))
            and len(found) >= 2
            and len(found) % 2 == 0
            and sum(map(len, found)) >= 20 * len(found)
        )
        return {"messages": path} if long else {}
    if not all(isinstance(turn, dict) for turn in found) or (SEVERAL.search(_last(path)) and not TALK.search(_last(path))):
        return {}
    shared = [
        key
        for key in found[0]
        if any(isinstance(turn.get(key), str) for turn in found)
        and all(isinstance(turn.get(key), str | None) for turn in found)
    ]
    if any(fields <= set(shared) for fields in TURN_FIELDS):
        return {"messages": path}
    roles = [key for key in shared if ROLE.search(key)] or [
        key for key in shared if len({turn.get(key) for turn in found}) <= 2 < len(found)
    ]
    contents = sorted(
        (key for key in shared if key not in roles[:1]), key=lambda key: -sum(len(turn.get(key) or "") for turn in found)
    )
    if not roles or not contents:
        return {}
    return {"messages": path, "role": roles[0], "content": contents[0]}


def suggest_roles(names: list[str], known: Mapping[str, str]) -> dict[str, str]:
    """A role for each unknown name of a conversation's speakers, in order of their first turns."""
    unknown = [name for name in dict.fromkeys(names) if name.casefold() not in known]
    taken = {known[name.casefold()] for name in names if name.casefold() in known}
    found: dict[str, str] = {}
    for name in unknown:
        free = [role for role in ("user", "assistant") if role not in taken]
        guess = "user" if USER.search(name) and "user" in free else free[0] if free else "assistant"
        if guess == "user" and not USER.search(name) and any(USER.search(other) for other in unknown if other != name):
            guess = "assistant"
        taken.add(guess)
        found[name] = guess
    return found


def _leaves(value: Any, path: str, depth: int) -> Iterator[tuple[str, Any]]:
    """Every text and list in a row, with its path in the form of `ingest.columns`: lists before what is in them."""
    if isinstance(value, dict) and depth < MAX_DEPTH:
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}" if path else str(key), depth + 1)
    elif isinstance(value, list) and value:
        yield path, value
        if isinstance(value[0], str):
            yield f"{path}.0", value[0]
        elif depth < MAX_DEPTH and (isinstance(value[0], list) or (isinstance(value[0], dict) and len(value) == 1)):
            yield from _leaves(value[0], f"{path}.0", depth + 1)  # of several objects, none stands for all
    elif isinstance(value, str):
        yield path, value


WRITE = "write into params.yaml, below ingest: "


def columns_line(columns: Mapping[str, str], *, given: Mapping[str, str], file: str) -> str:
    """What to write for the columns of a row of a file, beside those that params.yaml names already."""
    if any(given.get(column, field) != field for column, field in columns.items()):
        return f"{WRITE}columns_by_file: {flow({glob.escape(file): columns})}"
    return f"{WRITE}columns: {flow({**given, **columns})}"


def formats_line(format: str, *, file: str) -> str:
    """What to write so that the rows of a file are read in a format."""
    return f"{WRITE}formats: {flow({glob.escape(file): format})}"


def roles_line(roles: Mapping[str, str]) -> str:
    """What to write for the role names of a row."""
    return f"{WRITE}roles: {flow(roles)}"


def flow(values: Mapping[str, Any]) -> str:
    """A YAML flow map on one line: {instruction: frage, output: antwort}."""
    return (
        "{"
        + ", ".join(f"{_scalar(key)}: {flow(v) if isinstance(v, Mapping) else _scalar(v)}" for key, v in values.items())
        + "}"
    )


def _scalar(text: str) -> str:
    if PLAIN.fullmatch(text):
        return text
    if text.isprintable():
        return "'" + text.replace("'", "''") + "'"
    return '"' + "".join(c if c.isprintable() and c not in '"\\' else f"\\U{ord(c):08x}" for c in text) + '"'
