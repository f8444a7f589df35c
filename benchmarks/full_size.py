"""Everything at size: one `dvc repro` of the whole pipeline, and what each of its stages needs.

    python benchmarks/full_size.py --shape 1.5b --rows 50000 [--tokenizer FOLDER] [--set train.r=32] [--stages train]
    python benchmarks/full_size.py --cpu-data --rows 500000

Makes a model of Qwen's shape and vocabulary with random weights and BELLE-like rows, both from fixed seeds, copies the
pipeline into a folder, changes its parameters as printed, and runs `dvc repro` there, offline and without git. `--tokenizer`
is a folder with the files of a real tokenizer of that vocabulary. Without it one is trained on the rows and filled up to
the size. The model answers noise up to `generate.max_new_tokens`, so every answer has full length, the limits of merge are
lowered, and the scores mean nothing.

`--cpu-data` is for a machine without a GPU: a tiny model trains one step, so that there are reports for `score`, and the
predictions are made up. `--folder` keeps the copy; when the script runs again on it, `dvc repro` goes on where it ended.

The columns: `seconds` of the stage's process; `DVC`, the seconds until the next stage starts, in which DVC hashes and caches
the outputs; main memory of all processes of the stage together, sampled five times a second, without and with mapped files,
whose pages the system can drop; GPU memory as nvidia-smi shows it, all GPUs together; the size of the outputs, the largest
size of the checkpoints, what was added to DVC's cache, and the largest size of the project on the disk so far, as `du`
counts it.
"""

import argparse
import configparser
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import psutil  # noqa: E402
from ruamel.yaml import YAML  # noqa: E402
from ruamel.yaml.comments import CommentedMap  # noqa: E402

from benchmarks.shapes import LONGEST, QWEN_SHAPES, make_qwen  # noqa: E402
from benchmarks.texts import make_texts, write_rows  # noqa: E402
from benchmarks.watch import Usage, Watch, process_tree, size_of  # noqa: E402
from benchmarks.ways import machine  # noqa: E402
from stages.core.jsonl import read_json, read_jsonl  # noqa: E402
from stages.core.params import read_section  # noqa: E402
from stages.core.tokens import choose_rows, read_tokens  # noqa: E402

COPIED = ("stages", "data/prompts.json", "dvc.yaml", "params.yaml", ".dvcignore", ".gitignore")
CHANGED: dict[str, Any] = {
    "encode.max_length": LONGEST,
    "train.learning_rate": 1e-4,
    "generate.max_new_tokens": 256,
    "generate.batch_size": 128,
}
CHANGED_ON_CPU: dict[str, Any] = {
    "train.training_arguments": {"max_steps": 1},
    "train.warmup_steps": 0,
    "train.max_eval_samples": 64,
    # The delta weights of a single step must be larger than what merging rounds away.
    "train.learning_rate": 1e-2,
}
TOKENS = 151_646
"""Of Qwen's tokenizer with the special tokens of ChatML."""
BPE_ROWS, BPE_TOKENS = 6_000, 2_000
"""Of the tokenizer that is trained; with it, a row has as many tokens as with Qwen's."""
SPLITS = ("train", "validation", "test")
STOP_S = 20
"""Seconds in which an interrupted stage can save a checkpoint."""
HEADER = (
    "stage", "seconds", "DVC", "speed", "main memory GB", "with mapped files GB", "GPU GB",
    "outputs GB", "checkpoints GB", "cache GB", "disk GB",
)  # fmt: skip


def make_model(folder: Path, shape: str, tokenizer: Path | None) -> None:
    """Runs in a process of its own, which gives back the GPU's memory."""
    make_qwen(folder, shape)
    if tokenizer:
        for file in tokenizer.iterdir():
            shutil.copyfile(file, folder / file.name)
        print(f"tokenizer: {tokenizer}")
    else:
        merges = make_tokenizer(folder)
        print(f"tokenizer: byte-level BPE of the rows' own words, {merges:,} merges, filled up to {TOKENS:,} tokens")
    print(f"machine: {machine()}, {os.cpu_count()} cores", flush=True)


