"""One engine is alive at a time: whoever wants another closes the one that is there first.

Jobs of a sweep that run in one process share the slot and take turns (sweeps/turns.py), so that no engine is loaded twice.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from rl_onoff.backends.engine_config import EngineConfig
from rl_onoff.backends.registry import build

if TYPE_CHECKING:
    from rl_onoff.backends.base import BaseBackend
    from rl_onoff.tracking import Tracker

    Left = tuple[Tracker, dict[str, float]]  # a run's tracker, still open, and the numbers it found so far

log = logging.getLogger(__name__)


class NotItsTurn(BaseException):  # not an Exception: nobody but the launcher may take it for a failure
    """The engine of this round is none of the `wanted` ones, with which the job would go on."""

    def __init__(self, wanted: Collection[Any]) -> None:
        super().__init__()
        self.wanted = wanted


@dataclass(slots=True)
class Turn:
    """What the running job may do."""

    engine: Any = None  # the config of the engine that is loaded
    free: bool = True  # the engine of this round is not chosen yet
    alone: bool = False  # no other job waits, or this one does not get on: nothing is gained by putting it back

    def has(self, engines: Collection[Any]) -> bool:
        """Whether one of these engines can be had in this round."""
        return self.engine is None or self.free or self.alone or self.engine in engines


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

    def go_on(self, path: Path, engines: Collection[EngineConfig]) -> Left | None:
        """What the run in this folder left when it had to wait; None when it begins."""
        return None

    def wait(self, path: Path, left: Left) -> None:
        """Keep what a run that has to wait leaves, for `go_on`."""

    @contextmanager
    def job(self) -> Iterator[Self]:
        """The block in which a run uses the slot; the engine is freed at its end."""
        try:
            yield self
        finally:
            self.close()


class SharedSlot(Slot):
    """The slot of a sweep's jobs: what is loaded stays for the next job, and a job that wants another engine waits for its turn."""

    def __init__(self, turn: Turn) -> None:
        super().__init__()
        self._turn = turn
        self._left: dict[Path, Left] = {}  # by jobs that wait

    def get(self, config: EngineConfig) -> BaseBackend:
        """Raises NotItsTurn for another engine than this round's."""
        if not self._turn.has([config]):
            raise NotItsTurn([config])
        self._turn.free = False
        backend = super().get(config)
        self._turn.engine = config
        return backend

    def close(self) -> None:
        self._turn.engine = None
        super().close()

    def go_on(self, path: Path, engines: Collection[EngineConfig]) -> Left | None:
        """Raises NotItsTurn when none of the engines that the run may want can be had, so that nothing is begun in vain."""
        if engines and not self._turn.has(engines):
            raise NotItsTurn(engines)
        return self._left.pop(path, None)

    def wait(self, path: Path, left: Left) -> None:
        self._left[path] = left

    def end(self) -> None:
        """Free the engine, and end the trackers of jobs that still wait: the sweep was stopped."""
        self.close()
        while self._left:
            _, (tracker, _) = self._left.popitem()
            tracker.close(failed=True)

    @contextmanager
    def job(self) -> Iterator[Self]:
        """Leaves the engine alive, unless the block ends with an error: the engine may be broken."""
        try:
            yield self
        except NotItsTurn:
            raise
        except BaseException:
            self.close()
            raise
