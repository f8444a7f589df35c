"""Padding-free attention is switched on only for models that compute the same logits with it."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from stages.model.collate import collate_padded, collate_padding_free
from stages.model.logits import label_logits
from stages.model.padding_free import RowLayout, enable_padding_free


class DropsKeywords(LlamaForCausalLM):  # type: ignore[misc]
    """Does not pass keyword arguments on to its layers."""

    def forward(self, input_ids: Any, position_ids: Any = None, row_layout: Any = None, use_cache: Any = None) -> Any:
        return super().forward(input_ids=input_ids, position_ids=position_ids, use_cache=use_cache)


class RefusesKeywords(LlamaForCausalLM):  # type: ignore[misc]
    """Takes no keyword arguments that it does not know."""

    def forward(self, input_ids: Any, position_ids: Any = None, use_cache: Any = None) -> Any:
        return super().forward(input_ids=input_ids, position_ids=position_ids, use_cache=use_cache)


class ReadsMask(LlamaForCausalLM):  # type: ignore[misc]
    """Takes for granted that there is a mask, as sparse attention does."""

    def forward(self, row_layout: Any = None, attention_mask: Any = None, **named: Any) -> Any:
        if row_layout is not None:
            attention_mask[:, -1]
        return super().forward(**named)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (LlamaForCausalLM, ""),
        (DropsKeywords, "its own code does not take the lengths of the rows"),
        (ReadsMask, "its own code reads the attention mask"),
        (RefusesKeywords, "the model does not accept further keyword arguments"),
    ],
)
def test_a_model_that_drops_the_row_layout_is_not_padding_free(kind: Any, reason: str) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = kind(LlamaConfig(vocab_size=40, **sizes)).eval()
    assert enable_padding_free(model) == reason
    assert (model.config._attn_implementation == "sdpa") == bool(reason)
    ids = torch.tensor([[5, 6, 7], [8, 9, 5]])
    logits = model(input_ids=ids).logits  # an ordinary batch, as trial runs of other modules are
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("window", [2, 4096])
def test_a_sliding_window_ends_within_a_row(window: int) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = MistralConfig(vocab_size=40, num_key_value_heads=2, sliding_window=window, **sizes)
    model = MistralForCausalLM(config).eval()
    rows = [{"input_ids": list(range(5, 5 + length)), "labels": [-100, *range(6, 5 + length)]} for length in (9, 4, 7)]
    alone = torch.cat([label_logits(model, collate_padded([row]))[0] for row in rows])
    assert enable_padding_free(model) == ""
    torch.testing.assert_close(label_logits(model, collate_padding_free(rows))[0], alone)
    same_length = [rows[0], rows[0]]
    logits = label_logits(model, collate_padding_free(same_length))[0]
    torch.testing.assert_close(logits, torch.cat([alone[:8], alone[:8]]))


def test_a_layout_turns_a_padding_free_batch_into_a_padded_one_and_back() -> None:
    layout = RowLayout([3, 1, 2])
    assert layout.starts(torch.device("cpu")).tolist() == [0, 3, 4, 6]
    positions, real = layout.padded(torch.device("cpu"))
    assert positions.tolist() == [[0, 1, 2], [3, 0, 0], [4, 5, 0]]
    assert positions[real].tolist() == list(range(6))
