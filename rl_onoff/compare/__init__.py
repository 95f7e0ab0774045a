"""Two policies over many responses: a stream of pairs in, every metric with its interval out, in bounded memory."""

from __future__ import annotations

from rl_onoff.compare.aggregate import Aggregator, compare
from rl_onoff.compare.comparison import ON_POLICY_K3, Comparison, Estimate, WhoseError, judge, verdict, word_of
from rl_onoff.compare.distributions import DISTRIBUTION_METRICS
from rl_onoff.compare.metrics import TOKEN_METRICS, Metric
from rl_onoff.compare.pair import Pair, as_kind
from rl_onoff.compare.truth import whose_error

__all__ = [
    "HEADLINES", "METRICS", "ON_POLICY_K3", "Aggregator", "Comparison", "Estimate", "Metric", "Pair", "WhoseError",
    "as_kind", "compare", "headlines", "judge", "verdict", "whose_error", "word_of",
]  # fmt: skip

METRICS: dict[str, Metric] = TOKEN_METRICS | DISTRIBUTION_METRICS


def headlines(least: int = 1) -> list[str]:
    """Names of the metrics whose `headline` is this or more, in the order of METRICS."""
    return [name for name, metric in METRICS.items() if metric.headline >= least]


HEADLINES = headlines()
