"""Finding and ending every process of a worker, the engine's own children included, whatever state they are in.

A worker leads a session of its own, so its whole tree can be found by that session even after the worker itself was
killed and its children were handed to init. Shared memory that dead processes had mapped is removed too: SIGKILL
leaves it behind.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import psutil

GONE = (psutil.NoSuchProcess, psutil.AccessDenied, ProcessLookupError, PermissionError)
HELPERS = re.compile(r"resource_tracker|compile_worker|forkserver")  # Python's and torch's own: may end when they like
END_SECONDS = 2.0  # for killed processes to be gone


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
    left = {path for path in shared if path.exists()}
    if left:
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
