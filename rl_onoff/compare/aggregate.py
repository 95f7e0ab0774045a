"""The stream: pairs come in one by one, are joined into batches, reduced to sums, and forgotten.

Of a response that went by, only its token ids, the two logprobs and entropies of each token (20 bytes a token) and the sums of
its terms are kept; top-k lists and logits are reduced to sums as they pass. Percentiles and extremes are exact.

Shapes: S responses, N tokens of all of them one after the other, R pieces of responses, one for each position bucket they reach.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any

import numpy as np

from rl_onoff.compare.batches import form, join, optional_terms, reduce_logits
from rl_onoff.compare.bootstrap import Estimate, Sums, SumTable
from rl_onoff.compare.metrics import (
    DEFAULT_THRESHOLDS,
    Thresholds,
    cumulative_l,
    segment_starts,
    segment_sums,
    sequence_terms,
    token_terms,
)
from rl_onoff.compare.pair import Pair, check_pair
from rl_onoff.compare.tokens import Tokens
from rl_onoff.compare.verdict import Comparison, PositionBucket, Summary
from rl_onoff.errors import UsageError
from rl_onoff.types import LogprobKind

BATCH_TOKENS = 16_384
POSITION_TERMS = (
    "kl", "kl_k2", "kl_k3", "logprob_diff_mean", "prob_diff_mean", "fraction_outside", "is_ratio_mean_token", "_w2_token",
    "_excess_token", "_excess2_token", "_limited_token", "_limited2_token", "_tokens_clamped",
    "entropy_behaviour", "entropy_target", "kl_forward", "kl_forward_topk",
)  # fmt: skip


def compare(
    pairs: Iterable[Pair],
    *,
    thresholds: Thresholds = DEFAULT_THRESHOLDS,
    num_resamples: int = 1000,
    seed: int = 0,
    num_worst: int = 50,
) -> Comparison:
    """All metrics of a stream of pairs; see Aggregator."""
    aggregator = Aggregator(thresholds=thresholds, num_resamples=num_resamples, seed=seed, num_worst=num_worst)
    for pair in pairs:
        aggregator.add(pair)
    return aggregator.result()


class Aggregator:
    """Takes pairs one by one (`add`) and gives the Comparison once (`result`)."""

    def __init__(
        self,
        *,
        thresholds: Thresholds = DEFAULT_THRESHOLDS,
        num_resamples: int = 1000,
        seed: int = 0,
        num_worst: int = 50,
    ) -> None:
        self.thresholds = thresholds
        self.num_resamples = num_resamples
        self.seed = seed
        self.num_worst = num_worst
        self.kind: LogprobKind | None = None
        self.num_empty = 0
        self._keys: list[tuple[str, int]] = []
        self._groups: list[Mapping[str, str]] = []
        self._columns: dict[str, list[np.ndarray]] = {
            name: []
            for name in (
                "token_ids",
                "behaviour",
                "target",
                "entropy_behaviour",
                "entropy_target",
                "lengths",
                "buckets",
            )
        }
        self._responses, self._buckets = SumTable(), SumTable()
        self._waiting: list[tuple[Pair, dict[str, np.ndarray]]] = []
        self._num_waiting = 0
        self._waiting_form: tuple[Any, ...] = ()

    def add(self, pair: Pair) -> None:
        """Check a pair and take it in; a response without tokens is counted and says nothing."""
        check_pair(pair)
        self.kind = self.kind or pair.target.kind
        if pair.target.kind is not self.kind:
            raise UsageError(
                f"some responses have {self.kind.value} logprobs and some {pair.target.kind.value}: compare one kind at a time"
            )
        if pair.num_tokens == 0:
            self.num_empty += 1
            return
        pair, exact = reduce_logits(pair)
        its_form = form(pair, exact)
        if its_form != self._waiting_form or self._num_waiting + pair.num_tokens > BATCH_TOKENS:
            self._flush()
        self._waiting.append((pair, exact))
        self._waiting_form = its_form
        self._num_waiting += pair.num_tokens

    def result(self) -> Comparison:
        self._flush()
        if not self._keys or self.kind is None:
            raise UsageError(
                "there is no response with tokens to compare: check that the two sides hold the same request ids and samples"
            )
        tokens = Tokens(
            {name: np.concatenate(parts) if parts else np.zeros(0) for name, parts in self._columns.items()}, self._keys
        )
        sums, everything = self._responses.finish(), np.ones(len(self._keys), bool)
        return Comparison(
            kind=self.kind,
            overall=self._summary(sums, tokens, everything, self.num_empty),
            groups={
                key: {value: self._summary(sums, tokens, chosen_S) for value, chosen_S in values.items()}
                for key, values in _group_masks(self._groups).items()
            },
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
        pairs = [pair for pair, _ in self._waiting]
        lengths_S = np.array([pair.num_tokens for pair in pairs])
        behaviour_N, target_N = join(pairs, "behaviour", "logprobs_T"), join(pairs, "target", "logprobs_T")
        exact = [terms for _, terms in self._waiting]
        terms = token_terms(behaviour_N, target_N, self.thresholds) | optional_terms(pairs, is_exact=bool(exact[0]))
        terms |= {name: np.concatenate([part[name] for part in exact]) for name in exact[0]}
        per_response = sequence_terms(behaviour_N, target_N, lengths_S, self.thresholds)
        ones_S = np.ones(len(pairs))
        self._responses.append(
            {name: segment_sums(term, lengths_S) for name, term in terms.items()} | per_response,
            dict.fromkeys(terms, lengths_S) | dict.fromkeys(per_response, ones_S),
        )
        self._add_positions(terms, lengths_S)
        self._keys += [pair.key for pair in pairs]
        self._groups += [pair.groups for pair in pairs]
        kept = {
            "token_ids": join(pairs, "target", "token_ids_T"),
            "behaviour": behaviour_N,
            "target": target_N,
            "lengths": lengths_S,
        }
        kept |= {
            name: terms[name].astype(np.float32) for name in ("entropy_behaviour", "entropy_target") if name in terms
        }
        for name, column in kept.items():
            self._columns[name].append(column)
        self._waiting, self._num_waiting = [], 0

    def _add_positions(self, terms: Mapping[str, np.ndarray], lengths_S: np.ndarray) -> None:
        """Sums over the part of each response in each bucket: the buckets cut a response into consecutive pieces."""
        edges = _bucket_edges(int(lengths_S.max()))
        inside = edges < lengths_S[:, None]
        starts = (segment_starts(lengths_S)[:, None] + edges)[inside]
        lengths = np.diff(starts, append=lengths_S.sum())
        sums = {name: segment_sums(terms[name], lengths) for name in POSITION_TERMS if name in terms}
        counts = dict.fromkeys(sums, lengths)
        sums["cumulative_l"], counts["cumulative_l"] = (
            cumulative_l(-terms["kl"], lengths_S)[starts],
            np.ones(len(starts)),
        )
        self._buckets.append(sums, counts)
        self._columns["buckets"].append(np.broadcast_to(np.arange(len(edges)), inside.shape)[inside])

    def _summary(self, sums: Sums, tokens: Tokens, chosen_S: np.ndarray, num_empty: int = 0) -> Summary:
        sums = sums.rows(chosen_S)
        metrics = sums.estimates(self.num_resamples, self.seed)
        metrics |= {name: Estimate(value) for name, value in tokens.order_metrics(chosen_S).items()}
        counts = {
            "responses": int(chosen_S.sum()),
            "responses_empty": num_empty,
            "tokens": int(tokens.lengths_S[chosen_S].sum()),
        }
        counted = [name for name in sums.names if name.startswith(("_tokens_", "_responses_"))]
        return Summary(metrics=metrics, counts=counts | {name[1:]: round(sums.total(name)) for name in counted})

    def _positions(self, tokens: Tokens) -> list[PositionBucket]:
        sums, buckets_R = self._buckets.finish(), tokens.columns["buckets"]
        edges = [*_bucket_edges(int(tokens.lengths_S.max())).tolist(), int(tokens.lengths_S.max())]
        found = []
        for bucket, (start, end) in enumerate(pairwise(edges)):
            rows = sums.rows(buckets_R == bucket)
            abs_l = tokens.abs_l_between(start, end)
            counts = {
                "responses": len(rows.sums_RF),
                "tokens": len(abs_l),
                "tokens_clamped": round(rows.total("_tokens_clamped")),
            }
            percentiles = zip(("p50", "p95", "p99", "max"), np.percentile(abs_l, (50, 95, 99, 100)), strict=True)
            metrics = rows.estimates(self.num_resamples, self.seed)
            metrics |= {f"logprob_diff_{name}": Estimate(float(value)) for name, value in percentiles}
            found.append(PositionBucket(start=start, end=end, summary=Summary(metrics=metrics, counts=counts)))
        return found


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
