"""Every metric of the sampled tokens from whole arrays: what the stream must agree with."""

from __future__ import annotations

import numpy as np

from rl_onoff.compare.metrics import (
    DEFAULT_THRESHOLDS,
    Thresholds,
    metrics_from_means,
    order_metrics,
    sequence_terms,
    token_terms,
)


def chosen_token_metrics(
    behaviour_logprobs_N: np.ndarray,
    target_logprobs_N: np.ndarray,
    lengths_S: np.ndarray,
    thresholds: Thresholds = DEFAULT_THRESHOLDS,
) -> dict[str, float]:
    """Every metric that the two logprobs of the sampled tokens give, for responses that fit in memory."""
    lengths_S = np.asarray(lengths_S)
    terms = token_terms(behaviour_logprobs_N, target_logprobs_N, thresholds)
    terms |= sequence_terms(behaviour_logprobs_N, target_logprobs_N, lengths_S, thresholds)
    metrics = metrics_from_means({name: term.mean() for name, term in terms.items()})
    return {name: float(value) for name, value in metrics.items()} | order_metrics(
        behaviour_logprobs_N, target_logprobs_N, lengths_S
    )


def effective_sample_size(weights_N: np.ndarray) -> float:
    """(Σw)² / (N Σw²), in (0, 1]: the share of the samples that equal weights would need for the same variance."""
    weights_N = np.asarray(weights_N, np.float64)
    return float(weights_N.sum() ** 2 / (len(weights_N) * np.square(weights_N).sum()))
