"""Run: python benchmarks/help_time.py [pairs]

How long `rl-onoff --help` and a config error take against a bare Hydra app that imports nothing, in turns on the same machine, so
that a busy moment meets both. Prints the median of the pairwise ratios, which must stay below 1.5, and exits with 1 otherwise.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
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
    start = time.perf_counter()
    done = subprocess.run(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    taken = time.perf_counter() - start
    assert done.returncode == code, (command, done.returncode)
    return taken


def main() -> int:
    pairs = int(sys.argv[1]) if len(sys.argv) > 1 else 15
    slow = False
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "bare.py").write_text(BARE)
        rl_onoff = [sys.executable, "-m", "rl_onoff"]
        print(f"{'':<16}{'bare (s)':>10}{'rl-onoff (s)':>14}{'ratio':>8}   median of {pairs} pairs, limit {LIMIT}")
        for name, arguments, codes in (("--help", ["--help"], (0, 0)), ("a config error", ["backend.tp_sise=2"], (1, 2))):
            bare = [sys.executable, "bare.py", *arguments]
            seconds(bare, folder, codes[0]), seconds([*rl_onoff, *arguments], folder, codes[1])  # compiles and reads what is new
            taken = [(seconds(bare, folder, codes[0]), seconds([*rl_onoff, *arguments], folder, codes[1])) for _ in range(pairs)]
            ratio = statistics.median(ours / theirs for theirs, ours in taken)
            theirs, ours = (statistics.median(column) for column in zip(*taken, strict=True))
            print(f"{name:<16}{theirs:>10.3f}{ours:>14.3f}{ratio:>8.2f}")
            slow |= ratio >= LIMIT
    return int(slow)


if __name__ == "__main__":
    sys.exit(main())
