"""Replicas: the work is shared out, nothing is lost and nothing comes twice, whoever dies."""

from __future__ import annotations

import itertools
import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from rl_onoff.backends import FakeBackendConfig, create_backend, devices
from rl_onoff.errors import EngineDiedError, EngineError, UsageError
from rl_onoff.types import Rollout, SampleRequest, Sampling, Want, sample_requests
from rl_onoff.workers.pool import Pool
from rl_onoff.workers.process import alive
from rl_onoff.workers.work_queue import MOST_DEATHS, Work, WorkQueue
from tests.workers.tiny_backend import TinyBackend, generate, pids_of


def tiny_pool(dp_size: int = 2, **engine_kwargs) -> Pool:
    return Pool(TinyBackend, FakeBackendConfig(model_name="tiny", dp_size=dp_size, engine_kwargs=engine_kwargs))


def request(id: str, num_tokens: int = 4, n: int = 1, max_new_tokens: int = 100) -> list[SampleRequest]:
    ids = np.arange(num_tokens) + sum(map(ord, id))
    return sample_requests(id=id, prompt_ids=ids, sampling=Sampling(n=n, seed=7, max_new_tokens=max_new_tokens))


def many(number: int, *args, **kwargs) -> list[SampleRequest]:
    return [one for i in range(number) for one in request(str(i), *args, **kwargs)]


@pytest.fixture
def pool():
    """A function that makes and loads pools of the tiny backend, and closes them."""
    made = []

    def make(*args, **kwargs) -> Pool:
        made.append(tiny_pool(*args, **kwargs))
        made[-1]._load()
        return made[-1]

    yield make
    for one in made:
        one._close()


def died(items: list[Work]) -> EngineDiedError:
    return EngineDiedError("gone", tuple(item.key for item in items))


# -- who gets what -----------------------------------------------------------------------------------------------------


def test_shares_are_large_first_and_small_last_and_hold_everything_once():
    shares = WorkQueue(many(400, 10), num_replicas=2, fill=8)
    sizes, seen = [], []
    while share := shares.take():
        sizes.append(len(share))
        seen += [item.key for item in share]
        for _ in share:
            shares.done()
    assert sorted(seen) == sorted((str(i), 0) for i in range(400))
    assert sizes[0] == 100 and sizes[-1] <= 8 and all(a >= b for a, b in itertools.pairwise(sizes))
    assert shares.take() == []


def test_the_longest_come_first_and_the_samples_of_a_prompt_together():
    requests = request("short", 5, n=8) + request("long", 90, n=8) + request("middle", 50, n=8)
    shares = WorkQueue(requests, num_replicas=2, fill=4)
    taken = [shares.take() for _ in range(2)]
    assert [{item.key[0] for item in share} for share in taken] == [{"long"}, {"middle"}]
    assert [item.key for item in taken[0]] == [("long", sample) for sample in range(8)]


def test_who_is_topped_up_gets_its_fair_part_of_what_is_left_and_no_more():
    shares = WorkQueue(many(100), num_replicas=2)
    assert [len(shares.take(30)) for _ in range(2)] == [30, 30]
    assert len(shares.take(15, held=15)) == 15, "there is enough for all"
    assert len(shares.take(40, held=30)) == 20, "half of the hundred that are not done"
    assert len(shares.take(30, held=50)) == 0
    assert len(shares.take(30, held=30)) == 5, "there are no more"
    assert shares.take(30, held=20, wait=False) == []
    for _ in range(100):
        shares.done()
    assert shares.take(30) == []


def test_few_responses_are_dealt_to_all():
    shares = WorkQueue(request("a", n=6), num_replicas=3)
    assert [len(shares.take()) for _ in range(3)] == [2, 2, 1]


def test_a_poison_is_found_in_three_deaths_and_the_innocent_come_back():
    shares = WorkQueue(many(100), num_replicas=1, fill=100)
    poison, deaths, finished = ("37", 0), 0, []
    while share := shares.take():
        if any(item.key == poison for item in share):
            deaths += 1
            shares.give_back(share, died(share))
        else:
            finished += [item.key for item in share]
            for _ in share:
                shares.done()
    assert deaths == MOST_DEATHS and set(shares.given_up) == {poison}
    assert len(finished) == len(set(finished)) == 99


def test_what_comes_back_without_blame_is_as_it_was():
    shares = WorkQueue(many(9), num_replicas=1)
    share = shares.take()
    shares.give_back(share)
    assert shares.take() == share and not any(shares.deaths.values())


# -- devices -----------------------------------------------------------------------------------------------------------


