"""The same workers on a Ray cluster: a replica is an actor in a placement group, and may be on any node.

A node that leaves takes its replica and the work in flight with it, no more: the pool gives that to the others and
starts the replica again, where and when there is room for one.
"""

from __future__ import annotations

import itertools
import logging
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from rl_onoff.backends.engine import Core
from rl_onoff.backends.engine_config import EngineConfig
from rl_onoff.errors import EngineDiedError, EngineError, OnOffError, UsageError
from rl_onoff.workers import wire
from rl_onoff.workers.client import WorkerClient
from rl_onoff.workers.ray_actor import Relay, Started
from rl_onoff.workers.ray_cluster import Berth, Connection, alive_nodes, answers, berth, replicas_that_fit, room

log = logging.getLogger(__name__)

THREADS = 8  # of an actor: its methods wait side by side
PATIENT_SECONDS = 1.0  # of a wait for room that nobody needs to hear of
ANSWER_SECONDS = 5.0  # for an actor to answer, beside what it was asked to wait for
GONE = "the Ray cluster is gone, or its head node is: run it again to go on, on a cluster that runs"
NO_NODE = "no node of the Ray cluster is alive any more: run the same command again to go on"


class RayCluster:
    """Where the replicas of a pool run: the nodes of a cluster."""

    def __init__(self, backend_class: type[Core], config: EngineConfig, log_folder: Path | str | None = None):
        self._class, self._log_folder = backend_class, log_folder
        self._config = replace(
            config, model_name=_findable(config.model_name), tokenizer=config.tokenizer and _findable(config.tokenizer)
        )
        self._connection: Connection | None = None

    def clients(self) -> list[WorkerClient]:
        """Join the cluster; a client for each replica, not loaded."""
        pool = self._config.pool
        self._connection = Connection.join_cluster(pool, (self._config.dp_size or 1) * pool.cpus_per_replica)
        number = self._config.dp_size or replicas_that_fit(alive_nodes(), self._config)
        address = self._connection.address if self._connection else None
        return [RayClient(self._class, self._config, self._log_folder, address=address) for _ in range(number)]

    def close(self) -> None:
        """Leave the cluster, once the clients are closed."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.release()


class RayClient(WorkerClient):
    """A client whose worker is started on some node."""

    def __init__(self, *args: Any, address: str | None):
        super().__init__(*args)
        self._address = address

    def _start(self) -> RayProcess:
        folder = str(self._log_folder) if self._log_folder is not None else None
        return RayProcess(self._class, self._config, folder, self._address, self.interrupt)


class RayProcess:
    """A worker's process on a node, which an actor there starts and relays."""

    def __init__(
        self,
        backend_class: type[Core],
        config: EngineConfig,
        log_folder: str | None,
        address: str | None,  # HOST:PORT of the cluster's head; None: not known
        interrupt: Callable[[], None],  # called now and then while waiting; may raise
    ):
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        self._config, self._address, self._interrupt = config, address, interrupt
        self.deadline: float | None = None
        self._group: Any = None
        self._actor: Any = None
        if not self._connected():
            raise EngineError(GONE)
        place = berth(alive_nodes(), config)
        self.config = place.config
        environment = {"RAY_ADDRESS": ray.get_runtime_context().gcs_address} if place.across_nodes else {}
        target = f"{backend_class.__module__}:{backend_class.__qualname__}"
        try:
            self._reserve(place)
            options = {
                "num_cpus": place.bundle["CPU"],
                "num_gpus": place.bundle.get("GPU", 0),
                "resources": {name: part for name, part in place.bundle.items() if name not in ("CPU", "GPU")},
                "max_concurrency": THREADS,
                "max_restarts": 0,
                "runtime_env": dict(config.pool.runtime_env) or None,
                "scheduling_strategy": PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=0),
            }
            self._actor = ray.remote(Relay).options(**options).remote(target, self.config, log_folder, environment)
            started = self._started(self._actor.start.remote())
        except BaseException:
            self._release()
            raise
        self.pid, self.python, self.log = started.pid, started.python, started.log
        self.channel = ActorChannel(self._actor, self.check)

    def check(self) -> None:
        """Raise PeerGoneError when the process or its actor is gone, or has not spoken in time."""
        late = self.deadline is not None and time.monotonic() > self.deadline
        if late or self.channel.ended:
            raise wire.PeerGoneError

    def wait(self, seconds: float) -> None:
        self._ask("wait", seconds, patience=seconds)

    def remember(self) -> None:
        self._ask("remember")

    def reason(self) -> str:
        """Why the process is gone, for people."""
        if self.channel.error is None and (reason := self._ask("reason")) is not None:
            return reason
        return _why_gone(self.channel.error)

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
        import ray
        from ray.exceptions import RayError

        with suppress(RayError):
            if self._connected():
                answer = self._actor.ask.remote(method, *arguments)
                if ray.wait([answer], timeout=patience + ANSWER_SECONDS)[0]:
                    return ray.get(answer)
        return None

    def _release(self) -> None:
        """End the actor, and give back what it had reserved."""
        import ray
        from ray.exceptions import RayError

        actor, group = self._actor, self._group
        self._actor = self._group = None
        if self._connected():  # else they are gone, or end with the connection
            with suppress(RayError):
                if actor is not None:
                    ray.kill(actor)
                if group is not None:
                    ray.util.remove_placement_group(group)

    def _connected(self) -> bool:
        """Whether the cluster's head is there: without it Ray waits a minute in most calls, then ends this process."""
        import ray

        return ray.is_initialized() and (self._address is None or answers(self._address))

    def _started(self, reference: Any) -> Started:
        """What the actor says of the process that it started."""
        import ray
        from ray.exceptions import RayError, RayTaskError, RuntimeEnvSetupError

        try:
            while not ray.wait([reference], timeout=wire.PERIOD)[0]:
                self._interrupt()
            return ray.get(reference)
        except RuntimeEnvSetupError as error:
            raise UsageError(f"Ray cannot set up pool.runtime_env ({_first_line(error)}): change it") from error
        except RayTaskError as error:
            if isinstance(error.cause, OnOffError):
                raise error.cause from None
            raise EngineError(f"a worker on the Ray cluster failed ({_first_line(error.cause)})") from error
        except RayError as error:
            if "ModuleNotFoundError" in str(error) or "ImportError" in str(error):
                raise UsageError(
                    "the nodes of the Ray cluster cannot import rl_onoff: install it there, in the same version, or "
                    "set pool.runtime_env"
                ) from error
            raise EngineDiedError(
                f"the {self._config.name} engine died ({_why_gone(error)}): run it again to go on"
            ) from error

    def _reserve(self, place: Berth) -> None:
        """Wait for a placement group that has been given its resources."""
        import ray

        self._group = ray.util.placement_group([dict(place.bundle)], strategy="STRICT_PACK")
        began, warned, wait_s = time.monotonic(), False, self._config.pool.wait_s
        while (state := ray.util.placement_group_table(self._group).get("state")) != "CREATED":
            time.sleep(wire.PERIOD)
            self._interrupt()
            if state == "REMOVED" or not self._connected():
                raise EngineError(GONE)
            if not alive_nodes():
                raise EngineError(NO_NODE)
            waited = time.monotonic() - began
            if waited >= wait_s:
                raise EngineError(
                    f"the Ray cluster has had no room for a replica ({place}) for {wait_s:g} s; {room()}: set "
                    "backend.dp_size or pool.cpus_per_replica lower, or pool.wait_s higher"
                )
            if not warned and waited >= PATIENT_SECONDS:
                warned = True
                name = self._config.name
                log.warning("a replica of %s waits for room on the Ray cluster (%s); %s", name, place, room())


