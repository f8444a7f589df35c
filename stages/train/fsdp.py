"""A model that one GPU does not hold, its frozen weights parted among several (FSDP)."""

from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from stages.train.gradient_checkpointing import decoder_blocks


def shard_frozen(model: Any, device: torch.device) -> None:
    """Leaves each process its part of the frozen weights (FSDP), and the whole of what is trained, as DDP wants it.

    A layer's weights are gathered while it computes, so the numbers are those of an unsharded model, to the bit. The model
    may lie in main memory: its layers come to `device` one by one.
    """
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    trained = {parameter for parameter in model.parameters() if parameter.requires_grad}
    for layer in decoder_blocks(model):
        fully_shard(layer.to(device), mesh=mesh, ignored_params=trained, reshard_after_forward=True)
    model.to(device)
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, frozen)  # type: ignore[no-untyped-call]
    base = model.get_base_model()
    if hasattr(base, "hf_device_map"):
        base.hf_device_map = {"": device}