def make_tokenizer(folder: Path) -> int:
    """Trains a tokenizer on rows like those of the benchmark, and returns its number of merges."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    texts = make_texts(seed=1)
    trainer = trainers.BpeTrainer(
        vocab_size=BPE_TOKENS, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    rows = (texts[language].row() for _ in range(BPE_ROWS // len(texts)) for language in texts)
    bpe.train_from_iterator((text for row in rows for text in row.values()), trainer)
    trained = json.loads(bpe.to_str())["model"]
    vocab = trained["vocab"]
    vocab |= {f"unused{number}": number for number in range(len(vocab), TOKENS - len(special))}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[tuple(merge) for merge in trained["merges"]], model_max_length=32768)
    tokenizer.add_special_tokens({"additional_special_tokens": special[1:]})
    tokenizer.eos_token = special[2]
    tokenizer.save_pretrained(folder)
    return len(trained["merges"])


def copy_pipeline(project: Path) -> None:
    """The code and the settings of this checkout, as a project of its own without git."""
    for name in COPIED:
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, project / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(ROOT / name, project / name)
    subprocess.run(
        ["python", "-m", "dvc", "init", "--no-scm", "--quiet"], cwd=project, env=environment(project.parent), check=True
    )
    config = configparser.ConfigParser()
    config.read([project / ".dvc" / "config", ROOT / ".dvc" / "config"])
    with (project / ".dvc" / "config").open("w", encoding="utf-8") as file:
        config.write(file)


def change_params(path: Path, changes: Mapping[str, Any]) -> list[str]:
    """Writes values into params.yaml, and returns a line for each. The comments stay."""
    yaml = YAML()
    yaml.width = 4096
    yaml.preserve_quotes = True
    params = yaml.load(path)
    lines = []
    for name, value in changes.items():
        section, _, key = name.partition(".")
        if key not in params.get(section, {}):
            sys.exit(f"{name}: params.yaml has no such parameter")
        if params[section][key] != value:
            lines.append(f"{name}: {value} (was {params[section][key]})")
        params[section][key] = value
        if isinstance(value, dict):  # on one line, as in params.yaml
            params[section][key] = CommentedMap(value)
            params[section][key].fa.set_flow_style()
    yaml.dump(params, path)
    return lines


def folder_hash(folder: Path) -> str:
    """What `fetch.revision` must be: the sha256 of what sha256sum prints for the files."""
    lines = []
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            lines.append(f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {path.name}\n")
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def make_project(work: Path, given: argparse.Namespace) -> None:
    """The copy of the pipeline with its model, rows and parameters."""
    project, model = work / "project", work / "model"
    started = time.monotonic()
    # The steps that take long come first, in a fresh process each time: a cut-off run leaves no half project.
    for folder in (project, model):
        shutil.rmtree(folder, ignore_errors=True)
    process = multiprocessing.get_context("spawn").Process(target=make_model, args=(model, given.shape, given.tokenizer))
    process.start()
    copy_pipeline(project)
    (project / "data" / "raw").mkdir()
    write_rows(project / "data" / "raw" / "rows.jsonl", given.rows)
    process.join()
    if process.exitcode:
        sys.exit("the model could not be made")
    size, rows = size_of(model).apparent, size_of(project / "data" / "raw").apparent
    print(
        f"model: Qwen's {given.shape} shape, random weights, {size / 1e9:.2f} GB; "
        f"{given.rows:,} rows, {rows / 1e6:,.0f} MB; made in {time.monotonic() - started:.0f} s"
    )
    changes = {
        "fetch.source": "folder",
        "fetch.model_name_or_path": str(model),
        "fetch.revision": folder_hash(model),
        **CHANGED,
        **(CHANGED_ON_CPU if given.cpu_data else {}),
        **dict(given.set),
    }
    for line in change_params(project / "params.yaml", changes):
        print(f"changed: {line}")
    subprocess.run(["python", "-m", "stages", "check"], cwd=project, env=environment(work), check=True)
    (work / "made").touch()


def environment(work: Path) -> dict[str, str]:
    """The environment in which the `python` of dvc.yaml is this one."""
    python = work / "bin" / "python"
    python.parent.mkdir(parents=True, exist_ok=True)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    return os.environ | {"PATH": f"{python.parent}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1", "DVC_NO_ANALYTICS": "true"}


class Table:
    """Prints a row for each stage when DVC is done with it."""

    def __init__(self, project: Path, rows: int) -> None:
        self._project, self._rows = project, rows
        self._outputs, self._cache = self._sizes()
        print(f"\n| {' | '.join(HEADER)} |")
        print(f"|---|{'---:|' * (len(HEADER) - 1)}", flush=True)

    def _sizes(self) -> tuple[int, int]:
        folders = (self._project / name for name in ("models", "data", "reports"))
        return size_of(*folders).apparent, size_of(self._project / ".dvc" / "cache").apparent

    def row(self, used: Usage) -> None:
        outputs, cache = self._sizes()
        seconds = used.ended - used.started
        sizes = (
            used.own, used.mapped, used.gpu or None, outputs - self._outputs, used.checkpoints,
            cache - self._cache, used.disk,
        )  # fmt: skip
        cells = [
            used.stage if used.complete else f"{used.stage} (not finished)",
            f"{seconds:,.0f}",
            f"{used.recorded - used.ended:,.0f}",
            self._speed(used.stage, seconds) if used.complete else "–",
            *("–" if size is None else f"{size / 1e9:.2f}" for size in sizes),
        ]
        self._outputs, self._cache = outputs, cache
        print(f"| {' | '.join(cells)} |", flush=True)

    def _speed(self, stage: str, seconds: float) -> str:
        """Rows or tokens per second of the stage's process; "–" for a stage that has none."""
        reports = self._project / "reports"
        name, _, model = stage.partition(" ")
        match name:
            case "ingest":
                return f"{self._rows / seconds:,.0f} rows/s"
            case "encode":
                found = read_json(reports / "encode.json")
                return f"{sum(found[f'{split}_tokens'] for split in SPLITS) / seconds:,.0f} tokens/s"
            case "train":
                return f"{read_json(reports / 'machine' / 'train.json')['tokens_per_second']:,.0f} tokens/s in training"
            case "generate":
                answers = [*self._answers(f"{model}.jsonl"), *self._answers(f"{model}.prompts.jsonl")]
                return f"{sum(answer['answer_tokens'] for answer in answers) / seconds:,.0f} tokens/s"
            case "score":
                return f"{sum(1 for _ in self._answers('merged.jsonl')) / seconds:,.0f} rows/s"
        return "–"

    def _answers(self, name: str) -> Iterator[dict[str, Any]]:
        return read_jsonl(self._project / "data" / "predictions" / name)


