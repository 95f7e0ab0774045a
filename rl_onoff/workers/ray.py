"""The same workers on a Ray cluster: a replica is an actor in a placement group, and may be on any node.

The engine is a child of the actor's process, not in it: what holds for a worker on this machine (`backend.python`, an
engine that crashes or kills its parent, nothing left behind) holds on a node. A node that leaves takes its replica and
the work in flight with it, no more: the pool gives that to the others and starts the replica again, where and when
there is room for one.
"""

from __future__ import annotations

import itertools
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from rl_onoff.backends.devices import VISIBLE, Place
from rl_onoff.backends.engine import Core
from rl_onoff.backends.engine_config import EngineConfig
from rl_onoff.errors import EngineDiedError, EngineError, OnOffError, UsageError
from rl_onoff.workers import wire
from rl_onoff.workers.client import RUN_AGAIN, WorkerClient
from rl_onoff.workers.pool import Pool
from rl_onoff.workers.process import WorkerProcess
from rl_onoff.workers.ray_cluster import Connection, alive_nodes, berth, described, replicas_that_fit, why_gone

log = logging.getLogger(__name__)

THREADS = 8  # of an actor: its methods wait side by side
PATIENT_SECONDS = 1.0  # of a wait for room that nobody needs to hear of
ANSWER_SECONDS = 5.0  # for an actor to answer, beside what it was asked to wait for
LINGER_SECONDS = 0.01  # for further messages, so that small ones do not travel one by one
MOST_BYTES = 16 << 20  # that one reply of an actor holds: a driver that reads slowly holds the worker back
GONE = "the Ray cluster is gone, or its head node is: run it again to go on, on a cluster that runs"


class RayPool(Pool):
    """A pool whose replicas run on the nodes of a cluster."""

    _connection: Connection | None = None

    def _clients(self) -> Sequence[WorkerClient]:
        config, number = self._config, self._config.dp_size
        self._connection = Connection.join(config.pool, (number or 1) * config.pool.cpus_per_replica)
        names = {name: getattr(config, name) for name in ("model_name", "tokenizer", "adapter")}
        paths = {name: os.path.abspath(path) for name, path in names.items() if path and os.path.exists(path)}
        there = replace(config, **paths)  # a node's working folder is another
        return [RayClient(self._class, there) for _ in range(number or replicas_that_fit(alive_nodes(), config))]

    def _close(self) -> None:
        try:
            super()._close()
        finally:
            connection, self._connection = self._connection, None
            if connection is not None:
                connection.release()


class RayClient(WorkerClient):
    """A client whose worker is started on some node."""

    def _start(self) -> RayProcess:
        return RayProcess(self._class, self._config, self.interrupt)


