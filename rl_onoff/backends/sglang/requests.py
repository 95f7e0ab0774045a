"""Requests to SGLang: what each asks of the hooks inside it, and what came back."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import msgspec

from rl_onoff.errors import EngineError
from rl_onoff.types import Want

INFO = "rl_onoff"  # key of what the hooks send back in meta_info
PREFIX = "rl_onoff "

_numbers = itertools.count()


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One request's order: a response to be drawn, or one to be scored. Carried in the request's id, the one thing that
    SGLang hands through untouched."""

    prompt_len: int
    seed: int | None = None  # to generate: the seed of the response
    num_tokens: int = 0  # to score: how many tokens the response has
    want: Want | None = None  # to score
    logits_file: str | None = None  # where to write the full logits: float32 (T, V)

    def rid(self) -> str:
        """A new request id. None is the beginning of another: SGLang aborts by prefix."""
        return f"{PREFIX}{next(_numbers):012d} {msgspec.json.encode(self).decode()}"

    @staticmethod
    @lru_cache(maxsize=8192)
    def of(rid: str) -> Job | None:
        """The job in a request's id; None for a request that is not ours."""
        return msgspec.json.decode(rid.split(" ", 2)[2], type=Job) if rid.startswith(PREFIX) else None


def check(meta: dict[str, Any]) -> None:
    """Raise for a request that SGLang gave up, or that our code inside it failed on."""
    reason = meta.get("finish_reason") or {}
    if reason.get("type") == "abort":
        raise EngineError(f"SGLang gave a request up: {reason.get('message')}")
    if reason.get("matched") == "NaN happened":
        raise EngineError(
            "the model's logits are not numbers (SGLang: NaN happened): set backend.dtype=float32 or another model"
        )
    for info in meta.get(INFO) or ():
        if info and (error := info.get("error") or info.get("sampler_error")):
            fix = "set backend.in_engine_stats=false" if "error" in info else "report it with the worker's log"
            raise EngineError(f"our code inside SGLang failed ({error.strip().splitlines()[-1]}): {fix}")
