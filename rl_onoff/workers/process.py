"""A worker's process: how it is started, what it leaves to read when it ends, and how nothing of it is left behind.

A worker leads a session of its own, by which its whole tree can be found even after the worker itself was killed and
its children were handed to init. Shared memory that dead processes had mapped goes too: SIGKILL leaves it behind.
"""

from __future__ import annotations

import getpass
import importlib.util
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import msgspec
import psutil

from rl_onoff.backends.devices import ANYWHERE, THREADS, Place, environment_for_python
from rl_onoff.backends.engine import Core
from rl_onoff.backends.engine_config import EngineConfig, PoolConfig
from rl_onoff.errors import UsageError
from rl_onoff.workers import wire

LOG_FOLDER = "RL_ONOFF_WORKER_LOGS"  # environment: where workers' logs are kept; unset: they go when the worker closes
TAIL_LINES = 25
LONGEST_TMPDIR = 60  # engines put sockets below it, whose paths hold 107 bytes
END_SECONDS = 2.0  # for killed processes to be gone
HELPERS = re.compile(r"resource_tracker|compile_worker|forkserver")  # Python's and torch's own: may end when they like
GONE = (psutil.NoSuchProcess, psutil.AccessDenied, ProcessLookupError, PermissionError)


class WorkerProcess:
    """Runs `python -m rl_onoff.workers.worker_main` in a session and a temporary folder of its own."""

    channel: wire.Channel
    deadline: float | None = None  # monotonic time by which the worker must have spoken

    def __init__(self, backend_class: type[Core], config: EngineConfig, place: Place = ANYWHERE):
        self.python = config.python or sys.executable
        try:  # a worker starts no pool and no worker of its own
            options = msgspec.msgpack.encode(replace(config, worker=False, python=None, dp_size=1, pool=PoolConfig()))
        except (TypeError, NotImplementedError) as why:
            what = "backend.engine_kwargs may only hold plain values when the engine runs in a worker"
            raise UsageError(f"{what}: {why}") from None
        packages = _packages(backend_class)
        base = tempfile.gettempdir()
        self._folder = Path(tempfile.mkdtemp(prefix="rl_onoff-", dir=base if len(base) < LONGEST_TMPDIR else "/tmp"))
        self.log = self._folder / "worker.log"
        if logs := os.environ.get(LOG_FOLDER):
            name = getattr(backend_class, "name", "engine")
            self.log = Path(logs) / f"{name}-{os.getpid()}-{self._folder.name.removeprefix('rl_onoff-')}.log"
            self.log.parent.mkdir(parents=True, exist_ok=True)
        ours, theirs = socket.socketpair()
        command = [self.python, "-m", "rl_onoff.workers.worker_main", str(theirs.fileno()), str(os.getpid()),
                   str(self._folder), backend_class.__module__, backend_class.__qualname__]  # fmt: skip
        with theirs, self.log.open("ab") as log, tempfile.TemporaryFile() as stdin:
            stdin.write(options)
            stdin.seek(0)
            try:
                self._popen = subprocess.Popen(
                    command, stdin=stdin, stdout=log, stderr=log, pass_fds=[theirs.fileno()], start_new_session=True,
                    env={**self._environment(packages), **place.environment},
                )  # fmt: skip
            except OSError as e:
                ours.close()
                shutil.rmtree(self._folder)
                why = f"backend.python={self.python} cannot be run ({e.strerror})"
                raise UsageError(f"{why}: set backend.python to a Python interpreter") from None
        self.pid = self._popen.pid
        if place.cores:
            with suppress(OSError):  # it is gone already
                os.sched_setaffinity(self.pid, place.cores)  # before it starts threads, which inherit it
        self._process = psutil.Process(self.pid)
        self.channel = wire.Channel(ours, self.check)
        self._memory: set[Path] = set()
        self._finalizer = weakref.finalize(self, _end, self._popen, self._folder, os.getpid(), self._memory)

    def _environment(self, packages: list[Path]) -> dict[str, str]:
        """The child's environment. It sees these packages, not their neighbours: another environment has its own."""
        path = self._folder / "path"
        path.mkdir()
        for package in packages:
            (path / package.name).symlink_to(package)
        return {
            **THREADS,
            # sockets and files the engine leaves go with the folder; what torch compiled is worth keeping
            "TORCHINDUCTOR_CACHE_DIR": str(Path(tempfile.gettempdir()) / f"torchinductor_{getpass.getuser()}"),
            **environment_for_python(self.python, path),
            "PYTHONUNBUFFERED": "1",
            "TMPDIR": str(self._folder),
        }

    def check(self) -> None:
        """Raise PeerGoneError when the process has ended, or has not spoken in time."""
        if self._ended() or (self.deadline is not None and time.monotonic() > self.deadline):
            raise wire.PeerGoneError

    def _ended(self) -> bool:
        return not alive(self._process)

    def wait(self, seconds: float) -> None:
        """Wait for the process to end; what it still sends is read and dropped, so that it gets to its end."""
        until, dropped = time.monotonic() + seconds, memoryview(bytearray(1 << 20))
        while alive(self._process) and time.monotonic() < until:
            try:
                if self.channel.readable(0.02):
                    self.channel.read(dropped)
            except wire.PeerGoneError:
                time.sleep(0.01)

    def remember(self) -> None:
        """Note the shared memory that the worker has now, to be removed when the worker has ended."""
        self._memory |= shared_memory(tree(self.pid))

    def reason(self) -> str:
        """Why the process is gone, for people."""
        self.wait(2.0)
        with suppress(OSError):
            return (self._folder / "reason").read_text()
        try:
            code = self._popen.wait(2.0)  # a zombie whose threads are still ending cannot be reaped yet
        except subprocess.TimeoutExpired:
            return "its process closed the connection"
        if code >= 0:
            return f"its process ended with exit code {code}"
        memory = ", maybe for want of memory" if code == -signal.SIGKILL else ""
        return f"its process was killed by {signal.Signals(-code).name}{memory}"

    def tail(self) -> str:
        """The last lines of the worker's log."""
        with suppress(OSError), self.log.open("rb") as f:
            f.seek(max(0, self.log.stat().st_size - 16384))
            return "\n".join(f.read().decode(errors="replace").splitlines()[-TAIL_LINES:])
        return ""

    def close(self, patience: float) -> None:
        """Ask the worker to end, then end what is left after `patience` seconds; at once if the worker never spoke."""
        if self.deadline is None and not self.channel.torn:
            self.remember()
            with suppress(wire.PeerGoneError):
                self.channel.send(wire.Close())
                self.wait(patience)
        self.channel.close()
        self._finalizer()


