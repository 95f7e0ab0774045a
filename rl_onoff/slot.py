"""One engine is alive at a time: whoever wants another closes the one that is there first.

Jobs of a sweep that run in one process share the slot, so an engine that is wanted again is not loaded again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Self

from hydra.utils import instantiate

from rl_onoff.backends.base import BaseBackend
from rl_onoff.backends.config import EngineConfig
from rl_onoff.errors import UsageError

log = logging.getLogger(__name__)


def build(config: EngineConfig) -> BaseBackend:
    """The backend a config names, not loaded. Its `_target_` may only name a class of this package."""
    if not config._target_.startswith("rl_onoff.backends."):
        raise UsageError(f"backend._target_ is {config._target_!r} but may only name a class of rl_onoff.backends: set backend=huggingface")
    return instantiate({"_target_": config._target_}, config)


class Slot:
    """Holds the engine that is alive, if any."""

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

    @contextmanager
    def kept(self) -> Iterator[Self]:
        """Leave the engine alive at the end of the block, unless it ends with an error."""
        try:
            yield self
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
