"""Several processes on one machine, one a GPU, started by torchrun's own launcher; torchrun itself starts more machines."""

import logging
import os
import signal
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, record
from torch.distributed.fsdp import fully_shard
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.nn.parallel import DistributedDataParallel

from stages.lib.blocks import blocks
from stages.lib.problem import Problem


def is_launched() -> bool:
    """Whether this process is one of several that train together."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_main() -> bool:
    """Whether this process is the one that writes and speaks."""
    return int(os.environ.get("RANK", "0")) == 0


def join(*, cpu: bool) -> None:
    """Meets the other processes, and takes this one's GPU."""
    if is_launched():
        PartialState(cpu=cpu)


def shard_frozen(model: Any, device: torch.device) -> None:
    """Leaves each process its part of the frozen weights (FSDP), and the whole of what is trained, as DDP wants it.

    A layer's weights are gathered while it computes, so the numbers are those of an unsharded model, to the bit. The model
    may lie in main memory: its layers come to `device` one by one.
    """
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    trained = {parameter for parameter in model.parameters() if parameter.requires_grad}
    for layer in blocks(model):
        fully_shard(layer.to(device), mesh=mesh, ignored_params=trained, reshard_after_forward=True)
    model.to(device)
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, frozen)  # type: ignore[no-untyped-call]
    base = model.get_base_model()
    if hasattr(base, "hf_device_map"):
        base.hf_device_map = {"": device}


def launch(function: Callable[..., None], processes: int, *arguments: object) -> None:
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
                "the batch size; dvc repro goes on from the last checkpoint"
            ) from None
        found = failure.error_file_data["message"]
        kind, _, text = str(found["message"] if isinstance(found, dict) else found).partition(": ")
        if kind == "Problem":
            raise Problem(*text.split("\n")) from None
        raise


@record
def _child(function: Callable[..., None], root: Path, *arguments: object) -> None:
    os.chdir(root)
    function(*arguments)