def repro(work: Path, *targets: str, table: Table) -> Watch:
    """Runs `dvc repro` on some stages, or on all. Its output goes to stderr, the table to stdout. Exits if it fails."""
    project = work / "project"
    command = [sys.executable, "-m", "dvc", "repro", *targets]
    process = subprocess.Popen(command, cwd=project, env=environment(work), stdout=sys.stderr, start_new_session=True)
    watch = Watch(process.pid, project, recorded=table.row)
    watch.start()
    try:
        process.wait()
    finally:
        interrupted = process.poll() is None
        if interrupted:
            tree = process_tree(process.pid)
            os.killpg(process.pid, signal.SIGTERM)
            for left in psutil.wait_procs(tree, timeout=STOP_S)[1]:
                left.kill()
        watch.stop(complete=not interrupted and process.returncode == 0)
    if process.returncode:
        sys.exit(f"dvc repro failed with status {process.returncode}; --folder keeps the project in which it failed")
    return watch


def make_predictions(project: Path) -> int:
    """Writes what `generate` would: noise of the base model, and answers like the references of the merged one."""
    folder = project / "data" / "predictions"
    folder.mkdir(parents=True, exist_ok=True)
    count = read_section("generate", project).get("max_predict_samples", 0)
    test = read_tokens(project / "data" / "tokens" / "test.arrow").drop_columns("prompt_ids")
    extra = read_tokens(project / "data" / "tokens" / "prompts.arrow").drop_columns("prompt_ids")
    chosen = test.take(choose_rows(test["id"].to_pylist(), count))
    texts = make_texts(seed=2)
    for model in ("base", "merged"):
        for rows, name in ((chosen, f"{model}.jsonl"), (extra, f"{model}.prompts.jsonl")):
            with (folder / name).open("w", encoding="utf-8") as file:
                for number, row in enumerate(row for batch in rows.to_batches(1000) for row in batch.to_pylist()):
                    file.write(json.dumps(predict(row, texts, model=model, number=number), ensure_ascii=False) + "\n")
        (folder / f"{model}.text.jsonl").touch()
    return len(chosen)


