"""What a check finds, and what it looks at: the sampled tokens of all responses.

Shapes: S responses, N tokens of all of them one after the other; sampled tokens alone, in the order of the responses.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from rl_onoff.errors import plural
from rl_onoff.types import Key

ARRAYS = ("lengths_S", "token_ids_N", "behaviour_N", "target_N", "positions_N")
FEW = 0.1  # rows with a fault are set aside up to this share of them; more, and the fault is the file's


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """A fault of the data: what it is, what it concerns, and what to do."""

    check: str
    what: str
    fix: str
    responses: int
    tokens: int
    example: str  # request id/sample, and the position in the response
    fatal: bool = False

    def sentence(self) -> str:
        return f"{self.what} (first in {self.example}): {self.fix}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampled:
    """The sampled tokens of S responses under two policies; `recorded` names the sides that another program wrote."""

    keys: Sequence[Key]
    lengths_S: np.ndarray
    token_ids_N: np.ndarray
    behaviour_N: np.ndarray  # float32 or float64, nats
    target_N: np.ndarray
    recorded: Collection[str] = ()
    positions_N: np.ndarray | None = None  # of each token in its response, where masks leave tokens out

    @property
    def sides(self) -> dict[str, np.ndarray]:
        return {"behaviour": self.behaviour_N, "target": self.target_N}

    @property
    def responses_N(self) -> np.ndarray:
        """The number of each token's response."""
        return np.repeat(np.arange(len(self.lengths_S)), self.lengths_S)

    @property
    def ends_S(self) -> np.ndarray:
        return np.cumsum(self.lengths_S)

    def digests(self) -> list[bytes]:
        """A hash of each response: of its ids and logprobs."""
        columns = (self.token_ids_N, self.behaviour_N, self.target_N)
        spans = zip((self.ends_S - self.lengths_S).tolist(), self.ends_S.tolist(), strict=True)
        rows = (b"".join(x[start:end].tobytes() for x in columns) for start, end in spans)
        return [hashlib.blake2b(row, digest_size=16).digest() for row in rows]

    def only(self, kept_S: np.ndarray) -> Sampled:
        """The same of some responses."""
        if kept_S.all():
            return self
        kept_N = kept_S[self.responses_N]
        return replace(
            self,
            keys=[key for key, kept in zip(self.keys, kept_S, strict=True) if kept],
            lengths_S=self.lengths_S[kept_S],
            **{name: getattr(self, name)[kept_N] for name in ("token_ids_N", "behaviour_N", "target_N")},
            positions_N=None if self.positions_N is None else self.positions_N[kept_N],
        )

    @classmethod
    def joined(cls, parts: Sequence[Sampled]) -> Sampled:
        """The responses of all parts."""
        if len(parts) == 1:
            return parts[0]
        keys = [key for part in parts for key in part.keys]
        columns = {name: [getattr(part, name) for part in parts] for name in ARRAYS}
        known = {name: np.concatenate(each) for name, each in columns.items() if each[0] is not None}
        return replace(parts[0], keys=keys, **known)

    def finding(self, check: str, bad_N: np.ndarray, what: str, fix: str, *, fatal: bool = False) -> Found:
        """A finding about the tokens in `bad_N`, which says how many they are; None where there is none."""
        if not bad_N.any():
            return None
        bad_S = np.bincount(self.responses_N, weights=bad_N, minlength=len(self.lengths_S)) > 0
        n, responses, tokens = int(bad_N.argmax()), int(bad_S.sum()), int(bad_N.sum())
        s = int(self.responses_N[n])
        position = n - int(self.ends_S[s] - self.lengths_S[s]) if self.positions_N is None else self.positions_N[n]
        what = counted(what, tokens, responses, len(bad_S))
        example = "{}/{}".format(*self.keys[s]) + f" at token {position}"
        told: dict[str, Any] = {"check": check, "what": what, "fix": fix, "example": example}
        fatal = fatal or is_many(responses, len(bad_S))
        return Finding(**told, responses=responses, tokens=tokens, fatal=fatal), bad_S


def counted(what: str, tokens: int, responses: int, of: int) -> str:
    return f"{what}: {plural(tokens, 'token')} of {responses:,} of {plural(of, 'response')}"


def is_many(responses: int, of: int) -> bool:
    """Whether so many responses have a fault that it is the file's."""
    return responses == of or responses > max(1, FEW * of)


Found = tuple[Finding, np.ndarray] | None
"""A finding, and which responses it concerns: (S,)."""
