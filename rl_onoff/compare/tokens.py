"""The tokens of all responses, in blocks of whole responses, and what cannot be had from sums: order and histograms.

All blocks but the last lie in a temporary file: the memory is that of one block, and every number is exact.

Shapes: S responses, N tokens one after the other.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from rl_onoff.compare import metrics
from rl_onoff.types import Key

BLOCK_TOKENS = 1 << 21
ABS_EDGES = np.logspace(-8, 2, 81)
PROB_BINS = 50
MAX_POSITIONS = 200
SIDES = ("behaviour", "target")
ENTROPIES = ("entropy_behaviour", "entropy_target")


class Store:
    """Columns in blocks; the last block is in memory, those before it are in a temporary file in `folder`."""

    def __init__(self, folder: Path | None):
        self.folder, self._file = folder, None
        self.lengths: list[np.ndarray] = []  # of the responses of every block
        self._places: list[dict[str, int]] = []
        self._last: Mapping[str, np.ndarray] = {}

    def append(self, lengths_S: np.ndarray, columns: Mapping[str, np.ndarray]) -> None:
        if self.lengths:
            self._file = self._file or tempfile.TemporaryFile(dir=self.folder)  # noqa: SIM115 (it goes with the store)
            self._places.append({})
            for name, column in self._last.items():
                self._places[-1][name] = self._file.seek(0, 2)
                np.save(self._file, column)
        self.lengths.append(lengths_S)
        self._last = columns

    def read(self, block: int, name: str) -> np.ndarray:
        if self._file is None or block == len(self._places):
            return self._last[name]
        self._file.seek(self._places[block][name])
        return np.load(self._file)


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """Responses that lie together: the number of the first among all, their lengths, and the columns of their tokens,
    read when asked for.
    """

    first: int
    lengths_S: np.ndarray
    read: Callable[[str], np.ndarray]
    kept_N: np.ndarray | None  # of the columns on the disk; None: all

    def __getitem__(self, name: str) -> np.ndarray:
        return self.read(name) if self.kept_N is None else self.read(name)[self.kept_N]


class Tokens:
    """The tokens of the responses in `kept_S`, whose keys are `keys`."""

    def __init__(self, store: Store, kept_S: np.ndarray, keys: Sequence[Key]) -> None:
        self.store, self.kept_S, self.keys = store, kept_S, keys
        self.lengths_S = np.concatenate(store.lengths)[kept_S]
        parts = []
        for block in self.blocks():
            abs_N, lengths_S = np.abs(block["l"]), block.lengths_S
            largest_S = np.maximum.reduceat(abs_N, metrics.segment_starts(lengths_S))
            sums = (metrics.segment_sums(abs_N, lengths_S), metrics.segment_sums(block["l"], lengths_S))
            parts.append((sums[0] / lengths_S, largest_S, sums[1]))
        self.mean_abs_S, self.max_abs_S, self.sum_S = map(np.concatenate, zip(*parts, strict=True))

    def blocks(self, chosen_S: np.ndarray | None = None) -> Iterator[Block]:
        """The blocks, of the chosen ones among the responses."""
        start = first = 0
        for number, lengths_S in enumerate(self.store.lengths):
            wanted_S = self.kept_S[start : start + len(lengths_S)].copy()
            start, size = start + len(lengths_S), int(wanted_S.sum())
            if chosen_S is not None:
                wanted_S[wanted_S] = chosen_S[first : first + size]
            if wanted_S.any():
                kept_N = None if wanted_S.all() else np.repeat(wanted_S, lengths_S)

                def read(name: str, number: int = number) -> np.ndarray:
                    return self.store.read(number, name)

                yield Block(first=first, lengths_S=lengths_S[wanted_S], read=read, kept_N=kept_N)
            first += size

    def order_metrics(self, chosen_S: np.ndarray) -> dict[str, float]:
        """Percentiles and extremes of the chosen responses."""
        found = [metrics.extremes(x["behaviour"], x["target"], x.lengths_S) for x in self.blocks(chosen_S)]
        extremes = {name: (min if "_min" in name else max)(each[name] for each in found) for name in found[0]}
        return self.percentiles(lambda: (np.abs(block["l"]) for block in self.blocks(chosen_S))) | extremes

    def percentiles_at(self, start: int, end: int) -> dict[str, float]:
        """Percentiles of |l| of the tokens at start ≤ position < end."""

        def parts() -> Iterator[np.ndarray]:
            for block in self.blocks():
                positions_N = metrics.segment_positions(block.lengths_S)
                at_N = (positions_N >= start) & (positions_N < end)
                if at_N.any():
                    yield np.abs(block["l"][at_N])

        return self.percentiles(parts)

    def percentiles(self, parts: Callable[[], Iterator[np.ndarray]]) -> dict[str, float]:
        return dict(zip(metrics.PERCENTILES, percentile(parts, [*metrics.PERCENTILES.values()]).tolist(), strict=True))

    def named(self, s: int) -> dict[str, Any]:
        """The name of a response, for a row of a table."""
        return dict(zip(("request_id", "sample"), self.keys[s], strict=True))

    def histograms(self) -> dict[str, Any]:
        """Of l, |l|, p against q, both entropies (empty where unknown), and Σ l along the response; ready for JSON.

        probabilities: counts[i][j] tokens have q in bin i and p in bin j of [0, 1].
        cumulative_l: mean of Σ_{s≤t} l_s over the `num` responses that reach position t, at no more than 200 positions.
        Long responses are not short ones continued: where `num` falls, the curve changes population.
        """
        limit = max(float(percentile(lambda: (np.abs(block["l"]) for block in self.blocks()), [99.5])[0]), 1e-6)
        highest = [
            float(np.max(x[name], initial=0.0, where=~np.isnan(x[name]))) for x in self.blocks() for name in ENTROPIES
        ]
        edges = {"l": np.linspace(-limit, limit, 102), "abs_l": ABS_EDGES}
        edges |= dict.fromkeys(ENTROPIES, np.linspace(0, max(highest) or 1.0, 61))
        counts = {name: np.zeros(len(each) + 1, np.int64) for name, each in edges.items()}  # with those outside
        probs = np.zeros(PROB_BINS**2, np.int64)
        positions = np.unique(np.linspace(0, np.max(self.lengths_S) - 1, MAX_POSITIONS).astype(np.int64))
        sums, nums = np.zeros(len(positions)), np.zeros(len(positions), np.int64)
        for block in self.blocks():
            l_N, lengths_S = block["l"], block.lengths_S
            values = {"l": l_N, "abs_l": np.abs(l_N)} | {name: block[name] for name in ENTROPIES}
            for name, values_N in values.items():
                counts[name] += _counts(values_N, edges[name])
            q_N, p_N = (np.exp(np.asarray(block[side], np.float64)) * PROB_BINS for side in SIDES)
            q_N, p_N = (np.minimum(x_N, PROB_BINS - 1).astype(np.int64) for x_N in (q_N, p_N))
            probs += np.bincount(q_N * PROB_BINS + p_N, minlength=PROB_BINS**2)
            sum_N, starts_S = metrics.cumulative_l(l_N, lengths_S), metrics.segment_starts(lengths_S)
            for i, t in enumerate(positions.tolist()):
                reached = sum_N[starts_S[lengths_S > t] + t]
                sums[i] += reached.sum()
                nums[i] += len(reached)
        curve = {"position": positions.tolist(), "mean": (sums / nums).tolist(), "num": nums.tolist()}
        found: dict[str, Any] = {name: _histogram(counts[name], edges[name]) for name in edges}
        pairs = {"edges": np.linspace(0, 1, PROB_BINS + 1).tolist()}
        found["probabilities"] = pairs | {"counts": probs.reshape(PROB_BINS, PROB_BINS).tolist()}
        names = ("l", "abs_l", "probabilities", *ENTROPIES)
        return {name: found[name] for name in names} | {"cumulative_l": curve}

    def worst(self, num: int) -> dict[str, list[dict[str, Any]]]:
        """The tokens with the largest |l| and the responses with the largest mean |l|, one dict each.

        A logprob of −inf is null, since JSON has no infinity.
        """
        tokens: list[dict[str, Any]] = []
        names = {"position": "positions", "token_id": "token_ids"} | {f"{side}_logprob": side for side in SIDES}
        names["l"] = "l"
        for block in self.blocks():
            abs_N, ends_S = np.abs(block["l"]), np.cumsum(block.lengths_S)
            columns = {name: block[column] for name, column in names.items()}
            for n in largest(abs_N, num).tolist():
                row = self.named(block.first + int(np.searchsorted(ends_S, n, "right")))
                tokens.append(row | {name: column[n].item() for name, column in columns.items()})
            tokens = sorted(tokens, key=lambda row: -abs(row["l"]))[:num]
        columns = {"tokens": self.lengths_S, "mean_abs_l": self.mean_abs_S, "max_abs_l": self.max_abs_S}
        columns["sum_l"] = self.sum_S
        responses = [
            self.named(s) | {name: column[s].item() for name, column in columns.items()}
            for s in largest(self.mean_abs_S, num).tolist()
        ]
        found = {"worst": tokens, "worst_responses": responses}
        return {
            name: [{key: None if x in (math.inf, -math.inf) else x for key, x in row.items()} for row in rows]
            for name, rows in found.items()
        }


def largest(values: np.ndarray, num: int) -> np.ndarray:
    """Where the largest values are, the first of equal ones first."""
    least = np.partition(values, -num)[-num] if len(values) > num else -np.inf
    among = np.flatnonzero(values >= least)
    return among[np.argsort(-values[among], kind="stable")[:num]]


def percentile(parts: Callable[[], Iterator[np.ndarray]], shares: Sequence[float]) -> np.ndarray:
    """np.percentile of the numbers in all parts, none below 0, exact: a first pass counts them by their upper 20 bits,
    which are in the order of the numbers, a second one looks at those with the bits of the wanted ranks.
    """
    if len(few := list(islice(parts(), 2))) == 1:
        return np.percentile(few[0], shares)
    counts = np.zeros(1 << 20, np.int64)
    for part in parts():
        counts += np.bincount(_upper_bits(part), minlength=len(counts))
    ends = np.cumsum(counts)
    at = (ends[-1] - 1) * (np.asarray(shares) / 100)
    ranks = np.stack([np.floor(at), np.minimum(np.floor(at) + 1, ends[-1] - 1)]).astype(np.int64)
    wanted = np.zeros(len(counts), bool)
    wanted[np.searchsorted(ends, ranks, "right")] = True
    found = [np.unique(part[wanted[_upper_bits(part)]], return_counts=True) for part in parts()]
    values, nums = map(np.concatenate, zip(*found, strict=True))
    order = np.argsort(values)
    values, below = values[order], np.cumsum(np.where(wanted, 0, counts))  # below: of what was not looked at
    upto = np.cumsum(nums[order]) + below[_upper_bits(values)]
    low, high = values[np.searchsorted(upto, ranks, "right")]
    share = at - np.floor(at)
    return np.where(share < 0.5, low + (high - low) * share, high - (high - low) * (1 - share))  # as numpy rounds


def _upper_bits(values: np.ndarray) -> np.ndarray:
    return (values.view(np.uint64) >> np.uint64(44)).astype(np.int64)


def _counts(values_N: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """How many values are in each bin, and then how many below and above all; NaN is nowhere."""
    values_N = values_N[~np.isnan(values_N)]
    below, above = int((values_N < edges[0]).sum()), int((values_N > edges[-1]).sum())
    return np.array([*np.histogram(values_N, edges)[0], below, above])


def _histogram(counts: np.ndarray, edges: np.ndarray) -> dict[str, Any]:
    below, above = counts[-2:].tolist()
    return {"edges": edges.tolist(), "counts": counts[:-2].tolist(), "below": below, "above": above}
