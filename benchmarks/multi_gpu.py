"""Several GPUs of one machine compared with one: speed, the same results, and how several processes end.

python benchmarks/multi_gpu.py                          everything, on 1, 2, 4, ... GPUs
python benchmarks/multi_gpu.py --parts ddp generate     only these tables
python benchmarks/multi_gpu.py --shape tiny --fsdp-shape tiny --batch 16 --new 4     on a CPU, with gloo

ddp        training of an 8B shape. An optimizer step has the same rows with any number of GPUs, so the losses must be
           equal within rounding. "uneven": the tokens of the process with the most, divided by the mean, averaged over
           the steps; before and after rows are dealt to the processes by length.
fsdp       training of a 70B shape with 8 layers, with and without sharded weights, in the same micro-batches
generate   greedy answers, the prompts split across the GPUs. Start-up is the time of the same stage with one prompt for
           each process and one new token. In float32 the answers must be equal.
interrupt  20 trainings of a tiny model in the same processes, each interrupted at a random moment in one or all of them:
           all must stop after the same step, with one complete checkpoint
kill       a process that is killed in the middle: what is said, after how long, and whether the next run resumes
"""

import argparse
import json
import random
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.shapes import make_model, make_prompts, vocabulary_of  # noqa: E402
from benchmarks.train import prepare, train_section  # noqa: E402
from benchmarks.ways import machine, run_row, train_paths  # noqa: E402

PARTS = ("ddp", "fsdp", "generate", "interrupt", "kill")
EXACT_PROMPTS = 32
"""Prompts that are answered in float32 too."""
KILL_STEPS = 20
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
KILLING_LOSS = """
import os, signal, time
from pathlib import Path
from stages.train.loss import next_token_loss

calls, marker = [], Path({marker!r})

def loss(logits, labels, num_items):
    calls.append(1)
    if os.environ.get("RANK") == "1" and len(calls) == 12 and not marker.exists():
        marker.write_text(str(time.time()))
        os.kill(os.getpid(), signal.SIGKILL)
    return next_token_loss(logits, labels, num_items)
"""


# Each of these runs in a process of its own, and returns what its row of the table needs


