"""Sums per response, and what they say of the metrics' uncertainty.

Shapes: R rows (a response, or the part of one that lies in a position bucket), F terms, B resamples. A metric is a
function of means, a mean is a ratio of sums, and a sum over responses drawn again with replacement is a weighted sum of
the rows. So a resample costs one row of a matrix product, and no token is looked at twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rl_onoff.compare.metrics import metrics_from_means

CONFIDENCE = 0.95
CHUNK = 1 << 22  # resampling weights made at a time: 32 MB


@dataclass(frozen=True, slots=True)
class Estimate:
    """A metric and its 95 % bootstrap interval over responses; none where a metric is not made of sums, or R < 2."""

    value: float
    lo: float | None = None
    hi: float | None = None

    def to_dict(self) -> dict[str, float | None]:
        """JSON has no NaN: an undefined metric (a correlation with a constant) is null."""
        return {name: finite(getattr(self, name)) for name in ("value", "lo", "hi")}


@dataclass(frozen=True, slots=True)
class Sums:
    """Σ of every term over each row's tokens, and how many tokens had the term (0 in a response without top-k, say)."""

    names: tuple[str, ...]
    sums_RF: np.ndarray
    counts_RC: np.ndarray
    column_F: np.ndarray  # which column of counts_RC belongs to a term: many terms share one

    def rows(self, rows: np.ndarray) -> Sums:
        return Sums(self.names, self.sums_RF[rows], self.counts_RC[rows], self.column_F)

    def total(self, name: str) -> float:
        return float(self.sums_RF[:, self.names.index(name)].sum()) if name in self.names else 0.0

    def estimates(self, num_resamples: int, seed: int) -> dict[str, Estimate]:
        """Every metric with its interval (percentile bootstrap, Efron 1979)."""
        values = metrics_from_means(self._means(self.sums_RF.sum(axis=0), self.counts_RC.sum(axis=0)))
        values = {name: float(value) for name, value in values.items() if self._present(name)}
        if len(self.sums_RF) < 2 or num_resamples < 2:
            return {name: Estimate(value) for name, value in values.items()}
        draws = self._resample(num_resamples, np.random.default_rng(seed))
        return {name: _interval(value, draws[name]) for name, value in values.items()}

    def _present(self, name: str) -> bool:
        return name not in self.names or bool(self.counts_RC[:, self.column_F[self.names.index(name)]].any())

    def _means(self, sums_F: np.ndarray, counts_C: np.ndarray) -> dict[str, np.ndarray]:
        with np.errstate(invalid="ignore", divide="ignore"):
            means_F = sums_F / counts_C[..., self.column_F]
        return {name: means_F[..., f] for f, name in enumerate(self.names)}

    def _resample(self, num_resamples: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        num_rows, parts = len(self.sums_RF), []
        step = max(1, CHUNK // num_rows)
        for start in range(0, num_resamples, step):
            shape = (min(step, num_resamples - start), num_rows)
            drawn_BR = rng.integers(num_rows, size=shape) + np.arange(shape[0])[:, None] * num_rows
            # how often a resample drew each row
            weights_BR = np.bincount(drawn_BR.ravel(), minlength=drawn_BR.size).reshape(shape).astype(np.float64)
            parts.append(metrics_from_means(self._means(weights_BR @ self.sums_RF, weights_BR @ self.counts_RC)))
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


class SumTable:
    """Collects rows batch by batch; batches need not have the same terms."""

    def __init__(self) -> None:
        self._batches: list[tuple[dict[str, np.ndarray], dict[str, np.ndarray]]] = []

    def append(self, sums: Mapping[str, np.ndarray], counts: Mapping[str, np.ndarray]) -> None:
        """`sums[name]` (R,) over the tokens of a row, `counts[name]` (R,) how many; terms share count arrays."""
        self._batches.append((dict(sums), dict(counts)))

    def finish(self) -> Sums:
        names = tuple(dict.fromkeys(name for sums, _ in self._batches for name in sums))
        columns: dict[tuple[int, ...], int] = {}  # terms with the same count array in every batch share a column
        keys = (tuple(id(counts.get(name)) for _, counts in self._batches) for name in names)
        column_F = np.array([columns.setdefault(key, len(columns)) for key in keys])
        sharers = [names[f] for f in np.unique(column_F, return_index=True)[1]]
        return Sums(names, self._columns(names, 0), self._columns(sharers, 1), column_F)

    def _columns(self, names: Sequence[str], which: int) -> np.ndarray:
        """The terms (R, F) over all batches, one beside the other, 0 where a batch has a term not."""
        lengths = [len(next(iter(sums.values()))) for sums, _ in self._batches]
        columns_RF, start = np.zeros((sum(lengths), len(names))), 0
        for batch, length in zip(self._batches, lengths, strict=True):
            for f, name in enumerate(names):
                columns_RF[start : start + length, f] = batch[which].get(name, 0)
            start += length
        return columns_RF


def _interval(value: float, draws_B: np.ndarray) -> Estimate:
    tail = 100 * (1 - CONFIDENCE) / 2
    draws_B = draws_B[~np.isnan(draws_B)]
    if not len(draws_B):
        return Estimate(value)
    lo, hi = np.percentile(draws_B, (tail, 100 - tail))
    return Estimate(value, float(lo), float(hi))


def finite(x: float | None) -> float | None:
    return None if x is None or not np.isfinite(x) else float(x)
