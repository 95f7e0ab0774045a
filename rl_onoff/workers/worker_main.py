"""The worker's side: `python -m rl_onoff.workers.worker_main FD PARENT_PID FOLDER MODULE CLASS` serves one backend.

The backend's config comes on the standard input. Started by process.py, maybe under another interpreter, so nothing
here may import more than the backend needs. Errors travel by name; the engine's chatter stays in this process's log
file; warnings of rl_onoff itself are handed to the parent.
"""

from __future__ import annotations

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
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from importlib import import_module
from logging.handlers import QueueHandler
from pathlib import Path
from typing import Any, NoReturn

import msgspec
import psutil

from rl_onoff.backends.engine import taken
from rl_onoff.errors import named
from rl_onoff.types import SampleRequest
from rl_onoff.workers import process, wire

DIED = 70  # exit code when a process of the engine died; the file `reason` says which


class Watchdog(threading.Thread):
    """Ends this process when its parent, or a process of the engine, is gone: an engine that lost one may hang."""

    def __init__(self, parent: int, folder: Path):
        super().__init__(daemon=True, name="watchdog")
        self._parent, self._folder = parent, folder
        self._engine: list[psutil.Process] | None = None  # its processes that must live; None: it still loads
        self.memory: set[Path] = set()
        self._lock = threading.Lock()

    def run(self) -> None:
        for tick in itertools.count():
            if os.getppid() != self._parent:
                self.end_all()
            self.check()
            if self._engine is None and tick % 3 == 0:
                self._note()  # an engine that starts, fails and is started again may leave what the first one had
            time.sleep(0.3)

    def loaded(self) -> None:
        """From now on the processes that the engine has at this moment must live."""
        self._engine = [child for child in self._note() if not process.is_helper(child)]

    def closing(self) -> None:
        """From now on the engine's processes may end."""
        self._note()
        self._engine = []

    def _note(self) -> list[psutil.Process]:
        """Remember the shared memory of this moment, to be removed at the end; returns this process's descendants."""
        me = psutil.Process()
        children = me.children(recursive=True)
        self.memory = self.memory | process.shared_memory([me, *children])  # a new set: two threads read it
        return children

    def check(self) -> None:
        """End this process if one of the engine's is gone."""
        with self._lock:
            for child in self._engine or ():
                if not process.alive(child):
                    who = f"pid {child.pid}"
                    with suppress(*process.GONE):
                        who += f" ({child.name()})"
                    (self._folder / "reason").write_text(f"its {who} ended unexpectedly")
                    os._exit(DIED)

    def end_all(self) -> NoReturn:
        """End the engine's processes, then this one: no parent is there to do so."""
        shutil.rmtree(self._folder, ignore_errors=True)
        self._note()
        process.end(process.tree(os.getpid()) - {psutil.Process()}, self.memory, last_act=True)
        os._exit(0)


class Worker:
    """Serves one backend: loads it, and answers calls one after the other."""

    def __init__(self, sock: socket.socket, watchdog: Watchdog):
        self._watchdog, self._channel = watchdog, wire.Channel(sock)
        self._channel.send_raw((wire.PREAMBLE % wire.PROTOCOL).encode())
        self._inbox: queue.SimpleQueue[wire.ToWorker] = queue.SimpleQueue()
        threading.Thread(target=self._listen, daemon=True, name="inbox").start()
        self._warnings: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()  # the thread that sends takes them
        handler = QueueHandler(self._warnings)  # type: ignore[arg-type]
        handler.setLevel(logging.WARNING)
        handler.setFormatter(logging.Formatter())  # the message alone
        logging.getLogger("rl_onoff").addHandler(handler)
        self._call = 0  # the call that is being answered
        self._requests: deque[Any] = deque()  # of this call, not yet taken by the engine
        self._last = False  # no further requests of this call will come
        self._unwanted = False  # nobody reads the results of this call
        self._closing = False

    def serve(self, module: str, name: str) -> None:
        try:
            cls = getattr(import_module(module), name)
            backend = cls(msgspec.msgpack.decode(sys.stdin.buffer.read(), type=cls.config_class))
            backend.load()
        except BaseException as e:
            return self._fail(e)
        self._watchdog.loaded()
        self._send(backend.info)
        while not self._closing:
            match self._inbox.get():
                case wire.Assignment() as message if message.call > self._call:
                    self._requests, self._last, want = deque(message.work), message.last, message.want
                    results = backend._generate(self) if want is None else backend._score(message.work, want)
                    self._answer(message.call, results)
                case wire.Close():
                    break
        self._watchdog.closing()
        backend.close()

    def take(self, most: int | None = None, *, wait: bool) -> list[SampleRequest]:
        """Requests of the call that is being answered: this is the engine's `Supply`."""
        self._read()
        while wait and not (self._requests or self._last or self._unwanted):
            self._read(wait=True)
        return [] if self._unwanted else taken(self._requests, most)

    def _answer(self, call: int, results: Iterator[Any]) -> None:
        """Send a call's results as they come, until they end or the parent does not want them any more."""
        self._call, self._unwanted = call, False
        try:
            for result in results:
                self._send(result)
                self._read()
                if self._unwanted:
                    results.close()  # type: ignore[attr-defined]
                    break
        except wire.PeerGoneError:
            raise
        except BaseException as e:
            self._fail(e)
        else:
            self._send(wire.End())

    def _listen(self) -> None:
        """Take in what the parent sends, whatever the engine does: where both send, each waits for the other to read,
        and neither would ever go on without a thread for it. Without a parent nothing goes on."""
        try:
            while True:
                self._inbox.put(self._channel.receive())
        except wire.PeerGoneError:
            pass
        except BaseException:
            traceback.print_exc()
        self._watchdog.end_all()

    def _read(self, *, wait: bool = False) -> None:
        """Look at what the parent has said in the middle of a call; `wait` for it to say something."""
        while wait or not self._inbox.empty():
            wait, message = False, self._inbox.get()
            match message:
                case wire.Assignment() if message.call == self._call:
                    self._requests.extend(message.work)
                    self._last = message.last
                case wire.Cancel() if message.call == self._call:
                    self._unwanted = True
                case wire.Close():
                    self._closing = self._unwanted = True

    def _send(self, message: wire.FromWorker) -> None:
        while not self._warnings.empty():
            self._channel.send(self._warnings.get())
        self._channel.send(message)

    def _fail(self, error: BaseException) -> None:
        traceback.print_exception(error)
        sys.stderr.flush()
        self._watchdog.check()  # an engine that lost a process may say so itself before the watchdog does
        self._send(wire.End(*named(error)))


def main() -> None:
    fd, parent, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    faulthandler.enable()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's: it closes the worker
    os.set_inheritable(fd, False)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    watchdog = Watchdog(parent, folder)
    watchdog.start()
    try:
        Worker(socket.socket(fileno=fd), watchdog).serve(*sys.argv[4:])
    except wire.PeerGoneError:
        watchdog.end_all()
    process.end([], watchdog.memory, last_act=True)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # an engine's exit handlers may hang, and the parent ends what is left


if __name__ == "__main__":
    main()
