"""Replicas of an engine share out the work: `backend.dp_size` workers with their own devices, here or on a cluster.

A pool is a `Core`, like one engine. A response does not depend on the replica that computes it (its seed is its own),
so it does not matter who takes what: whoever has room takes more, results are handed on as they come, and what a dead
replica held goes to the others while it starts again.
"""

from __future__ import annotations

import dataclasses
import logging
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, as_completed, wait
from contextlib import closing, suppress
from functools import partial
from typing import Any

from rl_onoff.backends.devices import places
from rl_onoff.backends.engine import Core, EngineInfo, Supply
from rl_onoff.backends.engine_config import EngineConfig
from rl_onoff.errors import EngineDiedError, EngineError, OnOffError, plural
from rl_onoff.types import Key, Rollout, SampleRequest, TokenScores, Want
from rl_onoff.workers.client import DISPLACED, NOT_RUNNING, RUN_AGAIN, WorkerClient
from rl_onoff.workers.wire import Work
from rl_onoff.workers.work_queue import WorkQueue

log = logging.getLogger(__name__)

MOST_RESTARTS = 3  # of a replica that has given no result since
NAMED = 10  # lost responses that an error names


class Stopped(Exception):
    """Nobody wants what is being waited for."""


class Call(WorkQueue):
    """One call to a pool: what is to be done, and its results, few at a time: replicas wait for a slow reader."""

    def __init__(self, work: Sequence[Work], num_replicas: int, room: int | None, want: Want | None):
        super().__init__(work, num_replicas)
        self.room = room  # requests that a replica has at a time; None: its whole share
        self.want = want  # what is to be scored; None: the work is to be sampled
        # also errors, a replica that does not come back, and None, when responses were given up
        self.results: queue.Queue[Any] = queue.Queue(maxsize=num_replicas)

    def put(self, result: Any) -> None:
        while not self.stopped:
            with suppress(queue.Full):
                return self.results.put(result, timeout=0.2)


class Replica:
    """One worker of a pool, which works on the calls it is given, and is started again when it dies.

    Also the `Supply` from which the worker takes more while it samples.
    """

    def __init__(self, name: str, client: WorkerClient):
        self.client, self._name = client, name
        client.interrupt = self._interrupt
        self.closing = False
        self.lost: OnOffError | None = None  # why it is not started any more
        self._job: Future[Any] | None = None  # the latest
        self._failures = 0  # deaths and failed loads since the last result
        self._call: Call | None = None  # that the worker is busy with
        self._held: dict[Key, Work] = {}  # whose results have not come
        self._first: list[Work] = []  # of what it holds, not yet with the worker

    def begin(self, job: Callable[[], Any]) -> Future[Any]:
        """Do a job in a thread of its own, once the job before is done."""
        before, done = self._job, Future()

        def run() -> None:
            wait([before] if before else [])
            try:
                done.set_result(job())
            except BaseException as error:
                done.set_exception(error)

        self._job = done
        threading.Thread(target=run, daemon=True, name="replica").start()
        return done

    def answer(self, call: Call) -> None:
        """Work for a call until nothing is left to do."""
        try:
            while not call.stopped:
                self._restart()
                if self.lost:
                    return call.put(self)
                if not (work := call.take(call.room)):
                    return
                if self.client.is_alive:
                    self._work(call, work)
                else:  # it died while there was nothing to do, which is no fault of these responses
                    call.give_back(work)
        except Stopped:
            pass
        except BaseException as error:  # it is raised where it is read
            call.put(error)

    def take(self, most: int | None = None, *, wait: bool) -> list[Any]:
        """Never waits: what other replicas may give back goes into the next share."""
        taken, self._first, call = self._first, [], self._call
        # what a dead replica held is tried again alone, so that what kills a replica is found
        if not taken and call is not None and not any(call.deaths[key] for key in self._held):
            taken = call.take(most, len(self._held), wait=False)
            self._held.update((one.key, one) for one in taken)
        return taken

    def _interrupt(self) -> None:
        if self.closing or (self._call is not None and self._call.stopped):
            raise Stopped

    def _restart(self) -> None:
        """Start the worker again if it is gone, unless that has been tried often enough."""
        while self.lost is None and not self.client.is_alive:
            try:
                self.client._close()
                self.client._load()
            except OnOffError as error:
                self._fail(error)

    def _work(self, call: Call, work: list[Work]) -> None:
        self._call, self._first, self._held = call, work, {one.key: one for one in work}
        if call.want is None:
            results: Any = self.client._generate(self, call.room or 1)
        else:
            results = self.client._score(self.take(wait=False), call.want)
        try:
            with closing(results):
                for result in results:
                    self._held.pop(result.key, None)
                    self._failures = 0
                    call.put(result)
                    call.done()
                    self._interrupt()
        except EngineDiedError as error:
            log.warning("a replica of %s is started again: %s", self._name, str(error).removesuffix(RUN_AGAIN))
            call.give_back(list(self._held.values()), error)
            if self._held.keys() & call.given_up.keys():  # the cause was found
                self._failures = 0
                call.put(None)
            else:
                self._fail(error)
        finally:
            self._call = None

    def _fail(self, error: OnOffError) -> None:
        self._failures += 1
        if self._failures > MOST_RESTARTS:
            log.warning("a replica of %s is given up: it failed %d times in a row", self._name, self._failures)
            self.lost = error


