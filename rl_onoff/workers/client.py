"""The parent's side of an engine that runs in a worker process, maybe under another interpreter or on another machine.

A crashed engine is then an exception and not the end of the run, its memory is really freed between jobs, and engines
whose dependencies clash serve one experiment. The parent never hangs on a dead engine and is never killed by one.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from logging import LogRecord
from typing import Any

from rl_onoff import errors
from rl_onoff.backends.devices import ANYWHERE, Place
from rl_onoff.backends.engine import Core, EngineInfo, Supply
from rl_onoff.backends.engine_config import EngineConfig
from rl_onoff.errors import EngineDiedError, EngineError, MissingDependencyError, OnOffError, UsageError, plural
from rl_onoff.types import Key, Rollout, TokenScores, Want
from rl_onoff.workers import wire
from rl_onoff.workers.process import LOG_FOLDER, WorkerProcess

HELLO_SECONDS = 120.0  # from starting the interpreter to its first words; a cold network disk is slow
CLOSE_SECONDS = 10.0  # for an engine to free itself before it is killed
BUSY_CLOSE_SECONDS = 2.0  # the same, in the middle of work nobody wants any more
STILL_SECONDS = 20.0  # between two log lines about a load that takes long
DISPLACED = "another call to this backend began before this one was read to its end: read it first"
NOT_RUNNING = "the {} engine is not running: load the backend again"
RUN_AGAIN = ": run it again to go on"

log = logging.getLogger(__name__)


class WorkerClient:
    """A `Core` that runs in a worker. One call at a time; a new call drops what an older one had not yielded."""

    def __init__(self, backend_class: type[Core], config: EngineConfig, place: Place = ANYWHERE):
        self._class, self._config, self._place = backend_class, config, place
        self.interrupt: Callable[[], None] = lambda: None  # called now and then while waiting for the worker; may raise
        self._worker: WorkerProcess | None = None
        self._call = 0  # the number of the latest call
        self._open = False  # whether the latest call has not ended yet
        self._in_flight: set[Key] = set()  # the responses of the latest call that have not come back

    @property
    def pid(self) -> int | None:
        """The worker's process id on its machine, None when it is not running."""
        return self._worker.pid if self._worker else None

    @property
    def is_alive(self) -> bool:
        """Whether the worker runs, as far as can be told without asking it."""
        with suppress(wire.PeerGoneError):
            if self._worker is not None and not self._worker.channel.torn:
                self._worker.check()
                return True
        return False

    def _start(self) -> WorkerProcess:
        return WorkerProcess(self._class, self._config, self._place)

    def _begin(self) -> None:
        self._worker = self._start()
        self._worker.deadline = time.monotonic() + HELLO_SECONDS  # one that has not spoken is ended without being asked

    def _load(self) -> EngineInfo:
        if self._worker is None:
            self._begin()
        worker = self._alive()
        try:
            self._hello()
            reply = self._receive(loading=True)
            if isinstance(reply, wire.End):
                raise self._error(reply)
        except BaseException:
            self._close()
            raise
        worker.remember()
        return reply

    def _generate(self, supply: Supply, room: int = 1 << 30) -> Iterator[Rollout]:
        """Sample what the supply gives while it gives; at most `room` requests are with the worker at a time."""
        yield from self._stream(supply.take(room, wait=True), None, supply, room)

    def _score(self, rollouts: Sequence[Rollout], want: Want) -> Iterator[TokenScores]:
        yield from self._stream(rollouts, want)

    def _close(self) -> None:
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.close(BUSY_CLOSE_SECONDS if self._open else CLOSE_SECONDS)
        self._open = False

    def _stream(
        self, work: Sequence[wire.Work], want: Want | None, supply: Supply | None = None, room: int = 0
    ) -> Iterator[Any]:
        """The results of one call. The worker gets more from the supply while half of what it may have is still with
        it, so that its engine never runs dry."""
        if not work:
            return
        self._alive()
        self._cancel(self._call)
        while self._open:  # a call that was abandoned has not ended
            self._open = not isinstance(self._receive(), wire.End)
        self._call += 1
        call, self._open = self._call, True
        keys = self._in_flight = {one.key for one in work}
        self._send(wire.Assignment(call, work, want, last=supply is None))
        try:
            while not isinstance(reply := self._receive(), wire.End):
                keys.discard(reply.key)
                yield reply
                if self._call != call:
                    raise EngineError(DISPLACED)
                if supply is not None and len(keys) <= room // 2:
                    further = supply.take(room - len(keys), wait=not keys)
                    keys.update(request.key for request in further)
                    if further or not keys:  # not keys: the supply gave none after a wait
                        self._send(wire.Assignment(call, further, want, last=not keys))
                    supply = supply if keys else None
            self._open = False
            if reply.error:
                raise self._error(reply)
        finally:
            self._cancel(call)
        if keys:
            name, first = self._config.name, min(keys)
            raise EngineError(f"{name} gave no result for {len(keys)} of the responses, {first} first")

    def _cancel(self, call: int) -> None:
        """Tell the worker that nobody reads the call's results any more; the next call drops what was sent of them."""
        if self._open and self._call == call and self._worker is not None and not self._worker.channel.torn:
            with suppress(EngineDiedError):
                self._send(wire.Cancel(call))

    def _hello(self) -> None:
        """Wait for the worker's first words. Raises where its interpreter cannot run a worker of this version."""
        worker, want = self._alive(), wire.PREAMBLE % wire.PROTOCOL
        worker.deadline = time.monotonic() + HELLO_SECONDS
        try:
            got = bytes(worker.channel.receive_raw(len(want))).decode(errors="replace")
        except wire.PeerGoneError:
            worker.wait(0.5)
            last = next((line for line in reversed(worker.tail().splitlines()) if line.strip()), "it said nothing")
            kind = MissingDependencyError if last.startswith(("ModuleNotFoundError", "ImportError")) else UsageError
            why = f"backend.python={worker.python} cannot run a worker of rl_onoff ({last})"
            fix = "set backend.python to a Python interpreter that has the engine and rl_onoff's own dependencies"
            raise self._noted(kind(f"{why}: {fix}")) from None
        if got != want:
            theirs = f"version {got.split()[-1].lstrip('0')} of the worker protocol" if got.split() else "nothing"
            what = f"the worker under backend.python={worker.python} speaks {theirs} and this process version"
            raise EngineError(f"{what} {wire.PROTOCOL}: install the same version of rl_onoff in both")
        worker.deadline = None

    def _send(self, message: wire.ToWorker) -> None:
        try:
            self._alive().channel.send(message)
        except wire.PeerGoneError:
            raise self._died() from None

    def _receive(self, *, loading: bool = False) -> Any:
        """What the worker says next. Its warnings are logged here; that it still loads is logged now and then."""
        worker, began, said = self._alive(), time.monotonic(), 0
        while True:
            try:  # a call can be left without harm between two messages alone
                while not worker.channel.readable(wire.PERIOD):
                    worker.check()
                    self.interrupt()
                    passed = time.monotonic() - began
                    if loading and passed >= (said + 1) * STILL_SECONDS:
                        said += 1
                        where = f"; what it says: tail -f {worker.log}" if os.access(worker.log, os.R_OK) else ""
                        log.info("still loading %s after %.0f s%s", self._config.name, passed, where)
                message = worker.channel.receive()
            except wire.PeerGoneError:
                raise self._died() from None
            if not isinstance(message, LogRecord):
                return message
            logging.getLogger(message.name).log(message.levelno, message.msg)

    def _alive(self) -> WorkerProcess:
        if self._worker is None:
            raise EngineDiedError(NOT_RUNNING.format(self._config.name))
        if self._worker.channel.torn:
            self._close()
            what = f"the last call to the {self._config.name} engine"
            raise EngineError(f"{what} was interrupted in the middle: load the backend again")
        return self._worker

    def _error(self, end: wire.End) -> OnOffError:
        kind, text = getattr(errors, end.error, EngineError), end.text
        if self._config.python is not None and kind is MissingDependencyError:
            text += f" (in the environment of backend.python={self._config.python})"
        return self._noted(kind(text))

    def _died(self) -> OnOffError:
        """The error of a dead worker; ends what is left of it."""
        assert self._worker is not None
        in_flight = tuple(sorted(self._in_flight if self._open else ()))
        lost = f" with {plural(len(in_flight), 'response')} in flight" if in_flight else ""
        text = f"the {self._config.name} engine died{lost} ({self._worker.reason()}){RUN_AGAIN}"
        error = self._noted(EngineDiedError(text, in_flight))
        self._open = False
        self._close()
        return error

    def _noted(self, error: OnOffError) -> OnOffError:
        """The error with the tail of the worker's log as a note, so that its message stays one sentence."""
        if self._worker is not None and (tail := self._worker.tail()):
            kept = f" ({self._worker.log})" if os.environ.get(LOG_FOLDER) else ""
            error.add_note(f"The end of the worker's log{kept}:\n{tail}")
        return error
