"""Errors of hidden states -> where two sides part, in numbers and in a sentence. Arrays in, numbers out.

The relative error at a point is e = ‖a − b‖ / ‖b‖ for each token: a the backend's residual stream, b the target's. The
rule that tells a fault from rounding, with its constants below:

- A layer's growth is (e′ + f) / (e before + f). e′ is the error after the layer over the larger of the target's norms
  before and after: a layer that takes a large part of the stream away leaves the error and shrinks the norm: no fault.
  f = 8 roundings of the coarser side's type is what a layer may add whatever came in, so that 0 -> 2e-7 is none.
- The medians over the tokens of a position bucket (0, 1, 2 to 3, 4 to 7, …) are looked at, and of all tokens: a wrong
  RoPE base or window shows at some positions only, while a token with an odd norm is no fault.
- A layer jumps when its growth is above 4 times that of a typical layer. Rounding alone grows by 0.3 to 2.3 a layer and
  by up to 1.9 from a layer's input to what its attention or MLP gives (SmolLM2 on three engines, bfloat16 and float32
  against float32; the largest, 2.3, in the first layer of vLLM in float32).
- The first layer that jumps is where the sides part. Its attention is named where its own growth jumps; else its MLP,
  likewise; else what lies around the two, norms and sums.
- The LM head is named where no point before jumps, but the median |Δ logprob| is above (e + f) × (|logit| +
  |logsumexp|): hidden states that are off by e move the logits by a fraction of that (0.02 to 0.03 in SmolLM2).

Shapes: P points, L positions of a response, T of its tokens, N positions of all responses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from rl_onoff.backends.layers import ATTENTION, EMBEDDINGS, HEAD, LAYER, MLP, Point, points_of

ROUNDING = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-9}  # largest relative error of one rounding
FLOOR = 8  # roundings that a layer may add, whatever came in
JUMP = 4.0  # times the typical growth
HEAD_SHARE = 1.0  # of the logits' size, times the error before them
MIN_TOKENS = 8  # of a position bucket whose median is looked at
WORDS = {
    EMBEDDINGS: "in the embeddings", ATTENTION: "in its attention", MLP: "in its MLP", HEAD: "in the LM head",
    LAYER: "around its attention and MLP (norms, sums)", "norm": "in the norm before the LM head",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Response:
    """What is known of one response: norms at every point, and its logprobs under both sides."""

    differences_PL: np.ndarray  # ‖a − b‖
    norms_PL: np.ndarray  # ‖b‖
    num_prompt: int
    logprobs_T: np.ndarray
    logprobs_target_T: np.ndarray
    logsumexp_T: np.ndarray  # of the backend
    overlap_ML: np.ndarray | None = None  # share of a layer's chosen experts that both sides chose; NaN: it has none


@dataclass(frozen=True, kw_only=True, slots=True)
class Parting:
    """Where the two sides part."""

    where: str  # a key of WORDS
    layer: int | None  # None: before or after all layers
    start: int  # of the positions where it shows
    end: int
    before: float  # median relative error before and after, in the bucket of positions where it shows most
    after: float
    times: float  # its growth there over the typical one
    jumps: list[int]  # every layer that jumps

    def words(self) -> str:
        where = WORDS[self.where]
        return where if self.layer is None else f"in layer {self.layer}, {where}"


@dataclass(frozen=True, slots=True)
class Errors:
    """Relative errors of all responses, side by side."""

    points: list[Point]
    errors_PN: np.ndarray
    differences_PN: np.ndarray
    norms_PN: np.ndarray
    buckets_N: np.ndarray  # the bits of a position

    @classmethod
    def of(cls, responses: Sequence[Response], num_layers: int, *, inside: bool) -> Errors:
        points, every = points_of(num_layers, inside), points_of(num_layers, True)
        some = [every.index(point) for point in points]

        def side_by_side(name: str) -> np.ndarray:
            arrays = [np.zeros((len(points), 0), np.float32), *(getattr(response, name) for response in responses)]
            rows = [array[some] if len(array) == len(every) != len(points) else array for array in arrays]
            return np.concatenate(rows, 1).astype(np.float64)

        differences_PN, norms_PN = side_by_side("differences_PL"), side_by_side("norms_PL")
        with np.errstate(all="ignore"):
            errors_PN = differences_PN / np.maximum(norms_PN, np.finfo(np.float32).tiny)
        lacking = np.array([kind in (ATTENTION, MLP) for kind, _ in points])[:, None] & np.isnan(norms_PN)
        errors_PN[np.isnan(errors_PN) & ~lacking] = np.inf  # states that are no numbers
        lengths = [response.norms_PL.shape[1] for response in responses]
        positions_N = np.concatenate([np.zeros(0), *map(np.arange, lengths)])
        return cls(points, errors_PN, differences_PN, norms_PN, np.frexp(positions_N)[1])

    def positions(self) -> list[dict[str, int]]:
        counts = np.bincount(self.buckets_N)
        return [{"start": (1 << i) >> 1, "end": 1 << i, "tokens": int(n)} for i, n in enumerate(counts)]

    def rows(self) -> list[dict[str, Any]]:
        """median, p90 and max of every point, and the medians by position bucket."""
        found = []
        for (kind, layer), errors_N in zip(self.points, self.errors_PN, strict=True):
            errors_N, buckets_N = errors_N[~np.isnan(errors_N)], self.buckets_N[~np.isnan(errors_N)]
            if not len(errors_N):
                continue
            row = {"point": kind, "layer": layer if kind in (LAYER, ATTENTION, MLP) else None}
            for what, share in (("median", 0.5), ("p90", 0.9), ("max", 1.0)):
                row[what] = float(np.quantile(errors_N, share, method="lower"))
            of = [errors_N[buckets_N == bucket] for bucket in range(self.buckets_N.max() + 1)]
            row["by_position"] = [float(np.median(each)) if len(each) else None for each in of]
            found.append(row)
        return found


class Growth:
    """By how much each step through the network grows the error: medians of a bucket's tokens; row 0 is all tokens."""

    def __init__(self, errors: Errors, floor: float):
        self._errors = errors
        of = errors.buckets_N
        chosen = [np.ones(len(of), bool), *(of == bucket for bucket in range(int(of.max()) + 1))]
        self._chosen = [mask for i, mask in enumerate(chosen) if i == 0 or mask.sum() >= MIN_TOKENS]
        self._buckets = [int(of[mask][0]) for mask in self._chosen]
        norms_PN = np.maximum(errors.norms_PN[1:], errors.norms_PN[:-1])
        norms_PN[-1] = errors.norms_PN[-1]  # the last norm changes the scale itself
        with np.errstate(all="ignore"):
            after_PN = errors.differences_PN[1:] / np.maximum(norms_PN, np.finfo(np.float32).tiny)
        after_PN[~np.isfinite(after_PN)] = np.inf
        steps_PN = growth_of(after_PN, errors.errors_PN[:-1], floor)
        begin_N = growth_of(errors.errors_PN[0], 0.0, floor)
        self.steps_PB = np.array([[np.median(row[m]) for m in self._chosen] for row in (begin_N, *steps_PN)])
        self.typical = typical_of(self.steps_PB[1:-1, 0])

    def overall(self, i: int) -> float | None:
        return float(self.steps_PB[i, 0]) if i else None

    def parting(self) -> Parting | None:
        """The first point that jumps."""
        times_PB = self.steps_PB / np.array([typical_of(row_P) for row_P in self.steps_PB[1:-1].T])
        jumps = np.flatnonzero((times_PB > JUMP).any(1))
        if not len(jumps):
            return None
        i, num = int(jumps[0]), len(times_PB) - 2
        b = int(times_PB[i].argmax())
        before, after = (float(np.median(self._errors.errors_PN[k][self._chosen[b]])) for k in (max(i - 1, 0), i))
        jumping = [self._buckets[k] for k in np.flatnonzero(times_PB[i] > JUMP) if k]
        first, last = (jumping[0], jumping[-1]) if jumping else (0, int(self._errors.buckets_N.max()))
        return Parting(
            where=EMBEDDINGS if i == 0 else LAYER if i <= num else "norm",
            layer=i - 1 if 0 < i <= num else None,
            start=(1 << first) >> 1, end=1 << last, before=before if i else 0.0, after=after,
            times=float(times_PB[i, b]), jumps=[int(k) - 1 for k in jumps if 0 < k <= num],
        )  # fmt: skip


