"""score: metrics, confidence intervals, baselines, the report and the judge."""

import csv
import json
import os
import random
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import jieba
import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics import BLEU, CHRF

from stages.core.params import parse_section
from stages.core.problem import Problem
from stages.score import baselines
from stages.score import judge as judge_module
from stages.score import report as report_module
from stages.score import rows as rows_module
from stages.score.baselines import find_baselines
from stages.score.calls import Call
from stages.score.intervals import RESAMPLES, Interval, mean_interval, mean_intervals
from stages.score.judge import Judge
from stages.score.metrics import METRICS, bleu_signature, is_chinese, score_answer
from stages.score.metrics import split as split_tokens
from stages.score.nearest import PromptIndex, find_pairs
from stages.score.perplexity import TextLoss, measure_perplexity
from stages.score.predictions import LISTED_LINES, Predictions, read_predictions
from stages.score.report import thin
from stages.score.score import Params, score
from stages.score.workers import run_tasks
from tests.tiny import Workspace


def test_interval_of_a_mean() -> None:
    values = [0.0, 1.0] * 200
    interval = mean_interval(values)
    assert interval is not None
    assert interval.mean == 0.5
    # For a share of one half of 400 rows, the normal approximation gives 0.5 +- 0.049.
    assert interval.low == pytest.approx(0.451, abs=0.008)
    assert interval.high == pytest.approx(0.549, abs=0.008)
    assert mean_interval(values) == interval
    assert mean_interval([0.0] * 9) == (0.0, 0.0, 0.0)


def test_rows_without_a_value_are_left_out_of_the_interval() -> None:
    assert mean_interval([0.5, None, 0.25]) == mean_interval([0.5, 0.25])
    assert mean_interval([None, None]) is None
    assert mean_interval([]) is None


def bootstrap_in_a_loop(values: list[float]) -> Interval:
    """The definition, one resample at a time."""
    data = np.asarray(values, dtype=float)
    rng = np.random.default_rng(0)
    means = np.array([data[rng.integers(0, len(data), len(data))].mean() for _ in range(2000)])
    tail = (1 - 0.95) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(float(data.mean()), float(low), float(high))


@pytest.mark.parametrize("count", [1, 2, 3, 7, 50, 129, 400, 2000])
def test_intervals_are_those_of_the_plain_loop(count: int) -> None:
    rng = np.random.default_rng(count)
    columns = {
        "shares": (rng.random(count) < 0.45).astype(float),
        "none": np.zeros(count),
        "fractions": rng.random(count),
        "differences": rng.random(count) - rng.random(count),
        "few": np.where(np.arange(count) % 3, np.nan, rng.random(count)),
        "no value": np.full(count, np.nan),
    }
    assert RESAMPLES == 2000
    found = dict(zip(columns, mean_intervals(np.stack([*columns.values()], 1)), strict=True))
    for name, values in columns.items():
        kept = values[~np.isnan(values)].tolist()
        wanted = bootstrap_in_a_loop(kept) if kept else None
        if name in ("shares", "none", "no value"):  # to the last bit, which decides the printed digit of 181 of 400
            assert found[name] == wanted
        else:
            assert found[name] == pytest.approx(wanted, rel=0, abs=1e-9)
        assert mean_interval(kept) == found[name]


def dice(a: str, b: str) -> float:
    x, y = ({text[at : at + 2] for at in range(max(1, len(text) - 1))} for text in (a, b))
    return 2 * len(x & y) / (len(x) + len(y))


@pytest.mark.parametrize("alphabet", ["ab", "abcdefgh ", "我想买三个苹果的一是", "a我😀\n"])
@pytest.mark.parametrize("size", [1, 7, 200])
def test_the_nearest_text_is_that_of_the_plain_loop(alphabet: str, size: int) -> None:
    rng = random.Random(0)

    def texts(count: int) -> list[str]:
        return ["".join(rng.choices(alphabet, k=rng.choice((0, 1, 2, 5, 9, 30)))) for _ in range(count)]

    known = texts(200)
    questions = [*texts(60), *known[:5], "", "z", "zz"]
    pairs, similarity, number = find_pairs(questions), np.zeros(len(questions)), np.full(len(questions), -1)
    for start in range(0, len(known), size):  # in several indices, as a long file is read
        found = PromptIndex(known[start : start + size]).improve(pairs, similarity)
        similarity, number = found.similarity, np.where(found.number < 0, number, found.number + start)
    for at, question in enumerate(questions):
        similarities = [dice(question, text) for text in known]
        assert similarity[at] == max(similarities)
        if similarity[at]:
            assert number[at] == similarities.index(max(similarities)), "the first of equal ones"
        else:
            assert number[at] == -1


def write_examples(path: Path, turns: list[tuple[str, str]]) -> None:
    lines = [{"messages": [{"content": prompt}, {"content": answer}]} for prompt, answer in turns]
    path.write_text("".join(json.dumps(line) + "\n" for line in [{"text": "raw text"}, *lines]))


def answers_at(path: Path, places: list[int]) -> list[str]:
    data = path.read_bytes()
    return [json.loads(data[place:].split(b"\n")[0])["messages"][1]["content"] for place in places]


@pytest.mark.parametrize(("part", "index", "group"), [(2**25, 2**22, 2**23), (50, 2**22, 2**23), (2**25, 9, 5), (1, 1, 1)])
def test_answers_of_the_baselines_wherever_the_file_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: int, index: int, group: int
) -> None:
    monkeypatch.setattr(baselines, "PART_BYTES", part)
    monkeypatch.setattr(baselines, "INDEX_CHARACTERS", index)
    monkeypatch.setattr(baselines, "QUESTION_CHARACTERS", group)
    path = tmp_path / "train.jsonl"
    turns = [
        ("two apples", "apple"),
        ("a red car", "car"),
        ("two pears", "pear"),
        ("a red car", "pear"),
        ("my bike", "apple"),
    ]
    write_examples(path, turns)
    found = find_baselines(path, iter(["red cars", "bikes", "ZZ", "two"]))
    assert found is not None
    assert answers_at(path, [found.most_frequent]) == ["apple"], "as many as pear, and earlier"
    assert answers_at(path, found.nearest.tolist()) == ["car", "apple", "apple", "pear"]
    path.write_text('{"text": "raw text"}\n')
    assert find_baselines(path, ["a"]) is None


def test_tasks_in_other_processes_give_the_same_in_the_same_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2})
    wanted = [5 * number for number in range(40)]
    assert [*run_tasks(int.__mul__, range(40), shared=5, alone=True)] == wanted
    assert [*run_tasks(int.__mul__, range(40), shared=5, alone=False)] == wanted
    with pytest.raises(Problem, match=r"a worker process was killed, .* without worker processes: taskset -c 0 dvc repro$"):
        [*run_tasks(os_exit, range(40), shared=5, alone=False)]


