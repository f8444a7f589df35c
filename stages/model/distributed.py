"""Several processes on one machine, one for each GPU, started by torch.distributed's launcher or by torchrun."""

import logging
import os
import signal
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, record
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from stages.core.params import bad_param
from stages.core.problem import Problem

TIMEOUT = timedelta(hours=2)
"""How long a process waits for the others: with train.fsdp they may load a large model one after the other."""


def world_size() -> int:
    """The number of processes that work together."""
    return _read_variable("WORLD_SIZE", default=1)


def rank() -> int:
    """The number of this process, from 0."""
    return _read_variable("RANK", default=0)


def is_main() -> bool:
    """Whether this process writes the outputs and prints."""
    return rank() == 0


def _read_variable(name: str, *, default: int) -> int:
    """One of the environment variables that torchrun sets.

    Raises Problem if it is set without MASTER_ADDR: torchrun did not start this process, and a process of another rank
    than 0 would write nothing.
    """
    if name not in os.environ:
        return default
    if "MASTER_ADDR" not in os.environ:
        raise Problem(
            f"the environment variable {name} is set, but MASTER_ADDR is not, so torchrun did not start this process; run "
            "`unset RANK WORLD_SIZE LOCAL_RANK` and start again"
        )
    return int(os.environ[name])


def select_gpu() -> None:
    """Makes the GPU of this process the current CUDA device."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))


def init_processes(*, cpu: bool) -> None:
    """Initializes the process group, with gloo if `cpu`, and makes the GPU of this process the current CUDA device."""
    if world_size() > 1:
        PartialState(cpu=cpu, timeout=TIMEOUT)


def require_gpus(processes: int, name: str) -> None:
    """Raises Problem if this machine has GPUs, but fewer than `processes`; `name` is the parameter's, for the message."""
    if torch.cuda.is_available() and torch.cuda.device_count() < processes:
        raise Problem(
            bad_param(name, f"wanted at most {torch.cuda.device_count()}, the GPUs of this machine; found {processes}")
        )


def launch(function: Callable[..., object], processes: int, *arguments: object) -> None:
    """Calls function(*arguments) in each of several processes of this machine, and waits until all have returned.

    Args:
        function: A function of a module, importable in the processes.
        processes: How many to start.
        arguments: Picklable.

    Raises Problem if a process raises one, or if one is killed; KeyboardInterrupt on Ctrl-C or SIGTERM. The other processes
    are then stopped. Any other exception in a process is raised as ChildFailedError.
    """
    # NVLink multicast is missing on some machines, and for the small gradients of an adapter it gains nothing.
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // processes)))
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # it logs the tracebacks of Problems too
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.2,
        start_method="spawn",
    )
    try:
        with _restored_signals():
            elastic_launch(config, _run)(function, Path.cwd(), *arguments)
    except SignalException:
        raise KeyboardInterrupt from None
    except ChildFailedError as error:
        problem = _find_problem(error, processes)
        if problem is None:
            raise
        raise problem from None


@record
def _run(function: Callable[..., object], root: Path, *arguments: object) -> None:
    os.chdir(root)
    function(*arguments)


@contextmanager
def _restored_signals() -> Iterator[None]:
    """Restores the signal handlers that the launcher replaces."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _find_problem(error: ChildFailedError, processes: int) -> Problem | None:
    """The first failure as a Problem, None if it is a bug in Loratory."""
    failed, failure = error.get_first_failure()
    if failure.exitcode < 0:
        name = signal.Signals(-failure.exitcode).name
        return Problem(
            f"process {failed} of {processes} was killed ({name}), and the others were stopped. If the machine ran out of "
            "memory, lower the batch size; dvc repro resumes from what was finished"
        )
    recorded = failure.error_file_data["message"]
    kind, _, text = str(recorded["message"] if isinstance(recorded, dict) else recorded).partition(": ")
    return Problem(*text.split("\n")) if kind == "Problem" else None
