"""Kills and damaged files on the tiny chain of the tests: is finished work lost, does a rerun refuse, is a change silent?

    python benchmarks/faults.py --minutes 10                       all kinds in turn
    python benchmarks/faults.py --minutes 5 --kinds kill-dvc flip-checkpoint --seed 3

The chain is made once, and the project's folder is kept as it was before each stage. A case restores one of these states,
does one harm, runs `dvc repro` for the stage, and compares the hashes in dvc.lock with those of an undisturbed run. What is
counted:

    losses      a stage that had made all of its outputs is computed again
    refusals    the rerun fails, though no process of the first run lives (but for a .dvc/tmp/rwlock or dvc.lock that DVC
                did not write whole: it is deleted or restored, as the README says)
    silent      the rerun ends well with other bytes
    unnamed     a damaged file would have been used next, and no line names it

A kind is a function in KINDS that does one case on the `Chain` and returns an `Outcome`.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from stages.core.params import read_yaml  # noqa: E402

STAGES = ("fetch", "fetch_data", "ingest", "encode", "train", "merge", "generate@base", "generate@merged", "score")
PATIENCE_S = 600
"""After this time a case is given up and counts as a refusal."""
TAKEN_UP = "takes up the result of an earlier run"


class Outcome(NamedTuple):
    """What came of one case."""

    what: str
    """The case, to read."""
    fault: str = ""
    """"" or a column of the table: losses, refusals, silent, unnamed; or "late": the harm came after the end."""
    log: str = ""


class Chain:
    """The tiny pipeline in a folder of its own, with its states before each stage and what each stage makes."""

    def __init__(self, folder: Path) -> None:
        self.project, self.states = folder / "project", folder / "states"
        self.seconds: dict[str, float] = {}
        self.environment = os.environ | {
            "CUDA_VISIBLE_DEVICES": "",
            "DVC_NO_ANALYTICS": "true",
            "DVC_SITE_CACHE_DIR": str(folder / "site"),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        }
        self._logs = folder / "log"
        self._make(folder / "model")

    def _make(self, model: Path) -> None:
        from tests.tiny import Workspace, make_model

        make_model(model)
        self.project.mkdir()
        Workspace(self.project, model)
        for stage in STAGES:
            self.save(stage)
            started = time.monotonic()
            status, log = self.finish(self.start(stage))
            if status:
                sys.exit(f"the chain itself fails at {stage}:\n{log}")
            self.seconds[stage] = time.monotonic() - started
            print(f"{stage}: {self.seconds[stage]:.0f} s", flush=True)
        self.expected = {stage: self.recorded(stage) for stage in STAGES}

    def save(self, name: str) -> None:
        """Keeps the project's folder as it is."""
        shutil.copytree(self.project, self.states / name, symlinks=True)

    def restore(self, name: str) -> None:
        """Puts a state back."""
        shutil.rmtree(self.project)
        shutil.copytree(self.states / name, self.project, symlinks=True)

    def start(self, stage: str) -> "subprocess.Popen[bytes]":
        """Starts `dvc repro` for one stage, in a session of its own."""
        with self._logs.open("wb") as log:
            return subprocess.Popen(
                ["dvc", "repro", "--single-item", stage],
                cwd=self.project,
                env=self.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def finish(self, dvc: "subprocess.Popen[bytes]") -> tuple[int, str]:
        """Waits until no process of a session lives. Returns the status of dvc and what was printed."""
        until = time.monotonic() + PATIENCE_S
        while dvc.poll() is None or any(members(dvc.pid)):
            if time.monotonic() > until:
                with suppress(ProcessLookupError):
                    os.killpg(dvc.pid, signal.SIGKILL)
            time.sleep(0.05)
        return dvc.returncode, self._logs.read_text(errors="replace")

    def recorded(self, stage: str) -> dict[str, str]:
        """The outputs of a stage in dvc.lock, with their hashes."""
        entry = read_yaml(self.project / "dvc.lock")["stages"].get(stage, {})
        return {out["path"]: out["md5"] for out in entry.get("outs", [])}

    def made_all(self, stage: str) -> bool:
        """Whether all outputs of a stage are there, those of a finished run."""
        return all((self.project / path).exists() for path in self.expected[stage])

    def judge(self, stage: str, what: str, *, finished: bool = False, damaged: str = "") -> Outcome:
        """Runs a stage again after a harm, and says what came of it.

        Args:
            stage: The stage.
            what: The case.
            finished: Whether the stage had ended, so that it must not be computed again.
            damaged: What a line must name.
        """
        status, log = self.finish(self.start(stage))
        if status and self.mend_dvc(stage, log):
            what += ", which left a file that DVC cannot read"
            status, log = self.finish(self.start(stage))
        if status:
            return Outcome(what, "refusals", log)
        if self.recorded(stage) != self.expected[stage]:
            return Outcome(what, "silent", log)
        if damaged and damaged not in log:
            return Outcome(what, "unnamed", log)
        if finished and not self._needed_no_work(stage, log):
            return Outcome(what, "losses", log)
        return Outcome(what)

    def mend_dvc(self, stage: str, log: str) -> bool:
        """Does what the README says about a file that DVC did not write whole. Returns whether there is one."""
        if "Unable to read RWLock-file" in log:
            (self.project / ".dvc" / "tmp" / "rwlock").unlink()
        elif "dvc.lock' validation failed" in log or "dvc.lock' is invalid" in log or "YAML file structure" in log:
            committed = self.states / stage / "dvc.lock"  # git checkout dvc.lock
            (self.project / "dvc.lock").unlink()
            if committed.exists():
                shutil.copy(committed, self.project / "dvc.lock")
        else:
            return False
        return True

    def _needed_no_work(self, stage: str, log: str) -> bool:
        if TAKEN_UP in log or f"> python -m stages {stage.partition('@')[0]} " not in log:
            return True
        if stage == "train":
            steps = json.loads((self.project / "reports" / "train.json").read_text())["steps"]
            return f"resuming from checkpoint-{steps}\n" in log
        return stage.startswith("generate") and "using Transformers' generate" not in log  # no model was loaded

    @cached_property
    def interrupted(self) -> str:
        """The state after a training that was killed with two whole checkpoints."""
        return self._killed_when("train", "train-interrupted", lambda: len([*self.checkpoints()]) > 1)

    @cached_property
    def unrecorded(self) -> str:
        """The state after a training that has ended, of which dvc was killed before it recorded the result."""
        return self._killed_when("train", "train-unrecorded", lambda: any(self.kept_results("train")))

    def _killed_when(self, stage: str, name: str, reached: Callable[[], bool]) -> str:
        self.restore(stage)
        dvc = self.start(stage)
        while not reached():
            if dvc.poll() is not None:
                sys.exit(f"{stage} has ended before it could be killed")
            time.sleep(0.01)
        os.killpg(dvc.pid, signal.SIGKILL)
        self.finish(dvc)
        self.save(name)
        return name

    def checkpoints(self) -> Iterator[Path]:
        """The complete checkpoints, the oldest first."""
        marks = self.project.glob(".checkpoints/train-*/checkpoint-*/complete")
        yield from sorted((mark.parent for mark in marks), key=lambda path: int(path.name.partition("-")[2]))

    def kept_results(self, stage: str) -> Iterator[Path]:
        """The results of a stage that are kept until they are recorded."""
        marks = self.project.glob(f".checkpoints/results/{stage}-*/result.json")
        yield from (mark.parent for mark in marks if not mark.parent.suffix)


def members(session: int) -> Iterator[tuple[int, str]]:
    """The processes of a session that are not zombies: pid and command line."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, _, _, number = (folder / "stat").read_text().rpartition(")")[2].split()[:4]
            if int(number) == session and state != "Z":
                yield int(folder.name), (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue


# Kills


def kill(target: str) -> Callable[[Chain, random.Random], Outcome]:
    """A kind that kills "stage", "dvc" or the whole "group" with SIGKILL at a random moment, half of them near the end."""

    def case(chain: Chain, chance: random.Random) -> Outcome:
        stage = chance.choice(STAGES)
        chain.restore(stage)
        near_end = chance.random() < 0.5
        dvc = chain.start(stage)
        if near_end:
            while not chain.made_all(stage) and dvc.poll() is None:
                time.sleep(0.005)
        delay = chance.uniform(0, 1.0 if near_end else chain.seconds[stage])
        until = time.monotonic() + delay
        while time.monotonic() < until and dvc.poll() is None:
            time.sleep(0.005)
        what = f"kill {target} of {stage}, {delay:.2f} s after {'its outputs were there' if near_end else 'the start'}"
        running = [pid for pid, words in members(dvc.pid) if "-m stages" in words and not words.startswith("/bin/sh")]
        if dvc.poll() is not None or (target == "stage" and not running):
            chain.finish(dvc)
            return Outcome(what, "late")
        finished = chain.made_all(stage)
        if target == "stage":
            for pid in running:
                os.kill(pid, signal.SIGKILL)
        elif target == "dvc":
            dvc.kill()
            if running and chance.random() < 0.5:
                refused = _refused_by_name(chain, stage, running)
                if refused:
                    return Outcome(f"{what}, and a run beside the one that lives", *refused.split("\n", 1))
        else:
            with suppress(ProcessLookupError):
                os.killpg(dvc.pid, signal.SIGKILL)
        _, log = chain.finish(dvc)
        finished |= "dvc ended before this stage" in log
        return chain.judge(stage, what, finished=finished)

    return case


def _refused_by_name(chain: Chain, stage: str, running: list[int]) -> str:
    """Starts a stage that an orphan is running. Empty if it is refused with the orphan's pid, or if the orphan had ended."""
    dvc = chain.start(stage)
    log = chain.finish(dvc)[1]
    named = any(f"process {pid} is running" in log for pid in running)
    return "" if named or dvc.returncode == 0 or chain.mend_dvc(stage, log) else f"refusals\n{log}"


# Damaged files that only a rerun reads


def flip_checkpoint(chain: Chain, chance: random.Random) -> Outcome:
    """Damages one file of a checkpoint, two times of three of the newest."""
    chain.restore(chain.interrupted)
    found = [*chain.checkpoints()]
    checkpoint = found[-1] if chance.random() < 2 / 3 else chance.choice(found)
    what = damage(chance.choice(sorted(checkpoint.iterdir())), chance)
    # A checkpoint without its mark is one that a killed run has not finished.
    named = "" if what.startswith("delete") and what.endswith("/complete") else f"{checkpoint.name} is damaged"
    return chain.judge("train", what, damaged=named)


def flip_result(chain: Chain, chance: random.Random) -> Outcome:
    """Damages one file of a training's result that dvc has not recorded."""
    chain.restore(chain.unrecorded)
    (kept,) = chain.kept_results("train")
    what = damage(chance.choice(sorted(file for file in kept.rglob("*") if file.is_file())), chance)
    # Without its mark a result is one that was not finished.
    return chain.judge(
        "train", what, damaged="" if what.startswith("delete") and what.endswith("/result.json") else "is damaged"
    )


def damage(file: Path, chance: random.Random) -> str:
    """Flips a bit of a file, cuts it off, or deletes it, and says which."""
    name, data = "/".join(file.parts[-2:]), bytearray(file.read_bytes())
    how = chance.choice(("flip", "flip", "flip", "cut", "delete"))
    if how == "delete":
        file.unlink()
    elif how == "cut" or not data:
        os.truncate(file, chance.randrange(max(1, len(data))))
    else:
        bit = chance.randrange(8 * len(data))
        data[bit // 8] ^= 1 << bit % 8
        file.write_bytes(data)
        how = f"flip bit {bit} of"
    return f"{how} {name}"


KINDS: dict[str, Callable[[Chain, random.Random], Outcome]] = {
    "kill-stage": kill("stage"),
    "kill-dvc": kill("dvc"),
    "kill-group": kill("group"),
    "flip-checkpoint": flip_checkpoint,
    "flip-result": flip_result,
}
COLUMNS = ("losses", "refusals", "silent", "unnamed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="for the cases; making the chain comes before")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    chance = random.Random(arguments.seed)
    counts: dict[str, Counter[str]] = {kind: Counter() for kind in arguments.kinds}
    with tempfile.TemporaryDirectory(prefix="loratory-faults-") as folder:
        chain = Chain(Path(folder))
        until = time.monotonic() + 60 * arguments.minutes
        while time.monotonic() < until:
            for kind in arguments.kinds:
                if time.monotonic() > until:
                    break
                outcome = KINDS[kind](chain, chance)
                print(f"{kind}: {outcome.what}: {outcome.fault or 'ok'}", flush=True)
                if outcome.fault in COLUMNS:
                    print(outcome.log, flush=True)
                counts[kind]["cases"] += outcome.fault != "late"
                counts[kind][outcome.fault] += 1
    print_table(counts)


def print_table(counts: dict[str, Any]) -> None:
    """The table for the README."""
    print(f"\n| kind | cases | {' | '.join(COLUMNS)} |\n|---|{'---:|' * (len(COLUMNS) + 1)}")
    for kind, found in counts.items():
        print(f"| {kind} | {found['cases']} | {' | '.join(str(found[column]) for column in COLUMNS)} |")


if __name__ == "__main__":
    main()
