"""What a comparison found, and the sentence it comes to."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import msgspec

from rl_onoff.compare.bootstrap import CONFIDENCE, Estimate
from rl_onoff.compare.metrics import PRIME_RL_BAR, Thresholds
from rl_onoff.types import LogprobKind

FEW_RESPONSES = 10  # a bootstrap over fewer says little
ON_POLICY_K3 = 1e-4  # nats a token: what stands in for a noise floor that was not measured
ROUNDING_K3 = 1e-8  # nats a token: rounding in float32, log-ratios of 1.4e-4; a lower noise floor counts as this


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """The metrics of some responses, and how many responses and tokens (clamped, impossible, …) they rest on."""

    metrics: dict[str, Estimate]
    counts: dict[str, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class PositionBucket:
    """Positions start ≤ t < end of the responses longer than start; `cumulative_l` is Σ l up to and with `start`."""

    start: int
    end: int
    metrics: dict[str, Estimate]
    counts: dict[str, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """How far the target is from the behaviour."""

    kind: LogprobKind
    overall: Summary
    groups: dict[str, dict[str, Summary]]  # {"level": {"3": …}}
    positions: list[PositionBucket]
    histograms: dict[str, Any]
    worst: list[dict[str, Any]]  # tokens with the largest |l|
    worst_responses: list[dict[str, Any]]  # responses with the largest mean |l|
    thresholds: Thresholds

    def __getitem__(self, name: str) -> Estimate:
        return self.overall.metrics[name]

    def __contains__(self, name: str) -> bool:
        return name in self.overall.metrics

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON, where NaN and infinity are null."""
        found = msgspec.json.decode(msgspec.json.encode(self))
        metrics, counts = found["overall"]["metrics"], found["overall"]["counts"]
        return {**found, "overall": metrics, "counts": counts, "confidence": CONFIDENCE}


def judge(k3: Estimate, floor: float | None) -> tuple[str, str]:
    """The word for a mean k3 KL (nats a token) and the reason for it; the only place where a gap is judged.

    On-policy   not above the noise floor, which is the k3 of the engine against itself, or what float32 rounds to where
                that is more; "as far as this tells" where only the interval reaches down to it. Without a noise floor:
                under ON_POLICY_K3
    Close       under 0.015, prime-rl's bar for accepting a model; "not surely" where the interval reaches over the bar
    Off-policy  0.015 or more
    """
    lo, hi = (k3.value if end is None else end for end in (k3.lo, k3.hi))
    if floor is None and k3.value < ON_POLICY_K3:
        return "On-policy", f"under {ON_POLICY_K3:.0e}, which two engines in float32 stay below"
    if floor is not None and k3.value <= floor:
        return "On-policy", f"not above the noise floor of {floor:.2g}"
    if floor is not None and k3.value <= ROUNDING_K3:
        return "On-policy", f"no more than rounding in float32 makes; the noise floor is {floor:.2g}"
    if floor is not None and lo <= max(floor, ROUNDING_K3) and k3.value < PRIME_RL_BAR:
        return "On-policy, as far as this tells", f"and the interval reaches down to the noise floor of {floor:.2g}"
    above = "" if floor is None else f"above the noise floor of {floor:.2g} and "
    if k3.value >= PRIME_RL_BAR:
        return "Off-policy", f"{above}over prime-rl's bar of {PRIME_RL_BAR}"
    under = f"under prime-rl's bar of {PRIME_RL_BAR}"
    if hi >= PRIME_RL_BAR:
        return "Close, not surely", f"{above}{under}, but the interval reaches over the bar"
    return "Close", f"{above}{under}"


def word_of(sentence: str) -> str:
    """On-policy, Close or Off-policy: the word of a verdict, a name of the target before it or not."""
    found = re.search(r"(?:^|: )(On-policy|Close|Off-policy)(?:, [\w ]+)?:", sentence)
    return found[1] if found else ""


def verdict(comparison: Comparison, noise_floor: float | None = None) -> str:
    """One plain sentence about a comparison: what `judge` says of its mean k3 KL, and what that rests on."""
    k3, counts = comparison["kl_k3"], comparison.overall.counts
    word, reason = judge(k3, noise_floor)
    rough = ", rough with so few responses" if counts["responses"] < FEW_RESPONSES else ""
    interval = "" if k3.lo is None else f" (95 % interval {k3.lo:.2g} to {k3.hi:.2g}{rough})"
    over = f"over {counts['tokens']:,} tokens of {counts['responses']:,} responses"
    num = max(counts.get("tokens_impossible_target", 0), counts.get("tokens_impossible_sampler", 0))
    impossible = f"; {num:,} of the sampled tokens could not have been drawn by the target's sampler" if num else ""
    return f"{word}: the mean k3 KL is {k3.value:.2g} nats a token{interval} {over}, {reason}{impossible}."