def train_once(folder: Path, processes: int, given: argparse.Namespace) -> dict[str, Any]:
    """Runs the train stage."""
    from stages.train.train import Params, train

    # With sharded weights all processes must compute the same number of micro-batches, so their rows are fixed here.
    fixed = 4 if given.part == "fsdp" else 1
    section = train_section(given.steps, 1e-4) | {
        "num_processes": processes,
        "fsdp": given.sharded,
        "per_device_train_batch_size": max(1, given.batch // processes // fixed),
        "gradient_accumulation_steps": fixed,
        "gradient_checkpointing": True if fixed > 1 else "auto",
    }
    out = folder / f"out{processes}{given.sharded}"
    done = train(Params(**section), **train_paths(folder, out))
    assert done is not None  # this process has started the others
    done.clean_up()
    curve = (out / "loss" / "train.csv").read_text().splitlines()
    found = json.loads((out / "machine.json").read_text()) | {"loss": float(curve[-1].split(",")[1])}
    return found | {"uneven": unevenness(folder, processes, given.batch // processes, section["data_seed"])}


def unevenness(folder: Path, processes: int, rows: int, data_seed: int) -> list[float]:
    """The largest number of tokens of a process, divided by the mean, averaged over the steps: before and after dealing."""
    from stages.core.tokens import TokenRows, read_tokens
    from stages.train.batches import Deal, Shuffled

    lengths = TokenRows(read_tokens(folder / "train.arrow")).lengths.tolist()
    step, found = rows * processes, []
    for deal in (None, Deal(lengths, rows, processes)):
        order = [([*lengths, 1])[row] for row in Shuffled(len(lengths), data_seed, fill=-len(lengths) % step, deal=deal)]
        sums = [
            [sum(order[first : first + rows]) for first in range(start, start + step, rows)]
            for start in range(0, len(order), step)
        ]
        found.append(sum(max(each) * processes / sum(each) for each in sums) / len(sums))
    return found


def answer(folder: Path, processes: int, given: argparse.Namespace) -> dict[str, Any]:
    """Runs the generate stage on random prompts of 128 tokens, and once more for its start-up."""
    exact = answer_once(folder, processes, min(EXACT_PROMPTS, given.batch), new=given.new, dtype="float32")
    start_up = answer_once(folder, processes, processes, new=1, dtype="auto")["seconds"]
    return answer_once(folder, processes, given.batch, new=given.new, dtype="auto") | {
        "start_up": start_up,
        "exact": exact["answers"],
    }


def answer_once(folder: Path, processes: int, prompts: int, *, new: int, dtype: str) -> dict[str, Any]:
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
    changed = {
        "num_processes": processes,
        "max_new_tokens": new,
        "batch_size": 128,
        "dtype": dtype,
        "max_predict_samples": 0,
    }
    files = [folder / f"{name}.jsonl" for name in ("prompts", "extra", "text")]
    started = time.monotonic()
    generate(
        Params(**section | changed),
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


def interrupt(folder: Path, processes: int, given: argparse.Namespace) -> dict[str, Any]:
    """Starts the processes that are interrupted."""
    from stages.model.launch import launch

    launch(interrupted_trainings, processes, folder, given.tries)
    return dict(json.loads((folder / "interrupted.json").read_text()))


def interrupted_trainings(folder: Path, tries: int) -> None:
    """In each process: trainings that are interrupted. Process 0 writes interrupted.json."""
    from stages.model import distributed
    from stages.train import train as stage

    number = distributed.rank()
    good, seconds = 0, []
    section = train_section(10_000, 1e-4) | {"per_device_train_batch_size": 2, "logging_steps": 10_000}
    for attempt in range(tries):
        hit = attempt % (distributed.world_size() + 1)  # one process, or all
        draw, together = random.Random(f"{attempt} {number}"), random.Random(attempt)
        sent = together.choice(SIGNALS)
        signals = _Signals(
            sent if hit in (number, distributed.world_size()) else 0,
            first_step=together.randrange(2, 30),
            delay=draw.uniform(0, 0.05),
            twice=attempt % 2 == 1,
        )
        stage.AdapterTrainer = signals.trainer()  # type: ignore[attr-defined]
        checkpoints = folder / f"checkpoints-{attempt}"
        paths = stage._Paths(**train_paths(folder, folder / "never"))
        ended = 0
        try:
            stage._train_here(stage.Params(**section), paths, checkpoints)
        except KeyboardInterrupt as interruption:
            ended = interruption.args[0]
        took = time.monotonic() - signals.sent_at if signals.sent_at else 0.0
        complete = [path.parent.name for path in checkpoints.glob("checkpoint-*/complete")]
        all_of_them = [path.name for path in checkpoints.glob("checkpoint-*")]
        ends = distributed.gather((ended, signals.step, complete, all_of_them, took))
        same = all(end[:4] == (sent, ends[0][1], [f"checkpoint-{ends[0][1]}"], [f"checkpoint-{ends[0][1]}"]) for end in ends)
        good += same
        seconds.append(max(end[4] for end in ends))
        if not same and number == 0:
            print(f"attempt {attempt}: {ends}", file=sys.stderr, flush=True)
    if number == 0:
        (folder / "interrupted.json").write_text(json.dumps({"good": good, "tries": tries, "slowest": max(seconds)}))


class _Signals:
    """Sends a signal to its own process at a random moment of a training."""

    def __init__(self, sent: int, *, first_step: int, delay: float, twice: bool) -> None:
        self.sent, self.first_step, self.delay, self.twice = sent, first_step, delay, twice
        self.step, self.sent_at = 0, 0.0

    def trainer(self) -> Any:
        """A trainer class that sends it."""
        import os
        import threading

        from transformers import TrainerCallback

        from stages.train.trainer import AdapterTrainer

        signals = self

        def send() -> None:
            signals.sent_at = time.monotonic()
            for _ in range(1 + signals.twice):  # as torchrun does
                os.kill(os.getpid(), signals.sent)

        class Callback(TrainerCallback):  # type: ignore[misc]
            def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                if signals.sent and state.global_step == signals.first_step:
                    threading.Timer(signals.delay, send).start()

            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                signals.step = state.global_step

        class Interrupted(AdapterTrainer):
            def __init__(self, *given: Any, **named: Any) -> None:
                super().__init__(*given, **named)
                self.add_callback(Callback())

        return Interrupted


def kill(folder: Path, processes: int, _given: argparse.Namespace) -> dict[str, Any]:
    """Runs the train stage twice; the first time, process 1 is killed."""
    from stages.core.problem import Problem
    from stages.train.train import Params, train

    marker, loss = folder / "killed", folder / "killing.py"
    loss.write_text(KILLING_LOSS.format(marker=str(marker)))
    section = train_section(KILL_STEPS, 1e-4) | {
        "num_processes": processes,
        "per_device_train_batch_size": 2,
        "save_steps": 5,
    }
    params, paths = Params(**section | {"loss": str(loss)}), train_paths(folder, folder / "killed_out")
    try:
        train(params, **paths)
        message = "no message: it was not killed"
    except Problem as problem:
        message = "; ".join(problem.messages)
    seconds = time.time() - float(marker.read_text())
    done = train(params, **paths)
    assert done is not None
    done.clean_up()
    resumed = json.loads((folder / "killed_out" / "machine.json").read_text())["resumed_from"]
    return {"message": message, "seconds": seconds, "resumed": resumed}


WAYS = {"ddp": train_once, "fsdp": train_once, "generate": answer, "interrupt": interrupt, "kill": kill}


# The tables


def rows_of(part: str, folder: Path, given: argparse.Namespace, counts: Sequence[int]) -> Any:
    """(number of processes, what its row found) for each row that did not fail."""
    for count in counts:
        found = run_row(__file__, str(count), str(count), *arguments_of(part, folder, given))
        if found is not None:
            yield count, found


def arguments_of(part: str, folder: Path, given: argparse.Namespace) -> list[object]:
    numbers = [f"--{name}={getattr(given, name)}" for name in ("steps", "batch", "new", "tries")]
    return ["--part", part, "--folder", folder, *numbers, *["--sharded"] * given.sharded]


def ddp_table(folder: Path, given: argparse.Namespace, counts: Sequence[int]) -> None:
    print(f"\n{given.shape} shape, NF4, DDP, BELLE's lengths, {given.batch} rows per step\n")
    print("| GPUs | tokens/s | efficiency | peak GB per GPU | uneven before | uneven | loss of the last step |")
    print("|---:|---:|---:|---:|---:|---:|---:|")
    prepare(folder, "belle", given.batch * given.steps)
    first = 0.0
    for count, found in rows_of("ddp", folder, given, counts):
        rate = found["tokens_per_second"]
        first = first or rate / count
        before, after = found["uneven"]
        print(
            f"| {count} | {rate:,.0f} | {100 * rate / count / first:.0f} % | {found['peak_memory_bytes'] / 1e9:.1f} | "
            f"{before:.4f} | {after:.4f} | {found['loss']:.4f} |",
            flush=True,
        )


def fsdp_table(folder: Path, given: argparse.Namespace, counts: Sequence[int]) -> None:
    print(f"\n{given.fsdp_shape} shape, NF4, {given.batch} rows per step, the same micro-batches\n")
    print("| GPUs | weights | tokens/s | peak GB per GPU | loss of the last step |")
    print("|---:|---|---:|---:|---:|")
    prepare(folder, "belle", given.batch * given.steps)
    for given.sharded in (False, True):
        for count, found in rows_of("fsdp", folder, given, counts):
            print(
                f"| {count} | {'sharded' if given.sharded else 'complete'} | {found['tokens_per_second']:,.0f} | "
                f"{found['peak_memory_bytes'] / 1e9:.1f} | {found['loss']:.4f} |",
                flush=True,
            )
    given.sharded = False


def generate_table(folder: Path, given: argparse.Namespace, counts: Sequence[int]) -> None:
    print(f"\n{given.shape} shape, {given.batch} prompts of 128 tokens, up to {given.new} new ones\n")
    print("| GPUs | seconds | start-up | tokens/s after it | speed-up | answers that differ | in float32 |")
    print("|---:|---:|---:|---:|---:|---:|---:|")
    first: dict[str, Any] = {}
    for count, found in rows_of("generate", folder, given, counts):
        found["rate"] = found["tokens"] / max(1e-9, found["seconds"] - found["start_up"])
        first = first or found
        differ, exact = (
            f"{sum(a != b for a, b in zip(found[name], first[name], strict=True))} of {len(found[name])}"
            for name in ("answers", "exact")
        )
        print(
            f"| {count} | {found['seconds']:.1f} | {found['start_up']:.1f} | {found['rate']:,.0f} | "
            f"{found['rate'] / first['rate']:.2f} | {differ} | {exact} |",
            flush=True,
        )


def interrupt_table(folder: Path, given: argparse.Namespace, counts: Sequence[int]) -> None:
    print("\ntiny shape, interrupted\n")
    print("| processes | stopped together, with one complete checkpoint | slowest, from the signal to the end |")
    print("|---:|---:|---:|")
    for count, found in rows_of("interrupt", folder, given, counts):
        print(f"| {count} | {found['good']} of {found['tries']} | {found['slowest']:.1f} s |", flush=True)


def kill_table(folder: Path, given: argparse.Namespace, counts: Sequence[int]) -> None:
    print("\ntiny shape, process 1 killed in its 12th step\n")
    print("| processes | said after | the next run resumes from | message |")
    print("|---:|---:|---|---|")
    for count, found in rows_of("kill", folder, given, counts):
        print(f"| {count} | {found['seconds']:.1f} s | {found['resumed']} | {found['message']} |", flush=True)


TABLES = {
    "ddp": ddp_table,
    "fsdp": fsdp_table,
    "generate": generate_table,
    "interrupt": interrupt_table,
    "kill": kill_table,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=PARTS)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch", type=int, default=256, help="rows per step, or prompts, of all GPUs together")
    parser.add_argument("--new", type=int, default=256, help="the maximum number of tokens in an answer")
    parser.add_argument("--tries", type=int, default=20, help="interrupted trainings")
    parser.add_argument("--counts", type=int, nargs="*", help="numbers of GPUs; on a CPU, of processes")
    parser.add_argument("--shape", default="8b")
    parser.add_argument("--fsdp-shape", default="70b-8")
    parser.add_argument("--base", type=Path, help="the folder of an existing model of --shape")
    parser.add_argument("--way", help=argparse.SUPPRESS)
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--sharded", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.way:
        print(json.dumps(WAYS[given.part](given.folder, int(given.way), given)))
        return
    import torch

    there = torch.cuda.device_count() or 2
    counts = given.counts or [count for count in (1, 2, 4, 8) if count <= there]
    several = [count for count in counts if count > 1]
    shapes = {"ddp": given.shape, "generate": given.shape, "fsdp": given.fsdp_shape, "interrupt": "tiny", "kill": "tiny"}
    print(machine())
    with tempfile.TemporaryDirectory() as name:
        for part in given.parts:
            folder = Path(name) / shapes[part]
            if not folder.exists():
                folder.mkdir()
                if given.base and part in ("ddp", "generate"):
                    (folder / "base").symlink_to(given.base.absolute())
                else:
                    make_model(folder / "base", shapes[part])
            if shapes[part] == "tiny" and part in ("interrupt", "kill"):
                prepare(folder, "belle", 512)
            TABLES[part](folder, given, counts if part in ("ddp", "generate") else several)


if __name__ == "__main__":
    main()
