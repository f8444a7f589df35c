"""encode: gates, the sample that is looked at first, what a stopped stage leaves, the report, and the masks page."""

import json
import math
import re
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from stages.core.output import kept_if_stopped
from stages.core.problem import Problem
from stages.encode import chunks
from stages.encode.chunks import read_sample
from stages.encode.counts import binomial_tail
from stages.encode.masks_page import KIND_WORDS, ROW_WORDS, WHY_WORDS
from stages.ingest.ingest import Params as IngestParams
from stages.ingest.ingest import ingest
from tests.test_encode import EncodeRun, chat
from tests.tiny import PROJECT

LONG = chat("q " * 300, "a")
UNTRAINED = [chat("q")[0], chat("q", "a")[1] | {"train": False}]
REASONING = {"role": "assistant", "content": "a", "reasoning_content": "because b"}
TOOL = {"type": "function", "function": {"name": "weather", "description": "d", "parameters": {}}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "北京"}}}
TEMPLATE = """{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.reasoning_content and loop.last %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}
{%- for c in m.tool_calls or [] %}[call]{{ c.function | tojson }}{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
"""Leaves out the reasoning of earlier answers, as Qwen 3's template does."""


@pytest.fixture
def template(tmp_path: Path) -> str:
    (tmp_path / "t.jinja").write_text(TEMPLATE)
    return str(tmp_path / "t.jinja")


def rejected_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# The limit on rejected rows


def test_too_many_rejected_rows_stop_the_stage_with_the_reasons_and_the_first_rows(
    tmp_path: Path, tiny_tokenizer: Path
) -> None:
    rows = [*[LONG] * 4, UNTRAINED, *[chat("q", "a")] * 5]
    EncodeRun(tmp_path, tiny_tokenizer, rows, gates={"max_rejected_percent": 50.0})
    with pytest.raises(Problem) as caught:
        EncodeRun(tmp_path, tiny_tokenizer, rows, gates={"max_rejected_percent": 49.0})
    gate, no_labels, too_long, _ = caught.value.messages
    assert gate.startswith(
        "params.yaml: encode.gates.max_rejected_percent: 15 of 30 rows are rejected (50 %), wanted at most"
    )
    assert no_labels == "no_labels: 3 rows, the first x.json:5: the row has no labelled tokens"
    found = re.fullmatch(r"too_long: 12 rows, the first (.*)", too_long)
    assert found
    assert [part.partition(": ")[0] for part in found[1].split("; ")] == ["x.json:1", "x.json:2", "x.json:3"]


def test_a_conversation_that_loses_one_of_its_rows_counts_once(tmp_path: Path, tiny_tokenizer: Path, template: str) -> None:
    long = [*chat("q"), REASONING, *chat("q " * 300), REASONING, *chat("q"), REASONING]
    run = EncodeRun(tmp_path, tiny_tokenizer, [long, chat("q", "a")], template=template)
    rejected = rejected_lines(tmp_path / "tokens" / "rejected.jsonl")
    assert [(row["id"], row["reason"]) for row in rejected if row["split"] == "train"] == [
        ("id0.2", "too_long"),
        ("id0.3", "too_long"),
    ]
    assert run.train.column("id").to_pylist() == ["id0.1", "id1"]
    assert run.report["rejected_by_reason"] == {"too_long": 3}
    assert run.report["gates"]["rejected"] == run.report["gates"]["too_long"] == 3


# The sample


