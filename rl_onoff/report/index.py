"""What the page knows of every response before it inflates any of them, and the worst tokens of the run."""

from __future__ import annotations

import heapq
import math
from typing import Any

import numpy as np

from rl_onoff.report.data import ReportResponse, TokenView

NUM_WORST = 100  # worst tokens kept per target


def log_ratio(behaviour: TokenView | None, target: TokenView) -> np.ndarray | None:
    """l_t = log p(y_t) - log q(y_t), or None without a behaviour."""
    if behaviour is None:
        return None
    with np.errstate(invalid="ignore"):
        return np.asarray(target.logprobs_T, np.float64) - np.asarray(behaviour.logprobs_T, np.float64)


def plain(value: Any) -> Any:
    """Value with every number JSON can say: NaN and infinities as the strings JavaScript's Number() reads."""
    if isinstance(value, dict) or hasattr(value, "items"):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _short(value: float) -> Any:
    return plain(float(f"{value:.6g}"))


class Index:
    """Columns with one entry per response, and a heap of worst tokens per target; small enough to hold for a million responses."""

    def __init__(self) -> None:
        self.columns: dict[str, list[Any]] = {
            name: [] for name in ("id", "sample", "chunk", "length", "reward", "finish")
        }
        self.groups: dict[str, list[str | None]] = {}
        self.mean: list[
            list[Any]
        ] = []  # per target (or the behaviour, where nothing is compared): mean l, or mean logprob
        self.worst: list[list[Any]] = []  # max |l|, or minus the lowest logprob
        self.heaps: list[list[tuple[float, int, int, float, float]]] = []
        self.num_responses = 0
        self.has_behaviour = self.has_targets = False

    def add(self, response: ReportResponse, chunk: int) -> None:
        row = (
            response.request_id,
            int(response.sample),
            chunk,
            len(response.token_ids_T),
            response.reward,
            response.finish_reason,
        )
        for column, value in zip(self.columns.values(), row, strict=True):
            column.append(plain(value))
        for name in {*self.groups, *response.groups}:
            column = self.groups.setdefault(str(name), [None] * self.num_responses)
            value = response.groups.get(name)
            column.append(None if value is None else str(value))
        for i, target in enumerate(response.targets or (None,)):
            self._add_numbers(i, response, target)
        self.has_behaviour |= response.behaviour is not None
        self.has_targets |= bool(response.targets)
        self.num_responses += 1

    def _add_numbers(self, i: int, response: ReportResponse, target: TokenView | None) -> None:
        while len(self.mean) <= i:
            self.mean.append([None] * self.num_responses)
            self.worst.append([None] * self.num_responses)
            self.heaps.append([])
        ratio_T = None if target is None else log_ratio(response.behaviour, target)
        only = target or response.behaviour
        if ratio_T is None:
            if only is None:
                raise ValueError(f"response {response.request_id!r} has neither a behaviour nor a target")
            ratio_T = np.asarray(only.logprobs_T, np.float64)
        known_T = ratio_T[~np.isnan(ratio_T)]
        self.mean[i].append(_short(known_T.mean()) if len(known_T) else None)
        self.worst[i].append(_short(np.abs(known_T).max()) if len(known_T) else None)
        size_T = np.nan_to_num(np.abs(ratio_T), nan=-1.0, posinf=1e9)
        heap = self.heaps[i]
        bar = heap[0][0] if len(heap) == NUM_WORST else 0.0
        for t in np.argsort(-size_T, kind="stable")[: min(NUM_WORST, int((size_T > bar).sum()))]:
            q = math.nan if response.behaviour is None else float(response.behaviour.logprobs_T[t])
            p = math.nan if target is None else float(target.logprobs_T[t])
            self._keep(heap, (float(size_T[t]), -self.num_responses, -int(t), q, p))

    @staticmethod
    def _keep(heap: list[Any], item: tuple[float, int, int, float, float]) -> None:
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