def _packages(backend_class: type[Core]) -> list[Path]:
    """Where this package is, and the module or package that the backend's class is from."""
    found = []
    for name in {"rl_onoff", backend_class.__module__.partition(".")[0]}:
        spec = importlib.util.find_spec(name) if name != "__main__" else None
        if spec is None or spec.origin is None:
            what = f"{backend_class.__qualname__} is defined in {name}"
            raise UsageError(f"{what}, which a worker cannot import: put it in a module")
        found.append(Path(spec.origin).parent if spec.submodule_search_locations else Path(spec.origin))
    return found


def _end(popen: subprocess.Popen[bytes], folder: Path, owner: int, memory: set[Path]) -> None:
    if os.getpid() != owner:
        return  # a fork of the process that started it
    end(tree(popen.pid), memory)
    with suppress(subprocess.TimeoutExpired):
        popen.wait(5)
    shutil.rmtree(folder, ignore_errors=True)


def alive(process: psutil.Process) -> bool:
    """True unless the process has ended; a zombie has ended."""
    with suppress(*GONE):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def tree(pid: int) -> set[psutil.Process]:
    """A worker, its descendants and its session: together they hold whatever it started."""
    found = set()
    for process in psutil.process_iter():
        with suppress(*GONE):
            if os.getsid(process.pid) == pid:
                found.add(process)
    with suppress(psutil.Error):
        worker = psutil.Process(pid)
        found |= {worker, *worker.children(recursive=True)}
    return found


def is_helper(process: psutil.Process) -> bool:
    with suppress(*GONE):
        return bool(HELPERS.search(" ".join(process.cmdline())))
    return True


def end(processes: Iterable[psutil.Process], memory: Iterable[Path] = (), *, last_act: bool = False) -> None:
    """Kill the processes, and remove the shared memory that they alone had mapped, now or before (`memory`).

    Resource trackers get a moment after the others: they unlink what their dead processes left. `last_act`: this
    process ends right after, so what it has mapped itself may go too.
    """
    victims = set(filter(alive, processes))
    shared = {*memory, *shared_memory(victims)}
    helpers = set(filter(is_helper, victims))
    for killed in (victims - helpers, helpers):
        for process in killed:
            with suppress(*GONE):
                process.kill()
        until = time.monotonic() + END_SECONDS
        while any(map(alive, victims)) and time.monotonic() < until:
            time.sleep(0.02)
    if left := {path for path in shared if path.exists()}:
        others = (process for process in psutil.process_iter() if not last_act or process.pid != os.getpid())
        for path in left - shared_memory(others):
            path.unlink(missing_ok=True)


def shared_memory(processes: Iterable[psutil.Process]) -> set[Path]:
    """Files under /dev/shm that the processes have mapped.

    Found by their inodes: a semaphore is mapped under a name that is gone. Engines may end their own processes so
    that nothing is left to ask, resource trackers included: remember it while they live.
    """
    inodes: set[int] = set()
    for process in processes:
        with suppress(OSError):  # gone, not ours, or no /proc
            for line in Path(f"/proc/{process.pid}/maps").read_text().splitlines():
                if "/dev/shm/" in line:
                    inodes.add(int(line.split(maxsplit=5)[4]))
    if not inodes:
        return set()
    with os.scandir("/dev/shm") as entries:
        return {Path(entry.path) for entry in entries if entry.inode() in inodes}
