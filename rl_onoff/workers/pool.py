"""Replicas of an engine that share out the work: `backend.dp_size` workers, each with devices of its own, here or on a cluster.

A pool is a `Core`, like one engine. A response does not depend on the replica that computes it (its seed is its own), so it
does not matter who takes what: whoever has room takes more, results are handed on as they come, and what a dead replica held
goes to the others while it starts again.
"""

from __future__ import annotations

import dataclasses
import logging
import queue
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from rl_onoff.backends.engine import Core, EngineInfo, Supply
from rl_onoff.backends.engine_config import EngineConfig
from rl_onoff.errors import EngineDiedError, EngineError
from rl_onoff.types import Rollout, SampleRequest, TokenScores, Want
from rl_onoff.workers.client import Host
from rl_onoff.workers.devices import places
from rl_onoff.workers.replica import Call, Hand, Hosting, Replica
from rl_onoff.workers.work_queue import Key

log = logging.getLogger(__name__)

NAMED = 10  # lost responses that an error names


class Site(Protocol):
    """Where the replicas of a pool run."""

    def hosts(self) -> Sequence[Hosting]:
        """A host for each replica, not loaded."""
        ...

    def close(self) -> None:
        """Once the hosts are closed; must be safe to call twice."""
        ...


class Machine:
    """This machine: a worker process for each replica, with devices of its own."""

    def __init__(self, backend_class: type[Core], config: EngineConfig, log_folder: Path | str | None = None):
        self._class, self._config, self._log_folder = backend_class, config, log_folder

    def hosts(self) -> list[Host]:
        shared_out = places(self._config.dp_size or 1, self._config.gpus_per_replica)
        return [Host(self._class, self._config, self._log_folder, place) for place in shared_out]

    def close(self) -> None:
        pass


class Pool:
    """Runs the replicas of one backend. One call at a time; a call that is left early leaves the pool usable."""

    def __init__(
        self,
        backend_class: type[Core],
        config: EngineConfig,
        log_folder: Path | str | None = None,
        site: Site | None = None,
    ):
        self._class, self._config = backend_class, config
        self._site = site or Machine(backend_class, config, log_folder)
        self._replicas: list[Replica] = []
        self._call: Call | None = None
        self._room = 1

    @property
    def pids(self) -> list[int | None]:
        """The workers' process ids, None for one that is not running."""
        return [replica.pid for replica in self._replicas]

    def _load(self) -> EngineInfo:
        loaded: queue.SimpleQueue[EngineInfo | BaseException] = queue.SimpleQueue()
        infos = []
        try:
            hosts = self._site.hosts()
            log.info("starting %d replica%s of %s", len(hosts), "s" * (len(hosts) > 1), self._config.name)
            self._replicas = [Replica(self._config.name, host) for host in hosts]
            for replica in self._replicas:
                replica.load(loaded)
            while len(infos) < len(hosts):
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
        yield from self._share_out(requests, lambda host, hand: host._generate(hand, self._room), self._room)

    def _score(self, rollouts: Sequence[Rollout], want: Want) -> Iterator[TokenScores]:
        yield from self._share_out(rollouts, lambda host, hand: host._score([item.what for item in hand.first], want))

    def _close(self) -> None:
        replicas, self._replicas = self._replicas, []
        call, self._call = self._call, None
        if call is not None:
            call.stop()
        for replica in replicas:
            replica.close()
        for replica in replicas:
            replica.join()
        self._site.close()

    def _share_out(
        self,
        work: Sequence[SampleRequest] | Sequence[Rollout],
        run: Callable[[Any, Hand], Generator[Any]],
        room: int | None = None,
    ) -> Iterator[Any]:
        self._running()
        if not work:
            return
        if self._call is not None:
            self._call.stop()
        call = self._call = Call(work, len(self._replicas), run, room)
        try:
            for replica in self._replicas:
                replica.answer(call)
            while (result := call.next()) is not None:
                yield result
                if self._call is not call:  # a later one was begun, or the pool is closed
                    self._running()
                    raise EngineError(
                        "another call to this backend began before this one was read to its end: read it first"
                    )
        finally:
            call.stop()
        if call.shares.given_up:
            raise self._gave_up(call.shares.given_up)

    def _running(self) -> None:
        if not self._replicas:
            raise EngineDiedError(f"the {self._config.name} engine is not running: load the backend again")

    def _gave_up(self, deaths: Mapping[Key, EngineDiedError]) -> EngineError:
        keys = sorted(deaths)
        names = ", ".join(_name(key) for key in keys[:NAMED]) + (
            f" and {len(keys) - NAMED} more" if len(keys) > NAMED else ""
        )
        error = EngineError(
            f"the {self._config.name} engine died three times on each of these responses, which have no result: {names}; all others are "
            "done: leave those requests out, or give the engine more memory"
        )
        for note in getattr(deaths[keys[0]], "__notes__", ()):
            error.add_note(note)
        return error


def _name(key: Key) -> str:
    request_id, sample = key
    return f"{request_id!r} (sample {sample})"
