"""How responses are drawn: two types of rl_onoff.types that are config too, and so must not need numpy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from enum import Enum
from numbers import Integral, Real
from typing import Any

from rl_onoff.errors import UsageError


class LogprobKind(Enum):
    """Which distribution a logprob was taken from. Numbers of different kinds are never compared."""

    raw = "raw"  # log_softmax of the model's logits: temperature 1, nothing cut off
    scaled = "scaled"  # after temperature
    processed = "processed"  # after temperature, top-k, top-p and min-p, renormalised: what the sampler drew from


RULES = (  # name, type, test, what a value must be, example
    ("max_new_tokens", Integral, lambda n: n >= 1, "a whole number from 1 on", 512),
    ("temperature", Real, lambda t: 0 <= t < math.inf, "a number from 0 (greedy) on", 1),
    ("top_p", Real, lambda p: 0 < p <= 1, "above 0 and at most 1 (which keeps every token)", 1),
    ("top_k", Integral, lambda k: k >= 0, "a whole number from 0 (which keeps every token) on", 0),
    ("min_p", Real, lambda p: 0 <= p <= 1, "from 0 (which keeps every token) to 1", 0),
    ("n", Integral, lambda n: n >= 1, "a whole number from 1 on", 1),
    ("stop", list | tuple, lambda texts: all(isinstance(text, str) and text for text in texts),
     "a list of non-empty strings", []),
    ("seed", Integral, lambda seed: 0 <= seed < 2**63, "a whole number from 0 to 2^63 - 1", 0),
)  # fmt: skip


def check(values: Mapping[str, Any], names: Mapping[str, str] | None = None) -> None:
    """Refuse values that nothing can sample with; `names` of a call's arguments stand in place of the options'."""
    for field_name, kind, fits, want, example in RULES:
        value = values[field_name]
        if not isinstance(value, kind) or isinstance(value, bool) or not fits(value):
            name = f"sampling.{field_name}" if names is None else names.get(field_name, field_name)
            how = "set" if names is None else "pass"
            raise UsageError(f"{name} is {value!r} but must be {want}: {how} {name}={example}")


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
        check(asdict(self))

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def truncates(self) -> bool:
        """True when top-k, top-p or min-p can give a token probability 0."""
        return not self.greedy and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)

    def replace(self, **changes: Any) -> Sampling:
        return replace(self, **changes)