def os_exit(shared: int, task: int) -> None:
    os._exit(shared)


ALPHABETS = (
    "abc de fg  hi.,-1234567890 .,!?-{}[]&~`'\"@/ \n\t",
    "我想买三个苹果的一是在不了有和人这中大为上，。、：；！？“”‘’—…　（）",
    "abc我想.,1,2 -3-4 买.三，5.6。 &amp;&quot;<skipped>-\n",
    "éàüñ日本語かな한국어😀\u2001\u2028\u200b\u3000\u2a6d\u2a6e\u2f81ﾊ",
)


@pytest.mark.parametrize("alphabet", [*ALPHABETS, "".join(ALPHABETS)])
@pytest.mark.parametrize("length", [0, 1, 2, 3, 4, 9, 60, 400])
def test_metrics_are_those_of_the_libraries_to_the_last_bit(alphabet: str, length: int) -> None:
    class Tokens:
        def tokenize(self, text: str) -> list[str]:
            return list(split_tokens(text))

    class Words:
        def tokenize(self, text: str) -> list[str]:
            return [word for word in jieba.lcut(text.lower()) if split_tokens(word)]

    rng = random.Random(length)
    for _ in range(3):
        reference = "".join(rng.choices(alphabet, k=length))
        others = "".join(rng.choices(alphabet, k=length)), reference[length // 3 :] + reference[: length // 2], "", alphabet
        for answer in (reference, *others):
            found = score_answer(reference, answer, finish_reason="stop")
            rouge = RougeScorer(["rouge1", "rouge2", "rougeL"], tokenizer=Tokens()).score(reference, answer)
            bleu = BLEU(tokenize="zh" if is_chinese(reference) else "13a", effective_order=True)
            assert [found[name] for name in ("rouge_1", "rouge_2", "rouge_l", "chrf", "bleu")] == [
                *(rouge[name].fmeasure for name in ("rouge1", "rouge2", "rougeL")),
                CHRF().sentence_score(answer, [reference]).score / 100,
                bleu.sentence_score(answer, [reference]).score / 100,
            ]
            if is_chinese(reference):
                words = RougeScorer(["rougeL"], tokenizer=Words()).score(reference, answer)["rougeL"].fmeasure
                assert found["rouge_l_words"] == words


@pytest.mark.parametrize(
    ("reference", "answer", "exact", "valid", "f1"),
    [
        ('{"a":1,"b":"x"}', '{"a":1,"b":"x"}', 1, 1, 1),
        ('{"a":1,"b":"x"}', ' {"a":1,"b":"x"}\n', 1, 1, 1),
        ('{"a":1,"b":"x"}', '{"a": 1, "b": "y"}', 0, 1, 0.5),
        ('{"a":1,"b":"x"}', '{"a":1}', 0, 1, 2 / 3),
        ('{"a":1,"b":"x"}', '{"a":1', 0, 0, 0),
        ('{"a":1}', '{"a":"1"}', 0, 1, 0),
        ('{"a":1}', "", 0, 0, 0),
        ('{"a":1}', "[1]", 0, 0, 0),
        ("plain", "plain", 1, None, None),
    ],
)
def test_metrics_of_one_answer(reference: str, answer: str, exact: float, valid: float | None, f1: float | None) -> None:
    found = score_answer(reference, answer, finish_reason="stop")
    assert list(found) == list(METRICS)
    assert (found["exact_match"], found["valid_json"]) == (exact, valid)
    assert found["json_field_f1"] == (None if f1 is None else pytest.approx(f1))
    assert found["chrf"] == pytest.approx(CHRF().sentence_score(answer, [reference]).score / 100)


class Inputs:
    """The predictions and examples of the workspace, to edit and score."""

    def __init__(self, workspace: Workspace, root: Path) -> None:
        self.workspace, self.root = workspace, root
        self.rows = {
            system: [
                json.loads(line) for line in (workspace.root / f"data/predictions/{system}.jsonl").read_text().splitlines()
            ]
            for system in ("base", "merged")
        }
        self.losses: dict[str, list[dict[str, Any]]] = {"base": [], "merged": []}
        self.examples = workspace.root / "data/examples"
        self.encode: dict[str, Any] = {}
        self.train: dict[str, Any] = {}
        self.merge: dict[str, Any] = {}
        self.prompts = 2
        self.summary = ""

    def score(self, **given: Any) -> dict[str, Any]:
        for system, rows in self.rows.items():
            (self.root / f"{system}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            (self.root / f"{system}.text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in self.losses[system]))
            extra = json.loads(
                (self.workspace.root / f"data/predictions/{system}.prompts.jsonl").read_text().splitlines()[0]
            )
            lines = (json.dumps(extra | {"id": f"prompt {number}"}) + "\n" for number in range(self.prompts))
            (self.root / f"{system}.prompts.jsonl").write_text("".join(lines))
        project = self.workspace.root
        reports = self.root / "reports"
        shutil.copytree(project / "reports", reports, dirs_exist_ok=True)
        for stage, edit in (("encode", self.encode), ("train", self.train), ("merge", self.merge)):
            found = json.loads((project / f"reports/{stage}.json").read_text(encoding="utf-8"))
            (reports / f"{stage}.json").write_text(json.dumps(found | edit))
        done = score(
            Params(**{"judge_url": "", "judge_model": "m", "judge_rows": 5} | given),
            examples=self.examples,
            base_predictions=self.root / "base.jsonl",
            merged_predictions=self.root / "merged.jsonl",
            base_extra=self.root / "base.prompts.jsonl",
            merged_extra=self.root / "merged.prompts.jsonl",
            base_text=self.root / "base.text.jsonl",
            merged_text=self.root / "merged.text.jsonl",
            reports=reports,
            metrics=self.root / "score.json",
            bars=self.root / "scores.csv",
            page=self.root / "report.html",
            rows=self.root / "rows.csv",
        )
        self.summary = done.summary
        metrics: dict[str, Any] = json.loads((self.root / "score.json").read_text())
        return metrics


@pytest.fixture
def inputs(workspace: Workspace, tmp_path: Path) -> Inputs:
    return Inputs(workspace, tmp_path)


