"""Recurrent layers stop at the rows of a padding-free batch, with the kernels of packages and without."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers.models.granitemoehybrid import modeling_granitemoehybrid
from transformers.models.mamba import modeling_mamba
from transformers.models.qwen3_5 import modeling_qwen3_5

from stages.model.collate import collate_padded, collate_padding_free
from stages.model.logits import label_logits
from stages.model.padding_free import RowLayout, enable_padding_free
from stages.model.recurrent import FUSED, KINDS, RowFunction, describe_padding, prepare_recurrent_layers
from tests.test_families import ROWS, build, gradients

CODES = {"qwen3_5_text": modeling_qwen3_5, "granitemoehybrid": modeling_granitemoehybrid}
LENGTHS = [50, 7, 33]


@pytest.fixture(autouse=True)
def own_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers' functions, as they are before and after the test."""
    for code in (*CODES.values(), modeling_mamba):
        for name in (*KINDS, *FUSED):
            function = getattr(code, name, None)
            if function is not None:
                monkeypatch.setattr(code, name, getattr(function, "function", function))


class Kernel:
    """In place of a package's implementation: takes row boundaries, and computes each row by PyTorch's function."""

    def __init__(self, function: Any, dim: int, *, keeps_rows_apart: bool = True) -> None:
        self.function, self.dim, self.keeps_rows_apart, self.__name__ = function, dim, keeps_rows_apart, function.__name__
        self.boundaries: list[torch.Tensor] = []

    def __call__(self, *arguments: Any, seq_idx: Any = None, cu_seqlens: Any = None, **named: Any) -> Any:
        if seq_idx is None and cu_seqlens is None:
            return self.function(*arguments, **named)
        self.boundaries.append(cu_seqlens if seq_idx is None else seq_idx)
        if not self.keeps_rows_apart:
            return self.function(*arguments, **named)
        lengths = (seq_idx[0].bincount() if cu_seqlens is None else cu_seqlens.diff()).tolist()
        tokens = sum(lengths)

        def split(value: Any) -> Iterator[Any]:
            is_batch = isinstance(value, torch.Tensor) and value.ndim > 2 and value.shape[self.dim] == tokens
            return iter(value.split(lengths, self.dim)) if is_batch else iter([value] * len(lengths))

        columns = [split(value) for value in arguments]
        rows = [self.function(*[next(column) for column in columns], **part) for part in self._parts(named, split, lengths)]
        if isinstance(rows[0], tuple):
            return torch.cat([row[0] for row in rows], self.dim), None
        return torch.cat(rows, self.dim)

    @staticmethod
    def _parts(named: dict[str, Any], split: Any, lengths: list[int]) -> list[dict[str, Any]]:
        columns = {name: split(value) for name, value in named.items()}
        return [{name: next(column) for name, column in columns.items()} for _ in lengths]


def use_kernels(name: str, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> list[Kernel]:
    """Puts a `Kernel` in the place of each function of a model's code."""
    kernels = []
    for function, kind in KINDS.items():
        if hasattr(CODES[name], function):
            kernels.append(Kernel(getattr(CODES[name], function), kind.dim, **settings))
            monkeypatch.setattr(CODES[name], function, kernels[-1])
    return kernels


@pytest.mark.parametrize("name", CODES)
def test_kernels_get_the_boundaries_of_rows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(name)
    alone = torch.cat([label_logits(model, collate_padded([row]))[0] for row in ROWS])
    wanted = gradients(model, collate_padded(ROWS))
    kernels = use_kernels(name, monkeypatch)
    assert enable_padding_free(model) == ""
    assert describe_padding(prepare_recurrent_layers(model)) == []
    for kernel in kernels:
        kernel.boundaries.clear()
    torch.testing.assert_close(label_logits(model, collate_padding_free(ROWS))[0], alone, rtol=1e-3, atol=1e-4)
    assert len(kernels) == 2
    for kernel in kernels:
        (boundaries,) = kernel.boundaries
        if KINDS[kernel.__name__].boundaries == "cu_seqlens":
            assert (boundaries.dtype, boundaries.tolist()) == (torch.int64, [0, 50, 57, 90])
        else:
            assert (boundaries.dtype, boundaries.tolist()) == (torch.int32, [[0] * 50 + [1] * 7 + [2] * 33])
    found = gradients(model, collate_padding_free(ROWS))
    assert found.keys() == wanted.keys()
    for parameter, gradient in wanted.items():
        torch.testing.assert_close(found[parameter], gradient, rtol=1e-2, atol=1e-5, msg=parameter)


@pytest.mark.parametrize("name", CODES)
def test_a_kernel_that_does_not_keep_rows_apart_gets_padded_rows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(name)
    alone = torch.cat([label_logits(model, collate_padded([row]))[0] for row in ROWS])
    kernels = use_kernels(name, monkeypatch, keeps_rows_apart=False)
    assert enable_padding_free(model) == ""
    lines = describe_padding(prepare_recurrent_layers(model))
    assert lines == [
        f"{kernel.__name__} computes rows of similar length as padded batches: {kernel.__name__} does not keep rows apart"
        for kernel in kernels
    ]
    torch.testing.assert_close(label_logits(model, collate_padding_free(ROWS))[0], alone, rtol=1e-3, atol=1e-4)


def test_a_line_names_the_package_that_is_not_installed() -> None:
    model = build("qwen3_5_text")
    assert enable_padding_free(model) == ""
    lines = describe_padding(prepare_recurrent_layers(model))
    assert [line.partition(":")[0] for line in lines] == [
        "causal_conv1d_fn computes rows of similar length as padded batches",
        "torch_chunk_gated_delta_rule computes rows of similar length as padded batches",
    ]
    assert "`causal_conv1d`" in lines[0]
    assert "`flash-linear-attention`" in lines[1]


def test_a_later_error_of_a_kernel_is_not_hidden() -> None:
    def fail(x: torch.Tensor, seq_idx: Any = None) -> torch.Tensor:
        if seq_idx.max() > 1:
            raise ValueError("too many rows")
        return x

    function, x = RowFunction(fail, KINDS["causal_conv1d_fn"]), torch.ones(1, 2, 6)
    function(x, row_layout=RowLayout([3, 3]))
    with pytest.raises(ValueError, match="too many rows"):
        function(x, row_layout=RowLayout([2, 2, 2]))


def test_no_group_of_rows_is_more_padding_than_tokens() -> None:
    lengths = [4096, 1, 40, 2, 33, 64, 3, 1]
    groups, order = RowLayout(lengths).groups(torch.device("cpu"))
    assert all(positions.numel() < 2 * len(real) for positions, real in groups)
    tokens = torch.arange(sum(lengths))
    assert torch.cat([tokens[positions].flatten()[real] for positions, real in groups])[order].equal(tokens)
    shapes = sorted(tuple(positions.shape) for positions, _ in groups)
    assert shapes == [(1, 2), (1, 3), (1, 4096), (2, 1), (3, 64)]


def test_in_training_no_function_takes_the_weights_of_a_layer_past_its_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("granitemoehybrid")

    def fused(*_: Any, outproj_weight: torch.Tensor, **__: Any) -> Any:
        raise AssertionError("the weight of out_proj is read past its adapter")

    monkeypatch.setattr(modeling_granitemoehybrid, "mamba2_split_conv1d_scan_combined", fused)
    prepare_recurrent_layers(model)
    model.train()(input_ids=torch.tensor([[5, 6, 7]]), use_cache=False)
    prepare_recurrent_layers(build("mamba"))
    assert modeling_mamba.mamba_inner_fn() is None
