"""The Ray cluster of this process: how it is reached, and what a replica takes of it."""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, ClassVar

from rl_onoff.backends.devices import cores
from rl_onoff.backends.engine_config import EngineConfig, PoolConfig
from rl_onoff.errors import EngineError, MissingDependencyError, UsageError

log = logging.getLogger(__name__)

PROBE_SECONDS = 10.0  # for a cluster's name to be found and its port to answer
JOIN_SECONDS = 30.0  # to join a cluster
START_SECONDS = 180.0  # to start one
LEAVE_SECONDS = 20.0  # to end the connection; without its head that takes a minute, after which Ray ends the process
NODE = 0.001  # of a node's own resource: enough to be placed there

Resources = Mapping[str, float]  # amounts by name: CPU, GPU, node:ADDRESS


class Connection:
    """Ray in this process, begun and ended in a thread of its own.

    `ray.init` may hang, puts its own handler of SIGTERM where there was ours when it is called in the main thread,
    and the processes it starts die with the thread that started them: none of this may happen to the caller's thread.
    """

    _current: ClassVar[Connection | None] = None
    _lock: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, pool: PoolConfig, num_cpus: int):
        self._named, self._users, self._leave = _address(pool), 0, threading.Event()
        options: dict[str, Any] = {}
        if self._named == "local":
            log.info("starting a Ray cluster on this machine")
            options = {"num_cpus": max(len(cores()), num_cpus), "include_dashboard": False}
        begun: Future[str] = Future()
        self._thread = threading.Thread(target=self._stay, args=(begun, options), daemon=True, name="ray")
        self._thread.start()
        try:
            # HOST:PORT of the cluster's head
            self._address = begun.result(START_SECONDS if self._named == "local" else JOIN_SECONDS)
        except BaseException as error:
            self._leave.set()
            if not isinstance(error, Exception):
                raise
            said = " ".join(str(error).split()) or "it does not answer like one"
            fix = "set pool.address to one that can, or RAY_AUTH_MODE=token where it wants a token"
            raise EngineError(f"the Ray cluster at {self._named} cannot be used ({said}): {fix}") from error

    def _stay(self, begun: Future[str], options: Mapping[str, Any]) -> None:
        import ray

        try:
            ray.init(self._named, logging_level=logging.ERROR, log_to_driver=False, **options)
            scheme, _, rest = self._named.rpartition("://")
            begun.set_result(rest if scheme == "ray" else ray.get_runtime_context().gcs_address)
        except Exception as error:  # Ray raises what it likes
            begun.set_exception(error)
        self._leave.wait()
        ray.shutdown()  # after an error too: it would take itself for connected in part

    @classmethod
    def join(cls, pool: PoolConfig, num_cpus: int) -> Connection | None:
        """Connect, or count one more user of the connection, who must `release` it; None where it is somebody else's.
        `num_cpus` is the least that a cluster has which is started here."""
        # a thread that asks for something after the end must not start Ray again
        os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            import ray
        except ImportError as error:
            raise MissingDependencyError("pool=ray needs Ray: pip install 'rl-onoff[ray]'") from error
        with cls._lock:
            if cls._current is None and ray.is_initialized():  # a notebook's, or a launcher's: it is theirs to end
                return None
            cls._current = cls._current or cls(pool, num_cpus)
            cls._current._users += 1
            return cls._current

    def release(self) -> None:
        """The last user ends the connection, and with it a cluster that was started here."""
        with Connection._lock:
            self._users -= 1
            if not self._users:
                Connection._current = None
                self._leave.set()
                self._thread.join(LEAVE_SECONDS)

    @classmethod
    def answers(cls) -> bool:
        """Whether the cluster's head is there: without it Ray waits a minute in most calls, then ends this process."""
        import ray

        return ray.is_initialized() and (cls._current is None or _listens(cls._current._address))


