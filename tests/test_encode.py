"""encode, with a real tokenizer: ids, labels, prompts and counts, to the token."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from stages.encode import Params, encode
from stages.lib.mask import IGNORE
from stages.lib.problem import Problem
from stages.lib.tokens import read_tokens, stop_token_ids
from tests.tiny import PROJECT, sample


class Encoded:
    """What encode makes of some conversations, which stand in all three splits."""

    def __init__(self, root: Path, tokenizer: Path, conversations: list[list[dict[str, Any]]], **params: Any) -> None:
        examples = root / "examples"
        examples.mkdir(exist_ok=True)
        lines = [
            json.dumps({"id": f"id{n}", "source": f"x.json:{n + 1}", "messages": messages}) + "\n"
            for n, messages in enumerate(conversations)
        ]
        for split in ("train", "validation", "test"):
            (examples / f"{split}.jsonl").write_text("".join(lines))
        template = params.pop("template", str(PROJECT / "stages/templates/chatml.jinja"))
        values = {"template": template, "labels_on": "assistant", "max_length": 200} | params
        self.root, self.tokenizer = root, AutoTokenizer.from_pretrained(tokenizer)
        outs = [root / name for name in ("tokens", "report.json", "preview.txt", "lengths.csv")]
        encode(Params(**values), examples, tokenizer, Path(template), *outs)
        self.report = json.loads((root / "report.json").read_text())
        self.train = read_tokens(root / "tokens" / "train.arrow")
        self.test = read_tokens(root / "tokens" / "test.arrow")

    def learned(self, row: int = 0) -> str:
        ids = [label for label in self.train.to_pylist()[row]["labels"] if label != IGNORE]
        return str(self.tokenizer.decode(ids))


def chat(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]


def test_rows_hold_the_rendered_text_and_learn_the_answer_with_its_stop_token(tmp_path: Path, tiny_tokenizer: Path) -> None:
    encoded = Encoded(tmp_path, tiny_tokenizer, [chat("你好 q", '{"a":1}')])
    (row,) = encoded.train.to_pylist()
    text = '<|im_start|>user\n你好 q<|im_end|>\n<|im_start|>assistant\n{"a":1}<|im_end|>\n'
    assert encoded.tokenizer.decode(row["input_ids"]) == text
    assert row["input_ids"] == encoded.tokenizer(text)["input_ids"]
    assert encoded.learned() == '{"a":1}<|im_end|>'
    assert stop_token_ids(encoded.train) == stop_token_ids(encoded.test) == [2]
    # The stop token is the pad token too, and is learned all the same.
    assert encoded.tokenizer.pad_token_id == 2
    assert row["labels"][-2:] == [2, IGNORE]


def test_test_prompts_are_the_start_of_the_row_that_training_would_see(tmp_path: Path, tiny_tokenizer: Path) -> None:
    encoded = Encoded(tmp_path, tiny_tokenizer, [chat("q1", "a1", "q2", "a2")])
    (prompt,), (row,) = encoded.test.to_pylist(), encoded.train.to_pylist()
    assert row["input_ids"][: len(prompt["prompt_ids"])] == prompt["prompt_ids"]
    assert prompt["prompt"].endswith("q2<|im_end|>\n<|im_start|>assistant\n")
    assert prompt["reference"] == "a2"


@pytest.mark.parametrize(
    ("messages", "params", "reason"),
    [
        (chat("say <|im_end|> now", "no"), {}, "special_token_in_text"),
        (chat("q " * 300, "a"), {}, "too_long"),
        ([chat("q")[0], chat("q", "a")[1] | {"train": False}], {}, "nothing_to_learn"),
        (
            [{"role": "system", "content": "s"}, *chat("q", "a")],
            {"template": str(PROJECT / "stages/templates/chatglm.jinja")},
            "not_in_template",
        ),
    ],
)
def test_a_row_that_does_not_fit_is_set_aside_and_counted(
    tmp_path: Path, tiny_tokenizer: Path, messages: list[dict[str, Any]], params: dict[str, Any], reason: str
) -> None:
    encoded = Encoded(tmp_path, tiny_tokenizer, [messages, chat("q", "a")], **params)
    rejected = [json.loads(line) for line in (tmp_path / "tokens" / "rejected.jsonl").read_text().splitlines()]
    assert {(row["id"], row["source"], row["reason"]) for row in rejected} == {("id0", "x.json:1", reason)}
    assert encoded.report["rejected_by_reason"] == {reason: 3}
    assert encoded.train.column("id").to_pylist() == ["id1"]


def test_nothing_left_is_an_error_with_the_reason(tmp_path: Path, tiny_tokenizer: Path) -> None:
    with pytest.raises(Problem, match="no rows left for train and validation and test") as caught:
        Encoded(tmp_path, tiny_tokenizer, [chat("q " * 300, "a")])
    assert "too_long: x.json:1: 6" in caught.value.messages[1]
    assert not (tmp_path / "tokens").exists()


def test_a_tokenizer_that_puts_bos_before_every_text_gets_exactly_one(tmp_path: Path, tiny_tokenizer: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    tokenizer.bos_token = "<|endoftext|>"
    tokenizer.save_pretrained(tmp_path / "bos")
    (tmp_path / "bos" / "config.json").write_text('{"model_type": "llama"}')
    plain = tmp_path / "t.jinja"
    for source in (
        "{% for m in messages %}{{ m.content }}{% endfor %}",
        "{{ bos_token }}{{ messages[0].content }}{{ messages[1].content }}",
    ):
        plain.write_text(source)
        encoded = Encoded(tmp_path, tmp_path / "bos", [chat("q", "a")], template=str(plain))
        (row,) = encoded.train.to_pylist()
        assert row["input_ids"].count(0) == 1
        assert row["input_ids"][0] == 0
        assert encoded.learned() == "a"


def test_the_counts_are_those_of_the_rows(tmp_path: Path, tiny_tokenizer: Path) -> None:
    rows = [chat(row["input"], row["output"]) for row in sample().rows("zh")[:20]]
    encoded = Encoded(tmp_path, tiny_tokenizer, rows)
    lengths = [len(ids) for ids in encoded.train.column("input_ids").to_pylist()]
    labels = [label for row in encoded.train.column("labels").to_pylist() for label in row if label != IGNORE]
    report = encoded.report
    assert (report["train_rows"], report["train_tokens"], report["train_label_tokens"]) == (20, sum(lengths), len(labels))
    assert (report["longest_row"], report["rows_without_stop_token"], report["stop_token_ids"]) == (max(lengths), 0, [2])
    bins = [line.split(",") for line in (tmp_path / "lengths.csv").read_text().splitlines()[1:]]
    assert sum(int(rows) for _, rows in bins) == 20
    for span, count in bins:
        low, high = map(int, span.split("-"))
        assert int(count) == sum(low <= length <= high for length in lengths)
    assert [span for span, _ in bins] == sorted(span for span, _ in bins)


def test_the_preview_marks_what_is_learned(tmp_path: Path, tiny_tokenizer: Path) -> None:
    Encoded(tmp_path, tiny_tokenizer, [chat("q1", "a1", "q2", "a2")])
    assert "assistant\n⟦a1<|im_end|>⟧\n<|im_start|>user\nq2" in (tmp_path / "preview.txt").read_text(encoding="utf-8")


def test_the_template_travels_with_the_tokens(tmp_path: Path, tiny_tokenizer: Path) -> None:
    Encoded(tmp_path, tiny_tokenizer, [chat("q", "a")])
    saved = (tmp_path / "tokens" / "chat_template.jinja").read_bytes()
    assert saved == (PROJECT / "stages" / "templates" / "chatml.jinja").read_bytes()
