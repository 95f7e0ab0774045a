"""Sums per response, and what they say of the metrics' uncertainty.

Shapes: R rows (a response, or the part of one that lies in a position bucket), F terms, B resamples. A metric is a
function of means, a mean is a ratio of sums, and a sum over responses drawn again with replacement is a weighted sum of
the rows. So a resample costs one row of a matrix product, and no token is looked at twice.
"""

from __future__ import annotations

from collections.abc import Mapping
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
        return {name: _finite(getattr(self, name)) for name in ("value", "lo", "hi")}


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
        num_rows = len(self.sums_RF)
        step = max(1, CHUNK // num_rows)
        parts = []
        for start in range(0, num_resamples, step):
            weights_BR = _weights(min(step, num_resamples - start), num_rows, rng)
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
        keys = {name: tuple(id(counts.get(name)) for _, counts in self._batches) for name in names}
        column_F = np.array([columns.setdefault(keys[name], len(columns)) for name in names])
        sharer = {column: name for name, column in zip(reversed(names), reversed(column_F.tolist()), strict=True)}
        counts_RC = np.column_stack([self._column(sharer[column], 1) for column in range(len(columns))])
        sums_RF = np.empty((len(counts_RC), len(names)))
        for f, name in enumerate(names):
            sums_RF[:, f] = self._column(name, 0)
        return Sums(names, sums_RF, counts_RC, column_F)

    def _column(self, name: str, which: int) -> np.ndarray:
        """One term over all batches, 0 where a batch has it not."""
        parts = []
        for batch in self._batches:
            num_rows = len(next(iter(batch[0].values())))
            parts.append(batch[which].get(name, np.zeros(num_rows)))
        return np.concatenate(parts).astype(np.float64)


def _weights(num_resamples: int, num_rows: int, rng: np.random.Generator) -> np.ndarray:
    """(B, R): how often a resample drew each row."""
    shape = (num_resamples, num_rows)
    drawn_BR = rng.integers(num_rows, size=shape) + np.arange(num_resamples)[:, None] * num_rows
    return np.bincount(drawn_BR.ravel(), minlength=drawn_BR.size).reshape(shape).astype(np.float64)


def _interval(value: float, draws_B: np.ndarray) -> Estimate:
    tail = 100 * (1 - CONFIDENCE) / 2
    draws_B = draws_B[~np.isnan(draws_B)]
    if not len(draws_B):
        return Estimate(value)
    lo, hi = np.percentile(draws_B, (tail, 100 - tail))
    return Estimate(value, float(lo), float(hi))


def _finite(x: float | None) -> float | None:
    return None if x is None or not np.isfinite(x) else float(x)
