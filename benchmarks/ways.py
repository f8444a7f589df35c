"""What benchmarks share: each way to do a thing runs in a process of its own, and reports one line of JSON."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def run_row(
    script: str, way: str, name: str, *arguments: object, packages: Path | None = None, limit: float | None = None
) -> dict[str, Any] | None:
    """What `script --way <way> <arguments>` printed last; None if it failed, and then a row of the table says so.

    `packages` is a folder that it sees before those of PYTHONPATH; after `limit` seconds it is ended.
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


def machine() -> str:
    """What a table was measured on."""
    import torch
    import transformers

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    return f"{device}, torch {torch.__version__}, transformers {transformers.__version__}"


def peak_memory() -> int:
    """Bytes that this process held at most, of the GPU where there is one."""
    import torch

    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_main_memory()


def peak_main_memory() -> int:
    """Bytes that this process held at most; getrusage would count the process that started it."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024
