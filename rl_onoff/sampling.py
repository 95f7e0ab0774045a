"""How responses are drawn: two types of rl_onoff.types that are config too, and so must not need numpy."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

from rl_onoff.errors import UsageError


class LogprobKind(Enum):
    """Which distribution a logprob was taken from. Numbers of different kinds are never compared."""

    raw = "raw"  # log_softmax of the model's logits: temperature 1, nothing cut off
    scaled = "scaled"  # after temperature
    processed = "processed"  # after temperature, top-k, top-p and min-p, renormalised: what the sampler drew from


@dataclass(kw_only=True, slots=True)
class Sampling:
    """How responses are drawn; the same values mean the same on every engine. Also the `sampling` config group."""

    max_new_tokens: int = 512
    """Most tokens a response may have."""
    temperature: float = 1.0
    """Divides the logits before sampling; 0 is greedy decoding."""
    top_p: float = 1.0
    """Keep the fewest tokens whose probability reaches top_p; 1 keeps all."""
    top_k: int = 0
    """Keep the top_k most likely tokens; 0 keeps all."""
    min_p: float = 0.0
    """Keep tokens at least min_p times as likely as the likeliest one; 0 keeps all."""
    n: int = 1
    """Responses per prompt."""
    stop: list[str] = field(default_factory=list)
    """Strings that end a response; the text is cut before the first of them, the token ids keep what was sampled."""
    seed: int = 0
    """Seed of all sampling; a response depends on (model, prompt, sampling, seed, sample index) alone in float32, but
    for rare flips: at most 8 per million draws measured (SmolLM2 on a CPU); in 16 bits also on rounding, which differs
    with the batch."""

    def __post_init__(self) -> None:
        checks = (
            (self.max_new_tokens >= 1, "max_new_tokens", "at least 1", 512),
            (0 <= self.temperature < math.inf, "temperature", "a number from 0 (greedy) on", 1),
            (0 < self.top_p <= 1, "top_p", "above 0 and at most 1 (which keeps every token)", 1),
            (self.top_k >= 0, "top_k", "0 (which keeps every token) or larger", 0),
            (0 <= self.min_p <= 1, "min_p", "from 0 (which keeps every token) to 1", 0),
            (self.n >= 1, "n", "at least 1", 1),
            (all(self.stop), "stop", "a list of strings, none of them empty", "[]"),
            (0 <= self.seed < 2**63, "seed", "from 0 to 2^63 - 1", 0),
        )
        for fine, name, want, example in checks:
            if not fine:
                value = getattr(self, name)
                raise UsageError(f"sampling.{name} is {value!r} but must be {want}: set sampling.{name}={example}")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def truncates(self) -> bool:
        """True when top-k, top-p or min-p can give a token probability 0."""
        return not self.greedy and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)

    def replace(self, **changes: Any) -> Sampling:
        return replace(self, **changes)
