"""How long score takes, how much memory, and how large its report is.

    python benchmarks/score.py [--sizes 16000,350000,300 1000,350000,2000 125000,350000,300] [--code ../other-checkout]

Each size is: test rows, training rows, characters of an answer. Two thirds of the rows are Chinese, of jieba's words by
their frequency; the rest is made-up English. The fine-tuned model's answer is the reference with a third of the words
replaced, the base model's has other words. Prompts have the lengths of BELLE's. Each size runs in its own process; the
peak is the PSS of it and its children.
`--code` measures the stages of another checkout of this project, on the same rows.
"""

import argparse
import hashlib
import inspect
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.ways import measure  # noqa: E402

SIZES = ((16_000, 350_000, 300), (1_000, 350_000, 2_000), (125_000, 350_000, 300))
PROMPT_CHARACTERS, SIGMA = {"zh": 21, "en": 115}, 0.75
WORDS = 30_000


class Words:
    """Texts of two languages, their words drawn by frequency."""

    def __init__(self) -> None:
        import jieba

        self.rng = np.random.default_rng(0)
        jieba.setLogLevel("WARNING")
        jieba.initialize()
        known = {word: count for word, count in jieba.dt.FREQ.items() if count and "\u4e00" <= word[0] <= "\u9fa5"}
        chinese = sorted(known, key=lambda word: (-known[word], word))[:WORDS]
        letters, weights = np.array(list("etaoinshrdlucmfwypvbgkjqxz")), np.arange(26, 0, -1) / 351
        english = ["".join(self.rng.choice(letters, self.rng.integers(2, 10), p=weights)) for _ in range(WORDS)]
        self._words = {"zh": np.array([*chinese, "，", "。"], object), "en": np.array(english, object)}
        counts = {
            "zh": np.array([*(known[word] for word in chinese), *[sum(known[word] for word in chinese) // 15] * 2], float),
            "en": 1 / (np.arange(WORDS) + 2),
        }
        self._sums = {language: np.cumsum(values / values.sum()) for language, values in counts.items()}

    def draw(self, language: str, characters: int) -> np.ndarray[Any, Any]:
        """About as many words as have this many characters."""
        count = max(1, characters // (2 if language == "zh" else 6) + 1)
        drawn = np.searchsorted(self._sums[language], self.rng.random(count))
        return self._words[language][np.minimum(drawn, len(self._words[language]) - 1)]

    def join(self, language: str, words: np.ndarray[Any, Any], characters: int) -> str:
        return ("" if language == "zh" else " ").join(words)[:characters]

    def prompt(self, language: str) -> str:
        characters = max(4, int(self.rng.lognormal(np.log(PROMPT_CHARACTERS[language]), SIGMA)))
        return self.join(language, self.draw(language, characters), characters)


MERGE_FIGURES = (
    "mean_kl", "median_kl", "p99_kl", "p99_9_kl", "max_kl", "rms_delta_p", "mean_delta_p", "top1_agreement",
    "max_abs_logit_difference", "base_loss", "trained_loss", "merged_loss", "loss_difference", "gain", "recovery",
)  # fmt: skip
"""Of reports/merge.json, for the report."""


def make_inputs(folder: Path, *, test_rows: int, train_rows: int, characters: int) -> None:
    """Writes what score reads."""
    words = Words()
    (folder / "examples").mkdir()
    (folder / "reports" / "loss").mkdir(parents=True)

    def language_of(number: int) -> str:
        return "zh" if number % 3 else "en"

    def example(split: str, number: int, answer: str) -> dict[str, Any]:
        language = language_of(number)
        messages = [
            {"role": "user", "content": words.prompt(language)},
            {"role": "assistant", "content": answer},
        ]
        name = hashlib.sha256(f"{split} {number}".encode()).hexdigest()[:16]
        return {"id": name, "source": f"{language}.json:{number}", "format": "alpaca", "messages": messages}

    def write(file: Any, row: dict[str, Any]) -> None:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")

    with (folder / "examples" / "train.jsonl").open("w", encoding="utf-8") as file:
        for number in range(train_rows):
            language = language_of(number)
            write(file, example("train", number, words.join(language, words.draw(language, characters), characters)))
    with (
        (folder / "examples" / "test.jsonl").open("w", encoding="utf-8") as file,
        (folder / "base.jsonl").open("w", encoding="utf-8") as base,
        (folder / "merged.jsonl").open("w", encoding="utf-8") as merged,
    ):
        for number in range(test_rows):
            language = language_of(number)
            reference, other = (words.draw(language, characters) for _ in range(2))
            near = np.where(words.rng.random(len(reference)) < 1 / 3, other, reference)
            reference, other, near = (words.join(language, each, characters) for each in (reference, other, near))
            row = example("test", number, reference)
            write(file, row)
            prompt = f"<|im_start|>user\n{row['messages'][0]['content']}<|im_end|>\n<|im_start|>assistant\n"
            for out, answer in ((base, other), (merged, near)):
                prediction = {"id": row["id"], "prompt": prompt, "reference": reference, "answer": answer}
                write(out, prediction | {"finish_reason": "stop"})
    for name in ("base.prompts", "merged.prompts", "base.text", "merged.text"):
        (folder / f"{name}.jsonl").write_text("\n")
    write_reports(folder / "reports", test_rows=test_rows, train_rows=train_rows)


def write_reports(folder: Path, *, test_rows: int, train_rows: int) -> None:
    """What the report shows of the earlier stages, with curves of some thousand points."""
    stages: dict[str, dict[str, Any]] = {
        "ingest": dict.fromkeys(("rows_read", "rows_kept", "train"), train_rows)
        | dict.fromkeys(("validation", "test", "rows_rejected", "leaked_prompts"), 0)
        | {"rejected_by_reason": {}},
        "encode": {"test_rows": test_rows, "test_text_windows": 0, "longest_row": 512, "rows_rejected": 0}
        | {"rejected_by_reason": {}},
        "train": dict.fromkeys(("rows", "tokens", "label_tokens", "steps", "trainable_parameters"), train_rows)
        | {"validation_loss_before": 3.0, "validation_loss": 1.0},
        "merge": {"model": "a model", "base": "dequantized", "tokens": 1, "rows": 1, "validation_rows": 1, "greedy_rows": 1}
        | dict.fromkeys(MERGE_FIGURES, 0.001)
        | {"top1_agreement": 1.0, "greedy_agreement": 1.0, "greedy_near_ties": 0, "greedy_different": 0}
        | {"rounding": {"mean_kl": 0.001}, "delta_kept": None, "quantization_cost": None}
        | {"standard_errors": dict.fromkeys(MERGE_FIGURES, 0.001)},
    }
    for stage, report in stages.items():
        (folder / f"{stage}.json").write_text(json.dumps(report))
    for name, points in (("train", 5000), ("validation", 500)):
        lines = (f"{5 * step},{3 / (1 + step)}\n" for step in range(points))
        (folder / "loss" / f"{name}.csv").write_text("step,loss\n" + "".join(lines))
    (folder / "lengths.csv").write_text("tokens,rows\n001-128,10\n129-256,20\n")


def run_score(folder: Path, code: Path) -> None:
    """Scores, with the stages of the checkout `code`."""
    sys.path.insert(0, str(code))
    from stages.score.score import Params, score

    paths = {f"{model}_{kind}": folder / f"{model}.{name}jsonl" for model in ("base", "merged") for kind, name in KINDS}
    paths |= {"examples": folder / "examples", "reports": folder / "reports", "metrics": folder / "score.json"}
    paths |= {"bars": folder / "scores.csv", "page": folder / "report.html", "rows": folder / "rows.csv"}
    stage: Callable[..., Any] = score
    wanted = inspect.signature(stage).parameters
    print(stage(Params(judge_url="", judge_model="", judge_rows=1), **{k: v for k, v in paths.items() if k in wanted}))


KINDS = (("predictions", ""), ("extra", "prompts."), ("text", "text."))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sizes", nargs="+", default=[",".join(map(str, size)) for size in SIZES])
    parser.add_argument("--code", type=Path, default=ROOT)
    parser.add_argument("--run", type=Path)
    given = parser.parse_args()
    if given.run:
        run_score(given.run, given.code)
        return
    print("| test rows | training rows | characters | wall s | CPU s | peak MB | report MB |")
    print("|---:|---:|---:|---:|---:|---:|---:|")
    for size in given.sizes:
        test_rows, train_rows, characters = map(int, size.split(","))
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            make_inputs(folder, test_rows=test_rows, train_rows=train_rows, characters=characters)
            found = measure([sys.executable, __file__, "--code", str(given.code), "--run", name])
            page = (folder / "report.html").stat().st_size
        print(
            f"| {test_rows:,} | {train_rows:,} | {characters:,} | {found['wall']:.0f} | {found['cpu']:.0f} "
            f"| {found['peak'] / 1e6:,.0f} | {page / 1e6:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
