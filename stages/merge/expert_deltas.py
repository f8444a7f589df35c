"""Compares the weights of adapted experts before and after merging, as `LayerDeltas` does for linear layers."""

from typing import Any, NamedTuple

import torch

from stages.model.experts import Experts, chunks_of, expert_weight, find_experts, read_chunks, wrapper_factors

VECTORS = 2
"""Vectors that each expert's weight is multiplied with; all of them are kept in main memory."""
NOISE_SIGMAS = 6
"""An error counts only if it is larger than this many standard deviations of rounding noise."""


class _Kept(NamedTuple):
    """What is kept of a parameter with the weights (experts, a, b), on the CPU."""

    vectors: torch.Tensor
    """(experts, b, VECTORS) Orthonormal, in the row space of the delta weight."""
    products: torch.Tensor
    """(experts, a, VECTORS) Of the trained weights."""
    deltas: torch.Tensor
    """The part of the products that training added."""


class ExpertDeltas:
    """What training changed in the weights of every adapted expert."""

    def __init__(self, adapted: Any) -> None:
        """Args:
        adapted: The PEFT model.
        """
        with torch.no_grad():
            self._parameters = {
                f"{experts.name}.{name}": _keep(experts, name)
                for experts in find_experts(adapted)
                for name in experts.wrappers
            }

    def shares_in(self, model: Any) -> dict[str, float]:
        """How much of its delta the worst expert of each parameter has in `model`: 1 for all of it, 0 for none.

        The names have the number of that expert, "model.layers.0.mlp.experts.down_proj[3]". A parameter that is kept on the
        disk is left out.
        """
        found = {}
        for name, kept in self._parameters.items():
            weight = model.get_parameter(name)
            if weight.is_meta:
                continue
            shares = torch.cat([_shares(weight.detach()[part], kept, part) for part in chunks_of(weight.shape)])
            worst = int((shares - 1).abs().argmax())
            found[f"{name}[{worst}]"] = shares[worst].item()
        return found


def _keep(experts: Experts, name: str) -> _Kept:
    factors, trained = wrapper_factors(experts, name), expert_weight(experts, name)
    assert factors is not None  # the adapter is on
    vectors = torch.linalg.qr(factors.right.transpose(1, 2))[0][..., :VECTORS]
    products, before = [], []
    for part, weight in read_chunks(experts.module, name):
        products.append(trained[part].float() @ vectors[part])
        before.append(weight @ vectors[part])
    after = torch.cat(products)
    return _Kept(vectors.cpu(), after.cpu(), (after - torch.cat(before)).cpu())


def _shares(weight: torch.Tensor, kept: _Kept, part: slice) -> torch.Tensor:
    """The share of each of some experts."""
    product = (weight.float() @ kept.vectors[part].to(weight.device)).cpu()
    error, delta = product - kept.products[part], kept.deltas[part]
    size = delta.flatten(1).norm(dim=1).clamp(min=torch.finfo(torch.float32).tiny)
    projection = (error * delta).flatten(1).sum(1) / size
    noise = error.flatten(1).norm(dim=1) / error[0].numel() ** 0.5
    return torch.where(projection.abs() > NOISE_SIGMAS * noise, 1 + projection / size, 1.0)
