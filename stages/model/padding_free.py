"""Padding-free attention: the rows of a batch are concatenated without padding, and each row attends only to itself."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from stages.core.tokens import IGNORE
from stages.model.collate import collate_padding_free
from stages.model.probe import TRIAL_ERRORS, last_logits, logits_match, probe_rows, reason_of
from stages.model.recurrent import prepare_recurrent_layers

PADDING_FREE = "loratory_padding_free"
"""The name of this attention function in Transformers' AttentionInterface. There is none in its AttentionMaskInterface, so
that models make no masks: they would look for row boundaries in `position_ids`, and the CPU would wait for the GPU."""
OWN_CODE = "its own code does not take the lengths of the rows"
FLASH_HEAD_DIM = 256
"""The largest head dimension of FlashAttention."""


class RowLayout:
    """The lengths of the rows of a padding-free batch.

    It is passed to the model as the keyword argument `row_layout`; Transformers hands it on to every layer's attention
    function. The tensors are made once for each device and used by all its layers. From `position_ids` the lengths would
    have to be read back from the GPU, which makes the CPU wait.
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = list(lengths)
        self.longest = max(lengths)
        self.ragged = min(lengths) < self.longest
        """Whether the lengths differ."""
        self.used = False
        """Whether a layer has asked for more than that. Code that knows nothing of it may find the rows in `position_ids`,
        but then computes a mask and scores for all tokens with all tokens of the batch."""
        self._starts: dict[torch.device, torch.Tensor] = {}
        self._padded: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}
        self._row_numbers: dict[torch.device, torch.Tensor] = {}
        self._groups: dict[torch.device, tuple[list[tuple[torch.Tensor, torch.Tensor]], torch.Tensor]] = {}

    def starts(self, device: torch.device) -> torch.Tensor:
        """(rows + 1,) in int32: the position of each row's first token, and the number of all tokens (cu_seqlens)."""
        if device not in self._starts:
            ends = torch.tensor([0, *self.lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
            self._starts[device] = ends.to(device, non_blocking=True)
        return self._starts[device]

    def row_numbers(self, device: torch.device) -> torch.Tensor:
        """(1, tokens) in int32: the number of each token's row (seq_idx)."""
        if device not in self._row_numbers:
            lengths = torch.tensor(self.lengths)
            numbers = torch.arange(len(lengths), dtype=torch.int32).repeat_interleave(lengths).unsqueeze(0)
            self._row_numbers[device] = numbers.to(device, non_blocking=True)
        return self._row_numbers[device]

    def groups(self, device: torch.device) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], torch.Tensor]:
        """Groups of rows whose lengths differ by less than a factor of two, so that no group is more padding than tokens.

        Returns:
            For each group positions (rows, longest) in int64, the position in the batch of each token, 0 for padding; and
            (tokens,), the places of the tokens in the flattened positions. And (tokens,) in int64: where each token of the
            batch is among the tokens of all groups.
        """
        if device not in self._groups:
            lengths = torch.tensor(self.lengths)
            starts = lengths.cumsum(0) - lengths
            sizes = [(length - 1).bit_length() for length in self.lengths]
            groups, order = [], []
            for size in sorted(set(sizes)):
                rows = torch.tensor([row for row, each in enumerate(sizes) if each == size])
                steps = torch.arange(int(lengths[rows].max()))
                real = steps < lengths[rows].unsqueeze(1)
                positions = (starts[rows].unsqueeze(1) + steps).where(real, 0)
                groups.append((positions.to(device, non_blocking=True), real.flatten().nonzero().squeeze(1).to(device)))
                order.append(positions[real])
            self._groups[device] = groups, torch.cat(order).argsort().to(device, non_blocking=True)
        return self._groups[device]

    def padded(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Two tensors (rows, longest) that turn the batch into a padded one and back.

        The position in the batch of each row's tokens, 0 for padding; and False for padding, True for tokens.
        """
        if device not in self._padded:
            lengths = torch.tensor(self.lengths).unsqueeze(1)
            steps = torch.arange(self.longest)
            real = steps < lengths
            positions = (lengths.cumsum(0) - lengths + steps).where(real, 0)
            self._padded[device] = positions.to(device, non_blocking=True), real.to(device, non_blocking=True)
        return self._padded[device]


def enable_padding_free(model: Any, longest_row: int = 0) -> str:
    """Switches the model, in evaluation mode, to padding-free attention, if it computes the same logits with it.

    A trial run decides: some models have their own attention code, drop the keyword argument `row_layout`, need more than
    plain causal attention, have a sliding window that only their masks know, or a recurrent state. The logits of the rows of
    `probe_rows` in one padding-free batch must be those of each row by itself.

    Args:
        model: A causal language model.
        longest_row: Tokens of the longest row that it will compute.

    Returns:
        "" if padding-free attention is on. Otherwise the reason why not; the model is then unchanged.
    """
    before = getattr(model.config, "_attn_implementation", None)
    if before is None:
        return OWN_CODE
    rows, functions = probe_rows(model, longest_row), prepare_recurrent_layers(model)
    with torch.no_grad():
        alone = [last_logits(model, [len(row)], input_ids=torch.tensor([row], device=model.device)) for row in rows]
        reason = _try_padding_free(model, rows, torch.cat(alone))
        uses_kernel = [function for function in functions if function.why_padded == ""]
        if reason and uses_kernel:
            for function in uses_kernel:
                function.why_padded = f"{function.__name__} does not keep rows apart"
            reason = _try_padding_free(model, rows, torch.cat(alone))
    if reason:
        model.set_attn_implementation(before)
    return reason


def _try_padding_free(model: Any, rows: Sequence[list[int]], expected: torch.Tensor) -> str:
    """The reason why the model cannot compute the logits `expected`, as from `last_logits`, of padding-free rows."""
    batch = collate_padding_free([{"input_ids": ids, "labels": [IGNORE] * len(ids)} for ids in rows])
    inputs = {name: batch[name].to(model.device) for name in ("input_ids", "position_ids")}
    layout = RowLayout(batch["row_lengths"])
    try:
        model.set_attn_implementation(PADDING_FREE)
        logits = last_logits(model, layout.lengths, **inputs, row_layout=layout)
    except TRIAL_ERRORS as error:
        if "unexpected keyword argument" in str(error):
            return "the model does not accept further keyword arguments"
        # There is no mask with this attention function, see PADDING_FREE.
        return "its own code reads the attention mask" if "'NoneType' object" in str(error) else reason_of(error)
    if not layout.used:
        return OWN_CODE
    return "" if logits_match(logits, expected) else "its logits differ from those of single rows"


def require_plain_attention(attention_mask: torch.Tensor | None, options: dict[str, Any]) -> None:
    """Raises NotImplementedError with the reason if a model's attention is more than softmax(q·k)·v.

    Args:
        options: The keyword arguments of an attention function in Transformers.
    """
    if attention_mask is not None:
        raise NotImplementedError("its attention needs a mask")
    if options.get("softcap"):
        raise NotImplementedError("its attention uses logit soft-capping")
    if options.get("s_aux") is not None:
        raise NotImplementedError("its attention uses attention sinks")


def padding_free_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    row_layout: RowLayout | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each row of a padding-free batch; an attention function in Transformers' sense.

    Args:
        query: (1, heads, tokens, head dim). `key` and `value` may have fewer heads (grouped-query attention).
        row_layout: Of the batch. None: an ordinary batch (rows, heads, tokens, head dim) without padding, as in a trial
            run that knows nothing of padding-free rows.

    Returns:
        (1, tokens, heads, head dim), or (rows, tokens, heads, head dim) without `row_layout`; and no attention weights.

    Raises NotImplementedError if the model needs more than plain causal attention.
    """
    require_plain_attention(attention_mask, options)
    dropout = dropout if module.training else 0.0
    window: int | None = options.get("sliding_window")
    if row_layout is None:
        return _causal_attention(query, key, value, dropout=dropout, scaling=scaling, window=window), None
    row_layout.used = True
    window = window if window and window < row_layout.longest else None
    # Not tensor[0]: its gradient is a tensor of zeros with a copy in it.
    heads = [tensor.squeeze(0) for tensor in (query, key, value)]  # (heads, tokens, head dim)
    half = query.is_cuda and query.dtype != torch.float32
    sizes_fit = query.shape[-1] == value.shape[-1] <= FLASH_HEAD_DIM
    flash = half and sizes_fit and not dropout and not torch.are_deterministic_algorithms_enabled()
    if flash and (row_layout.ragged or window):
        q, k, v = (tensor.transpose(0, 1) for tensor in heads)  # (tokens, heads, head dim)
        return _ragged_attention(q, k, v, layout=row_layout, scaling=scaling, window=window).unsqueeze(0), None
    if row_layout.ragged:
        # Padded on the right, where causal attention never looks, so the padding needs no mask.
        positions, real = row_layout.padded(query.device)
        q, k, v = (tensor[:, positions].transpose(0, 1) for tensor in heads)  # (rows, heads, longest, head dim)
        return _causal_attention(q, k, v, dropout=dropout, scaling=scaling, window=window)[real].unsqueeze(0), None
    # For rows of one length PyTorch's dense kernel is nearly twice as fast as its kernel for ragged rows.
    q, k, v = (torch.unflatten(tensor, 1, (-1, row_layout.longest)).transpose(0, 1) for tensor in heads)
    return _causal_attention(q, k, v, dropout=dropout, scaling=scaling, window=window).flatten(0, 1).unsqueeze(0), None


def _causal_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, dropout: float, scaling: float | None, window: int | None
) -> torch.Tensor:
    """(rows, heads, tokens, head dim) each, to (rows, tokens, heads, head dim)."""
    mask = None
    if window and window < q.shape[2]:
        positions = torch.arange(q.shape[2], device=q.device)
        distance = positions.unsqueeze(1) - positions
        mask = (distance >= 0) & (distance < window)
    groups = q.shape[1] // k.shape[1]
    if groups > 1 and q.is_cuda and (mask is not None or q.shape[-1] > FLASH_HEAD_DIM):
        # Of PyTorch's kernels only FlashAttention takes fewer key heads; without a kernel all scores would be in memory.
        k, v, groups = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1), 1
    return scaled_dot_product_attention(
        q, k, v, mask, dropout, is_causal=mask is None, scale=scaling, enable_gqa=groups > 1
    ).transpose(1, 2)


def _ragged_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, layout: RowLayout, scaling: float | None, window: int | None
) -> torch.Tensor:
    """PyTorch's flash attention for rows of different lengths, (tokens, heads, head dim) each."""
    from torch.nn.attention.varlen import varlen_attn

    starts = layout.starts(q.device)
    settings: dict[str, Any] = {"scale": scaling, "window_size": (window - 1 if window else -1, 0)}
    # PyTorch 2.11 has no `enable_gqa`; it groups the query heads by itself.
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:
        settings["enable_gqa"] = q.shape[1] != k.shape[1]
    out = varlen_attn(q, k, v, starts, starts, layout.longest, layout.longest, **settings)
    assert isinstance(out, torch.Tensor)  # a pair only if log-sum-exps are requested
    return out


AttentionInterface.register(PADDING_FREE, padding_free_attention)
