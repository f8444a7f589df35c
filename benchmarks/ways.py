"""What benchmarks share: each way to do a thing runs in a process of its own, and reports one line of JSON."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def run_way(script: str, way: str, *arguments: object, packages: Path | None = None) -> tuple[dict[str, Any] | None, str]:
    """What `script --way <way> <arguments>` printed last, or None and the end of its stderr if it failed.

    `packages` is a folder that it sees before those of PYTHONPATH.
    """
    command = [sys.executable, script, "--way", way, *map(str, arguments)]
    path = {"PYTHONPATH": f"{packages}:{os.environ.get('PYTHONPATH', '')}"} if packages else {}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | path)
    if done.returncode:
        return None, done.stderr.strip()[-2000:]
    return json.loads(done.stdout.strip().splitlines()[-1]), ""


def peak_main_memory() -> int:
    """Bytes that this process held at most; getrusage would count the process that started it."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024
