"""Sums per response, and what they say of the metrics' uncertainty.

Shapes: R rows (a response, or the part of one that lies in a position bucket), F terms, B resamples. A metric is a
function of means, a mean is a ratio of sums, and a sum over responses drawn again with replacement is a weighted sum of
the rows. So a resample costs one row of a matrix product, and no token is looked at twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

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

        def stacked(which: int, names: Sequence[str]) -> np.ndarray:
            parts = [np.broadcast_arrays(*(batch.get(name, (0, 0))[which] for name in names)) for batch in batches]
            return np.concatenate([np.stack(part, axis=1) for part in parts], dtype=np.float64)

        counts_RC = stacked(1, [names[shared.index(column)] for column in columns])
        return cls(names, stacked(0, names), counts_RC, np.array([columns.index(column) for column in shared]))

    def rows(self, rows: np.ndarray) -> Sums:
        return Sums(self.names, self.sums_RF[rows], self.counts_RC[rows], self.column_F)

    def total(self, name: str) -> int:
        return round(self.sums_RF[:, self.names.index(name)].sum()) if name in self.names else 0

    def estimates(self, num_resamples: int, seed: int) -> dict[str, Estimate]:
        """Every metric with its interval (percentile bootstrap, Efron 1979)."""
        num_rows, totals_C = len(self.sums_RF), self.counts_RC.sum(axis=0)
        absent = {name for name, column in zip(self.names, self.column_F, strict=True) if not totals_C[column]}
        values = self._metrics(self.sums_RF.sum(axis=0), totals_C)
        values = {name: float(value) for name, value in values.items() if name not in absent}
        if num_rows < 2 or num_resamples < 2:
            return {name: Estimate(value) for name, value in values.items()}
        rng, step, parts = np.random.default_rng(seed), max(1, CHUNK // num_rows), []
        for start in range(0, num_resamples, step):
            shape = (min(step, num_resamples - start), num_rows)
            drawn_BR = rng.integers(num_rows, size=shape) + np.arange(shape[0])[:, None] * num_rows
            # how often a resample drew each row
            weights_BR = np.bincount(drawn_BR.ravel(), minlength=drawn_BR.size).reshape(shape).astype(np.float64)
            parts.append(self._metrics(weights_BR @ self.sums_RF, weights_BR @ self.counts_RC))
        estimates, tail = {}, 100 * (1 - CONFIDENCE) / 2
        for name, value in values.items():
            draws_B = np.concatenate([part[name] for part in parts])
            draws_B = draws_B[~np.isnan(draws_B)]
            ends = np.percentile(draws_B, (tail, 100 - tail)).tolist() if len(draws_B) else ()
            estimates[name] = Estimate(value, *ends)
        return estimates

    def _metrics(self, sums_F: np.ndarray, counts_C: np.ndarray) -> dict[str, np.ndarray]:
        with np.errstate(invalid="ignore", divide="ignore"):
            means_F = sums_F / counts_C[..., self.column_F]
        return metrics_from_means({name: means_F[..., f] for f, name in enumerate(self.names)})