@pytest.fixture
def small_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples 20 of 200 rows or more."""
    monkeypatch.setattr(chunks, "MIN_SAMPLED", 100)
    monkeypatch.setattr(chunks, "SAMPLE_SHARE", 30)
    monkeypatch.setattr(chunks, "ROWS_PER_CHUNK", 50)


@pytest.mark.usefixtures("small_sample")
def test_a_gate_that_a_sample_exceeds_beyond_doubt_stops_the_stage_at_once(
    tmp_path: Path, tiny_tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[int] = []
    encode_chunk = chunks.encode_chunk
    monkeypatch.setattr(
        "stages.encode.workers.encode_chunk",
        lambda maker, task: encoded.append(len(task.lines)) or encode_chunk(maker, task),
    )
    with pytest.raises(Problem) as caught:
        EncodeRun(tmp_path, tiny_tokenizer, [LONG, chat("q", "a")] * 100, gates={"max_too_long_percent": 1.0})
    gate, stopped, kept = caught.value.messages
    assert sum(encoded) == 20
    wanted = (
        r"in a sample of 20 of the 600 rows, \d+ of 20 rows are longer than encode.max_length \(.* %\), wanted at most 1 %"
    )
    assert re.search(wanted, gate)
    assert stopped == "stopped before the other 580 rows were encoded"
    assert "failed/encode/rejected.jsonl and " in kept
    assert not (tmp_path / "tokens").exists()
    counted = json.loads((tmp_path / "failed" / "encode" / "summary.json").read_text())
    rejected = rejected_lines(tmp_path / "failed" / "encode" / "rejected.jsonl")
    assert counted["rows_read"] == 20
    assert len(rejected) == counted["rejected_by_reason"]["too_long"]
    assert counted["length_percentiles_of_rejected_too_long"]["p50"] > 600


@pytest.mark.usefixtures("small_sample")
def test_a_sample_leaves_the_output_of_a_passing_run_unchanged(
    tmp_path: Path, tiny_tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [LONG if n % 20 == 0 else chat(f"q{n}", f"a{n}") for n in range(200)]
    found = []
    for limit in (100, 10_000):
        monkeypatch.setattr(chunks, "MIN_SAMPLED", limit)
        EncodeRun(tmp_path, tiny_tokenizer, rows, gates={"max_too_long_percent": 5.0, "max_rejected_percent": 5.0})
        found.append({path.name: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()})
    assert found[0] == found[1]


@pytest.mark.usefixtures("small_sample")
def test_a_sample_has_one_row_of_each_part_of_all_splits(tmp_path: Path) -> None:
    sizes = {"train": 400, "validation": 7, "test": 193}
    number = 0
    for split, size in sizes.items():
        (tmp_path / f"{split}.jsonl").write_text("".join(f"{n}\n" for n in range(number, number + size)))
        number += size
    tasks = read_sample(tmp_path, sizes)
    lines = [int(line) for task in tasks for line in task.lines]
    assert [line // 30 for line in lines] == list(range(20))
    assert len({line % 2 for line in lines}) == 2
    assert read_sample(tmp_path, {"train": 100, "validation": 0, "test": 0}) == []


@pytest.mark.parametrize(("found", "of", "share"), [(3, 20, 0.05), (20, 20, 0.5), (1, 7, 0.001), (30, 150, 0.05)])
def test_the_binomial_bound_is_exact(found: int, of: int, share: float) -> None:
    exact = Fraction(share)
    tail = sum(math.comb(of, n) * exact**n * (1 - exact) ** (of - n) for n in range(found, of + 1))
    assert binomial_tail(found, of, share) == pytest.approx(float(tail), rel=1e-9)
    assert (binomial_tail(0, of, 0.0), binomial_tail(1, of, 0.0), binomial_tail(of, of, 1.0)) == (1.0, 0.0, 1.0)


# What a stopped stage leaves


def test_a_stopped_stage_leaves_the_rejected_rows_and_the_counts_until_it_succeeds(
    tmp_path: Path, tiny_tokenizer: Path
) -> None:
    rows = [LONG, chat("q", "a")]
    with pytest.raises(Problem) as caught:
        EncodeRun(tmp_path, tiny_tokenizer, rows, gates={"max_rejected_percent": 0.0})
    kept = tmp_path / "failed" / "encode"
    assert (
        caught.value.messages[-1] == f"see {kept}/rejected.jsonl and {kept}/summary.json (removed when this stage succeeds)"
    )
    assert [(row["source"], row["split"]) for row in rejected_lines(kept / "rejected.jsonl")] == [
        ("x.json:1", split) for split in ("train", "validation", "test")
    ]
    counted = json.loads((kept / "summary.json").read_text())
    assert counted["rejected_by_reason"] == {"too_long": 3}
    assert set(counted["length_percentiles"]) == {"p50", "p90", "p99"}
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("tokens")]
    EncodeRun(tmp_path, tiny_tokenizer, rows)
    assert not kept.exists()


def test_a_problem_before_anything_was_counted_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "rejected.jsonl").touch()

    def stage(summary: dict[str, Any]) -> None:
        with kept_if_stopped(tmp_path / "failed", tmp_path / "rejected.jsonl", summary=lambda: summary):
            raise Problem("a")

    with pytest.raises(Problem) as caught:
        stage({})
    assert caught.value.messages == ("a",)
    assert not (tmp_path / "failed").exists()
    with pytest.raises(Problem, match=re.escape(f"see {tmp_path}/failed/summary.json (removed")):
        stage({"rows": 1})


def test_ingest_leaves_them_too(tmp_path: Path) -> None:
    from ruamel.yaml import YAML

    section = dict(YAML(typ="safe").load(PROJECT / "params.yaml")["ingest"]) | {"max_rejected_percent": 10}
    (tmp_path / "raw").mkdir()
    rows: list[Any] = [{"instruction": f"q{n}", "output": "a"} for n in range(40)] + [
        {"instruction": "q", "output": ""}
    ] * 10
    (tmp_path / "raw" / "x.json").write_text("\n".join(map(json.dumps, rows)))

    def run(**given: Any) -> None:
        paths = {
            "raw": tmp_path / "raw",
            "hub": tmp_path / "hub",
            "examples": tmp_path / "examples",
            "report": tmp_path / "report.json",
        }
        ingest(IngestParams(**section | given), **paths)

    with pytest.raises(Problem) as caught:
        run()
    kept = tmp_path / "failed" / "ingest"
    assert f"see {kept}/rejected.jsonl and {kept}/summary.json" in caught.value.messages[-1]
    assert len(rejected_lines(kept / "rejected.jsonl")) == 10
    counted = json.loads((kept / "summary.json").read_text())
    assert (counted["rows_read"], counted["rejected_by_reason"]) == (50, {"empty_answer": 10})
    assert counted["characters_percentiles"] == {"p50": 4, "p90": 4, "p99": 4}
    assert not (tmp_path / "examples").exists()
    run(max_rejected_percent=20)
    assert not kept.exists()


# The report and the lines on the screen


def test_the_report_counts_conversations_thinking_tools_and_formats(
    tmp_path: Path, tiny_tokenizer: Path, template: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"format": "alpaca", "messages": chat("q", "a")},
        {"format": "messages", "messages": [*chat("q"), REASONING, *chat("q"), REASONING]},
        {
            "format": "messages",
            "tools": [TOOL],
            "messages": [*chat("q"), {"role": "assistant", "content": "", "tool_calls": [CALL]}],
        },
    ]
    run = EncodeRun(tmp_path, tiny_tokenizer, rows, template=template)
    lengths = [len(ids) for ids in run.train.column("input_ids").to_pylist()]
    train = run.report["splits"]["train"]
    assert train == {
        "conversations": 3,
        "with_thinking": 1,
        "with_tools": 1,
        "tools_left_out": 0,
        "rows_per_answer": 1,
        "extra_rows": 1,
        "extra_tokens": min(lengths[1:3]),
        "rows_rejected": 0,
        "rejected_too_long": 0,
        "formats": {"alpaca": 1, "messages": 2},
    }
    assert (run.report["train_rows"], run.report["test_rows"], run.report["thinking_share"]) == (4, 3, 0.3333)
    said = capsys.readouterr().out
    assert "encode: 2 conversations become one row per answer, since the template writes an answer otherwise" in said
    assert "encode: 33.3 % of the training conversations contain reasoning; as a rule of thumb" in said


@pytest.mark.parametrize(("thinking", "plain", "is_said"), [(0, 4, False), (1, 3, True), (3, 1, False), (4, 0, False)])
def test_a_small_share_of_reasoning_is_said(
    tmp_path: Path,
    tiny_tokenizer: Path,
    template: str,
    capsys: pytest.CaptureFixture[str],
    thinking: int,
    plain: int,
    is_said: bool,
) -> None:
    EncodeRun(tmp_path, tiny_tokenizer, [[*chat("q"), REASONING]] * thinking + [chat("q", "a")] * plain, template=template)
    assert ("contain reasoning" in capsys.readouterr().out) == is_said


# The masks page


def test_the_masks_page_shows_each_kind_with_its_source_and_what_each_piece_is(
    tmp_path: Path, tiny_tokenizer: Path, template: str
) -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    rows = [
        {"source": "zh.json:17", "format": "alpaca", "messages": chat("你好", "再见")},
        {"source": "zh.json:18", "format": "alpaca", "messages": chat("你好", "again")},
        {"source": "r1.json:2", "format": "messages", "messages": [*chat("q"), REASONING, *chat("x"), REASONING]},
        {
            "source": "t.json:3",
            "tools": [TOOL],
            "messages": [*chat("q"), call, {"role": "tool", "content": '{"t": 2}'}, *chat("", "two")[1:]],
        },
        {"source": "m.json:4", "messages": [{"role": "system", "content": "sys"}, *chat("q", "a", "q", "b")]},
        {"source": "u.json:5", "messages": [*UNTRAINED, *chat("q", "b")]},
        {"source": "s.json:6", "messages": chat("say <|im_end|>", "a")},
        {"source": "long.json:7", "messages": chat("q", "b " * 300)},
        {"source": "wiki.txt:8", "format": "text", "text": "raw <b>text</b>"},
    ]
    EncodeRun(tmp_path, tiny_tokenizer, rows, template=template, truncation_strategy="right")
    page = (tmp_path / "masks.html").read_text(encoding="utf-8")
    assert re.findall(r"<h2>(\S+:\d+)</h2>", page) == [row["source"] for row in rows if row["source"] != "zh.json:18"]
    for english, chinese in ROW_WORDS.values():
        assert english.replace('"', "&#34;") in page
        assert chinese in page
    pieces = Counter(re.findall(r'<(mark|span) class="(\w+)"', page))
    assert {("mark", kind) for kind in ("answer", "reasoning", "call", "stop", "text", "template")} <= set(pieces)
    assert {("span", kind) for kind in ("system", "user", "tool", "answer", "template", "cut")} <= set(pieces)
    shown = re.sub("<b>.*?</b>", lambda found: f"[{re.sub('<.*?>', '', found[0])}]", page)
    assert '[user 用户]你好</span><span class="template"' in shown
    assert "[reasoning 思考]because b</mark>" in shown
    assert "[answer 回答: earlier answer, here only context 之前的回答，此处只作上文]a</span>" in shown
    assert "[answer 回答: &#34;train&#34;: false, not in the loss &#34;train&#34;: false，不计入损失]a</span>" in shown
    assert "[tool result 工具结果]{&#34;t&#34;: 2}</span>" in shown
    assert "[stop token 停止符]&lt;|im_end|&gt;</mark>" in shown
    assert re.search(r"\[\d+ tokens cut off 已截去: longer than encode.max_length 超过 encode.max_length\]", shown)
    assert "[raw text 纯文本]raw &lt;b&gt;text&lt;/b&gt;</mark>" in shown
    assert "row 1 of 2" in page
    for words in (*KIND_WORDS.values(), *WHY_WORDS.values()):
        assert all(word.replace('"', "&#34;") in page for word in words)
    assert "<script" not in page


@pytest.mark.parametrize("strategy", ["left", "right"])
def test_the_pieces_of_a_row_are_its_text(tmp_path: Path, tiny_tokenizer: Path, strategy: str) -> None:
    rows = [chat("问题 q1 " * 30, "答案 a1", "q2", "a2 " * 20)]
    rows += [chat("short", "a")]
    run = EncodeRun(tmp_path, tiny_tokenizer, rows, truncation_strategy=strategy, max_length=120)
    page = (tmp_path / "masks.html").read_text(encoding="utf-8")
    texts = re.findall(r"<pre>(.*?)</pre>", page, re.DOTALL)
    plain = [re.sub("<.*?>", "", re.sub("<b>.*?</b>", "", text)).replace("&lt;", "<").replace("&gt;", ">") for text in texts]
    wanted = [run.tokenizer.decode(ids) for ids in run.train.column("input_ids").to_pylist()]
    assert [text.strip("\ufffd") for text in plain] == [text.strip("\ufffd") for text in wanted]


def test_a_call_begins_behind_the_reasoning_and_the_content(tmp_path: Path, tiny_tokenizer: Path, template: str) -> None:
    """The text before it is the template's, or the message's."""
    call = {"role": "assistant", "content": "look", "reasoning_content": "why", "tool_calls": [CALL]}
    EncodeRun(
        tmp_path,
        tiny_tokenizer,
        [{"format": "messages", "tools": [TOOL], "messages": [*chat("q"), call]}],
        template=template,
    )
    page = (tmp_path / "masks.html").read_text()
    assert '<b>written by the template <span lang="zh">模板文字</span></b>&lt;think&gt;' in page
    called = page.split('<mark class="call"')[1:]
    assert len(called) == 1
    assert "think" not in called[0].split("</mark>")[0]
