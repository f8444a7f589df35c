"""Several processes on one machine, one a GPU, started by torchrun's own launcher; torchrun itself starts more machines."""

import logging
import os
import signal
import uuid
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import PartialState
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, record
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from stages.core.problem import Problem


def world_size() -> int:
    """How many processes work together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Which of them this is."""
    return int(os.environ.get("RANK", "0"))


def is_main() -> bool:
    """Whether this process is the one that writes and speaks."""
    return rank() == 0


def select_gpu() -> None:
    """Makes this process's GPU the one that it computes on."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))


def init_processes(*, cpu: bool) -> None:
    """Meets the other processes, and takes this one's GPU."""
    if world_size() > 1:
        PartialState(cpu=cpu)


def require_gpus(processes: int, name: str) -> None:
    """Raises Problem if there are GPUs, but not one for each process; `name` is the parameter's."""
    if torch.cuda.is_available() and torch.cuda.device_count() < processes:
        raise Problem(f"params.yaml: {name}: {processes}, but there are {torch.cuda.device_count()} GPUs")


def launch(function: Callable[..., object], processes: int, *arguments: object) -> None:
    """Calls a function of a module in so many processes of this machine, and waits for all of them.

    Raises Problem with the first message of a process that fails, or if one is killed; the others are ended.
    """
    # NVLink's multicast is not to be had on every machine, and for an adapter's gradients it gains nothing.
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // processes)))
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # it logs tracebacks of what is told below
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
        elastic_launch(config, _child)(function, Path.cwd(), *arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            raise Problem(
                f"process {rank} of {processes} was killed ({name}), and the others were ended. If it was for memory, lower "
                "the batch size; dvc repro goes on with what was finished"
            ) from None
        found = failure.error_file_data["message"]
        kind, _, text = str(found["message"] if isinstance(found, dict) else found).partition(": ")
        if kind == "Problem":
            raise Problem(*text.split("\n")) from None
        raise


@record
def _child(function: Callable[..., object], root: Path, *arguments: object) -> None:
    os.chdir(root)
    function(*arguments)
