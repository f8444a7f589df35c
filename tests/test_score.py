"""score: each figure is what it says, has an interval, and stands beside the baselines."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sacrebleu.metrics import CHRF

from stages.core.problem import Problem
from stages.score import judge as judge_module
from stages.score.intervals import bootstrap
from stages.score.judge import Judge
from stages.score.metrics import METRICS, bleu_signature, score_answer
from stages.score.nearest import NearestPrompt
from stages.score.score import Params, score
from tests.tiny import Workspace


def test_the_interval_of_a_mean() -> None:
    values = [0.0, 1.0] * 200
    mean, low, high = bootstrap(values, 2000)
    assert mean == 0.5
    # For a share of one half among 400, the normal approximation gives 0.5 +- 0.049.
    assert low == pytest.approx(0.451, abs=0.008)
    assert high == pytest.approx(0.549, abs=0.008)
    assert bootstrap(values, 2000) == (mean, low, high)
    assert bootstrap([0.0] * 9, 100) == (0.0, 0.0, 0.0)


def test_the_nearest_prompt_by_shared_pairs_of_characters() -> None:
    known = ["abcd", "abxy", "中文很好", "z", ""]
    nearest = NearestPrompt(known)
    assert [known[nearest.find(text)] for text in ("abcx", "xabx", "中文", "z")] == ["abcd", "abxy", "中文很好", "z"]
    assert NearestPrompt(["same", "same"]).find("same") == 0
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abc"), 6)) for _ in range(50)]
    nearest = NearestPrompt(words)

    def dice(a: str, b: str) -> float:
        x, y = ({text[i : i + 2] for i in range(5)} for text in (a, b))
        return 2 * len(x & y) / (len(x) + len(y))

    for text in words[:10]:
        asked = text[::-1]
        assert dice(asked, words[nearest.find(asked)]) == max(dice(asked, word) for word in words)


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
def test_one_answer(reference: str, answer: str, exact: float, valid: float | None, f1: float | None) -> None:
    found = score_answer(reference, answer, "stop")
    assert list(found) == list(METRICS)
    assert (found["exact_match"], found["valid_json"]) == (exact, valid)
    assert found["json_field_f1"] == (None if f1 is None else pytest.approx(f1))
    assert found["chrf"] == pytest.approx(CHRF().sentence_score(answer, [reference]).score / 100)


class Inputs:
    """Predictions and examples to score, made of the workspace's."""

    def __init__(self, workspace: Workspace, root: Path) -> None:
        self.workspace, self.root = workspace, root
        self.rows = {
            system: [
                json.loads(line) for line in (workspace.root / f"data/predictions/{system}.jsonl").read_text().splitlines()
            ]
            for system in ("base", "merged")
        }

    def score(self, **given: Any) -> dict[str, Any]:
        for system, rows in self.rows.items():
            (self.root / f"{system}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        project = self.workspace.root
        score(
            Params(**{"bootstrap_resamples": 100, "judge_url": "", "judge_model": "m", "judge_rows": 5} | given),
            examples=project / "data/examples",
            base_predictions=self.root / "base.jsonl",
            merged_predictions=self.root / "merged.jsonl",
            base_extra=project / "data/predictions/base.prompts.jsonl",
            merged_extra=project / "data/predictions/merged.prompts.jsonl",
            reports=project / "reports",
            metrics=self.root / "score.json",
            bars=self.root / "scores.csv",
            page=self.root / "report.html",
        )
        metrics: dict[str, Any] = json.loads((self.root / "score.json").read_text())
        return metrics


@pytest.fixture
def inputs(workspace: Workspace, tmp_path: Path) -> Inputs:
    return Inputs(workspace, tmp_path)


def test_the_metrics_are_a_handful_and_right(inputs: Inputs) -> None:
    for number, row in enumerate(inputs.rows["merged"]):
        row["answer"] = row["reference"] if number % 2 else "wrong"
    metrics = inputs.score()
    assert list(metrics) == [
        "rows",
        "tokens",
        "loss_base",
        "loss",
        "merge_kl",
        "em_base",
        "em_most_frequent",
        "em_nearest",
        "em_merged",
    ]
    count = len(inputs.rows["merged"])
    assert metrics["em_merged"] == round(100 * (count // 2) / count, 1)
    report = json.loads((inputs.workspace.root / "reports/train.json").read_text())
    assert (metrics["rows"], metrics["tokens"]) == (report["rows"], report["tokens"])


def test_equal_models_differ_by_nothing(inputs: Inputs, capsys: pytest.CaptureFixture[str]) -> None:
    inputs.rows["base"] = inputs.rows["merged"]
    inputs.score()
    assert "exact match, fine-tuned minus base model: 0.0 (0.0 to 0.0) points" in capsys.readouterr().out


def test_the_page_is_one_file_with_every_row_and_nothing_from_outside(inputs: Inputs) -> None:
    inputs.rows["merged"][0]["answer"] = "<script>alert(1)</script>"
    inputs.score()
    page = (inputs.root / "report.html").read_text(encoding="utf-8")
    assert page.count('<section class="row"') == len(inputs.rows["merged"])
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert" in page
    for outside in ("http://", "https://", "src=", "@import", "url("):
        assert outside not in page


def test_answers_to_other_rows_are_named(inputs: Inputs) -> None:
    inputs.rows["merged"][0]["id"] = "foreign"
    with pytest.raises(Problem) as caught:
        inputs.score()
    assert "merged.jsonl: 1 rows are no test rows, the first foreign" in caught.value.messages[0]
    assert "2 rows stand in one alone" in caught.value.messages[1]
    assert not (inputs.root / "score.json").exists()


def test_rows_that_are_missing_or_edited_are_named(inputs: Inputs) -> None:
    count = len(inputs.rows["base"])
    for rows in inputs.rows.values():
        del rows[2]  # from both, so that they are alike
    inputs.rows["merged"][0]["reference"] += "!"
    with pytest.raises(Problem) as caught:
        inputs.score()
    for system, message in zip(("base", "merged"), caught.value.messages, strict=False):
        assert f"{system}.jsonl: {count - 1} rows, but there are {count} test prompts; generate again" in message
    assert f"1 rows differ in `reference`, the first {inputs.rows['merged'][0]['id']}" in caught.value.messages[2]
    assert not (inputs.root / "score.json").exists()


def test_chinese_is_compared_by_characters_and_by_words() -> None:
    same = score_answer("我想买三个苹果", "我想买三个苹果", "stop")
    assert [same[name] for name in ("rouge_1", "rouge_2", "rouge_l", "rouge_l_words", "bleu")] == pytest.approx([1] * 5)
    near = score_answer("我想买三个苹果", "我要买三个苹果", "length")
    assert near["rouge_1"] == pytest.approx(6 / 7)
    assert near["rouge_2"] == pytest.approx(4 / 6)
    assert near["rouge_l"] == pytest.approx(6 / 7)
    assert near["stopped"] == 0
    # 我 / 想 / 买 / 三个 / 苹果 and 我要 / 买 / 三个 / 苹果 have three words in common.
    assert near["rouge_l_words"] == pytest.approx(2 * 3 / (5 + 4))
    assert score_answer("three apples", "three pears", "stop")["rouge_l_words"] is None
    assert score_answer("three apples", "three pears", "stop")["rouge_1"] == pytest.approx(0.5)


def test_an_empty_answer_has_nothing_and_is_counted() -> None:
    found = score_answer('{"a":1}', " ", "stop")
    assert found["empty"] == 1
    better = ("exact_match", "valid_json", "json_field_f1", "chrf", "bleu", "rouge_1", "rouge_2", "rouge_l", "distinct_2")
    assert all(found[name] == 0 for name in better)
    assert score_answer("a", "b", None)["stopped"] is None


def test_repetition_and_distinct_pairs() -> None:
    loop = score_answer("x", "a b c d a b c d a b c d", "length")
    assert loop["repetition"] == pytest.approx(1 - 4 / 9)
    assert loop["distinct_2"] == pytest.approx(4 / 11)
    assert score_answer("x", "one two three four five", "stop")["repetition"] == 0


def test_bleu_is_sacrebleus_and_says_how() -> None:
    from sacrebleu.metrics import BLEU

    wanted = BLEU(tokenize="zh", effective_order=True).sentence_score("我要买三个苹果", ["我想买三个苹果"]).score / 100
    assert score_answer("我想买三个苹果", "我要买三个苹果", "stop")["bleu"] == pytest.approx(wanted)
    assert "tok:zh" in bleu_signature(["a", "中"])
    assert "tok:13a" in bleu_signature(["a"])


def test_the_page_has_groups_further_prompts_and_both_bases(inputs: Inputs) -> None:
    inputs.score()
    page = (inputs.root / "report.html").read_text(encoding="utf-8")
    for said in (
        "<td>Chinese</td>",
        "<td>zh.json</td>",
        "<td>en.json</td>",
        "帮我取一个很独特的网名",
        "Into the full ones it would",
    ):
        assert said in page, said
    assert "tok:zh" in page


# A judge


class Endpoint:
    """A local server that prefers the longer answer, favours place A where they are equal, and counts what it is asked."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.fail: list[int] = []
        self.reply: str | None = None
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.asked.append(body)
                outer.keys.append(self.headers.get("Authorization"))
                if outer.fail:
                    self.send_response(outer.fail.pop())
                    self.end_headers()
                    self.wfile.write(b"not now")
                    return
                text = body["messages"][0]["content"]
                a, _, b = text.partition("[Answer A]")[2].partition("[Answer B]")
                a, b = a.strip(), b.partition("Reply with one word")[0].strip()
                said = outer.reply or ("B" if len(b) > len(a) else "A")
                self.send_response(200)
                self.end_headers()
                self.wfile.write(json.dumps({"choices": [{"message": {"content": said}}]}).encode())

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


def test_a_judge_is_asked_in_both_orders_and_its_verdicts_are_kept(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = Judge(endpoint.url, "m")
    assert judge.compare("q", "r", "short", "much longer") == 1
    assert judge.compare("q", "r", "much longer", "short") == 0
    assert judge.compare("q", "r", "abcd", "wxyz") == 0.5, "A both times: it favours a place"
    assert judge.compare("q", "r", "same", "same") == 0.5
    assert len(endpoint.asked) == 4, "the second pair is the first one's other order, and was kept"
    assert endpoint.asked[0]["model"] == "m"
    monkeypatch.setenv("JUDGE_API_KEY", "secret")
    Judge(endpoint.url, "other").compare("q", "r", "short", "much longer")
    assert endpoint.keys[-1] == "Bearer secret"
    assert endpoint.keys[0] is None


@pytest.mark.parametrize(
    ("said", "verdict"),
    [("B", "B"), ("**A**", "A"), ("b.", "B"), ("A: it is right", "A"), ("TIE", "TIE"), ("", "TIE"), ("hm", "TIE")],
)
def test_a_verdict_is_read_from_what_a_judge_says(said: str, verdict: str) -> None:
    assert judge_module._verdict(said) == verdict


def test_a_busy_judge_is_asked_again_and_a_broken_one_is_one_message(endpoint: Endpoint) -> None:
    endpoint.fail = [503, 429]
    assert Judge(endpoint.url, "m").compare("q", "r", "short", "much longer") == 1
    endpoint.fail = [401]
    with pytest.raises(Problem, match=r"score\.judge_url: http.*/v1: status 401: not now\. What was judged so far is kept"):
        Judge(endpoint.url, "m").compare("other", "r", "short", "much longer")
    with pytest.raises(Problem, match=r"Connection refused"):
        Judge("http://127.0.0.1:9/v1", "m").compare("q", "r", "a", "bc")


def test_the_report_has_the_judges_verdict(inputs: Inputs, endpoint: Endpoint) -> None:
    inputs.score(judge_url=endpoint.url, judge_model="the judge")
    page = (inputs.root / "report.html").read_text(encoding="utf-8")
    assert "the judge as the judge of 5 rows, each asked in both orders" in page
    assert len(endpoint.asked) <= 10
