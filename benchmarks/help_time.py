"""Run: python benchmarks/help_time.py [pairs]

How long `rl-onoff --help` and a config error take against a bare Hydra app that imports nothing (its `--help`, and
running it), in turns: CPU seconds, which other work on the machine changes little. Prints the median of the pairwise
ratios, which must stay below 1.5, and exits with 1 otherwise.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

LIMIT = 1.5

BARE = """
import hydra

@hydra.main(config_path=None, version_base="1.3")
def main(cfg):
    pass

main()
"""


def seconds(command: list[str], folder: str, code: int) -> float:
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    assert os.waitstatus_to_exitcode(status) == code, (command, status)
    return used.ru_utime + used.ru_stime


def main() -> int:
    pairs = int(sys.argv[1]) if len(sys.argv) > 1 else 15
    slow = False
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "bare.py").write_text(BARE)
        rl_onoff = [sys.executable, "-m", "rl_onoff"]
        print(f"{'':<16}{'bare (s)':>10}{'rl-onoff (s)':>14}{'ratio':>8}   median of {pairs} pairs, limit {LIMIT}")
        for name, theirs, ours, code in (
            ("--help", ["--help"], ["--help"], 0),
            ("a config error", [], ["backend.tp_sise=2"], 2),
        ):
            bare, whole = [sys.executable, "bare.py", *theirs], [*rl_onoff, *ours]
            for each, ends in ((bare, 0), (whole, code)):
                seconds(each, folder, ends)  # compiles and reads what is new
            taken = [(seconds(bare, folder, 0), seconds(whole, folder, code)) for _ in range(pairs)]
            ratio = statistics.median(whole_s / bare_s for bare_s, whole_s in taken)
            bare_s, whole_s = (statistics.median(column) for column in zip(*taken, strict=True))
            print(f"{name:<16}{bare_s:>10.3f}{whole_s:>14.3f}{ratio:>8.2f}")
            slow |= ratio >= LIMIT
    return int(slow)


if __name__ == "__main__":
    sys.exit(main())
