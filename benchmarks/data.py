"""How fast raw rows become tokens: ingest and encode compared with the tutorial's code and with the tokenizer alone.

    python benchmarks/data.py [--rows 500000] [--tokenizer models/tokenizer] [--qwen]

Makes BELLE-like rows (two thirds Chinese, one third English, log-normal lengths), runs each way in its own process
on all cores, and prints rows and tokens per second, CPU seconds, and peak memory (PSS of the process and its children).
`--qwen` gives the tokenizer Qwen's normalizer (NFC), pre-tokenizer and added tokens, and keeps its vocabulary.
The tutorial's ways need `pip install datasets==5.2.0`; without it they are left out.
"""

import argparse
import importlib.util
import json
import math
import os
import random
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.ways import measure  # noqa: E402

MEDIAN_CHARACTERS, SIGMA = {"zh": 60, "en": 330}, 0.75
CHATML = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n{}<|im_end|>\n"
QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Qwen2 to Qwen3's tokenizer.json splits a text into words."""
WAYS = {
    "tutorial": "tutorial: datasets.map, one row at a time, num_proc = cores",
    "batched": "datasets.map, batched, num_proc = cores",
    "ingest": "ingest",
    "encode": "encode",
    "limit": "limit: encode_batch_fast alone, nothing kept",
    "engine": "fastokens alone, nothing kept",
}


