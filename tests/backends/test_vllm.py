"""What is vLLM's own: where its scheduler cuts, caches and shares the work, its two ways to statistics, and its
deaths."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest

from rl_onoff.backends import BaseBackend, VLLMBackendConfig, create_backend
from rl_onoff.backends.vllm.backend import VLLMBackend
from rl_onoff.errors import EngineDiedError, MissingDependencyError, UsageError
from rl_onoff.types import (
    FinishReason,
    LogprobKind,
    Rollout,
    SampleRequest,
    Sampling,
    TokenScores,
    Want,
    sample_requests,
)
from tests.backends.conftest import MAX_LEN, TEXT, vllm_on_a_gpu
from tests.backends.moved_vllm import GoneVLLM, MovedVLLM, UncappedVLLM
from tests.conftest import SGLANG_PYTHON

pytestmark = pytest.mark.vllm

ON = ("vllm",)
TOLERANCE = 2e-4  # nats, float32 against float32
SAMPLER = Sampling(temperature=0.7, top_k=40, top_p=0.9)
EVERYTHING = Want(top_k=4, full_logits=True, sampler=SAMPLER)


def config(model: str, engine_kwargs: dict[str, Any] | None = None, **options: Any) -> VLLMBackendConfig:
    own = {"dtype": "float32", "max_model_len": MAX_LEN, **vllm_on_a_gpu(**engine_kwargs or {})}
    return VLLMBackendConfig(model_name=model, **own | options)


def plain(reference: Any, response: Rollout, want: Want) -> TokenScores:
    """The same numbers from a forward pass over the unpadded sequence."""
    import torch

    from rl_onoff.backends.token_stats import token_stats

    sequence = torch.as_tensor(np.concatenate([response.prompt_ids, response.token_ids_T]).astype(np.int64))[None]
    with torch.no_grad():
        logits_TV = reference(sequence).logits[0, len(response.prompt_ids) - 1 : -1]
    return token_stats(logits_TV, torch.as_tensor(response.token_ids_T), want).of(response)


def check(scores: TokenScores, expected: TokenScores, want: Want = EVERYTHING) -> None:
    assert scores.kind is LogprobKind.raw
    for name in ("logprobs_T", "entropy_T", "logsumexp_T"):
        np.testing.assert_allclose(getattr(scores, name), getattr(expected, name), atol=TOLERANCE, err_msg=name)
    if want.top_k:
        np.testing.assert_allclose(scores.top_logprobs_TK, expected.top_logprobs_TK, atol=TOLERANCE)
    # a rank may differ where two logits are equal to rounding
    assert (scores.rank_T == expected.rank_T).mean() > 0.97
    if want.full_logits:
        assert scores.logits_TV is not None and scores.logits_TV.shape == expected.logits_TV.shape
        np.testing.assert_allclose(scores.logits_TV, expected.logits_TV, atol=5e-3)
    if want.sampler is not None:
        np.testing.assert_allclose(scores.nucleus_mass_T, expected.nucleus_mass_T, atol=2e-3)
        both = np.isfinite(scores.processed_logprobs_T) & np.isfinite(expected.processed_logprobs_T)
        np.testing.assert_allclose(scores.processed_logprobs_T[both], expected.processed_logprobs_T[both], atol=5e-3)


def texts(backend: BaseBackend, count: int, seed: int = 0) -> list[np.ndarray]:
    """Pieces of plain text, as token ids."""
    source = np.asarray(backend.encode(8 * TEXT), np.int32)
    rng = np.random.default_rng(seed)
    starts = rng.integers(0, len(source) - 60, count)
    return [source[start : start + int(rng.integers(1, 60))] for start in starts]


def sharing_a_prompt(backend: BaseBackend, count: int = 8, seed: int = 0) -> list[Rollout]:
    *pieces, a, b, c = texts(backend, count + 3, seed)
    prompt_ids = np.concatenate([a, b, c, a, b])
    return [
        Rollout(request_id="shared", sample=i, prompt_ids=prompt_ids, token_ids_T=piece)
        for i, piece in enumerate(pieces)
    ]


# -- the shared engine -------------------------------------------------------------------------------------------------


def test_a_response_that_this_engine_has_just_sampled(backend: BaseBackend, reference: Any) -> None:
    prompt_ids = np.concatenate(texts(backend, 6, seed=3))[:40]  # not cut: see vllm_engine.py on seeds
    sampling = Sampling(max_new_tokens=70, temperature=0.9)
    (rollout,) = backend.complete(sample_requests(id="a", prompt_ids=prompt_ids, sampling=sampling))
    (scores,) = backend.score([rollout])
    check(scores, plain(reference, rollout, Want()), Want())
    np.testing.assert_allclose(scores.logprobs_T, rollout.logprobs_T, atol=TOLERANCE)


def test_the_longest_sequence_and_the_shortest(backend: BaseBackend, reference: Any) -> None:
    ids = np.resize(np.concatenate(texts(backend, 20)), backend.info.max_len)
    responses = [
        Rollout(request_id="long", sample=0, prompt_ids=ids[:-40], token_ids_T=ids[-40:]),
        Rollout(request_id="short", sample=0, prompt_ids=ids[:1], token_ids_T=ids[1:2]),
    ]
    for scores, response in zip(
        sorted(backend.score(responses, Want()), key=lambda s: s.request_id), responses, strict=True
    ):
        check(scores, plain(reference, response, Want()), Want())


# -- a tiny model, for what needs an engine of its own -----------------------------------------------------------------


def test_a_vllm_without_the_runner_we_know_degrades_loudly_to_the_public_api(
    tiny_llama: str, reference: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with GoneVLLM(config(tiny_llama)) as backend:
        assert not backend.info.in_engine_stats
        assert (
            "not computed inside this vLLM (AttributeError: 'ModelRunner' object has no attribute 'requests')"
            in caplog.text
        )
        ids = np.concatenate(texts(backend, 4))[:60]
        responses = [
            Rollout(request_id="long", sample=0, prompt_ids=ids[:20], token_ids_T=ids[20:60]),
            Rollout(request_id="short", sample=0, prompt_ids=ids[:1], token_ids_T=ids[5:6]),
        ]
        for scores in backend.score(responses, EVERYTHING):
            check(scores, plain(reference, next(r for r in responses if r.key == scores.key), EVERYTHING))
        request = sample_requests(id="a", prompt_ids=responses[0].prompt_ids, sampling=Sampling(max_new_tokens=5))
        (completion,) = backend.complete([request])
        assert completion.kind is LogprobKind.raw
        np.testing.assert_allclose(
            completion.logprobs_T, plain(reference, completion, Want()).logprobs_T, atol=TOLERANCE
        )


def test_a_vllm_that_moved_its_insides_degrades_loudly(
    tiny_llama: str, reference: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with MovedVLLM(config(tiny_llama)) as backend:
        assert not backend.info.in_engine_stats
        assert "not computed inside this vLLM (its logprobs are off by" in caplog.text
        ids = np.arange(9, 20, dtype=np.int32)
        response = Rollout(request_id="a", sample=0, prompt_ids=ids[:5], token_ids_T=ids[5:])
        (scores,) = backend.score([response], Want())
        check(scores, plain(reference, response, Want()), Want())


SMALL = {"enable_chunked_prefill": True, "max_num_batched_tokens": 48, "max_num_seqs": 16}


def check_in_chunks(backend: BaseBackend, reference: Any) -> None:
    """A shared prompt and its responses in pieces of 48 tokens at most, the second time with what is cached."""
    responses = sharing_a_prompt(backend)
    responses.append(dataclasses.replace(responses[3], sample=8))  # the same response twice: its rows are cached
    expected = {r.key: plain(reference, r, EVERYTHING) for r in responses}
    for _ in range(2):
        got = {s.key: s for s in backend.score(responses, EVERYTHING)}
        assert set(got) == set(expected)
        for key, scores in got.items():
            check(scores, expected[key])
    assert backend.info.in_engine_stats


def test_rows_that_were_cached_are_scored_again(tiny_llama: str, reference: Any) -> None:
    with UncappedVLLM(config(tiny_llama, engine_kwargs=SMALL)) as backend:
        check_in_chunks(backend, reference)


def test_processed_logprobs_are_those_of_the_sampler(tiny_llama: str) -> None:
    prompt_ids = np.arange(20, 40, dtype=np.int32)
    with create_backend(config(tiny_llama, logprob_kind=LogprobKind.processed)) as backend:
        samplers = {
            "k": Sampling(top_k=5, temperature=0.7),
            "p": Sampling(top_p=0.5),
            "m": Sampling(min_p=0.2),
            "greedy": Sampling(temperature=0),
        }
        requests = [
            sample_requests(id=name, prompt_ids=prompt_ids, sampling=s.replace(max_new_tokens=12, n=2))
            for name, s in samplers.items()
        ]
        for completion in list(backend.complete(requests)):
            assert completion.kind is LogprobKind.processed
            (scores,) = backend.score([completion], Want(sampler=samplers[completion.request_id]))
            np.testing.assert_allclose(
                completion.logprobs_T, scores.processed_logprobs_T, atol=1e-3, err_msg=completion.request_id
            )
        (completion,) = backend.complete(
            [sample_requests(id="eos", prompt_ids=prompt_ids, sampling=Sampling(max_new_tokens=2000))]
        )
        assert completion.finish_reason in (FinishReason.length, FinishReason.eos)
        assert len(completion.token_ids_T) <= backend.info.max_len - len(prompt_ids)

        worker = psutil.Process(backend._core.pid)
        requests = sample_requests(id="a", prompt_ids=prompt_ids, sampling=Sampling(max_new_tokens=400, n=200))
        _killed_in_the_middle(backend, requests, worker.pid)
        assert not worker.is_running()


def _killed_in_the_middle(backend: BaseBackend, requests: list[SampleRequest], pid: int) -> None:
    """Kill `pid` when the first response is there: the error comes in time and names what is missing."""
    got: set[tuple[str, int]] = set()
    began = 0.0
    with pytest.raises(EngineDiedError) as caught:
        for completion in backend.complete(requests):
            got.add(completion.key)
            if not began:
                began = time.monotonic()
                os.kill(pid, signal.SIGKILL)
    assert time.monotonic() - began < 60
    assert set(caught.value.in_flight) == {r.key for r in requests} - got


def test_two_devices_with_prefill_in_chunks(tiny_llama: str, reference: Any) -> None:
    import torch

    devices = min(2, torch.cuda.device_count() or 2)  # on a CPU each is a core
    with create_backend(config(tiny_llama, tp_size=devices, engine_kwargs=SMALL)) as backend:
        check_in_chunks(backend, reference)
        if devices == 1:
            return  # a machine with one card has no second rank to lose
        children = psutil.Process(backend._core.pid).children(recursive=True)
        ranks = [child for child in children if "Worker" in " ".join(child.cmdline())]
        assert len(ranks) == 2, [child.cmdline() for child in children]
        prompt_ids = np.arange(20, 60, dtype=np.int32)
        sampling = Sampling(temperature=0)  # a CPU's vLLM cannot draw with a seed from a prompt that it cuts
        requests = [
            request
            for i in range(200)
            for request in sample_requests(
                id=str(i), prompt_ids=prompt_ids, sampling=sampling.replace(max_new_tokens=8 + i)
            )
        ]
        _killed_in_the_middle(backend, requests, ranks[1].pid)
        assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children)


# -- without an engine -------------------------------------------------------------------------------------------------


def test_every_sampling_argument_is_explicit() -> None:
    args = VLLMBackend.sampling_args(
        Sampling(temperature=0.5, top_k=7, top_p=0.9, stop=["x"], max_new_tokens=3, n=4), [2, 5], 11
    )
    assert (args["n"], args["seed"], args["max_tokens"], args["stop"], args["stop_token_ids"]) == (
        1,
        11,
        3,
        ["x"],
        [2, 5],
    )
    assert (args["temperature"], args["top_k"], args["top_p"], args["min_p"], args["repetition_penalty"]) == (
        0.5,
        7,
        0.9,
        0.0,
        1.0,
    )
    assert args["ignore_eos"] and args["detokenize"]
    assert not VLLMBackend.sampling_args(Sampling(), [2], 0)["detokenize"]


@pytest.mark.parametrize(
    ("sampling", "words"),
    [
        (Sampling(temperature=2.5), "set sampling.temperature"),
        (Sampling(temperature=0.001), "set sampling.temperature"),
        (Sampling(min_p=0.1, top_p=0.9), "set sampling.min_p=0"),
    ],
)
def test_what_vllm_would_do_differently_is_refused(sampling: Sampling, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        VLLMBackend.sampling_args(sampling, [2], 0)


def test_scaled_logprobs_are_refused_before_anything_loads() -> None:
    with pytest.raises(UsageError, match=r"cannot report scaled logprobs: set backend\.logprob_kind"):
        create_backend(config("smollm2", logprob_kind=LogprobKind.scaled))


def test_an_unknown_engine_option_is_named(tiny_llama: str) -> None:
    with pytest.raises(UsageError, match=r"backend\.engine_kwargs\.max_num_bached_tokens is no option"):
        create_backend(config(tiny_llama, engine_kwargs={"max_num_bached_tokens": 64})).load()


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'rl-onoff\[vllm\]'"):
        VLLMBackend(config("smollm2", worker=False))._load()


def test_an_environment_without_the_package_is_named(tiny_llama: str) -> None:
    backend = create_backend(config(tiny_llama, python=SGLANG_PYTHON))
    with pytest.raises(
        MissingDependencyError, match=r"pip install 'rl-onoff\[vllm\]' \(in the environment of backend\.python="
    ):
        backend.load()


@pytest.mark.parametrize(("limit", "capped"), [((), ()), ((None,), (7,)), ((5,), (5,)), ((9,), (7,))])
def test_a_job_shares_no_cached_block_of_its_response(limit: Any, capped: Any) -> None:
    """vLLM 0.33 hands on a limit of its own, 0.32 none."""
    from rl_onoff.backends.vllm.hooks import JOB, capped_scheduler

    asked: list[Any] = []
    manager = SimpleNamespace(get_computed_blocks=lambda request, *most: asked.append((request.num_tokens, *most)))
    theirs = SimpleNamespace(get_scheduler_cls=lambda: lambda **_: SimpleNamespace(kv_cache_manager=manager))
    manager = capped_scheduler(vllm_config=SimpleNamespace(scheduler_config=theirs)).kv_cache_manager
    for extra_args in ({JOB: {"first": 7}}, None):
        request = SimpleNamespace(num_tokens=20, sampling_params=SimpleNamespace(extra_args=extra_args))
        manager.get_computed_blocks(request, *limit)
    assert asked == [(8, *capped), (20, *limit)]


def test_the_newer_model_runner_is_hooked_too() -> None:
    """It needs a GPU; this is its interface (vLLM 0.32) over a linear model, in two chunks of which one holds two
    requests."""
    import torch

    from rl_onoff.backends.token_stats import token_stats
    from rl_onoff.backends.vllm.hooks import Recorder, hook, job_of, read

    weight_VD = torch.randn(11, 4, generator=torch.Generator().manual_seed(0))
    hidden_ND = torch.randn(20, 4, generator=torch.Generator().manual_seed(1))
    seen: list[str] = []
    worker = SimpleNamespace(
        add_request=lambda req_id, req_idx, params: seen.append(req_id),
        remove_request=lambda req_id: seen.remove(req_id),
        compute_prompt_logprobs=lambda logits_fn, hidden, batch, *rest: {"original": rest},
    )
    recorder = Recorder(11, keeps=True)
    runner = SimpleNamespace(prompt_logprobs_worker=worker, prepare_inputs=lambda batch: batch)
    coming = hook(runner, recorder)
    responses = {
        number: Rollout(
            request_id="r",
            sample=number,
            prompt_ids=np.arange(size, dtype=np.int32),
            token_ids_T=np.arange(6, dtype=np.int32) + number,
        )
        for number, size in ((1, 3), (2, 4))
    }
    for number, response in responses.items():
        worker.add_request(f"internal-{number}", number, SimpleNamespace(extra_args=job_of(number, response)))
    worker.add_request("internal-3", 3, SimpleNamespace(extra_args=None))
    folder = Path("/nowhere")

    def step(ids: list[int], firsts: list[int], counts: list[int]) -> Any:
        offsets = np.cumsum([0, *counts])
        batch = SimpleNamespace(
            req_ids=[f"internal-{i}" for i in ids],
            num_computed_prefill_tokens_np=np.array(firsts),
            num_scheduled_tokens=np.array(counts),
            query_start_loc_np=offsets,
        )
        # request 1 owns rows 0-7, request 2 rows 8-16 of hidden_ND; request 3 is none of ours
        owned = {1: 0, 2: 8, 3: 0}
        spans = [
            slice(owned[i] + first, owned[i] + first + count)
            for i, first, count in zip(ids, firsts, counts, strict=True)
        ]
        rows = torch.cat([hidden_ND[span] for span in spans])
        runner.prepare_inputs(batch)  # what a step begins with: whose layers are watched is known from then on
        known = [(job["number"], first, count, offset) for job, first, count, offset in coming()]
        every = zip(ids, firsts, counts, offsets.tolist(), strict=False)
        assert known == [of for of in every if of[0] != 3]
        return worker.compute_prompt_logprobs(lambda h: h @ weight_VD.T, rows, batch, "more")

    step([1], [0], [5])  # not recording yet
    recorder.begin(Want(top_k=2), folder)
    assert step([3, 1], [0, 0], [2, 5]) == {"original": ("more",)}
    step([1, 2], [5, 0], [3, 9])
    results = read(recorder.fetch([1, 2]), folder)
    for number, response in responses.items():
        start = {1: 0, 2: 8}[number] + len(response.prompt_ids) - 1
        expected = token_stats(
            hidden_ND[start : start + 6] @ weight_VD.T, torch.as_tensor(response.token_ids_T), Want(top_k=2)
        )
        np.testing.assert_allclose(results[number].logprobs_T, expected.logprobs_T, atol=1e-5)
        np.testing.assert_array_equal(results[number].top_ids_TK, expected.top_ids_TK)
    worker.remove_request("internal-1")
    assert seen == ["internal-2", "internal-3"]
    step([2], [4], [5])  # as if the first blocks had been cached
    assert read(recorder.fetch([2, 9]), folder) == {}
