"""Responses as small binary chunks that the page inflates when it shows them. N tokens of a chunk, K top tokens.

A chunk is a JSON header and columns over all its tokens. Sampled tokens' logprobs are exact (float32); entropies are
rounded to 1/4096 nat and the logprobs in the top lists to 1/1024 nat (0.05 % of a probability). A target's list is
written relative to the base's (the behaviour's, or the first that has lists), because the two mostly agree and then
deflate to almost nothing. Bytes of a column are stored plane by plane.
codec.js reads what is written here; change both together.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from rl_onoff.report.data import ReportResponse
from rl_onoff.types import TokenScores

ENTROPY_STEP = 1 / 4096
TOP_STEP = 1 / 1024
NO_ENTROPY = 0xFFFF
ESCAPE = 0xFF  # in an index column: the id is in the escape column, not in the base's list


@dataclass(frozen=True, slots=True)
class TopLimit:
    """Which entries of a top list are embedded."""

    k: int
    min_probability: float
    share: float = 1.0  # of a chunk's tokens that have lists at all: those on which the policies differ most


TOP_LIMITS = (
    TopLimit(64, 0.0),
    TopLimit(64, 1e-5),
    TopLimit(20, 1e-4),
    TopLimit(20, 1e-3),
    TopLimit(10, 1e-3, 1 / 2),
    TopLimit(10, 1e-3, 1 / 4),
    TopLimit(10, 1e-3, 1 / 8),
    TopLimit(10, 1e-3, 1 / 32),
    TopLimit(0, 1.0, 0.0),
)


@dataclass(frozen=True, slots=True)
class TopLists:
    """The kept entries of one policy over a chunk: row n's are the first `counts_N[n]` of it."""

    counts_N: np.ndarray
    ids_NK: np.ndarray
    steps_NK: np.ndarray  # logprobs in TOP_STEP

    @property
    def kept_NK(self) -> np.ndarray:
        return np.arange(self.ids_NK.shape[1]) < self.counts_N[:, None]


@dataclass(frozen=True, slots=True)
class Chunk:
    """A packed chunk, and the ids whose texts the page needs for it."""

    data: bytes
    ids: np.ndarray


def pack_tokens(responses: Sequence[ReportResponse], limit: TopLimit) -> Chunk:
    """The numbers of some responses under one limit on the top lists. Policy 0 is the behaviour, 1 the first target."""
    ids_N = np.concatenate([np.asarray(r.rollout.token_ids_T, np.int64) for r in responses] or [np.zeros(0, np.int64)])
    lengths, num_views = [r.num_tokens for r in responses], 1 + max((len(r.targets) for r in responses), default=0)
    rows = [[r.behaviour, *r.targets, *[None] * (num_views - 1 - len(r.targets))] for r in responses]
    views = [[row[v] for row in rows] for v in range(num_views)]
    logprobs = [_column(views_v, lengths, "logprobs_T", np.float32, np.nan) for views_v in views]
    shown_N = _most_different(logprobs, limit.share)
    lists = [_top_lists(views_v, lengths, limit, shown_N) for views_v in views]
    base_view = next((v for v, lists_v in enumerate(lists) if lists_v.counts_N.any()), 0)
    base = lists[base_view]
    columns = _coded_ids("token", ids_N, _index_in(base, ids_N[:, None])[:, 0])
    for v in range(num_views):
        columns += [
            (f"logprob{v}", logprobs[v]),
            (f"entropy{v}", _entropy_steps(_column(views[v], lengths, "entropy_T", np.float64, np.nan))),
            (f"rank{v}", _column(views[v], lengths, "rank_T", np.uint32, 0)),
            *_coded_lists(v, lists[v], None if v == base_view else base, ids_N, _steps(logprobs[v])),
        ]
    seen = [ids_N, *(lists_v.ids_NK[lists_v.kept_NK] for lists_v in lists)]
    header = {"lengths": lengths, "views": num_views, "base": base_view, **asdict(limit)}
    return Chunk(_assemble(header, columns), np.unique(np.concatenate(seen)))


def pack_json(value: Any) -> bytes:
    """Deflated JSON in ASCII, so that lone surrogates and U+2028 in model text survive."""
    return zlib.compress(json.dumps(value, separators=(",", ":"), allow_nan=False).encode("ascii"), 6)


def _assemble(header: dict[str, Any], columns: list[tuple[str, np.ndarray]]) -> bytes:
    columns = [(name, values) for name, values in columns if len(values)]
    header["columns"] = [[name, values.dtype.str.lstrip("<|"), len(values)] for name, values in columns]
    head = json.dumps(header, separators=(",", ":")).encode("ascii")
    planes = [np.ascontiguousarray(v).view(np.uint8).reshape(-1, v.dtype.itemsize).T.tobytes() for _, v in columns]
    return zlib.compress(b"".join([struct.pack("<I", len(head)), head, *planes]), 6)


