"""Damaged inputs, full disks and hostile rows on the tiny chain of the tests: is any of it used in silence, or a traceback?

    python benchmarks/fault_inputs.py --flips 500 --disks 20 --rows 100000 --minutes 20

Each stage is run directly (`python -m stages ...`), where DVC does not look first. What is counted:

    silent       the stage ends well with other outputs than without the fault
    tracebacks   it ends in a traceback
    unnamed      it ends in a message that does not name the damaged input, or the full disk
    harmless     it ends well with the same outputs
"""

import argparse
import contextlib
import io
import json
import os
import random
import shutil
import string
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from stages.core.params import read_yaml  # noqa: E402

STAGES = ("ingest", "encode", "train", "merge", "generate@base", "generate@merged", "score")
MB = 10**6
COLUMNS = ("refused", "harmless", "silent", "tracebacks", "unnamed")


class Outcome(NamedTuple):
    """What came of one case."""

    what: str
    """The case, to read."""
    fault: str = ""
    """A column of the table."""
    log: str = ""


class Project:
    """The tiny pipeline after a run by DVC."""

    def __init__(self, folder: Path) -> None:
        from tests import preloaded
        from tests.tiny import Workspace, make_model

        self.root = folder / "project"
        self.root.mkdir()
        make_model(folder / "model")
        with preloaded.python(_made(folder / "first"), hash_seed=1):
            Workspace(self.root, folder / "model").repro()
        lock = read_yaml(self.root / "dvc.lock")["stages"]
        self.made = {out["path"] for entry in lock.values() for out in entry["outs"]}
        self.outs = {stage: [out["path"] for out in lock[stage]["outs"]] for stage in STAGES}
        self.inputs = {stage: [dep["path"] for dep in lock[stage]["deps"] if self.is_made(dep["path"])] for stage in STAGES}
        self.command = {stage: lock[stage]["cmd"].split()[1:] for stage in STAGES}
        self.before = {path: self.read(path) for path in self.made}

    def is_made(self, path: str) -> bool:
        """Whether a path is an output of a stage, or in one."""
        return any(each in self.made for each in (path, *map(str, Path(path).parents)))

    def files(self, path: str) -> list[Path]:
        """The files at a path."""
        place = self.root / path
        return sorted(file for file in place.rglob("*") if file.is_file()) if place.is_dir() else [place]

    def read(self, path: str) -> dict[str, bytes]:
        """What is at a path."""
        return {str(file.relative_to(self.root)): file.read_bytes() for file in self.files(path) if file.is_file()}

    def put_back(self, *paths: str) -> None:
        """Makes outputs as they were."""
        for path in paths:
            shutil.rmtree(self.root / path, ignore_errors=True)
            (self.root / path).unlink(missing_ok=True) if not (self.root / path).is_dir() else None
            for name, data in self.before[path].items():
                (self.root / name).parent.mkdir(parents=True, exist_ok=True)
                (self.root / name).write_bytes(data)

    def run(self, stage: str, root: Path | None = None) -> "subprocess.CompletedProcess[str]":
        """The stage's own command, without DVC."""
        command = ["python", *self.command[stage]]
        return subprocess.run(command, cwd=root or self.root, capture_output=True, text=True, check=False)


def flip(project: Project, chance: random.Random) -> Outcome:
    """Damages one file of one input of a stage: a bit, a cut, a page of zeros, a missing or an additional file."""
    stage = chance.choice(STAGES)
    path = chance.choice(project.inputs[stage])
    output = next(each for each in (path, *map(str, Path(path).parents)) if each in project.made)
    file = chance.choice(project.files(path))
    what = f"{stage}: {damage(file, chance)} ({file.relative_to(project.root)})"
    done = project.run(stage)
    outcome = judge(project, stage, what, done, [path, output])
    project.put_back(output, *project.outs[stage])
    return outcome


