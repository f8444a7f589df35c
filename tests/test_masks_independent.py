"""Tokens and labels of `ingest` and `encode`, compared with a computation that shares no code with them.

That is Transformers' own `apply_chat_template(..., return_assistant_tokens_mask=True)`, with templates that mark what the
model generates by {% generation %}.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from stages.core.params import read_yaml
from stages.core.tokens import IGNORE, read_tokens
from stages.encode.encode import Params as EncodeParams
from stages.encode.encode import encode
from stages.ingest.ingest import Params as IngestParams
from stages.ingest.ingest import ingest
from tests.tiny import PROJECT, sample

TOOLS = "{%- if tools -%}{{ '<|im_start|>tools\\n' + tools | tojson + '<|im_end|>\\n' }}{%- endif -%}"
PROMPT = "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
CALLS = "{%- for c in m.tool_calls or [] -%}{{ '\\n[CALL]' + c.function | tojson }}{%- endfor -%}"
OTHERS = "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
BLOCK = "{{ '<think>\\n' + m.reasoning_content + '\\n</think>\\n\\n' }}"

THINKING = (
    TOOLS + "{%- for m in messages -%}{%- if m.role == 'assistant' -%}{{ '<|im_start|>assistant\\n' }}"
    "{%- generation -%}{%- if m.reasoning_content -%}"
    + BLOCK
    + "{%- endif -%}{{ m.content }}"
    + CALLS
    + "{{ '<|im_end|>' }}{%- endgeneration -%}{{ '\\n' }}{%- else -%}"
    + OTHERS
    + "{%- endif -%}{%- endfor -%}"
    + PROMPT
)
TEMPLATES = {
    # ChatML. It has no place for reasoning, so the rows with reasoning are given to it without.
    "chatml": THINKING.replace("{%- if m.reasoning_content -%}" + BLOCK + "{%- endif -%}", ""),
    "thinking": THINKING,
    # Reasoning stands only before the last answer, as in Qwen 3's template.
    "last_thinking": THINKING.replace("if m.reasoning_content", "if m.reasoning_content and loop.last"),
    # So does an empty block, which the template writes itself.
    "last_block": THINKING.replace(
        "{%- generation -%}{%- if m.reasoning_content -%}",
        "{%- if loop.last and not m.reasoning_content -%}{{ '<think>\\n\\n</think>\\n\\n' }}{%- endif -%}"
        "{%- generation -%}{%- if m.reasoning_content and loop.last -%}",
    ),
}

TOOL = {"type": "function", "function": {"name": "river_level", "description": "cm", "parameters": {"type": "object"}}}


def made_up(number: int) -> dict[str, Any]:
    """A conversation in the form of OpenAI's files; ten kinds in turn."""
    user = {"role": "user", "content": f"Which metal has number {number}?"}
    answer = {"role": "assistant", "content": f"Metal {number}, of course."}
    more = [{"role": "user", "content": "再说一遍？"}, {"role": "assistant", "content": f"第{number}号金属。"}]
    thinks = {**answer, "reasoning_content": f"There are {number}; 8 * {number} = {8 * number}."}
    arguments = {"river": f"Nebo {number}", "其他": [1, True, "a \"b\" <c> & 'd'"]}
    call = {"type": "function", "function": {"name": "river_level", "arguments": arguments}}
    calls = {"role": "assistant", "content": f"I look at {number}.", "tool_calls": [call]}
    result = {"role": "tool", "content": json.dumps({"cm": number})}
    spaces = [
        {"role": "user", "content": f"\n  two  spaces {number} \n"},
        {"role": "assistant", "content": f" {number}\n\n"},
    ]
    kinds: list[dict[str, Any]] = [
        {"messages": [user, answer]},
        {"messages": [user, answer, *more]},
        {"messages": [{"role": "system", "content": "Answer in 中文 🌊."}, user, answer, *more]},
        {"messages": [user, thinks]},
        {"messages": [user, thinks, *more]},
        {"messages": [user, answer, more[0], {**more[1], "reasoning_content": f"想一想 {number}"}]},
        {"messages": spaces},
        {"messages": [user, {**answer, "weight": 0}, *more]},
        {"messages": [user, calls, result, answer], "tools": [TOOL]},
        {"messages": [user, {**calls, "reasoning_content": "Look it up."}, result, answer, *more], "tools": [TOOL]},
    ]
    return kinds[number % len(kinds)]


