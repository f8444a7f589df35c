"""Shared by the benchmarks: each way of doing something runs in its own process and prints one line of JSON."""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil  # accelerate brings it


def run_row(
    script: str, way: str, name: str, *arguments: object, packages: Path | None = None, limit: float | None = None
) -> dict[str, Any] | None:
    """The last line of `script --way <way> <arguments>`, parsed; None if it failed, which is printed as a row of the table.

    Args:
        packages: A folder that is put at the front of PYTHONPATH.
        limit: Seconds after which the process is killed.
    """
    command = [sys.executable, script, "--way", way, *map(str, arguments)]
    path = {"PYTHONPATH": f"{packages}:{os.environ.get('PYTHONPATH', '')}"} if packages else {}
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | path, timeout=limit)
    except subprocess.TimeoutExpired as error:
        print(f"| {name} | not finished after {limit:.0f} s |", flush=True)
        print((error.stderr or b"").decode(errors="replace")[-2000:], file=sys.stderr)
        return None
    if not done.returncode:
        found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
        return found
    failure = done.stderr.strip()[-2000:]
    print(f"| {name} | failed: {(failure.splitlines() or [''])[-1][:200]} |", flush=True)
    print(failure, file=sys.stderr)
    return None


def measure(command: list[str]) -> dict[str, float]:
    """Wall and CPU seconds, and peak PSS in bytes, of a process and its children. Exits if it fails."""
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    peak, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.3):
            total = 0
            with contextlib.suppress(psutil.Error):
                tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
                for each in tree:
                    with contextlib.suppress(psutil.Error):
                        total += each.memory_full_info().pss
            peak[0] = max(peak[0], total)

    thread = threading.Thread(target=watch)
    thread.start()
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.monotonic() - started
    done.set()
    thread.join()
    if status:
        sys.exit(f"{' '.join(command)} failed")
    return {"wall": wall, "cpu": usage.ru_utime + usage.ru_stime, "peak": peak[0]}


def machine() -> str:
    """The hardware and versions that a table was measured with."""
    import torch
    import transformers

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    return f"{device}, torch {torch.__version__}, transformers {transformers.__version__}"


def peak_memory() -> int:
    """Peak memory of this process in bytes, on the GPU if there is one."""
    import torch

    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_main_memory()


def peak_main_memory() -> int:
    """Peak main memory of this process in bytes; getrusage would include that of the process that started it."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def train_paths(folder: Path, out: Path) -> dict[str, Path]:
    """The paths of the train stage: its inputs in `folder`, as the benchmarks write them, and its outputs in `out`."""
    return {
        "train_tokens": folder / "train.arrow",
        "validation_tokens": folder / "validation.arrow",
        "base": folder / "base",
        "adapter": out / "adapter",
        "report": out / "report.json",
        "curves": out / "loss",
        "machine": out / "machine.json",
    }
