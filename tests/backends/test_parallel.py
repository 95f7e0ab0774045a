"""Replicas and tensor parallelism of the real engines: the same responses and scores as one engine in one process."""

from __future__ import annotations

import os
import random
import signal
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import psutil
import pytest

from rl_onoff.backends import BaseBackend, HuggingFaceBackendConfig, create_backend
from rl_onoff.backends.devices import visible_gpus
from rl_onoff.errors import EngineDiedError, UsageError
from rl_onoff.types import Rollout, Sampling, TokenScores, Want, sample_requests
from rl_onoff.workers.process import alive, is_helper
from tests.backends.conftest import options_of
from tests.backends.failing_huggingface import FailingHuggingFace
from tests.running import flipped, ids_of
from tests.workers.tiny_backend import pids_of

ON = ("vllm", "sglang")
PROMPTS = [np.array([(7 * i + j * j) % 900 + 1 for j in range(3 + 4 * (i % 6))], np.int32) for i in range(12)]
SAMPLING = Sampling(max_new_tokens=12, n=2, seed=3)
REQUESTS = [
    request
    for i, ids in enumerate(PROMPTS)
    for request in sample_requests(id=str(i), prompt_ids=ids, sampling=SAMPLING)
]
ROLLOUTS = [
    Rollout(request_id=str(i), sample=s, prompt_ids=ids, token_ids_T=PROMPTS[(i + s + 1) % 12])
    for i, ids in enumerate(PROMPTS)
    for s in range(2)
]
MANY = [
    sample_requests(id=f"m{i}", prompt_ids=PROMPTS[i % 12], sampling=SAMPLING.replace(n=1, seed=i)) for i in range(200)
]
STAIRS = [sample_requests(id=f"{n}", prompt_ids=PROMPTS[0], sampling=Sampling(max_new_tokens=n)) for n in range(1, 61)]
EVERYTHING = Want(top_k=3, full_logits=True)


Made = tuple[dict[Any, Rollout], dict[Any, TokenScores]]


def by_key(results: Iterable[Any]) -> dict[Any, Any]:
    return {result.key: result for result in results}


def made_by(name: str, model: str, kills: int = 0, **options: Any) -> Made:
    """What an engine with these options makes."""
    with create_backend(
        {"backend_type": name, "model_name": model, "backend_specific": options_of(name) | options}
    ) as backend:
        return made_with(backend, kills)


def made_with(backend: BaseBackend, kills: int = 0) -> Made:
    """Few responses and scores of them, then two hundred responses while `kills` replicas are killed."""
    rollouts = list(backend.complete(REQUESTS))
    scores = list(backend.score(ROLLOUTS, EVERYTHING))
    rollouts += in_spite_of(kills, backend)
    assert len(rollouts) == 224 and len(scores) == 24, "nothing is lost, nothing comes twice"
    return by_key(rollouts), by_key(scores)


def in_spite_of(kills: int, backend: BaseBackend) -> list[Rollout]:
    chance, got = random.Random(0), []
    for rollout in backend.complete(MANY):
        got.append(rollout)
        running = [pid for pid in pids_of(backend._core) if pid is not None] if kills else []
        if running and len(got) % 50 == 10:
            os.kill(chance.choice(running), signal.SIGKILL)
            kills -= 1
    assert kills == 0
    return got


def assert_same(got: Any, expected: Any, atol: float) -> None:
    assert got[1].keys() == expected[1].keys()
    others = flipped(*(ids_of(made[0].values()) for made in (got, expected)))
    for key, rollout in expected[0].items():
        if key not in others:
            assert got[0][key].text == rollout.text
            np.testing.assert_allclose(got[0][key].logprobs_T, rollout.logprobs_T, atol=atol)
    for key, scores in expected[1].items():
        np.testing.assert_allclose(got[1][key].logits_TV, scores.logits_TV, atol=atol)
        np.testing.assert_allclose(got[1][key].logprobs_T, scores.logprobs_T, atol=atol)
        assert np.abs(got[1][key].rank_T - scores.rank_T).max() <= 2  # of logits 1e-6 apart


@pytest.fixture(scope="module")
def enough() -> Iterator[None]:
    """Devices for four ranks: GPUs, or the CPU where there are fewer."""
    with pytest.MonkeyPatch.context() as patch:
        if len(visible_gpus()) < 4:
            patch.setenv("CUDA_VISIBLE_DEVICES", "")
        yield


@pytest.fixture(scope="module")
def alone(tiny_llama: str, enough: None) -> Any:
    """By one process of HuggingFace."""
    return made_by("huggingface", tiny_llama, worker=True)