def test_visible_gpus_are_cut_into_groups(monkeypatch):
    monkeypatch.setattr(devices, "_count_gpus", lambda: 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert [place.environment["CUDA_VISIBLE_DEVICES"] for place in devices.places(2, 2)] == ["4,5", "6,7"]
    with pytest.raises(UsageError, match=r"need 6 GPUs, but 4 are visible: set backend\.dp_size=2"):
        devices.places(3, 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b,GPU-c")
    assert [place.environment["CUDA_VISIBLE_DEVICES"] for place in devices.places(2, 1)] == ["GPU-a", "GPU-b"]


@pytest.mark.parametrize(("value", "names"), [("0, 2,-1,3", ["0", "2"]), ("", []), ("0,1,2,3,4", list("0123"))])
def test_a_list_of_devices_ends_where_cuda_says_it_ends(value, names, monkeypatch):
    monkeypatch.setattr(devices, "_count_gpus", lambda: 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    assert devices.visible_gpus() == names


def test_each_replica_gets_gpus_of_its_own(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1,2,0")
    monkeypatch.setattr(devices, "_count_gpus", lambda: 4)
    assert [place.environment for place in devices.places(2, 2)] == [
        {"CUDA_VISIBLE_DEVICES": "3,1"},
        {"CUDA_VISIBLE_DEVICES": "2,0"},
    ]
    assert devices.replicas_that_fit(2) == 2
    with pytest.raises(UsageError, match=r"4 visible GPUs cannot be divided into replicas of backend\.tp_size=3"):
        devices.replicas_that_fit(3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert [place.environment["CUDA_VISIBLE_DEVICES"] for place in devices.places(3, 1)] == ["0", "1", "2"]
    assert all(place.environment == {} for place in devices.places(8, 0)), "an engine that uses none gets none"


def test_without_gpus_each_replica_gets_cores_of_its_own(monkeypatch):
    monkeypatch.setattr(devices, "_count_gpus", lambda: 0)
    monkeypatch.setattr(devices, "cores", lambda: [0, 1, 2, 3, 8])
    assert [place.cores for place in devices.places(2, 1)] == [(0, 1), (2, 3)]
    assert [place.cores for place in devices.places(6, 1)] == [()] * 6
    assert devices.replicas_that_fit(2) == 1
    assert all(place.environment == {} for place in devices.places(2, 1))


# -- the pool ----------------------------------------------------------------------------------------------------------


def test_every_response_once_and_both_replicas_work(pool):
    requests = [request(str(i), n=2) for i in range(60)]
    got = [c.key for c in generate(pool(seconds=0.005), requests)]
    assert sorted(got) == sorted((str(i), s) for i in range(60) for s in range(2))
    assert got != sorted(got, key=lambda key: (int(key[0]), key[1])), "two replicas interleave"


def test_scores_are_shared_out_too(pool):
    ids = np.arange(6, dtype=np.int32)
    responses = [Rollout(request_id=str(i), sample=0, prompt_ids=ids, token_ids_T=ids[: 1 + i % 5]) for i in range(50)]
    scores = list(pool()._score(responses, Want(top_k=2)))
    assert sorted(s.request_id for s in scores) == sorted(str(i) for i in range(50))


def test_replicas_killed_at_random_lose_nothing():
    requests = [request(str(i), 5 + i % 9, max_new_tokens=60) for i in range(200)]
    config = FakeBackendConfig(model_name="fake")
    with create_backend(config) as one:
        expected = {c.key: c for c in one.complete(requests)}
    chance, kills = random.Random(0), 0
    with create_backend(FakeBackendConfig(model_name="fake", dp_size=2)) as backend:
        pool, got = backend._core, []
        assert isinstance(pool, Pool)
        for completion in backend.complete(requests):
            got.append(completion)
            pids = [pid for pid in pids_of(pool) if pid is not None]
            if pids and kills < 5 and len(got) % 20 == 0:
                os.kill(chance.choice(pids), signal.SIGKILL)
                kills += 1
    assert kills == 5
    assert len(got) == 200 and {c.key for c in got} == set(expected)
    for completion in got:
        same = expected[completion.key]
        assert np.array_equal(completion.token_ids_T, same.token_ids_T) and completion.text == same.text
        assert np.array_equal(completion.logprobs_T, same.logprobs_T) and completion.finish_reason is same.finish_reason


def test_a_request_that_kills_every_replica_is_named_after_all_others_are_done(pool):
    two = pool()
    requests = [request(str(i)) for i in range(70)]
    got = []
    with pytest.raises(
        EngineError, match=r"died three times on each of these responses, .*'die' \(sample 0\); all others"
    ) as caught:
        for completion in generate(two, [*requests[:20], request("die"), *requests[20:]]):
            got.append(completion.request_id)
    assert sorted(got, key=int) == [str(i) for i in range(70)]
    assert not isinstance(caught.value, EngineDiedError) and "worker's log" in caught.value.__notes__[0]
    assert len(list(generate(two, requests))) == 70, "the pool lives on"


def test_an_engine_that_cannot_work_at_all_is_not_restarted_for_ever(pool):
    two = pool()
    two._config.engine_kwargs["fail"] = "bug"  # from the next start on
    for pid in pids_of(two):
        os.kill(pid, signal.SIGKILL)
    with pytest.raises(EngineError, match="ZeroDivisionError"):
        list(generate(two, [request(str(i)) for i in range(20)]))


def test_a_replica_that_died_while_idle_is_started_again(pool):
    two = pool()
    assert len(list(generate(two, [request(str(i)) for i in range(10)]))) == 10
    for pid in pids_of(two):
        os.kill(pid, signal.SIGKILL)
    assert len(list(generate(two, [request(str(i)) for i in range(10)]))) == 10


def test_an_engines_own_error_ends_the_call_at_once(pool):
    two = pool()
    with pytest.raises(UsageError, match="a sentence of ours"):
        list(generate(two, [request("a"), request("usage"), request("b")]))
    assert len(list(generate(two, [request("a")]))) == 1


def test_a_failed_load_is_one_error_and_leaves_nothing(pool):
    with pytest.raises(UsageError, match=r"model\.name is wrong"):
        pool(fail="usage")


def test_an_abandoned_call_leaves_the_pool_usable(pool):
    two = pool(seconds=0.5)
    stream = generate(two, [request(str(i)) for i in range(400)])  # 100 s of work
    next(stream)
    stream.close()
    began = time.monotonic()
    assert sorted(c.request_id for c in generate(two, [request("a"), request("b")])) == ["a", "b"]
    assert time.monotonic() - began < 60


def test_a_call_that_another_one_displaced_says_so(pool):
    two = pool(seconds=0.01)
    first = generate(two, [request(str(i)) for i in range(50)])
    next(first)
    assert len(list(generate(two, [request("a")]))) == 1
    with pytest.raises(EngineError, match="another call"):
        next(first)


def test_replicas_do_not_run_far_ahead_of_the_reader(pool):
    two = pool()
    ids = np.arange(500, dtype=np.int32)
    responses = [Rollout(request_id=str(i), sample=i, prompt_ids=ids[:3], token_ids_T=ids) for i in range(20)]
    stream = two._score(responses, Want(full_logits=True))  # 100 MB each
    next(stream)
    before = psutil.Process().memory_info().rss
    time.sleep(1)
    assert psutil.Process().memory_info().rss - before < 600 * 2**20
    stream.close()


def test_a_worker_that_sends_takes_in_what_its_parent_sends(pool):
    """The longest results come last, so that a worker waits to send one while its parent sends more requests than a
    socket holds."""
    one, got = pool(dp_size=1), []
    for completion in generate(
        one, [request(str(i), 1000 * (i + 1), max_new_tokens=10**6 - 2000 * i) for i in range(90)]
    ):
        got.append(int(completion.request_id))
        time.sleep(0.02)
    assert got == list(range(90))


@pytest.mark.parametrize("busy", [False, True])
def test_close_leaves_no_process_and_no_file(tmp_path, busy):
    two = tiny_pool(engine=str(tmp_path / "engine"))
    two._load()
    workers = [psutil.Process(pid) for pid in pids_of(two)]
    children = [*workers, *(child for worker in workers for child in worker.children(recursive=True))]
    folders = [worker._folder for replica in two._replicas if (worker := replica.client._worker)]
    assert len(workers) == len(folders) == 2 and all(map(Path.exists, folders))
    if busy:
        stream = generate(two, [request("a"), request("b"), request("hang")])
        next(stream)
    began = time.monotonic()
    two._close()
    assert time.monotonic() - began < 60
    assert not any(alive(child) for child in children) and not any(map(Path.exists, folders))
    with pytest.raises(EngineDiedError, match="not running"):
        list(generate(two, [request("a")]))
    if busy:
        with pytest.raises(EngineDiedError, match="not running"):
            next(stream)


def test_replicas_are_processes_of_their_own():
    with pytest.raises(UsageError, match=r"drop backend\.worker=false"):
        create_backend(FakeBackendConfig(model_name="fake", dp_size=2, worker=False)).load()
