"""Run: python benchmarks/pool.py [rounds] [model]

What replicas bring and what they cost, on a machine without GPUs.

1. Throughput: HuggingFace with one replica on one core, one on all cores, and two replicas on half of the cores each,
in turns (best of `rounds`), in generated tokens a second; and in tokens per CPU second of the busiest worker, which
is what it would be if nothing else ran on the machine (set OMP_NUM_THREADS=1 for that: a worker's threads are added
up). 2. The pool's own overhead: CPU seconds of the parent process for 1,000 requests, with the fake backend and one
token a response, for one engine in a worker, for a pool of two, and for a pool of two on Ray (a cluster that it
starts); best of `rounds`.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import psutil

from rl_onoff.backends import FakeBackendConfig, HuggingFaceBackendConfig
from rl_onoff.backends.devices import Place
from rl_onoff.backends.engine import Given
from rl_onoff.backends.engine_config import PoolConfig, PoolKind
from rl_onoff.backends.fake.backend import FakeBackend
from rl_onoff.backends.huggingface.backend import HuggingFaceBackend
from rl_onoff.types import SampleRequest, Sampling, sample_requests
from rl_onoff.workers.client import WorkerClient
from rl_onoff.workers.pool import Pool
from rl_onoff.workers.ray import RayPool


def requests(number: int, max_new_tokens: int) -> list[SampleRequest]:
    chance = np.random.default_rng(0)
    sampling = Sampling(max_new_tokens=max_new_tokens, seed=1)
    return [
        request
        for i in range(number)
        for request in sample_requests(id=str(i), prompt_ids=chance.integers(100, 250, 8 + i % 24), sampling=sampling)
    ]


def run(core: WorkerClient | Pool, work: Sequence[SampleRequest]) -> tuple[float, float, int]:
    """(seconds, CPU seconds of this process, tokens)."""
    wall, cpu = time.perf_counter(), time.process_time()
    tokens = sum(len(rollout.token_ids_T) for rollout in core._generate(Given(work)))
    return time.perf_counter() - wall, time.process_time() - cpu, tokens


def throughput(rounds: int, model: str) -> None:
    cores = sorted(os.sched_getaffinity(0))
    config = HuggingFaceBackendConfig(model_name=model, dtype="float32", batch_size=8)
    settings = {
        "1 replica, 1 core": WorkerClient(HuggingFaceBackend, config, place=Place(cores=(cores[0],))),
        f"1 replica, {len(cores)} cores": WorkerClient(HuggingFaceBackend, config),
        f"2 replicas, {len(cores) // 2} each": Pool(HuggingFaceBackend, replace(config, dp_size=2)),
    }
    work = requests(32, 16)
    best: dict[str, tuple[float, float]] = {}
    try:
        for core in settings.values():
            core._load()
            run(core, work[:2])
        for _ in range(rounds):
            for name, core in settings.items():
                before = busy(core)
                seconds, _, tokens = run(core, work)
                busiest = max(after - old for old, after in zip(before, busy(core), strict=True))
                wall, cpu = best.get(name, (0.0, 0.0))
                best[name] = max(wall, tokens / seconds), max(cpu, tokens / busiest)
    finally:
        for core in settings.values():
            core._close()
    first = best["1 replica, 1 core"]
    for name, (wall, cpu) in best.items():
        print(
            f"{name:24} {wall:8.1f} tokens/s {wall / first[0]:5.2f} × {cpu:12.1f} tokens per busiest CPU second "
            f"{cpu / first[1]:5.2f} ×"
        )


def busy(core: WorkerClient | Pool) -> list[float]:
    """CPU seconds each worker has used so far."""
    clients = [replica.client for replica in core._replicas] if isinstance(core, Pool) else [core]
    times = [psutil.Process(client.pid).cpu_times() for client in clients]
    return [time.user + time.system for time in times]


def overhead(rounds: int) -> None:
    work = requests(1000, 1)
    on_ray = FakeBackendConfig(model_name="fake", dp_size=2, pool=PoolConfig(kind=PoolKind.ray, address="local"))
    cores = {
        "one worker": WorkerClient(FakeBackend, FakeBackendConfig(model_name="fake")),
        "a pool of two": Pool(FakeBackend, FakeBackendConfig(model_name="fake", dp_size=2)),
        "a pool of two on Ray": RayPool(FakeBackend, on_ray),
    }
    best: dict[str, tuple[float, float]] = {}
    try:
        for core in cores.values():
            core._load()
            run(core, work[:10])
        for _ in range(rounds):
            for name, core in cores.items():
                wall, cpu, _ = run(core, work)
                old = best.get(name, (np.inf, np.inf))
                best[name] = min(old[0], wall), min(old[1], cpu)
    finally:
        for core in cores.values():
            core._close()
    for name, (wall, cpu) in best.items():
        print(f"{name:24} {cpu * 1e3:8.1f} ms CPU in the parent, {wall * 1e3:8.1f} ms in all, per 1,000 requests")


if __name__ == "__main__":
    num_rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    overhead(num_rounds)
    throughput(num_rounds, sys.argv[2] if len(sys.argv) > 2 else "smollm2")