def make_rows(path: Path, count: int) -> None:
    rng = random.Random(0)
    common = [chr(code) for code in range(0x4E00, 0x9FA5)]
    rng.shuffle(common)
    characters = common[:2500]
    # Words and characters by Zipf's law, so that some are as common as in a language.
    english = [
        "".join(rng.choices("etaoinshrdlucmfwypvbgkjqxz", range(26, 0, -1), k=rng.randint(2, 9))) for _ in range(8000)
    ]
    chinese = [
        "".join(rng.choices(characters, [1 / (n + 5) for n in range(2500)], k=rng.choice((1, 2, 2, 3)))) for _ in range(8000)
    ]
    weights = [1 / (n + 2) for n in range(8000)]

    def text(language: str, share: float) -> str:
        wanted = max(4, int(rng.lognormvariate(math.log(MEDIAN_CHARACTERS[language]), SIGMA) * share))
        words = rng.choices(
            chinese if language == "zh" else english, weights, k=wanted // (2 if language == "zh" else 5) + 1
        )
        return ("" if language == "zh" else " ").join(words)[:wanted] + ("。" if language == "zh" else ".")

    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            language = "zh" if number % 3 else "en"
            row = {"instruction": text(language, 0.35), "input": "", "output": text(language, 0.65)}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def make_like_qwen(folder: Path, tokenizer: Path) -> None:
    """Writes a tokenizer that works as Qwen's does, with the vocabulary of a byte-level BPE tokenizer, into `folder`."""
    shutil.copytree(tokenizer, folder)
    settings = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    settings["normalizer"] = {"type": "NFC"}
    split = {"type": "Split", "pattern": {"Regex": QWEN_WORDS}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    settings["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, level]}
    added = settings["added_tokens"]
    first = max(*settings["model"]["vocab"].values(), *(token["id"] for token in added)) + 1
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    names = ("<think>", "</think>", "<tool_call>", "</tool_call>")
    added += [{"id": number, "content": name} | flags for number, name in enumerate(names, first)]
    (folder / "tokenizer.json").write_text(json.dumps(settings, ensure_ascii=False), encoding="utf-8")


def params(stage: str) -> dict[str, Any]:
    from stages.core.params import read_yaml

    section: dict[str, Any] = read_yaml(ROOT / "params.yaml")[stage]
    return section


def run_ingest(work: Path, _: Path) -> None:
    from stages.ingest.ingest import Params, ingest

    ingest(
        Params(**params("ingest") | {"test_percent": 0.1, "validation_percent": 0.1}),
        raw=work / "raw",
        hub=work / "hub",
        examples=work / "examples",
        report=work / "ingest.json",
    )


def run_encode(work: Path, tokenizer: Path) -> None:
    from stages.encode.encode import Params, encode

    templates = ROOT / "stages" / "templates"
    gates = dict.fromkeys(params("encode")["gates"], 100.0)
    given = params("encode") | {"max_length": 4096, "gates": gates, "template": str(templates / "chatml.jinja")}
    encode(
        Params(**given),
        examples=work / "examples",
        prompts=ROOT / "data" / "prompts.json",
        tokenizer=tokenizer,
        tokens=work / "tokens",
        report=work / "encode.json",
        masks=work / "masks.html",
        lengths=work / "lengths.csv",
    )


def run_datasets(work: Path, folder: Path, batched: bool) -> None:
    from datasets import Dataset
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)

    def texts(rows: dict[str, list[str]]) -> list[str]:
        columns = zip(rows["instruction"], rows["input"], rows["output"], strict=True)
        return [CHATML.format(i + x, o) for i, x, o in columns]

    def one(row: dict[str, str]) -> dict[str, Any]:
        text = CHATML.format(row["instruction"] + row["input"], row["output"])
        result = tokenizer(text, truncation=True, max_length=4096, padding=False, return_tensors=None)
        result["labels"] = result["input_ids"].copy()
        return dict(result)

    def many(rows: dict[str, list[str]]) -> dict[str, Any]:
        result = dict(tokenizer(texts(rows), truncation=True, max_length=4096))
        return result | {"labels": [ids.copy() for ids in result["input_ids"]]}

    cache = str(work / ("batched" if batched else "single"))
    data = Dataset.from_json(str(work / "raw" / "rows.json"), cache_dir=cache)
    data.map(many if batched else one, batched=batched, num_proc=os.cpu_count())


def run_limit(work: Path, folder: Path, engine: bool) -> None:
    if engine:
        import fastokens

        encode = fastokens.Tokenizer.from_file(str(folder / "tokenizer.json")).encode_batch_flat
    else:
        from tokenizers import Tokenizer

        encode = Tokenizer.from_file(str(folder / "tokenizer.json")).encode_batch_fast
    with (work / "raw" / "rows.json").open(encoding="utf-8") as file:
        texts = []
        for line in file:
            row = json.loads(line)
            texts.append(CHATML.format(row["instruction"] + row["input"], row["output"]))
            if len(texts) == 5000:
                encode(texts)
                texts.clear()
        if texts:
            encode(texts)


RUN = {
    "tutorial": lambda work, folder: run_datasets(work, folder, batched=False),
    "batched": lambda work, folder: run_datasets(work, folder, batched=True),
    "ingest": run_ingest,
    "encode": run_encode,
    "limit": lambda work, folder: run_limit(work, folder, engine=False),
    "engine": lambda work, folder: run_limit(work, folder, engine=True),
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=500_000)
    parser.add_argument("--tokenizer", type=Path, default=ROOT / "models" / "tokenizer")
    parser.add_argument("--qwen", action="store_true")
    parser.add_argument("--way", choices=RUN)
    parser.add_argument("--work", type=Path)
    given = parser.parse_args()
    if given.way:
        RUN[given.way](given.work, given.tokenizer)
        return
    ways = [way for way in WAYS if way not in ("tutorial", "batched") or importlib.util.find_spec("datasets")]
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        (work / "raw").mkdir()
        make_rows(work / "raw" / "rows.json", given.rows)
        tokenizer = given.tokenizer
        if given.qwen:
            tokenizer = work / "qwen"
            make_like_qwen(tokenizer, given.tokenizer)
        command = [sys.executable, __file__, "--work", str(work), "--tokenizer", str(tokenizer), "--way"]
        found = {way: measure([*command, way]) for way in ways}
        report = json.loads((work / "encode.json").read_text())
        tokens = sum(report[f"{split}_tokens"] for split in ("train", "validation", "test"))
        size = (work / "raw" / "rows.json").stat().st_size
    print(f"{given.rows:,} rows, {size / 1e6:,.0f} MB, {tokens:,} tokens, {os.cpu_count()} cores")
    print("| | rows/s | tokens/s | wall s | CPU s | peak MB | of the limit |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for way in ways:
        f = found[way]
        share = found["limit"]["wall"] / f["wall"]
        print(
            f"| {WAYS[way]} | {given.rows / f['wall']:,.0f} | {tokens / f['wall']:,.0f} | {f['wall']:.1f} | {f['cpu']:.1f} "
            f"| {f['peak'] / 1e6:,.0f} | {share:.2f} |"
        )


if __name__ == "__main__":
    main()
