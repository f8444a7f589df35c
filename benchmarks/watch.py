"""What a run of `dvc repro` uses while it runs: main memory, GPU memory and disk, by stage."""

import contextlib
import re
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil  # accelerate brings it

INTERVAL_S = 0.2
DISK_INTERVAL_S = 2.0


@dataclass
class Usage:
    """What one stage used: times in seconds, sizes in bytes."""

    stage: str
    started: float
    ended: float = 0.0
    """When the stage's process was seen last; 0 while it runs."""
    recorded: float = 0.0
    """When DVC was done with it: it hashes the outputs and puts them into its cache. 0 before that."""
    own: int = 0
    """Peak main memory of all its processes together, without mapped files. Shared pages count once."""
    mapped: int = 0
    """The same with mapped files, whose pages the system can drop: at least the peak of each single process."""
    gpu: int = 0
    """Peak memory of all GPUs together, as nvidia-smi shows it: with CUDA's context and what PyTorch keeps reserved."""
    checkpoints: int = 0
    """Largest size of .checkpoints."""
    disk: int = 0
    """Largest size of the whole project on the disk."""
    complete: bool = True
    """Whether the stage has succeeded."""


class Watch(threading.Thread):
    """Samples the process tree of `dvc repro`, the GPUs and the disk, until `stop` is called."""

    def __init__(self, dvc: int, project: Path, *, recorded: Callable[[Usage], None]) -> None:
        """`dvc` is the id of its process; `recorded` is called for each stage when DVC is done with it, in order."""
        super().__init__(daemon=True)
        self._dvc, self._project, self._recorded = dvc, project, recorded
        self._gpus = Gpus()
        self._done = threading.Event()
        self._current: Usage | None = None
        self.dvc_own = 0
        """Peak main memory of DVC itself."""

    def run(self) -> None:
        next_disk = 0.0
        while not self._done.wait(INTERVAL_S):
            tree = process_tree(self._dvc)
            if not tree:
                continue
            self.dvc_own = max(self.dvc_own, sum(memory(tree[0].pid)))
            stage = next((name for name in map(stage_of, tree[1:]) if name), None)
            self._follow(stage, tree[1:])
            if self._current is None:
                continue
            now = time.time()
            if stage:
                sampled = [memory(process.pid) for process in tree[1:]]
                own, files = sum(own for own, _ in sampled), sum(files for _, files in sampled)
                self._current.own = max(self._current.own, own)
                largest = max((peak_resident(process.pid) for process in tree[1:]), default=0)
                self._current.mapped = max(self._current.mapped, own + files, largest)
                self._current.gpu = max(self._current.gpu, self._gpus.used())
            if now >= next_disk:
                next_disk = now + DISK_INTERVAL_S
                self._current.checkpoints = max(self._current.checkpoints, size_of(self._project / ".checkpoints").apparent)
                self._current.disk = max(self._current.disk, size_of(self._project).allocated)

    def stop(self, *, complete: bool) -> None:
        """Call it when dvc has ended; `complete` is whether it, and so the last stage, has succeeded."""
        self._done.set()
        self.join()
        self._gpus.close()
        self._follow(None, [])
        if self._current:
            self._current.complete = complete
        self._record()

    def _follow(self, stage: str | None, tree: list[psutil.Process]) -> None:
        now = time.time()
        current = self._current
        if current and stage == current.stage:
            current.ended = 0.0
        elif current and not current.ended:
            current.ended = now
        if stage and (current is None or stage != current.stage):
            self._record()
            self._current = Usage(stage, min((each.create_time() for each in tree if each.is_running()), default=now))

    def _record(self) -> None:
        if self._current:
            self._current.recorded = time.time()
            self._current.disk = max(self._current.disk, size_of(self._project).allocated)
            self._recorded(self._current)
            self._current = None


class Gpus:
    """The memory in use on all GPUs, from a running nvidia-smi; 0 without one."""

    def __init__(self) -> None:
        self._used: dict[str, int] = {}
        self._process: subprocess.Popen[str] | None = None
        command = ["nvidia-smi", "--query-gpu=index,memory.used", "--format=csv,noheader,nounits", "-lms", "200"]
        with contextlib.suppress(OSError):
            self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process
        assert self._process.stdout
        for line in self._process.stdout:
            index, _, used = line.partition(",")
            with contextlib.suppress(ValueError):
                self._used[index] = int(used) << 20

    def used(self) -> int:
        return sum(self._used.values())

    def close(self) -> None:
        if self._process:
            self._process.terminate()
            self._process.wait()


def process_tree(pid: int) -> list[psutil.Process]:
    """A process and all below it; empty if it has ended."""
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.Error:
        return []


def stage_of(process: psutil.Process) -> str | None:
    """The stage that a process runs, "generate base"; None if it runs none."""
    try:
        words = process.cmdline()
    except psutil.Error:
        return None
    if words[1:3] != ["-m", "stages"] or len(words) < 4:
        return None
    model = Path(words[words.index("--model") + 1]).name if "--model" in words else ""
    return f"{words[3]} {model}".strip()


def memory(pid: int) -> tuple[int, int]:
    """Main memory of a process in bytes, without mapped files and of mapped files. A page in n processes counts 1/n in each.

    Source: Pss_* of /proc/<pid>/smaps_rollup, https://www.kernel.org/doc/Documentation/ABI/testing/procfs-smaps_rollup
    """
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:  # it has ended
        return 0, 0
    found = {name: int(size) * 1024 for name, size in re.findall(r"^(Pss\w*): +(\d+) kB", text, re.MULTILINE)}
    files = found.get("Pss_File", 0)
    return found.get("Pss", 0) - files, files


def peak_resident(pid: int) -> int:
    """The peak of a process's resident memory so far, mapped files included. It misses no short peak."""
    try:
        found = re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0


@dataclass(frozen=True)
class Size:
    """The size of files in bytes."""

    apparent: int = 0
    """Sum of their lengths."""
    allocated: int = 0
    """Their blocks on the disk, as `du` counts them: those of a hard link once, those of a reflink each time."""


def size_of(*paths: Path) -> Size:
    """The size of files and of all files in folders; 0 for those that do not exist."""
    apparent = allocated = 0
    seen = set()
    for path in paths:
        for file in [path, *path.rglob("*")]:
            with contextlib.suppress(OSError):  # a running stage renames and removes files
                found = file.lstat()
                if not file.is_dir() and (found.st_dev, found.st_ino) not in seen:
                    seen.add((found.st_dev, found.st_ino))
                    apparent += found.st_size
                    allocated += found.st_blocks * 512
    return Size(apparent, allocated)
