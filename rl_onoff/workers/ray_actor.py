"""The actor's side of a pool on Ray: a `Host`, and what it has to say when it is asked.

The reader asks for results and gets all that are there (long polling), so a call can be left at any time, a slow reader holds
the worker back, and many small results travel as one batch. The engine is a child of the actor's process, not in it: what holds
for a worker on this machine (`backend.python`, an engine that crashes or kills its parent, nothing left behind) holds on a node.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

import psutil

from rl_onoff import errors
from rl_onoff.backends.engine import Draw, EngineInfo, draws_of, taken
from rl_onoff.backends.engine_config import EngineConfig
from rl_onoff.errors import OnOffError, UsageError
from rl_onoff.types import Request, Want
from rl_onoff.workers import sessions
from rl_onoff.workers.arrow import batch_of, items_of
from rl_onoff.workers.client import CLOSE_SECONDS, PERIOD, Host
from rl_onoff.workers.devices import VISIBLE, Place
from rl_onoff.workers.forward import Forward, Line
from rl_onoff.workers.replica import Stopped

if TYPE_CHECKING:
    from pyarrow import RecordBatch

    from rl_onoff.types import Completion, TokenScores

WAIT_SECONDS = 1.0  # for the first result, before an empty reply
LINGER_SECONDS = 0.01  # for a few more, so that small results do not travel one by one
HELD_BYTES = 16 << 20  # of results that have not been asked for; the worker waits then


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """An exception that travels: by the name of its class in rl_onoff.errors."""

    error: str
    text: str
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        name, text = errors.named(error)
        return cls(error=name, text=text, notes=tuple(getattr(error, "__notes__", ())))

    def exception(self) -> OnOffError:
        error = getattr(errors, self.error)(self.text)
        for note in self.notes:
            error.add_note(note)
        return error


@dataclass(frozen=True, kw_only=True, slots=True)
class Reply:
    """What an actor says; `info` and `pid` to load, `batch` and `ended` to a call."""

    failure: Failure | None = None
    lines: Sequence[Line] = ()
    info: EngineInfo | None = None
    pid: int | None = None
    batch: RecordBatch | None = None
    ended: bool = False


class Results:
    """The results of one call that have not been asked for."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self._items: list[Completion | TokenScores] = []
        self._bytes = 0
        self.stopped = self._ended = False
        self._failure: Failure | None = None

    def put(self, item: Completion | TokenScores) -> None:
        """Add one, once there is room for it."""
        with self.changed:
            self.changed.wait_for(lambda: self.stopped or self._bytes < HELD_BYTES)
            self.check()
            self._items.append(item)
            self._bytes += sum(getattr(getattr(item, name), "nbytes", 0) for name in item.__dataclass_fields__)
            self.changed.notify_all()

    def end(self, failure: Failure | None = None) -> None:
        with self.changed:
            self._ended, self._failure = True, failure
            self.changed.notify_all()

    def stop(self) -> None:
        with self.changed:
            self.stopped = True
            self.changed.notify_all()

    def check(self) -> None:
        if self.stopped:
            raise Stopped

    def take(self, seconds: float) -> tuple[list[Completion | TokenScores], bool, Failure | None]:
        """(all that are there, whether these are the last, why it failed); waits for one, and a moment longer."""
        with self.changed:
            self.changed.wait_for(lambda: self._items or self._ended or self.stopped, seconds)
            self.changed.wait_for(lambda: self._bytes >= HELD_BYTES or self._ended or self.stopped, LINGER_SECONDS)
            items, self._items, self._bytes = self._items, [], 0
            self.changed.notify_all()
            return items, self._ended, self._failure


class Feed:
    """What a call is to do, as it comes; a `Supply` where it is to sample."""

    def __init__(self, results: Results):
        self.items: list[Any] = []  # of a call that gets no more
        self._draws: deque[Draw] = deque()
        self._results, self._last = results, False

    def add(self, batch: RecordBatch | None, last: bool) -> None:
        items = [] if batch is None else items_of(batch)
        with self._results.changed:
            if items and isinstance(items[0], Request):
                self._draws.extend(draws_of(items))
            else:
                self.items += items
            self._last = self._last or last
            self._results.changed.notify_all()

    def take(self, most: int | None = None, *, wait: bool) -> list[Draw]:
        with self._results.changed:
            if wait:
                self._results.changed.wait_for(lambda: self._draws or self._last or self._results.stopped)
            self._results.check()
            return taken(self._draws, most)


