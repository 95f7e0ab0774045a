"""Where an engine runs: in this process, in a worker process, or in a pool of them, here or on a Ray cluster."""

from __future__ import annotations

import importlib.util
import os
import subprocess
from functools import cache
from importlib import metadata

from rl_onoff.backends.devices import environment_for_python
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
            why, fix = f"backend.dp_size={config.dp_size} needs several", "backend.dp_size=1"
            if on_cluster:
                why, fix = "pool=ray runs it on a cluster", "pool=local"
            what = f"backend.worker=false keeps the engine in this process, but {why}"
            raise UsageError(f"{what}: drop backend.worker=false, or set {fix}")
        if on_cluster:
            from rl_onoff.workers.ray import RayPool as Elsewhere
        else:
            from rl_onoff.workers.pool import Pool as Elsewhere
    elif not (in_worker if config.worker is None else config.worker) and config.python is None:
        return engine
    else:
        from rl_onoff.workers.client import WorkerClient as Elsewhere
    return Elsewhere(backend, config)


def check_installed(package: str, config: EngineConfig, option: str) -> None:
    """Refuse an engine whose package is not where it shall run; imports nothing. A cluster's nodes are not asked."""
    if config.pool.kind is PoolKind.ray:
        return
    here = f"{option}.python={config.python}"
    if config.python is None:
        found = importlib.util.find_spec(package)
        said = str(bool(found and found.origin))  # a folder that is called like it is a spec without an origin
        who, pip = f"{option} is {config.name}, which needs the package {package}", "pip"
    else:
        said, pip = _ask(config.python, package), f"{config.python} -m pip"
        who = f"{here} lacks the package {package}, which {config.name} needs"
    if said == "False":
        extras = (config.python is None and metadata.metadata("rl-onoff").get_all("Provides-Extra")) or ()
        name = f"'rl-onoff[{package}]'" if package in extras else package
        other = f"set {option}.python to the interpreter of an environment that has it"
        raise MissingDependencyError(f"{who}: {pip} install {name}, or {other}")
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


def cores_by_rank(num_ranks: int) -> str:
    """This process's cores dealt out to the ranks of a CPU engine, as engines write it: `0,1|2,3`; with too few of them
    ranks share."""
    cores = sorted(os.sched_getaffinity(0))
    each = max(1, min(len(cores) // num_ranks, int(os.environ.get("OMP_NUM_THREADS") or len(cores))))
    ranks = ([cores[(rank * each + i) % len(cores)] for i in range(each)] for rank in range(num_ranks))
    return "|".join(",".join(map(str, rank)) for rank in ranks)
