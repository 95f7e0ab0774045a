"""What a comparison found, and the sentence it comes to."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rl_onoff.compare.bootstrap import CONFIDENCE, Estimate
from rl_onoff.compare.metrics import PRIME_RL_BAR, Thresholds
from rl_onoff.types import LogprobKind

FEW_RESPONSES = 10  # a bootstrap over fewer says little
ON_POLICY_K3 = 1e-4  # nats a token: two engines in float32 stay below; used where no noise floor was measured


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """The metrics of some responses, and how many responses and tokens (clamped, impossible, …) they rest on."""

    metrics: dict[str, Estimate]
    counts: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        return {"metrics": {name: estimate.to_dict() for name, estimate in self.metrics.items()}, "counts": self.counts}


@dataclass(frozen=True, kw_only=True, slots=True)
class PositionBucket:
    """Positions start ≤ t < end of the responses longer than start; its `cumulative_l` is Σ l up to and with position start."""

    start: int
    end: int
    summary: Summary


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
        """Plain JSON: no NaN, no infinity."""
        overall = self.overall.to_dict()
        return {
            "kind": self.kind.value,
            "overall": overall["metrics"],
            "counts": overall["counts"],
            "groups": {
                key: {value: summary.to_dict() for value, summary in group.items()}
                for key, group in self.groups.items()
            },
            "positions": [{"start": b.start, "end": b.end, **b.summary.to_dict()} for b in self.positions],
            "histograms": self.histograms,
            "worst": self.worst,
            "worst_responses": self.worst_responses,
            "thresholds": asdict(self.thresholds),
            "confidence": CONFIDENCE,
        }


def verdict(comparison: Comparison, noise_floor: float | None = None) -> str:
    """One plain sentence. Judged by mean k3 KL, nats a token, in this order:

    on-policy   not above the noise floor (k3 of a same-engine repeat), or not surely: the interval's lower end is not, while the value is
                under the bar; without a noise floor, under ON_POLICY_K3 = 1e-4
    close       under 0.015, prime-rl's bar for accepting a model
    off-policy  0.015 or more
    """
    k3 = comparison["kl_k3"]
    counts = comparison.overall.counts
    rough = ", rough with so few responses" if counts["responses"] < FEW_RESPONSES else ""
    interval = "" if k3.lo is None else f" (95 % interval {k3.lo:.2g} to {k3.hi:.2g}{rough})"
    said = f"the mean k3 KL is {k3.value:.2g} nats a token{interval} over {counts['tokens']:,} tokens of {counts['responses']:,} responses"
    return f"{_judge(k3, said, noise_floor)}{_impossible(comparison)}."


def _judge(k3: Estimate, said: str, noise_floor: float | None) -> str:
    under, lo, hi = k3.value < PRIME_RL_BAR, k3.value if k3.lo is None else k3.lo, k3.value if k3.hi is None else k3.hi
    if noise_floor is not None and k3.value <= noise_floor:
        return f"On-policy: {said}, not above the noise floor of {noise_floor:.2g}"
    if noise_floor is not None and under and lo <= noise_floor:
        return f"On-policy, as far as this tells: {said}; the interval reaches down to the noise floor of {noise_floor:.2g}"
    if noise_floor is None and k3.value < ON_POLICY_K3:
        return f"On-policy: {said}, under the {ON_POLICY_K3:.0e} that two engines in float32 stay below"
    above = "" if noise_floor is None else f", above the noise floor of {noise_floor:.2g}"
    if under and hi < PRIME_RL_BAR:
        return f"Close: {said}{above}; that is under prime-rl's bar of {PRIME_RL_BAR}"
    if under:
        return f"Close, not surely: {said}{above}; that is under prime-rl's bar of {PRIME_RL_BAR}, but the interval reaches over it"
    return f"Off-policy: {said}{above}, over prime-rl's bar of {PRIME_RL_BAR}"


def _impossible(comparison: Comparison) -> str:
    counts = comparison.overall.counts
    num = max(counts.get("tokens_impossible_target", 0), counts.get("tokens_impossible_sampler", 0))
    return f"; {num:,} of the sampled tokens could not have been drawn by the target's sampler" if num else ""
