"""The same workers on a Ray cluster: a replica is an actor in a placement group, and may be on any node.

A node that leaves takes its replica and the work in flight with it, no more: the pool gives that to the others and starts the
replica again, where and when there is room for one.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rl_onoff.backends.engine import Core, EngineInfo, Supply
from rl_onoff.backends.engine_config import EngineConfig
from rl_onoff.errors import EngineDiedError, EngineError, OnOffError, UsageError
from rl_onoff.types import Completion, Request, Response, TokenScores, Want
from rl_onoff.workers.arrow import batch_of, items_of
from rl_onoff.workers.client import CLOSE_SECONDS, PERIOD, Key, death
from rl_onoff.workers.process import LOG_FOLDER
from rl_onoff.workers.ray_actor import Reply, Worker
from rl_onoff.workers.ray_cluster import Berth, Connection, alive_nodes, answers, berth, described, replicas_that_fit
from rl_onoff.workers.refill import Refill

if TYPE_CHECKING:
    from pyarrow import RecordBatch

log = logging.getLogger(__name__)

THREADS = 8  # of an actor: its methods wait side by side
PATIENT_SECONDS = 1.0  # of a wait for room that nobody needs to hear of
GRACE_SECONDS = CLOSE_SECONDS + 5  # for an actor to close its engine
GONE = "the Ray cluster is gone, or its head node is: run it again to go on, on a cluster that runs"
NO_NODE = "no node of the Ray cluster is alive any more: run the same command again to go on"


class RayCluster:
    """A pool's site: hosts on the nodes of a cluster."""

    def __init__(self, backend_class: type[Core], config: EngineConfig, log_folder: Path | str | None = None):
        self._class, self._log_folder = backend_class, log_folder
        self._config = replace(
            config, model_name=_findable(config.model_name), tokenizer=config.tokenizer and _findable(config.tokenizer)
        )
        self._connection: Connection | None = None

    def hosts(self) -> list[RayHost]:
        pool = self._config.pool
        self._connection = Connection.join_cluster(pool, (self._config.dp_size or 1) * pool.cpus_per_replica)
        number = self._config.dp_size or replicas_that_fit(alive_nodes(), self._config)
        address = self._connection.address if self._connection else None
        return [RayHost(self._class, self._config, self._log_folder, address) for _ in range(number)]

    def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.release()


