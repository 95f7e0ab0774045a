"""Two policies over many responses: a stream of pairs in, every metric with its interval out, in bounded memory."""

from __future__ import annotations

from rl_onoff.compare.aggregate import Aggregator, compare
from rl_onoff.compare.bootstrap import CONFIDENCE, Estimate
from rl_onoff.compare.pair import Pair, Side, check_pair
from rl_onoff.compare.verdict import ON_POLICY_K3, Comparison, PositionBucket, Summary, verdict

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