def _column(
    views: Sequence[TokenScores | None], lengths: Sequence[int], name: str, dtype: Any, missing: float
) -> np.ndarray:
    """One array's value per token over all responses; `missing` where a response has none."""
    parts = [np.zeros(0, dtype)]
    for view, length in zip(views, lengths, strict=True):
        values = None if view is None else getattr(view, name)
        if values is not None and len(values) != length:
            raise ValueError(f"{name} has {len(values)} rows for a response of {length} tokens")
        parts.append(np.full(length, missing, dtype) if values is None else np.asarray(values).astype(dtype))
    return np.concatenate(parts)


def _entropy_steps(entropy_N: np.ndarray) -> np.ndarray:
    steps = np.clip(np.rint(entropy_N / ENTROPY_STEP), 0, NO_ENTROPY - 1)
    return np.where(np.isnan(steps), NO_ENTROPY, steps).astype(np.uint16)


def _steps(logprobs: np.ndarray) -> np.ndarray:
    """Logprobs in TOP_STEP; below -32 nats (and -inf, NaN) is the last step."""
    finite = np.nan_to_num(np.asarray(logprobs, np.float64), nan=-32.0, neginf=-32.0, posinf=0.0)
    return np.clip(np.floor(finite / TOP_STEP + 0.5), -32767, 0).astype(np.int32)


def _most_different(logprobs: Sequence[np.ndarray], share: float) -> np.ndarray:
    """Which tokens have the largest |l| under any target, or the lowest logprob where nothing is compared."""
    if share >= 1:
        return np.ones(len(logprobs[0]), bool)
    first, *others = (np.nan_to_num(values_N.astype(np.float64), nan=0.0, neginf=-1e3) for values_N in logprobs)
    compared = others and not np.isnan(logprobs[0]).all()
    all_VN = np.stack([first, *others])
    size_N = np.max(np.abs(all_VN[1:] - first), axis=0) if compared else -np.min(all_VN, axis=0)
    shown_N = np.zeros(len(size_N), bool)
    shown_N[np.argsort(-size_N, kind="stable")[: int(len(size_N) * share)]] = True
    return shown_N


def _top_lists(
    views: Sequence[TokenScores | None], lengths: Sequence[int], limit: TopLimit, shown_N: np.ndarray
) -> TopLists:
    tops = [None if v is None or v.top_ids_TK is None else (v.top_ids_TK, v.top_logprobs_TK) for v in views]
    width = min(max((top[0].shape[1] for top in tops if top is not None), default=0), limit.k)
    ids_NK = np.full((sum(lengths), width), -1, np.int64)
    logprobs_NK = np.full((sum(lengths), width), -np.inf)
    start = 0
    for top, length in zip(tops, lengths, strict=True):
        if top is not None and top[1] is not None:
            k = min(top[0].shape[1], width)
            ids_NK[start : start + length, :k] = top[0][:, :k]
            logprobs_NK[start : start + length, :k] = top[1][:, :k]
        start += length
    floor = np.log(limit.min_probability) if limit.min_probability > 0 else -np.inf
    fine_NK = (ids_NK >= 0) & (logprobs_NK >= floor) & shown_N[:, None]
    counts_N = np.logical_and.accumulate(fine_NK, axis=1).sum(axis=1)
    return TopLists(counts_N, ids_NK, _steps(logprobs_NK))


def _index_in(lists: TopLists, ids_NM: np.ndarray) -> np.ndarray:
    """Where each id stands in its row's kept list; ESCAPE where it does not."""
    found_NM = np.full(ids_NM.shape, ESCAPE, np.uint8)
    for j in reversed(range(lists.ids_NK.shape[1])):
        same_NM = (ids_NM == lists.ids_NK[:, j : j + 1]) & (lists.counts_N[:, None] > j)
        found_NM[same_NM] = j
    return found_NM


def _coded_ids(name: str, ids: np.ndarray, index: np.ndarray) -> list[tuple[str, np.ndarray]]:
    return [(f"{name}_index", index), (f"{name}_id", ids[index == ESCAPE].astype(np.uint32))]


def _coded_lists(
    v: int, lists: TopLists, base: TopLists | None, ids_N: np.ndarray, chosen_N: np.ndarray
) -> list[tuple[str, np.ndarray]]:
    """Counts, ids and logprobs of one view's lists; base None: this view is the base itself.

    A logprob is a difference from the sampled token's own, from the base's for the same id, or from 0.
    """
    kept_NK = lists.kept_NK
    if not kept_NK.any():
        return []
    rows = np.nonzero(kept_NK)[0]
    ids = lists.ids_NK[kept_NK]
    reference = np.zeros(len(ids), np.int32)
    coded = [(f"top{v}_id", ids.astype(np.uint32))]
    if base is not None:
        index = _index_in(base, lists.ids_NK)[kept_NK]
        inside = index != ESCAPE
        reference[inside] = base.steps_NK[rows[inside], index[inside]]
        coded = _coded_ids(f"top{v}", ids, index)
    reference = np.where(ids == ids_N[rows], chosen_N[rows], reference)
    steps = lists.steps_NK[kept_NK] - reference
    return [(f"top{v}_count", lists.counts_N.astype(np.uint8)), *coded, (f"top{v}_step", steps.astype(np.int16))]
