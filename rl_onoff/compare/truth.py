"""Whose error a gap is: the errors of two policies against a truth, a third policy's logprobs of the same tokens.

With e_q = q − t and e_p = p − t, log-probabilities of one kind, (p − q)² = e_q² + e_p² − 2 e_p e_q. So the mean squared
gap is the behaviour's mean squared error, the target's, and a part of both together, which is nothing where the two
errors are unrelated. Moments and correlation are about 0, not about a mean: only so do the parts add up to the gap.
Tokens are told apart by their probability under the truth, which neither error has a part in.

Shapes: T tokens of a response, S responses, B buckets, of which number 0 holds all tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from rl_onoff.compare.comparison import Bucket, Summary, Sums, WhoseError

EDGES = np.array([0, 1e-4, 1e-3, 0.01, 0.1, 0.5, 0.9, 0.99, 1])
NUM_BUCKETS = len(EDGES)
TERMS = ("qq", "pp", "qp", "gap")  # of a token: e_q², e_p², e_q e_p, (p − q)²


def whose_error(
    truth: str, target: str, responses: Iterable[Sequence[np.ndarray]],
    *, num_resamples: int = 1000, seed: int = 0,
) -> WhoseError | None:  # fmt: skip
    """The parts of the gap, from (q_T, p_T, t_T) of every response; None where the two sides do not differ."""
    sums, counts, left_out = [], [], 0
    for logprobs in responses:
        q_T, p_T, t_T = (np.asarray(x_T, np.float64) for x_T in logprobs)
        known_T = np.isfinite(q_T) & np.isfinite(p_T) & np.isfinite(t_T)
        left_out += int((~known_T).sum())
        q_T, p_T, t_T = q_T[known_T], p_T[known_T], t_T[known_T]
        terms = (np.ones(len(t_T)), (q_T - t_T) ** 2, (p_T - t_T) ** 2, (q_T - t_T) * (p_T - t_T), (p_T - q_T) ** 2)
        bucket_T = np.searchsorted(EDGES[1:-1], np.exp(t_T), side="right")
        by_bucket = np.array([np.bincount(bucket_T, term_T, NUM_BUCKETS - 1) for term_T in terms])
        count_B, *sums_B = np.hstack([by_bucket.sum(axis=1, keepdims=True), by_bucket])
        if len(t_T):
            sums.append(np.concatenate(sums_B))
            counts.append(count_B)
    if not sums:
        return None
    names, column_F = [f"{term} {b}" for term in TERMS for b in range(NUM_BUCKETS)], np.tile(np.arange(NUM_BUCKETS), 4)
    found = Sums(tuple(names), np.array(sums), np.array(counts), column_F)
    estimates, tokens_B = found.estimates(num_resamples, seed, {}, parts), np.sum(counts, axis=0).astype(int)
    if not estimates["error_gap 0"].value:
        return None

    def summary(b: int) -> dict[str, Any]:
        metrics = {name.partition(" ")[0]: x for name, x in estimates.items() if name.endswith(f" {b}")}
        return {"metrics": metrics, "counts": {"tokens": int(tokens_B[b])}}

    buckets = [
        Bucket(start=float(EDGES[b - 1]), end=float(EDGES[b]), **summary(b))
        for b in range(1, NUM_BUCKETS) if tokens_B[b]
    ]  # fmt: skip
    whole = summary(0)
    whole["counts"] |= {"responses": len(sums), "left_out": left_out}
    return WhoseError(truth=truth, target=target, overall=Summary(**whole), by_probability=buckets)


def parts(means: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Root mean squares, correlation and shares of the gap, by bucket, from the means of the terms; any shape."""
    found = {}
    for b in range(NUM_BUCKETS):
        qq, pp, qp, gap = (np.asarray(means[f"{term} {b}"]) for term in TERMS)
        shared = np.where(gap > 0, gap, np.nan)
        metrics = {"error_behaviour": np.sqrt(qq), "error_target": np.sqrt(pp), "error_gap": np.sqrt(gap)}
        metrics["error_correlation"] = np.clip(qp / np.sqrt(qq * pp), -1, 1)
        shares = {"behaviour": qq / shared, "target": pp / shared, "together": -2 * qp / shared}
        metrics |= {f"error_share_{part}": share for part, share in shares.items()}
        found |= {f"{name} {b}": value for name, value in metrics.items()}
    return found