def _address(pool: PoolConfig) -> str:
    """What `ray.init` is told: "local" to start a cluster, "auto" for one it finds, else where one answers now."""
    named = pool.address or os.environ.get("RAY_ADDRESS")
    if named == "local":
        return named
    # the file that `ray start` writes has no public reader
    from ray._private.services import canonicalize_bootstrap_address as found_at

    scheme, _, rest = (named or "").rpartition("://")

    def find() -> bool:
        found = rest if scheme == "ray" else found_at(named, None)  # type: ignore[arg-type]
        return found is not None and _listens(found)

    if _in_time(find):
        return named or "auto"  # not what was found: only where it finds a cluster does Ray look for the token it wants
    if named is None:
        return "local"
    where = "on this machine" if named == "auto" else f"at {named}"
    fix = "set pool.address to one that runs, or to null to start one for this run"
    raise EngineError(f"no Ray cluster answers {where}: {fix}")


def _listens(address: str) -> bool:
    """Whether something listens at HOST:PORT; False after PROBE_SECONDS without a word."""

    def connect() -> bool:
        host, _, port = address.rpartition(":")
        socket.create_connection((host.strip("[]"), int(port)), PROBE_SECONDS).close()
        return True

    return _in_time(connect)


def _in_time(probe: Callable[[], bool]) -> bool:
    """What the function says; False when it fails or is silent too long: asking a name server has no timeout."""
    said: list[bool] = []

    def run() -> None:
        with suppress(OSError, ValueError):
            said.append(probe())

    thread = threading.Thread(target=run, daemon=True, name="probe")
    thread.start()
    thread.join(PROBE_SECONDS)
    return said == [True]


def berth(nodes: Sequence[Resources], config: EngineConfig) -> tuple[Resources, EngineConfig]:
    """What a replica reserves, all on one node, of a cluster whose nodes have these resources; and its config, which is
    another where its engine takes its GPUs from several nodes itself."""
    cpus = {"CPU": float(config.pool.cpus_per_replica)}
    gpus = config.gpus_per_replica
    largest = max(nodes, key=_gpus, default={})
    if not gpus or not _gpus(largest):
        return cpus, config
    if gpus <= _gpus(largest):
        return {**cpus, "GPU": float(gpus)}, config
    total = sum(map(_gpus, nodes))
    wide = config.across_nodes()
    if wide is None or gpus > total:
        one_node = f"no node with more than {_gpus(largest)}, and {config.name} needs one"
        there = one_node if wide is None else f"{total} GPUs in all"
        what = f"backend.tp_size={gpus} needs {gpus} GPUs but the Ray cluster has {there}"
        raise UsageError(f"{what}: set backend.tp_size to that or less")
    # the engine's own processes sit beside some of its GPUs, which they must see but not reserve: its Ray workers will
    here = next(name for name in largest if name.startswith("node:") and not name.startswith("node:__"))
    return {**cpus, here: NODE}, wide


def replicas_that_fit(nodes: Sequence[Resources], config: EngineConfig) -> int:
    """How many replicas use all GPUs of the cluster; 1 without any."""
    gpus = config.gpus_per_replica
    on_one_node = sum(_gpus(node) // gpus for node in nodes) if gpus else 1
    return on_one_node or max(1, sum(map(_gpus, nodes)) // gpus)


def _gpus(node: Resources) -> int:
    return int(node.get("GPU", 0))


def alive_nodes() -> list[dict[str, float]]:
    """The resources of each node that is alive."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def described(resources: Resources) -> str:
    """`3 CPU, 1 GPU`; for people."""
    gpus = resources.get("GPU", 0)
    return f"{resources.get('CPU', 0):g} CPU" + (f", {gpus:g} GPU" if gpus else "")


def why_gone(error: Exception | None) -> str:
    """Why an actor is gone, for people."""
    import ray.exceptions

    if isinstance(error, ray.exceptions.OutOfMemoryError):
        return "Ray ended it, for its node was short of memory"
    if "node has died" in str(error):
        return "its node left the Ray cluster"
    return f"its actor is gone: {type(error).__name__}" if error else "its actor does not answer"
