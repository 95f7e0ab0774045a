"""What every benchmark prints beside its numbers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


def versions(**packages: Any) -> str:
    """This machine, how many of its cores are used, and the versions of the packages."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "unknown CPU")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpu = ""
    if (torch := __import__("torch")).cuda.is_available():
        gpu = f", {torch.cuda.get_device_name()}"
    named = ", ".join(f"{package} {version}" for package, version in packages.items())
    return f"{name}, {cores} cores ({os.environ.get('OMP_NUM_THREADS', 'all')} used){gpu}; {named};"
