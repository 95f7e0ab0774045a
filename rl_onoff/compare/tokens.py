"""What is kept of every token: enough for percentiles, extremes, plots and the list of the worst.

Shapes: S responses, N tokens of all of them one after the other.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from rl_onoff.compare.histograms import all_histograms
from rl_onoff.compare.metrics import log_ratios, order_metrics, segment_starts, segment_sums


class Tokens:
    """The kept columns, one number a token, and the lengths that cut them into responses."""

    def __init__(self, columns: dict[str, np.ndarray], keys: list[tuple[str, int]]) -> None:
        self.columns, self.keys, self.lengths_S = columns, keys, columns["lengths"]
        self.starts_S = segment_starts(self.lengths_S)
        self.l_N = log_ratios(columns["behaviour"], columns["target"]).l_N
        self.positions_N = (np.arange(len(self.l_N)) - np.repeat(self.starts_S, self.lengths_S)).astype(np.int32)

    def order_metrics(self, chosen_S: np.ndarray) -> dict[str, float]:
        chosen_N = np.repeat(chosen_S, self.lengths_S)
        return order_metrics(
            self.columns["behaviour"][chosen_N], self.columns["target"][chosen_N], self.lengths_S[chosen_S]
        )

    def abs_l_between(self, start: int, end: int) -> np.ndarray:
        return np.abs(self.l_N[(self.positions_N >= start) & (self.positions_N < end)])

    def histograms(self) -> dict[str, Any]:
        c = self.columns
        return all_histograms(c["behaviour"], c["target"], self.lengths_S, c["entropy_behaviour"], c["entropy_target"])

    def worst(self, num: int) -> list[dict[str, Any]]:
        at = np.argsort(-np.abs(self.l_N), kind="stable")[:num]
        responses = np.searchsorted(self.starts_S, at, side="right") - 1
        return [self._token(int(n), int(s)) for n, s in zip(at, responses, strict=True)]

    def worst_responses(self, num: int) -> list[dict[str, Any]]:
        abs_N = np.abs(self.l_N)
        mean_S = segment_sums(abs_N, self.lengths_S) / self.lengths_S
        max_S, sum_S = np.maximum.reduceat(abs_N, self.starts_S), segment_sums(self.l_N, self.lengths_S)
        return [
            {
                "request_id": self.keys[s][0],
                "sample": int(self.keys[s][1]),
                "tokens": int(self.lengths_S[s]),
                "mean_abs_l": float(mean_S[s]),
                "max_abs_l": float(max_S[s]),
                "sum_l": float(sum_S[s]),
            }
            for s in np.argsort(-mean_S, kind="stable")[:num]
        ]

    def _token(self, n: int, s: int) -> dict[str, Any]:
        """A logprob of −inf is null: JSON has no infinity."""
        q, p = float(self.columns["behaviour"][n]), float(self.columns["target"][n])
        return {
            "request_id": self.keys[s][0],
            "sample": int(self.keys[s][1]),
            "position": int(self.positions_N[n]),
            "token_id": int(self.columns["token_ids"][n]),
            "behaviour_logprob": q if np.isfinite(q) else None,
            "target_logprob": p if np.isfinite(p) else None,
            "l": float(self.l_N[n]),
        }