class Pool:
    """Runs the replicas of one backend. One call at a time; a call that is left early leaves the pool usable."""

    def __init__(self, backend_class: type[Core], config: EngineConfig):
        self._class, self._config = backend_class, config
        self._replicas: list[Replica] = []
        self._call: Call | None = None
        self._room = 1  # requests that a replica has at a time

    def _clients(self) -> Sequence[WorkerClient]:
        """A client for each replica, not loaded."""
        machine = places(self._config.dp_size or 1, self._config.gpus_per_replica)
        return [WorkerClient(self._class, self._config, place) for place in machine]

    def _begin(self) -> None:
        """Nothing: the replicas start side by side when they load."""

    def _load(self) -> EngineInfo:
        try:
            clients = self._clients()
            log.info("starting %s of %s", plural(len(clients), "replica"), self._config.name)
            self._replicas = [Replica(self._config.name, client) for client in clients]
            started = [replica.begin(replica.client._load) for replica in self._replicas]
            infos: list[EngineInfo] = [done.result() for done in as_completed(started)]
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
        yield from self._results(requests, room=self._room)

    def _score(self, rollouts: Sequence[Rollout], want: Want) -> Iterator[TokenScores]:
        yield from self._results(rollouts, want=want)

    def _close(self) -> None:
        if self._call is not None:
            self._call.stop()
        for replica in self._replicas:
            replica.closing = True
        closed, _ = wait([replica.begin(replica.client._close) for replica in self._replicas])
        self._replicas, self._call = [], None
        for done in closed:
            done.result()

    def _results(self, work: Sequence[Work], room: int | None = None, want: Want | None = None) -> Iterator[Any]:
        """The results of a call, which all replicas work on."""
        self._check_running()
        if self._call is not None:
            self._call.stop()
        call = self._call = Call(work, len(self._replicas), room, want)
        given_up, missing = call.given_up, {one.key for one in work}
        num_replicas = len(self._replicas)  # that can still be counted on
        try:
            for replica in self._replicas:
                replica.begin(partial(replica.answer, call))
            while len(missing) > len(given_up):
                match call.results.get():
                    case None:
                        continue
                    case Replica(lost=OnOffError() as error):
                        num_replicas -= 1
                        if num_replicas:
                            continue
                        if isinstance(error, EngineDiedError):
                            error.in_flight = tuple(sorted(missing - given_up.keys()))
                        raise error
                    case BaseException() as error:
                        raise error
                    case result:
                        missing.discard(result.key)
                        yield result
                if self._call is not call:  # a later one was begun, or the pool is closed
                    self._check_running()
                    raise EngineError(DISPLACED)
        finally:
            call.stop()
        if keys := sorted(given_up):
            names = ", ".join(f"{request_id!r} (sample {sample})" for request_id, sample in keys[:NAMED])
            more = f" and {len(keys) - NAMED} more" if len(keys) > NAMED else ""
            what = f"the {self._config.name} engine died three times on each of these responses, which have no result"
            fix = "leave those requests out, or give the engine more memory"
            error = EngineError(f"{what}: {names}{more}; all others are done: {fix}")
            for note in getattr(given_up[keys[0]], "__notes__", ()):
                error.add_note(note)
            raise error

    def _check_running(self) -> None:
        if not self._replicas:
            raise EngineDiedError(NOT_RUNNING.format(self._config.name))
