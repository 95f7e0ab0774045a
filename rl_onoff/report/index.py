"""What the page knows of every response before it inflates any of them, and the worst tokens of the run."""

from __future__ import annotations

import heapq
import math
from typing import Any

import numpy as np

from rl_onoff.report.data import ReportResponse
from rl_onoff.types import TokenScores

NUM_WORST = 100  # worst tokens kept per target
COLUMNS = ("id", "sample", "chunk", "length", "reward", "finish")


def plain(value: Any) -> Any:
    """Value with every number JSON can say: NaN and infinities as the strings JavaScript's Number() reads."""
    if hasattr(value, "items"):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _short(value: float) -> Any:
    return plain(float(f"{value:.6g}"))


class Index:
    """Columns with one entry per response, a heap of worst tokens per target: small even for a million responses."""

    def __init__(self) -> None:
        self.columns: dict[str, list[Any]] = {name: [] for name in COLUMNS}
        self.groups: dict[str, list[str | None]] = {}
        # Per target (or for the behaviour, where nothing is compared): mean l, or mean logprob
        self.mean: list[list[Any]] = []
        self.worst: list[list[Any]] = []  # max |l|, or minus the lowest logprob
        self.heaps: list[list[tuple[float, int, int, float, float]]] = []
        self.num_responses = 0
        self.has_behaviour = self.has_targets = False

    def add(self, response: ReportResponse, chunk: int) -> None:
        rollout = response.rollout
        finish = "" if rollout.finish_reason is None else rollout.finish_reason.value
        row = (rollout.request_id, rollout.sample, chunk, response.num_tokens, rollout.reward, finish)
        for name, value in zip(COLUMNS, row, strict=True):
            self.columns[name].append(plain(value))
        for name in {*self.groups, *response.groups}:
            self.groups.setdefault(name, [None] * self.num_responses).append(response.groups.get(name))
        for i, target in enumerate(response.targets or (None,)):
            self._add_numbers(i, response.behaviour, target)
        self.has_behaviour |= response.behaviour is not None
        self.has_targets |= bool(response.targets)
        self.num_responses += 1

    def _add_numbers(self, i: int, behaviour: TokenScores | None, target: TokenScores | None) -> None:
        while len(self.mean) <= i:
            self.mean.append([None] * self.num_responses)
            self.worst.append([None] * self.num_responses)
            self.heaps.append([])
        q_T, p_T = (None if side is None else np.asarray(side.logprobs_T, np.float64) for side in (behaviour, target))
        with np.errstate(invalid="ignore"):
            shown_T = p_T - q_T if p_T is not None and q_T is not None else q_T if p_T is None else p_T
        assert shown_T is not None
        known_T = shown_T[~np.isnan(shown_T)]
        self.mean[i].append(_short(known_T.mean()) if len(known_T) else None)
        self.worst[i].append(_short(np.abs(known_T).max()) if len(known_T) else None)
        size_T = np.nan_to_num(np.abs(shown_T), nan=-1.0, posinf=1e9)
        heap = self.heaps[i]
        least = heap[0][0] if len(heap) == NUM_WORST else 0.0
        for t in np.argsort(-size_T, kind="stable")[: min(NUM_WORST, int((size_T > least).sum()))]:
            q, p = (math.nan if side_T is None else float(side_T[t]) for side_T in (q_T, p_T))
            item = float(size_T[t]), -self.num_responses, -int(t), q, p
            if len(heap) < NUM_WORST:
                heapq.heappush(heap, item)
            elif item > heap[0]:
                heapq.heapreplace(heap, item)

    def as_json(self) -> dict[str, Any]:
        worst_tokens = [
            [[-r, -t, plain(q), plain(p)] for _, r, t, q, p in sorted(heap, key=lambda item: item[:3], reverse=True)]
            for heap in self.heaps
        ]
        groups = {}
        for name, values in self.groups.items():
            names = sorted({v for v in values if v is not None})
            code = {v: i for i, v in enumerate(names)}
            groups[name] = {"values": names, "codes": [-1 if v is None else code[v] for v in values]}
        numbers = {"mean": self.mean, "worst": self.worst, "worst_tokens": worst_tokens}
        has = {"has_behaviour": self.has_behaviour, "has_targets": self.has_targets}
        return {**self.columns, "groups": groups, **numbers, **has}
