"""What is kept of every token: enough for percentiles, extremes, plots and the list of the worst.

Shapes: S responses, N tokens of all of them one after the other. A histogram is {"edges": E + 1 numbers, "counts": E
numbers, "below", "above"}: what lies outside is counted, never dropped.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from rl_onoff.compare.bootstrap import finite
from rl_onoff.compare.metrics import cumulative_l, log_ratios, order_metrics, segment_starts, segment_sums
from rl_onoff.types import Key

ABS_EDGES = np.logspace(-8, 2, 81)
PROB_BINS = 50
MAX_POSITIONS = 200


class Tokens:
    """The kept columns, one number a token, and the lengths that cut them into responses."""

    def __init__(self, columns: dict[str, np.ndarray], keys: list[Key]) -> None:
        self.columns, self.keys, self.lengths_S = columns, keys, columns["lengths"]
        self.starts_S = segment_starts(self.lengths_S)
        self.l_N = log_ratios(columns["behaviour"], columns["target"])
        self.positions_N = (np.arange(len(self.l_N)) - np.repeat(self.starts_S, self.lengths_S)).astype(np.int32)

    def order_metrics(self, chosen_S: np.ndarray) -> dict[str, float]:
        q_N, p_N = (self.columns[side][np.repeat(chosen_S, self.lengths_S)] for side in ("behaviour", "target"))
        return order_metrics(q_N, p_N, self.lengths_S[chosen_S])

    def abs_l_between(self, start: int, end: int) -> np.ndarray:
        return np.abs(self.l_N[(self.positions_N >= start) & (self.positions_N < end)])

    def histograms(self) -> dict[str, Any]:
        """Of l, |l|, p against q, both entropies (empty where unknown), and Σ l along the response; ready for JSON."""
        entropies = {name: self.columns[name] for name in ("entropy_behaviour", "entropy_target")}
        limit = max(float(np.percentile(np.abs(self.l_N), 99.5)), 1e-6)
        edges = np.linspace(0, max(float(np.max(x, initial=0.0)) for x in entropies.values()) or 1.0, 61)
        return {
            "l": _histogram(self.l_N, np.linspace(-limit, limit, 102)),
            "abs_l": _histogram(np.abs(self.l_N), ABS_EDGES),
            "probabilities": self._probability_grid(),
            **{name: _histogram(values_N, edges) for name, values_N in entropies.items()},
            "cumulative_l": self._cumulative_curve(),
        }

    def worst(self, num: int) -> list[dict[str, Any]]:
        """The tokens with the largest |l|; a logprob of −inf is null, since JSON has no infinity."""
        at_W = np.argsort(-np.abs(self.l_N), kind="stable")[:num]
        responses_W = np.searchsorted(self.starts_S, at_W, side="right") - 1
        return [
            {
                "request_id": self.keys[s][0],
                "sample": self.keys[s][1],
                "position": int(self.positions_N[n]),
                "token_id": int(self.columns["token_ids"][n]),
                "behaviour_logprob": finite(float(self.columns["behaviour"][n])),
                "target_logprob": finite(float(self.columns["target"][n])),
                "l": float(self.l_N[n]),
            }
            for n, s in zip(at_W, responses_W, strict=True)
        ]

    def worst_responses(self, num: int) -> list[dict[str, Any]]:
        """The responses with the largest mean |l|."""
        abs_N = np.abs(self.l_N)
        mean_S = segment_sums(abs_N, self.lengths_S) / self.lengths_S
        max_S, sum_S = np.maximum.reduceat(abs_N, self.starts_S), segment_sums(self.l_N, self.lengths_S)
        return [
            {
                "request_id": self.keys[s][0],
                "sample": self.keys[s][1],
                "tokens": int(self.lengths_S[s]),
                "mean_abs_l": float(mean_S[s]),
                "max_abs_l": float(max_S[s]),
                "sum_l": float(sum_S[s]),
            }
            for s in np.argsort(-mean_S, kind="stable")[:num]
        ]

    def _probability_grid(self) -> dict[str, Any]:
        """counts[i][j]: tokens whose q lies in bin i and p in bin j of [0, 1]."""
        logprobs = (np.asarray(self.columns[side], np.float64) for side in ("behaviour", "target"))
        q_N, p_N = (np.minimum(np.exp(x_N) * PROB_BINS, PROB_BINS - 1).astype(np.int64) for x_N in logprobs)
        counts = np.bincount(q_N * PROB_BINS + p_N, minlength=PROB_BINS**2).reshape(PROB_BINS, PROB_BINS)
        return {"edges": np.linspace(0, 1, PROB_BINS + 1).tolist(), "counts": counts.tolist()}

    def _cumulative_curve(self) -> dict[str, Any]:
        """Mean of Σ_{s≤t} l_s over the `num` responses that reach position t, at no more than 200 positions.

        Long responses are not short ones continued: where `num` falls, the curve changes population.
        """
        sum_N = cumulative_l(self.l_N, self.lengths_S)
        positions = np.unique(np.linspace(0, np.max(self.lengths_S) - 1, MAX_POSITIONS).astype(np.int64))
        reached = [self.starts_S[self.lengths_S > t] + t for t in positions]
        means = [float(sum_N[at].mean()) for at in reached]
        return {"position": positions.tolist(), "mean": means, "num": [len(at) for at in reached]}


def _histogram(values_N: np.ndarray, edges: np.ndarray) -> dict[str, Any]:
    counts = np.histogram(values_N, edges)[0]
    below, above = int((values_N < edges[0]).sum()), int((values_N > edges[-1]).sum())
    return {"edges": edges.tolist(), "counts": counts.tolist(), "below": below, "above": above}