def test_metrics_of_the_run(inputs: Inputs) -> None:
    for number, row in enumerate(inputs.rows["merged"]):
        row["answer"] = row["reference"] if number % 2 else "wrong"
    metrics = inputs.score()
    assert list(metrics) == [
        "rows",
        "tokens",
        "loss_base",
        "loss",
        "merge_kl",
        "quantization_cost",
        "em_base",
        "em_most_frequent",
        "em_nearest",
        "em_merged",
    ]
    count = len(inputs.rows["merged"])
    assert metrics["em_merged"] == round(100 * (count // 2) / count, 1)
    report = json.loads((inputs.workspace.root / "reports/train.json").read_text())
    assert (metrics["rows"], metrics["tokens"]) == (report["rows"], report["tokens"])


def test_scores_for_the_plot(inputs: Inputs) -> None:
    for number, row in enumerate(inputs.rows["merged"]):
        row["answer"] = row["reference"] if number % 2 else "wrong"
    inputs.score()
    lines = list(csv.DictReader((inputs.root / "scores.csv").read_text(encoding="utf-8").splitlines()))
    assert [line["score"] for line in lines] == [
        f"{metric}: {system}"
        for system in ("base", "frequent", "nearest", "fine-tuned")
        for metric in ("exact_match", "valid_json", "json_field_f1", "chrf")
    ]
    count = len(inputs.rows["merged"])
    assert lines[12]["percent"] == f"{100 * (count // 2) / count:.2f}"
    assert b"\r" not in (inputs.root / "scores.csv").read_bytes()


def test_the_difference_of_equal_models_is_zero(inputs: Inputs, capsys: pytest.CaptureFixture[str]) -> None:
    inputs.rows["base"] = inputs.rows["merged"]
    inputs.score()
    assert "exact match, fine-tuned minus base model: 0.0 (0.0 to 0.0) points" in capsys.readouterr().out


def test_the_report_is_one_file_with_every_row_and_no_links(inputs: Inputs) -> None:
    inputs.rows["merged"][0]["answer"] = "<script>alert(1)</script>"
    inputs.score()
    page = (inputs.root / "report.html").read_text(encoding="utf-8")
    assert page.count('<section class="row"') == len(inputs.rows["merged"])
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert" in page
    for outside in ("http://", "https://", "src=", "@import", "url("):
        assert outside not in page


def test_answers_to_unknown_rows_are_reported(inputs: Inputs) -> None:
    inputs.rows["merged"][0]["id"] = "foreign"
    with pytest.raises(Problem) as caught:
        inputs.score()
    assert "merged.jsonl: 1 rows are not in " in caught.value.messages[0]
    assert "data/examples/test.jsonl, the first is foreign; " in caught.value.messages[0]
    assert "2 rows are in only one of the files, the first is " in caught.value.messages[1]
    assert all("generate the answers again: dvc repro -f -s generate" in message for message in caught.value.messages)
    assert not (inputs.root / "score.json").exists()


def test_edited_rows_are_reported(inputs: Inputs) -> None:
    inputs.rows["merged"][0]["reference"] += "!"
    with pytest.raises(Problem) as caught:
        inputs.score()
    [message] = caught.value.messages
    assert f"1 rows differ in `reference`, the first is {inputs.rows['merged'][0]['id']}" in message
    assert not (inputs.root / "score.json").exists()


def test_fewer_answers_than_test_rows_are_counted(inputs: Inputs, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = len(inputs.rows["base"]) - 2
    inputs.encode = {"test_rows": 125_000}
    for each in inputs.rows.values():
        del each[2:4]  # in both files, which then have the same ids
    inputs.rows["base"].reverse()
    inputs.score()
    count = f"{wanted} of 125,000 test rows"
    assert f"{count}, mean and 95 % interval, in percent" in capsys.readouterr().out
    assert inputs.summary.startswith(f"{count}; open ")
    page = (inputs.root / "report.html").read_text(encoding="utf-8")
    assert f"<h2>Scores on {count}, in percent" in page
    with (inputs.root / "rows.csv").open(encoding="utf-8-sig", newline="") as file:
        table = list(csv.DictReader(file))
    assert [(row["id"], row["reference"], row["fine_tuned"].removeprefix("'")) for row in table] == [
        (row["id"], row["reference"], row["answer"].removeprefix("'")) for row in inputs.rows["merged"]
    ]
    for row in table:
        assert float(row["fine_tuned_exact_match"]) == (row["fine_tuned"].strip() == row["reference"].strip())
        chrf = score_answer(row["reference"], row["base"].removeprefix("'"), finish_reason="stop")["chrf"]
        assert float(row["base_chrf"]) == pytest.approx(chrf, abs=1e-3)
        assert row["base_call_exact"] == ""


def test_any_text_is_one_cell_of_the_table_and_no_formula(inputs: Inputs) -> None:
    texts = ["a\rb", "c\r", 'd"\r\n"e', "f,\ng", "", "é 😀", *(f"{start}1" for start in "=+-@\t\r"), "1=1", "'=1"]
    assert len(texts) <= len(inputs.rows["merged"])
    for row, text in zip(inputs.rows["merged"], texts, strict=False):
        row["answer"] = text
    inputs.score()
    with (inputs.root / "rows.csv").open(encoding="utf-8-sig", newline="") as file:
        table = list(csv.DictReader(file))
    assert len(table) == len(inputs.rows["merged"])
    found = [row["fine_tuned"] for row in table]
    assert found[: len(texts)] == [f"'{text}" if text[:1] in {*"=+-@\t\r"} else text for text in texts]
    assert b"\r" not in re.sub(rb'"(?:[^"]|"")*"', b"", (inputs.root / "rows.csv").read_bytes())
    assert '<pre dir="auto">d&#34;' in (inputs.root / "report.html").read_text(encoding="utf-8")


def test_a_text_of_which_a_part_was_read_is_counted(inputs: Inputs, tmp_path: Path) -> None:
    inputs.rows = {"base": [], "merged": []}
    inputs.losses = dict.fromkeys(("base", "merged"), losses([("a", 10, 20.0), ("b", 5, 9.0)]))
    inputs.encode = {"test_rows": 0, "test_text_windows": 9}
    inputs.examples = tmp_path / "examples"
    inputs.examples.mkdir()
    lines = (json.dumps({"id": name, "source": "a.txt", "format": "text", "text": "once"}) + "\n" for name in "abcdefg")
    (inputs.examples / "test.jsonl").write_text("".join(lines))
    (inputs.examples / "train.jsonl").write_text("\n")
    inputs.score()
    assert inputs.summary.startswith("2 of 7 raw texts; open ")
    assert "in 2 of 7 raw texts of the test split" in (inputs.root / "report.html").read_text(encoding="utf-8")


def test_the_report_says_how_many_validation_rows_were_used(inputs: Inputs) -> None:
    inputs.train = {"eval_rows": 1000, "validation_rows": 25_549}
    inputs.score()
    page = (inputs.root / "report.html").read_text(encoding="utf-8")
    assert "after, on 1,000 of 25,549 validation rows.</p>" in page


def test_numbers_of_rows_fit_the_chart(inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_module, "_read_histogram", lambda _: [(128.0, 15_200.0), (256.0, 31.0)])
    inputs.score()
    page = (inputs.root / "report.html").read_text(encoding="utf-8")
    assert ">15.2k</text>" in page
    assert ">7.6k</text>" in page


def test_processes_give_the_same_files_as_one(inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for least in (10_000, 1):
        monkeypatch.setattr(rows_module, "MIN_ROWS", least)
        monkeypatch.setattr(rows_module, "CHUNK_ROWS", 3)
        monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
        inputs.score()
        names = ("score.json", "scores.csv", "rows.csv", "report.html")
        found.append([(inputs.root / name).read_bytes() for name in names])
    assert found[0] == found[1]


def test_the_report_of_many_rows_stays_small(inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    count = len(inputs.rows["merged"])
    monkeypatch.setattr(report_module, "MAX_ROWS", count - 1)
    monkeypatch.setattr(report_module, "SHOWN", {"worst": 2, "best": 1, "random": 3})
    monkeypatch.setattr(report_module, "SHOWN_PROMPTS", 1)
    monkeypatch.setattr(report_module, "MAX_TEXT_BYTES", 2000)
    inputs.prompts = 3000
    right, wrong = inputs.rows["merged"][4], inputs.rows["merged"][5]
    for row in inputs.rows["merged"]:
        row["answer"] = row["reference"][:-1] + "&" * 1000
    right["answer"], wrong["answer"] = right["reference"], ""
    inputs.score()
    page = (inputs.root / "report.html").read_text(encoding="utf-8")
    kinds = re.findall('<section class="row" data-kind="(.*)">', page)
    assert kinds[0] == "worst wrong"
    assert kinds[-1] == "best right"
    assert sorted(kinds) == ["best right", *["random wrong"] * 3, *["worst wrong"] * 2]
    assert f"The 2 worst, 1 best and 3 random rows of {count}, by exact match and chrF of the fine-tuned model." in page
    root = inputs.root
    assert f"All rows with their scores are in {root}/rows.csv, where a text that begins with = + - @, a tab" in page
    assert f"as a formula; whole answers in {root}/base.jsonl and {root}/merged.jsonl." in page
    extra = f"{root}/base.prompts.jsonl and {root}/merged.prompts.jsonl"
    assert f"The first 1 of 3,000; all answers are in {extra}." in page
    assert page.count('<section class="extra row">') == 1
    assert "more characters</span></pre>" in page
    assert len("".join(re.findall("&amp;", page))) < 2000


def test_a_line_with_many_points_is_drawn_by_few() -> None:
    points = [(float(step), 1 / (1 + step) + (step == 777)) for step in range(100_000)]
    drawn = thin([*points, (100_000.0, float("nan"))])
    assert len(drawn) <= 800
    assert drawn == sorted(set(drawn))
    assert {points[0], points[777], points[-1]} <= set(drawn)
    assert thin(points[:500]) == points[:500]


def test_chinese_is_scored_by_characters_and_by_words() -> None:
    same = score_answer("我想买三个苹果", "我想买三个苹果", finish_reason="stop")
    assert [same[name] for name in ("rouge_1", "rouge_2", "rouge_l", "rouge_l_words", "bleu")] == pytest.approx([1] * 5)
    near = score_answer("我想买三个苹果", "我要买三个苹果", finish_reason="length")
    assert near["rouge_1"] == pytest.approx(6 / 7)
    assert near["rouge_2"] == pytest.approx(4 / 6)
    assert near["rouge_l"] == pytest.approx(6 / 7)
    assert near["stopped"] == 0
    # 我 / 想 / 买 / 三个 / 苹果 and 我要 / 买 / 三个 / 苹果 have three words in common.
    assert near["rouge_l_words"] == pytest.approx(2 * 3 / (5 + 4))
    assert score_answer("three apples", "three pears", finish_reason="stop")["rouge_l_words"] is None
    assert score_answer("three apples", "three pears", finish_reason="stop")["rouge_1"] == pytest.approx(0.5)


def test_an_empty_answer_scores_zero_and_is_counted() -> None:
    found = score_answer('{"a":1}', " ", finish_reason="stop")
    assert found["empty"] == 1
    better = ("exact_match", "valid_json", "json_field_f1", "chrf", "bleu", "rouge_1", "rouge_2", "rouge_l", "distinct_2")
    assert all(found[name] == 0 for name in better)
    assert score_answer("a", "b", finish_reason=None)["stopped"] is None


def test_repetition_and_distinct_2() -> None:
    loop = score_answer("x", "a b c d a b c d a b c d", finish_reason="length")
    assert loop["repetition"] == pytest.approx(1 - 4 / 9)
    assert loop["distinct_2"] == pytest.approx(4 / 11)
    assert score_answer("x", "one two three four five", finish_reason="stop")["repetition"] == 0


def test_bleu_is_that_of_sacrebleu_and_has_its_signature() -> None:
    wanted = BLEU(tokenize="zh", effective_order=True).sentence_score("我要买三个苹果", ["我想买三个苹果"]).score / 100
    assert score_answer("我想买三个苹果", "我要买三个苹果", finish_reason="stop")["bleu"] == pytest.approx(wanted)
    assert "tok:zh" in bleu_signature(chinese=True)
    assert "tok:13a" in bleu_signature(chinese=False)


def test_the_report_has_groups_extra_prompts_and_both_base_weights(inputs: Inputs) -> None:
    inputs.score()
    page = (inputs.root / "report.html").read_text(encoding="utf-8")
    for text in (
        "<td>Chinese</td>",
        "<td>zh.json</td>",
        "<td>en.json</td>",
        "帮我取一个很独特的网名",
        "<h2>Extra prompts</h2>",
        '<th class="n">merge.base: dequantized</th><th class="n">merge.base: full</th>',
        "the last column is what merging into the full ones would give",
    ):
        assert text in page, text
    assert "tok:zh" in page


COST = {
    "full_base_loss": 2.1,
    "quantized_base_loss": 2.2,
    "cost": 0.1,
    "standard_error": 0.02,
    "interval": [0.06, 0.14],
}


@pytest.mark.parametrize(
    ("cost", "texts"),
    [
        (
            COST,
            [
                "95 % interval 0.0600 to 0.1400",
                "Training lowered the loss by 1.5000, 15.0 times as much.",
                "int8 takes twice",
            ],
        ),
        (COST | {"interval": [-0.01, 0.2]}, ["on these rows no cost of nf4 can be told from chance."]),
        (COST | {"standard_error": None, "interval": None}, ["One row has no interval."]),
        ({"cost": None, "not_measured": "too large"}, ["<p>Not measured: too large</p>"]),
        (None, []),
    ],
    ids=["large", "small", "one row", "not measured", "not quantized"],
)
def test_the_report_says_what_quantizing_the_base_costs(
    inputs: Inputs, cost: dict[str, Any] | None, texts: list[str]
) -> None:
    inputs.merge = {"quantization_cost": cost, "gain": 1.5}
    metrics = inputs.score()
    assert metrics.get("quantization_cost") == (cost["cost"] if cost else None)
    page = (inputs.root / "report.html").read_text(encoding="utf-8")
    assert ("<h2>What quantizing the base costs</h2>" in page) == (cost is not None)
    for text in texts:
        assert text in page, text


def test_the_report_says_how_much_of_the_training_rounding_keeps(inputs: Inputs) -> None:
    for share, said in ((0.31, True), (0.99, False)):
        inputs.merge = {"delta_kept": {"share": share, "smallest": 0.1, "dtype": "bfloat16"}}
        inputs.score()
        page = (inputs.root / "report.html").read_text(encoding="utf-8")
        assert f"Rounding keeps {100 * share:.1f} % of the delta weights (10.0 % in the layer that loses most)" in page
        assert ("the training changed the weights by less than a step of bfloat16" in page) == said


# Damaged files


class Files:
    """Six small files of `generate` to damage."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.names = ("base.jsonl", "merged.jsonl", "base.prompts.jsonl", "merged.prompts.jsonl")
        self.text_names = ("base.text.jsonl", "merged.text.jsonl")
        for name in self.text_names:
            (root / name).write_text('{"id": "a.1", "tokens": 3, "loss": 4.5}\n{"id": "a.2", "tokens": 2, "loss": 1}\n')
        row = {"prompt": "p", "reference": "r", "answer": "a", "finish_reason": "stop", "prompt_tokens": 1}
        for name in self.names:
            (root / name).write_text("".join(json.dumps({"id": f"row {n}"} | row) + "\n" for n in range(8)))
        examples = [
            {"id": f"row {n}", "source": "zh.json:1", "messages": [{"content": "q"}, {"content": "a"}]} for n in range(8)
        ]
        (root / "test.jsonl").write_text("".join(json.dumps(example) + "\n" for example in examples))

    def edit(self, name: str, change: Callable[[bytes], bytes]) -> None:
        (self.root / name).write_bytes(change((self.root / name).read_bytes()))

    def read(self) -> Predictions:
        base, merged, base_extra, merged_extra = (self.root / name for name in self.names)
        base_text, merged_text = (self.root / name for name in self.text_names)
        return read_predictions(
            {"base": base, "merged": merged},
            {"base": base_extra, "merged": merged_extra},
            {"base": base_text, "merged": merged_text},
            test_examples=self.root / "test.jsonl",
            test_rows=8,
        )

    def messages(self) -> list[str]:
        """The problems, without the folder and without the remedy, which all of them have."""
        with pytest.raises(Problem) as caught:
            self.read()
        found = [
            message.replace(f"{self.root}/", "").partition("; generate the answers again: ")
            for message in caught.value.messages
        ]
        assert all(remedy.startswith("dvc repro -f -s generate") for _, _, remedy in found)
        return [message for message, _, _ in found]


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def replace_line(number: int, line: bytes) -> Callable[[bytes], bytes]:
    """Replaces a line, counted from 1."""
    return lambda data: b"\n".join(line if at == number else old for at, old in enumerate(data.split(b"\n"), 1))


def test_good_files_are_read(files: Files) -> None:
    found = files.read()
    assert [row.merged.id for row in found.rows] == [f"row {n}" for n in range(8)]
    assert {(row.source, row.question, row.reference.answer, row.base.answer) for row in found.rows} == {
        ("zh.json:1", "q", "r", "a")
    }
    assert [row.loss for row in found.text_losses["merged"]] == [4.5, 1]
    assert len(found.extra) == 8
    for name in (*files.names[2:], *files.text_names):
        files.edit(name, lambda _: b"")  # data/prompts.json may have no prompts, and the data no raw text
    assert files.read().extra == []
    assert files.read().text_losses == {"base": [], "merged": []}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda _: b"", "merged.jsonl: empty, wanted 8 rows"),
        (
            lambda data: data[:-30],
            "merged.jsonl: line 8: not valid JSON (cut off: the file does not end with a line break)",
        ),
        (replace_line(3, b"{'id': 1}"), "merged.jsonl: line 3: not valid JSON"),
        (replace_line(3, b'{"id": "\xff"}'), "merged.jsonl: line 3: not valid JSON"),
        (replace_line(3, b"[" * 100_000), "merged.jsonl: line 3: not valid JSON"),
        (replace_line(3, b'["row 2"]'), "merged.jsonl: line 3: not a JSON object"),
        (
            replace_line(3, b'{"id": "row 2", "prompt": "p", "reference": "r"}'),
            "merged.jsonl: line 3: lacks answer, finish_reason",
        ),
        (
            lambda data: data.replace(b'"row 2"', b"2").replace(b'{"id": 2, "prompt": "p"', b'{"id": 2, "prompt": null'),
            "merged.jsonl: line 3: wanted text in id, prompt, found 2, null",
        ),
        (
            lambda data: data.replace(b'"row 2", "prompt": "p"', b'"row 2", "prompt": "\\ud83d\\ude00 \\uDe00"'),
            "merged.jsonl: line 3: has a lone surrogate, which is no character, in prompt",
        ),
        (
            lambda data: data.replace(b'"row 2"', b'"row 1"'),
            "merged.jsonl: line 3: the id row 1 is in an earlier line too",
        ),
    ],
)
def test_a_damaged_file_is_one_sentence_with_the_line(files: Files, change: Callable[[bytes], bytes], message: str) -> None:
    files.edit("merged.jsonl", change)
    assert files.messages() == [message]


def test_all_damaged_files_are_reported_together(files: Files) -> None:
    files.edit("base.jsonl", lambda data: replace_line(2, b"?")(replace_line(5, b"{}")(data)))
    files.edit("merged.jsonl", lambda _: b"no JSON\n" * 8)
    files.edit("merged.prompts.jsonl", lambda data: data[:-1] + b"{")
    assert files.messages() == [
        "base.jsonl: line 2: not valid JSON",
        "base.jsonl: line 5: lacks id, prompt, reference, answer, finish_reason",
        *(f"merged.jsonl: line {number}: not valid JSON" for number in range(1, LISTED_LINES + 1)),
        f"merged.jsonl: {8 - LISTED_LINES} more lines are damaged",
        "merged.prompts.jsonl: line 8: not valid JSON (cut off: the file does not end with a line break)",
    ]


def test_extra_answers_to_other_prompts_are_reported_with_the_rest(files: Files) -> None:
    files.edit("base.jsonl", lambda data: data.partition(b"\n")[2])
    files.edit("base.prompts.jsonl", lambda data: data.replace(b"row 7", b"row 9"))
    assert files.messages() == [
        "base.jsonl and merged.jsonl: 1 rows are in only one of the files, the first is row 0",
        "base.prompts.jsonl and merged.prompts.jsonl: 2 rows are in only one of the files, the first is row 7",
    ]


def test_a_whole_character_outside_the_bmp_is_read(files: Files) -> None:
    files.edit("merged.jsonl", lambda data: data.replace(b'"answer": "a"', b'"answer": "\\ud83d\\ude00"'))
    assert {row.merged.answer for row in files.read().rows} == {"😀"}


def test_a_damaged_file_writes_no_report(inputs: Inputs) -> None:
    del inputs.rows["merged"][0]["answer"]
    with pytest.raises(Problem, match=r"merged\.jsonl: line 1: lacks answer; generate the answers again"):
        inputs.score()
    assert not (inputs.root / "report.html").exists()


# Parameters


def test_wrong_and_removed_parameters() -> None:
    given = {"judge_url": "localhost:8000", "judge_model": "", "judge_rows": 0, "bootstrap_resamples": 2000}
    with pytest.raises(Problem) as caught:
        parse_section("score", Params, given)
    assert len(caught.value.messages) == 3
    assert "params.yaml: score.judge_url: " in caught.value.messages[0]
    assert "found 'localhost:8000'" in caught.value.messages[0]
    assert "params.yaml: score.judge_rows: Input should be greater than 0; found 0" in caught.value.messages
    removed = "removed; delete this line, the intervals always use 2000 resamples"
    assert f"params.yaml: score.bootstrap_resamples: {removed}" in caught.value.messages


# The judge


class Endpoint:
    """A local server that prefers the longer answer, prefers A if both have the same length, and records the requests."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.fail: list[int] = []
        self.reply: str | None = None
        self.broken = False
        self.empty = False
        self.refuses: tuple[str, ...] = ()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append(body)
                outer.keys.append(self.headers.get("Authorization"))
                refused = [name for name in outer.refuses if name in body]
                if refused:
                    self.send_response(400)
                    self.end_headers()
                    hint = "max_completion_tokens" if refused[0] == "max_tokens" else "the default"
                    self.wfile.write(f"Unsupported: {refused[0]}; use {hint}".encode())
                    return
                if outer.fail:
                    self.send_response(outer.fail.pop())
                    self.end_headers()
                    self.wfile.write(b"not now")
                    return
                text = body["messages"][0]["content"]
                a, _, b = text.partition("[Answer A]")[2].partition("[Answer B]")
                a, b = a.strip(), b.partition("Reply with one word")[0].strip()
                verdict = None if outer.empty else outer.reply or ("B" if len(b) > len(a) else "A")
                self.send_response(200)
                self.end_headers()
                self.wfile.write(
                    b"{}" if outer.broken else json.dumps({"choices": [{"message": {"content": verdict}}]}).encode()
                )

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1/"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def endpoint(scratch: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    monkeypatch.setattr("stages.score.judge.FIRST_WAIT_S", 0.0)
    found = Endpoint()
    yield found
    found.server.shutdown()
    found.server.server_close()


def test_a_judge_sees_both_orders_and_its_verdicts_are_cached(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    judge = Judge(endpoint.url, "m")
    assert judge.compare("q", "r", base="short", fine_tuned="much longer") == 1
    assert judge.compare("q", "r", base="much longer", fine_tuned="short") == 0
    assert judge.compare("q", "r", base="abcd", fine_tuned="wxyz") == 0.5, "A in both orders: it prefers a position"
    assert judge.compare("q", "r", base="same", fine_tuned="same") == 0.5
    assert len(endpoint.requests) == 4, "the second pair is the first one in the other order, and was cached"
    assert endpoint.requests[0]["model"] == "m"
    monkeypatch.setenv("JUDGE_API_KEY", "secret")
    Judge(endpoint.url, "other").compare("q", "r", base="short", fine_tuned="much longer")
    assert endpoint.keys[-1] == "Bearer secret"
    assert endpoint.keys[0] is None


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("B", "B"),
        ("**A**", "A"),
        ("b.", "B"),
        ("A: it is right", "A"),
        ("TIE", "TIE"),
        ("Answer A", "A"),
        ("The better answer is **B**.", "B"),
        ("<think>A is short. B</think>\n\nA", "A"),
        ("Both are right, but one is short.\n\nVerdict: B", "B"),
        ("<think>A or B", None),
        ("", None),
        ("hm", None),
        ("A better one would be B", None),
    ],
)
def test_the_verdict_in_a_reply(reply: str, verdict: str | None) -> None:
    assert judge_module._verdict(reply) == verdict


def test_a_busy_judge_is_asked_again_and_an_error_is_one_message(endpoint: Endpoint) -> None:
    endpoint.fail = [503, 429]
    assert Judge(endpoint.url, "m").compare("q", "r", base="short", fine_tuned="much longer") == 1
    endpoint.fail = [401]
    with pytest.raises(
        Problem, match=r"^params\.yaml: score\.judge_url: http.*/v1: status 401: not now\. All verdicts so far are kept"
    ):
        Judge(endpoint.url, "m").compare("other", "r", base="short", fine_tuned="much longer")
    with pytest.raises(Problem, match=r"Connection refused"):
        Judge("http://127.0.0.1:9/v1", "m").compare("q", "r", base="a", fine_tuned="bc")
    with pytest.raises(Problem, match=r"nonnumeric port"):
        Judge("http://127.0.0.1:port/v1", "m").compare("q", "r", base="a", fine_tuned="bc")
    endpoint.broken = True
    with pytest.raises(Problem, match=r"the reply is not a chat completion"):
        Judge(endpoint.url, "m").compare("third", "r", base="a", fine_tuned="bc")


def test_the_report_has_the_result_of_the_judge(inputs: Inputs, endpoint: Endpoint) -> None:
    inputs.score(judge_url=endpoint.url, judge_model="the judge")
    page = (inputs.root / "report.html").read_text(encoding="utf-8")
    assert "the judge judged 5 rows, each in both orders" in page
    assert len(endpoint.requests) <= 10


# Thinking, tool calls and raw text


def test_thinking_is_shown_and_not_scored(inputs: Inputs) -> None:
    for system, rows in inputs.rows.items():
        for number, row in enumerate(rows):
            answer = row["reference"]
            row["reference"] = f"<think>\nwhy {number}\n</think>\n\n{answer}"
            row["answer"] = f"<think>other</think>{answer}" if system == "merged" else f"<think>{answer}"
    inputs.rows["merged"][0]["answer"] = "plain"
    metrics = inputs.score()
    count = len(inputs.rows["merged"])
    assert metrics["em_merged"] == round(100 * (count - 1) / count, 1)
    assert metrics["em_base"] == 0
    page = (inputs.root / "report.html").read_text(encoding="utf-8")
    share = f"{100 * (count - 1) / count:.1f} % of the fine-tuned model&#39;s"
    assert "before 100.0 % of the reference answers, 100.0 % of the base" in page
    assert share.replace("&#39;", "'") in page
    assert page.count("<summary>thinking, which never ends</summary><") == page.count("<details") - 2 * count + 1 == count
    assert '<pre dir="auto">why 1</pre></details>' in page
    assert "<td>thinking cut" in page
    assert "thinking" not in (inputs.root / "scores.csv").read_text()


def test_a_run_without_thinking_or_tools_says_nothing_of_them(inputs: Inputs) -> None:
    inputs.score()
    page = (inputs.root / "report.html").read_text(encoding="utf-8")
    for text in ("<td>thinking", "Thinking stands", "<td>call", "Tool calls", "<details", "erplexity"):
        assert text not in page, text


def call(name: str, **arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def hermes(*calls: dict[str, Any]) -> str:
    return "\n".join(f"<tool_call>\n{json.dumps(each['function'])}\n</tool_call>" for each in calls)


class ToolInputs(Inputs):
    """Test rows with tools: two whose references call, one that does not, and one whose call its text does not show."""

    def __init__(self, workspace: Workspace, root: Path) -> None:
        super().__init__(workspace, root)
        self.examples = root / "examples"
        self.examples.mkdir()
        self.encode = {"test_rows": 4}
        one, other = call("find", city="Köln", nights=2), call("find", city="上海", nights=1)
        references = [hermes(one), hermes(other, one), "No rooms.", "I look."]
        calls = [[one], [other, one], [], [one]]
        tools = [{"type": "function", "function": {"name": "find"}}]
        question = {"role": "user", "content": "A room?"}
        answers = [{"role": "assistant", "content": "", "tool_calls": each} if each else None for each in calls]
        answers[2] = {"role": "assistant", "content": "No rooms."}
        lines = [
            {"id": f"{n}", "source": f"t.json:{n}", "tools": tools, "messages": [question, answer]}
            for n, answer in enumerate(answers)
        ]
        (self.examples / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (self.examples / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[:1]))

        def rows(answers: list[str]) -> list[dict[str, Any]]:
            return [
                {"id": str(n), "prompt": "p", "reference": reference, "answer": answer, "finish_reason": "stop"}
                for n, (reference, answer) in enumerate(zip(references, answers, strict=True))
            ]

        spaced = '<tool_call>{"arguments":{"nights":2,"city":"Köln"},"name":"find"}</tool_call>'
        self.rows = {
            "merged": rows([spaced, hermes(one, other), "No.", hermes(one)]),
            "base": rows([hermes(call("find", city="Köln", nights=3)), "I cannot.", hermes(one), "x"]),
        }


def test_tool_calls_are_scored_by_name_and_arguments(workspace: Workspace, tmp_path: Path) -> None:
    inputs = ToolInputs(workspace, tmp_path)
    metrics = inputs.score()
    assert (metrics["calls_base"], metrics["calls_merged"]) == (0.0, 100.0)
    page = (inputs.root / "report.html").read_text(encoding="utf-8")
    assert "Tool calls are not scored in 1 rows with tools" in page
    bars = dict(line.rsplit(",", 1) for line in (inputs.root / "scores.csv").read_text(encoding="utf-8").splitlines())
    assert bars["call_exact: fine-tuned"] == "100.00"
    assert bars["call_arguments_f1: base"] == "25.00", "half of the arguments in the first row, none in the second"
    assert bars["call_exact: nearest"] == bars["call_exact: frequent"] == "50.00", "the one training answer is a call too"
    assert bars["exact_match: nearest"] == "50.00", "rows 1 and 4 have its very call, though it knows no template"


def test_whether_a_tool_is_called_counts_in_rows_without_a_call_too(workspace: Workspace, tmp_path: Path) -> None:
    from stages.score.metrics import score_answer

    def decision(wanted: list[Call], found: list[Call]) -> float | None:
        return score_answer("r", "a", finish_reason="stop", calls=(wanted, found))["call_decision"]

    one = Call("f", {})
    assert [decision([], []), decision([], [one]), decision([one], []), decision([one], [one])] == [1, 0, 0, 1]
    assert score_answer("r", "a", finish_reason="stop", calls=([], [one]))["call_exact"] is None
    assert score_answer("r", "a", finish_reason="stop")["call_decision"] is None


def test_a_row_is_found_by_the_number_of_its_answer(files: Files) -> None:
    turns = [{"role": role, "content": f"{role} {n}"} for n in (1, 2) for role in ("user", "assistant")]
    example = {"id": "row 7", "source": "a.json:3", "messages": turns}
    lines = (files.root / "test.jsonl").read_text().splitlines()
    (files.root / "test.jsonl").write_text("\n".join([*lines[:7], json.dumps(example)]) + "\n")
    for name in files.names[:2]:
        files.edit(name, lambda data: data.replace(b'"row 7"', b'"row 7.1"'))
    row = files.read().rows[-1]
    assert (row.question, row.message, row.source) == ("user 1", turns[1], "a.json:3")
    for name in files.names[:2]:
        files.edit(name, lambda data: data.replace(b'"row 7.1"', b'"row 7.3"'))
    assert [message.partition(" rows are not in ")[0] for message in files.messages()] == [
        "base.jsonl: 1",
        "merged.jsonl: 1",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replace_line(1, b'{"id": "a.1", "tokens": 3}'), "merged.text.jsonl: line 1: lacks loss"),
        (
            replace_line(1, b'{"id": "a.1", "tokens": 3, "loss": NaN}'),
            "merged.text.jsonl: line 1: wanted a text in id, and numbers in tokens and loss",
        ),
        (
            replace_line(1, b'{"id": "a.1", "tokens": 4, "loss": 4.5}'),
            "base.text.jsonl and merged.text.jsonl: 1 windows of raw text differ, the first is a.1",
        ),
        (lambda _: b"", "base.text.jsonl and merged.text.jsonl: 2 windows of raw text differ, the first is a.1"),
    ],
)
def test_damaged_losses_on_raw_text_are_reported(files: Files, change: Callable[[bytes], bytes], message: str) -> None:
    files.edit("merged.text.jsonl", change)
    assert files.messages() == [message]


def losses(values: list[tuple[str, int, float]]) -> list[dict[str, Any]]:
    return [{"id": id, "tokens": tokens, "loss": loss} for id, tokens, loss in values]


def test_perplexity_is_per_token_and_resamples_documents() -> None:
    rng = np.random.default_rng(0)
    windows = [(f"d{n}.{part}", int(rng.integers(1, 50))) for n in range(12) for part in (1, 2)] + [("lone", 7), ("none", 0)]
    base = [TextLoss(id, tokens, tokens * float(rng.random() + 2)) for id, tokens in windows]
    merged = [TextLoss(row.id, row.tokens, 0.9 * row.loss) for row in base]
    found = measure_perplexity({"base": base, "merged": merged})
    assert found is not None
    total = sum(row.tokens for row in base)
    assert (found.documents, found.tokens) == (13, total)
    assert found.base.mean == pytest.approx(np.exp(sum(row.loss for row in base) / total))
    assert found.merged.mean == pytest.approx(found.base.mean**0.9)
    assert found.difference.mean == pytest.approx(found.merged.mean - found.base.mean)
    assert found.base.low < found.base.mean < found.base.high
    # The definition, one resample at a time.
    by_document = [
        [row for row in base if row.document == name] for name in dict.fromkeys(row.document for row in base[:-1])
    ]
    rng = np.random.default_rng(0)
    perplexities = []
    for _ in range(2000):
        rows = [row for at in rng.integers(0, 13, 13) for row in by_document[at]]
        perplexities.append(np.exp(sum(row.loss for row in rows) / sum(row.tokens for row in rows)))
    assert tuple(found.base[1:]) == pytest.approx(np.quantile(perplexities, [0.025, 0.975]))
    assert measure_perplexity({"base": base, "merged": base}).difference == (0, 0, 0)  # type: ignore[union-attr]
    assert measure_perplexity({"base": [], "merged": []}) is None


def test_raw_text_adds_its_perplexity_to_the_report_and_the_plot(inputs: Inputs, capsys: pytest.CaptureFixture[str]) -> None:
    inputs.losses = {
        "base": losses([("a.1", 10, 20.0), ("a.2", 10, 20.0)]),
        "merged": losses([("a.1", 10, 10.0), ("a.2", 10, 10.0)]),
    }
    metrics = inputs.score()
    assert (metrics["perplexity_base"], metrics["perplexity"]) == (7.389, 2.718)
    assert list(metrics)[-2:] == ["perplexity_base", "perplexity"]
    assert "em_merged" in metrics
    lines = (inputs.root / "scores.csv").read_text().splitlines()
    assert lines[-2:] == ["perplexity relative to base: base,100.00", "perplexity relative to base: fine-tuned,36.79"]
    assert "<h2>Perplexity on raw text</h2>" in (inputs.root / "report.html").read_text(encoding="utf-8")
    printed = " ".join(capsys.readouterr().out.split())
    assert "perplexity per token on 1 raw texts: base model 7.389 (7.389 to 7.389), fine-tuned model 2.718" in printed


def test_a_project_of_raw_text_alone_is_scored(inputs: Inputs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inputs.rows = {"base": [], "merged": []}
    inputs.losses = {"base": losses([("a", 10, 20.0), ("b", 5, 9.0)]), "merged": losses([("a", 10, 10.0), ("b", 5, 9.0)])}
    inputs.encode = {"test_rows": 0}
    inputs.examples = tmp_path / "examples"
    inputs.examples.mkdir()
    for split in ("train", "test"):
        line = json.dumps({"id": "a", "source": "a.txt", "format": "text", "text": "once"})
        (inputs.examples / f"{split}.jsonl").write_text(line + "\n")
    metrics = inputs.score(judge_url="http://127.0.0.1:9/v1")
    assert [name for name in metrics if name.startswith(("em_", "calls_"))] == []
    assert metrics["perplexity"] == 3.549
    page = (inputs.root / "report.html").read_text(encoding="utf-8")
    for text in ("test rows", "side by side", "BLEU", "<script>", "None"):
        assert text not in page, text
    assert "in 2 raw texts of the test split" in page
    assert len((inputs.root / "scores.csv").read_text().splitlines()) == 3
    printed = capsys.readouterr().out
    assert "test rows" not in printed
    assert "exact match" not in printed


def test_a_judge_without_a_verdict_is_no_tie(inputs: Inputs, endpoint: Endpoint) -> None:
    endpoint.reply = "<think>A or B, that is the question"
    with pytest.raises(Problem) as caught:
        inputs.score(judge_url=endpoint.url)
    assert caught.value.messages == (
        "params.yaml: score.judge_model: 'm' gave no verdict on 5 of 5 rows, wanted at most 10%; the first such reply is "
        "'<think>A or B, that is the question', wanted A, B or TIE. Name a model that follows the question",
    )
    endpoint.reply = "<think>It is longer.</think>B"
    inputs.score(judge_url=endpoint.url)  # nothing unreadable was cached
    endpoint.reply = None
    judge = Judge(endpoint.url, "m2")
    endpoint.empty = True
    assert judge.compare("q", "r", base="short", fine_tuned="much longer") is None
    endpoint.empty = False
    assert judge.compare("q", "r", base="short", fine_tuned="much longer") == 1


def test_a_judge_that_refuses_the_usual_settings_is_asked_with_others(endpoint: Endpoint) -> None:
    endpoint.refuses = ("max_tokens", "temperature")
    judge = Judge(endpoint.url, "m")
    assert judge.compare("q", "r", base="short", fine_tuned="much longer") == 1
    assert endpoint.requests[-1].keys() == {"model", "messages", "max_completion_tokens"}
    assert len(endpoint.requests) == 4, "two refusals, which are remembered"


def test_the_judge_reads_what_stands_behind_the_thinking(inputs: Inputs, endpoint: Endpoint) -> None:
    for rows in inputs.rows.values():
        for row in rows:
            row["answer"] = f"<think>secret</think>{row['answer']}"
            row["reference"] = f"<think>secret</think>{row['reference']}"
    inputs.score(judge_url=endpoint.url)
    assert endpoint.requests
    assert not [body for body in endpoint.requests if "secret" in body["messages"][0]["content"]]
