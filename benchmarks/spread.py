"""A model that one GPU does not hold, end to end: train.fsdp, merge with its proof, generate.

    python benchmarks/spread.py                      a 70B shape with 8 layers (18 GB) on all GPUs
    python benchmarks/spread.py --limit 14 --merge-limit 7.5     merge and generate place weights as if GPUs were smaller
    python benchmarks/spread.py --shape 30b --steps 0 --limit 0     a 30B shape (65 GB) that is only answered with

The model has random weights. Training is compared with unsharded training on the same GPUs; both compute the same
micro-batches and must give the same losses. Answers of the spread model are compared with those on one GPU, and with those
of one GPU and main memory. Every step is a process of its own; what the stage prints about the placement is printed too.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.shapes import make_model, make_prompts, make_rows, vocabulary_of, write_rows  # noqa: E402
from benchmarks.train import train_section  # noqa: E402
from benchmarks.ways import machine, peak_main_memory, train_paths  # noqa: E402

ROWS_PER_STEP = 16
STARTED = time.monotonic()


def limit_gpus(gigabytes: float) -> None:
    """Lets the stages of this process place weights as if each GPU had only so much memory. 0: all that it has."""
    from stages.model import load, quantize
    from stages.model.placement import Memory, free_memory

    def limited() -> Memory:
        memory = free_memory()
        return Memory({gpu: min(size, int(gigabytes * 1e9)) for gpu, size in memory.gpus.items()}, memory.main)

    if gigabytes:
        load.free_memory = quantize.free_memory = limited


def peaks() -> dict[str, Any]:
    import torch

    gpus = [torch.cuda.max_memory_allocated(number) / 1e9 for number in range(torch.cuda.device_count())]
    return {"gpus": gpus, "main": peak_main_memory() / 1e9}


def make(folder: Path, shape: str) -> dict[str, Any]:
    """The model and its rows."""
    make_model(folder / "base", shape)
    vocabulary = vocabulary_of(folder / "base")
    write_rows(folder / "train.arrow", make_rows(256, "belle", vocabulary))
    write_rows(folder / "validation.arrow", make_rows(16, "belle", vocabulary, seed=2))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return peaks()


def train(folder: Path, steps: int, processes: int, *, fsdp: bool) -> dict[str, Any]:
    """Trains in several processes. The micro-batches do not depend on the memory, so that the losses can be compared."""
    from stages.train.train import Params
    from stages.train.train import train as stage

    parts = 2
    section = train_section(steps, 1e-3)
    section |= {
        "num_processes": processes,
        "fsdp": fsdp,
        "per_device_train_batch_size": ROWS_PER_STEP // processes // parts,
        "gradient_accumulation_steps": parts,
        "gradient_checkpointing": True,
        "training_arguments": section["training_arguments"] | {"full_determinism": True},
    }
    out = folder / f"fsdp-{fsdp}"
    stage(Params(**section), **train_paths(folder, out)).clean_up()
    found = json.loads((out / "machine.json").read_text())
    curve = (out / "loss" / "train.csv").read_text().splitlines()[1:]
    return {
        "gpus": [found["peak_memory_bytes"] / 1e9] * processes,
        "main": peak_main_memory() / 1e9,
        "rate": found["tokens_per_second"],
        "note": f"losses {[float(line.split(',')[1]) for line in curve]}",
    }


def merge(folder: Path) -> dict[str, Any]:
    """Merges the adapter of the sharded training."""
    from stages.core.params import read_yaml
    from stages.merge.merge import Params
    from stages.merge.merge import merge as stage

    done = stage(
        Params(**read_yaml(ROOT / "params.yaml")["merge"]),
        base=folder / "base",
        adapter=folder / "fsdp-True" / "adapter",
        validation_tokens=folder / "validation.arrow",
        chat_template=folder / "chat_template.jinja",
        merged=folder / "merged",
        report=folder / "merge.json",
    )
    done.clean_up()
    return peaks() | {"note": done.summary.replace(str(folder), "")}


def answer(folder: Path, model: str, name: str, prompts: int, new: int) -> dict[str, Any]:
    """Answers random prompts, and measures two windows of raw text."""
    import pyarrow as pa

    from stages.core.params import read_yaml
    from stages.core.tokens import PROMPTS, open_tokens
    from stages.generate.generate import Params, generate

    vocabulary = vocabulary_of(folder / model)
    for file, count in (("prompts", prompts), ("extra", 1)):
        rows = [
            {"id": f"{file}-{number}", "prompt": "", "prompt_ids": ids, "reference": ""}
            for number, ids in enumerate(make_prompts(count, vocabulary))
        ]
        with open_tokens(folder / f"{file}.arrow", PROMPTS, []) as stream:
            stream.write_batch(pa.RecordBatch.from_pylist(rows, schema=PROMPTS))
    write_rows(folder / "text.arrow", make_rows(2, "belle", vocabulary, seed=3))
    files = [folder / f"{name}.{file}.jsonl" for file in ("answers", "extra", "text")]
    section = read_yaml(ROOT / "params.yaml")["generate"]
    done = generate(
        Params(**section | {"max_new_tokens": new, "batch_size": prompts}),
        model=folder / model,
        test_prompts=folder / "prompts.arrow",
        extra_prompts=folder / "extra.arrow",
        test_text=folder / "text.arrow",
        predictions=files[0],
        extra_predictions=files[1],
        text_losses=files[2],
    )
    done.clean_up()
    rows = [json.loads(line) for line in files[0].read_text().splitlines()]
    losses = [json.loads(line)["loss"] for line in files[2].read_text().splitlines()]
    return peaks() | {
        "answers": [row["answer"] for row in rows],
        "tokens": sum(row["answer_tokens"] for row in rows),
        "note": f"losses on raw text {losses}",
    }


def step(title: str, given: argparse.Namespace, folder: Path, way: str, *, gpus: str | None = None, limit: float = 0) -> Any:
    """Runs one step in a process of its own, and prints its row and what it said about the placement; None if it failed."""
    if time.monotonic() - STARTED > given.seconds:
        print(f"| {title} | skipped: {given.seconds:.0f} s are over |", flush=True)
        return None
    command = [sys.executable, __file__, "--way", way, "--folder", folder, "--shape", given.shape, "--steps", given.steps]
    command += ["--prompts", given.prompts, "--new", given.new, "--limit", limit, "--processes", given.processes]
    visible = {} if gpus is None else {"CUDA_VISIBLE_DEVICES": gpus}
    started = time.monotonic()
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, env=os.environ | visible)
    seconds = time.monotonic() - started
    lines = done.stdout.strip().splitlines()
    said = [line for line in lines if " of weights" in line or line.startswith(("generate: ", "train: ", "merge: "))]
    if done.returncode:
        print(f"| {title} | failed after {seconds:.0f} s |", *said, done.stderr.strip()[-3000:], sep="\n", flush=True)
        return None
    found = json.loads(lines[-1])
    memory = ", ".join(f"{size:.1f}" for size in found["gpus"]) or "–"
    rate = f"{found['rate']:,.0f}" if "rate" in found else "–"
    print(f"| {title} | {seconds:.0f} | {found.get('stage_seconds', 0):.0f} | {memory} | {found['main']:.1f} | {rate} |")
    for line in [*said, *([found["note"]] if "note" in found else [])]:
        print(f"    {line.replace(str(folder), '')}")
    sys.stdout.flush()
    return found


def run(given: argparse.Namespace) -> dict[str, Any]:
    """One step, in its own process."""
    limit_gpus(given.limit)
    way, _, name = given.way.partition(":")
    started = time.monotonic()
    if way == "make":
        found = make(given.folder, given.shape)
    elif way == "train":
        found = train(given.folder, given.steps, given.processes, fsdp=name == "fsdp")
    elif way == "merge":
        found = merge(given.folder)
    else:
        model = "merged" if given.steps else "base"
        found = answer(given.folder, model, name, given.prompts, given.new)
        found["rate"] = found["tokens"] / (time.monotonic() - started)
    return found | {"stage_seconds": time.monotonic() - started}


def same(one: Any, other: Any) -> str:
    if one is None or other is None:
        return "not compared"
    equal = sum(a == b for a, b in zip(one["answers"], other["answers"], strict=True))
    return f"{equal} of {len(one['answers'])} answers are equal"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", default="70b-8")
    parser.add_argument("--processes", type=int, help="GPUs; all by default")
    parser.add_argument("--steps", type=int, default=4, help="optimizer steps; 0: no training and no merge")
    parser.add_argument("--limit", type=float, default=0, help="GB of each GPU that generate may use for weights; 0: all")
    parser.add_argument("--merge-limit", type=float, default=0, help="the same for merge")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="skips the steps that begin after this time")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--new", type=int, default=32, help="the maximum number of tokens in an answer")
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help="an empty folder with enough space for two copies of the model")
    given = parser.parse_args()
    if given.way:
        print(json.dumps(run(given)))
        return
    import torch

    gpus = torch.cuda.device_count()
    given.processes = given.processes or max(2, gpus)
    print(machine(), f"x {gpus}")
    print(
        f"{given.shape} shape, random weights; weights in at most {given.merge_limit or 'all'} GB of a GPU in merge, ",
        end="",
    )
    print(f"{given.limit or 'all'} GB in generate\n")
    print("| step | s, with start-up | s | peak GB by GPU | peak GB of main memory | tokens/s |")
    print("|---|---:|---:|---|---:|---:|")
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        folder = Path(name)
        step("make the model", given, folder, "make")
        if given.steps:
            sharded = step("train, fsdp", given, folder, "train:fsdp")
            step("merge, spread", given, folder, "merge", limit=given.merge_limit)
        spread = step("generate, spread", given, folder, "answer:spread", limit=given.limit)
        if given.limit:
            memory = step("generate, one GPU and main memory", given, folder, "answer:main", gpus="0", limit=given.limit)
            one = step("generate, one GPU", given, folder, "answer:one", gpus="0")
            print(f"    spread: {same(spread, one)}; with main memory: {same(memory, one)}")
        if given.steps:
            unsharded = step("train, unsharded", given, folder, "train:ddp")
            if sharded and unsharded:
                print(f"    losses are {'equal' if sharded['note'] == unsharded['note'] else 'NOT equal'}")


if __name__ == "__main__":
    main()