class RayHost:
    """Runs one backend in a worker process on some node. One call at a time, read to its end or closed before the next."""

    def __init__(
        self,
        backend_class: type[Core],
        config: EngineConfig,
        log_folder: Path | str | None = None,
        address: str | None = None,
    ):
        self._class, self._config, self._address = backend_class, config, address
        self._log_folder = str(log_folder) if log_folder is not None else os.environ.get(LOG_FOLDER)
        self.interrupt: Callable[[], None] = lambda: None  # called now and then while waiting; may raise
        self._group: Any = None
        self._actor: Any = None
        self._watch: Any = None  # a reference that is there once the worker or its actor is gone
        self._pid: int | None = None
        self._call = 0  # the number of the latest call

    @property
    def pid(self) -> int | None:
        """The worker's process id on its node, None when it is not running."""
        return self._pid

    @property
    def is_alive(self) -> bool:
        import ray

        return self._watch is not None and ray.is_initialized() and not ray.wait([self._watch], timeout=0)[0]

    # -- the core ------------------------------------------------------------------------------------------------------

    def _load(self) -> EngineInfo:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        if not self._connected():
            raise EngineError(GONE)
        place = berth(alive_nodes(), self._config)
        environment = {"RAY_ADDRESS": ray.get_runtime_context().gcs_address} if place.across_nodes else None
        resources = {name: amount for name, amount in place.bundle.items() if name not in ("CPU", "GPU")}
        try:
            self._group = self._placed(place)
            self._actor = (
                ray.remote(Worker)
                .options(
                    num_cpus=place.bundle["CPU"],
                    num_gpus=place.bundle.get("GPU", 0),
                    resources=resources,
                    max_concurrency=THREADS,
                    max_restarts=0,
                    runtime_env=dict(self._config.pool.runtime_env) or None,
                    scheduling_strategy=PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=0),
                )
                .remote(
                    f"{self._class.__module__}:{self._class.__qualname__}", place.config, self._log_folder, environment
                )
            )
            reply = self._reply(self._actor.load.remote(), set())
            if reply.failure is not None:
                raise reply.failure.exception()
        except BaseException:
            self._close()
            raise
        assert reply.info is not None
        self._pid = reply.pid
        self._watch = self._actor.watch.remote()
        return reply.info

    def _generate(self, requests: Sequence[Request]) -> Iterator[Completion]:
        yield from self._stream(
            batch_of(requests), None, {(r.id, sample) for r in requests for sample in r.sample_indices}
        )

    def _generate_from(self, supply: Supply, room: int = 1 << 30) -> Iterator[Completion]:
        """Sample what the supply gives while it gives; at most `room` draws are with the worker at a time."""
        refill = Refill(supply, room)
        requests, last = refill.take()
        if not last:
            yield from self._stream(batch_of(requests), None, refill.keys, refill)

    def _score(self, responses: Sequence[Response], want: Want) -> Iterator[TokenScores]:
        yield from self._stream(batch_of(responses), want, {response.key for response in responses})

    def _close(self) -> None:
        import ray
        from ray.exceptions import RayError

        actor, group, alive = self._actor, self._group, self._watch is not None and self.is_alive
        self._actor = self._group = self._watch = self._pid = None
        if not self._connected():
            return  # they are gone, or end with the connection
        with suppress(RayError):
            if actor is not None:
                if alive:
                    ray.wait([actor.close.remote()], timeout=GRACE_SECONDS)
                ray.kill(actor)
            if group is not None:
                ray.util.remove_placement_group(group)

    def _connected(self) -> bool:
        """Whether the cluster's head is there: without it Ray waits for a minute in most calls, then ends this process."""
        import ray

        return ray.is_initialized() and (self._address is None or answers(self._address))

    # -- calls ---------------------------------------------------------------------------------------------------------

    def _stream(
        self, batch: RecordBatch, want: Want | None, keys: set[Key], refill: Refill | None = None
    ) -> Iterator[Any]:
        actor = self._actor
        if actor is None:
            raise EngineDiedError(f"the {self._config.name} engine is not running: load the backend again")
        call = self._call = self._call + 1
        reply, waiting = Reply(), actor.begin.remote(call, batch, want, refill is None)
        try:
            while not reply.ended:
                reply = self._reply(waiting, keys)
                results = items_of(reply.batch) if reply.batch is not None else []
                keys.difference_update(item.key for item in results)
                ahead = not reply.ended and (
                    refill is None or bool(keys)
                )  # with no more to give, it would wait before it yields
                if ahead:
                    waiting = actor.next.remote(
                        call, *_more(refill)
                    )  # the next results are on their way while these are read
                yield from results
                if not (ahead or reply.ended):
                    waiting = actor.next.remote(call, *_more(refill))
        finally:
            if not reply.ended and self._actor is actor:
                actor.cancel.remote(call)
        if reply.failure is not None:
            error = reply.failure.exception()
            if isinstance(error, EngineDiedError):
                error.in_flight = tuple(sorted(keys))
                self._watch = None
            raise error
        assert not keys, f"{len(keys)} of the responses have no result, {sorted(keys)[0]} first"

    def _reply(self, reference: Any, keys: set[Key]) -> Reply:
        """What the actor answers; interrupted now and then. `keys`: what is lost when it does not."""
        import ray
        from ray.exceptions import RayError, RayTaskError, RuntimeEnvSetupError

        try:
            while not ray.wait([reference], timeout=PERIOD)[0]:
                self.interrupt()
            reply: Reply = ray.get(reference)
        except RuntimeEnvSetupError as error:
            raise UsageError(f"Ray cannot set up pool.runtime_env ({_first_line(error)}): change it") from error
        except RayTaskError as error:
            raise EngineError(
                f"a worker on the Ray cluster failed ({_first_line(error.cause)}): this is a bug"
            ) from error
        except RayError as error:  # its process, its node or the object it sent is gone
            self._watch = None
            raise self._gone(error, tuple(sorted(keys))) from error
        for name, level, text in reply.lines:
            logging.getLogger(name).log(level, text)
        return reply

    def _gone(self, error: Exception, in_flight: tuple[Key, ...]) -> OnOffError:
        from ray.exceptions import OutOfMemoryError

        if "ModuleNotFoundError" in str(error) or "ImportError" in str(error):
            return UsageError(
                "the nodes of the Ray cluster cannot import rl_onoff: install it there, in the same version, or set pool.runtime_env"
            )
        if isinstance(error, OutOfMemoryError):
            reason = "Ray ended it, for its node was short of memory"
        else:
            reason = (
                "its node left the Ray cluster"
                if "node has died" in str(error)
                else f"its actor is gone: {type(error).__name__}"
            )
        return death(self._config.name, reason, in_flight)

    # -- room ----------------------------------------------------------------------------------------------------------

    def _placed(self, place: Berth) -> Any:
        """A placement group that has been given its resources."""
        import ray

        group = self._group = ray.util.placement_group([dict(place.bundle)], strategy="STRICT_PACK")
        began, warned, wait_s = time.monotonic(), False, self._config.pool.wait_s
        while (state := ray.util.placement_group_table(group).get("state")) != "CREATED":
            time.sleep(PERIOD)
            self.interrupt()
            if state == "REMOVED" or not self._connected():
                raise EngineError(GONE)
            if not alive_nodes():
                raise EngineError(NO_NODE)
            if time.monotonic() - began >= wait_s:
                raise EngineError(
                    f"the Ray cluster has had no room for a replica ({place}) for {wait_s:g} s; {_room()}: set backend.dp_size or "
                    "pool.cpus_per_replica lower, or pool.wait_s higher"
                )
            if not warned and time.monotonic() - began >= PATIENT_SECONDS:
                log.warning(
                    "a replica of %s waits for room on the Ray cluster (%s); %s", self._config.name, place, _room()
                )
                warned = True
        return group


def _more(refill: Refill | None) -> tuple[RecordBatch | None, bool]:
    """Requests that a worker gets while it works, if it is time, and whether these are the last."""
    if refill is None or not refill.is_due:
        return None, refill is None
    requests, last = refill.take()
    return (batch_of(requests) if requests else None), last


def _room() -> str:
    import ray

    return f"it has {described(ray.cluster_resources())}, of which {described(ray.available_resources())} are free"


def _findable(name: str) -> str:
    """A local path in full: a node's working folder is another."""
    return os.path.abspath(name) if os.path.exists(name) else name


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
