"""Whether the merged model is the trained one."""

from collections.abc import Mapping
from typing import Any

from stages.core.problem import Problem
from stages.merge.right_weight import LayerCheck

MAX_ERROR = 0.1
"""The most by which a merged weight may differ from the right one, in parts of what merging changes in it. A right one is
the same, or differs where a sum at the edge of rounding falls to the other side, because float32 numbers were added in
another order or the training's kernel multiplied in TF32: 0.03 at most. A delta weight that was left out, doubled, taken
from another layer or scaled by 1.2 makes 0.2 and more."""
MAX_OUTPUT_ERROR = 0.1
"""The most by which what an adapter changes in the outputs of its layer may differ from what its tensors say."""
MEAN_KL = 1e-3
"""A mean KL divergence up to this one is right, in nats per token. Models of Llama's form in bfloat16 have 1e-5 to 5e-4."""
OTHER_TOP = 0.01
"""If up to this share of the labelled tokens have another most likely token, it is right."""
ROUNDING = 10
"""The mean KL divergence may also be as large as this number times what rounding alone makes, and the share of tokens with
another most likely one as its root times, since a KL divergence grows with the square of an error. Measured on right merges
were 0.3 to 1.7 times as much: Llama, Qwen 3 MoE and Qwen 3.5, tiny and random, in NF4 and int8; SmolLM2 0.9."""
SIGMAS = 3
"""Of few tokens a larger share may have another most likely one: by so many standard errors of the share."""
DIFFERENT_ANSWERS = 0.1
"""The most greedy answers that may differ by more than a near tie."""
NAMED_LAYERS = 3
"""The maximum number of layers that a message names."""


def check_parity(
    figures: Mapping[str, Any], layers: Mapping[str, LayerCheck], outputs: Mapping[str, float], *, base: str
) -> None:
    """Raises Problem with everything that shows that the merged model is not the trained one.

    Each weight is judged by itself, and alone suffices: the files differ from the base's in nothing else. Logits and answers
    show besides whether the folder is loaded as the same model. How close they should be depends on the model, so they are
    judged by what rounding alone makes of it.

    Args:
        figures: The stage's report.
        layers: From TrainedWeights.check.
        outputs: TrainedWeights.outputs.
        base: The parameter merge.base.
    """
    problems = [*_wrong_layers(layers, base), *_wrong_outputs(outputs)]
    rounding = figures["rounding"]
    most = max(MEAN_KL, ROUNDING * rounding["mean_kl"])
    if not figures["mean_kl"] <= most:
        problems.append(
            f"mean KL {figures['mean_kl']:.3e} is above {most:.3e}; rounding alone makes {rounding['mean_kl']:.3e} here"
        )
    other = min(1.0, max(OTHER_TOP, ROUNDING**0.5 * (1 - rounding["top1_agreement"])))
    least = 1 - other - SIGMAS * (other * (1 - other) / figures["tokens"]) ** 0.5
    if not figures["top1_agreement"] >= least:
        problems.append(
            f"the most likely token agrees for {figures['top1_agreement']:.4f} of the labelled tokens, below {least:.4f}; "
            f"with rounding alone it agrees for {rounding['top1_agreement']:.4f}"
        )
    if figures["greedy_different"] > DIFFERENT_ANSWERS * figures["greedy_rows"]:
        problems.append(
            f"{figures['greedy_different']} of {figures['greedy_rows']} greedy answers differ by more than a near tie"
        )
    if problems:
        remedy = "set merge.base to dequantized, which is closer" if base == "full" else "train again"
        problems.append(
            f"the merged model is not the trained one (loss {figures['merged_loss']:.4f}, trained "
            f"{figures['trained_loss']:.4f}, largest logit difference {figures['max_abs_logit_difference']:.3f}) and was "
            f"not written; {remedy}"
        )
        raise Problem(*problems)


def _wrong_layers(layers: Mapping[str, LayerCheck], base: str) -> list[str]:
    kept = "quantized weight that was trained with" if base == "dequantized" else "base's original weight"
    wrong = {name: check for name, check in layers.items() if not check.error <= MAX_ERROR}
    problems = [
        f"{name}: has {check.share:.2f} of the delta weight that was trained, and an error of {check.error:.2f} of it; "
        "wanted 1 and 0"
        if check.share is not None
        else f"{name}: is not the {kept}"
        for name, check in list(wrong.items())[:NAMED_LAYERS]
    ]
    if len(wrong) > NAMED_LAYERS:
        problems.append(f"{len(wrong) - NAMED_LAYERS} more of {len(layers)} layers have a wrong weight")
    return problems


def _wrong_outputs(outputs: Mapping[str, float]) -> list[str]:
    wrong = [name for name, share in outputs.items() if not abs(share - 1) <= MAX_OUTPUT_ERROR]
    problems = [
        f"{name}: the outputs of the trained layer have {outputs[name]:.2f} of what its adapter should change; wanted 1"
        for name in wrong[:NAMED_LAYERS]
    ]
    if len(wrong) > NAMED_LAYERS:
        problems.append(f"the outputs of {len(wrong) - NAMED_LAYERS} more of {len(outputs)} layers have another one")
    return problems
