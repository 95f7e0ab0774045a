"""The stream: pairs come in one by one, are joined into batches, reduced to sums, and forgotten.

Of a response that went by, only the sums of its terms are kept in memory, and, in blocks on the disk (`tokens.py`), its
token ids, logprobs and entropies; top-k lists and logits are reduced to sums as they pass. Percentiles and extremes are
exact. Tokens that a mask leaves out are dropped first. What the checks set aside is taken out at the end.

Shapes: S responses, N tokens of all of them one after the other, R pieces of responses, one a position bucket.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from rl_onoff.compare import metrics
from rl_onoff.compare.comparison import Bucket, Comparison, Summary, Sums
from rl_onoff.compare.distributions import by_rows, distribution_terms, optional_terms
from rl_onoff.compare.examine import examine_blocks
from rl_onoff.compare.findings import Finding, Sampled
from rl_onoff.compare.metrics import DEFAULT_THRESHOLDS, Thresholds
from rl_onoff.compare.pair import Pair, check_pair, fault_of
from rl_onoff.compare.row_checks import Fault, row_findings
from rl_onoff.compare.steps import STEP_METRICS, departure
from rl_onoff.compare.tokens import BLOCK_TOKENS, ENTROPIES, SIDES, Store, Tokens
from rl_onoff.errors import UsageError
from rl_onoff.types import Key, LogprobKind, TokenScores

BATCH_TOKENS = 16_384
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
    scratch: Path | None = None  # the folder of a temporary file, with some 40 bytes a token where there are many
    recorded: Collection[str] = ()  # the sides that another program wrote, whose patterns are looked at

    def __post_init__(self) -> None:
        self._kind: LogprobKind | None = None
        self._keys: list[Key] = []
        self._groups: list[Mapping[str, str]] = []
        self._facts: list[Mapping[str, float]] = []
        self._faults: dict[Key, Fault] = {}
        self._columns: dict[str, list[np.ndarray]] = defaultdict(list)  # of the block that is being filled
        self._store, self._num_in_block = Store(self.scratch), 0
        self._responses: list[dict[str, tuple[np.ndarray, np.ndarray]]] = []  # sums and counts of terms, by batch
        self._buckets: list[dict[str, tuple[np.ndarray, np.ndarray]]] = []
        self._sums: list[Sums] = []  # of responses, by block; those of the buckets lie in the store
        self._forms: list[Sums] = []  # of the buckets' sums, without rows, by block
        self._numbers: list[np.ndarray] = []  # of the buckets, by batch
        self._waiting: list[tuple[Pair, dict[str, np.ndarray]]] = []
        self._num_waiting, self._num_empty, self._form = 0, 0, None

    def add(self, pair: Pair) -> None:
        """Check a pair and take it in; a response without sampled tokens is counted and says nothing."""
        if fault := fault_of(pair):
            self._faults[pair.key] = fault
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
        if not self._keys and not self._faults:
            raise UsageError("no response with tokens to compare: check that both sides hold the same request ids")
        self._close_block()
        lengths_S = np.concatenate([np.zeros(0, np.int64), *self._store.lengths])
        findings, kept_S = self._examine()
        kind = self._kind or LogprobKind.raw
        faulty = [key for key, kept in zip(self._keys, kept_S, strict=True) if not kept]
        aside = ["{}/{}".format(*key) for key in (*self._faults, *faulty)]
        counts = {"responses_empty": self._num_empty, "responses_set_aside": len(aside)}
        if any(finding.fatal for finding in findings):
            counts |= {"responses": len(self._keys), "tokens": int(lengths_S.sum())}
            counts["responses_set_aside"] = len(self._faults)
            nothing: dict[str, Any] = {"groups": {}, "positions": [], "histograms": {}, "worst": []}
            nothing |= {"worst_responses": [], "overall": Summary(metrics={}, counts=counts)}
            return Comparison(kind=kind, thresholds=self.thresholds, findings=findings, **nothing)
        sums = Sums.of([each.batch() for each in self._sums]).rows(kept_S)
        self._sums.clear()
        of_kept = [(key, of, facts) for key, of, facts, kept in zip(
            self._keys, self._groups, self._facts, kept_S, strict=True) if kept]  # fmt: skip
        tokens = Tokens(self._store, kept_S, [key for key, _, _ in of_kept])
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
        worst: dict[str, Any] = tokens.worst(self.num_worst)
        return Comparison(
            kind=kind,
            overall=replace(overall, counts=overall.counts | counts),
            groups=groups,
            positions=self._positions(tokens),
            histograms=tokens.histograms(),
            thresholds=self.thresholds,
            findings=findings,
            set_aside=aside,
            steps=steps,
            staleness=self._steps("staleness", facts_S, sums, tokens),
            departure=departure(steps),
            **worst,
        )

    def _examine(self) -> tuple[list[Finding], np.ndarray]:
        """What the checks find, and which responses are worth comparing: (S,)."""

        def blocks() -> Iterator[Sampled]:
            start, names = 0, ("token_ids", "behaviour", "target", "positions")
            for number, lengths_S in enumerate(self._store.lengths):
                keys, start = self._keys[start : start + len(lengths_S)], start + len(lengths_S)
                columns = {f"{name}_N": self._store.read(number, name) for name in names}
                yield Sampled(keys=keys, lengths_S=lengths_S, recorded=self.recorded, **columns)

        num_tokens = sum(int(each.sum()) for each in self._store.lengths)
        found, kept_S = examine_blocks(blocks, num_tokens) if self._keys else ([], np.ones(0, bool))
        return [*row_findings(self._faults, len(self._keys) + len(self._faults)), *found], kept_S

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
        kept |= {"l": metrics.log_ratios(q_N, p_N), "lengths": lengths_S}
        for name, column in kept.items():
            self._columns[name].append(column)
        self._numbers.append(np.frexp(positions_N[starts_R])[1])
        self._num_in_block += self._num_waiting
        self._waiting, self._num_waiting = [], 0
        if self._num_in_block >= BLOCK_TOKENS:
            self._close_block()

    def _close_block(self) -> None:
        if self._num_in_block:
            columns = {name: np.concatenate(parts) for name, parts in self._columns.items()}
            sums, numbers_R = Sums.of(self._buckets), np.concatenate(self._numbers)
            for bucket in range(numbers_R.max() + 1):
                rows = sums.rows(numbers_R == bucket)
                columns |= {f"sums {bucket}": rows.sums_RF, f"counts {bucket}": rows.counts_RC}
            self._forms.append(sums.rows(np.zeros(len(numbers_R), bool)))
            self._store.append(columns.pop("lengths"), columns)
            self._sums.append(Sums.of(self._responses))
            self._numbers.clear()
            self._num_in_block, self._responses, self._buckets = 0, [], []
            self._columns.clear()

    def _summary(self, sums: Sums, tokens: Tokens, chosen_S: np.ndarray) -> Summary:
        sums, lengths_S = sums.rows(chosen_S), tokens.lengths_S[chosen_S]
        counts = {"responses": len(lengths_S), "tokens": int(lengths_S.sum())}
        counts |= {name[1:]: sums.total(name) for name in sums.names if name.startswith(("_tokens_", "_responses_"))}
        estimates = sums.estimates(self.num_resamples, self.seed, tokens.order_metrics(chosen_S))
        return Summary(metrics=estimates, counts=counts)

    def _positions(self, tokens: Tokens) -> list[Bucket]:
        """The metrics by bucket, over the responses that reach it."""
        longest, found = int(tokens.lengths_S.max()), []
        for bucket in range(int(np.frexp(longest - 1)[1]) + 1):
            start, end, first, parts = (1 << bucket) >> 1, min(1 << bucket, longest), 0, []
            for number, (form, lengths_S) in enumerate(zip(self._forms, self._store.lengths, strict=True)):
                kept_S, first = tokens.kept_S[first : first + len(lengths_S)], first + len(lengths_S)
                if (kept_R := kept_S[lengths_S > start]).any():
                    sums_RF, counts_RC = (self._store.read(number, f"{x} {bucket}") for x in ("sums", "counts"))
                    parts.append(replace(form, sums_RF=sums_RF, counts_RC=counts_RC).rows(kept_R).batch())
            rows = Sums.of(parts)
            num_tokens = int(np.clip(tokens.lengths_S - start, 0, end - start).sum())
            counts = {"responses": len(rows.sums_RF), "tokens": num_tokens}
            counts |= {"tokens_clamped": rows.total("_tokens_clamped")}
            estimates = rows.estimates(self.num_resamples, self.seed, tokens.percentiles_at(start, end))
            found.append(Bucket(start=start, end=end, metrics=estimates, counts=counts))
        return found
