"""Run: python benchmarks/top_up.py

What topping replicas up while they sample is worth, by simulation of the very class that shares out the work: time
with shares that are sampled to their end, over time with top-ups. An engine has so many slots, a token takes a slot
one step however full the batch is (true of decoding on a GPU, where reading the weights is what takes time), and
lengths have the long tail of reasoning: log-normal, median 2,400 tokens, at most 32,000.
"""

from __future__ import annotations

import heapq

import numpy as np

from rl_onoff.types import Sampling, sample_requests
from rl_onoff.workers.work_queue import WorkQueue

SETTINGS = ((2, 64, 1_000), (8, 128, 4_000), (8, 256, 16_000), (64, 256, 64_000))  # replicas, slots of each, responses
LONGEST = 32_000


class Engine:
    def __init__(self) -> None:
        self.running: list[int] = []  # the steps at which responses end
        self.waiting: list[int] = []  # lengths

    @property
    def held(self) -> int:
        return len(self.running) + len(self.waiting)

    def fill(self, slots: int, now: int) -> None:
        while self.waiting and len(self.running) < slots:
            heapq.heappush(self.running, now + self.waiting.pop(0))


def steps(num_replicas: int, slots: int, num_responses: int, *, top_up: bool) -> int:
    """Steps until the last response is done."""
    lengths = np.clip(np.random.default_rng(0).lognormal(np.log(2_400), 1.0, num_responses), 1, LONGEST).astype(int)
    sampling = Sampling(max_new_tokens=LONGEST)
    requests = [
        request
        for i in range(num_responses)  # eight responses a prompt
        for request in sample_requests(id=str(i), prompt_ids=np.array([i // 8]), sampling=sampling)
    ]
    shares, engines = WorkQueue(requests, num_replicas), [Engine() for _ in range(num_replicas)]
    events = [(0, number) for number in range(num_replicas)]
    now = 0
    while events:
        now, number = heapq.heappop(events)
        engine = engines[number]
        if engine.running:
            heapq.heappop(engine.running)
            shares.done()
        if engine.held <= (slots if top_up else 0):
            taken = shares.take(2 * slots - engine.held, engine.held, wait=False) if top_up else shares.take(wait=False)
            engine.waiting += [lengths[int(item.key[0])] for item in taken]
        engine.fill(slots, now)
        if engine.running:
            heapq.heappush(events, (engine.running[0], number))
    return now


if __name__ == "__main__":
    for replicas, slots, responses in SETTINGS:
        whole, topped_up = (steps(replicas, slots, responses, top_up=top_up) for top_up in (False, True))
        print(
            f"{replicas:3} replicas × {slots:3} slots, {responses:6,} responses: {whole / topped_up:4.1f} × the time "
            "without topping up"
        )