def predict(row: Mapping[str, str], texts: Mapping[str, Any], *, model: str, number: int) -> dict[str, Any]:
    """One made-up answer. Every tenth of the merged model is the reference itself."""
    reference = row["reference"]
    text = texts["en" if reference.isascii() else "zh"]
    if model == "base" or not reference:
        answer = text.text(text.length(110))
    else:
        answer = reference if number % 10 == 0 else text.changed(reference, 0.3)
    return {
        "id": row["id"],
        "prompt": row["prompt"],
        "reference": reference,
        "answer": answer,
        "finish_reason": "stop",
        "prompt_tokens": 0,
        "answer_tokens": 0,
    }


@contextmanager
def work_folder(kept: Path | None) -> Iterator[Path]:
    if kept:
        kept.mkdir(parents=True, exist_ok=True)
        yield kept.resolve()
    else:
        with tempfile.TemporaryDirectory() as name:
            yield Path(name)


def parse_set(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    return name, YAML(typ="safe").load(value)


def stop(*_: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # timeout sends it twice
    sys.exit("stopped; with --folder, the same command goes on from here")


def free(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", choices=QWEN_SHAPES, default="1.5b")
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--tokenizer", type=Path, help="a folder with a tokenizer of Qwen's vocabulary")
    parser.add_argument("--stages", metavar="STAGE", help="the last stage to run, train for example")
    parser.add_argument("--set", type=parse_set, action="append", default=[], help="SECTION.NAME=VALUE, in params.yaml")
    parser.add_argument("--folder", type=Path, help="works in this folder and keeps it")
    parser.add_argument("--cpu-data", action="store_true", help="only the stages on data, and score on made-up predictions")
    given = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, stop)
    if given.cpu_data:
        given.shape = "tiny"
    with work_folder(given.folder) as work:
        project = work / "project"
        if not (work / "made").exists():
            make_project(work, given)
        started, at_start = time.monotonic(), free(work)
        table = Table(project, given.rows)
        if given.cpu_data:
            watches = [repro(work, given.stages or "merge", table=table)]
            if not given.stages:
                predicted = make_predictions(project)
                watches.append(repro(work, "--single-item", "score", table=table))
                print(f"\nThe predictions of {predicted:,} test rows are made up; train and merge ran with the tiny shape.")
        else:
            watches = [repro(work, *([given.stages] if given.stages else []), table=table)]
        total, dvc = size_of(project), max(watch.dvc_own for watch in watches)
        print(
            f"\nIn all {time.monotonic() - started:,.0f} s; DVC itself took up to {dvc / 1e9:.2f} GB of main memory. "
            f"The project has {total.apparent / 1e9:.2f} GB in files, {total.allocated / 1e9:.2f} GB as du counts them. "
            f"The run took {(at_start - free(work)) / 1e9:.2f} GB of the file system."
        )


if __name__ == "__main__":
    main()
