"""What a comparison found: sums per response, the metrics with their uncertainty, and the sentence they come to.

Shapes: R rows (a response, or the part of one that lies in a position bucket), F terms, B resamples. A metric is a
function of means, a mean is a ratio of sums, and a sum over responses drawn again with replacement is a weighted sum of
the rows. So a resample costs one row of a matrix product, and no token is looked at twice.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import msgspec
import numpy as np

from rl_onoff.compare.findings import Finding
from rl_onoff.compare.metrics import PRIME_RL_BAR, Thresholds, metrics_from_means
from rl_onoff.errors import plural
from rl_onoff.types import LogprobKind

CONFIDENCE = 0.95
CHUNK = 1 << 22  # resampling weights made at a time: 32 MB
FEW_RESPONSES = 10  # a bootstrap over fewer says little
ON_POLICY_K3 = 1e-4  # nats a token: what stands in for a noise floor that was not measured
ROUNDING_K3 = 1e-8  # nats a token: rounding in float32, log-ratios of 1.4e-4; a lower noise floor counts as this
TRUTH_ERROR = 1e-4  # nats: what a forward pass in float32 may itself be off by, at most
RELATED = 0.15  # a correlation, or a share of the gap that is of both errors together, that is not called nothing
WIDE = 0.3  # an interval of a share that allows no claim
FRACTIONS = {
    "almost none": 0.0, "a tenth": 0.1, "a quarter": 0.25, "a third": 1 / 3, "half": 0.5, "two thirds": 2 / 3,
    "three quarters": 0.75, "nine tenths": 0.9, "nearly all": 1.0,
}  # fmt: skip

Formula = Callable[[Mapping[str, Any]], dict[str, np.ndarray]]  # means of terms -> metrics


@dataclass(frozen=True, slots=True)
class Estimate:
    """A metric and its 95 % bootstrap interval over responses; none where a metric is not made of sums, or R < 2."""

    value: float
    lo: float | None = None
    hi: float | None = None

    def to_dict(self) -> dict[str, float | None]:
        """JSON has no NaN: an undefined metric (a correlation with a constant) is null."""
        return {name: x if x is not None and np.isfinite(x) else None for name, x in asdict(self).items()}


@dataclass(frozen=True, slots=True)
class Sums:
    """Σ of every term over each row's tokens, and how many tokens had the term (0 in a response without top-k, say)."""

    names: tuple[str, ...]
    sums_RF: np.ndarray
    counts_RC: np.ndarray
    column_F: np.ndarray  # which column of counts_RC belongs to a term: many terms share one

    @classmethod
    def of(cls, batches: Sequence[Mapping[str, tuple[np.ndarray, np.ndarray]]]) -> Sums:
        """The rows of all batches, each the sums and counts (R,) by term; batches need not have the same terms."""
        names = tuple(dict.fromkeys(name for batch in batches for name in batch))
        # terms with the same count array in every batch share a column
        shared = [tuple(id(batch[name][1]) if name in batch else 0 for batch in batches) for name in names]
        columns = list(dict.fromkeys(shared))

        ends = np.cumsum([len(next(iter(batch.values()))[0]) for batch in batches])

        def stacked(which: int, names: Sequence[str]) -> np.ndarray:
            found = np.zeros((ends[-1], len(names)))
            for batch, end in zip(batches, ends, strict=True):
                start = end - len(next(iter(batch.values()))[0])
                for f, name in enumerate(names):
                    found[start:end, f] = batch[name][which] if name in batch else 0
            return found

        counts_RC = stacked(1, [names[shared.index(column)] for column in columns])
        return cls(names, stacked(0, names), counts_RC, np.array([columns.index(column) for column in shared]))

    def batch(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """The rows as a batch of a larger whole."""
        counts = list(self.counts_RC.T)
        return {name: (self.sums_RF[:, f], counts[self.column_F[f]]) for f, name in enumerate(self.names)}

    def rows(self, rows: np.ndarray) -> Sums:
        return Sums(self.names, self.sums_RF[rows], self.counts_RC[rows], self.column_F)

    def total(self, name: str) -> int:
        return round(self.sums_RF[:, self.names.index(name)].sum()) if name in self.names else 0

    def values(self, formula: Formula = metrics_from_means) -> dict[str, float]:
        """Every metric of all rows together."""
        totals_C = self.counts_RC.sum(axis=0)
        absent = {name for name, column in zip(self.names, self.column_F, strict=True) if not totals_C[column]}
        values = self._metrics(self.sums_RF.sum(axis=0), totals_C, formula)
        return {name: float(value) for name, value in values.items() if name not in absent}

    def estimates(
        self, num_resamples: int, seed: int, exact: dict[str, float], formula: Formula = metrics_from_means
    ) -> dict[str, Estimate]:
        """Every metric with its interval (percentile bootstrap, Efron 1979), and those of `exact` without."""
        num_rows, values = len(self.sums_RF), self.values(formula)
        estimates = {name: Estimate(value) for name, value in (values | exact).items()}
        if num_rows < 2 or num_resamples < 2:
            return estimates
        rng, step, parts = np.random.default_rng(seed), max(1, CHUNK // num_rows), []
        for start in range(0, num_resamples, step):
            shape = (min(step, num_resamples - start), num_rows)
            drawn_BR = rng.integers(num_rows, size=shape) + np.arange(shape[0])[:, None] * num_rows
            # how often a resample drew each row
            weights_BR = np.bincount(drawn_BR.ravel(), minlength=drawn_BR.size).reshape(shape).astype(np.float64)
            parts.append(self._metrics(weights_BR @ self.sums_RF, weights_BR @ self.counts_RC, formula))
        tail = 100 * (1 - CONFIDENCE) / 2
        for name, value in values.items():
            draws_B = np.concatenate([part[name] for part in parts])
            draws_B = draws_B[~np.isnan(draws_B)]
            if len(draws_B):
                estimates[name] = Estimate(value, *np.percentile(draws_B, (tail, 100 - tail)).tolist())
        return estimates

    def _metrics(self, sums_F: np.ndarray, counts_C: np.ndarray, formula: Formula) -> dict[str, np.ndarray]:
        with np.errstate(invalid="ignore", divide="ignore"):
            means_F = sums_F / counts_C[..., self.column_F]
            return formula({name: means_F[..., f] for f, name in enumerate(self.names)})


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """The metrics of some responses, and how many responses and tokens (clamped, impossible, …) they rest on."""

    metrics: dict[str, Estimate]
    counts: dict[str, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Bucket(Summary):
    """Positions start ≤ t < end of the responses longer than start, where `cumulative_l` is Σ l up to and with `start`;
    or tokens whose probability is in [start, end).
    """

    start: float
    end: float


@dataclass(frozen=True, kw_only=True, slots=True)
class WhoseError:
    """The gap between behaviour and target, taken apart by their errors against a truth (`truth.py`)."""

    truth: str  # name of the scores that are the truth
    target: str
    overall: Summary
    by_probability: list[Bucket]  # of the token, under the truth

    @property
    def told(self) -> bool:
        """Whether an error is larger than what the truth itself may be off by."""
        return max(self.overall.metrics[f"error_{side}"].value for side in ("behaviour", "target")) >= TRUTH_ERROR

    def values(self) -> dict[str, float]:
        return {name: x.value for name, x in self.overall.metrics.items() if np.isfinite(x.value)}

    def rows(self) -> list[dict[str, Any]]:
        """A row for each bucket that has tokens."""
        return [
            {"from": x.start, "to": x.end, "tokens": x.counts["tokens"]}
            | {name: each.to_dict()["value"] for name, each in x.metrics.items()}
            for x in self.by_probability
        ]  # fmt: skip

    def sentence(self) -> str:
        """Whose the gap is, with the numbers, as far as the intervals allow to say so."""
        m, target, counts = self.overall.metrics, self.target, self.overall.counts
        q, p, r = m["error_behaviour"].value, m["error_target"].value, m["error_correlation"]
        shares = [m[f"error_share_{part}"] for part in ("behaviour", "target", "together")]
        said = f"Against {self.truth}, which is in float32, the sampler is off by {q:.2g} nats (root mean square)"
        said += f" and {target} by {p:.2g}"
        if not self.told:
            return f"{said}: as near as float32 is to the truth itself, so whose error it is cannot be told."
        (q_lo, q_hi), (p_lo, p_hi), (both_lo, both_hi) = (
            (-np.inf, np.inf) if x.lo is None or x.hi is None else (x.lo, x.hi) for x in shares
        )
        r_lo, r_hi = (0.0 if end is None else end for end in (r.lo, r.hi))  # no correlation with an error of 0
        numbers = ", ".join(
            f"{x.value:.0%}" + ("" if x.lo is None else f" [{x.lo:.0%}, {x.hi:.0%}]") for x in shares[:2]
        )
        if np.isfinite(r.value):
            numbers += f"; correlation {r.value:.2f}" + ("" if r.lo is None else f" [{r_lo:.2f}, {r_hi:.2f}]")
        if counts["responses"] < FEW_RESPONSES:
            whose = f"too few responses ({counts['responses']}) to say whose the gap is"
        elif both_lo > -RELATED and both_hi < RELATED and max(q_hi - q_lo, p_hi - p_lo) < WIDE:
            related = "are unrelated" if r_lo > -RELATED and r_hi < RELATED else f"correlate by {r.value:.2f}"
            words = (min(FRACTIONS, key=lambda word: abs(FRACTIONS[word] - x.value)) for x in shares[:2])
            whose = "{} of the gap is the sampler's error, {} {}'s, and the two {}".format(*words, target, related)
        elif both_lo > 0 or both_hi < 0:
            way = "cancel in part" if r.value > 0 else "add up"
            whose = f"the two errors are related and {way}, so no share of the gap is one side's alone"
        else:
            whose = "the intervals are too wide to say whose the gap is"
        lost = plural(counts["left_out"], "token")
        out = f" Left out: {lost} without a finite logprob." if counts["left_out"] else ""
        return f"{said}: {whose} (shares {numbers}).{out}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """How far the target is from the behaviour."""

    kind: LogprobKind
    overall: Summary
    groups: dict[str, dict[str, Summary]]  # {"level": {"3": …}}
    positions: list[Bucket]
    histograms: dict[str, Any]
    worst: list[dict[str, Any]]  # tokens with the largest |l|
    worst_responses: list[dict[str, Any]]  # responses with the largest mean |l|
    thresholds: Thresholds
    findings: list[Finding] = field(default_factory=list)
    set_aside: list[str] = field(default_factory=list)  # request id/sample of responses that are in no number
    steps: list[dict[str, Any]] = field(default_factory=list)  # metrics, counts and worst responses by training step
    staleness: list[dict[str, Any]] = field(default_factory=list)  # the same by step − weight version
    departure: dict[str, Any] | None = None  # the first step that left the band of the steps before it
    whose_error: WhoseError | None = None  # None: no truth was scored, or nothing is to be told apart

    @property
    def comparable(self) -> bool:
        """Whether the numbers mean anything; where they do not, there are no metrics."""
        return not any(finding.fatal for finding in self.findings)

    def __getitem__(self, name: str) -> Estimate:
        return self.overall.metrics[name]

    def __contains__(self, name: str) -> bool:
        return name in self.overall.metrics

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON, where NaN and infinity are null."""
        found = msgspec.json.decode(msgspec.json.encode(self))
        metrics, counts = found["overall"]["metrics"], found["overall"]["counts"]
        return {
            **found, "overall": metrics, "counts": counts, "confidence": CONFIDENCE, "comparable": self.comparable
        }  # fmt: skip


def judge(k3: Estimate, floor: float | None) -> tuple[str, str]:
    """The word for a mean k3 KL (nats a token) and the reason for it; the only place where a gap is judged.

    On-policy   not above the sampler's noise floor, the k3 between what it said while it sampled and what it scores, or
                what float32 rounds to where that is more; "as far as this tells" where only the interval reaches down
                to it. Without a noise floor: under ON_POLICY_K3
    Close       under 0.015, prime-rl's bar for accepting a model; "not surely" where the interval reaches over the bar
    Off-policy  0.015 or more
    """
    lo, hi = (k3.value if end is None else end for end in (k3.lo, k3.hi))
    noise = "" if floor is None else f"the sampler's noise floor of {floor:.2g}"
    if floor is None and k3.value < ON_POLICY_K3:
        return "On-policy", f"under {ON_POLICY_K3:.0e}, which two engines in float32 stay below"
    if floor is not None and k3.value <= floor:
        return "On-policy", f"not above {noise}"
    if floor is not None and k3.value <= ROUNDING_K3:
        return "On-policy", f"no more than rounding in float32 makes; the sampler's noise floor is {floor:.2g}"
    if floor is not None and lo <= max(floor, ROUNDING_K3) and k3.value < PRIME_RL_BAR:
        return "On-policy, as far as this tells", f"and the interval reaches down to {noise}"
    above = noise and f"above {noise} and "
    if k3.value >= PRIME_RL_BAR:
        return "Off-policy", f"{above}over prime-rl's bar of {PRIME_RL_BAR}"
    under = f"under prime-rl's bar of {PRIME_RL_BAR}"
    if hi >= PRIME_RL_BAR:
        return "Close, not surely", f"{above}{under}, but the interval reaches over the bar"
    return "Close", f"{above}{under}"


def word_of(sentence: str) -> str:
    """On-policy, Close, Off-policy or Not comparable: the word of a verdict, a target's name before it or not."""
    found = re.search(r"(?:^|: )(On-policy|Close|Off-policy|Not comparable)(?:, [\w ]+)?:", sentence)
    return found[1] if found else ""


def verdict(comparison: Comparison, noise_floor: float | None = None) -> str:
    """One plain sentence about a comparison: what `judge` says of its mean k3 KL, and what that rests on; or why its
    numbers mean nothing.
    """
    if not comparison.comparable:
        return f"Not comparable: {next(found for found in comparison.findings if found.fatal).sentence()}."
    k3, counts = comparison["kl_k3"], comparison.overall.counts
    word, reason = judge(k3, noise_floor)
    rough = ", rough with so few responses" if counts["responses"] < FEW_RESPONSES else ""
    interval = "" if k3.lo is None else f" (95 % interval {k3.lo:.2g} to {k3.hi:.2g}{rough})"
    over = f"over {plural(counts['tokens'], 'token')} of {plural(counts['responses'], 'response')}"
    num = max(counts.get("tokens_impossible_target", 0), counts.get("tokens_impossible_sampler", 0))
    impossible = f"; {num:,} of the sampled tokens could not have been drawn by the target's sampler" if num else ""
    num_aside = counts.get("responses_set_aside", 0)
    aside = f"; {plural(num_aside, 'response')} set aside" if num_aside else ""
    since = f" {comparison.departure['sentence']}" if comparison.departure else ""
    return (
        f"{word}: the mean k3 KL is {k3.value:.2g} nats a token{interval} {over}, {reason}{impossible}{aside}.{since}"
    )
