"""Shards frozen weights across processes with FSDP, for a model that does not fit on one GPU."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from stages.train.checkpoints import trainable_parameters
from stages.train.gradient_checkpointing import decoder_blocks

T = TypeVar("T")


def shard_frozen(model: Any, mesh: DeviceMesh, device: torch.device) -> None:
    """Shards the frozen weights of a model's blocks across all processes, which need not call this at the same time.

    Trained parameters stay complete in every process. A block's weights are gathered while it computes, so the results are
    bit-identical to those of an unsharded model.

    Args:
        model: A model with an adapter. It may be in main memory: its blocks are moved to `device` one after the other.
        mesh: From `make_mesh`.
        device: The GPU of this process, or the CPU.
    """
    trained = set(trainable_parameters(model).values())
    for block in decoder_blocks(model):
        fully_shard(block.to(device), mesh=mesh, ignored_params=trained, reshard_after_forward=True)
    model.to(device)
    base = model.get_base_model()
    if hasattr(base, "hf_device_map"):
        base.hf_device_map = {"": device}


def make_mesh(device: torch.device) -> DeviceMesh:
    """All processes in a row; called in all of them together."""
    return init_device_mesh(device.type, (torch.distributed.get_world_size(),))


def share_trained(model: Any) -> None:
    """Gives every process the trained parameters of process 0, as DistributedDataParallel does; called in all together."""
    for parameter in trainable_parameters(model).values():
        torch.distributed.broadcast(parameter.data, src=0)


def load_in_turns(load: Callable[[], T], at_a_time: int) -> T:
    """load() in every process, in at most `at_a_time` of them at the same time.

    Each process loads all of the quantized model into main memory before it keeps its shard on its GPU; main memory may not
    hold as many copies as there are processes.
    """
    rank, count = torch.distributed.get_rank(), torch.distributed.get_world_size()
    loaded: list[T] = []
    for first in range(0, count, at_a_time):
        if first <= rank < first + at_a_time:
            loaded.append(load())
        torch.distributed.barrier()
    return loaded[0]


def is_sharded(model: Any) -> bool:
    """Whether `shard_frozen` has sharded the model."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


@contextmanager
def gathered(model: Any, name: str) -> Iterator[None]:
    """Within the block, a module's weights are complete in every process, if they are sharded; called in all together.

    Args:
        model: The model with an adapter.
        name: The module's full name in the base model.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    parts = name.split(".")
    above = [base.get_submodule(".".join(parts[:count])) for count in range(len(parts) + 1)]
    sharded = [module for module in above if isinstance(module, FSDPModule)]
    for module in sharded:
        module.unshard()
    try:
        yield
    finally:
        for module in sharded:
            module.reshard()


def average_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Averages the gradients over all processes, in one exchange.

    DistributedDataParallel does the same, with the same rounding: a gradient is divided, then summed. Accelerate refuses it
    for a model with sharded weights.

    Args:
        parameters: Trained parameters, in the same order in all processes.
    """
    gradients = []
    for parameter in parameters:
        if parameter.grad is None:  # not used by this process's rows; the others may have used it
            parameter.grad = torch.zeros_like(parameter)
        gradients.append(parameter.grad)
    flat = torch.cat([gradient.float().flatten() for gradient in gradients])
    torch.distributed.all_reduce(flat.div_(torch.distributed.get_world_size()))
    parts = torch.split(flat, [gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))
