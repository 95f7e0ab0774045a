"""An engine that lives outside rl_onoff: its options. `_target_` names the backend, which is imported when it is
built."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from rl_onoff.backends import EngineConfig


@dataclass(kw_only=True, slots=True)
class UniformConfig(EngineConfig):
    """Every byte is as likely as any other, but for one."""

    name: ClassVar[str] = "uniform"
    _target_: str = "uniform_engine.backend.UniformBackend"
    bias: float = 0.0
    """Added to the logit of byte 0."""
