"""Replicas of an engine share out the work: `backend.dp_size` workers with their own devices, here or on a cluster.

A pool is a `Core`, like one engine. A response does not depend on the replica that computes it (its seed is its own),
so it does not matter who takes what: whoever has room takes more, results are handed on as they come, and what a dead
replica held goes to the others while it starts again.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rl_onoff.backends.engine import Core, EngineInfo, Supply
from rl_onoff.backends.engine_config import EngineConfig
from rl_onoff.errors import EngineDiedError, EngineError
from rl_onoff.types import Key, Rollout, SampleRequest, TokenScores, Want
from rl_onoff.workers.client import WorkerClient
from rl_onoff.workers.devices import places
from rl_onoff.workers.replica import Call, Replica

if TYPE_CHECKING:
    from rl_onoff.workers.ray import RayCluster

log = logging.getLogger(__name__)

NAMED = 10  # lost responses that an error names


class Pool:
    """Runs the replicas of one backend. One call at a time; a call that is left early leaves the pool usable."""

    def __init__(
        self,
        backend_class: type[Core],
        config: EngineConfig,
        log_folder: Path | str | None = None,
        cluster: RayCluster | None = None,  # where the replicas run; None: on this machine
    ):
        self._class, self._config, self._log_folder, self._cluster = backend_class, config, log_folder, cluster
        self._replicas: list[Replica] = []
        self._threads: list[threading.Thread] = []  # one a replica, each with its job
        self._call: Call | None = None
        self._room = 1  # requests that a replica has at a time

    @property
    def pids(self) -> list[int | None]:
        """The workers' process ids, None for one that is not running."""
        return [replica.client.pid for replica in self._replicas]

    def _clients(self) -> list[WorkerClient]:
        if self._cluster is not None:
            return self._cluster.clients()
        machine = places(self._config.dp_size or 1, self._config.gpus_per_replica)
        return [WorkerClient(self._class, self._config, self._log_folder, place) for place in machine]

    def _load(self) -> EngineInfo:
        loaded: queue.SimpleQueue[EngineInfo | BaseException] = queue.SimpleQueue()
        infos = []

        def load(replica: Replica) -> None:
            try:
                loaded.put(replica.client._load())
            except BaseException as error:  # it is raised where it is read
                loaded.put(error)

        try:
            clients = self._clients()
            log.info("starting %d replica%s of %s", len(clients), "s" * (len(clients) > 1), self._config.name)
            self._replicas = [Replica(self._config.name, client) for client in clients]
            self._start(load)
            while len(infos) < len(clients):
                info = loaded.get()
                if isinstance(info, BaseException):
                    raise info
                infos.append(info)
        except BaseException:
            self._close()
            raise
        self._room = 2 * max(info.batch for info in infos)  # what an engine works on, and as much again to go on with
        return dataclasses.replace(
            infos[0],
            max_len=min(info.max_len for info in infos),
            in_engine_stats=all(info.in_engine_stats for info in infos),
            replicas=len(infos),
        )

    def _generate(self, supply: Supply) -> Iterator[Rollout]:
        requests: list[SampleRequest] = []
        while more := supply.take(wait=True):
            requests += more
        yield from self._results(Call(requests, len(self._replicas), room=self._room))

    def _score(self, rollouts: Sequence[Rollout], want: Want) -> Iterator[TokenScores]:
        yield from self._results(Call(rollouts, len(self._replicas), want=want))

    def _close(self) -> None:
        if self._call is not None:
            self._call.stop()
        for replica in self._replicas:
            replica.closing = True
        self._start(lambda replica: replica.client._close())
        for thread in self._threads:
            thread.join()
        self._replicas, self._threads, self._call = [], [], None
        if self._cluster is not None:
            self._cluster.close()

    def _start(self, job: Callable[[Replica], None]) -> None:
        """Begin a job for every replica, each in a thread, once the job that it has now is done."""

        def run(replica: Replica, before: threading.Thread | None) -> None:
            if before is not None:
                before.join()
            job(replica)

        pairs = itertools.zip_longest(self._replicas, self._threads)
        self._threads = [threading.Thread(target=run, args=pair, daemon=True, name="replica") for pair in pairs]
        for thread in self._threads:
            thread.start()

    def _results(self, call: Call) -> Iterator[Any]:
        """The results of a call, which all replicas work on."""
        self._check_running()
        if self._call is not None:
            self._call.stop()
        self._call = call
        try:
            self._start(lambda replica: replica.answer(call))
            while (result := call.next()) is not None:
                yield result
                if self._call is not call:  # a later one was begun, or the pool is closed
                    self._check_running()
                    raise EngineError(
                        "another call to this backend began before this one was read to its end: read it first"
                    )
        finally:
            call.stop()
        if call.work.given_up:
            raise self._gave_up(call.work.given_up)

    def _check_running(self) -> None:
        if not self._replicas:
            raise EngineDiedError(f"the {self._config.name} engine is not running: load the backend again")

    def _gave_up(self, deaths: Mapping[Key, EngineDiedError]) -> EngineError:
        """The error of responses that cost a replica its life too often."""
        keys = sorted(deaths)
        names = ", ".join(f"{request_id!r} (sample {sample})" for request_id, sample in keys[:NAMED])
        more = f" and {len(keys) - NAMED} more" if len(keys) > NAMED else ""
        error = EngineError(
            f"the {self._config.name} engine died three times on each of these responses, which have no result: "
            f"{names}{more}; all others are done: leave those requests out, or give the engine more memory"
        )
        for note in getattr(deaths[keys[0]], "__notes__", ()):
            error.add_note(note)
        return error
