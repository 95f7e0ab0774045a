"""The promise of 1 M response tokens with top-64 under 2 GB, on a fifth of it, in a process of its own."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import sys, time
import numpy as np
from rl_onoff.compare import Pair, aggregate, compare
from rl_onoff.types import TokenScores

def chosen(tokens, length=500):
    rng = np.random.default_rng(0)
    for i in range(tokens // length):
        ids_T, logs_T = rng.integers(0, 1000, length, dtype=np.int32), -rng.exponential(1, length).astype(np.float32)
        sides = [TokenScores(request_id=str(i), token_ids_T=ids_T, logprobs_T=logs_T + shift)
                 for shift in (np.float32(0), np.float32(-0.01))]
        yield Pair(behaviour=sides[0], target=sides[1], groups={"level": str(i % 5)})

def pairs(tokens, k=64, length=500):
    rng = np.random.default_rng(0)
    for i in range(tokens // length):
        ids_TK = rng.integers(0, 1000, (length, k), dtype=np.int32) + 1000 * np.arange(k, dtype=np.int32)
        logs_TK = np.sort(rng.standard_normal((length, k)).astype(np.float32) - 6)[:, ::-1]
        sides = [
            TokenScores(request_id=str(i), token_ids_T=ids_TK[:, 0], logprobs_T=logs_TK[:, 0] + shift,
                        top_ids_TK=ids_TK, top_logprobs_TK=logs_TK + shift, entropy_T=-logs_TK[:, 0],
                        rank_T=np.ones(length, np.int32))
            for shift in (np.float32(0), np.float32(0.01))
        ]
        yield Pair(behaviour=sides[0], target=sides[1], groups={"level": str(i % 5)})

def peak_mb():
    # not ru_maxrss, which a child takes over from whoever started it
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 1024

stream = globals()[sys.argv[2]]
compare(stream(20_000))
before, start = peak_mb(), time.perf_counter()
aggregate.BLOCK_TOKENS = 1 << 17
result = compare(stream(int(sys.argv[1])))
assert result.overall.counts["tokens"] == int(sys.argv[1])
print(peak_mb(), peak_mb() - before, time.perf_counter() - start)
"""


def test_two_hundred_thousand_tokens_stay_small():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, "200000", "pairs"], capture_output=True, text=True, check=True, timeout=120
    )
    peak_mb, growth_mb, _seconds = map(float, done.stdout.split())
    assert peak_mb < 400, done.stdout  # 2 GB for 1 M, and what does not grow with the stream
    assert growth_mb < 100, done.stdout  # top-64 of 200k tokens alone would be 205 MB


def test_chosen_tokens_stay_small():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, "2000000", "chosen"], capture_output=True, text=True, check=True, timeout=120
    )
    _peak_mb, growth_mb, _seconds = map(float, done.stdout.split())
    assert growth_mb < 120, done.stdout  # the tokens' columns at once would be 240 MB at their peak
