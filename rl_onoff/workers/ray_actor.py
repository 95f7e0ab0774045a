"""Both ends of the way between a driver and a worker on another node, and the actor there that starts the worker."""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from rl_onoff.backends.engine_config import EngineConfig
from rl_onoff.backends.placement import VISIBLE, Place
from rl_onoff.workers import wire
from rl_onoff.workers.process import WorkerProcess

LINGER_SECONDS = 0.01  # for further messages, so that small ones do not travel one by one
MOST_BYTES = 16 << 20  # that one reply of an actor holds: a driver that reads slowly holds the worker back


class ActorChannel(wire.Channel):
    """Messages to and from a worker on a node, relayed by an actor.

    One `poll` is always under way: it brings the next messages while these are read, and it ends when the worker dies.
    """

    def __init__(self, actor: Any, check: Callable[[], None]):
        self._actor: Any = actor
        self._check = check
        self._numbers = itertools.count()
        self._arrived = memoryview(b"")  # not read yet
        self._poll: Any = actor.poll.remote()  # None once nothing more will come
        self.error: Exception | None = None  # why the actor is gone, if that ended it

    @property
    def ended(self) -> bool:
        """Whether the worker is gone and all that it sent was read."""
        return self.readable(0) and not self._arrived

    def readable(self, seconds: float) -> bool:
        import ray.exceptions

        if not self._arrived and self._poll is not None:
            if not ray.is_initialized():
                self._poll = None
            elif ray.wait([self._poll], timeout=seconds)[0]:
                try:
                    self._arrived = memoryview(ray.get(self._poll))
                except ray.exceptions.RayError as error:
                    self.error = error
                self._poll = self._actor.poll.remote() if self._arrived else None
        return bool(self._arrived) or self._poll is None

    def read(self, into: memoryview) -> int:
        while not self.readable(wire.PERIOD):
            self._check()
        if not self._arrived:
            raise wire.PeerGoneError
        count = min(len(into), len(self._arrived))
        into[:count] = self._arrived[:count]
        # an empty slice would keep the reply in the object store
        self._arrived = self._arrived[count:] if count < len(self._arrived) else memoryview(b"")
        return count

    def send_raw(self, data: bytes | memoryview) -> None:
        self._actor.send.remote(next(self._numbers), data if isinstance(data, bytes) else np.asarray(data))

    def close(self) -> None:
        self._actor = self._poll = None


class Relay:
    """What Ray runs on a node: starts a worker process and relays bytes between it and the driver. Its methods may run
    side by side, each in a thread."""

    def __init__(self) -> None:
        self._process: WorkerProcess
        self._sending = threading.Lock()
        self._early: dict[int, Any] = {}  # by number: what overtook something that is to be sent before it
        self._next = 0  # the number of what is to be sent next

    def start(
        self, module: str, name: str, config: EngineConfig, environment: Mapping[str, str]
    ) -> tuple[int, str, Path]:
        """Start the worker process; returns its id, its interpreter and where its log is."""
        if environment and not os.environ.get(VISIBLE):
            # Ray hides the GPUs from an actor that reserves none, but an engine on many nodes looks at them
            os.environ.pop(VISIBLE, None)
        self._process = WorkerProcess(getattr(import_module(module), name), config, Place(environment))
        return self._process.pid, self._process.python, self._process.log

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
