"""Shards frozen weights across processes with FSDP, for a model that does not fit on one GPU."""

from collections.abc import Iterable
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from stages.train.checkpoints import trainable_parameters
from stages.train.gradient_checkpointing import decoder_blocks


def shard_frozen(model: Any, device: torch.device) -> None:
    """Shards the frozen weights of a model's blocks across all processes.

    Trained parameters stay complete in every process, and start equal: those of process 0. A block's weights are gathered
    while it computes, so the results are bit-identical to those of an unsharded model.

    Args:
        model: A model with an adapter. It may be in main memory: its blocks are moved to `device` one after the other.
        device: The GPU of this process, or the CPU.
    """
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    trained = set(trainable_parameters(model).values())
    for block in decoder_blocks(model):
        fully_shard(block.to(device), mesh=mesh, ignored_params=trained, reshard_after_forward=True)
    model.to(device)
    for parameter in trainable_parameters(model).values():
        torch.distributed.broadcast(parameter.data, src=0)
    base = model.get_base_model()
    if hasattr(base, "hf_device_map"):
        base.hf_device_map = {"": device}


def is_sharded(model: Any) -> bool:
    """Whether `shard_frozen` has sharded the model."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


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
