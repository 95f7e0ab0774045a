"""The form of a measured row: `row(...)` prints one line and keeps it for benchmarks/README.md.

A benchmark runs both sides alternately in one process, calls `ratios(ours, theirs)` and then `row(...)`. A line reads

    work | against | min / median / max | bar | met?
"""

import os
import statistics
import sys
from collections.abc import Sequence


def ratios(over: Sequence[float], under: Sequence[float]) -> list[float]:
    """Each value of `over` by the median of `under`, so that the median of what comes back is the ratio of medians."""
    middle = statistics.median(under)
    return [value / middle for value in over]


def row(work: str, against: str, values: Sequence[float], bar: str, digits: int = 3) -> bool:
    """A printed line of the table; whether the median of `values` keeps the `bar`, written ">= 2" or "<= 1.25".

    With BENCH_TABLE set to a file's path, the line is also appended there: `make bench` collects lines that way.
    """
    sign, limit = bar.split(maxsplit=1)
    assert sign in (">=", "<="), f"a bar starts with >= or <=, not {sign!r}"
    number = float(limit.split()[0])
    middle = statistics.median(values)
    met = middle >= number if sign == ">=" else middle <= number
    spread = " / ".join(f"{value:.{digits}f}" for value in (min(values), middle, max(values)))
    line = f"| {work} | {against} | {spread} | {bar} | {'yes' if met else 'NO'} |"
    print(line)
    sys.stdout.flush()
    if path := os.environ.get("BENCH_TABLE"):
        with open(path, "a", encoding="utf-8") as file:
            file.write(line + "\n")
    return met