class ActorChannel(wire.Channel):
    """Messages to and from a worker on a node, relayed by an actor.

    One `poll` is always under way: it brings the next messages while these are read, and it ends when the worker dies.
    """

    def __init__(self, actor: Any, check: Callable[[], None]):
        super().__init__(check)
        self._actor: Any = actor
        self._numbers = itertools.count()
        self._arrived = memoryview(b"")  # not read yet
        self._poll: Any = actor.poll.remote()  # None once nothing more will come
        self.error: Exception | None = None  # why the actor is gone, if that ended it

    @property
    def ended(self) -> bool:
        """Whether the worker is gone and all that it sent was read."""
        return self.readable(0) and not self._arrived

    def readable(self, seconds: float) -> bool:
        import ray
        from ray.exceptions import RayError

        if not self._arrived and self._poll is not None:
            if not ray.is_initialized():
                self._poll = None
            elif ray.wait([self._poll], timeout=seconds)[0]:
                try:
                    self._arrived = memoryview(ray.get(self._poll))
                except RayError as error:
                    self.error = error
                self._poll = self._actor.poll.remote() if self._arrived else None
        return bool(self._arrived) or self._poll is None

    def receive_raw(self, size: int) -> memoryview:
        data = view = np.empty(size, np.uint8).data
        while view:
            while not self.readable(wire.PERIOD):
                self._check()
            if not self._arrived:
                raise wire.PeerGoneError
            count = min(len(view), len(self._arrived))
            view[:count] = self._arrived[:count]
            view, self._arrived = view[count:], self._arrived[count:]
        if not self._arrived:
            self._arrived = memoryview(b"")  # an empty slice would keep the reply in the object store
        return data

    def send_raw(self, data: bytes | memoryview) -> None:
        self._actor.send.remote(next(self._numbers), data if isinstance(data, bytes) else np.asarray(data))

    def close(self) -> None:
        self._actor = self._poll = None


def _why_gone(error: Exception | None) -> str:
    from ray.exceptions import OutOfMemoryError

    if isinstance(error, OutOfMemoryError):
        return "Ray ended it, for its node was short of memory"
    if "node has died" in str(error):
        return "its node left the Ray cluster"
    return f"its actor is gone: {type(error).__name__}" if error else "its actor does not answer"


def _findable(name: str) -> str:
    """A local path in full: a node's working folder is another."""
    return os.path.abspath(name) if os.path.exists(name) else name


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
