"""Options of the fake backend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from rl_onoff.backends.engine_config import DTYPES, EngineConfig, Switch


@dataclass(kw_only=True, slots=True)
class FakeBackendConfig(EngineConfig):
    """A tiny deterministic language model in numpy, for tests and for trying the runner without an engine."""

    name: ClassVar[str] = "fake"
    device: ClassVar[str] = "cpu"
    reference: ClassVar[str] = "fake"
    inexact: ClassVar[tuple[str, ...]] = ("engine_kwargs", "noise", "rounding")
    switches: ClassVar[tuple[Switch, ...]] = (
        Switch("rounding", "logits that are not rounded", {"rounding": 0.0}, "set"),
        Switch("seed", "another seed, which nothing depends on", {"seed": 1}),
    )
    dtypes: ClassVar[tuple[str, ...]] = (*DTYPES, "float64")
    _target_: str = "rl_onoff.backends.fake.FakeBackend"
    noise: float = 0.0
    """Standard deviation of noise added to the logits, as a stand-in for another policy."""
    rounding: float = 0.0
    """Steps that the logits are rounded to, as a stand-in for low precision; 0 rounds nothing."""
