"""Where an engine runs: in this process, in a worker process, or in a pool of them, here or on a Ray cluster; and which
GPUs and cores of this machine each replica gets."""

from __future__ import annotations

import importlib.util
import itertools
import os
import shutil
import subprocess
from collections.abc import Mapping
from functools import cache
from importlib import metadata
from types import MappingProxyType
from typing import NamedTuple

from rl_onoff.backends.engine import Core
from rl_onoff.backends.engine_config import EngineConfig, PoolKind
from rl_onoff.errors import MissingDependencyError, UsageError

HAS = "import importlib.util as u, sys; found = u.find_spec(sys.argv[1]); print(bool(found and found.origin))"
VISIBLE = "CUDA_VISIBLE_DEVICES"
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


def environment_for_python() -> dict[str, str]:
    """The environment variables of a process under another interpreter, maybe, without those that are this one's."""
    ours = {name: value for name, value in os.environ.items() if name not in ("PYTHONHOME", "__PYVENV_LAUNCHER__")}
    return {**ours, "PYTHONSAFEPATH": "1"}  # a file in the working folder must not stand in for a package


# -- the GPUs and cores of this machine, so that two engines never fight over one --------------------------------------


class Place(NamedTuple):
    """What a worker gets of its machine."""

    environment: Mapping[str, str] = MappingProxyType({})  # on top of its parent's
    cores: tuple[int, ...] = ()  # it runs on these alone; none: on all of them


ANYWHERE = Place()


def places(num_replicas: int, gpus_each: int) -> list[Place]:
    """A place for each replica: GPUs of its own, or, where there are none, cores of its own."""
    if not (gpus := visible_gpus() if gpus_each else []):
        # engines on a CPU start a thread for every core they may run on, and vLLM binds each to its core: two of them
        # on the same cores crawl. Fewer cores than replicas: no limit
        each = len(cores()) // num_replicas
        return [Place(cores=tuple(cores()[i * each : (i + 1) * each])) for i in range(num_replicas)]
    needed = num_replicas * gpus_each
    if needed > len(gpus):
        what = f"backend.dp_size={num_replicas} replicas of backend.tp_size={gpus_each} need {needed} GPUs"
        fix = f"set backend.dp_size={max(1, len(gpus) // gpus_each)}"
        raise UsageError(f"{what}, but {len(gpus)} are visible: {fix}")
    return [Place({VISIBLE: ",".join(gpus[i : i + gpus_each])}) for i in range(0, needed, gpus_each)]


def replicas_that_fit(tp_size: int) -> int:
    """How many replicas of `tp_size` GPUs use all visible ones; 1 without GPUs. Raises UsageError for a remainder."""
    num_gpus = len(visible_gpus())
    if num_gpus % tp_size:
        what = f"the {num_gpus} visible GPUs cannot be divided into replicas of backend.tp_size={tp_size}"
        fix = f"set backend.tp_size to a divisor of {num_gpus}, or backend.dp_size to the number of replicas"
        raise UsageError(f"{what}: {fix}")
    return max(1, num_gpus // tp_size)


def visible_gpus() -> list[str]:
    """Names of the GPUs this process may use, as CUDA_VISIBLE_DEVICES writes them."""
    count, named = _count_gpus(), os.environ.get(VISIBLE)
    if named is None:
        return [str(i) for i in range(count)]
    names = [name.strip() for name in named.split(",")]
    # CUDA ignores what follows the first entry that names none
    return list(itertools.takewhile(lambda name: name and not name.startswith("-"), names))[:count]


def _count_gpus() -> int:
    import torch

    if count := torch.cuda.device_count():
        return count
    if torch.version.cuda or torch.version.hip or (smi := shutil.which("nvidia-smi")) is None:
        return 0
    # a CPU build of torch says nothing about GPUs that an engine in another environment (backend.python) may have
    command = [smi, "--query-gpu=index", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    return len(done.stdout.splitlines()) if done.returncode == 0 else 0


def cores() -> list[int]:
    """The cores this process may run on; empty where the system does not say."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
