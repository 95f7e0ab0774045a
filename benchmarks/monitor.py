"""What `Monitor.add` costs a training loop, in milliseconds a response: minimum, median and
maximum over adds of 1, 8 and 64 responses (the maximum writes a shard).

python benchmarks/monitor.py [tokens]
"""

import sys
import tempfile
import time

import numpy as np

from rl_onoff.monitor import Monitor


def main(tokens: int) -> None:
    rng = np.random.default_rng(0)
    for size, steps in ((1, 400), (8, 100), (64, 20)):
        with tempfile.TemporaryDirectory() as folder, Monitor(folder) as monitor:
            costs = []
            for step in range(steps):
                q = -rng.exponential(0.5, (size, tokens))
                p = q * np.exp(rng.normal(0, 0.01, q.shape))
                ids = rng.integers(0, 50_000, q.shape)
                start = time.perf_counter()
                monitor.add(step=step, token_ids=ids, behaviour_logprobs=q, target_logprobs=p)
                costs.append((time.perf_counter() - start) / size * 1000)
        cost = " / ".join(f"{x:.2f}" for x in (min(costs), np.median(costs), max(costs)))
        print(f"{size:3} responses of {tokens} tokens an add: {cost} ms a response")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 500)