class Worker:
    """What Ray runs on a node. Its methods may be called side by side, each in a thread, but there is one call at a time.

    Ray does not keep the order in which methods are called: what is said of a call, by its number, may come after the next one began.
    """

    def __init__(
        self, target: str, config: EngineConfig, log_folder: str | None, environment: Mapping[str, str] | None
    ):
        self._target, self._config, self._log_folder, self._environment = target, config, log_folder, environment
        self._host: Host | None = None
        self._closing = Results()  # a call without results: what `load` is interrupted by
        self._loading = threading.Lock()
        self._changing = threading.Lock()  # whoever goes on from one call to the next
        self._call = 0  # the number of the latest call that was begun or cancelled
        self._results = Results()
        self._feed: Feed | None = None
        self._thread: threading.Thread | None = None
        self._forward = Forward()

    def load(self) -> Reply:
        with self._loading:
            try:
                self._host = self._make_host()
                self._host.interrupt = self._closing.check
                info = self._host._load()
            except Exception as error:
                return Reply(failure=Failure.of(error), lines=self._forward.lines())
            return Reply(info=info, pid=self._host.pid, lines=self._forward.lines())

    def _make_host(self) -> Host:
        module, _, name = self._target.partition(":")
        try:
            backend_class = getattr(import_module(module), name)
        except ImportError as error:
            raise UsageError(
                f"the nodes of the Ray cluster cannot import {module} ({error}): install it there, or set pool.runtime_env"
            ) from error
        environment = dict(self._environment or {})
        if self._environment and not os.environ.get(VISIBLE):
            os.environ.pop(
                VISIBLE, None
            )  # Ray hides the GPUs from an actor that reserves none, but an engine on many nodes looks at them
        return Host(backend_class, self._config, self._log_folder, Place(environment=environment))

    def watch(self) -> None:
        """Returns when the engine's process is gone: how a death is noticed while nothing is asked."""
        pid = self._host.pid if self._host is not None else None
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)  # not `Host.is_alive`, which belongs to the thread that talks to it
            while pid is not None and sessions.alive(process):
                time.sleep(PERIOD)

    def begin(self, call: int, batch: RecordBatch, want: Want | None, last: bool) -> Reply:
        """Generate (no `want`) or score; the first results. Unless these are the `last` requests, more come with `next`."""
        with self._changing:
            if call <= self._call:  # cancelled before it began
                return Reply(ended=True)
            self._results.stop()
            self._call, results = call, Results()
            self._results, self._feed = results, Feed(results)
            self._feed.add(batch, last)
            self._thread = threading.Thread(
                target=self._run, args=(self._thread, results, self._feed, want), daemon=True
            )
            self._thread.start()
        return self._next(results)

    def next(self, call: int, batch: RecordBatch | None, last: bool) -> Reply:
        """More results of the call, against more requests."""
        with self._changing:
            if call != self._call:  # nobody reads this reply
                return Reply(ended=True)
            results, feed = self._results, self._feed
        assert feed is not None
        feed.add(batch, last)
        return self._next(results)

    def _next(self, results: Results) -> Reply:
        items, ended, failure = results.take(WAIT_SECONDS)
        return Reply(
            batch=batch_of(items) if items else None, ended=ended, failure=failure, lines=self._forward.lines()
        )  # type: ignore[arg-type]

    def cancel(self, call: int) -> None:
        """Nobody wants the rest of the call."""
        with self._changing:
            if call >= self._call:
                self._call = call
                self._results.stop()

    def close(self) -> None:
        self._closing.stop()
        self._results.stop()
        if self._thread is not None:
            self._thread.join(CLOSE_SECONDS)
        with self._loading:
            if self._host is not None:
                self._host._close()

    def _run(self, previous: threading.Thread | None, results: Results, feed: Feed, want: Want | None) -> None:
        if previous is not None:
            previous.join()
        assert self._host is not None
        self._host.interrupt = results.check
        try:
            stream = self._host._generate_from(feed) if want is None else self._host._score(feed.items, want)
            with closing(stream):  # type: ignore[type-var]
                for item in stream:
                    results.put(item)
        except Stopped:
            results.end()
        except BaseException as error:  # it is raised where it is read
            results.end(Failure.of(error))
        else:
            results.end()
