"""The pool on Ray: the same work on the nodes of a cluster, and a node that leaves costs only what was in flight."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import psutil
import pytest
import ray

from rl_onoff.backends import (
    FakeBackendConfig,
    HuggingFaceBackendConfig,
    SGLangBackendConfig,
    VLLMBackendConfig,
    create_backend,
)
from rl_onoff.backends.engine import Given
from rl_onoff.backends.engine_config import EngineConfig, PoolConfig, PoolKind
from rl_onoff.errors import EngineDiedError, EngineError, MissingDependencyError, UsageError
from rl_onoff.types import Rollout, SampleRequest, Sampling, Want, sample_requests
from rl_onoff.workers import ray_cluster
from rl_onoff.workers.pool import Pool
from rl_onoff.workers.ray import RayPool
from rl_onoff.workers.ray_cluster import berth, replicas_that_fit
from tests.conftest import ROOT
from tests.running import flipped, ids_of
from tests.workers.test_pool import many, request
from tests.workers.tiny_backend import TinyBackend, generate, pids_of

STORE_BYTES = 128 << 20


class TwoNodes:
    """A cluster of two nodes with one CPU each; one of them comes and goes."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        node = {"num_cpus": 1, "object_store_memory": STORE_BYTES}
        self._cluster: Any = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
        self._options, self._second = node, None
        self.address = self._cluster.address

    def add(self) -> None:
        if self._second is None:
            self._second = self._cluster.add_node(**self._options)

    def remove(self) -> None:
        second, self._second = self._second, None
        self._cluster.remove_node(second)

    def shutdown(self) -> None:
        self._cluster.shutdown()


@pytest.fixture(scope="module")
def the_cluster() -> Iterator[TwoNodes]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))  # for the backend of these tests
        cluster = TwoNodes()
        yield cluster
        cluster.shutdown()


@pytest.fixture
def cluster(the_cluster: TwoNodes) -> TwoNodes:
    """Both nodes are there."""
    the_cluster.add()
    return the_cluster


def on(cluster: TwoNodes, **options: Any) -> PoolConfig:
    return PoolConfig(kind=PoolKind.ray, address=cluster.address, **{"wait_s": 60, **options})


@pytest.fixture
def pool(cluster: TwoNodes) -> Iterator[Callable[..., Pool]]:
    """A function that makes and loads pools of the tiny backend on the cluster, and closes them."""
    made = []

    def make(
        dp_size: int = 2, load: bool = True, wait_s: float = 60, runtime_env: dict | None = None, **engine_kwargs: Any
    ) -> Pool:
        placed = on(cluster, wait_s=wait_s, runtime_env=runtime_env or {})
        config = FakeBackendConfig(model_name="tiny", dp_size=dp_size, engine_kwargs=engine_kwargs, pool=placed)
        made.append(RayPool(TinyBackend, config))
        if load:
            made[-1]._load()
        return made[-1]

    yield make
    for one in made:
        one._close()
    assert not ray.is_initialized()


def until(true: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.1)


# -- the work ----------------------------------------------------------------------------------------------------------


def test_every_response_once_from_both_nodes(pool):
    two = pool(seconds=0.005)
    requests = {one.key: one for one in many(60, n=2)}
    got = list(two._generate(Given(requests.values())))
    assert sorted(c.key for c in got) == sorted(requests)
    assert all(c.text == str(requests[c.key].seed) for c in got), "requests arrive as they are"
    actors = [psutil.Process(pid).parent() for pid in pids_of(two)]
    raylets = [actor.parent() for actor in actors if actor]
    assert len({raylet.pid for raylet in raylets if raylet}) == 2, "one on each node"


def test_requests_that_come_while_it_works(cluster):
    class Slowly(Given):
        """A supply that gives few at a time."""

        def take(self, most: int | None = None, *, wait: bool) -> list[SampleRequest]:
            given = super().take(min(most or 7, 7), wait=wait)
            taken.append(len(given))
            return given

    taken: list[int] = []
    config = FakeBackendConfig(model_name="tiny", engine_kwargs={"seconds": 0.002}, pool=on(cluster))
    site = RayPool(TinyBackend, config)
    (client,) = site._clients()
    try:
        client._load()
        for room in (1, 20, 1 << 30):
            keys = [c.key for c in client._generate(Slowly(many(30, n=2)), room)]
            assert sorted(keys) == sorted((str(i), s) for i in range(30) for s in range(2))
        assert len(taken) > 60 + 9 + 9 and taken[-1] == 0
    finally:
        client._close()
        site._close()


