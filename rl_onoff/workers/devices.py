"""Which GPUs and cores each replica of a pool gets, so that two engines never fight over one."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from rl_onoff.errors import UsageError

VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """What a worker gets of the machine."""

    environment: Mapping[str, str] = field(default_factory=dict)  # on top of its parent's
    cores: tuple[int, ...] = ()  # it runs on these alone; none: on all of them


ANYWHERE = Place()


def places(num_replicas: int, gpus_each: int) -> list[Place]:
    """A place for each replica: GPUs of its own, or, where there are none, cores of its own.

    Raises UsageError when there are GPUs but too few.
    """
    gpus = visible_gpus() if gpus_each else []
    if gpus:
        return [Place(environment={VISIBLE: ",".join(group)}) for group in cut(gpus, num_replicas, gpus_each)]
    # engines on a CPU start a thread for every core they may run on, and vLLM binds each to its core: two of them on
    # the same cores crawl
    return [Place(cores=group) for group in cut_cores(cores(), num_replicas)]


def cut(gpus: Sequence[str], num_replicas: int, gpus_each: int) -> list[list[str]]:
    """The first `num_replicas` groups of `gpus_each` neighbours."""
    needed = num_replicas * gpus_each
    if needed > len(gpus):
        raise UsageError(
            f"backend.dp_size={num_replicas} replicas of backend.tp_size={gpus_each} need {needed} GPUs, but "
            f"{len(gpus)} are visible: set backend.dp_size={max(1, len(gpus) // gpus_each)}"
        )
    return [list(gpus[i * gpus_each : (i + 1) * gpus_each]) for i in range(num_replicas)]


def cut_cores(numbers: Sequence[int], num_replicas: int) -> list[tuple[int, ...]]:
    """Equal groups of neighbours; empty ones, for no limit, where there are fewer cores than replicas."""
    each = len(numbers) // num_replicas
    return [tuple(numbers[i * each : (i + 1) * each]) for i in range(num_replicas)]


def replicas_that_fit(tp_size: int) -> int:
    """How many replicas of `tp_size` GPUs use all visible ones; 1 without GPUs. Raises UsageError for a remainder."""
    num_gpus = len(visible_gpus())
    if num_gpus % tp_size:
        raise UsageError(
            f"the {num_gpus} visible GPUs cannot be divided into replicas of backend.tp_size={tp_size}: set "
            f"backend.tp_size to a divisor of {num_gpus}, or backend.dp_size to the number of replicas"
        )
    return max(1, num_gpus // tp_size)


def visible_gpus() -> list[str]:
    """Names of the GPUs this process may use, as CUDA_VISIBLE_DEVICES writes them."""
    named = os.environ.get(VISIBLE)
    if named is not None:
        return listed(named)[: _count_gpus()]
    return [str(i) for i in range(_count_gpus())]


def listed(value: str) -> list[str]:
    """The devices in a value of CUDA_VISIBLE_DEVICES; CUDA ignores what follows the first entry that names none."""
    devices = []
    for name in map(str.strip, value.split(",")):
        if not name or name.startswith("-"):
            break
        devices.append(name)
    return devices


def _count_gpus() -> int:
    import torch

    if count := torch.cuda.device_count():
        return count
    if torch.version.cuda or torch.version.hip or (smi := shutil.which("nvidia-smi")) is None:
        return 0
    # a CPU build of torch says nothing about GPUs that an engine in another environment (backend.python) may have
    done = subprocess.run(
        [smi, "--query-gpu=index", "--format=csv,noheader"], capture_output=True, text=True, check=False, timeout=60
    )
    return len(done.stdout.splitlines()) if done.returncode == 0 else 0


def cores() -> list[int]:
    """The cores this process may run on; empty where the system does not say."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
