"""One worker of a pool, and the thread that waits for it."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from typing import Any, Protocol

from rl_onoff.backends.engine import Core, EngineInfo, Supply
from rl_onoff.errors import EngineDiedError, OnOffError
from rl_onoff.types import Rollout, SampleRequest
from rl_onoff.workers.work_queue import MOST_DEATHS, Item, Shares

log = logging.getLogger(__name__)

MOST_RESTARTS = 3  # of a replica that has given no result since


class Stopped(Exception):
    """Nobody wants what is being waited for."""


class Hosting(Core, Protocol):
    """What a replica needs of its host: a worker on this machine (`Host`) or on a node of a cluster (`RayHost`)."""

    interrupt: Callable[[], None]  # called now and then while it waits; may raise

    def _generate(self, supply: Supply, room: int = ...) -> Iterator[Rollout]: ...

    @property
    def pid(self) -> int | None: ...

    @property
    def is_alive(self) -> bool: ...


class Hand:
    """What a replica has of a call: a `Supply` too, from which its worker takes more while it works."""

    def __init__(self, shares: Shares, first: list[Item]):
        self.first = first
        self.held = {item.key: item for item in first}  # without those that are done
        self._shares, self._next = shares, first
        self._tried_again = any(item.deaths for item in first)  # alone, so that what dies is known

    def take(self, most: int | None = None, *, wait: bool) -> list[SampleRequest]:
        """Never waits: what others may give back is the next hand's."""
        items, self._next = self._next, []
        if not items and not self._tried_again:
            items = self._shares.take(most, len(self.held), wait=False)
            self.held.update((item.key, item) for item in items)
        return [item.what for item in items if isinstance(item.what, SampleRequest)]


class Call:
    """One call to a pool: what is to be done, and the results as they come, few at a time so that replicas wait for a slow reader."""

    def __init__(
        self,
        work: Sequence[SampleRequest] | Sequence[Rollout],
        num_replicas: int,
        run: Callable[[Hosting, Hand], Generator[Any]],
        room: int | None,
    ):
        self.shares = Shares(work, num_replicas)
        self.run = run
        self.room = room  # what a replica has at a time, where it can be topped up
        self.stopped = False
        self._replicas = num_replicas  # that can still be counted on
        self._results: queue.Queue[Any] = queue.Queue(maxsize=num_replicas)
        self._lock = threading.Lock()

    # the reader's side

    def next(self) -> Any:
        """The next result; None at the end. Raises the error that ended the call."""
        result = self._results.get()
        if isinstance(result, BaseException):
            raise result
        return result

    def stop(self) -> None:
        self.stopped = True
        self.shares.stop()

    # the replicas' side

    def put(self, result: Any) -> None:
        while not self.stopped:
            try:
                return self._results.put(result, timeout=0.2)
            except queue.Full:
                continue

    def done(self, result: Any) -> None:
        self.put(result)
        if self.shares.done():
            self.put(None)

    def give_back(self, items: list[Item], error: EngineDiedError | None = None) -> None:
        if self.shares.give_back(items, error):
            self.put(None)

    def lose(self, error: OnOffError) -> None:
        """A replica does not come back."""
        with self._lock:
            self._replicas -= 1
            last = self._replicas == 0
        if last:
            if isinstance(error, EngineDiedError):
                error.in_flight = tuple(sorted(self.shares.left()))
            self.put(error)


class Replica:
    """Loads one worker, feeds it with shares of the calls it is given, and starts it again when it dies."""

    def __init__(self, name: str, host: Hosting):
        self._host = host
        self._host.interrupt = self._interrupt
        self._name = name
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._call: Call | None = None  # that the worker is busy with
        self._closing = False
        self._failures = 0  # deaths and failed loads since the last result
        self._lost: OnOffError | None = None  # why it is not started any more
        self._thread = threading.Thread(target=self._serve, daemon=True, name="replica")
        self._thread.start()

    # -- the pool's side; none of these waits --------------------------------------------------------------------------

    @property
    def pid(self) -> int | None:
        return self._host.pid

    def load(self, loaded: queue.SimpleQueue[EngineInfo | BaseException]) -> None:
        """Load the engine; its info, or the error, goes into `loaded`."""

        def load() -> None:
            try:
                loaded.put(self._host._load())
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
            self._host._close()

    def _interrupt(self) -> None:
        if self._closing or (self._call is not None and self._call.stopped):
            raise Stopped

    def _answer(self, call: Call) -> None:
        try:
            while not call.stopped and self._ready(call) and (first := call.shares.take(call.room)):
                if self._host.is_alive:
                    self._work(call, Hand(call.shares, first))
                else:  # it died while there was nothing to do: no fault of these
                    call.give_back(first)
        except Stopped:
            pass
        except BaseException as error:  # it is raised where it is read
            call.put(error)

    def _ready(self, call: Call) -> bool:
        """Start the worker again if it is gone; False when that has been tried often enough."""
        while self._lost is None and not self._host.is_alive:
            try:
                self._host._close()
                self._host._load()
            except OnOffError as error:
                self._fail(error)
        if self._lost is not None:
            call.lose(self._lost)
        return self._lost is None

    def _work(self, call: Call, hand: Hand) -> None:
        self._call = call
        try:
            with closing(call.run(self._host, hand)) as results:
                for result in results:
                    hand.held.pop(result.key, None)
                    self._failures = 0
                    call.done(result)
                    self._interrupt()
        except EngineDiedError as error:
            self._died(call, list(hand.held.values()), error)
        finally:
            self._call = None

    def _died(self, call: Call, held: list[Item], error: EngineDiedError) -> None:
        log.warning(
            "a replica of %s is started again: %s", self._name, str(error).removesuffix(": run it again to go on")
        )
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
