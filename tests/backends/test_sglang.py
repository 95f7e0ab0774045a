"""What is SGLang's own: where its scheduler cuts, shares and mixes the work, and what happens when a part of it
dies."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import psutil
import pytest

from rl_onoff.backends import BaseBackend, SGLangBackendConfig, create_backend
from rl_onoff.backends.sglang.backend import SGLangBackend
from rl_onoff.errors import EngineDiedError, UsageError
from rl_onoff.types import LogprobKind, Rollout, Sampling, TokenScores, Want, sample_requests
from tests.backends.conftest import CHUNK, MAX_LEN, TEXT
from tests.backends.moved_sglang import MovedSGLang
from tests.conftest import SGLANG_PYTHON
from tests.running import flipped, ids_of

pytestmark = pytest.mark.sglang

ON = ("sglang",)
TOLERANCE = 2e-4  # nats, float32 against float32
SAMPLER = Sampling(temperature=0.8, top_k=40, top_p=0.9)


def start(model: str, **options: Any) -> BaseBackend:
    options = {"python": SGLANG_PYTHON, "dtype": "float32", "context_length": MAX_LEN} | options
    backend = create_backend({"backend_type": "sglang", "model_name": model, "backend_specific": options})
    backend.load()
    return backend


@pytest.fixture(scope="module")
def pair(tiny_llama: str) -> Iterator[BaseBackend]:
    """Two tensor-parallel ranks (one on a single card); the last test that uses it kills one."""
    import torch

    with start(tiny_llama, tp_size=min(2, torch.cuda.device_count() or 2), logprob_kind="scaled") as backend:
        yield backend


def plain(reference: Any, response: Rollout, want: Want) -> dict[str, np.ndarray]:
    """The same numbers from a forward pass over the unpadded sequence."""
    import torch

    from rl_onoff.backends.token_stats import token_stats

    sequence = torch.as_tensor(np.concatenate([response.prompt_ids, response.token_ids_T]).astype(np.int64))[None]
    with torch.no_grad():
        logits_TV = reference(sequence).logits[0, len(response.prompt_ids) - 1 : -1]
    return token_stats(logits_TV, torch.as_tensor(response.token_ids_T), want).arrays()


def assert_scores(scores: Sequence[TokenScores], responses: Sequence[Rollout], reference: Any, want: Want) -> None:
    by_key = {score.key: score for score in scores}
    assert len(scores) == len(by_key) == len(responses)
    for response in responses:
        score = by_key[response.key]
        assert np.array_equal(score.token_ids_T, response.token_ids_T)
        for name, expected in plain(reference, response, want).items():
            got = getattr(score, name)
            assert got.shape == expected.shape and got.dtype == expected.dtype, name
            finite = np.isfinite(expected)
            assert np.array_equal(np.isfinite(got), finite), name
            if name in ("rank_T", "top_ids_TK"):
                assert (got != expected).sum() <= 0.01 * got.size, name  # equal where not tied
            else:
                assert np.abs(got[finite] - expected[finite]).max(initial=0) < (
                    5e-3 if name == "logits_TV" else TOLERANCE
                ), name


def response(text_ids: np.ndarray, num_prompt: int, num_tokens: int, sample: int = 0, shift: int = 0) -> Rollout:
    token_ids_T = np.roll(text_ids, -shift)[num_prompt : num_prompt + num_tokens]
    return Rollout(request_id="r", sample=sample, prompt_ids=text_ids[:num_prompt], token_ids_T=token_ids_T)


@pytest.fixture(scope="module")
def text_ids(tiny_llama: str) -> np.ndarray:
    from transformers import AutoTokenizer

    return np.asarray(AutoTokenizer.from_pretrained(tiny_llama).encode(8 * TEXT), np.int32)


# -- scores ------------------------------------------------------------------------------------------------------------


def test_eight_long_responses_share_a_prompt_in_pieces(
    backend: BaseBackend, text_ids: np.ndarray, reference: Any
) -> None:
    responses = [response(text_ids, 75, 10 + 7 * i, sample=i, shift=3 * i) for i in range(8)]
    want = Want(top_k=5)
    assert_scores(list(backend.score(responses, want)), responses, reference, want)


def test_what_is_cached_is_still_scored(backend: BaseBackend, text_ids: np.ndarray, reference: Any) -> None:
    again = response(text_ids, 40, 50)
    longer_prompt = response(text_ids, 70, 20)  # its prompt is in the cache, and so are its tokens
    for _ in range(2):
        assert_scores(list(backend.score([again, longer_prompt][:1])), [again], reference, Want())
        assert_scores(list(backend.score([longer_prompt])), [longer_prompt], reference, Want())


def test_a_last_chunk_of_one_token_gives_all_statistics_back(
    backend: BaseBackend, text_ids: np.ndarray, reference: Any
) -> None:
    """Its own row is not wanted: the statistics are complete a step before the request is."""
    two_chunks = response(text_ids, 45, 2 * CHUNK, shift=9)
    for _ in range(2):  # the second time all but what is scored is cached, and the chunks begin with the response
        assert_scores(list(backend.score([two_chunks])), [two_chunks], reference, Want())


def test_full_logits(backend: BaseBackend, text_ids: np.ndarray, reference: Any) -> None:
    responses = [response(text_ids, 1, 1), response(text_ids, 30, 40, sample=1)]
    want = Want(full_logits=True, sampler=SAMPLER)
    assert_scores(list(backend.score(responses, want)), responses, reference, want)


def test_the_public_api_says_the_same_its_use_is_announced_and_a_killed_detokenizer_is_an_error_in_time(
    tiny_llama: str, reference: Any, caplog: pytest.LogCaptureFixture
) -> None:
    config = SGLangBackendConfig(model_name=tiny_llama, python=SGLANG_PYTHON, dtype="float32")
    with caplog.at_level(logging.WARNING), MovedSGLang(config) as backend:
        assert "statistics inside the engine do not work" in caplog.text
        assert "sampling.seed has no effect" in caplog.text
        assert not backend.info.in_engine_stats
        ids = np.arange(100, 300, dtype=np.int32)
        responses = [response(ids, 12, 1), response(ids, 12, 100, sample=1, shift=30)]  # the longer one in two pieces
        want = Want(top_k=3, full_logits=True)
        assert_scores(list(backend.score(responses, want)), responses, reference, want)
        kill_and_see(backend, "detokenizer")


def test_two_tensor_parallel_ranks(pair: BaseBackend, reference: Any) -> None:
    assert pair.info.in_engine_stats
    ids = np.arange(100, 200, dtype=np.int32)
    responses = [response(ids, 12, 40, sample=i, shift=i) for i in range(3)]
    want = Want(top_k=3, full_logits=True)
    assert_scores(list(pair.score(responses, want)), responses, reference, want)

    (completion,) = pair.complete(
        [sample_requests(id="a", prompt_ids=ids[:12], sampling=Sampling(max_new_tokens=10, temperature=0.7))]
    )
    assert completion.kind is LogprobKind.scaled
    scaled = plain(reference, completion, Want(sampler=Sampling(temperature=0.7)))["processed_logprobs_T"]
    assert np.abs(completion.logprobs_T - scaled).max() < TOLERANCE


# -- sampling ----------------------------------------------------------------------------------------------------------


def test_a_response_depends_on_its_seed_alone(backend: BaseBackend, text_ids: np.ndarray) -> None:
    base = Sampling(max_new_tokens=12, n=3, seed=5)
    samplings = [
        base,
        base.replace(top_k=20, top_p=0.8),
        base.replace(min_p=0.1, temperature=1.5),
        base.replace(temperature=0.0),
    ]
    requests = [
        sample_requests(id=str(i), prompt_ids=text_ids[: 9 + i], sampling=sampling)
        for i, sampling in enumerate(samplings)
    ]
    together = {completion.key: completion for completion in backend.complete(requests)}
    assert len(together) == 12
    for i, prompt in enumerate(requests):
        alone = ids_of(backend.complete([prompt[i % 3]]))
        flipped(alone, {key: together[key].token_ids_T for key in alone})
    assert len({tuple(together["0", sample].token_ids_T) for sample in range(3)}) == 3
    assert len({tuple(together["3", sample].token_ids_T) for sample in range(3)}) == 1


def test_the_same_seed_draws_what_our_own_loop_draws(
    backend: BaseBackend, text_ids: np.ndarray, tiny_llama: str
) -> None:
    huggingface = create_backend(
        {"backend_type": "huggingface", "model_name": tiny_llama, "backend_specific": {"dtype": "float32"}}
    )
    sampling = Sampling(max_new_tokens=12, n=2, temperature=0.9, top_k=50, top_p=0.95, min_p=0.02, seed=3)
    request = sample_requests(id="a", prompt_ids=text_ids[:20], sampling=sampling)
    with huggingface:
        flipped(ids_of(backend.complete([request])), ids_of(huggingface.complete([request])))


def test_the_engine_survives_an_abandoned_call(backend: BaseBackend, text_ids: np.ndarray) -> None:
    stream = backend.complete(
        [sample_requests(id="a", prompt_ids=text_ids[:20], sampling=Sampling(max_new_tokens=300, n=6, stop=[" ", "."]))]
    )
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert (
        len(
            list(
                backend.complete(
                    [sample_requests(id="b", prompt_ids=text_ids[:9], sampling=Sampling(max_new_tokens=3))]
                )
            )
        )
        == 1
    )


def test_limits_are_named_before_anything_runs(backend: BaseBackend, text_ids: np.ndarray) -> None:
    with pytest.raises(UsageError, match="at most 32"):
        list(
            backend.complete(
                [sample_requests(id="a", prompt_ids=text_ids[:9], sampling=Sampling(stop=[f"s{i}" for i in range(33)]))]
            )
        )
    with pytest.raises(UsageError, match=r"backend\.logprob_kind"):
        SGLangBackend(SGLangBackendConfig(model_name="smollm2", logprob_kind=LogprobKind.processed))


def test_a_response_may_fill_the_context(backend: BaseBackend, text_ids: np.ndarray, reference: Any) -> None:
    assert backend.info.max_len == MAX_LEN
    prompt_ids = np.resize(text_ids, 510)
    (completion,) = backend.complete(
        [sample_requests(id="a", prompt_ids=prompt_ids, sampling=Sampling(max_new_tokens=9))]
    )
    assert len(completion.token_ids_T) <= 2
    full = Rollout(request_id="a", sample=0, prompt_ids=prompt_ids, token_ids_T=text_ids[:2])
    assert_scores(list(backend.score([full])), [full], reference, Want())


def test_every_sampling_argument_is_explicit() -> None:
    args = SGLangBackend.sampling_args(Sampling(top_k=0, temperature=0.0, max_new_tokens=7, stop=["x"]), (2, 5), seed=9)
    assert (
        args["top_k"] == 1 << 30
        and args["temperature"] == 0
        and args["stop_token_ids"] == [2, 5]
        and args["sampling_seed"] == 9
    )
    assert (
        args["n"] == 1 and args["stop"] == ["x"] and args["repetition_penalty"] == 1.0 and args["max_new_tokens"] == 7
    )


# -- death -------------------------------------------------------------------------------------------------------------


def test_a_killed_scheduler_is_an_error_in_time(pair: BaseBackend) -> None:
    kill_and_see(pair, "scheduler")


def kill_and_see(backend: BaseBackend, part: str) -> None:
    """Kill a part of the engine once the first of many responses has come; this process must live on to say so."""
    worker = psutil.Process(backend._core.pid)  # type: ignore[union-attr]
    family = [worker, *worker.children(recursive=True)]
    alive = [child for child in family if child.status() != psutil.STATUS_ZOMBIE]  # the others have no command line
    victim = next(child for child in alive if part in " ".join(child.cmdline()))
    prompt_ids = np.arange(100, 110, dtype=np.int32)
    requests = [
        sample_requests(id="short", prompt_ids=prompt_ids, sampling=Sampling(max_new_tokens=1)),
        sample_requests(id="long", prompt_ids=prompt_ids, sampling=Sampling(max_new_tokens=400, n=100)),
    ]
    first, began = None, 0.0
    with pytest.raises(EngineDiedError) as caught:
        for completion in backend.complete(requests):
            if first is None:
                first, began = completion.key, time.monotonic()
                os.kill(victim.pid, signal.SIGKILL)
    assert time.monotonic() - began < 60
    assert first not in caught.value.in_flight
    assert len(caught.value.in_flight) > 0
    backend.close()
    assert not psutil.wait_procs(family, timeout=10)[1]
