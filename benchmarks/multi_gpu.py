"""Training on several GPUs of one host: tokens a second, efficiency, loss and memory beside one GPU on the same rows.

    python benchmarks/multi_gpu.py                 an 8B shape, DDP on 1, 2, 4, ... GPUs, as many as there are
    python benchmarks/multi_gpu.py --fsdp          a 70B shape with fewer layers, its frozen weights parted among all GPUs

The rows of an optimizer step are the same whatever the number of GPUs, so the losses must be the same within rounding.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.shapes import make_model  # noqa: E402
from benchmarks.train import prepare, train_section  # noqa: E402
from benchmarks.ways import machine, run_row  # noqa: E402


def run(folder: Path, processes: int, steps: int, batch: int, *, fsdp: bool) -> dict[str, Any]:
    """The stage itself, and its own report."""
    from stages.train import Params, train

    section = train_section(steps, 1e-4) | {
        "num_processes": processes,
        "fsdp": fsdp,
        "per_device_train_batch_size": batch // processes // (4 if fsdp else 1),
        "gradient_accumulation_steps": 4 if fsdp else 1,
        "gradient_checkpointing": True if fsdp else "auto",
    }
    out = folder / f"out{processes}"
    train(
        Params(**section),
        folder / "train.arrow",
        folder / "validation.arrow",
        folder / "base",
        ROOT / section["loss"],
        *(out / name for name in ("adapter", "report.json", "loss", "machine.json")),
    )
    curve = (out / "loss" / "train.csv").read_text().splitlines()
    return json.loads((out / "machine.json").read_text()) | {"loss": float(curve[-1].split(",")[1])}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch", type=int, default=256, help="rows a step, of all GPUs together")
    parser.add_argument("--counts", type=int, nargs="*", help="numbers of GPUs")
    parser.add_argument("--fsdp", action="store_true")
    parser.add_argument("--shape", default=None)
    parser.add_argument("--base", type=Path, help="a model of the shape that is there already")
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.way:
        found = run(given.folder, int(given.way), given.steps, given.batch, fsdp=given.fsdp)
        print(json.dumps(found))
        return
    import torch

    there = max(1, torch.cuda.device_count())
    counts = given.counts or ([there] if given.fsdp else [count for count in (1, 2, 4, 8) if count <= there])
    shape = given.shape or ("70b-8" if given.fsdp else "8b")
    print(machine())
    print(f"{shape} shape, NF4, {'FSDP' if given.fsdp else 'DDP'}, BELLE's lengths, {given.batch} rows a step\n")
    print("| GPUs | tokens/s | efficiency | peak GB a GPU | loss of the last step |")
    print("|---:|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if given.base:
            (folder / "base").symlink_to(given.base)
        else:
            make_model(folder / "base", shape)
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
