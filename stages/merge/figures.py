"""The figures of the comparison of two models, with their standard errors."""

from typing import Any, NamedTuple, TypeAlias

import numpy as np

Floats: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]

RESAMPLES = 1000
SEED = 0
QUANTILES = {"median_kl": 0.5, "p99_kl": 0.99, "p99_9_kl": 0.999}
MIN_GAIN_ERRORS = 2
"""There is a recovery only if the adapter's gain is larger than this many standard errors, about a 95 % interval."""


class TokenFigures(NamedTuple):
    """What was measured at each labelled token, (tokens,) each, all losses in nats."""

    row: np.ndarray[Any, np.dtype[np.int64]]
    """The number of the token's row, from 0."""
    kl: Floats
    """Kullback-Leibler divergence of the merged model's distribution from the trained model's, in nats."""
    delta_p: Floats
    """The label's probability, merged minus trained."""
    same_top: Floats
    """1 if both models have the same most likely token, otherwise 0."""
    logit_difference: Floats
    """The largest absolute difference of two logits."""
    trained_loss: Floats
    merged_loss: Floats
    base_loss: Floats
    """Of the base without the adapter."""


def summarize(tokens: TokenFigures) -> dict[str, Any]:
    """The figures over all tokens, as llama.cpp's `--kl-divergence` prints them, and how much of the training was kept.

    Returns:
        mean_kl, median_kl, p99_kl and p99_9_kl (quantiles) and max_kl in nats per token; rms_delta_p and mean_delta_p;
        top1_agreement, the share of tokens for which both models have the same most likely token;
        max_abs_logit_difference; base_loss, trained_loss and merged_loss; loss_difference, merged minus trained, and gain,
        base minus trained. recovery: (base_loss - merged_loss) / gain, None if the gain is not larger than MIN_GAIN_ERRORS
        standard errors. standard_errors: of all of these except the two largest values, by name; None if there is one row.

    The standard errors are those of a bootstrap that resamples rows (Efron 1979), since the tokens of a row are not
    independent. The same values always give the same errors.
    """
    rows = int(tokens.row.max()) + 1
    columns = [
        np.ones(len(tokens.row)),
        tokens.kl,
        tokens.delta_p,
        tokens.delta_p**2,
        tokens.same_top,
        tokens.trained_loss,
        tokens.merged_loss,
        tokens.base_loss,
    ]
    sums = np.stack([np.bincount(tokens.row, column, rows) for column in columns], 1)  # (rows, columns)
    resamples = _resamples(rows)
    found = {name: float(value) for name, value in _means(sums.sum(0)).items()}
    drawn = _means(resamples @ sums)
    order = np.argsort(tokens.kl, kind="stable")
    sorted_kl, sorted_rows = tokens.kl[order], tokens.row[order]
    found |= {name: float(value) for name, value in _quantiles(sorted_kl, np.ones(len(order), int)).items()}
    quantiles = [_quantiles(sorted_kl, counts[sorted_rows]) for counts in resamples]
    drawn |= {name: np.array([each[name] for each in quantiles]) for name in QUANTILES}
    errors = {name: float(drawn[name].std(ddof=1)) if rows > 1 else None for name in drawn}
    gain_error = errors["gain"]
    if gain_error is None or not found["gain"] > MIN_GAIN_ERRORS * gain_error:
        errors.pop("recovery")
    return {
        **{name: found[name] for name in ("mean_kl", *QUANTILES)},
        "max_kl": float(tokens.kl.max()),
        **{name: found[name] for name in ("rms_delta_p", "mean_delta_p", "top1_agreement")},
        "max_abs_logit_difference": float(tokens.logit_difference.max()),
        **{name: found[name] for name in ("base_loss", "trained_loss", "merged_loss", "loss_difference", "gain")},
        "recovery": found["recovery"] if "recovery" in errors else None,
        "standard_errors": errors,
    }


def quantization_cost(tokens: TokenFigures, full_loss: Floats) -> dict[str, Any]:
    """By how much quantizing the base raises its loss, before any training.

    Args:
        tokens: Their base_loss is that of the quantized base.
        full_loss: (tokens,) The loss of the base as it is, in nats.

    Returns:
        full_base_loss, quantized_base_loss, and cost, the second minus the first, all in nats per token; the cost's
        standard_error and its 95 % interval, both None if there is one row. They resample rows, as those of `summarize`,
        and each token is paired with itself: what makes a row hard is hard for both.
    """
    rows = int(tokens.row.max()) + 1
    count = np.bincount(tokens.row, minlength=rows)
    sums = np.bincount(tokens.row, tokens.base_loss - full_loss, rows)
    resamples = _resamples(rows)
    drawn = (resamples @ sums) / (resamples @ count)
    return {
        "full_base_loss": float(full_loss.mean()),
        "quantized_base_loss": float(tokens.base_loss.mean()),
        "cost": float(sums.sum() / count.sum()),
        "standard_error": float(drawn.std(ddof=1)) if rows > 1 else None,
        "interval": [float(end) for end in np.quantile(drawn, [0.025, 0.975])] if rows > 1 else None,
    }


def _resamples(rows: int) -> Any:
    """(RESAMPLES, rows): how often each row is in each resample; always the same."""
    return np.random.default_rng(SEED).multinomial(rows, [1 / rows] * rows, RESAMPLES)


def _means(totals: Any) -> dict[str, Floats]:
    """The figures that are made of sums, (...,) each, from the sums over all tokens of a sample, (..., columns)."""
    count, *others = np.moveaxis(totals, -1, 0)
    kl, delta_p, squared_delta_p, same_top, trained, merged, base = (other / count for other in others)
    gain = base - trained
    with np.errstate(divide="ignore", invalid="ignore"):  # without a gain the recovery is not used
        recovery = (base - merged) / gain
    return {
        "mean_kl": kl,
        "rms_delta_p": np.sqrt(squared_delta_p),
        "mean_delta_p": delta_p,
        "top1_agreement": same_top,
        "base_loss": base,
        "trained_loss": trained,
        "merged_loss": merged,
        "loss_difference": merged - trained,
        "gain": gain,
        "recovery": recovery,
    }


def _quantiles(values: Floats, counts: Any) -> dict[str, Any]:
    """For each of QUANTILES the smallest of the sorted values up to which its share of all counts lies."""
    cumulative = np.cumsum(counts)
    return {name: values[np.searchsorted(cumulative, share * cumulative[-1])] for name, share in QUANTILES.items()}