def test_large_scores_come_whole_and_can_be_written_to(pool):
    ids = np.arange(60, dtype=np.int32)
    responses = [Rollout(request_id=str(i), sample=i, prompt_ids=ids[:3], token_ids_T=ids) for i in range(20)]
    for scores in pool()._score(
        responses, Want(top_k=2, full_logits=True)
    ):  # 12 MB each, twice the object stores in all
        assert (
            scores.logits_TV is not None
            and scores.logits_TV.shape == (60, 50_000)
            and (scores.logits_TV == scores.sample).all()
        )
        assert scores.top_ids_TK.shape == (60, 2) and scores.processed_logprobs_T is None
        scores.logits_TV[:] += 1


def test_a_slow_reader_slows_the_worker_and_an_abandoned_call_leaves_the_pool_usable(pool):
    two = pool()
    ids = np.arange(60, dtype=np.int32)
    responses = [Rollout(request_id=str(i), sample=i, prompt_ids=ids[:3], token_ids_T=ids) for i in range(100)]
    stream = two._score(responses, Want(full_logits=True))  # 1.2 GB in all
    next(stream)
    actors = [psutil.Process(pid).parent() for pid in pids_of(two)]
    time.sleep(1)
    assert all(actor.memory_info().rss < 600 << 20 for actor in actors if actor)
    stream.close()
    began = time.monotonic()
    assert sorted(c.request_id for c in generate(two, [request("a"), request("b")])) == ["a", "b"]
    assert time.monotonic() - began < 60


def test_a_call_that_is_left_takes_nothing_from_the_next_one(cluster):
    """Methods of an actor overtake each other: a `next` or `cancel` of the call that was left may come after the next
    one began."""
    config = FakeBackendConfig(model_name="tiny", engine_kwargs={"seconds": 0.001}, pool=on(cluster))
    site = RayPool(TinyBackend, config)
    (client,) = site._clients()
    try:
        client._load()
        for _ in range(40):
            left = client._generate(Given(many(50)))
            next(left)
            left.close()  # type: ignore[attr-defined]
            assert len(list(client._generate(Given(many(3))))) == 3
    finally:
        client._close()
        site._close()


def test_the_public_api(cluster):
    config = {"backend_type": "fake", "model_name": "fake"}
    handler = signal.getsignal(signal.SIGTERM)
    on_ray = {"backend_specific": {"pool": {"kind": "ray", "address": cluster.address}}}
    with create_backend({**config, **on_ray}) as backend, create_backend(config) as here:
        assert signal.getsignal(signal.SIGTERM) is handler
        assert backend.generate(["Hello", "you"], max_length=5) == here.generate(["Hello", "you"], max_length=5)
        assert np.array_equal(backend.get_logits("Hello", " you"), here.get_logits("Hello", " you"))
    assert not ray.is_initialized()


# -- whoever dies ------------------------------------------------------------------------------------------------------


def test_a_node_that_leaves_costs_only_the_work_in_flight(cluster, tiny_llama):
    chance = np.random.default_rng(0)
    requests = [
        sample_requests(
            id=str(i), prompt_ids=chance.integers(0, 40_000, 4 + i % 9), sampling=Sampling(max_new_tokens=8, seed=3)
        )
        for i in range(200)
    ]
    config: dict[str, Any] = {"model_name": tiny_llama, "dtype": "float32", "batch_size": 8}
    with create_backend(HuggingFaceBackendConfig(**config)) as one:
        expected = {c.key: c for c in one.complete(requests)}
    got: list[Rollout] = []
    with create_backend(HuggingFaceBackendConfig(dp_size=2, pool=on(cluster), **config)) as backend:
        for completion in backend.complete(requests):
            got.append(completion)
            if len(got) == 60:
                cluster.remove()
    assert len(got) == 200
    others = flipped(ids_of(got), ids_of(expected.values()))
    assert all(c.text == expected[c.key].text for c in got if c.key not in others)


def test_a_node_that_comes_back_is_used_again(cluster, pool, caplog):
    two, got = pool(seconds=0.02), []
    before = list(pids_of(two))
    for completion in two._generate(Given(many(300))):
        got.append(completion.key)
        if len(got) == 20:
            cluster.remove()
        if len(got) == 60:
            cluster.add()
    assert len(got) == len(set(got)) == 300
    until(lambda: None not in pids_of(two))
    assert len(set(before) & set(pids_of(two))) == 1
    waits = [r.message for r in caplog.records if "waits for room" in r.message]
    assert (
        "(its node left the Ray cluster)" in caplog.text
        and len(waits) == 1
        and "it has 1 CPU, of which 0 CPU are free" in waits[0]
    )


