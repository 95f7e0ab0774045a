"""Two policies over many responses: a stream of pairs in, every metric with its interval out, in bounded memory."""

from __future__ import annotations

from rl_onoff.comparison.aggregator import Aggregator, compare
from rl_onoff.comparison.bootstrap import CONFIDENCE, Estimate
from rl_onoff.comparison.pairs import Pair, Side, check_pair
from rl_onoff.comparison.result import ON_POLICY_K3, Comparison, PositionBucket, Summary, verdict

__all__ = [
    "CONFIDENCE",
    "ON_POLICY_K3",
    "Aggregator",
    "Comparison",
    "Estimate",
    "Pair",
    "PositionBucket",
    "Side",
    "Summary",
    "check_pair",
    "compare",
    "verdict",
]
