"""The fields of a raw row: what each column is called in public data, and how a row's fields are found under these names.

A column is what a field means to Loratory; `ingest.columns` of params.yaml gives the field's name in your rows where it is
not one of the usual names below. Names are compared without regard to case, since public files differ: Question, question.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import product
from typing import Any, Literal, TypeAlias

from stages.core.params import bad_param

Column: TypeAlias = Literal[
    "instruction", "input", "output", "reasoning", "system", "history", "conversations", "messages", "tools", "text",
    "role", "content", "chosen", "rejected", "label",
]  # fmt: skip
"""What `ingest.columns` can name.

    instruction, input, output    a question, the text that it is about, the answer
    reasoning, history            the thinking behind the answer; earlier [question, answer] pairs
    conversations, messages       a list of turns; both mean the same
    role, content                 the fields of a turn
    system, tools                 the system prompt; the tools that may be called
    text                          raw text, without a conversation
    chosen, rejected, label       preference data: two answers to one prompt; whether an answer is a good one
"""

PAIRS = (
    ("trans_instruction", "trans_output"),  # COIG, translated; the original stands beside it
    ("textbox_question", "textbox_answer"),  # COIG, exams
    ("instruction", "output"),  # Alpaca, BELLE, WizardLM, COIG-CQIA
    ("instruction", "response"),  # Dolly, Magpie
    ("instruction", "completion"),
    ("instruction", "answer"),
    ("prompt", "completion"),  # TRL, OpenAI's older files
    ("prompt", "response"),  # ChatGLM's fine-tuning
    ("prompt", "output"),
    ("prompt", "answer"),
    ("question", "attempt"),  # s1K
    ("question", "deepseek_attempt"),  # s1K 1.1
    ("question", "response"),  # OpenOrca, medical-o1
    ("question", "answer"),  # GSM8K
    ("question", "output"),
    ("question", "completion"),
    ("question", "solution"),
    ("query", "response"),  # MetaMathQA, ms-swift
    ("query", "answer"),
    ("query", "output"),
    ("problem", "deepseek_solution"),  # OpenThoughts
    ("problem", "generated_solution"),  # OpenMathInstruct
    ("question", "generated_solution"),
    ("problem", "solution"),  # NuminaMath
    ("problem", "response"),
    ("problem", "answer"),
    ("input", "target"),  # Firefly
    ("definition", "targets"),  # Natural Instructions
    ("inputs", "targets"),  # Aya, FLAN
    ("input_text", "output_text"),  # Vertex AI
    ("source", "target"),
    ("src", "tgt"),
    ("input", "output"),
    ("input", "response"),
    ("input", "answer"),
    ("input", "completion"),
    ("input", "content"),  # Chinese DeepSeek-R1 distillations
    ("content", "summary"),  # ADGEN of ChatGLM
    ("document", "summary"),
    ("article", "summary"),
    ("human", "assistant"),
    ("human", "gpt"),
    ("human", "bot"),
    ("user", "assistant"),
    ("user", "bot"),
    ("user", "gpt"),
    ("ask", "answer"),
    ("q", "a"),
    ("问题", "答案"),
    ("问题", "回答"),
    ("提问", "回答"),
    ("指令", "输出"),
    ("问", "答"),
)
"""The usual names of a question and its answer. The first pair of which a row has both is read."""

TURN_LISTS = (
    "conversations", "messages", "conversation", "dialogue", "dialog", "data", "dialogues", "dialogs", "turns", "chat",
    "chats", "items", "thread", "utterances", "message",
    "contents",
)  # fmt: skip
"""The usual names of a list of turns."""

USUAL: dict[str, tuple[str, ...]] = {
    "input": ("input", "context", "输入"),
    "reasoning": (
        "reasoning_content", "reasoning", "thinking", "thinking_content", "deepseek_reasoning", "complex_cot", "cot",
        "chain_of_thought", "thinking_trajectories", "deepseek_thinking_trajectory", "think", "thought", "thoughts",
    ),
    "system": (
        "system", "system_prompt", "system_message", "system_instruction", "systeminstruction", "sys_prompt",
        "meta_instruction", "prefix", "textbox_q_instruction",
    ),
    "history": ("history",),
    "messages": TURN_LISTS,
    "texts": TURN_LISTS[:6],
    "tools": ("tools", "functions"),
    "text": ("text",),
    "chosen": ("chosen", "chosen_response", "preferred_output"),
    "rejected": ("rejected", "rejected_response", "rejected_messages", "non_preferred_output"),
    "label": ("label", "kto_tag"),
    "prompt": ("prompt", "instruction", "question", "query", "problem", "input"),
    "task": ("instruction",),
    "query": ("query",),
    "calls": ("answers",),
    "rounds": ("chat",),
    "plain_text": ("plain_text",),
    "tree": ("prompt",),
    "tree_id": ("message_tree_id",),
    "tree_state": ("tree_state",),
}  # fmt: skip
"""The usual names of the other columns. `texts`, and those from `prompt` on, belong to single formats and cannot be named in
params.yaml. `instruction` and `output` have PAIRS; `role` and `content` are known to turns.py."""
INPUTS = {"definition": ("inputs",), "trans_instruction": ("trans_input",), "textbox_question": ("textbox_q_context",)}
"""The names of `input` beside a question of a name of its own."""
PRIMARY = {"messages": ("messages", "conversations"), "instruction": ("instruction",), "output": ("output",)}
"""Names that tell the format even where another field of it is missing, or of the wrong kind."""


MERGED = {"conversations": "messages", "texts": "messages"}
"""Columns that params.yaml names as another: a list of turns has one name, of objects or of texts."""


def lookup(value: Any, name: str) -> Any:
    """What the field `name` of a row holds; None if there is none. `a.b` is the field b of a, `a.0` the first of a list."""
    if isinstance(value, dict) and name in value:
        return value[name]
    for step in name.split("."):
        if isinstance(value, dict):
            value = value.get(step)
        elif isinstance(value, list) and step.isdecimal() and int(step) < len(value):
            value = value[int(step)]
        else:
            return None
    return value


def check_columns(name: str, columns: Mapping[Column, str]) -> Iterable[str]:
    """The problems of a map of columns: two that read the same field. `name` is the parameter."""
    first: dict[str, Column] = {}
    for column, field in columns.items():
        if field in first:
            yield bad_param(
                name, f"{first[field]} and {column} both read the field {field!r}; give each column a field of its own"
            )
        first.setdefault(field, column)


class Names:
    """The names under which the columns are looked for: those of params.yaml, then the usual ones."""

    def __init__(self, columns: Mapping[Any, str]) -> None:
        self.given: dict[str, str] = {column: name for column, name in columns.items() if name != column}
        """The columns that params.yaml calls otherwise than Loratory."""
        self._owner = {name: MERGED.get(column, column) for column, name in self.given.items()}

    def find(self, column: str, kinds: Mapping[str, str], wanted: Collection[str], *, question: str = "") -> str | None:
        """The field of a row that is read as a column; None if it has none of a wanted kind.

        Args:
            column: Not `instruction` or `output`: see `find_pair`.
            kinds: The kind of each field of the row, and of each nested field that params.yaml names.
            wanted: The kinds that the column may have.
            question: The field of the question, which decides what its input is called.
        """
        usual = INPUTS.get(question, USUAL["input"]) if column == "input" else USUAL.get(column, ())
        return next(self._fields(column, (*self._given(column), *usual), kinds, wanted), None)

    def find_pair(
        self, kinds: Mapping[str, str], *, questions: Collection[str], answers: Collection[str]
    ) -> tuple[str, str] | None:
        """The fields of a question and its answer, each of a wanted kind."""
        mine, own = self._given("instruction"), self._given("output")
        choices = [
            *product(mine, own),
            *product(mine, dict.fromkeys(name for _, name in PAIRS)),
            *product(dict.fromkeys(name for name, _ in PAIRS), own),
            *PAIRS,
        ]
        for question, answer in choices:
            for found in self._fields("instruction", (question,), kinds, questions):
                for other in self._fields("output", (answer,), kinds, answers):
                    if other != found:
                        return found, other
        return None

    def find_primary(self, column: str, kinds: Mapping[str, str]) -> str | None:
        """The field of a column under the name of params.yaml or its first usual name, of any kind."""
        return next(self._fields(column, (*self._given(column), *PRIMARY[column]), kinds, None), None)

    def uses_given(self, fields: Iterable[str]) -> int:
        """How many of the fields params.yaml names."""
        return sum(field in self._owner for field in fields)

    def _given(self, column: str) -> list[str]:
        return [name for name, owner in self._owner.items() if owner == MERGED.get(column, column)]

    def _fields(
        self, column: str, names: Iterable[str], kinds: Mapping[str, str], wanted: Collection[str] | None
    ) -> Iterator[str]:
        """The fields with one of the names, exactly or in another case, that params.yaml gives to no other column."""
        owner = MERGED.get(column, column)
        for name in names:
            same = (name,) if name in kinds else (field for field in kinds if field.casefold() == name.casefold())
            for field in same:
                if self._owner.get(field, owner) == owner and (wanted is None or kinds[field] in wanted):
                    yield field