def test_huggingface_replicas_give_what_one_gives(tiny_llama, alone):
    assert_same(made_by("huggingface", tiny_llama, dp_size=2), alone, atol=1e-5)


def test_hybrid_parallelism_gives_what_one_process_gives(tiny_llama, alone, capsys):
    hybrid = made_by("huggingface", tiny_llama, kills=3, dp_size=2, tp_size=2)
    assert_same(hybrid, alone, atol=1e-5)
    assert capsys.readouterr().out.startswith(
        "Setting up hybrid (data + tensor) using Accelerate\n"
        "  Data parallel shards: 2\n  Tensor parallel size: 2\n  Total GPUs: 4\n"
    )


def ranks_of(backend: BaseBackend) -> list[psutil.Process]:
    """The processes of the ranks other than 0."""
    children = psutil.Process(backend._core.pid).children()
    return [child for child in children if not is_helper(child)]


@pytest.mark.usefixtures("enough")
def test_a_split_model_has_no_gradients_survives_an_early_end_and_dies_as_a_whole(tiny_llama):
    options = {"dtype": "bfloat16", "head_dtype": "float32", "tp_size": 2, "batch_size": 60}
    with create_backend(
        {"backend_type": "huggingface", "model_name": tiny_llama, "backend_specific": options}
    ) as backend:
        with pytest.raises(UsageError, match=r"no gradients with backend\.tp_size=2"):
            backend.get_logits("a", "b", compute_gradients=True)
        before = by_key(backend.complete(REQUESTS))
        # of the last call the caller takes all; in the call before it, sixty responses of one batch end one by one
        for stream in (backend.score(ROLLOUTS), backend.complete(STAIRS), backend.complete(STAIRS[:1])):
            next(stream)
            stream.close()
        after = by_key(backend.complete(REQUESTS))
        assert before.keys() == after.keys()
        assert all(np.array_equal(before[key].token_ids_T, after[key].token_ids_T) for key in before)
        scores = by_key(backend.score(ROLLOUTS, Want(full_logits=True)))
        (rank,) = ranks_of(backend)
        rank.kill()
        with pytest.raises(EngineDiedError, match=f"pid {rank.pid}"):
            list(backend.score(ROLLOUTS))
    with create_backend(
        {"backend_type": "huggingface", "model_name": tiny_llama, "backend_specific": options | {"tp_size": 1}}
    ) as one:
        for expected in one.score(ROLLOUTS, Want(full_logits=True)):
            # steps of bfloat16
            np.testing.assert_allclose(scores[expected.key].logits_TV, expected.logits_TV, atol=0.25)


@pytest.mark.usefixtures("enough")
@pytest.mark.parametrize("failing", ["rank 0", "rank 1"])
def test_an_error_of_one_rank_ends_the_worker_and_leaves_nothing(tiny_llama, failing, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    backend = FailingHuggingFace(HuggingFaceBackendConfig(model_name=tiny_llama, dtype="float32", tp_size=2))
    bad = Rollout(request_id=failing, sample=0, prompt_ids=PROMPTS[0], token_ids_T=PROMPTS[1])
    with backend:
        family = [psutil.Process(backend._core.pid), *ranks_of(backend)]
        assert len(family) == 2 and len(list(backend.score(ROLLOUTS))) == len(ROLLOUTS)
        with pytest.raises(EngineDiedError, match=f"pid {family[1].pid}"):
            list(backend.score([*ROLLOUTS, bad]))
    assert not any(alive(process) for process in family)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("model", "options", "words"),
    [
        ("smollm2", {"tp_size": 2}, "num_attention_heads is 9, which backend.tp_size=2 does not divide"),
        ("tiny_llama", {"tp_size": 2, "worker": False}, "backend.worker=false keeps the engine in this process"),
        ("tiny_llama", {"tp_size": 2, "device_map": "auto"}, "both split the model"),
    ],
)
def test_what_cannot_be_split_is_refused(request, model, options, words):
    name = request.getfixturevalue(model)
    backend = create_backend({"backend_type": "huggingface", "model_name": name, "backend_specific": options})
    with pytest.raises(UsageError) as caught:
        backend.load()
    assert words in str(caught.value)


def test_replicas_of_an_engine_give_what_one_gives(backend, tiny_llama):
    if len(visible_gpus()) == 1:
        return  # a replica has a card to itself: test_pool.py says what happens with fewer
    alone = made_with(backend)
    assert_same(made_by(backend.name, tiny_llama, kills=1, dp_size=2), alone, atol=1e-4)
