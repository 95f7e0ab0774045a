"""The stream: pairs come in one by one, are joined into batches, reduced to sums, and forgotten.

Of a response that went by, only its token ids, the two logprobs and entropies of each token (24 bytes a token) and the
sums of its terms are kept; top-k lists and logits are reduced to sums as they pass. Percentiles and extremes are exact.
Tokens that a mask leaves out are dropped first. What the checks (`checks.py`) set aside is taken out at the end.
A histogram is {"edges": E + 1 numbers, "counts": E numbers, "below", "above"}: what lies outside is counted too.

Shapes: S responses, N tokens of all of them one after the other, R pieces of responses, one a position bucket.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from rl_onoff.compare import metrics
from rl_onoff.compare.checks import Finding, Sampled, examine, other_tokens
from rl_onoff.compare.comparison import Bucket, Comparison, Summary, Sums
from rl_onoff.compare.distributions import by_rows, distribution_terms, optional_terms
from rl_onoff.compare.metrics import DEFAULT_THRESHOLDS, Thresholds
from rl_onoff.compare.pair import Pair, check_pair, misfit
from rl_onoff.compare.steps import STEP_METRICS, departure
from rl_onoff.errors import UsageError
from rl_onoff.types import Key, LogprobKind, TokenScores

BATCH_TOKENS = 16_384
ABS_EDGES = np.logspace(-8, 2, 81)
PROB_BINS = 50
MAX_POSITIONS = 200
SIDES = ("behaviour", "target")
ENTROPIES = ("entropy_behaviour", "entropy_target")
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
    recorded: Collection[str] = ()  # the sides that another program wrote, whose patterns are looked at

    def __post_init__(self) -> None:
        self._kind: LogprobKind | None = None
        self._keys: list[Key] = []
        self._groups: list[Mapping[str, str]] = []
        self._facts: list[Mapping[str, float]] = []
        self._misfits: dict[Key, str] = {}
        self._columns: dict[str, list[np.ndarray]] = defaultdict(list)
        self._responses: list[dict[str, tuple[np.ndarray, np.ndarray]]] = []  # sums and counts of terms, by batch
        self._buckets: list[dict[str, tuple[np.ndarray, np.ndarray]]] = []
        self._waiting: list[tuple[Pair, dict[str, np.ndarray]]] = []
        self._num_waiting, self._num_empty, self._form = 0, 0, None

    def add(self, pair: Pair) -> None:
        """Check a pair and take it in; a response without sampled tokens is counted and says nothing."""
        if other := misfit(pair):
            self._misfits[pair.key] = other
            return
        check_pair(pair)
        positions_T = np.arange(pair.num_tokens, dtype=np.int32)
        if pair.mask_T is not None:
            positions_T = positions_T[pair.mask_T]
            pair = replace(pair, behaviour=pair.behaviour[positions_T], target=pair.target[positions_T])
        q, p, exact = pair.behaviour, pair.target, {}
        self._kind = self._kind or p.kind
        if p.kind is not self._kind:
            both = f"{self._kind.value} logprobs and some {p.kind.value}"
            raise UsageError(f"some responses have {both}: compare one kind at a time")
        if pair.num_tokens == 0:
            self._num_empty += 1
            return
        if q.logits_TV is not None and p.logits_TV is not None:  # reduced at once: logits are too large to wait
            exact = by_rows(distribution_terms, q.logits_TV, p.logits_TV, p.token_ids_T)
        sides = (replace(q, logits_TV=None), replace(p, logits_TV=None))
        # pairs of one form, with the same arrays on both sides, can be joined into one batch
        form = [(name, x.dtype, x.shape[1:]) for side in sides for name, x in side.arrays().items()] + list(exact)
        if form != self._form or self._num_waiting + pair.num_tokens > BATCH_TOKENS:
            self._flush()
        self._waiting.append((replace(pair, behaviour=sides[0], target=sides[1]), exact))
        self._columns["positions"].append(positions_T)
        self._form = form
        self._num_waiting += pair.num_tokens

    def result(self) -> Comparison:
        self._flush()
        if not self._keys and not self._misfits:
            raise UsageError("no response with tokens to compare: check that both sides hold the same request ids")
        columns = {name: np.concatenate(parts) for name, parts in self._columns.items()}
        findings, kept_S = self._examine(columns)
        kind = self._kind or LogprobKind.raw
        faulty = [key for key, kept in zip(self._keys, kept_S, strict=True) if not kept]
        aside = ["{}/{}".format(*key) for key in (*self._misfits, *faulty)]
        counts = {"responses_empty": self._num_empty, "responses_set_aside": len(aside)}
        if any(finding.fatal for finding in findings):
            counts |= {"responses": len(self._keys), "tokens": int(columns.get("lengths", kept_S).sum())}
            counts["responses_set_aside"] = len(self._misfits)
            nothing: dict[str, Any] = {"groups": {}, "positions": [], "histograms": {}, "worst": []}
            nothing |= {"worst_responses": [], "overall": Summary(metrics={}, counts=counts)}
            return Comparison(kind=kind, thresholds=self.thresholds, findings=findings, **nothing)
        sums, buckets = Sums.of(self._responses).rows(kept_S), Sums.of(self._buckets)
        kept_R = np.repeat(kept_S, np.frexp(columns["lengths"] - 1)[1] + 1)  # a response reaches so many buckets
        kept_N = np.repeat(kept_S, columns["lengths"])
        for name, column in columns.items():
            columns[name] = column[{"lengths": kept_S, "buckets": kept_R}.get(name, kept_N)]
        of_kept = [(key, of, facts) for key, of, facts, kept in zip(
            self._keys, self._groups, self._facts, kept_S, strict=True) if kept]  # fmt: skip
        tokens = Tokens(columns, [key for key, _, _ in of_kept])
        groups: dict[str, dict[str, Summary]] = {}
        for name in sorted({name for _, of, _ in of_kept for name in of}):
            values_S = np.array([of.get(name) for _, of, _ in of_kept], object)
            values = sorted({value for value in values_S if value is not None})
            groups[name] = {value: self._summary(sums, tokens, values_S == value) for value in values}
        facts_S = {
            name: np.array([facts.get(name, np.nan) for _, _, facts in of_kept], np.float64)
            for name in ("step", "staleness", "reward")
        }
        steps = self._steps("step", facts_S, sums, tokens)
        overall = self._summary(sums, tokens, np.ones(len(of_kept), bool))
        return Comparison(
            kind=kind,
            overall=replace(overall, counts=overall.counts | counts),
            groups=groups,
            positions=self._positions(buckets.rows(kept_R), tokens),
            histograms=tokens.histograms(),
            thresholds=self.thresholds,
            findings=findings,
            set_aside=aside,
            steps=steps,
            staleness=self._steps("staleness", facts_S, sums, tokens),
            departure=departure(steps),
            **tokens.worst(self.num_worst),
        )

    def _examine(self, columns: Mapping[str, np.ndarray]) -> tuple[list[Finding], np.ndarray]:
        """What the checks find, and which responses are worth comparing: (S,)."""
        found, kept_S = [], np.ones(len(self._keys), bool)
        if self._keys:
            sides = {f"{name}_N": columns[name] for name in ("token_ids", "behaviour", "target")}
            lengths = {"lengths_S": columns["lengths"], "positions_N": columns["positions"]}
            found, kept_S = examine(Sampled(keys=self._keys, recorded=self.recorded, **sides, **lengths))
        others = other_tokens(self._misfits, len(self._keys) + len(self._misfits))
        return ([others, *found] if others else found), kept_S

    def _steps(self, name: str, facts_S: Mapping[str, np.ndarray], sums: Sums, tokens: Tokens) -> list[dict[str, Any]]:
        """The metrics of the responses of each training step (or staleness), and its worst responses."""
        found, values_S = [], facts_S[name]
        for value in np.unique(values_S[~np.isnan(values_S)]).tolist():
            chosen_S = values_S == value
            summary = self._summary(sums, tokens, chosen_S)
            estimates = {x: summary.metrics[x].to_dict() for x in STEP_METRICS if x in summary.metrics}
            if not np.isnan(rewards := facts_S["reward"][chosen_S]).all():
                estimates["reward"] = {"value": float(np.nanmean(rewards)), "lo": None, "hi": None}
            worst = sorted(np.flatnonzero(chosen_S).tolist(), key=lambda s: -tokens.mean_abs_S[s])[:5]
            named = [tokens.named(s) | {"mean_abs_l": float(tokens.mean_abs_S[s])} for s in worst]
            number = int(value) if value.is_integer() else value
            found.append({name: number, "metrics": estimates, "counts": summary.counts, "worst": named})
        return found

    def _flush(self) -> None:
        """Reduce the waiting pairs to sums and forget their lists."""
        if not self._waiting:
            return
        pairs, exact = zip(*self._waiting, strict=True)
        q, p = (TokenScores.collect((getattr(x, side) for x in pairs), self._num_waiting) for side in SIDES)
        q_N, p_N, lengths_S = q.logprobs_T, p.logprobs_T, np.array([pair.num_tokens for pair in pairs])
        terms = metrics.token_terms(q_N, p_N, self.thresholds)
        terms |= optional_terms(q, p, pairs[0].target.kind, is_exact=bool(exact[0]))
        terms |= {name: np.concatenate([part[name] for part in exact]) for name in exact[0]}
        per_response = metrics.sequence_terms(q_N, p_N, lengths_S, self.thresholds)
        self._responses.append(metrics.response_sums(terms, per_response, lengths_S))
        # the position buckets (0, 1, 2 to 3, 4 to 7, …: the bits of a position) cut a response into consecutive pieces
        positions_N = metrics.segment_positions(lengths_S)
        starts_R = np.flatnonzero((positions_N & (positions_N - 1)) == 0)
        lengths_R = np.diff(starts_R, append=len(positions_N))
        l_N = np.where(np.isfinite(terms["kl"]), -terms["kl"], 0)  # a sum over all: no NaN of a row may reach the next
        drift_N = metrics.cumulative_l(l_N, lengths_S)
        names = [name for name in POSITION_TERMS if name in terms]
        sums = {name: (metrics.segment_sums(terms[name], lengths_R), lengths_R) for name in names}
        self._buckets.append(sums | {"cumulative_l": (drift_N[starts_R], np.ones(len(starts_R)))})
        self._keys += [pair.key for pair in pairs]
        self._groups += [pair.groups for pair in pairs]
        self._facts += [pair.facts for pair in pairs]
        kept = {"token_ids": p.token_ids_T, "behaviour": q_N, "target": p_N}
        unknown_N = np.full(len(positions_N), np.nan, np.float32)
        kept |= {name: terms.get(name, unknown_N).astype(np.float32) for name in ENTROPIES}
        kept |= {"lengths": lengths_S, "buckets": np.frexp(positions_N[starts_R])[1]}
        for name, column in kept.items():
            self._columns[name].append(column)
        self._waiting, self._num_waiting = [], 0

    def _summary(self, sums: Sums, tokens: Tokens, chosen_S: np.ndarray) -> Summary:
        sums, lengths_S = sums.rows(chosen_S), tokens.lengths_S[chosen_S]
        chosen_N = np.repeat(chosen_S, tokens.lengths_S)
        q_N, p_N = tokens.columns["behaviour"][chosen_N], tokens.columns["target"][chosen_N]
        counts = {"responses": len(lengths_S), "tokens": int(lengths_S.sum())}
        counts |= {name[1:]: sums.total(name) for name in sums.names if name.startswith(("_tokens_", "_responses_"))}
        estimates = sums.estimates(self.num_resamples, self.seed, metrics.order_metrics(q_N, p_N, lengths_S))
        return Summary(metrics=estimates, counts=counts)

    def _positions(self, sums: Sums, tokens: Tokens) -> list[Bucket]:
        buckets_R, buckets_N = tokens.columns["buckets"], np.frexp(tokens.positions_N)[1]
        longest, found = int(tokens.lengths_S.max()), []
        for bucket in range(buckets_R.max() + 1):
            rows, l_N = sums.rows(buckets_R == bucket), tokens.l_N[buckets_N == bucket]
            counts = {"responses": len(rows.sums_RF), "tokens": len(l_N)}
            counts |= {"tokens_clamped": rows.total("_tokens_clamped")}
            start, end = (1 << bucket) >> 1, min(1 << bucket, longest)
            estimates = rows.estimates(self.num_resamples, self.seed, metrics.percentiles(l_N))
            found.append(Bucket(start=start, end=end, metrics=estimates, counts=counts))
        return found


class Tokens:
    """The kept columns, one number a token, and the lengths that cut them into responses."""

    def __init__(self, columns: dict[str, np.ndarray], keys: list[Key]) -> None:
        self.columns, self.keys, self.lengths_S = columns, keys, columns["lengths"]
        self.starts_S = metrics.segment_starts(self.lengths_S)
        self.l_N = metrics.log_ratios(columns["behaviour"], columns["target"])
        self.positions_N = metrics.segment_positions(self.lengths_S)
        self.mean_abs_S = metrics.segment_sums(np.abs(self.l_N), self.lengths_S) / self.lengths_S

    def named(self, s: int) -> dict[str, Any]:
        """The name of a response, for a row of a table."""
        return dict(zip(("request_id", "sample"), self.keys[s], strict=True))

    def histograms(self) -> dict[str, Any]:
        """Of l, |l|, p against q, both entropies (empty where unknown), and Σ l along the response; ready for JSON.

        probabilities: counts[i][j] tokens have q in bin i and p in bin j of [0, 1].
        cumulative_l: mean of Σ_{s≤t} l_s over the `num` responses that reach position t, at no more than 200 positions.
        Long responses are not short ones continued: where `num` falls, the curve changes population.
        """
        limit = max(float(np.percentile(np.abs(self.l_N), 99.5)), 1e-6)
        entropies = {name: self.columns[name][~np.isnan(self.columns[name])] for name in ENTROPIES}
        edges = np.linspace(0, max(float(np.max(x, initial=0.0)) for x in entropies.values()) or 1.0, 61)
        probs = (np.exp(np.asarray(self.columns[side], np.float64)) for side in SIDES)
        q_N, p_N = (np.minimum(x_N * PROB_BINS, PROB_BINS - 1).astype(np.int64) for x_N in probs)
        counts = np.bincount(q_N * PROB_BINS + p_N, minlength=PROB_BINS**2).reshape(PROB_BINS, PROB_BINS)
        sum_N = metrics.cumulative_l(self.l_N, self.lengths_S)
        positions = np.unique(np.linspace(0, np.max(self.lengths_S) - 1, MAX_POSITIONS).astype(np.int64)).tolist()
        reached = [sum_N[self.starts_S[self.lengths_S > t] + t] for t in positions]
        curve = {"position": positions, "mean": [float(x.mean()) for x in reached], "num": [len(x) for x in reached]}
        return {
            "l": _histogram(self.l_N, np.linspace(-limit, limit, 102)),
            "abs_l": _histogram(np.abs(self.l_N), ABS_EDGES),
            "probabilities": {"edges": np.linspace(0, 1, PROB_BINS + 1).tolist(), "counts": counts.tolist()},
            **{name: _histogram(values_N, edges) for name, values_N in entropies.items()},
            "cumulative_l": curve,
        }

    def worst(self, num: int) -> dict[str, Any]:
        """The tokens with the largest |l| and the responses with the largest mean |l|, one dict each.

        A logprob of −inf is null, since JSON has no infinity.
        """
        abs_N, responses_S = np.abs(self.l_N), np.arange(len(self.keys))
        tokens = {"position": self.columns["positions"], "token_id": self.columns["token_ids"]}
        tokens |= {f"{side}_logprob": self.columns[side] for side in SIDES} | {"l": self.l_N}
        responses = {"tokens": self.lengths_S, "mean_abs_l": self.mean_abs_S}
        responses |= {"max_abs_l": np.maximum.reduceat(abs_N, self.starts_S)}
        responses |= {"sum_l": metrics.segment_sums(self.l_N, self.lengths_S)}
        found: dict[str, list[dict[str, Any]]] = {"worst": [], "worst_responses": []}
        for rows, size, response, columns in (
            (found["worst"], abs_N, np.repeat(responses_S, self.lengths_S), tokens),
            (found["worst_responses"], self.mean_abs_S, responses_S, responses),
        ):
            for at in np.argsort(-size, kind="stable")[:num]:
                values = {name: column[at].item() for name, column in columns.items()}
                rows.append(
                    self.named(int(response[at]))
                    | {name: x if math.isfinite(x) else None for name, x in values.items()}
                )
        return found


def _histogram(values_N: np.ndarray, edges: np.ndarray) -> dict[str, Any]:
    counts = np.histogram(values_N, edges)[0]
    below, above = int((values_N < edges[0]).sum()), int((values_N > edges[-1]).sum())
    return {"edges": edges.tolist(), "counts": counts.tolist(), "below": below, "above": above}
