"""Generated tokens per second: Loratory's decoder and Transformers' generate, and how often their greedy answers differ.

    python benchmarks/generate.py --shape 8b          an 8B model with random weights in bfloat16, on a GPU
    python benchmarks/generate.py                     models/merged on data/tokens/test.arrow, after `make repro`

`fixed` answers all have the maximum length. `varied` answers end at random, as real answers do: one token in 128 is a stop
token. "Top-1 tokens" is the share of generated tokens that are also the most likely ones in a single forward pass over the
complete answer. In 16 bits and with random weights there are many near ties, so compare the two rows of the table with each
other, not with 100 %.
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
from benchmarks.ways import machine, peak_memory, run_row  # noqa: E402

WAYS = {"loratory": "Loratory", "transformers": "Transformers' generate"}
CHECKED = 16
"""Answers whose top-1 tokens are counted."""


def load_prompts(folder: Path, kind: str, *, batch: int) -> tuple[list[list[int]], list[int]]:
    """The prompts and the stop tokens."""
    if not (folder / "prompts.json").exists():
        from stages.core.tokens import read_tokens, stop_token_ids

        table = read_tokens(ROOT / "data" / "tokens" / "test.arrow")
        return [row["prompt_ids"] for row in table.to_pylist()], stop_token_ids(table)
    prompts = json.loads((folder / "prompts.json").read_text())
    return (prompts[:batch], []) if kind == "fixed" else (prompts, list(range(0, vocabulary_of(folder), 128)))


def run(way: str, folder: Path, *, kind: str, batch: int, new: int) -> dict[str, Any]:
    """Answers the prompts one way, and writes the answers to <way>-<kind>.json in the folder."""
    import torch

    from stages.core.params import read_yaml
    from stages.generate import transformers_backend
    from stages.generate.generate import Params, generation_settings

    prompts, stops = load_prompts(folder, kind, batch=batch)
    section = read_yaml(ROOT / "params.yaml")["generate"] | {"max_new_tokens": new, "batch_size": batch}
    if way == "transformers":
        transformers_backend.can_decode = lambda *_: "it is what this row measures"
    backend = transformers_backend.TransformersBackend(folder, generation_settings(Params(**section)), template_stops=stops)
    if kind == "fixed":
        backend.stops, backend.config.eos_token_id = [], None
    rows = [{"id": str(number), "prompt_ids": prompt} for number, prompt in enumerate(prompts)]
    rows.sort(key=lambda row: len(row["prompt_ids"]))

    def answer(some: list[dict[str, Any]]) -> dict[int, list[int]]:
        return {int(some[index]["id"]): answer.tokens for group in backend.generate(some) for index, answer in group}

    def set_max_new_tokens(tokens: int) -> None:
        backend.settings = backend.settings._replace(max_new_tokens=tokens)
        backend.config.max_new_tokens = tokens

    set_max_new_tokens(4)
    answer(rows[:batch])  # a warm-up, which compiles the kernels
    set_max_new_tokens(new)
    started = time.monotonic()
    answers = answer(rows)
    seconds = time.monotonic() - started
    (folder / f"{way}-{kind}.json").write_text(json.dumps(answers))
    is_top1: list[bool] = []
    for number in list(answers)[:CHECKED]:
        ids = torch.tensor([prompts[number] + answers[number]], device=backend.model.device)
        backend.model.set_attn_implementation("sdpa")
        with torch.no_grad():
            logits = backend.model(input_ids=ids).logits[0, len(prompts[number]) - 1 : -1]
        is_top1 += (logits.argmax(-1) == ids[0, len(prompts[number]) :]).tolist()
    return {
        "tokens": sum(map(len, answers.values())),
        "seconds": seconds,
        "top1": sum(is_top1) / len(is_top1),
        "peak": peak_memory(),
    }


def print_table(folder: Path, title: str, *, kind: str, batch: int, new: int) -> None:
    print(f"\n{title}\n")
    print("| | tokens/s | seconds | top-1 tokens | peak GB |")
    print("|---|---:|---:|---:|---:|")
    for way, name in WAYS.items():
        found = run_row(__file__, way, name, "--folder", folder, "--kind", kind, "--batch", batch, "--new", new)
        if found is None:
            continue
        print(
            f"| {name} | {found['tokens'] / found['seconds']:,.0f} | {found['seconds']:.1f} | "
            f"{100 * found['top1']:.1f} % | {found['peak'] / 1e9:.1f} |",
            flush=True,
        )
    files = [folder / f"{way}-{kind}.json" for way in WAYS]
    if not all(file.exists() for file in files):
        return  # one of them failed; its row of the table says so
    both = [json.loads(file.read_text()) for file in files]
    differ = sum(both[0][number] != both[1][number] for number in both[0])
    print(f"\n{differ} of {len(both[0])} answers differ between the two.")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", help="a model with random weights instead of models/merged")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--new", type=int, default=256, help="the maximum number of new tokens per answer")
    parser.add_argument("--kinds", nargs="*", default=["fixed", "varied"])
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--kind", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.way:
        print(json.dumps(run(given.way, given.folder, kind=given.kind, batch=given.batch, new=given.new)))
        return
    print(f"{machine()}, batch {given.batch}")
    with tempfile.TemporaryDirectory() as name:
        folder = given.folder or Path(name) / "model"
        if not given.shape:
            folder.symlink_to(ROOT / "models" / "merged")
            title = "models/merged on data/tokens/test.arrow"
            print_table(folder, title, kind="own", batch=given.batch, new=given.new)
            return
        if not folder.exists():
            make_model(folder, given.shape)
        (folder / "prompts.json").write_text(json.dumps(make_prompts(4 * given.batch, vocabulary_of(folder))))
        for kind in given.kinds:
            title = f"{given.shape} shape, prompts of 128 tokens, {kind} answers of up to {given.new}"
            print_table(folder, title, kind=kind, batch=given.batch, new=given.new)


if __name__ == "__main__":
    main()