def growth_of(after: Any, before: Any, floor: float) -> Any:
    """How often the error before a step fits into that after it; both with what rounding adds in one step. 1 where the
    states before it were no numbers already."""
    finite = np.isfinite(before)
    return np.where(finite, (after + floor) / (np.where(finite, before, 1.0) + floor), 1.0)


def typical_of(growths: np.ndarray) -> float:
    """The lower median, at least 1: of two layers the one without the fault counts."""
    finite = np.sort(growths[np.isfinite(growths)])
    return max(1.0, float(finite[(len(finite) - 1) // 2])) if len(finite) else 1.0


def inside_of(parting: Parting, errors: Errors, floor: float) -> Parting:
    """The same with the module that jumps inside the layer, as far as the responses looked into show it."""
    here_N = (errors.buckets_N >= math.frexp(parting.start)[1]) & (errors.buckets_N <= math.frexp(parting.end - 1)[1])
    if not here_N.any():
        return parting
    e_PN = errors.errors_PN[:, here_N]
    for offset, kind in ((1, ATTENTION), (2, MLP)):
        steps_KN = [growth_of(e_PN[i + offset], e_PN[i], floor) for i in range(0, len(e_PN) - 2, 3)]
        steps_K = np.array([np.median(step) for step in steps_KN])
        if steps_K[parting.layer] > JUMP * typical_of(steps_K):
            return replace(parting, where=kind)
    return parting


def head_of(responses: Sequence[Response], l_N: np.ndarray, floor: float) -> Parting | None:
    """The LM head, where it moves the logprobs more than the hidden states before it explain."""
    before, size = [], []
    for response in responses:
        here = slice(response.num_prompt - 1, None)  # position i tells of token i + 1
        before.append(response.differences_PL[-1, here] / response.norms_PL[-1, here])
        size.append(np.abs(response.logprobs_T + response.logsumexp_T) + np.abs(response.logsumexp_T))
    error_N = np.concatenate(before).astype(np.float64)
    times = float(np.median(l_N / ((error_N + floor) * np.concatenate(size))))
    if not times > HEAD_SHARE:
        return None
    end, error = max(response.norms_PL.shape[1] for response in responses), float(np.median(error_N))
    return Parting(where=HEAD, layer=None, start=0, end=end, before=error, after=error, times=times, jumps=[])