@pytest.mark.parametrize("whose", ["the actor", "the engine"])
def test_a_killed_process_loses_nothing(pool, whose):
    two, got = pool(seconds=0.005), []
    for completion in two._generate(Given(many(150))):
        got.append(completion.key)
        if len(got) == 20:
            worker = psutil.Process(pids_of(two)[0])
            (worker.parent() if whose == "the actor" else worker).kill()  # type: ignore[union-attr]
    assert len(got) == len(set(got)) == 150


def test_a_replica_that_died_while_idle_is_started_again(pool):
    two = pool()
    before = list(pids_of(two))
    for pid in before:
        os.kill(pid, signal.SIGKILL)
    time.sleep(1)
    assert len(list(two._generate(Given(many(80))))) == 80
    assert not set(before) & set(pids_of(two))


def test_a_request_that_kills_every_replica_is_named_after_all_others_are_done(pool):
    two, got = pool(), []
    requests = many(40)
    with pytest.raises(
        EngineError, match=r"died three times on each of these responses, .*'die' \(sample 0\); all others"
    ) as caught:
        for completion in two._generate(Given([*requests[:20], *request("die"), *requests[20:]])):
            got.append(completion.request_id)
    assert sorted(got, key=int) == [str(i) for i in range(40)]
    assert not isinstance(caught.value, EngineDiedError) and "worker's log" in caught.value.__notes__[0]


# -- sentences ---------------------------------------------------------------------------------------------------------


def test_an_engines_own_error_keeps_its_class_and_its_warnings_are_heard(pool, caplog):
    two = pool()
    with pytest.raises(UsageError, match="a sentence of ours"):
        list(generate(two, [request("usage")]))
    list(generate(two, [request("warn")]))
    assert ("rl_onoff.tiny", logging.WARNING, "look here") in caplog.record_tuples


def test_a_failed_load_is_one_error(pool):
    with pytest.raises(UsageError, match=r"model\.name is wrong"):
        pool(fail="usage")


@pytest.mark.parametrize("lacks", ["rl_onoff", "tests"])
def test_nodes_that_lack_a_package(pool, tmp_path, lacks):
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules[{lacks!r}] = None  # it cannot be imported\n")
    with pytest.raises(
        UsageError,
        match=rf"the nodes of the Ray cluster cannot import {lacks}.*: install it there, .*pool\.runtime_env",
    ):
        pool(dp_size=1, runtime_env={"env_vars": {"PYTHONPATH": str(tmp_path)}})


def test_no_room(pool, caplog):
    with pytest.raises(
        EngineError, match=r"no room for a replica \(1 CPU\) for 2 s; it has 2 CPU, .* set backend\.dp_size or"
    ):
        pool(dp_size=3, wait_s=2)
    assert "waits for room" in caplog.text


def test_a_cluster_without_a_node_is_not_waited_for(pool, monkeypatch):
    """As when the only node of a cluster that was started here dies: room never comes."""
    monkeypatch.setattr("rl_onoff.workers.ray.alive_nodes", lambda: [])
    began = time.monotonic()
    with pytest.raises(
        EngineError, match=r"no node of the Ray cluster is alive any more: run the same command again to go on$"
    ):
        pool(dp_size=3, wait_s=60)
    assert time.monotonic() - began < 55


def test_a_wait_for_room_can_be_left(pool):
    three, errors = pool(dp_size=3, load=False), []

    def load() -> None:
        try:
            three._load()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=load)
    thread.start()
    until(lambda: sum(pid is not None for pid in pids_of(three)) == 2)
    began = time.monotonic()
    three._close()
    thread.join(55)
    assert time.monotonic() - began < 55 and len(errors) == 1


@pytest.mark.parametrize("address", ["127.0.0.1:9", "ray://127.0.0.1:9", "nowhere.invalid:6379", "what is this"])
def test_an_address_where_no_cluster_answers(address):
    config = FakeBackendConfig(model_name="fake", pool=PoolConfig(kind=PoolKind.ray, address=address))
    with pytest.raises(
        EngineError, match=rf"no Ray cluster answers at {address}: set pool\.address to one that runs, or to null"
    ):
        create_backend(config).load()


@pytest.mark.parametrize("address", ["silent.invalid:6379", "ray://silent.invalid:6379"])
def test_a_name_server_that_is_silent_is_not_waited_for(address, monkeypatch):
    assert ray_cluster.PROBE_SECONDS < 30
    monkeypatch.setattr(ray_cluster, "PROBE_SECONDS", 0.2)
    end = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: end.wait() and [])
    monkeypatch.setattr(socket, "gethostbyname", lambda *_: end.wait() and "")
    config = FakeBackendConfig(model_name="fake", pool=PoolConfig(kind=PoolKind.ray, address=address))
    try:
        with pytest.raises(EngineError, match=rf"no Ray cluster answers at {address}"):
            create_backend(config).load()
    finally:
        end.set()


