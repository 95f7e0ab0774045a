"""What a process gets of this machine: environment, GPUs and cores, so that two engines never fight over one."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from rl_onoff.errors import UsageError

VISIBLE = "CUDA_VISIBLE_DEVICES"
# OpenMP threads that wait for their next work. libgomp's own 3 ms of spinning make torch crawl where processes share
# cores; none at all halves the speed of an engine with many small operations. Intel's library reads the first alone
THREADS = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "3000"}  # about 0.03 ms


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


def environment_for_python(python: str | None = None, packages: Path | None = None) -> dict[str, str]:
    """The environment variables of a process under another interpreter, maybe, without those that are this one's.

    The programs beside `python` come first, and the folder `packages` before what is installed.
    """
    found = {name: value for name, value in os.environ.items() if name not in ("PYTHONHOME", "__PYVENV_LAUNCHER__")}
    found["PYTHONSAFEPATH"] = "1"  # a file in the working folder must not stand in for a package
    for name, first in (("PYTHONPATH", packages), ("PATH", Path(python).parent if python else None)):
        if first is not None:
            found[name] = os.pathsep.join(filter(None, (str(first), found.get(name))))
    return found
