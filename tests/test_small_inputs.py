"""Raw rows through `ingest` and `encode`: small inputs, each of which stands for a kind of data or of template.

The templates do in a few lines what the templates of well-known models do.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from stages.core.params import read_yaml
from stages.core.problem import Problem
from stages.core.tokens import IGNORE, read_tokens
from stages.encode.encode import Params as EncodeParams
from stages.encode.encode import encode
from stages.ingest.ingest import Params as IngestParams
from stages.ingest.ingest import ingest
from tests.tiny import PROJECT

HEAD = "{%- for t in tools or [] -%}{{ '[T]' + t | tojson + '\\n' }}{%- endfor -%}{%- for m in messages -%}"
TURN = "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
PROMPT = "{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
CHATML = "{%- for m in messages -%}" + TURN + PROMPT


def calls(written: str, *, result: str = TURN) -> str:
    """A template in which an answer with a call is `written`, an expression of its first call `c`."""
    return (
        HEAD
        + "{%- if m.tool_calls -%}{%- set c = m.tool_calls[0] -%}{{ '<|im_start|>assistant\\n' + "
        + written
        + " + '<|im_end|>\\n' }}{%- elif m.role == 'tool' -%}"
        + result
        + "{%- else -%}"
        + TURN
        + "{%- endif -%}"
        + PROMPT
    )


OBJECTS = calls("m.content + {'name': c.function.name, 'arguments': c.function.arguments} | tojson")
QUOTES = calls(
    "{'name': c.function.name, 'arguments': c.function.arguments} | tojson",
    result="{{ '<|im_start|>tool\\n' + m.content | tojson + '<|im_end|>\\n' }}",
)
IDS = calls(
    "c.id + ' ' + c.function.name + c.function.arguments | tojson",
    result=TURN.replace("m.content", "m.tool_call_id + ' ' + m.content"),
)
TEXT_ARGUMENTS = calls("c.function.name + c.function.arguments")
SPECIAL_MARK = calls("'<|endoftext|>' + c.function.name + c.function.arguments | tojson")
# An empty block before the last answer, and none before earlier ones; it describes no tools.
EMPTY_BLOCK = (
    "{%- for m in messages -%}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{%- if m.role == 'assistant' and loop.last -%}"
    "{{ '<think>\\n' + (m.reasoning_content or '') + '\\n</think>\\n\\n' }}{%- endif -%}{{ m.content }}"
    "{%- for c in m.tool_calls or [] -%}{{ '<tool_call>' + c.function | tojson + '</tool_call>' }}{%- endfor -%}"
    "{{ '<|im_end|>\\n' }}" + PROMPT
)
SYSTEM_IN_LAST = (
    "{%- if messages[0].role == 'system' -%}{%- set system = messages[0].content -%}{%- set rest = messages[1:] -%}"
    "{%- else -%}{%- set rest = messages -%}{%- endif -%}"
    "{%- set last = rest | selectattr('role', 'equalto', 'user') | list | last -%}{%- for m in rest -%}"
    "{{ '<|im_start|>' + m.role + '\\n' + (system + '\\n' if system and m == last else '') }}"
    "{{ m.content + '<|im_end|>\\n' }}" + PROMPT
)
NO_SYSTEM = "{%- if messages[0].role == 'system' -%}{{ raise_exception('no system role') }}{%- endif -%}" + CHATML
TRIMS_ANSWERS = CHATML.replace("m.content", "(m.content | trim if m.role == 'assistant' else m.content)")
SPACE_BEFORE_STOP = (
    "{%- for m in messages -%}{{ 'Q: ' + m.content + ' A:' if m.role == 'user' else ' ' + m.content + ' ' + eos_token }}"
    "{%- endfor -%}"
)

TOOL = {"name": "level", "description": "cm", "parameters": {"type": "object", "properties": {"river": {"type": "string"}}}}
TOOLS = [{"type": "function", "function": TOOL}]


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def answer(text: str | None, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **fields}


def call(n: int, arguments: Any = None) -> dict[str, Any]:
    function = {"name": "level", "arguments": arguments or {"river": f"N{n}"}}
    return answer(None, tool_calls=[{"id": f"id{n:07}", "type": "function", "function": function}])


def with_result(n: int, result: str, **given: Any) -> dict[str, Any]:
    tool = {"role": "tool", "tool_call_id": f"id{n:07}", "content": result}
    return {"messages": [user(f"q{n}"), call(n, **given), tool, answer("ok")], "tools": TOOLS}


def two_turns(n: int) -> list[dict[str, Any]]:
    return [user(f"q{n}"), answer(f"a{n}"), user("more"), answer("b")]


def turn(role: str, text: str) -> str:
    return f"<|im_start|>{role}\n{text}<|im_end|>\n"


def said(text: str) -> str:
    return f"<|im_start|>assistant\n[[{text}<|im_end|>]]\n"


def blocked(text: str) -> str:
    return f"<|im_start|>assistant\n<think>\n\n</think>\n\n[[{text}<|im_end|>]]\n"


ABOUT = '[T]{"type": "function", "function": ' + json.dumps(TOOL) + "}\n"
CALL = '{"name": "level", "arguments": {"river": "N7"}}'
ONE = turn("user", "q7") + said("a7")

# Name: raw row n, template, and the rows of row 7 with what is in the loss in [[ ]].
CASES: dict[str, tuple[Callable[[int], dict[str, Any]], str, list[str]]] = {
    "reasoning": (
        lambda n: {"messages": [user(f"q{n}"), answer("a", reasoning_content="r")]},
        CHATML,
        [turn("user", "q7") + said("<think>\nr\n</think>\n\na")],
    ),
    "function_call_words": (
        lambda n: {
            "messages": [
                user(f"q{n}"),
                answer("I look.", function_call={"name": "level", "arguments": f'{{"river": "N{n}"}}'}),
            ],
            "functions": [TOOL],
        },
        OBJECTS,
        [ABOUT + turn("user", "q7") + said("I look." + CALL)],
    ),
    "parameters": (
        lambda n: {
            "conversations": [
                {"from": "human", "value": f"q{n}"},
                {"from": "function_call", "value": json.dumps({"name": "level", "parameters": {"river": f"N{n}"}})},
            ],
            "tools": json.dumps([TOOL]),
        },
        OBJECTS,
        [ABOUT + turn("user", "q7") + said(CALL)],
    ),
    "context": (
        lambda n: {"instruction": f"q{n}", "context": ": note 1", "response": "a", "category": "closed_qa"},
        CHATML,
        [turn("user", "q7: note 1") + said("a")],
    ),
    "json_results": (
        lambda n: with_result(n, '{"cm": 2}'),
        QUOTES,
        [ABOUT + turn("user", "q7") + said(CALL) + turn("tool", '"{\\"cm\\": 2}"') + said("ok")],
    ),
    "spaces_at_both_ends": (
        lambda n: {"messages": [user(f"q{n}\n"), answer(" a")]},
        TRIMS_ANSWERS,
        [turn("user", "q7\n") + said("a")],
    ),
    "ids": (
        lambda n: with_result(n, "2"),
        IDS,
        [ABOUT + turn("user", "q7") + said('id0000007 level{"river": "N7"}') + turn("tool", "id0000007 2") + said("ok")],
    ),
    "arguments_as_text": (
        lambda n: with_result(n, "2", arguments=f'{{"river": "N{n}"}}'),
        TEXT_ARGUMENTS,
        [ABOUT + turn("user", "q7") + said('level{"river": "N7"}') + turn("tool", "2") + said("ok")],
    ),
    "empty_block_two_turns": (
        lambda n: {"messages": two_turns(n)},
        EMPTY_BLOCK,
        [
            turn("user", "q7") + blocked("a7"),
            turn("user", "q7") + turn("assistant", "a7") + turn("user", "more") + blocked("b"),
        ],
    ),
    "empty_block_thinking": (
        lambda n: {"messages": [user(f"q{n}"), answer(f"<think>\nr{n}\n</think>\n\na")]},
        EMPTY_BLOCK,
        [turn("user", "q7") + said("<think>\nr7\n</think>\n\na")],
    ),
    "empty_block_tools": (
        lambda n: with_result(n, "2"),
        EMPTY_BLOCK,
        [
            turn("user", "q7") + blocked(f"<tool_call>{CALL}</tool_call>"),
            turn("user", "q7") + turn("assistant", f"<tool_call>{CALL}</tool_call>") + turn("tool", "2") + blocked("ok"),
        ],
    ),
    "space_before_stop": (
        lambda n: {"messages": two_turns(n)},
        SPACE_BEFORE_STOP,
        ["Q: q7 A:[[ a7 <|im_end|>]]Q: more A:[[ b <|im_end|>]]"],
    ),
    "newline_before_stop": (
        lambda n: {"messages": two_turns(n)},
        CHATML.replace("m.content + ", "m.content + '\\n' + "),
        [turn("user", "q7\n") + said("a7\n") + turn("user", "more\n") + said("b\n")],
    ),
    "system_in_last_question": (
        lambda n: {"messages": [{"role": "system", "content": "s"}, *two_turns(n)]},
        SYSTEM_IN_LAST,
        [
            turn("user", "s\nq7") + said("a7"),
            turn("user", "q7") + turn("assistant", "a7") + turn("user", "s\nmore") + said("b"),
        ],
    ),
    "empty_system": (
        lambda n: {
            "conversations": [
                {"from": "system", "value": ""},
                {"from": "human", "value": f"q{n}"},
                {"from": "gpt", "value": f"a{n}"},
            ]
        },
        NO_SYSTEM,
        [ONE],
    ),
    "weight_null": (lambda n: {"messages": [user(f"q{n}"), answer(f"a{n}", weight=None)]}, CHATML, [ONE]),
    "train_null": (lambda n: {"messages": [user(f"q{n}"), answer(f"a{n}", train=None)]}, CHATML, [ONE]),
    "bom": (lambda n: {"messages": [user(f"q{n}"), answer(f"a{n}")]}, "\ufeff" + CHATML, [ONE]),
    "conversations_of_role_and_content": (
        lambda n: {"conversations": [user(f"q{n}"), answer(f"a{n}")]},
        CHATML,
        [ONE],
    ),
    "role_chatgpt": (
        lambda n: {"conversations": [{"from": "human", "value": f"q{n}"}, {"from": "chatgpt", "value": f"a{n}"}]},
        CHATML,
        [ONE],
    ),
    "role_bing": (
        lambda n: {"conversations": [{"from": "human", "value": f"q{n}"}, {"from": "bing", "value": f"a{n}"}]},
        CHATML,
        [ONE],
    ),
    "parts": (
        lambda n: {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "q"}, {"type": "text", "text": str(n)}]},
                {"role": "assistant", "content": [{"type": "text", "text": f"a{n}"}]},
            ]
        },
        CHATML,
        [ONE],
    ),
}


class Run:
    """`ingest` and `encode` of 60 raw rows."""

    def __init__(
        self, root: Path, tokenizer: Path, row: Callable[[int], dict[str, Any]], *, encoding: str = "utf-8"
    ) -> None:
        self.root, self.tokenizer = root, tokenizer
        (root / "raw").mkdir()
        (root / "hub").mkdir()
        lines = "".join(json.dumps(row(n), ensure_ascii=False) + "\n" for n in range(60))
        (root / "raw" / "rows.jsonl").write_bytes(lines.encode(encoding))
        self.ingest = read_yaml(PROJECT / "params.yaml")["ingest"] | {"validation_percent": 10, "max_rejected_percent": 0}
        self.encode = read_yaml(PROJECT / "params.yaml")["encode"]
        self.encode["gates"] = dict.fromkeys(self.encode["gates"], 0.0)

    def examples(self) -> None:
        paths = {name: self.root / name for name in ("raw", "hub", "examples")}
        ingest(IngestParams(**self.ingest), **paths, report=self.root / "ingest.json")

    def tokens(self, template: str, **given: Any) -> None:
        (self.root / "template.jinja").write_text(template, encoding="utf-8")
        (self.root / "prompts.json").write_text("[]")
        encode(
            EncodeParams(**self.encode | {"template": str(self.root / "template.jinja")} | given),
            examples=self.root / "examples",
            prompts=self.root / "prompts.json",
            tokenizer=self.tokenizer,
            tokens=self.root / "tokens",
            report=self.root / "encode.json",
            masks=self.root / "masks.html",
            lengths=self.root / "lengths.csv",
        )

    def rows(self, split: str) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = read_tokens(self.root / "tokens" / f"{split}.arrow").to_pylist()
        return rows

    def marked(self) -> list[str]:
        """The training rows with what is in the loss in [[ ]]."""
        tokenizer, texts = AutoTokenizer.from_pretrained(self.tokenizer), []
        for row in self.rows("train"):
            text, at = "", 0
            while at < len(row["labels"]):
                is_labelled, start = row["labels"][at] != IGNORE, at
                while at < len(row["labels"]) and (row["labels"][at] != IGNORE) == is_labelled:
                    at += 1
                piece = tokenizer.decode(row["input_ids"][start:at])
                text += f"[[{piece}]]" if is_labelled else piece
            texts.append(text)
        return texts


@pytest.mark.parametrize("name", CASES)
def test_each_answer_is_trained_behind_its_prompt(tmp_path: Path, tiny_tokenizer: Path, name: str) -> None:
    row, template, expected = CASES[name]
    run = Run(tmp_path, tiny_tokenizer, row)
    run.ingest |= {"validation_percent": 10, "test_percent": 10, "split_seed": 3}
    run.examples()
    run.tokens(template)
    found = run.marked()
    assert [text for text in found if "q7" in text] == expected
    trained = sum(1 for line in (tmp_path / "examples" / "train.jsonl").read_text().splitlines())
    assert len(found) == trained * len(expected)


def test_a_file_in_utf_16_is_read(tmp_path: Path, tiny_tokenizer: Path) -> None:
    run = Run(tmp_path, tiny_tokenizer, lambda n: {"instruction": f"数{n}", "output": "好"}, encoding="utf-16")
    run.examples()
    run.tokens(CHATML)
    assert all("好<|im_end|>]]" in text for text in run.marked())


def test_a_call_that_is_a_special_token_is_in_the_reference(tmp_path: Path, tiny_tokenizer: Path) -> None:
    run = Run(tmp_path, tiny_tokenizer, lambda n: {"messages": [user(f"q{n}"), call(n)], "tools": TOOLS})
    run.examples()
    run.tokens(SPECIAL_MARK)
    assert {row["reference"][:30] for row in run.rows("test")} == {'<|endoftext|>level{"river": "N'}


def test_a_cut_question_is_not_answered(tmp_path: Path, tiny_tokenizer: Path) -> None:
    run = Run(
        tmp_path, tiny_tokenizer, lambda n: {"messages": [user(f"q{n} " + "and so on " * (90 * (n % 2))), answer("a")]}
    )
    run.examples()
    run.encode["gates"] = dict.fromkeys(run.encode["gates"], 100.0)
    run.tokens(CHATML, truncation_strategy="right", max_length=100)
    assert run.rows("test")
    assert all("and so on" not in row["prompt"] for row in run.rows("test"))
    report = json.loads((tmp_path / "encode.json").read_text())
    assert report["splits"]["test"]["rejected_too_long"] > 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"label": False}, "label says whether its answer is a good one"),
        ({"image": "7.png"}, "image: media, which a text model cannot see"),
    ],
)
def test_fields_that_change_the_meaning_are_named(
    tmp_path: Path, tiny_tokenizer: Path, fields: dict[str, Any], message: str
) -> None:
    run = Run(tmp_path, tiny_tokenizer, lambda n: {"messages": [user(f"q{n}"), answer("a")], **fields})
    with pytest.raises(Problem) as caught:
        run.examples()
    assert message in "\n".join(caught.value.messages)