class RayProcess(WorkerProcess):
    """A worker's process on a node, which an actor there starts and relays."""

    channel: ActorChannel
    _actor: Any = None
    _group: Any = None  # the actor's placement group

    def __init__(self, backend_class: type[Core], config: EngineConfig, interrupt: Callable[[], None]):
        import ray.util.scheduling_strategies

        self._name, self._class, self._interrupt = config.name, backend_class, interrupt
        if not Connection.answers():
            raise EngineError(GONE)
        bundle, there = berth(alive_nodes(), config)
        # an engine on many nodes takes its GPUs from the cluster itself
        environment = {"RAY_ADDRESS": ray.get_runtime_context().gcs_address} if there is not config else {}
        what = backend_class.__module__, backend_class.__qualname__, there, environment
        reserved = dict(bundle)
        try:
            self._reserve(bundle, config.pool.wait_s)
            actor = ray.remote(Relay).options(
                num_cpus=reserved.pop("CPU"),
                num_gpus=reserved.pop("GPU", 0),
                resources=reserved,
                max_concurrency=THREADS,
                max_restarts=0,
                runtime_env=dict(config.pool.runtime_env) or None,
                scheduling_strategy=ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(self._group, 0),
            )
            self._actor = actor.remote()
            self.pid, self.python, self.log = self._started(self._actor.start.remote(*what))
        except BaseException:
            self._release()
            raise
        self.channel = ActorChannel(self._actor, self.check)

    def _ended(self) -> bool:
        return self.channel.readable(0) and not self.channel.arrived

    def wait(self, seconds: float) -> None:
        self._ask("wait", seconds, patience=seconds)

    def remember(self) -> None:
        self._ask("remember")

    def reason(self) -> str:
        if self.channel.error is None and (reason := self._ask("reason")) is not None:
            return reason
        return why_gone(self.channel.error)

    def tail(self) -> str:
        return self._ask("tail") or ""

    def close(self, patience: float) -> None:
        """Ask the worker to end, and its actor to end what is left after `patience` seconds; then end the actor."""
        if self.channel.error is None:  # else the actor is gone, and its worker ends itself
            spoken = self.deadline is None and not self.channel.torn
            self._ask("close", patience if spoken else 0.0, patience=patience)
        self.channel.close()
        self._release()

    def _ask(self, method: str, *arguments: Any, patience: float = 0.0) -> Any:
        """What a method of the process answers on its node; None where no answer comes."""
        import ray.exceptions

        with suppress(ray.exceptions.RayError):
            if Connection.answers():
                answer = self._actor.ask.remote(method, *arguments)
                if ray.wait([answer], timeout=patience + ANSWER_SECONDS)[0]:
                    return ray.get(answer)
        return None

    def _release(self) -> None:
        """End the actor, and give back what it had reserved."""
        import ray.exceptions

        actor, self._actor, group, self._group = self._actor, None, self._group, None
        if Connection.answers():  # else they are gone, or end with the connection
            with suppress(ray.exceptions.RayError):
                if actor is not None:
                    ray.kill(actor)
                if group is not None:
                    ray.util.remove_placement_group(group)

    def _started(self, reference: Any) -> tuple[int, str, Path]:
        """What the actor says of the process that it started."""
        import ray.exceptions

        try:
            while not ray.wait([reference], timeout=wire.PERIOD)[0]:
                self._interrupt()
            return ray.get(reference)
        except ray.exceptions.RayError as error:
            cause, said = getattr(error, "cause", None), str(error).strip()
            if isinstance(cause, OnOffError):
                raise cause from None
            if isinstance(error, ray.exceptions.RuntimeEnvSetupError):
                raise UsageError(f"Ray cannot set up pool.runtime_env ({said.splitlines()[0]}): change it") from error
            if isinstance(cause, ImportError) or (not cause and re.search("ModuleNotFoundError|ImportError", said)):
                what = f"{self._class.__module__} ({cause})" if cause else "rl_onoff"
                fix = "install it there, in the same version, or set pool.runtime_env"
                raise UsageError(f"the nodes of the Ray cluster cannot import {what}: {fix}") from error
            why = f"{type(cause).__name__}: {cause}" if cause else why_gone(error)
            raise EngineDiedError(f"the {self._name} engine died ({why}){RUN_AGAIN}") from error

    def _reserve(self, bundle: Mapping[str, float], wait_s: float) -> None:
        """Wait for a placement group that has been given its resources."""
        import ray

        self._group = ray.util.placement_group([dict(bundle)], strategy="STRICT_PACK")
        began, warned, needs = time.monotonic(), False, described(bundle)
        while (state := ray.util.placement_group_table(self._group).get("state")) != "CREATED":
            time.sleep(wire.PERIOD)
            self._interrupt()
            if state == "REMOVED" or not Connection.answers():
                raise EngineError(GONE)
            if not alive_nodes():
                raise EngineError("no node of the Ray cluster is alive any more: run the same command again to go on")
            waited = time.monotonic() - began
            if waited < (wait_s if warned else min(PATIENT_SECONDS, wait_s)):
                continue
            free = described(ray.available_resources())
            room = f"it has {described(ray.cluster_resources())}, of which {free} are free"
            if waited >= wait_s:
                fix = "set backend.dp_size or pool.cpus_per_replica lower, or pool.wait_s higher"
                what = f"the Ray cluster has had no room for a replica ({needs}) for {wait_s:g} s"
                raise EngineError(f"{what}; {room}: {fix}")
            warned = True
            log.warning("a replica of %s waits for room on the Ray cluster (%s); %s", self._name, needs, room)


class ActorChannel(wire.Channel):
    """Messages to and from a worker on a node, relayed by an actor.

    One `poll` is always under way: it brings the next messages while these are read, and it ends when the worker dies.
    """

    def __init__(self, actor: Any, check: Callable[[], None]):
        self._actor: Any = actor
        self._check = check
        self._numbers = itertools.count()
        self.arrived = memoryview(b"")  # not read yet
        self._poll: Any = actor.poll.remote()  # None once nothing more will come
        self.error: Exception | None = None  # why the actor is gone, if that ended it

    def readable(self, seconds: float) -> bool:
        import ray.exceptions

        if not self.arrived and self._poll is not None:
            if not ray.is_initialized():
                self._poll = None
            elif ray.wait([self._poll], timeout=seconds)[0]:
                try:
                    self.arrived = memoryview(ray.get(self._poll))
                except ray.exceptions.RayError as error:
                    self.error = error
                self._poll = self._actor.poll.remote() if self.arrived else None
        return bool(self.arrived) or self._poll is None

    def read(self, into: memoryview) -> int:
        while not self.readable(wire.PERIOD):
            self._check()
        if not self.arrived:
            raise wire.PeerGoneError
        count = min(len(into), len(self.arrived))
        into[:count] = self.arrived[:count]
        # an empty slice would keep the reply in the object store
        self.arrived = self.arrived[count:] if count < len(self.arrived) else memoryview(b"")
        return count

    def send_raw(self, data: bytes | memoryview) -> None:
        self._actor.send.remote(next(self._numbers), data if isinstance(data, bytes) else np.asarray(data))

    def close(self) -> None:
        self._actor = self._poll = None


class Relay:
    """What Ray runs on a node: starts a worker process and relays its bytes. Its methods run side by side."""

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
