"""What rounding alone does to the logits of a model: the measure for those of the merged model."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def other_rounding(model: Any, noise: Mapping[str, float]) -> Iterator[None]:
    """Within the block, the outputs of layers have random errors, as large as those that rounding makes.

    A model answers small errors in its own way. A near tie changes a token's expert, and a recurrent state carries an error
    on through the row; so what a mean KL divergence of 0.01 says depends on the model. Here all layers differ from the
    trained ones as much as rightly merged ones do, but at random.

    Args:
        model: The PEFT model. Its layers differ anew at each call.
        noise: As `TrainedWeights.noise`.
    """
    generators: dict[torch.device, torch.Generator] = {}

    def add(output: torch.Tensor, size: float) -> torch.Tensor:
        device = output.device
        if device not in generators:
            generators[device] = torch.Generator(device).manual_seed(0)
        exact = output.float()
        error = torch.randn(exact.shape, generator=generators[device], device=device)
        return exact.addcmul(error, exact.pow(2).mean(-1, keepdim=True).sqrt(), value=size).to(output.dtype)

    layers = model.get_base_model()
    hooks = [
        layers.get_submodule(name).register_forward_hook(lambda _module, _inputs, output, size=size: add(output, size))
        for name, size in noise.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