def params(stage: str) -> dict[str, Any]:
    section: dict[str, Any] = read_yaml(PROJECT / "params.yaml")[stage]
    return section


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `ingest` makes of 220 rows in four files."""
    root = tmp_path_factory.mktemp("examples")
    (root / "hub").mkdir()
    raw = root / "raw"
    raw.mkdir()
    zh, en, made = sample().rows("zh")[:60], sample().rows("en")[:40], [made_up(number) for number in range(100)]
    sharegpt = [
        {
            "conversations": [
                {"from": "human", "value": f"{n}只风筝？"},
                {"from": "gpt", "value": f"<think>\n{n}\n</think>\n\n{n} 只。"},
            ]
        }
        for n in range(20)
    ]
    for name, rows in {"zh": zh, "made": made, "sharegpt": sharegpt}.items():
        (raw / f"{name}.jsonl").write_text(
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
        )
    (raw / "en.json").write_text(json.dumps(en), encoding="utf-8")
    ingest(
        IngestParams(**params("ingest") | {"max_rejected_percent": 0}),
        raw=raw,
        hub=root / "hub",
        examples=root / "examples",
        report=root / "ingest.json",
    )
    return root / "examples"


def read_split(examples: Path, split: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (examples / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


def row_of_transformers(tokenizer: Any, template: str, messages: list[Any], tools: Any) -> tuple[list[int], list[int]]:
    """The tokens of a conversation, and 1 for those that the template marks as generated."""
    found = tokenizer.apply_chat_template(
        messages, tools=tools, chat_template=template, return_assistant_tokens_mask=True, return_dict=True
    )
    return found["input_ids"], found["assistant_masks"]


def last_range(mask: list[int]) -> tuple[int, int]:
    """The last run of ones."""
    end = start = len(mask) - mask[::-1].index(1)
    while start and mask[start - 1]:
        start -= 1
    return start, end


def expected_rows(tokenizer: Any, template: str, example: dict[str, Any]) -> list[tuple[list[int], list[int]]]:
    """Tokens and labels: one row for each answer, and answers that the row of a later one contains as they are, in that."""
    messages, tools = example["messages"], example.get("tools")
    answers = [
        number for number, message in enumerate(messages) if message["role"] == "assistant" and message.get("train", True)
    ]
    rows: list[tuple[list[int], list[int]]] = []
    for number in reversed(answers):
        ids, mask = row_of_transformers(tokenizer, template, messages[: number + 1], tools)
        start, end = last_range(mask)
        for other, labels in rows:
            if other[:end] == ids[:end]:
                labels[start:end] = ids[start:end]
                break
        else:
            rows.append((ids, [token if start <= at < end else IGNORE for at, token in enumerate(ids)]))
    return rows[::-1]


def without_reasoning(example: dict[str, Any]) -> dict[str, Any]:
    return example | {
        "messages": [{k: v for k, v in message.items() if k != "reasoning_content"} for message in example["messages"]]
    }


def run_encode(tmp_path: Path, tokenizer: Path, examples: Path, **given: Any) -> None:
    (tmp_path / "prompts.json").write_text("[]")
    encode(
        EncodeParams(**params("encode") | given),
        examples=examples,
        prompts=tmp_path / "prompts.json",
        tokenizer=tokenizer,
        tokens=tmp_path / "tokens",
        report=tmp_path / "encode.json",
        masks=tmp_path / "masks.html",
        lengths=tmp_path / "lengths.csv",
    )


@pytest.mark.parametrize("name", TEMPLATES)
def test_tokens_and_labels_are_those_of_transformers(
    tmp_path: Path, tiny_tokenizer: Path, examples: Path, name: str
) -> None:
    source = tmp_path / "template.jinja"
    source.write_text(TEMPLATES[name], encoding="utf-8")
    given = {"template": str(source), "max_length": 4096, "thinking": "drop" if name == "chatml" else "train"}
    gates = dict.fromkeys(params("encode")["gates"], 0.0)
    run_encode(tmp_path, tiny_tokenizer, examples, **given, gates=gates)
    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer)
    compared = split_conversations = 0
    for split in ("train", "validation", "test"):
        table = read_tokens(tmp_path / "tokens" / f"{split}.arrow").to_pylist()
        wanted: list[tuple[str, Any, Any]] = []
        for example in read_split(examples, split):
            row = without_reasoning(example) if name == "chatml" else example
            if split == "test":
                ids, mask = row_of_transformers(tokenizer, TEMPLATES[name], row["messages"], row.get("tools"))
                start, end = last_range(mask)
                wanted.append((example["id"], ids[:start], tokenizer.decode(ids[start : end - 1])))
                continue
            rows = expected_rows(tokenizer, TEMPLATES[name], row)
            split_conversations += len(rows) > 1
            ids_of_rows = [example["id"]] if len(rows) == 1 else [f"{example['id']}.{n}" for n in range(1, len(rows) + 1)]
            wanted += [(id_, ids, labels) for id_, (ids, labels) in zip(ids_of_rows, rows, strict=True)]
        columns = ("id", "prompt_ids", "reference") if split == "test" else ("id", "input_ids", "labels")
        assert [tuple(row[column] for column in columns) for row in table] == wanted
        compared += len(table)
    assert compared >= 200
    assert (split_conversations > 0) == name.startswith("last")


def test_the_text_of_a_special_token_is_text_as_in_transformers(tmp_path: Path, tiny_tokenizer: Path) -> None:
    """Transformers has no template that keeps it as text, so the pieces of the row are tokenized one by one."""
    texts = [("What is <|im_end|>?", "<|im_end|> ends a turn."), ("你好<|endoftext|>", "a <|im_start|>user b")]
    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer)
    examples = tmp_path / "examples"
    examples.mkdir()
    lines, wanted = [], []
    for number, (question, answer) in enumerate(texts):
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        lines.append(
            json.dumps({"id": str(number), "source": f"x:{number}", "format": "messages", "messages": messages}) + "\n"
        )
        ids: list[int] = []
        labels: list[int] = []
        for text, is_message, in_loss in (
            ("<|im_start|>user\n", False, False),
            (question, True, False),
            ("<|im_end|>\n<|im_start|>assistant\n", False, False),
            (answer, True, True),
            ("<|im_end|>", False, True),
            ("\n", False, False),
        ):
            new = tokenizer(text, split_special_tokens=is_message)["input_ids"]
            ids += new
            labels += new if in_loss else [IGNORE] * len(new)
        wanted.append((ids, labels))
        assert sum(token in tokenizer.all_special_ids for token in ids) == 4
    for split in ("train", "validation", "test"):
        (examples / f"{split}.jsonl").write_text("".join(lines))
    run_encode(tmp_path, tiny_tokenizer, examples, template=str(PROJECT / "stages/templates/chatml.jinja"))
    table = read_tokens(tmp_path / "tokens" / "train.arrow").to_pylist()
    assert [(row["input_ids"], row["labels"]) for row in table] == wanted
