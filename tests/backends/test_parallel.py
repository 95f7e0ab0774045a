"""Replicas and tensor parallelism of the real engines: the same responses and scores as one engine in one process."""

from __future__ import annotations

import os
import random
import signal
from typing import Any

import numpy as np
import psutil
import pytest

from rl_onoff.backends import BaseBackend, create_backend
from rl_onoff.errors import EngineDiedError, UsageError
from rl_onoff.types import Completion, Request, Response, Sampling, TokenScores, Want
from rl_onoff.workers import sessions
from tests.backends.conftest import options_of
from tests.running import flipped, ids_of

ON = ("vllm", "sglang")
PROMPTS = [[(7 * i + j * j) % 900 + 1 for j in range(3 + 4 * (i % 6))] for i in range(12)]
SAMPLING = Sampling(max_new_tokens=12, n=2, seed=3)
REQUESTS = [Request(id=str(i), prompt_ids=np.array(ids, np.int32), sampling=SAMPLING) for i, ids in enumerate(PROMPTS)]
RESPONSES = [
    Response(
        request_id=request.id,
        sample=s,
        prompt_ids=request.prompt_ids,
        token_ids_T=np.array(PROMPTS[(i + s + 1) % 12], np.int32),
    )
    for i, request in enumerate(REQUESTS)
    for s in range(2)
]


MANY = [
    Request(id=f"m{i}", prompt_ids=np.array(PROMPTS[i % 12], np.int32), sampling=SAMPLING.replace(n=1, seed=i))
    for i in range(200)
]


Made = tuple[dict[Any, Completion], dict[Any, TokenScores]]


def made_by(name: str, model: str, kills: int = 0, **options: Any) -> Made:
    """What an engine with these options makes."""
    with create_backend(
        {"backend_type": name, "model_name": model, "backend_specific": options_of(name) | options}
    ) as backend:
        return made_with(backend, kills)


def made_with(backend: BaseBackend, kills: int = 0) -> Made:
    """Few responses and scores of them, then two hundred responses while `kills` replicas are killed."""
    completions = list(backend.complete(REQUESTS))
    scores = list(backend.score(RESPONSES, Want(top_k=3, full_logits=True)))
    completions += in_spite_of(kills, backend)
    assert len(completions) == 224 and len(scores) == 24, "nothing is lost, nothing comes twice"
    return {c.key: c for c in completions}, {s.key: s for s in scores}


def in_spite_of(kills: int, backend: BaseBackend) -> list[Completion]:
    chance, got = random.Random(0), []
    for completion in backend.complete(MANY):
        got.append(completion)
        alive = [pid for pid in getattr(backend._core, "pids", ()) if pid is not None]
        if kills and alive and len(got) % 50 == 10:
            os.kill(chance.choice(alive), signal.SIGKILL)
            kills -= 1
    assert kills == 0
    return got


def assert_same(got: Any, expected: Any, atol: float) -> None:
    assert got[1].keys() == expected[1].keys()
    others = flipped(*(ids_of(made[0].values()) for made in (got, expected)))
    for key, completion in expected[0].items():
        if key not in others:
            assert got[0][key].text == completion.text
            np.testing.assert_allclose(got[0][key].logprobs_T, completion.logprobs_T, atol=atol)
    for key, scores in expected[1].items():
        np.testing.assert_allclose(got[1][key].logits_TV, scores.logits_TV, atol=atol)
        np.testing.assert_allclose(got[1][key].logprobs_T, scores.logprobs_T, atol=atol)
        assert np.abs(got[1][key].rank_T - scores.rank_T).max() <= 2  # of logits 1e-6 apart


@pytest.fixture(scope="module")
def alone(tiny_llama: str) -> Any:
    """By one process of HuggingFace."""
    return made_by("huggingface", tiny_llama)


def test_huggingface_replicas_give_what_one_gives(tiny_llama, alone):
    assert_same(made_by("huggingface", tiny_llama, dp_size=2), alone, atol=1e-5)


def test_hybrid_parallelism_gives_what_one_process_gives(tiny_llama, alone, capsys):
    hybrid = made_by("huggingface", tiny_llama, kills=3, dp_size=2, tp_size=2)
    assert_same(hybrid, alone, atol=1e-5)
    assert capsys.readouterr().out.startswith(
        "Setting up hybrid (data + tensor) using Accelerate\n  Data parallel shards: 2\n  Tensor parallel size: 2\n  Total GPUs: 4\n"
    )


def test_a_split_model_has_no_gradients_survives_an_early_end_and_dies_as_a_whole(tiny_llama):
    options = {"dtype": "bfloat16", "head_dtype": "float32", "tp_size": 2}
    with create_backend(
        {"backend_type": "huggingface", "model_name": tiny_llama, "backend_specific": options}
    ) as backend:
        with pytest.raises(UsageError, match=r"no gradients with backend\.tp_size=2"):
            backend.get_logits("a", "b", compute_gradients=True)
        stream = backend.complete(REQUESTS)
        next(stream)
        stream.close()
        scores = {s.key: s for s in backend.score(RESPONSES, Want(full_logits=True))}
        (rank,) = (child for child in psutil.Process(backend._core.pid).children() if not sessions.is_helper(child))
        rank.kill()
        with pytest.raises(EngineDiedError, match=f"pid {rank.pid}"):
            list(backend.score(RESPONSES))
    with create_backend(
        {"backend_type": "huggingface", "model_name": tiny_llama, "backend_specific": options | {"tp_size": 1}}
    ) as one:
        for expected in one.score(RESPONSES, Want(full_logits=True)):
            np.testing.assert_allclose(
                scores[expected.key].logits_TV, expected.logits_TV, atol=0.25
            )  # steps of bfloat16


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
    alone = made_with(backend)
    assert_same(made_by(backend.name, tiny_llama, kills=1, dp_size=2), alone, atol=1e-4)