def test_a_cluster_of_another_version(cluster, monkeypatch):
    monkeypatch.setattr(ray, "__version__", "2.51.0")
    with pytest.raises(
        EngineError, match=r"the Ray cluster at .* cannot be used \(Version mismatch: .*2\.51\.0.*\): set pool\.address"
    ):
        create_backend(FakeBackendConfig(model_name="fake", pool=on(cluster))).load()


def test_without_ray(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingDependencyError, match=r"pool=ray needs Ray: pip install 'rl-onoff\[ray\]'"):
        create_backend(FakeBackendConfig(model_name="fake", pool=PoolConfig(kind=PoolKind.ray))).load()


def test_a_connection_that_was_there_is_used_and_left_alone(cluster):
    ray.init(cluster.address, logging_level=logging.ERROR, log_to_driver=False)
    try:
        with create_backend(FakeBackendConfig(model_name="fake", pool=PoolConfig(kind=PoolKind.ray))) as backend:
            assert len(list(backend.complete(many(3)))) == 3
        assert ray.is_initialized()
    finally:
        ray.shutdown()


def test_a_pool_on_ray_is_no_engine_in_this_process():
    with pytest.raises(UsageError, match=r"backend\.worker=false .* pool=ray"):
        create_backend(FakeBackendConfig(model_name="fake", worker=False, pool=PoolConfig(kind=PoolKind.ray))).load()


@pytest.mark.parametrize(
    "pool", [{"kind": "slurm"}, {"adress": "auto"}, {"kind": "ray", "cpus_per_replica": 0}, {"wait_s": "long"}]
)
def test_a_wrong_pool_is_refused(pool):
    refusal = r"pool|kind is 'slurm' but must be one of local, ray|wait_s is 'long' but must be of type float"
    with pytest.raises(UsageError, match=refusal):
        create_backend({"model_name": "m", "backend_specific": {"pool": pool}})


# -- what a replica takes of the cluster -------------------------------------------------------------------------------

GPU_NODES = [
    {"CPU": 4.0, "node:__internal_head__": 1.0, "node:10.0.0.1": 1.0},
    {"CPU": 64.0, "GPU": 8.0, "node:10.0.0.2": 1.0, "accelerator_type:H100": 1.0},
    {"CPU": 64.0, "GPU": 4.0, "node:10.0.0.3": 1.0, "accelerator_type:H100": 1.0},
]


@pytest.mark.parametrize(
    ("nodes", "config", "bundle", "replicas"),
    [
        (GPU_NODES, VLLMBackendConfig(tp_size=4), {"CPU": 1, "GPU": 4}, 3),
        (GPU_NODES, VLLMBackendConfig(tensor_parallel_size=3), {"CPU": 1, "GPU": 3}, 3),
        (GPU_NODES, SGLangBackendConfig(pool=PoolConfig(cpus_per_replica=8)), {"CPU": 8, "GPU": 1}, 12),
        (GPU_NODES, HuggingFaceBackendConfig(device="cpu"), {"CPU": 1}, 1),
        (GPU_NODES, FakeBackendConfig(), {"CPU": 1}, 1),
        (GPU_NODES[:1], VLLMBackendConfig(tp_size=2), {"CPU": 1}, 1),
        (GPU_NODES, VLLMBackendConfig(tp_size=12), {"CPU": 1, "node:10.0.0.2": 0.001}, 1),
    ],
)
def test_what_a_replica_reserves(nodes, config: EngineConfig, bundle, replicas):
    reserved, placed = berth(nodes, config)
    assert reserved == bundle and replicas_that_fit(nodes, config) == replicas
    across_nodes = any(name.startswith("node:") for name in bundle)
    assert (placed is config) != across_nodes


def test_vllm_spans_nodes_with_its_own_ray_executor():
    _, placed = berth(GPU_NODES, VLLMBackendConfig(tp_size=12))
    assert placed.engine_kwargs == {"distributed_executor_backend": "ray"}
    mine = VLLMBackendConfig(tp_size=12, engine_kwargs={"distributed_executor_backend": "mp", "x": 1})
    assert berth(GPU_NODES, mine)[1].engine_kwargs == mine.engine_kwargs, "who says so themselves is not overruled"


def test_more_gpus_than_there_are():
    with pytest.raises(
        UsageError, match=r"tp_size=12 needs 12 GPUs but the Ray cluster has no node with more than 8, and sglang"
    ):
        berth(GPU_NODES, SGLangBackendConfig(tp_size=12))
    with pytest.raises(
        UsageError, match=r"tp_size=16 needs 16 GPUs but the Ray cluster has 12 GPUs in all: set backend\.tp_size"
    ):
        berth(GPU_NODES, VLLMBackendConfig(tp_size=16))
