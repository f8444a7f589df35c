"""Comparison of tensors with a bound for each element; a failure shows the values and the bound."""

import torch


def assert_within(found: torch.Tensor, wanted: torch.Tensor, bound: torch.Tensor | float, *, what: str) -> None:
    """Each element of `found` differs from `wanted` by at most its element of `bound`; NaN never does."""
    found, wanted = found.detach().double().cpu(), wanted.detach().double().cpu()
    assert found.shape == wanted.shape, f"{what}: shape {tuple(found.shape)}, wanted {tuple(wanted.shape)}"
    limit = torch.as_tensor(bound, dtype=torch.float64).cpu().expand(wanted.shape)
    error = (found - wanted).abs()
    wrong = ~(error <= limit)
    if not wrong.any():
        return
    ratio = torch.where(error.isnan(), torch.inf, error / limit.clamp_min(1e-300))
    worst = tuple(int(index) for index in torch.unravel_index(ratio.argmax(), ratio.shape))
    raise AssertionError(
        f"{what}: {int(wrong.sum())} of {wrong.numel()} elements differ by more than the bound; the worst at {worst}: found "
        f"{found[worst]:.9g}, wanted {wanted[worst]:.9g}, difference {error[worst]:.3g}, bound {limit[worst]:.3g}; "
        f"first wrong ones at {wrong.nonzero()[:4].tolist()}; relative error of all {relative_error(found, wanted):.3g}"
    )


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The norm of the difference, relative to the norm of `wanted`."""
    found, wanted = found.detach().double().cpu(), wanted.detach().double().cpu()
    return float((found - wanted).norm() / wanted.norm())
