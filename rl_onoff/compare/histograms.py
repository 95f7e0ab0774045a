"""The distributions that the report draws, as plain lists ready for JSON.

A histogram is {"edges": E + 1 numbers, "counts": E numbers, "below", "above"}: what lies outside is counted, never dropped.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from rl_onoff.compare.metrics import cumulative_l, log_ratios, segment_starts

ABS_EDGES = np.logspace(-8, 2, 81)
PROB_BINS = 50
MAX_POSITIONS = 200


def all_histograms(
    behaviour_logprobs_N: np.ndarray,
    target_logprobs_N: np.ndarray,
    lengths_S: np.ndarray,
    entropy_behaviour_N: np.ndarray,
    entropy_target_N: np.ndarray,
) -> dict[str, Any]:
    """Of l, |l|, p against q, both entropies (empty where unknown), and Σ l along the response."""
    l_N = log_ratios(behaviour_logprobs_N, target_logprobs_N).l_N
    limit = max(float(np.percentile(np.abs(l_N), 99.5)), 1e-6)
    edges = np.linspace(
        0, max(float(np.max(x, initial=0.0)) for x in (entropy_behaviour_N, entropy_target_N)) or 1.0, 61
    )
    return {
        "l": histogram(l_N, np.linspace(-limit, limit, 102)),
        "abs_l": histogram(np.abs(l_N), ABS_EDGES),
        "probabilities": probability_grid(behaviour_logprobs_N, target_logprobs_N),
        "entropy_behaviour": histogram(entropy_behaviour_N, edges),
        "entropy_target": histogram(entropy_target_N, edges),
        "cumulative_l": cumulative_curve(l_N, lengths_S),
    }


def histogram(values_N: np.ndarray, edges: np.ndarray) -> dict[str, Any]:
    counts = np.histogram(values_N, edges)[0]
    below, above = int((values_N < edges[0]).sum()), int((values_N > edges[-1]).sum())
    return {"edges": edges.tolist(), "counts": counts.tolist(), "below": below, "above": above}


def probability_grid(behaviour_logprobs_N: np.ndarray, target_logprobs_N: np.ndarray) -> dict[str, Any]:
    """counts[i][j]: tokens whose q lies in bin i and p in bin j of [0, 1]."""
    q_N, p_N = (
        np.minimum(np.exp(np.asarray(x, np.float64)) * PROB_BINS, PROB_BINS - 1).astype(np.int64)
        for x in (behaviour_logprobs_N, target_logprobs_N)
    )
    counts = np.bincount(q_N * PROB_BINS + p_N, minlength=PROB_BINS**2).reshape(PROB_BINS, PROB_BINS)
    return {"edges": np.linspace(0, 1, PROB_BINS + 1).tolist(), "counts": counts.tolist()}


def cumulative_curve(l_N: np.ndarray, lengths_S: np.ndarray) -> dict[str, Any]:
    """Mean of Σ_{s≤t} l_s over the responses that reach position t, at no more than 200 positions; `num` says how many do.

    Long responses are not short ones continued: where `num` falls, the curve changes population.
    """
    sum_N, starts_S = cumulative_l(l_N, lengths_S), segment_starts(lengths_S)
    positions = np.unique(np.linspace(0, np.max(lengths_S) - 1, MAX_POSITIONS).astype(np.int64))
    reached = [starts_S[lengths_S > t] + t for t in positions]
    return {
        "position": positions.tolist(),
        "mean": [float(sum_N[at].mean()) for at in reached],
        "num": [len(at) for at in reached],
    }
