"""What a request asks of the hooks inside SGLang: carried in its id, the one thing that SGLang hands through untouched."""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict, dataclass
from functools import lru_cache

from rl_onoff.types import Sampling, Want

INFO = "rl_onoff"  # key of what the hooks send back in meta_info
PREFIX = "rl_onoff"

_numbers = itertools.count()


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One request's order: a response to be drawn, or one to be scored."""

    prompt_len: int
    seed: int | None = None  # to generate: the seed of the response
    num_tokens: int = 0  # to score: how many tokens the response has
    top_k: int = 0
    sampler: Sampling | None = None
    logits_file: str | None = None  # where to write the full logits: float32 (T, V)

    def rid(self) -> str:
        """A new request id. None is the beginning of another: SGLang aborts by prefix."""
        values = {name: value for name, value in asdict(self).items() if value is not None}
        return f"{PREFIX} {next(_numbers):012d} {json.dumps(values)}"

    @staticmethod
    @lru_cache(maxsize=8192)
    def of(rid: str) -> Job | None:
        """The job in a request's id; None for a request that is not ours."""
        if not rid.startswith(PREFIX + " "):
            return None
        values = json.loads(rid.split(" ", 2)[2])
        if "sampler" in values:
            values["sampler"] = Sampling(**values["sampler"])
        return Job(**values)

    @property
    def want(self) -> Want:
        return Want(top_k=self.top_k, sampler=self.sampler)
