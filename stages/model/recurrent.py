"""Recurrent layers in padding-free batches: convolutions, state spaces and gated delta rules that stop at row boundaries.

A padding-free batch is one long row for a recurrent layer, whose state would run from one row of the batch into the next.
Transformers computes these layers with functions of a model's own code, each an implementation of a package, or PyTorch's
where the package is not installed. They take any keyword arguments, and `row_layout` arrives there as it does in attention.
"""

import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch

from stages.model.probe import TRIAL_ERRORS, reason_of


class _Kind(NamedTuple):
    """A function over all tokens of a batch."""

    dim: int
    """The dimension of the tokens in its inputs and its result; rows are dimension 0."""
    boundaries: str
    """The keyword argument of its package's implementation for the rows: "seq_idx" is the number of each token's row,
    "cu_seqlens" the position of each row's first token."""


KINDS = {
    "causal_conv1d_fn": _Kind(2, "seq_idx"),  # causal-conv1d
    "mamba2_chunk_scan": _Kind(1, "seq_idx"),  # mamba-ssm
    "torch_chunk_gated_delta_rule": _Kind(1, "cu_seqlens"),  # flash-linear-attention, as the next
    "chunk_kimi_delta_attention": _Kind(1, "cu_seqlens"),
}
"""By their names in the code of Transformers' models (5.23)."""
FUSED = ("mamba2_split_conv1d_scan_combined", "mamba_inner_fn")
"""Functions that compute a whole layer, with the weights of its projections. They return None where they cannot."""


class RowFunction:
    """Takes the place of a function in `KINDS`: the rows of a padding-free batch do not reach each other.

    The package's implementation gets the boundaries of the rows. Without it, or if it does not keep to them, rows of similar
    length are computed as padded batches. Without `row_layout` it is the function itself.
    """

    def __init__(self, function: Callable[..., Any], kind: _Kind) -> None:
        self.function, self.kind, self.__name__ = function, kind, function.__name__
        self.why_padded: str | None = None
        """Why rows are computed as padded batches; None before the first padding-free batch, "" if they are not."""

    def __call__(self, *arguments: Any, row_layout: Any = None, **named: Any) -> Any:
        """The function's result for its own arguments; `row_layout` is that of the batch, a `RowLayout`."""
        if row_layout is None:
            return self.function(*arguments, **named)
        row_layout.used = True
        if not self.why_padded:
            device = arguments[0].device
            rows = row_layout.row_numbers(device) if self.kind.boundaries == "seq_idx" else row_layout.starts(device).long()
            try:
                result = self.function(*arguments, **{**named, self.kind.boundaries: rows})
            except TRIAL_ERRORS as error:  # a ValueError by Transformers, if the package is not installed
                if self.why_padded is not None:
                    raise
                self.why_padded = reason_of(error).removeprefix("ValueError: ").removesuffix(".")
            else:
                self.why_padded = ""
                return result
        return self._in_groups(arguments, named, row_layout)

    def _in_groups(self, arguments: tuple[Any, ...], named: dict[str, Any], row_layout: Any) -> Any:
        """The result, computed for rows of similar length at a time, padded on the right, where no token looks."""
        dim, tokens = self.kind.dim, sum(row_layout.lengths)
        groups, order = row_layout.groups(arguments[0].device)

        def is_batch(value: Any) -> bool:
            return isinstance(value, torch.Tensor) and value.ndim > 2 and value.shape[0] == 1 and value.shape[dim] == tokens

        def pad(value: Any, positions: torch.Tensor) -> Any:
            return value.squeeze(0).movedim(dim - 1, 0)[positions].movedim(1, dim) if is_batch(value) else value

        parts = []
        for positions, real in groups:
            padded = [pad(value, positions) for value in arguments]
            result = self.function(*padded, **{name: pad(value, positions) for name, value in named.items()})
            out = result[0] if isinstance(result, tuple) else result
            parts.append(out.movedim(dim, 1).flatten(0, 1)[real])
        out = torch.cat(parts)[order].movedim(0, dim - 1).unsqueeze(0)
        return (out, *result[1:]) if isinstance(result, tuple) else out  # behind it a state, None in training


def prepare_recurrent_layers(model: Any) -> list[RowFunction]:
    """Prepares the recurrent layers of a model for training, in place; returns their functions, none for other models.

    They take the lengths of a padding-free batch's rows; and a layer calls its projections. In training the functions in
    `FUSED` take the projections' weights instead, past their adapters, and cannot read quantized ones.
    """
    functions: list[RowFunction] = []
    for code in _codes(model):
        for name in FUSED:
            if hasattr(code, name):
                setattr(code, name, _compute_no_layer)
        for name, kind in KINDS.items():
            function = getattr(code, name, None)
            if function is None:
                continue
            if not isinstance(function, RowFunction):
                function = RowFunction(function, kind)
                setattr(code, name, function)
            functions.append(function)
    return functions


def describe_padding(functions: Sequence[RowFunction]) -> list[str]:
    """A line for each function that computes rows as padded batches, with the reason."""
    found = {function.__name__: function.why_padded for function in functions if function.why_padded}
    return [f"{name} computes rows of similar length as padded batches: {reason}" for name, reason in found.items()]


def _codes(model: Any) -> list[ModuleType]:
    """The Python modules with the code of the model's layers."""
    return [sys.modules[name] for name in dict.fromkeys(type(module).__module__ for module in model.modules())]


def _compute_no_layer(*_: Any, **__: Any) -> None:
    """In place of a function in `FUSED`: the layer then goes on step by step."""
