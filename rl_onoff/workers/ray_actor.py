"""The actor's side of a pool on Ray: starts a worker process on its node, and relays bytes between it and the driver.

The engine is a child of the actor's process, not in it: what holds for a worker on this machine (`backend.python`, an
engine that crashes or kills its parent, nothing left behind) holds on a node.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from rl_onoff.backends.engine_config import EngineConfig
from rl_onoff.errors import UsageError
from rl_onoff.workers import wire
from rl_onoff.workers.devices import VISIBLE, Place
from rl_onoff.workers.process import WorkerProcess

LINGER_SECONDS = 0.01  # for further messages, so that small ones do not travel one by one
MOST_BYTES = 16 << 20  # that one reply holds: a driver that reads slowly holds the worker back


@dataclass(frozen=True, kw_only=True, slots=True)
class Started:
    """What the driver knows of a worker process on another machine."""

    pid: int
    python: str
    log: Path


class Relay:
    """What Ray runs on a node. Its methods may run side by side, each in a thread."""

    def __init__(
        self, target: str, config: EngineConfig, log_folder: Path | str | None, environment: Mapping[str, str]
    ):
        self._target, self._config, self._log_folder, self._environment = target, config, log_folder, environment
        self._process: WorkerProcess
        self._sending = threading.Lock()
        self._early: dict[int, Any] = {}  # by number: what overtook something that is to be sent before it
        self._next = 0  # the number of what is to be sent next

    def start(self) -> Started:
        """Start the worker process."""
        module, _, name = self._target.partition(":")
        try:
            backend_class = getattr(import_module(module), name)
        except ImportError as error:
            raise UsageError(
                f"the nodes of the Ray cluster cannot import {module} ({error}): install it there, or set "
                "pool.runtime_env"
            ) from error
        if self._environment and not os.environ.get(VISIBLE):
            # Ray hides the GPUs from an actor that reserves none, but an engine on many nodes looks at them
            os.environ.pop(VISIBLE, None)
        place = Place(environment=self._environment)
        self._process = WorkerProcess(backend_class, self._config, self._log_folder, place)
        return Started(pid=self._process.pid, python=self._process.python, log=self._process.log)

    def poll(self) -> np.ndarray:
        """The bytes that the worker sent since the previous call; waits for some. Empty: the worker is gone."""
        channel, data, size = self._process.channel, np.empty(MOST_BYTES, np.uint8), 0
        with suppress(wire.PeerGoneError):
            while not channel.readable(wire.PERIOD):
                self._process.check()
            until = time.monotonic() + LINGER_SECONDS
            while size < MOST_BYTES and channel.readable(max(0.0, until - time.monotonic())):
                size += channel.read(data.data[size:])
                if time.monotonic() > until:
                    break
        return data[:size]

    def send(self, number: int, data: Any) -> None:
        """Send bytes to the worker, in the order of their numbers: Ray's calls of methods overtake each other."""
        with self._sending:
            self._early[number] = data
            while (data := self._early.pop(self._next, None)) is not None:
                self._next += 1
                with suppress(wire.PeerGoneError):  # `poll` tells
                    self._process.channel.send_raw(data)

    def ask(self, method: str, *arguments: Any) -> Any:
        """The answer of one of the process's own methods."""
        return getattr(self._process, method)(*arguments)