def damage(file: Path, chance: random.Random) -> str:
    """Damages a file, and says how."""
    data = bytearray(file.read_bytes())
    how = chance.choice(("flip", "flip", "flip", "cut", "zeros", "missing"))
    if how == "missing":
        file.unlink()
    elif how == "cut" or not data:
        os.truncate(file, chance.randrange(max(1, len(data))))
    elif how == "zeros":
        at = chance.randrange(len(data))
        size = min(4096, len(data) - at)
        data[at : at + size] = bytes(b ^ 255 if not any(data[at : at + size]) else 0 for b in data[at : at + size])
        file.write_bytes(data)
    else:
        bit = chance.randrange(8 * len(data))
        data[bit // 8] ^= 1 << bit % 8
        file.write_bytes(data)
    return how


def judge(project: Project, stage: str, what: str, done: "subprocess.CompletedProcess[str]", names: list[str]) -> Outcome:
    """What came of a run after a fault that a message should name with one of `names`."""
    log = done.stdout[-2000:] + done.stderr[-4000:]
    if "Traceback" in done.stderr:
        return Outcome(what, "tracebacks", log)
    if done.returncode:
        return Outcome(what, "refused" if any(name in done.stderr for name in names) else "unnamed", log)
    same = all(project.read(path) == project.before[path] for path in project.outs[stage] if "provenance" not in path)
    return Outcome(what, "harmless" if same else "silent", log)


def full_disk(project: Project, chance: random.Random) -> Outcome:
    """Runs a stage on a small file system that has a few kB left. Needs the right to mount one."""
    stage = chance.choice(STAGES)
    needed = sum(len(data) for path in project.outs[stage] for data in project.before[path].values())
    left = chance.randrange(4096, max(8192, 2 * needed))
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", folder], check=True)
        try:
            root = place / "project"
            ignored = shutil.ignore_patterns("cache", "__pycache__", ".git", "docs")
            shutil.copytree(project.root, root, ignore=ignored)
            for path in project.outs[stage]:
                shutil.rmtree(root / path, ignore_errors=True)
                (root / path).unlink(missing_ok=True) if not (root / path).is_dir() else None
            free = shutil.disk_usage(place).free
            with (place / "ballast").open("wb") as file:
                file.write(bytes(max(0, free - left)))
            done = project.run(stage, root)
            what = f"{stage}: a disk with {left / 1000:.0f} kB left for {needed / 1000:.0f} kB of outputs"
            log = done.stdout[-2000:] + done.stderr[-4000:]
            whole = [
                (root / name).read_bytes() == data
                for path in project.outs[stage]
                if (root / path).exists() and "provenance" not in path
                for name, data in project.before[path].items()
                if (root / name).exists()
            ]
            if not all(whole):
                return Outcome(what, "silent", log)
            if "Traceback" in done.stderr:
                return Outcome(what, "tracebacks", log)
            if done.returncode == 0:
                return Outcome(what, "harmless", log)
            return Outcome(what, "refused" if "disk" in done.stderr else "unnamed", log)
        finally:
            subprocess.run(["umount", "-l", folder], check=True)


# Hostile rows

KEYS = (
    "instruction",
    "input",
    "output",
    "question",
    "answer",
    "messages",
    "conversations",
    "role",
    "from",
    "content",
    "value",
)
KEYS += (
    "system",
    "history",
    "tools",
    "text",
    "prompt",
    "chosen",
    "rejected",
    "label",
    "reasoning",
    "tool_calls",
    "train",
    "",
)
ODD = (
    "",
    " ",
    "\u0000",
    "\ud800",
    "\udc00",
    "\u2028",
    "\ufeff",
    "<|im_end|>",
    "<think>",
    "</think>",
    "{{x}}",
    "{% for %}",
    "'\"\\",
)
ODD += (
    "user",
    "assistant",
    "system",
    "tool",
    "gpt",
    "human",
    "function_call",
    "\U0001f600",
    "x" * 30_000,
    "e\u0301",
    "\x1b[2J",
    "=1+1",
)


def value(chance: random.Random, depth: int = 0) -> Any:
    """Anything that JSON can hold, and some that it cannot."""
    kind = chance.randrange(12 if depth < 4 else 8)
    if kind < 3:
        return chance.choice(ODD)
    if kind < 5:
        return "".join(chance.choices(string.printable + "äß中文", k=chance.randrange(40)))
    if kind < 8:
        return chance.choice((None, True, False, 0, -1, 10**30, 1e308, float("nan"), float("inf"), -0.0, 2**63, [], {}))
    if kind < 10:
        return [value(chance, depth + 1) for _ in range(chance.randrange(5))]
    return {chance.choice(KEYS): value(chance, depth + 1) for _ in range(chance.randrange(5))}


def row(chance: random.Random) -> Any:
    """A row that is almost one: a good one with a change, or anything."""
    good: list[Any] = [
        {"instruction": f"q{chance.random()}", "input": "", "output": "a"},
        {"messages": [{"role": "user", "content": f"q{chance.random()}"}, {"role": "assistant", "content": "a"}]},
        {"conversations": [{"from": "human", "value": f"q{chance.random()}"}, {"from": "gpt", "value": "a"}]},
        {"text": f"t{chance.random()}"},
    ]
    kind = chance.randrange(5)
    if kind == 0:
        return value(chance)
    found = chance.choice(good)
    if kind == 1:
        return found
    place: Any = found
    while True:
        key = chance.choice(list(place)) if isinstance(place, dict) else chance.randrange(len(place))
        if isinstance(place[key], (dict, list)) and place[key] and chance.random() < 0.8:
            place = place[key]
            continue
        if kind == 2 and isinstance(place, dict):
            place[chance.choice(KEYS)] = value(chance)
        else:
            place[key] = value(chance)
        return found


def line(chance: random.Random) -> bytes:
    """One line of a file: a row, or a row with damaged bytes."""
    data = json.dumps(row(chance), ensure_ascii=chance.random() < 0.5).encode(errors="surrogatepass")
    if chance.random() < 0.1 and data:
        at = chance.randrange(len(data))
        data = chance.choice(
            (data[:at], data[:at] + bytes([chance.randrange(1, 256)]) + data[at + 1 :], data + data, b"[" * 5000)
        )
    data = data.replace(b"\n", b" ").replace(b"\r", b" ")
    return data if data.strip() else b"{"  # an empty line is no row


def hostile_rows(folder: Path, chance: random.Random, count: int) -> Outcome:
    """Runs ingest and encode, in this process, on a file of `count` hostile rows, and checks their books."""
    from ruamel.yaml import YAML

    from stages.core.problem import Problem
    from stages.encode import encode
    from stages.ingest import ingest
    from tests.tiny import make_tokenizer, params_of_tests

    tokenizer = folder / "tokenizer"
    if not tokenizer.exists():
        tokenizer.mkdir()
        make_tokenizer(tokenizer)
        (tokenizer / "config.json").write_text('{"model_type": "llama"}')
    work = Path(tempfile.mkdtemp(dir=folder))
    for name in ("raw", "hub", "data"):
        (work / name).mkdir()
    written = io.BytesIO()
    for _ in range(count):
        written.write(line(chance) + b"\n")
    (work / "raw" / "rows.jsonl").write_bytes(written.getvalue())
    (work / "prompts.json").write_text("[]")
    params = YAML(typ="safe").load(_dumped(params_of_tests()))
    params["ingest"] |= {"max_rejected_percent": 100.0, "preference": "chosen"}
    params["encode"]["gates"] = dict.fromkeys(params["encode"]["gates"], 100.0)
    params["encode"]["template"] = str(ROOT / params["encode"]["template"])
    what = f"{count} rows"
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            given = {"raw": work / "raw", "hub": work / "hub"}
            ingest.ingest(
                ingest.Params(**params["ingest"]), **given, examples=work / "data/examples", report=work / "i.json"
            )
            encode.encode(
                encode.Params(**params["encode"]),
                examples=work / "data/examples",
                prompts=work / "prompts.json",
                tokenizer=tokenizer,
                tokens=work / "data/tokens",
                report=work / "e.json",
                masks=work / "m.html",
                lengths=work / "l.csv",
            )
    except Problem as problem:
        return Outcome(f"{what}: {problem}"[:300], "refused")
    except Exception as error:
        import traceback

        (folder / "failed.jsonl").write_bytes(written.getvalue())
        return Outcome(what, "tracebacks", "".join(traceback.format_exception(error)))
    report = json.loads((work / "i.json").read_text())
    kept = {split: _lines(work / f"data/examples/{split}.jsonl") for split in ("train", "validation", "test", "rejected")}
    wrong = []
    if report["rows_read"] != count:
        wrong.append(f"{count} rows written, {report['rows_read']} read")
    if report["rows_kept"] + report["rows_rejected"] != count or sum(kept.values()) != count:
        wrong.append(f"kept {report['rows_kept']}, rejected {report['rows_rejected']}, in the files {kept}")
    if sum(report["rejected_by_reason"].values()) != report["rows_rejected"]:
        wrong.append(f"reasons {report['rejected_by_reason']}")
    encoded = json.loads((work / "e.json").read_text())
    if encoded["rows_rejected"] != sum(encoded["rejected_by_reason"].values()):
        wrong.append(f"reasons of encode {encoded['rejected_by_reason']}")
    shutil.rmtree(work)
    return Outcome(f"{what}, {report['rows_kept']} kept", "silent" if wrong else "harmless", "\n".join(wrong))


def _lines(path: Path) -> int:
    return sum(1 for each in path.read_bytes().split(b"\n") if each)


def _dumped(params: Any) -> str:
    from ruamel.yaml import YAML

    text = io.StringIO()
    YAML().dump(params, text)
    return text.getvalue()


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def cases(project: Project | None, folder: Path, arguments: argparse.Namespace) -> Iterator[tuple[str, int, Outcome]]:
    """The kind, how many cases it stands for, and what came of it."""
    chance = random.Random(arguments.seed)
    kinds: list[tuple[str, int, Callable[[], Outcome]]] = []
    if project:
        kinds += [("flips and cuts of inputs", arguments.flips, lambda: flip(project, chance))]
        kinds += [("full disks", arguments.disks, lambda: full_disk(project, chance))]
    for name, wanted, run in kinds:
        for _ in range(wanted):
            yield name, 1, run()
    size = 2000 - 1  # below this, encode starts no workers
    for at in range(0, arguments.rows, size):
        rows = max(500, min(size, arguments.rows - at))  # of fewer, a split may get none
        yield "hostile rows", rows, hostile_rows(folder, chance, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flips", type=int, default=100)
    parser.add_argument("--disks", type=int, default=10)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--minutes", type=float, default=10.0, help="the cases end after this time")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "DVC_NO_ANALYTICS": "true", "OMP_NUM_THREADS": "1"}
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    counts: dict[str, Counter[str]] = {}
    with tempfile.TemporaryDirectory(prefix="loratory-inputs-") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        project = Project(folder) if arguments.flips or arguments.disks else None
        from tests import preloaded

        stack.enter_context(preloaded.python(_made(folder / "second"), hash_seed=2))
        until = time.monotonic() + 60 * arguments.minutes
        for kind, size, outcome in cases(project, folder, arguments):
            print(f"{kind}: {outcome.what}: {outcome.fault}", flush=True)
            if outcome.fault in ("silent", "tracebacks", "unnamed"):
                print(outcome.log, flush=True)
            counts.setdefault(kind, Counter())["cases"] += size
            counts[kind][outcome.fault] += size
            if time.monotonic() > until:
                break
    print(f"\n| kind | cases | {' | '.join(COLUMNS)} |\n|---|{'---:|' * (len(COLUMNS) + 1)}")
    for kind, found in counts.items():
        print(f"| {kind} | {found['cases']:,} | {' | '.join(f'{found[column]:,}' for column in COLUMNS)} |")


if __name__ == "__main__":
    main()
