"""Options of the SGLang backend."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Self

from rl_onoff.backends.engine_config import EngineConfig
from rl_onoff.errors import UsageError, at_least


@dataclass(kw_only=True, slots=True)
class SGLangBackendConfig(EngineConfig):
    """SGLang, in a process of its own."""

    name: ClassVar[str] = "sglang"
    _target_: str = "rl_onoff.backends.sglang.SGLangBackend"
    mem_fraction_static: float | None = None
    """Fraction of memory for weights and cache, 0 to 1; null is 0.85."""
    context_length: int | None = None
    """Longest sequence in tokens; null is the model's own."""
    in_engine_stats: bool = True
    """Compute token statistics inside the engine; false takes them through the engine's public API, slowly."""
    owned_kwargs: ClassVar[tuple[str, ...]] = (
        "model_path=model.name", "tokenizer_path=model.tokenizer", "dtype", "tp_size", "dp_size", "mem_fraction_static",
        "context_length",
        "random_seed=backend.seed", "revision=model.revision", "trust_remote_code=model.trust_remote_code",
    )  # fmt: skip

    def __post_init__(self) -> None:
        EngineConfig.__post_init__(self)
        at_least(1, "backend.context_length", self.context_length, "4096, or null for the model's own")
        if self.mem_fraction_static is not None and not 0 < self.mem_fraction_static <= 1:
            raise UsageError(
                f"backend.mem_fraction_static is {self.mem_fraction_static} but must be above 0 and at most 1: "
                "set backend.mem_fraction_static=0.85"
            )

    def with_float32_head(self) -> Self:
        return dataclasses.replace(self, engine_kwargs={**self.engine_kwargs, "enable_fp32_lm_head": True})
