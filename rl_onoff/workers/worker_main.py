"""The worker's side: `python -m rl_onoff.workers.worker_main SOCKET_FD PARENT_PID FOLDER` serves one backend until it is told to close.

Started by host.py, maybe under another interpreter, so nothing here may import more than the backend needs. Errors travel
by name; the engine's chatter stays in this process's log file; warnings of rl_onoff itself are handed to the parent.
"""

from __future__ import annotations

import collections
import dataclasses
import faulthandler
import itertools
import logging
import os
import queue
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import msgspec
import psutil

from rl_onoff.backends.engine import taken
from rl_onoff.errors import named
from rl_onoff.types import Rollout, SampleRequest, TokenScores
from rl_onoff.workers import sessions, wire
from rl_onoff.workers.forward import Forward

DIED = 70  # exit code when a process of the engine died; the file `reason` says which


class Watch(threading.Thread):
    """Ends this process when its parent is gone, or when a process of the engine is: an engine that lost one may hang."""

    def __init__(self, parent: int, folder: Path):
        super().__init__(daemon=True, name="watch")
        self._parent, self._folder = parent, folder
        self._engine: list[psutil.Process] = []
        self._memory: set[Path] = set()
        self._loaded = False
        self._lock = threading.Lock()

    def run(self) -> None:
        for tick in itertools.count():
            if os.getppid() != self._parent:
                self.end_all()
            self.check()
            if not self._loaded and tick % 3 == 0:
                self._note()  # an engine that starts, fails and is started again may leave what the first one had
            time.sleep(0.3)

    def loaded(self) -> None:
        """From now on the engine's processes of this moment must live."""
        self._loaded = True
        self._engine = [child for child in self._note() if not sessions.is_helper(child)]

    def closing(self) -> None:
        self._note()
        self._engine = []

    def _note(self) -> list[psutil.Process]:
        """Remember the shared memory of this moment, to be removed at the end; returns this process's descendants."""
        children = psutil.Process().children(recursive=True)
        self._memory = self._memory | sessions.shared_memory(
            [psutil.Process(), *children]
        )  # a new set: two threads read it
        return children

    def tidy(self) -> None:
        """Remove the shared memory that the engine left."""
        sessions.end([], self._memory, last_act=True)

    def check(self) -> None:
        with self._lock:
            for process in self._engine:
                if not sessions.alive(process):
                    (self._folder / "reason").write_text(f"its {sessions.describe(process)} ended unexpectedly")
                    os._exit(DIED)

    def end_all(self) -> NoReturn:
        """Nobody is there to clean up: end the engine's processes, then this one."""
        shutil.rmtree(self._folder, ignore_errors=True)
        me = psutil.Process()
        sessions.end([p for p in (*self._note(), *sessions.members(me.pid)) if p != me], self._memory, last_act=True)
        os._exit(0)


class Inbox(threading.Thread):
    """Takes in what the parent sends, whatever the engine does: a parent that sends more requests while its worker sends results waits
    for the worker to read, as the worker does for it, and neither would ever go on."""

    def __init__(self, channel: wire.Channel):
        super().__init__(daemon=True, name="inbox")
        self._channel = channel
        self._messages: queue.SimpleQueue[wire.AnyMessage | BaseException] = queue.SimpleQueue()

    def run(self) -> None:
        try:
            while True:
                self._messages.put(self._channel.receive())
        except BaseException as error:  # it is raised where it is read
            self._messages.put(error)

    def next(self, *, wait: bool) -> wire.AnyMessage | None:
        """The next message; None when there is none now. Raises PeerGoneError once the parent is gone."""
        try:
            message = self._messages.get(block=wait)
        except queue.Empty:
            return None
        if isinstance(message, BaseException):
            self._messages.put(message)
            raise message
        return message


