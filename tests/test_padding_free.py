"""Padding-free attention is switched on only for models that compute the same logits with it."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from stages.model.padding_free import RowLayout, enable_padding_free


class DropsKeywords(LlamaForCausalLM):  # type: ignore[misc]
    """Does not pass keyword arguments on to its layers."""

    def forward(self, input_ids: Any, position_ids: Any = None, row_layout: Any = None, use_cache: Any = None) -> Any:
        return super().forward(input_ids=input_ids, position_ids=position_ids, use_cache=use_cache)


class RefusesKeywords(LlamaForCausalLM):  # type: ignore[misc]
    """Takes no keyword arguments that it does not know."""

    def forward(self, input_ids: Any, position_ids: Any = None, use_cache: Any = None) -> Any:
        return super().forward(input_ids=input_ids, position_ids=position_ids, use_cache=use_cache)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (LlamaForCausalLM, ""),
        (DropsKeywords, "its logits differ from those of single rows"),
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


def test_a_layout_turns_a_padding_free_batch_into_a_padded_one_and_back() -> None:
    layout = RowLayout([3, 1, 2])
    assert layout.starts(torch.device("cpu")).tolist() == [0, 3, 4, 6]
    positions, real = layout.padded(torch.device("cpu"))
    assert positions.tolist() == [[0, 1, 2], [3, 0, 0], [4, 5, 0]]
    assert positions[real].tolist() == list(range(6))
