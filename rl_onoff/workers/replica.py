"""One worker of a pool: works on the calls it is given, and is started again when it dies."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Sequence
from contextlib import closing
from typing import Any

from rl_onoff.errors import EngineDiedError, OnOffError
from rl_onoff.types import Key, Rollout, SampleRequest, Want
from rl_onoff.workers.client import WorkerClient
from rl_onoff.workers.work_queue import MOST_DEATHS, Work, WorkQueue

log = logging.getLogger(__name__)

MOST_RESTARTS = 3  # of a replica that has given no result since


class Stopped(Exception):
    """Nobody wants what is being waited for."""


class Assignment:
    """The responses of a call that one replica works on; also the `Supply` from which its worker takes more."""

    def __init__(self, work: WorkQueue, first: list[Work]):
        self.held = {one.key: one for one in first}  # whose results have not come
        self._work, self._next = work, first
        self._tried_again = any(work.deaths[one.key] for one in first)  # alone, so that what kills a replica is found

    def take(self, most: int | None = None, *, wait: bool) -> list[Any]:
        """Never waits: what other replicas may give back goes into the next assignment."""
        taken, self._next = self._next, []
        if not taken and not self._tried_again:
            taken = self._work.take(most, len(self.held), wait=False)
            self.held.update((one.key, one) for one in taken)
        return taken


class Call:
    """One call to a pool: what is to be done, and its results, few at a time: replicas wait for a slow reader."""

    def __init__(
        self,
        work: Sequence[SampleRequest] | Sequence[Rollout],
        num_replicas: int,
        *,
        room: int | None = None,  # requests that a replica has at a time; None: its whole share
        want: Want | None = None,  # what is to be scored; None: the work is to be sampled
    ):
        self.work = WorkQueue(work, num_replicas)
        self.room, self._want = room, want
        self.stopped = False
        self._replicas = num_replicas  # that can still be counted on
        self._results: queue.Queue[Any] = queue.Queue(maxsize=max(num_replicas, 1))
        self._lock = threading.Lock()
        if not work:
            self._results.put(None)

    # the reader's side

    def next(self) -> Any:
        """The next result; None at the end. Raises the error that ended the call."""
        result = self._results.get()
        if isinstance(result, BaseException):
            raise result
        return result

    def stop(self) -> None:
        self.stopped = True
        self.work.stop()

    # the replicas' side

    def run(self, client: WorkerClient, assignment: Assignment) -> Any:
        """The results of an assignment."""
        if self._want is None:
            return client._generate(assignment, self.room or 1)
        return client._score(assignment.take(wait=False), self._want)

    def put(self, result: Any) -> None:
        while not self.stopped:
            try:
                return self._results.put(result, timeout=0.2)
            except queue.Full:
                continue

    def done(self, result: Any) -> None:
        self.put(result)
        if self.work.done():
            self.put(None)

    def give_back(self, work: list[Work], error: EngineDiedError | None = None) -> None:
        if self.work.give_back(work, error):
            self.put(None)

    def lose(self, error: OnOffError) -> None:
        """A replica does not come back."""
        with self._lock:
            self._replicas -= 1
            last = self._replicas == 0
        if last:
            if isinstance(error, EngineDiedError):
                error.in_flight = tuple(sorted(self.work.left()))
            self.put(error)


class Replica:
    """One worker of a pool. The pool runs its methods one after the other, in a thread of the replica's own."""

    def __init__(self, name: str, client: WorkerClient):
        self.client, self._name = client, name
        client.interrupt = self._interrupt
        self.closing = False
        self._call: Call | None = None  # that the worker is busy with
        self._failures = 0  # deaths and failed loads since the last result
        self._lost: OnOffError | None = None  # why it is not started any more

    def _interrupt(self) -> None:
        if self.closing or (self._call is not None and self._call.stopped):
            raise Stopped

    def answer(self, call: Call) -> None:
        """Work for a call until nothing is left to do."""
        try:
            while not call.stopped and self._ready(call) and (first := call.work.take(call.room)):
                if self.client.is_alive:
                    self._work(call, Assignment(call.work, first))
                else:  # it died while there was nothing to do, which is no fault of these responses
                    call.give_back(first)
        except Stopped:
            pass
        except BaseException as error:  # it is raised where it is read
            call.put(error)

    def _ready(self, call: Call) -> bool:
        """Start the worker again if it is gone; False when that has been tried often enough."""
        while self._lost is None and not self.client.is_alive:
            try:
                self.client._close()
                self.client._load()
            except OnOffError as error:
                self._fail(error)
        if self._lost is not None:
            call.lose(self._lost)
        return self._lost is None

    def _work(self, call: Call, assignment: Assignment) -> None:
        self._call = call
        try:
            with closing(call.run(self.client, assignment)) as results:
                for result in results:
                    assignment.held.pop(result.key, None)
                    self._failures = 0
                    call.done(result)
                    self._interrupt()
        except EngineDiedError as error:
            self._died(call, assignment.held, error)
        finally:
            self._call = None

    def _died(self, call: Call, held: dict[Key, Work], error: EngineDiedError) -> None:
        why = str(error).removesuffix(": run it again to go on")
        log.warning("a replica of %s is started again: %s", self._name, why)
        call.give_back(list(held.values()), error)
        if any(call.work.deaths[key] >= MOST_DEATHS for key in held):
            self._failures = 0  # its cause was found
        else:
            self._fail(error)

    def _fail(self, error: OnOffError) -> None:
        self._failures += 1
        if self._failures > MOST_RESTARTS:
            log.warning("a replica of %s is given up: it failed %d times in a row", self._name, self._failures)
            self._lost = error