class Feed:
    """A call's requests, as they come."""

    def __init__(self, worker: Worker, message: wire.Generate):
        self._worker, self._call = worker, message.call
        self._requests = collections.deque(message.requests.unpack())
        self._last = False

    def add(self, message: wire.More) -> None:
        self._requests.extend(message.requests.unpack())
        self._last = message.last

    def take(self, most: int | None = None, *, wait: bool) -> list[SampleRequest]:
        self._worker.read(self._call)
        while wait and not (self._requests or self._last or self._worker.unwanted):
            self._worker.read(self._call, wait=True)
        return [] if self._worker.unwanted else taken(self._requests, most)


class Worker:
    def __init__(self, sock: socket.socket, watch: Watch):
        self._watch = watch
        self._channel = wire.Channel(sock)
        self._channel.send_raw((wire.PREAMBLE % wire.PROTOCOL).encode())
        self._inbox = Inbox(self._channel)
        self._inbox.start()
        self._forward = Forward()
        self._feed: Feed | None = None  # of the call that is being answered, if it may get more requests
        self._closing = False
        self.unwanted = False  # nobody reads the results of the call that is being answered

    def serve(self) -> None:
        backend = self._load()
        if backend is None:
            return
        while not self._closing:
            match self._inbox.next(wait=True):
                case wire.Generate() as message:
                    self._feed = Feed(self, message)
                    self._answer(message.call, backend._generate(self._feed))
                    self._feed = None
                case wire.Score() as message:
                    self._answer(message.call, backend._score(message.rollouts, message.want))
                case wire.Cancel() | wire.More():
                    pass  # it crossed with the end of its call
                case _:
                    break
        self._watch.closing()
        backend.close()

    def _load(self) -> Any:
        message = self._inbox.next(wait=True)
        assert isinstance(message, wire.Load)
        try:
            module, _, name = message.target.partition(":")
            cls = getattr(import_module(module), name)
            config = msgspec.convert(message.config, cls.config_class)
            backend = cls(dataclasses.replace(config, worker=False, python=None, dp_size=1))
            backend.load()
        except BaseException as e:
            self._fail(0, e)
            return None
        self._watch.loaded()
        self._send(wire.Loaded(info=backend.info))
        return backend

    def _answer(self, call: int, results: Iterator[Any]) -> None:
        """Send a call's results as they come, until they end or the parent does not want them any more."""
        self.unwanted = False
        try:
            for result in results:
                match result:
                    case Rollout():
                        self._send(wire.Completed(call=call, rollout=result))
                    case TokenScores():
                        self._send(wire.Scored(call=call, scores=result))
                    case _:
                        raise TypeError(f"a backend yielded a {type(result).__name__}")
                self.read(call)
                if self.unwanted:
                    results.close()  # type: ignore[attr-defined]
                    break
        except wire.PeerGoneError:
            raise
        except BaseException as e:
            self._fail(call, e)
        else:
            self._send(wire.Done(call=call))

    def read(self, call: int, *, wait: bool = False) -> None:
        """Take in what the parent has said in the middle of a call; `wait` for it to say something."""
        while (message := self._inbox.next(wait=wait)) is not None:
            wait = False
            match message:
                case wire.More() if message.call == call and self._feed is not None:
                    self._feed.add(message)
                case wire.Cancel() if message.call == call:
                    self.unwanted = True
                case wire.Close():
                    self._closing = self.unwanted = True

    def _send(self, message: wire.AnyMessage) -> None:
        for logger, level, text in self._forward.lines():
            self._channel.send(wire.Logged(logger=logger, level=level, text=text))
        self._channel.send(message)

    def _fail(self, call: int, error: BaseException) -> None:
        traceback.print_exception(error)
        sys.stderr.flush()
        self._watch.check()  # an engine that lost a process may say so itself before the watch does
        name, text = named(error)
        self._send(wire.Failed(call=call, error=name, text=text))


def main() -> None:
    fd, parent, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    faulthandler.enable()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's: it closes the worker
    os.set_inheritable(fd, False)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    watch = Watch(parent, folder)
    watch.start()
    try:
        Worker(socket.socket(fileno=fd), watch).serve()
    except wire.PeerGoneError:
        watch.end_all()
    watch.tidy()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # an engine's exit handlers may hang, and the parent ends what is left


if __name__ == "__main__":
    main()
