"""One engine is alive at a time: whoever wants another closes the one that is there first.

A run says before each step which engine the step uses, so that a sweep's jobs can share a slot (sweeps/schedule.py).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Generator
from typing import TYPE_CHECKING, Any, Final, Self

from rl_onoff.backends.engine_config import EngineConfig
from rl_onoff.backends.registry import build

if TYPE_CHECKING:
    from rl_onoff.backends.base import BaseBackend

log = logging.getLogger(__name__)

ANY: Final = "any engine"  # wanted by a step that finds out only as it goes which engines it loads

Wish = EngineConfig | str | None  # an engine, ANY, or None for a step that loads nothing
Steps = Generator[Wish, None, Any]  # yields, before each step, what the step wants of the slot


class Slot:
    """Holds the engine that is alive, if any; leaving the `with` block frees it."""

    def __init__(self) -> None:
        self._backend: BaseBackend | None = None

    def get(self, config: EngineConfig) -> BaseBackend:
        """The loaded engine of this config; the one alive before, if another, is closed first."""
        if self._backend is not None and self._backend.config == config:
            return self._backend
        self.close()
        backend = build(config)
        log.info("loading %s with %s", config.name, config.model_name)
        start = time.monotonic()
        backend.load()
        info, seconds = backend.info, time.monotonic() - start
        log.info("%s %s ready in %.0f s (%s weights)", info.engine, info.version, seconds, info.dtype)
        self._backend = backend
        return backend

    def close(self) -> None:
        """Free the engine."""
        backend, self._backend = self._backend, None
        if backend is not None:
            backend.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
