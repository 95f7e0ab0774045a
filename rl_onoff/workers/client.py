"""An engine in a process of its own, maybe under another interpreter: the parent's side.

So that a crashed engine is an exception and not the end of the run, its memory is really freed between jobs, and engines
whose dependencies clash serve one experiment. `Host` is a `Core`: `_load`, `_generate`, `_score`, `_close`, like an engine
in this process. The parent never hangs on a dead engine and is never killed by one: the worker leads its own session.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from rl_onoff import errors
from rl_onoff.backends.engine import Core, EngineInfo, Supply
from rl_onoff.backends.engine_config import EngineConfig, PoolConfig
from rl_onoff.errors import EngineDiedError, EngineError, MissingDependencyError, OnOffError, UsageError
from rl_onoff.types import Key, Rollout, TokenScores, Want
from rl_onoff.workers import wire
from rl_onoff.workers.devices import ANYWHERE, Place
from rl_onoff.workers.process import LOG_FOLDER, WorkerProcess
from rl_onoff.workers.refill import Refill

HELLO_SECONDS = 120.0  # from starting the interpreter to its first words; a cold network disk is slow
CLOSE_SECONDS = 10.0  # for an engine to free itself before it is killed
BUSY_CLOSE_SECONDS = 2.0  # the same, in the middle of work nobody wants any more
PERIOD = 0.2  # seconds between two looks at whether the worker lives
STILL_SECONDS = 20.0  # between two words about a load that takes long

log = logging.getLogger(__name__)

Error = TypeVar("Error", bound=OnOffError)


class Host:
    """Runs one backend in a worker process. One call at a time; a new call drops what an older one had not yielded."""

    def __init__(
        self,
        backend_class: type[Core],
        config: EngineConfig,
        log_folder: Path | str | None = None,
        place: Place = ANYWHERE,
    ):
        self._class, self._config, self._place = backend_class, config, place
        self.interrupt: Callable[[], None] = lambda: None  # called now and then while waiting for the worker; may raise
        self._log_folder = log_folder or os.environ.get(LOG_FOLDER)
        self._worker: WorkerProcess | None = None
        self._call = 0  # the number of the latest call
        self._open = False  # whether the latest call has not ended yet
        self._in_flight: set[Key] = set()

    @property
    def pid(self) -> int | None:
        """The worker's process id, None when it is not running."""
        return self._worker.pid if self._worker else None

    @property
    def is_alive(self) -> bool:
        """Whether the worker runs, as far as can be told without asking it."""
        if self._worker is None or self._worker.channel.torn:
            return False
        with suppress(wire.PeerGoneError):
            self._worker.check()
            return True
        return False

    # -- the core ------------------------------------------------------------------------------------------------------

    def _load(self) -> EngineInfo:
        config = dataclasses.asdict(
            dataclasses.replace(self._config, pool=PoolConfig())
        )  # a worker starts no pool of its own
        if why := wire.fits(config):
            raise UsageError(
                f"backend.engine_kwargs may only hold plain values when the engine runs in a worker: {why}"
            )
        self._worker = WorkerProcess(self._class, self._config.python, self._log_folder, self._place)
        try:
            self._hello()
            self._send(wire.Load(target=f"{self._class.__module__}:{self._class.__qualname__}", config=config))
            reply = self._receive(Patience(self._config.name, self._worker.log).say)
            if isinstance(reply, wire.Failed):
                raise self._error(reply)
        except BaseException:
            self._close()
            raise
        assert isinstance(reply, wire.Loaded)
        self._worker.remember()
        return reply.info

    def _generate(self, supply: Supply, room: int = 1 << 30) -> Iterator[Rollout]:
        """Sample what the supply gives while it gives; at most `room` requests are with the worker at a time."""
        refill = Refill(supply, room)
        requests, last = refill.take()
        if last:
            return
        for reply in self._stream(
            lambda call: wire.Generate(call=call, requests=wire.Requests.pack(requests)), refill.keys, refill
        ):
            assert isinstance(reply, wire.Completed)
            yield reply.rollout

    def _score(self, rollouts: Sequence[Rollout], want: Want) -> Iterator[TokenScores]:
        keys = {rollout.key for rollout in rollouts}
        for reply in self._stream(lambda call: wire.Score(call=call, rollouts=list(rollouts), want=want), keys):
            assert isinstance(reply, wire.Scored)
            yield reply.scores

    def _close(self) -> None:
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.close(BUSY_CLOSE_SECONDS if self._open else CLOSE_SECONDS)
        self._open = False

    # -- calls ---------------------------------------------------------------------------------------------------------

    def _stream(
        self, message: Any, keys: set[Key], refill: Refill | None = None
    ) -> Iterator[wire.Completed | wire.Scored]:
        self._settle()
        self._call += 1
        call, self._open, self._in_flight = self._call, True, keys
        self._send(message(call))
        try:
            while True:
                if self._call != call:
                    raise EngineError(
                        "another call to this backend began before this one was read to its end: read it first"
                    )
                reply = self._receive()
                match reply:
                    case wire.Completed():
                        keys.discard(reply.rollout.key)
                        yield reply
                        if refill is not None and refill.is_due and self._call == call:
                            requests, last = refill.take()
                            if requests or last:
                                self._send(wire.More(call=call, requests=wire.Requests.pack(requests), last=last))
                    case wire.Scored():
                        keys.discard(reply.scores.key)
                        yield reply
                    case wire.Failed():
                        self._open = False
                        raise self._error(reply)
                    case _:
                        self._open = False
                        break
        finally:
            self._cancel(call)
        if keys:
            raise EngineError(
                f"{self._config.name} gave no result for {len(keys)} of the responses, {sorted(keys)[0]} first"
            )

    def _cancel(self, call: int) -> None:
        """Tell the worker that nobody reads the call's results any more; what it has sent is dropped by the next call."""
        if self._open and self._call == call and self._worker is not None and not self._worker.channel.torn:
            with suppress(EngineDiedError):
                self._send(wire.Cancel(call=call))

    def _settle(self) -> None:
        """Wait for the end of a call that was abandoned."""
        self._cancel(self._call)
        while self._open:
            reply = self._receive()
            self._open = not isinstance(reply, wire.Done | wire.Failed)

    # -- messages ------------------------------------------------------------------------------------------------------

    def _hello(self) -> None:
        worker, want = self._alive(), wire.PREAMBLE % wire.PROTOCOL
        worker.deadline = time.monotonic() + HELLO_SECONDS
        try:
            got = bytes(worker.channel.receive_raw(len(want))).decode(errors="replace")
        except wire.PeerGoneError:
            worker.wait(0.5)
            last = next((line for line in reversed(worker.tail().splitlines()) if line.strip()), "it said nothing")
            kind = MissingDependencyError if last.startswith(("ModuleNotFoundError", "ImportError")) else UsageError
            raise self._noted(
                kind(
                    f"backend.python={worker.python} cannot run a worker of rl_onoff ({last}): set backend.python to a Python "
                    "interpreter that has the engine and rl_onoff's own dependencies"
                )
            ) from None
        if got != want:
            theirs = got.split()[-1].lstrip("0") if got.split() else "?"
            raise EngineError(
                f"the worker under backend.python={worker.python} speaks version {theirs} of the worker protocol and this process "
                f"version {wire.PROTOCOL}: install the same version of rl_onoff in both"
            )
        worker.deadline = None

    def _send(self, message: wire.AnyMessage) -> None:
        worker = self._alive()
        try:
            worker.channel.send(message)
        except wire.PeerGoneError:
            raise self._died() from None

    def _receive(self, meanwhile: Callable[[], None] = lambda: None) -> wire.AnyMessage:
        """The worker's next message; `meanwhile` is called now and then while there is none."""
        worker = self._alive()
        while True:
            try:
                while not worker.channel.readable(
                    PERIOD
                ):  # between two messages: here alone can a call be left without harm
                    worker.check()
                    self.interrupt()
                    meanwhile()
                message = worker.channel.receive()
            except wire.PeerGoneError:
                raise self._died() from None
            if not isinstance(message, wire.Logged):
                return message
            logging.getLogger(message.logger).log(message.level, message.text)

    def _alive(self) -> WorkerProcess:
        if self._worker is None:
            raise EngineDiedError(f"the {self._config.name} engine is not running: load the backend again")
        if self._worker.channel.torn:
            self._close()
            raise EngineError(
                f"the last call to the {self._config.name} engine was interrupted in the middle: load the backend again"
            )
        return self._worker

    # -- errors --------------------------------------------------------------------------------------------------------

    def _error(self, failed: wire.Failed) -> OnOffError:
        kind = getattr(errors, failed.error, EngineError)
        text = failed.text
        if self._config.python is not None and kind is MissingDependencyError:
            text += f" (in the environment of backend.python={self._config.python})"
        return self._noted(kind(text))

    def _died(self) -> EngineDiedError:
        """The error of a dead worker; ends what is left of it."""
        worker, in_flight = self._worker, tuple(sorted(self._in_flight if self._open else ()))
        assert worker is not None
        reason = worker.reason()
        error = self._noted(death(self._config.name, reason, in_flight))
        self._open = False
        self._close()
        return error

    def _noted(self, error: Error) -> Error:
        """The error with the tail of the worker's log as a note, so that its message stays one sentence."""
        worker = self._worker
        if worker is not None and (tail := worker.tail()):
            kept = f" ({worker.log})" if self._log_folder else ""
            error.add_note(f"The end of the worker's log{kept}:\n{tail}")
        return error


class Patience:
    """Says now and then that an engine is still loading, and where its own words are: a large model takes minutes."""

    def __init__(self, name: str, worker_log: Path):
        self._name, self._worker_log = name, worker_log
        self._began = self._said = time.monotonic()

    def say(self) -> None:
        now = time.monotonic()
        if now - self._said >= STILL_SECONDS:
            self._said = now
            where = f"; what it says: tail -f {self._worker_log}" if os.access(self._worker_log, os.R_OK) else ""
            log.info("still loading %s after %.0f s%s", self._name, now - self._began, where)


def death(name: str, reason: str, in_flight: tuple[Key, ...]) -> EngineDiedError:
    """The error of an engine that is gone with what it had not answered."""
    lost = f" with {len(in_flight)} responses in flight" if in_flight else ""
    return EngineDiedError(f"the {name} engine died{lost} ({reason}): run it again to go on", in_flight)
