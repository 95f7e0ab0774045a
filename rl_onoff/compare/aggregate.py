"""The stream: pairs come in one by one, are joined into batches, reduced to sums, and forgotten.

Of a response that went by, only its token ids, the two logprobs and entropies of each token (20 bytes a token) and the
sums of its terms are kept; top-k lists and logits are reduced to sums as they pass. Percentiles and extremes are exact.
A histogram is {"edges": E + 1 numbers, "counts": E numbers, "below", "above"}: what lies outside is counted too.

Shapes: S responses, N tokens of all of them one after the other, R pieces of responses, one for each position bucket
they reach.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from rl_onoff.compare.bootstrap import Estimate, Sums, SumTable, finite
from rl_onoff.compare.distributions import optional_terms, reduce_logits
from rl_onoff.compare.metrics import (
    DEFAULT_THRESHOLDS,
    Thresholds,
    cumulative_l,
    log_ratios,
    order_metrics,
    segment_starts,
    segment_sums,
    sequence_terms,
    token_terms,
)
from rl_onoff.compare.pair import Pair, check_pair, join
from rl_onoff.compare.verdict import Comparison, PositionBucket, Summary
from rl_onoff.errors import UsageError
from rl_onoff.types import Key, LogprobKind

BATCH_TOKENS = 16_384
ABS_EDGES = np.logspace(-8, 2, 81)
PROB_BINS = 50
MAX_POSITIONS = 200
ENTROPIES = ("entropy_behaviour", "entropy_target")
COLUMNS = ("token_ids", "behaviour", "target", *ENTROPIES, "lengths", "buckets")
POSITION_TERMS = (
    "kl", "kl_k2", "kl_k3", "logprob_diff_mean", "prob_diff_mean", "fraction_outside", "is_ratio_mean_token",
    "_w2_token", "_excess_token", "_excess2_token", "_limited_token", "_limited2_token", "_tokens_clamped",
    *ENTROPIES, "kl_forward", "kl_forward_topk",
)  # fmt: skip


def compare(pairs: Iterable[Pair], **options: Any) -> Comparison:
    """All metrics of a stream of pairs; the options are those of Aggregator."""
    aggregator = Aggregator(**options)
    for pair in pairs:
        aggregator.add(pair)
    return aggregator.result()


@dataclass(kw_only=True)
class Aggregator:
    """Takes pairs one by one (`add`) and gives the Comparison once (`result`)."""

    thresholds: Thresholds = DEFAULT_THRESHOLDS
    num_resamples: int = 1000
    seed: int = 0
    num_worst: int = 50

    kind: LogprobKind | None = field(default=None, init=False)
    num_empty: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._keys: list[Key] = []
        self._groups: list[Mapping[str, str]] = []
        self._columns: dict[str, list[np.ndarray]] = {name: [] for name in COLUMNS}
        self._responses, self._buckets = SumTable(), SumTable()
        self._waiting: list[tuple[Pair, dict[str, np.ndarray]]] = []
        self._num_waiting = 0
        self._form: Any = None

    def add(self, pair: Pair) -> None:
        """Check a pair and take it in; a response without tokens is counted and says nothing."""
        check_pair(pair)
        self.kind = self.kind or pair.target.kind
        if pair.target.kind is not self.kind:
            both = f"{self.kind.value} logprobs and some {pair.target.kind.value}"
            raise UsageError(f"some responses have {both}: compare one kind at a time")
        if pair.num_tokens == 0:
            self.num_empty += 1
            return
        pair, exact = reduce_logits(pair)
        form = (pair.form, bool(exact))
        if form != self._form or self._num_waiting + pair.num_tokens > BATCH_TOKENS:
            self._flush()
        self._waiting.append((pair, exact))
        self._form = form
        self._num_waiting += pair.num_tokens

    def result(self) -> Comparison:
        self._flush()
        if not self._keys or self.kind is None:
            raise UsageError("no response with tokens to compare: check that both sides hold the same request ids")
        columns = {name: np.concatenate(parts) if parts else np.zeros(0) for name, parts in self._columns.items()}
        tokens, sums = Tokens(columns, self._keys), self._responses.finish()
        groups = {
            key: {value: self._summary(sums, tokens, chosen_S) for value, chosen_S in values.items()}
            for key, values in _group_masks(self._groups).items()
        }
        return Comparison(
            kind=self.kind,
            overall=self._summary(sums, tokens, np.ones(len(self._keys), bool), self.num_empty),
            groups=groups,
            positions=self._positions(tokens),
            histograms=tokens.histograms(),
            worst=tokens.worst(self.num_worst),
            worst_responses=tokens.worst_responses(self.num_worst),
            thresholds=self.thresholds,
        )

    def _flush(self) -> None:
        """Reduce the waiting pairs to sums and forget their lists."""
        if not self._waiting:
            return
        pairs, exact = [pair for pair, _ in self._waiting], [terms for _, terms in self._waiting]
        lengths_S = np.array([pair.num_tokens for pair in pairs])
        behaviour_N, target_N = join(pairs, "behaviour", "logprobs_T"), join(pairs, "target", "logprobs_T")
        terms = token_terms(behaviour_N, target_N, self.thresholds) | optional_terms(pairs, is_exact=bool(exact[0]))
        terms |= {name: np.concatenate([part[name] for part in exact]) for name in exact[0]}
        per_response = sequence_terms(behaviour_N, target_N, lengths_S, self.thresholds)
        self._responses.append(
            {name: segment_sums(term, lengths_S) for name, term in terms.items()} | per_response,
            dict.fromkeys(terms, lengths_S) | dict.fromkeys(per_response, np.ones(len(pairs))),
        )
        self._add_positions(terms, lengths_S)
        self._keys += [pair.key for pair in pairs]
        self._groups += [pair.groups for pair in pairs]
        token_ids_N = join(pairs, "target", "token_ids_T")
        kept = {"token_ids": token_ids_N, "behaviour": behaviour_N, "target": target_N, "lengths": lengths_S}
        kept |= {name: terms[name].astype(np.float32) for name in ENTROPIES if name in terms}
        for name, column in kept.items():
            self._columns[name].append(column)
        self._waiting, self._num_waiting = [], 0

    def _add_positions(self, terms: Mapping[str, np.ndarray], lengths_S: np.ndarray) -> None:
        """Sums over the part of each response in each bucket: the buckets cut a response into consecutive pieces."""
        edges = _bucket_edges(int(lengths_S.max()))
        inside = edges < lengths_S[:, None]
        starts_R = (segment_starts(lengths_S)[:, None] + edges)[inside]
        lengths_R = np.diff(starts_R, append=lengths_S.sum())
        sums = {name: segment_sums(terms[name], lengths_R) for name in POSITION_TERMS if name in terms}
        counts = dict.fromkeys(sums, lengths_R) | {"cumulative_l": np.ones(len(starts_R))}
        self._buckets.append(sums | {"cumulative_l": cumulative_l(-terms["kl"], lengths_S)[starts_R]}, counts)
        self._columns["buckets"].append(np.broadcast_to(np.arange(len(edges)), inside.shape)[inside])

    def _summary(self, sums: Sums, tokens: Tokens, chosen_S: np.ndarray, num_empty: int = 0) -> Summary:
        sums = sums.rows(chosen_S)
        metrics = sums.estimates(self.num_resamples, self.seed)
        chosen_N, lengths_S = np.repeat(chosen_S, tokens.lengths_S), tokens.lengths_S[chosen_S]
        q_N, p_N = (tokens.columns[side][chosen_N] for side in ("behaviour", "target"))
        metrics |= {name: Estimate(value) for name, value in order_metrics(q_N, p_N, lengths_S).items()}
        counts = {"responses": len(lengths_S), "responses_empty": num_empty, "tokens": int(lengths_S.sum())}
        counted = [name for name in sums.names if name.startswith(("_tokens_", "_responses_"))]
        return Summary(metrics=metrics, counts=counts | {name[1:]: round(sums.total(name)) for name in counted})

    def _positions(self, tokens: Tokens) -> list[PositionBucket]:
        sums, buckets_R = self._buckets.finish(), tokens.columns["buckets"]
        longest = int(tokens.lengths_S.max())
        found = []
        for bucket, (start, end) in enumerate(pairwise([*_bucket_edges(longest).tolist(), longest])):
            rows = sums.rows(buckets_R == bucket)
            abs_l_N = np.abs(tokens.l_N[(tokens.positions_N >= start) & (tokens.positions_N < end)])
            clamped = round(rows.total("_tokens_clamped"))
            counts = {"responses": len(rows.sums_RF), "tokens": len(abs_l_N), "tokens_clamped": clamped}
            percentiles = zip(("p50", "p95", "p99", "max"), np.percentile(abs_l_N, (50, 95, 99, 100)), strict=True)
            metrics = rows.estimates(self.num_resamples, self.seed)
            metrics |= {f"logprob_diff_{name}": Estimate(float(value)) for name, value in percentiles}
            found.append(PositionBucket(start=start, end=end, summary=Summary(metrics=metrics, counts=counts)))
        return found


class Tokens:
    """The kept columns, one number a token, and the lengths that cut them into responses."""

    def __init__(self, columns: dict[str, np.ndarray], keys: list[Key]) -> None:
        self.columns, self.keys, self.lengths_S = columns, keys, columns["lengths"]
        self.starts_S = segment_starts(self.lengths_S)
        self.l_N = log_ratios(columns["behaviour"], columns["target"])
        self.positions_N = (np.arange(len(self.l_N)) - np.repeat(self.starts_S, self.lengths_S)).astype(np.int32)

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


def _bucket_edges(length: int) -> np.ndarray:
    """Starts of the position buckets that a response of this length reaches: 0, 1, 2, 4, 8, …"""
    return np.array([0] + [1 << i for i in range(length.bit_length()) if 1 << i < length])


def _group_masks(groups_S: list[Mapping[str, str]]) -> dict[str, dict[str, np.ndarray]]:
    """Which responses have each value of each group column, values in order."""
    masks: dict[str, dict[str, np.ndarray]] = {}
    for key in sorted({key for groups in groups_S for key in groups}):
        values_S = np.array([groups.get(key) for groups in groups_S], object)
        masks[key] = {value: values_S == value for value in sorted({v for v in values_S if v is not None})}
    return masks
