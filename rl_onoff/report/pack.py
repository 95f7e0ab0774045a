"""Responses as small binary chunks that the page inflates when it shows them. T tokens of a response, N of a chunk, K
top tokens.

A chunk is a JSON header and columns over all its tokens. Sampled tokens' logprobs are exact (float32), and NaN where a
mask leaves the token out (column `context`); entropies are rounded to 1/4096 nat and the logprobs in the top lists to
1/1024 nat (0.05 % of a probability). A target's list is written relative to the base's (the behaviour's, or the first
that has lists), because the two mostly agree and then deflate to almost nothing. Bytes of a column are stored plane by
plane.
codec.js reads what is written here; change both together.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Any, NamedTuple, Self

import numpy as np

from rl_onoff.types import Rollout, TokenScores

ENTROPY_STEP = 1 / 4096
TOP_STEP = 1 / 1024
NO_ENTROPY = 0xFFFF
ESCAPE = 0xFF  # in an index column: the id is in the escape column, not in the base's list


class TopLimit(NamedTuple):
    """Which entries of a top list are embedded."""

    k: int
    min_probability: float
    share: float  # of a chunk's tokens that have lists at all: those on which the policies differ most


TOP_LIMITS = [TopLimit(*limit) for limit in (
    (64, 0.0, 1.0), (64, 1e-5, 1.0), (20, 1e-4, 1.0), (20, 1e-3, 1.0),
    (10, 1e-3, 1 / 2), (10, 1e-3, 1 / 4), (10, 1e-3, 1 / 8), (10, 1e-3, 1 / 32), (0, 1.0, 0.0),
)]  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportResponse:
    """One response as the token view shows it; arrays of a policy that are None are not shown."""

    rollout: Rollout
    prompt: str
    tokens: Sequence[str]  # (T,) the text each token is shown with
    behaviour: TokenScores | None  # None: the tokens come from elsewhere, without logprobs
    targets: Sequence[TokenScores] = ()  # one per comparison, in the same order
    groups: Mapping[str, str] = field(default_factory=dict)

    @property
    def context_T(self) -> np.ndarray:
        """Which tokens the policy did not sample: bool."""
        mask_T = self.rollout.mask_T
        return np.zeros(len(self.tokens), bool) if mask_T is None else ~np.asarray(mask_T, bool)

    def only_comparable(self) -> Self:
        """The same without logprobs that cannot be compared: those of tokens that the policy did not sample, where a
        filling may stand, and those of a target that scored other tokens (the comparison set the response aside).
        """
        context_T, ids_T = self.context_T, self.rollout.token_ids_T
        if len(context_T) != len(self.tokens):
            raise ValueError(f"a mask has {len(context_T)} entries for a response of {len(self.tokens)} tokens")
        behaviour, nothing_T = self.behaviour, np.full(len(ids_T), np.nan, np.float32)
        other = TokenScores(token_ids_T=ids_T, logprobs_T=nothing_T)
        targets = [side if np.array_equal(side.token_ids_T, ids_T) else other for side in self.targets]
        if context_T.any():
            sampled = [np.where(context_T, nothing_T, side.logprobs_T) for side in targets]
            targets = [replace(side, logprobs_T=x_T) for side, x_T in zip(targets, sampled, strict=True)]
            if behaviour is not None:
                behaviour = replace(behaviour, logprobs_T=np.where(context_T, nothing_T, behaviour.logprobs_T))
        return replace(self, behaviour=behaviour, targets=targets)


def pack_json(value: Any) -> bytes:
    """Deflated JSON in ASCII, so that lone surrogates and U+2028 in model text survive."""
    return zlib.compress(json.dumps(value, separators=(",", ":"), allow_nan=False).encode("ascii"), 6)


def pack_tokens(responses: Sequence[ReportResponse], limit: TopLimit) -> tuple[bytes, np.ndarray]:
    """The numbers of some responses under one limit on the top lists, and the token ids in them. Policy 0 is the
    behaviour, 1 the first target.
    """
    ids_N = np.concatenate([r.rollout.token_ids_T for r in responses]).astype(np.int64)
    lengths = [len(r.tokens) for r in responses]
    views = list(zip_longest(*([r.behaviour, *r.targets] for r in responses)))
    logprobs = [_column(view, lengths, "logprobs_T", np.float32, np.nan) for view in views]
    shown_N = _most_different(logprobs, limit.share)
    lists = [_top_lists(view, lengths, limit, shown_N) for view in views]
    base = next((v for v, (top_ids_NK, _) in enumerate(lists) if (top_ids_NK >= 0).any()), 0)
    base_ids_NK, base_steps_NK = lists[base]
    columns: dict[str, np.ndarray] = {}

    def put_ids(name: str, ids: np.ndarray, index: np.ndarray) -> None:
        columns.update({f"{name}_index": index, f"{name}_id": ids[index == ESCAPE].astype(np.uint32)})

    put_ids("token", ids_N, _index_in(base_ids_NK, ids_N[:, None])[:, 0])
    for v, (top_ids_NK, steps_NK) in enumerate(lists):
        entropy_N = _column(views[v], lengths, "entropy_T", np.float64, np.nan) / ENTROPY_STEP
        entropy_N = np.nan_to_num(np.clip(np.rint(entropy_N), 0, NO_ENTROPY - 1), nan=NO_ENTROPY)
        rank_N = _column(views[v], lengths, "rank_T", np.uint32, 0)
        columns |= {f"logprob{v}": logprobs[v], f"entropy{v}": entropy_N.astype(np.uint16), f"rank{v}": rank_N}
        kept_NK = top_ids_NK >= 0
        if not kept_NK.any():
            continue
        columns[f"top{v}_count"] = kept_NK.sum(axis=1).astype(np.uint8)
        rows, ids = np.nonzero(kept_NK)[0], top_ids_NK[kept_NK]
        # A logprob is a difference from the sampled token's own, from the base's for the same id, or from 0.
        reference = np.zeros(len(ids), np.int32)
        if v == base:
            columns[f"top{v}_id"] = ids.astype(np.uint32)
        else:
            index = _index_in(base_ids_NK, top_ids_NK)[kept_NK]
            inside = index != ESCAPE
            reference[inside] = base_steps_NK[rows[inside], index[inside]]
            put_ids(f"top{v}", ids, index)
        reference = np.where(ids == ids_N[rows], _steps(logprobs[v])[rows], reference)
        columns[f"top{v}_step"] = (steps_NK[kept_NK] - reference).astype(np.int16)
    if any(r.rollout.mask_T is not None for r in responses):
        columns["context"] = np.concatenate([r.context_T for r in responses]).astype(np.uint8)
    columns = {name: values for name, values in columns.items() if len(values)}
    kinds = [[name, values.dtype.str.lstrip("<|"), len(values)] for name, values in columns.items()]
    header = {"lengths": lengths, "views": len(views), "base": base, **limit._asdict(), "columns": kinds}
    head = json.dumps(header, separators=(",", ":")).encode("ascii")
    planes = [values.view(np.uint8).reshape(len(values), -1).T.tobytes() for values in columns.values()]
    seen = np.unique(np.concatenate([ids_N, *(top_ids_NK[top_ids_NK >= 0] for top_ids_NK, _ in lists)]))
    return zlib.compress(b"".join([struct.pack("<I", len(head)), head, *planes]), 6), seen


def _column(
    views: Sequence[TokenScores | None], lengths: Sequence[int], name: str, dtype: Any, missing: float, *width: int
) -> np.ndarray:
    """One array over all responses, its lists cut to `width`; `missing` where a response or a list has no value."""
    whole = np.full((sum(lengths), *width), missing, dtype)
    for view, part in zip(views, np.split(whole, np.cumsum(lengths)[:-1]), strict=True):
        values = None if view is None else getattr(view, name)
        if values is None:
            continue
        if len(values) != len(part):
            raise ValueError(f"{name} has {len(values)} rows for a response of {len(part)} tokens")
        part[tuple(map(slice, values.shape))] = values[tuple(map(slice, part.shape))]
    return whole


def _steps(logprobs: np.ndarray) -> np.ndarray:
    """Logprobs in TOP_STEP; below -32 nats (and -inf, NaN) is the last step."""
    finite = np.nan_to_num(np.asarray(logprobs, np.float64), nan=-32.0, neginf=-32.0, posinf=0.0)
    return np.clip(np.floor(finite / TOP_STEP + 0.5), -32767, 0).astype(np.int32)


def _most_different(logprobs: Sequence[np.ndarray], share: float) -> np.ndarray:
    """Which tokens have the largest |l| under any target, or the lowest logprob where nothing is compared."""
    if share >= 1:
        return np.ones(len(logprobs[0]), bool)
    all_VN = np.nan_to_num(np.stack(logprobs).astype(np.float64), nan=0.0, neginf=-1e3)
    compared = len(all_VN) > 1 and not np.isnan(logprobs[0]).all()
    size_N = np.abs(all_VN[1:] - all_VN[0]).max(axis=0) if compared else -all_VN.min(axis=0)
    shown_N = np.zeros(len(size_N), bool)
    shown_N[np.argsort(-size_N, kind="stable")[: int(len(size_N) * share)]] = True
    return shown_N


def _top_lists(
    views: Sequence[TokenScores | None], lengths: Sequence[int], limit: TopLimit, shown_N: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Ids (-1 after a row's last kept entry) and logprobs (in TOP_STEP) of one policy's lists over a chunk."""
    widths = [v.top_ids_TK.shape[1] for v in views if v is not None and v.top_ids_TK is not None]
    width = min(max(widths, default=0), limit.k)
    ids_NK = _column(views, lengths, "top_ids_TK", np.int64, -1, width)
    logprobs_NK = _column(views, lengths, "top_logprobs_TK", np.float64, np.nan, width)
    floor = np.log(limit.min_probability) if limit.min_probability > 0 else -np.inf
    fine_NK = (ids_NK >= 0) & (logprobs_NK >= floor) & shown_N[:, None]
    return np.where(np.logical_and.accumulate(fine_NK, axis=1), ids_NK, -1), _steps(logprobs_NK)


def _index_in(lists_NK: np.ndarray, ids_NM: np.ndarray) -> np.ndarray:
    """Where each id stands in its row's kept list; ESCAPE where it does not."""
    found_NM = np.full(ids_NM.shape, ESCAPE, np.uint8)
    for j in reversed(range(lists_NK.shape[1])):
        found_NM[ids_NM == lists_NK[:, j : j + 1]] = j
    return found_NM
