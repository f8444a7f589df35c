"""Shards frozen weights across processes with FSDP, for a model that does not fit on one GPU."""

from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from stages.train.gradient_checkpointing import decoder_blocks


def shard_frozen(model: Any, device: torch.device) -> None:
    """Shards the frozen weights of a model's blocks across all processes.

    Trained parameters stay complete in every process, as DistributedDataParallel requires. A block's weights are gathered
    while it computes, so the results are bit-identical to those of an unsharded model.

    Args:
        model: A model with an adapter. It may be in main memory: its blocks are moved to `device` one after the other.
        device: The GPU of this process, or the CPU.
    """
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    trained = {parameter for parameter in model.parameters() if parameter.requires_grad}
    for block in decoder_blocks(model):
        fully_shard(block.to(device), mesh=mesh, ignored_params=trained, reshard_after_forward=True)
    model.to(device)
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, frozen)  # type: ignore[no-untyped-call]
    base = model.get_base_model()
    if hasattr(base, "hf_device_map"):
        base.hf_device_map = {"": device}
