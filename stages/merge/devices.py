"""The modules of a model that is spread over several devices."""

import torch


def move_to(module: torch.nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    """The inputs on the module's device.

    A module whose weights Accelerate keeps elsewhere until they are used (on the device "meta") moves its inputs itself.
    """
    device = next(module.parameters()).device
    return inputs if device.type == "meta" else inputs.to(device)
