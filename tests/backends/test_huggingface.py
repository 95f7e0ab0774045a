"""What only the HuggingFace backend does: gradients, padding of every kind of model, memory, models without a split."""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from rl_onoff.backends import BaseBackend, HuggingFaceBackendConfig, create_backend
from rl_onoff.backends.huggingface.limits import Limits
from rl_onoff.errors import EngineError, UsageError
from rl_onoff.types import FinishReason, LogprobKind, Rollout, SampleRequest, Sampling, Want, sample_requests
from tests.running import flipped, ids_of


@pytest.fixture(scope="module")
def tiny(tiny_llama: str) -> Iterator[BaseBackend]:
    with create_backend(
        {"backend_type": "huggingface", "model_name": tiny_llama, "backend_specific": {"torch_dtype": "float32"}}
    ) as backend:
        yield backend


def random_model(folder: Any, config: Any, tokenizer_from: str) -> str:
    """A random model of any family, saved with the built-in model's tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer_from).save_pretrained(folder)
    return str(folder)


def families() -> dict[str, Any]:
    """Models that differ in absolute positions, soft-capped logits, scaled logits, sliding windows, tied heads."""
    from transformers import CohereConfig, Gemma2Config, GPT2Config, GraniteConfig, MistralConfig

    shape: dict[str, Any] = {
        "vocab_size": 49152, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 256,
        "pad_token_id": 2, "eos_token_id": 2, "bos_token_id": 1,
    }  # fmt: skip
    return {
        "gpt2": GPT2Config(
            vocab_size=49152, n_embd=64, n_layer=2, n_head=2, n_positions=256, eos_token_id=2, bos_token_id=1
        ),
        "gemma2": Gemma2Config(**shape, final_logit_softcapping=5.0, sliding_window=8, query_pre_attn_scalar=32),
        "cohere": CohereConfig(**{k: v for k, v in shape.items() if k != "head_dim"}, logit_scale=0.25),
        "granite": GraniteConfig(**{k: v for k, v in shape.items() if k != "head_dim"}, logits_scaling=3.0),
        "mistral": MistralConfig(**shape, sliding_window=8),
    }


def some_rollouts(seed: int, count: int = 12) -> list[Rollout]:
    rng = np.random.default_rng(seed)

    def ids(low: int, high: int) -> np.ndarray:
        return rng.integers(5, 49000, int(rng.integers(low, high))).astype(np.int32)

    alone = [Rollout(request_id=f"{i}", sample=0, prompt_ids=ids(1, 30), token_ids_T=ids(1, 40)) for i in range(count)]
    prompt_ids = ids(20, 30)
    return alone + [
        Rollout(request_id="shared", sample=i, prompt_ids=prompt_ids, token_ids_T=ids(1, 40)) for i in range(4)
    ]


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "cohere", "granite", "mistral"])
def test_batches_of_any_family_give_the_logits_of_one_unpadded_sequence(
    family: str, tmp_path: Any, smollm2: str
) -> None:
    path = random_model(tmp_path, families()[family], smollm2)
    with create_backend(
        {"backend_type": "huggingface", "model_name": path, "backend_specific": {"torch_dtype": "float32"}}
    ) as backend:
        assert backend._split.splits
        assert backend._split.packs is (family in ("gpt2", "cohere", "granite"))
        responses = {r.key: r for r in some_rollouts(1)}
        for scores in backend.score(responses.values(), Want(full_logits=True)):
            response = responses[scores.key]
            ids = np.concatenate([response.prompt_ids, response.token_ids_T])[None].astype(np.int64)
            with torch.no_grad():
                logits = backend._split.whole(torch.as_tensor(ids, device=backend._split.device)).logits
            plain = logits[0, len(response.prompt_ids) - 1 : -1].float().cpu().numpy()
            assert scores.logits_TV is not None
            np.testing.assert_allclose(scores.logits_TV, plain, atol=1e-4)
        # decoding pads on the left: the tokens of a mixed batch are those of each prompt alone
        requests = [
            sample_requests(
                id=r.request_id, prompt_ids=r.prompt_ids, sampling=Sampling(max_new_tokens=6, temperature=0)
            )
            for r in some_rollouts(2, 5)[:5]
        ]
        together = {c.key: c for c in backend.complete(requests)}
        for request in requests:
            (alone,) = backend.complete([request])
            assert alone.token_ids_T.tolist() == together[alone.key].token_ids_T.tolist()
            np.testing.assert_allclose(alone.logprobs_T, together[alone.key].logprobs_T, atol=1e-4)


def test_a_model_that_does_not_split_is_scored_whole(tiny: BaseBackend, caplog: pytest.LogCaptureFixture) -> None:
    from rl_onoff.backends.huggingface.model import SplitModel

    expected = {s.key: s.logprobs_T for s in tiny.score(some_rollouts(3))}
    split = tiny._split
    try:
        head = split.whole.get_output_embeddings
        other = torch.nn.Linear(64, 49152, device=split.device)  # a head that is not the model's
        split.whole.get_output_embeddings = lambda: other
        tiny._split = SplitModel(split.whole)
        split.whole.get_output_embeddings = head
        assert not tiny._split.splits and "cannot be split" in caplog.text
        for scores in tiny.score(some_rollouts(3), Want(top_k=2)):
            np.testing.assert_allclose(scores.logprobs_T, expected[scores.key], atol=1e-4)
        (completion,) = tiny.complete(
            [sample_requests(id="a", prompt_ids=np.arange(9, dtype=np.int32), sampling=Sampling(max_new_tokens=4))]
        )
        assert len(completion.token_ids_T) == 4
    finally:
        tiny._split = split


def test_gradients_of_given_responses_reach_the_weights(tiny: BaseBackend) -> None:
    logits = tiny.get_logits(
        ["The capital of France is", "One plus one is"], [" Paris, I think", " two"], compute_gradients=True
    )
    weight = tiny._split.whole.model.layers[0].self_attn.q_proj.weight
    weight.grad = None
    loss = sum(-row.log_softmax(-1)[:, 0].sum() for row in logits)
    loss.backward()
    gradient = weight.grad.clone()
    assert gradient.abs().sum() > 0
    # against a finite difference along the gradient
    step = 1e-3 / float(gradient.norm())
    with torch.no_grad():
        weight += step * gradient
    moved = tiny.get_logits(["The capital of France is", "One plus one is"], [" Paris, I think", " two"])
    with torch.no_grad():
        weight -= step * gradient
    change = sum(-float(torch.as_tensor(row).log_softmax(-1)[:, 0].sum()) for row in moved) - float(loss.detach())
    assert change == pytest.approx(float(step * (gradient**2).sum()), rel=0.1)


def test_gradients_of_a_generation(tiny: BaseBackend) -> None:
    result = tiny.generate("The capital of France is", max_length=4, compute_gradients=True)
    assert result["logits"].requires_grad and result["logits"].shape == (len(result["token_ids"]), 49152)
    result["logits"].sum().backward()
    plain = tiny.get_logits(tiny.encode("The capital of France is"), result["token_ids"])
    np.testing.assert_allclose(result["logits"].detach().cpu().numpy(), plain, atol=1e-4)


def test_scoring_still_builds_no_graph_after_gradients_were_asked_for(tiny: BaseBackend) -> None:
    tiny.get_logits("a", "b", compute_gradients=True)
    assert isinstance(tiny.get_logits("a", "b"), np.ndarray)
    assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()


def staggered(num_prompts: int = 6, n: int = 3) -> list[SampleRequest]:
    """Samples whose limits lie far apart, of prompts of many lengths, some with a stop string."""
    prompts = {r.request_id: r.prompt_ids for r in some_rollouts(5, num_prompts) if r.sample == 0}
    stops: list[Any] = [[], ["e"], []]
    return [
        request
        for i, (id, prompt_ids) in enumerate(prompts.items())
        for sample in range(n)
        for request in sample_requests(
            id=id, prompt_ids=prompt_ids, samples=(sample,),
            sampling=Sampling(max_new_tokens=1 + 37 * (i + sample) % 150, temperature=0.7, seed=i, stop=stops[i % 3]),
        )
    ]  # fmt: skip


def made(backend: BaseBackend, requests: list[SampleRequest]) -> dict[Any, Rollout]:
    return {rollout.key: rollout for rollout in backend.complete(requests)}


def assert_alike(got: dict[Any, Rollout], expected: dict[Any, Rollout]) -> None:
    others = flipped(ids_of(got.values()), ids_of(expected.values()))
    for key in got.keys() - others:
        assert got[key].finish_reason is expected[key].finish_reason
        np.testing.assert_allclose(got[key].logprobs_T, expected[key].logprobs_T, atol=1e-4)


@pytest.mark.parametrize(
    ("grows", "steps_at_once"),
    [(True, 1), (True, 4), (False, 1)],
    ids=["joined caches", "several draws at once", "caches of another kind"],
)
def test_rows_that_leave_and_enter_do_not_change_a_response(
    tiny: BaseBackend, grows: bool, steps_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = staggered()
    alone = {key: rollout for request in requests for key, rollout in made(tiny, [request]).items()}
    assert {FinishReason.stop, FinishReason.length} <= {rollout.finish_reason for rollout in alone.values()}
    monkeypatch.setattr(tiny._limits, "rows", 5)
    monkeypatch.setattr(tiny._limits, "steps", steps_at_once)
    monkeypatch.setattr(tiny._split, "cache_grows", grows)
    widths = []
    last_logits = tiny._split.last_logits

    def recorded(**inputs: Any) -> Any:
        widths.append(tuple(inputs["input_ids"].shape))
        return last_logits(**inputs)

    monkeypatch.setattr(tiny._split, "last_logits", recorded)
    assert_alike(made(tiny, requests), alone)
    steps = [rows for rows, width in widths if width == 1]
    in_order = sorted(requests, key=lambda request: (-len(request.prompt_ids), request.key))
    lengths = [len(alone[request.key].token_ids_T) for request in in_order]
    until_all_end = sum(max(lengths[i : i + 5]) for i in range(0, len(lengths), 5))
    assert max(steps) == 5
    if steps_at_once == 1 and grows:
        assert len(steps) < 0.8 * until_all_end, "no row waits for the longest one of its batch"
    if grows:
        prefilled = sum(rows for rows, width in widths if width > 1)
        assert prefilled == len({r.prompt_ids.tobytes() for r in requests}), "a prompt is computed once for its samples"


def test_out_of_memory_halves_the_batch_and_changes_no_response(
    tiny: BaseBackend, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    requests, rollouts = staggered(), some_rollouts(6)
    expected, scores = made(tiny, requests), {s.key: s.logprobs_T for s in tiny.score(rollouts)}
    monkeypatch.setattr(tiny, "_limits", Limits(rows=8, cached_tokens=10**6, tokens=2048))
    body = tiny._split.body
    room = {"rows": 3, "tokens": 700}

    def small(*args: Any, input_ids: Any, **kwargs: Any) -> Any:
        if (input_ids.shape[1] == 1 and len(input_ids) > room["rows"]) or input_ids.numel() > room["tokens"]:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")
        return body(*args, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(tiny._split, "body", small)
    assert_alike(made(tiny, requests), expected)
    assert tiny._limits.rows == 2 and "at most 4 at once" in caplog.text
    tiny._limits.tokens, room["tokens"] = 512, 200
    for got in tiny.score(rollouts):
        np.testing.assert_allclose(got.logprobs_T, scores[got.key], atol=1e-4)
    assert tiny._limits.tokens < 256
    room["rows"] = room["tokens"] = 0
    with pytest.raises(EngineError, match="alone runs out of memory"):
        made(tiny, requests)
    with pytest.raises(EngineError, match="alone runs out of memory"):
        list(tiny.score(rollouts))


def test_the_batch_is_chosen_by_what_memory_holds(tiny: BaseBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    from rl_onoff.backends.huggingface import limits

    model = tiny._split
    assert model.cache_bytes == 2 * 2 * 2 * 32 * 4  # keys and values of two layers with two heads of 32 floats
    chosen = []
    for free in (2**24, 2**28, 2**40):
        monkeypatch.setattr(limits, "_free_ram", lambda free=free: free)
        monkeypatch.setattr(limits, "_free_gpu_memory", lambda _, free=free: free)
        chosen.append(Limits.of(HuggingFaceBackendConfig(), model))
    assert chosen[0].rows < chosen[1].rows <= chosen[2].rows and chosen[0].cached_tokens < chosen[2].cached_tokens
    assert tiny.info.batch == tiny._limits.rows > 1
    fixed = Limits.of(HuggingFaceBackendConfig(batch_size=3, max_batch_tokens=77), model)
    assert (fixed.rows, fixed.cached_tokens, fixed.tokens) == (3, 77, 77)
    with pytest.raises(UsageError, match=r"set backend\.batch_size=auto"):
        HuggingFaceBackendConfig(batch_size="many")
    with pytest.raises(UsageError, match=r"set backend\.batch_size=auto"):
        HuggingFaceBackendConfig(batch_size=0)


def test_the_context_ends_a_response(tiny: BaseBackend) -> None:
    request = sample_requests(
        id="long", prompt_ids=np.arange(5, 5 + tiny.info.max_len - 3, dtype=np.int32), sampling=Sampling(temperature=0)
    )
    (completion,) = tiny.complete([request])
    assert 1 <= len(completion.token_ids_T) <= 3


def test_nothing_comes_from_the_generation_config(tiny_llama: str, tmp_path: Any) -> None:
    import json
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(tiny_llama, folder)
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(
        json.dumps(settings | {"top_k": 1, "repetition_penalty": 5.0, "do_sample": True, "temperature": 0.1})
    )
    requests = [
        sample_requests(id="0", prompt_ids=np.arange(9, dtype=np.int32), sampling=Sampling(max_new_tokens=30, seed=4))
    ]
    ids = []
    for path in (tiny_llama, str(folder)):
        with create_backend(
            {"backend_type": "huggingface", "model_name": path, "backend_specific": {"torch_dtype": "float32"}}
        ) as backend:
            ids.append(next(iter(backend.complete(requests))).token_ids_T.tolist())
    assert ids[0] == ids[1]


@pytest.mark.parametrize("kind", list(LogprobKind))
def test_kinds_of_logprobs(tiny_llama: str, kind: LogprobKind) -> None:
    options = {"torch_dtype": "float32", "logprob_kind": kind.value}
    sampling = Sampling(max_new_tokens=12, temperature=0.5, top_k=5, seed=2)
    prompt_ids = np.arange(9, dtype=np.int32)
    with create_backend(
        {"backend_type": "huggingface", "model_name": tiny_llama, "backend_specific": options}
    ) as backend:
        (completion,) = backend.complete([sample_requests(id="0", prompt_ids=prompt_ids, sampling=sampling)])
        response = Rollout(request_id="0", sample=0, prompt_ids=prompt_ids, token_ids_T=completion.token_ids_T)
        (scores,) = backend.score([response], Want(sampler=sampling, full_logits=True))
    assert completion.kind is kind and scores.logits_TV is not None
    scaled = (
        torch.as_tensor(scores.logits_TV / 0.5)
        .log_softmax(-1)
        .gather(-1, torch.as_tensor(completion.token_ids_T.astype(np.int64))[:, None])
    )
    expected = {
        LogprobKind.raw: scores.logprobs_T,
        LogprobKind.processed: scores.processed_logprobs_T,
        LogprobKind.scaled: scaled[:, 0].numpy(),
    }
    np.testing.assert_allclose(completion.logprobs_T, expected[kind], atol=1e-4)


def test_draws_follow_the_distribution() -> None:
    from rl_onoff.backends.sampler import draw

    likely = {0: 2.0, 1: 1.0, 255: 0.0, 256: 1.5, 999: -1.0}  # in three blocks of the sampler, the last not a full one
    logits = torch.full((1000,), -torch.inf)
    logits[list(likely)] = torch.tensor(list(likely.values()))
    keys = np.random.Philox(0).random_raw(4000).view(np.int64)
    tokens, logprobs = draw(logits.repeat(4000, 1), [Sampling()] * 4000, keys, LogprobKind.raw)
    expected = torch.softmax(logits, -1).numpy()
    np.testing.assert_allclose(np.bincount(tokens, minlength=1000) / 4000, expected, atol=0.025)
    np.testing.assert_allclose(logprobs, np.log(expected[tokens]), atol=1e-5)
    assert set(tokens.tolist()) == set(likely)
    tokens, _ = draw(logits.repeat(4000, 1), [Sampling(top_k=2)] * 4000, keys, LogprobKind.processed)
    assert set(tokens.tolist()) == {0, 256}


def test_the_noise_is_exponential_and_independent() -> None:
    from rl_onoff.backends.sampler import exponential

    keys = torch.as_tensor(np.random.Philox(1).random_raw(1000).view(np.int64))
    near = torch.arange(1000)  # keys that differ in a few bits
    for noise in (exponential(keys, 400), exponential(near, 400)):
        assert noise.min() > 0
        uniform = (-noise).exp().numpy()
        np.testing.assert_allclose(np.histogram(uniform, 20, (0, 1))[0] / uniform.size, 0.05, atol=0.0015)  # 4 sigma
        for axis in (0, 1):
            close = np.corrcoef(np.delete(uniform, 0, axis).ravel(), np.delete(uniform, -1, axis).ravel())[0, 1]
            assert abs(close) < 0.007  # 4 sigma
    alone = exponential(keys[7:8], 300)
    assert torch.equal(alone[0], exponential(keys, 400)[7, :300]), (
        "neither the batch nor the size of the vocabulary matters"
    )


@pytest.mark.parametrize("collects", (True, False))
def test_loading_leaves_garbage_collection_as_the_caller_has_it(tiny_llama: str, collects: bool) -> None:
    gc.unfreeze()
    (gc.enable if collects else gc.disable)()
    try:
        with create_backend(HuggingFaceBackendConfig(model_name=tiny_llama, dtype="float32")):
            assert gc.isenabled() is collects and bool(gc.get_freeze_count()) is collects
        assert gc.get_freeze_count() == 0  # a model that is not needed any more can be collected
    finally:
        gc.enable()


def test_peak_memory_stays_far_below_the_full_logits(tiny_llama: str) -> None:
    """Scoring a batch must not hold (batch, length, vocabulary): measured in its own process, over the weights."""
    code = f"""
import numpy as np
from rl_onoff.backends import create_backend
from rl_onoff.types import Rollout, Want
rng = np.random.default_rng(0)
ids = lambda n: rng.integers(5, 49000, n).astype(np.int32)
responses = [Rollout(request_id=str(i), sample=0, prompt_ids=ids(8), token_ids_T=ids(240)) for i in range(16)]
options = {{"torch_dtype": "float32"}}
backend = create_backend({{"backend_type": "huggingface", "model_name": {tiny_llama!r}, "backend_specific": options}})
backend.load()
list(backend.score(responses[:1], Want(top_k=5)))
def peak_kib():  # not ru_maxrss, which a child takes over from whoever started it
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
before = peak_kib()
list(backend.score(responses, Want(top_k=5)))
print((peak_kib() - before) / 1024)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    naive_mib = 16 * 248 * 49152 * 4 / 2**20
    assert float(run.stdout) < naive_mib / 4
