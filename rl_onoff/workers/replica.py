"""One worker of a pool, and the thread that waits for it."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any

from rl_onoff.backends.engine import EngineInfo
from rl_onoff.errors import EngineDiedError, OnOffError
from rl_onoff.types import Rollout, SampleRequest, Want
from rl_onoff.workers.client import WorkerClient
from rl_onoff.workers.work_queue import MOST_DEATHS, Item, WorkQueue

log = logging.getLogger(__name__)

MOST_RESTARTS = 3  # of a replica that has given no result since


class Stopped(Exception):
    """Nobody wants what is being waited for."""


class Assignment:
    """The responses of a call that one replica works on; also the `Supply` from which its worker takes more meanwhile."""

    def __init__(self, work: WorkQueue, first: list[Item]):
        self.held = {item.key: item for item in first}  # whose results have not come
        self._work, self._next = work, first
        self._tried_again = any(item.deaths for item in first)  # alone, so that what kills the replica is known

    def take(self, most: int | None = None, *, wait: bool) -> list[Any]:
        """Never waits: what other replicas may give back goes into the next assignment."""
        items, self._next = self._next, []
        if not items and not self._tried_again:
            items = self._work.take(most, len(self.held), wait=False)
            self.held.update((item.key, item) for item in items)
        return [item.what for item in items]


class Call:
    """One call to a pool: what is to be done, and the results as they come, few at a time so that replicas wait for a slow reader."""

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

    def give_back(self, items: list[Item], error: EngineDiedError | None = None) -> None:
        if self.work.give_back(items, error):
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
    """Loads one worker, feeds it with shares of the calls it is given, and starts it again when it dies."""

    def __init__(self, name: str, client: WorkerClient):
        self._client = client
        self._client.interrupt = self._interrupt
        self._name = name
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._call: Call | None = None  # that the worker is busy with
        self._closing = False
        self._failures = 0  # deaths and failed loads since the last result
        self._lost: OnOffError | None = None  # why it is not started any more
        self._thread = threading.Thread(target=self._serve, daemon=True, name="replica")
        self._thread.start()

    # -- the pool's side; only `join` waits ------------------------------------------------------------------------------

    @property
    def pid(self) -> int | None:
        return self._client.pid

    def load(self, loaded: queue.SimpleQueue[EngineInfo | BaseException]) -> None:
        """Load the engine; its info, or the error, goes into `loaded`."""

        def load() -> None:
            try:
                loaded.put(self._client._load())
            except BaseException as error:  # it is raised where it is read
                loaded.put(error)

        self._inbox.put(load)

    def answer(self, call: Call) -> None:
        """Work for a call, once the one before has been left."""
        self._inbox.put(lambda: self._answer(call))

    def close(self) -> None:
        self._closing = True
        self._inbox.put(None)

    def join(self) -> None:
        self._thread.join()

    # -- the thread's side ---------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        try:
            while (job := self._inbox.get()) is not None:
                if not self._closing:
                    job()
        finally:
            self._client._close()

    def _interrupt(self) -> None:
        if self._closing or (self._call is not None and self._call.stopped):
            raise Stopped

    def _answer(self, call: Call) -> None:
        try:
            while not call.stopped and self._ready(call) and (first := call.work.take(call.room)):
                if self._client.is_alive:
                    self._work(call, Assignment(call.work, first))
                else:  # it died while there was nothing to do, which is no fault of these responses
                    call.give_back(first)
        except Stopped:
            pass
        except BaseException as error:  # it is raised where it is read
            call.put(error)

    def _ready(self, call: Call) -> bool:
        """Start the worker again if it is gone; False when that has been tried often enough."""
        while self._lost is None and not self._client.is_alive:
            try:
                self._client._close()
                self._client._load()
            except OnOffError as error:
                self._fail(error)
        if self._lost is not None:
            call.lose(self._lost)
        return self._lost is None

    def _work(self, call: Call, assignment: Assignment) -> None:
        self._call = call
        try:
            with closing(call.run(self._client, assignment)) as results:
                for result in results:
                    assignment.held.pop(result.key, None)
                    self._failures = 0
                    call.done(result)
                    self._interrupt()
        except EngineDiedError as error:
            self._died(call, list(assignment.held.values()), error)
        finally:
            self._call = None

    def _died(self, call: Call, held: list[Item], error: EngineDiedError) -> None:
        why = str(error).removesuffix(": run it again to go on")
        log.warning("a replica of %s is started again: %s", self._name, why)
        call.give_back(held, error)
        if held and held[0].deaths >= MOST_DEATHS:
            self._failures = 0  # its cause was found
        else:
            self._fail(error)

    def _fail(self, error: OnOffError) -> None:
        self._failures += 1
        if self._failures > MOST_RESTARTS:
            log.warning("a replica of %s is given up: it failed %d times in a row", self._name, self._failures)
            self._lost = error
