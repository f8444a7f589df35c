"""Several GPUs of one machine compared with one: tokens per second, efficiency, and whether the result is the same.

    python benchmarks/multi_gpu.py                 trains an 8B shape with DDP on 1, 2, 4, ... GPUs
    python benchmarks/multi_gpu.py --fsdp          a 70B shape with fewer layers, its frozen weights sharded
    python benchmarks/multi_gpu.py --generate      greedy answers of an 8B shape, the prompts split across GPUs

An optimizer step has the same rows with any number of GPUs, so the losses must be equal within rounding. For answers the
complete stage is timed, from its start until its files are written.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.shapes import make_model, make_prompts, vocabulary_of  # noqa: E402
from benchmarks.train import prepare, train_section  # noqa: E402
from benchmarks.ways import machine, run_row, train_paths  # noqa: E402


def run(folder: Path, processes: int, steps: int, batch: int, *, fsdp: bool) -> dict[str, Any]:
    """Runs the train stage, and returns what it wrote about this run."""
    from stages.train.train import Params, train

    section = train_section(steps, 1e-4) | {
        "num_processes": processes,
        "fsdp": fsdp,
        "per_device_train_batch_size": batch // processes // (4 if fsdp else 1),
        "gradient_accumulation_steps": 4 if fsdp else 1,
        "gradient_checkpointing": True if fsdp else "auto",
    }
    out = folder / f"out{processes}"
    train(Params(**section), **train_paths(folder, out)).clean_up()
    curve = (out / "loss" / "train.csv").read_text().splitlines()
    return json.loads((out / "machine.json").read_text()) | {"loss": float(curve[-1].split(",")[1])}


def answer(folder: Path, processes: int, prompts: int, new: int) -> dict[str, Any]:
    """Runs the generate stage on random prompts of 128 tokens."""
    import pyarrow as pa

    from stages.core.params import read_yaml
    from stages.core.tokens import PROMPTS, TRAINING, open_tokens
    from stages.generate.generate import Params, generate

    vocabulary = vocabulary_of(folder / "base")
    for name, count in (("prompts", prompts), ("extra", 1)):
        rows = [
            {"id": f"{name}-{number}", "prompt": "", "prompt_ids": ids, "reference": ""}
            for number, ids in enumerate(make_prompts(count, vocabulary))
        ]
        with open_tokens(folder / f"{name}.arrow", PROMPTS, []) as stream:
            stream.write_batch(pa.RecordBatch.from_pylist(rows, schema=PROMPTS))
    with open_tokens(folder / "text.arrow", TRAINING, []):
        pass  # no raw text
    section = read_yaml(ROOT / "params.yaml")["generate"]
    params = Params(**section | {"num_processes": processes, "max_new_tokens": new, "batch_size": 128})
    files = [folder / f"{name}.jsonl" for name in ("prompts", "extra", "text")]
    started = time.monotonic()
    generate(
        params,
        model=folder / "base",
        test_prompts=folder / "prompts.arrow",
        extra_prompts=folder / "extra.arrow",
        test_text=folder / "text.arrow",
        predictions=files[0],
        extra_predictions=files[1],
        text_losses=files[2],
    ).clean_up()
    seconds = time.monotonic() - started
    answers = [json.loads(line) for line in files[0].read_text().splitlines()]
    return {
        "seconds": seconds,
        "tokens": sum(row["answer_tokens"] for row in answers),
        "answers": [row["answer"] for row in answers],
    }


def answer_table(folder: Path, given: argparse.Namespace, counts: list[int]) -> None:
    print("| GPUs | tokens/s | efficiency | seconds | answers that differ from the first row's |")
    print("|---:|---:|---:|---:|---:|")
    first: dict[str, Any] = {}
    for count in counts:
        arguments = ("--folder", folder, "--generate", "--batch", given.batch, "--new", given.new)
        found = run_row(__file__, str(count), str(count), *arguments)
        if found is None:
            continue
        first = first or found | {"count": count}
        rate, one = found["tokens"] / found["seconds"], first["tokens"] / first["seconds"] / first["count"]
        differ = sum(a != b for a, b in zip(found["answers"], first["answers"], strict=True))
        print(
            f"| {count} | {rate:,.0f} | {100 * rate / count / one:.0f} % | {found['seconds']:.1f} | "
            f"{differ} of {len(found['answers'])} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch", type=int, default=256, help="rows per step, or prompts, of all GPUs together")
    parser.add_argument("--generate", action="store_true")
    parser.add_argument("--new", type=int, default=256, help="the maximum number of tokens in an answer")
    parser.add_argument("--counts", type=int, nargs="*", help="numbers of GPUs")
    parser.add_argument("--fsdp", action="store_true")
    parser.add_argument("--shape", default=None)
    parser.add_argument("--base", type=Path, help="the folder of an existing model of that shape")
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.way and given.generate:
        print(json.dumps(answer(given.folder, int(given.way), given.batch, given.new)))
        return
    if given.way:
        found = run(given.folder, int(given.way), given.steps, given.batch, fsdp=given.fsdp)
        print(json.dumps(found))
        return
    import torch

    there = max(1, torch.cuda.device_count())
    counts = given.counts or ([there] if given.fsdp else [count for count in (1, 2, 4, 8) if count <= there])
    shape = given.shape or ("70b-8" if given.fsdp else "8b")
    print(machine())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if given.base:
            (folder / "base").symlink_to(given.base)
        else:
            make_model(folder / "base", shape)
        if given.generate:
            print(f"{shape} shape, {given.batch} prompts of 128 tokens, up to {given.new} new ones\n")
            answer_table(folder, given, counts)
            return
        print(f"{shape} shape, NF4, {'FSDP' if given.fsdp else 'DDP'}, BELLE's lengths, {given.batch} rows per step\n")
        print("| GPUs | tokens/s | efficiency | peak GB per GPU | loss of the last step |")
        print("|---:|---:|---:|---:|---:|")
        prepare(folder, "belle", given.batch * given.steps)
        first = 0.0
        for count in counts:
            arguments = ("--folder", folder, "--steps", given.steps, "--batch", given.batch, *["--fsdp"] * given.fsdp)
            found = run_row(__file__, str(count), str(count), *arguments)
            if found is None:
                continue
            rate = found["tokens_per_second"]
            first = first or rate / count
            print(
                f"| {count} | {rate:,.0f} | {100 * rate / count / first:.0f} % | {found['peak_memory_bytes'] / 1e9:.1f} | "
                f"{found['loss']:.4f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
