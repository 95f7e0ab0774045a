"""Where an engine runs: in this process, in a worker process, or in a pool of them, here or on a Ray cluster."""

from __future__ import annotations

import importlib.util
import os
import subprocess
from functools import cache
from importlib import metadata

from rl_onoff.backends.engine import Core
from rl_onoff.backends.engine_config import EngineConfig, PoolKind
from rl_onoff.errors import MissingDependencyError, UsageError

HAS = "import importlib.util as u, sys; found = u.find_spec(sys.argv[1]); print(bool(found and found.origin))"
PYTHON_SECONDS = 60.0  # for an interpreter to start, on a slow disk


def place(engine: Core, config: EngineConfig, *, in_worker: bool) -> Core:
    """`engine` itself, or what answers for it elsewhere; `in_worker` decides where `config.worker` is not set."""
    backend, on_cluster = type(engine), config.pool.kind is PoolKind.ray
    if on_cluster or (config.dp_size or 1) > 1:
        if config.worker is False:
            why = "pool=ray runs it on a cluster" if on_cluster else f"backend.dp_size={config.dp_size} needs several"
            raise UsageError(
                f"backend.worker=false keeps the engine in this process, but {why}: drop backend.worker=false, or set"
                f" {'pool=local' if on_cluster else 'backend.dp_size=1'}"
            )
        from rl_onoff.workers.pool import Pool

        if not on_cluster:
            return Pool(backend, config)
        from rl_onoff.workers.ray import RayCluster

        return Pool(backend, config, cluster=RayCluster(backend, config))
    if not (in_worker if config.worker is None else config.worker) and config.python is None:
        return engine
    from rl_onoff.workers.client import WorkerClient

    return WorkerClient(backend, config)


def check_installed(package: str, config: EngineConfig, option: str) -> None:
    """Refuse an engine whose package is not where it shall run; imports nothing. A cluster's nodes are not asked."""
    if config.pool.kind is PoolKind.ray:
        return
    other = f"set {option}.python to the interpreter of an environment that has it"
    if config.python is None:
        found = importlib.util.find_spec(package)
        if found is None or found.origin is None:  # a folder that is called like it is a spec without an origin
            extras = metadata.metadata("rl-onoff").get_all("Provides-Extra") or []
            name = f"'rl-onoff[{package}]'" if package in extras else package
            why = f"{option} is {config.name}, which needs the package {package}: pip install {name}, or {other}"
            raise MissingDependencyError(why)
        return
    said, here = _ask(config.python, package), f"{option}.python={config.python}"
    if said == "False":
        raise MissingDependencyError(
            f"{here} lacks the package {package}, which {config.name} needs: {config.python} -m pip install {package},"
            f" or {other}"
        )
    if said != "True":
        raise UsageError(f"{here} cannot be run ({said}): set {option}.python to a Python interpreter")


@cache
def _ask(python: str, package: str) -> str:
    """Whether an interpreter has a package: "True" or "False"; else why it cannot tell."""
    try:
        done = subprocess.run(
            [python, "-c", HAS, package], env=environment_for_python(), stdin=subprocess.DEVNULL, capture_output=True,
            text=True, errors="replace", timeout=PYTHON_SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"it gave no answer in {PYTHON_SECONDS:.0f} s"
    except OSError as error:
        return str(error.strerror)
    said = "".join(done.stdout.split()[-1:])  # a sitecustomize may print before
    return said if said in ("True", "False") else "it is no Python interpreter"


def environment_for_python() -> dict[str, str]:
    """The environment variables of a process under another interpreter, maybe, without those that are this one's."""
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}  # a file in the working folder must not stand in for a package
    for name in ("PYTHONHOME", "__PYVENV_LAUNCHER__"):
        environment.pop(name, None)
    return environment


def replicas_that_fit(num_devices: int) -> int:
    """How many replicas of so many devices each this machine has GPUs for."""
    from rl_onoff.workers import devices

    return devices.replicas_that_fit(num_devices)
