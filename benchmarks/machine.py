"""What every benchmark prints beside its numbers."""

from __future__ import annotations

import os
import statistics
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


def ratios(pairs: list[tuple[float, float]]) -> str:
    """Seconds of theirs and of ours, measured one after the other: how many times faster ours is."""
    times = sorted(theirs / ours for theirs, ours in pairs)
    theirs, ours = (statistics.median(side) for side in zip(*pairs, strict=True))
    spread = f"{times[0]:.2f} / {theirs / ours:.2f} / {times[-1]:.2f} x (min / medians / max)"
    return f"{spread}, {theirs:.1f} s and {ours:.1f} s"
