"""merge, the limits: what rounding explains passes, and what it does not explain is refused."""

from typing import Any

import pytest

from stages.core.problem import Problem
from stages.merge.limits import NAMED_LAYERS, check_parity
from stages.merge.right_weight import LayerCheck

FIGURES: dict[str, Any] = {
    "tokens": 1000,
    "mean_kl": 1e-4,
    "top1_agreement": 0.999,
    "rounding": {"mean_kl": 1e-4, "top1_agreement": 0.999},
    "greedy_rows": 16,
    "greedy_different": 0,
    "merged_loss": 1.0,
    "trained_loss": 1.0,
    "max_abs_logit_difference": 0.1,
}
ROUNDING = {"mean_kl": 0.02, "top1_agreement": 0.95}
"""What a hybrid in int8 makes of rounding."""


def messages(changed: dict[str, Any], **given: Any) -> list[str]:
    settings: dict[str, Any] = {"layers": {}, "outputs": {}, "base": "dequantized"} | given
    try:
        check_parity(FIGURES | changed, settings["layers"], settings["outputs"], base=settings["base"])
    except Problem as problem:
        return list(problem.messages)
    return []


@pytest.mark.parametrize(
    ("changed", "refused"),
    [
        ({}, ""),
        ({"mean_kl": 1.1e-3}, "mean KL 1.100e-03 is above 1.000e-03; rounding alone makes 1.000e-04 here"),
        ({"mean_kl": 0.06, "top1_agreement": 0.9, "rounding": ROUNDING}, ""),
        ({"mean_kl": 0.21, "rounding": ROUNDING}, "mean KL 2.100e-01 is above 2.000e-01"),
        ({"mean_kl": float("nan")}, "mean KL nan is above"),
        ({"top1_agreement": 0.97}, "agrees for 0.9700 of the labelled tokens, below 0.98"),
        ({"top1_agreement": 0.985}, ""),
        ({"top1_agreement": 0.97, "tokens": 87}, ""),
        ({"top1_agreement": 0.7, "rounding": ROUNDING}, "with rounding alone it agrees for 0.9500"),
        ({"greedy_different": 1}, ""),
        ({"greedy_different": 2}, "2 of 16 greedy answers differ by more than a near tie"),
    ],
)
def test_logits_and_answers_are_judged_by_what_rounding_makes_of_the_model(changed: dict[str, Any], refused: str) -> None:
    found = messages(changed)
    assert bool(found) == bool(refused), found
    if refused:
        assert len(found) == 2
        assert refused in found[0]
        assert found[1].endswith("was not written; train again")


def test_wrong_layers_are_named() -> None:
    wrong = {f"layer {n}": LayerCheck(error=0.2, share=1.2) for n in range(NAMED_LAYERS + 2)}
    right = {"fine": LayerCheck(error=0.03, share=1.0)}
    found = messages({}, layers=right | wrong, base="full")
    assert found[0] == ("layer 0: has 1.20 of the delta weight that was trained, and an error of 0.20 of it; wanted 1 and 0")
    assert found[NAMED_LAYERS] == f"2 more of {NAMED_LAYERS + 3} layers have a wrong weight"
    assert found[-1].endswith("set merge.base to dequantized, which is closer")
    assert messages({}, layers=right) == []
    quantized = {"layer": LayerCheck(error=0.2, share=None)}
    assert messages({}, layers=quantized)[0] == "layer: is not the quantized weight that was trained with"
    assert messages({}, layers=quantized, base="full")[0] == "layer: is not the base's original weight"
    assert messages({}, layers={"layer": LayerCheck(error=float("nan"), share=1.0)})


def test_outputs_that_are_not_those_of_the_adapter_are_named() -> None:
    assert messages({}, outputs={"layer": 0.95}) == []
    found = messages({}, outputs={f"layer {n}": 1.2 for n in range(NAMED_LAYERS + 1)})
    assert found[0] == "layer 0: the outputs of the trained layer have 1.20 of what its adapter should change; wanted 1"
    assert found[NAMED_LAYERS] == f"the outputs of 1 more of {NAMED_LAYERS + 1} layers have another one"
