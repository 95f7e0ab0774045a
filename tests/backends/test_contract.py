"""What every backend promises, checked on every backend. Real engines are compared with a plain float32 forward
pass."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from rl_onoff.backends import BaseBackend
from rl_onoff.backends.engine import Given
from rl_onoff.errors import EngineError, UsageError
from rl_onoff.types import FinishReason, LogprobKind, Rollout, SampleRequest, Sampling, Want, sample_requests
from tests.backends.conftest import TEXT
from tests.running import flipped, ids_of

TOLERANCE = 2e-4  # nats, float32 against float32
NUM_GREEDY = 12

CHAT = [
    "What is the capital of France?",
    "Name a colour.",
    "What is 2 + 3?",
    "Say hello.",
    "Who wrote Hamlet?",
    "What is the opposite of hot?",
    "Count to five.",
    "What do bees make?",
    "Finish the sentence: the sky is",
    "How many legs has a spider?",
    "What is the largest planet?",
    "Give me a rhyme for cat.",
    "Which season comes after winter?",
    "What is ice made of?",
    "Translate 'good morning' into French.",
    "What is the square of 7?",
    "What language is spoken in Brazil?",
    "Name an animal that flies.",
    "What is the first letter of the alphabet?",
    "Is water wet?",
]


def chat_ids(backend: BaseBackend, question: str) -> np.ndarray:
    tokenizer = backend.get_tokenizer()
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
    )
    return np.asarray(tokenizer.encode(text, add_special_tokens=False), np.int32)


def requests_for(backend: BaseBackend, questions: list[str], **sampling: Any) -> list[SampleRequest]:
    return [
        request
        for i, question in enumerate(questions)
        for request in sample_requests(id=str(i), prompt_ids=chat_ids(backend, question), sampling=Sampling(**sampling))
    ]


def complete(backend: BaseBackend, requests: list[SampleRequest]) -> dict[tuple[str, int], Rollout]:
    return {completion.key: completion for completion in backend.complete(requests)}


def random_responses(backend: BaseBackend, count: int = 64, seed: int = 0, longest: int = 90) -> list[Rollout]:
    """Prompts and responses of very different lengths, of plain text tokens.

    No prompt is a single token: there float32 itself is off by 1e-3 in SmolLM2's entropy, measured against float64.
    """
    rng = np.random.default_rng(seed)
    source = np.asarray(backend.encode(4 * TEXT), np.int32)

    def piece(shortest: int) -> np.ndarray:
        size = int(rng.integers(shortest, longest))
        start = int(rng.integers(0, len(source) - size))
        return source[start : start + size]

    return [Rollout(request_id=f"r{i}", sample=0, prompt_ids=piece(4), token_ids_T=piece(1)) for i in range(count)]


@dataclass(frozen=True)
class Plain:
    """What a plain forward pass says, in float64: computed once for all backends."""

    chosen_T: np.ndarray
    entropy_T: np.ndarray
    logsumexp_T: np.ndarray
    least_rank_T: np.ndarray  # ranks between these two differ by rounding alone
    most_rank_T: np.ndarray
    top_T5: np.ndarray
    logprob_of: list[dict[int, float]]  # of the fifty likeliest tokens at every position

    @classmethod
    def of(cls, logits_TV: np.ndarray, ids_T: np.ndarray) -> Plain:
        logprobs_TV = log_softmax(logits_TV)
        chosen_T = np.take_along_axis(logprobs_TV, ids_T[:, None], -1)[:, 0]
        some_T50 = np.argpartition(-logprobs_TV, 50, -1)[:, :50]
        order_T50 = np.argsort(-np.take_along_axis(logprobs_TV, some_T50, -1), -1)
        top_T50 = np.take_along_axis(some_T50, order_T50, -1)
        return cls(
            chosen_T=chosen_T,
            entropy_T=-(np.exp(logprobs_TV) * logprobs_TV).sum(-1),
            logsumexp_T=logits_TV.astype(np.float64)[:, 0] - logprobs_TV[:, 0],
            least_rank_T=1 + (logprobs_TV > chosen_T[:, None] + TOLERANCE).sum(-1),
            most_rank_T=1 + (logprobs_TV > chosen_T[:, None] - TOLERANCE).sum(-1),
            top_T5=np.take_along_axis(logprobs_TV, top_T50[:, :5], -1),
            logprob_of=[{int(i): float(row[i]) for i in top} for row, top in zip(logprobs_TV, top_T50, strict=True)],
        )


_plain: dict[bytes, Plain] = {}


def plain(reference: Any, response: Rollout) -> Plain:
    key = response.prompt_ids.tobytes() + b"|" + response.token_ids_T.tobytes()
    if key not in _plain:
        _plain[key] = Plain.of(plain_logits(reference, response), response.token_ids_T)
    return _plain[key]


def plain_logits(reference: Any, response: Rollout) -> np.ndarray:
    """(T, V) float32 logits of one unpadded sequence, by the model's own forward pass."""
    import torch

    sequence = torch.as_tensor(np.concatenate([response.prompt_ids, response.token_ids_T])[None].astype(np.int64))
    with torch.no_grad():
        return reference(sequence).logits[0, len(response.prompt_ids) - 1 : -1].numpy()


def log_softmax(logits_TV: np.ndarray) -> np.ndarray:
    shifted = logits_TV.astype(np.float64) - logits_TV.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


# -- sampling ----------------------------------------------------------------------------------------------------------


def test_a_response_is_what_was_sampled(backend: BaseBackend) -> None:
    requests = requests_for(backend, CHAT[:6], max_new_tokens=24, seed=1)
    done = complete(backend, requests)
    assert set(done) == {r.key for r in requests}
    for completion in done.values():
        assert completion.token_ids_T.dtype == np.int32 and completion.logprobs_T.dtype == np.float32
        assert 1 <= len(completion.token_ids_T) == len(completion.logprobs_T) <= 24
        assert completion.kind is LogprobKind.raw
        assert (completion.logprobs_T <= 1e-6).all()
        assert completion.text == backend.decode(completion.token_ids_T.tolist())
        ended = int(completion.token_ids_T[-1]) in backend.info.eos_ids
        assert completion.finish_reason is (FinishReason.eos if ended else FinishReason.length)


def test_eos_is_the_last_token_and_not_in_the_text(backend: BaseBackend) -> None:
    done = complete(backend, requests_for(backend, CHAT[:4], max_new_tokens=80, temperature=0.7, seed=3, n=2))
    ended = [c for c in done.values() if c.finish_reason is FinishReason.eos]
    assert ended
    eos = backend.get_tokenizer().eos_token
    for completion in ended:
        ids = completion.token_ids_T.tolist()
        assert ids[-1] in backend.info.eos_ids and not set(ids[:-1]) & set(backend.info.eos_ids)
        assert eos not in completion.text


def test_a_stop_string_cuts_the_text_and_keeps_the_ids(backend: BaseBackend) -> None:
    question = "What is the capital of France?"
    whole = complete(backend, requests_for(backend, [question], max_new_tokens=30, temperature=0))["0", 0]
    stop = whole.text[4:7]
    first = whole.text.index(stop)
    stopped = complete(
        backend, requests_for(backend, [question], max_new_tokens=30, temperature=0, stop=["never this", stop])
    )["0", 0]
    assert stopped.finish_reason is FinishReason.stop
    assert stopped.text == whole.text[:first]
    length = len(stopped.token_ids_T)
    assert stopped.token_ids_T.tolist() == whole.token_ids_T[:length].tolist()
    assert len(stopped.logprobs_T) == length
    assert stop in backend.decode(stopped.token_ids_T.tolist())
    assert stop not in backend.decode(stopped.token_ids_T[:-1].tolist())


def test_length_ends_a_response(backend: BaseBackend) -> None:
    done = complete(backend, requests_for(backend, CHAT[:3], max_new_tokens=1, n=2))
    assert len(done) == 6
    assert all(len(c.token_ids_T) == 1 for c in done.values())


def test_the_context_ends_a_response(backend: BaseBackend) -> None:
    if backend.info.max_len > 4096:
        return  # HuggingFace has no option that shortens the context: test_huggingface.py does this with a small model
    prompt_ids = np.resize(chat_ids(backend, CHAT[0]), backend.info.max_len - 3)
    requests = sample_requests(id="long", prompt_ids=prompt_ids, sampling=Sampling(max_new_tokens=50, temperature=0))
    assert 1 <= len(complete(backend, requests)["long", 0].token_ids_T) <= 3


def test_a_response_does_not_depend_on_its_batch(backend: BaseBackend) -> None:
    sampling = {"max_new_tokens": 12, "temperature": 0.8, "n": 2, "seed": 11}
    together = complete(backend, requests_for(backend, CHAT[:7], **sampling))
    alone = complete(backend, requests_for(backend, CHAT[:7], **sampling)[6:8])
    again = complete(backend, requests_for(backend, CHAT[:7][::-1], **sampling))
    same = {key: together[key] for key in alone}
    others = flipped(ids_of(alone.values()), ids_of(same.values()))
    for key in same.keys() - others:
        np.testing.assert_allclose(alone[key].logprobs_T, same[key].logprobs_T, atol=TOLERANCE)
    place = {str(i): str(6 - i) for i in range(7)}  # ids count from the other end there
    flipped(
        {(place[id], sample): ids for (id, sample), ids in ids_of(again.values()).items()}, ids_of(together.values())
    )


class Trickle(Given):
    """A supply that gives at most two requests at a time, the second two only when it is asked again."""

    def take(self, most: int | None = None, *, wait: bool) -> list[SampleRequest]:
        return super().take(2 if most is None else min(most, 2), wait=wait)


def test_work_that_comes_while_it_works(backend: BaseBackend) -> None:
    (long,) = requests_for(backend, CHAT[12:13], max_new_tokens=300, temperature=0)  # which does not end before
    short = [
        replace(r, request_id=str(i))
        for i, r in enumerate(requests_for(backend, CHAT[1:5], max_new_tokens=2, seed=3), 1)
    ]
    requests = [long, *short]
    expected = complete(backend, requests)
    core = backend._core
    came = {completion.key: completion for completion in core._generate(Trickle(requests))}  # type: ignore[union-attr]
    flipped(ids_of(came.values()), ids_of(expected.values()))
    if backend.name in ("vllm", "sglang"):
        assert next(reversed(came)) == ("0", 0), (
            "the long one is still at work when all others, which came later, are done"
        )


def test_samples_and_seeds_differ_and_a_sample_can_be_drawn_alone(backend: BaseBackend) -> None:
    requests = requests_for(backend, CHAT[1:2], max_new_tokens=16, n=4, seed=5)
    done = complete(backend, requests)
    assert len({tuple(c.token_ids_T.tolist()) for c in done.values()}) > 1
    (first, *_) = requests
    (alone,) = sample_requests(id="0", prompt_ids=first.prompt_ids, sampling=first.sampling, samples=(2,))
    only = complete(backend, [alone])
    assert list(only) == [("0", 2)]
    flipped(ids_of(only.values()), {key: done[key].token_ids_T for key in only})
    other = complete(backend, requests_for(backend, CHAT[1:2], max_new_tokens=16, n=4, seed=6))
    assert {tuple(c.token_ids_T.tolist()) for c in other.values()} != {
        tuple(c.token_ids_T.tolist()) for c in done.values()
    }


@pytest.mark.parametrize("sampling", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}], ids=str)
def test_truncation_to_one_token_is_greedy(backend: BaseBackend, sampling: dict[str, Any]) -> None:
    greedy = complete(backend, requests_for(backend, CHAT[:3], max_new_tokens=8, temperature=0))
    truncated = complete(
        backend, requests_for(backend, CHAT[:3], max_new_tokens=8, temperature=1.3, seed=9, **sampling)
    )
    for key, completion in greedy.items():
        assert truncated[key].token_ids_T.tolist() == completion.token_ids_T.tolist()


def test_greedy_text_is_the_reference_model_s(backend: BaseBackend, greedy_ids: list[list[int]]) -> None:
    if backend.name == "fake":
        return  # it has no reference model
    done = complete(backend, requests_for(backend, CHAT, max_new_tokens=NUM_GREEDY, temperature=0))
    assert [done[str(i), 0].token_ids_T.tolist() for i in range(len(CHAT))] == greedy_ids


@pytest.fixture(scope="session")
def greedy_ids(reference: Any, tiny_llama: str) -> list[list[int]]:
    """What Transformers' own `generate` answers to CHAT, one unpadded prompt at a time."""
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    answers = []
    for question in CHAT:
        messages = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with torch.no_grad():
            output = reference.generate(**prompt, max_new_tokens=NUM_GREEDY, do_sample=False, repetition_penalty=1.0)
        answers.append(output[0, prompt["input_ids"].shape[1] :].tolist())
    return answers


def test_sampled_logprobs_are_the_scored_ones(backend: BaseBackend) -> None:
    requests = requests_for(backend, CHAT[:5], max_new_tokens=20, temperature=0.8, top_k=30, top_p=0.9, seed=2)
    done = complete(backend, requests)
    for scores in backend.score(done.values()):
        np.testing.assert_allclose(scores.logprobs_T, done[scores.key].logprobs_T, atol=5e-4)


# -- scoring -----------------------------------------------------------------------------------------------------------


def test_scores_are_those_of_a_plain_forward_pass(backend: BaseBackend, reference: Any) -> None:
    responses = random_responses(backend)
    scores = {s.key: s for s in backend.score(responses, Want(top_k=5))}
    assert set(scores) == {r.key for r in responses}
    if backend.name == "fake":  # its full logits are checked by the sampler's view and its own tests
        logits = {s.key: s.logits_TV for s in backend.score(responses, Want(full_logits=True))}
    for response in responses:
        got, ids_T = scores[response.key], response.token_ids_T
        want = Plain.of(logits[response.key], ids_T) if backend.name == "fake" else plain(reference, response)
        assert got.token_ids_T.tolist() == ids_T.tolist()
        np.testing.assert_allclose(got.logprobs_T, want.chosen_T, atol=TOLERANCE)
        np.testing.assert_allclose(got.entropy_T, want.entropy_T, atol=TOLERANCE)
        np.testing.assert_allclose(got.logsumexp_T, want.logsumexp_T, atol=TOLERANCE, rtol=1e-5)
        assert ((want.least_rank_T <= got.rank_T) & (got.rank_T <= want.most_rank_T)).all()
        assert got.top_ids_TK.shape == got.top_logprobs_TK.shape == (len(ids_T), 5)
        np.testing.assert_allclose(got.top_logprobs_TK, want.top_T5, atol=TOLERANCE)
        of_ids_T5 = [[want.logprob_of[t][int(i)] for i in ids] for t, ids in enumerate(got.top_ids_TK)]
        np.testing.assert_allclose(got.top_logprobs_TK, of_ids_T5, atol=TOLERANCE)
        assert got.logits_TV is None and got.processed_logprobs_T is None


def test_responses_that_share_a_prompt(backend: BaseBackend, reference: Any) -> None:
    pieces = random_responses(backend, count=9, seed=4)
    prompt_ids = np.concatenate([pieces[8].prompt_ids, pieces[8].token_ids_T, pieces[7].prompt_ids])
    shared = [
        Rollout(request_id="same", sample=i, prompt_ids=prompt_ids, token_ids_T=pieces[i].token_ids_T) for i in range(8)
    ]
    for _ in range(2):  # the second time every engine that caches prompts has this one
        for scores in list(backend.score(shared, Want(top_k=1))):
            (alone,) = backend.score([shared[scores.sample]], Want(top_k=1))
            np.testing.assert_allclose(scores.logprobs_T, alone.logprobs_T, atol=TOLERANCE)
            if backend.name != "fake":
                np.testing.assert_allclose(
                    scores.logprobs_T, plain(reference, shared[scores.sample]).chosen_T, atol=TOLERANCE
                )


def test_full_logits(backend: BaseBackend, reference: Any) -> None:
    responses = random_responses(backend, count=4, seed=1, longest=20)
    for scores in backend.score(responses, Want(full_logits=True, top_k=2)):
        response = next(r for r in responses if r.key == scores.key)
        assert scores.logits_TV is not None
        assert (
            scores.logits_TV.shape == (len(response.token_ids_T), backend.info.vocab_size)
            and scores.logits_TV.dtype == np.float32
        )
        if backend.name != "fake":
            np.testing.assert_allclose(scores.logits_TV, plain_logits(reference, response), atol=5e-3)


@pytest.mark.parametrize(
    "sampler",
    [
        Sampling(temperature=0.6),
        Sampling(temperature=0.8, top_k=10),
        Sampling(top_p=0.8),
        Sampling(temperature=1.2, top_k=50, top_p=0.9, min_p=0.02),
    ],
    ids=["temperature", "top_k", "top_p", "all"],
)
def test_the_sampler_s_view(backend: BaseBackend, sampler: Sampling) -> None:
    responses = random_responses(backend, count=3, seed=2, longest=16)
    full = {s.key: s.logits_TV for s in backend.score(responses, Want(full_logits=True))}
    for scores in backend.score(responses, Want(sampler=sampler)):
        expected, mass_T = processed(full[scores.key], sampler)
        chosen_T = np.take_along_axis(expected, scores.token_ids_T[:, None], -1)[:, 0]
        assert scores.processed_logprobs_T is not None and scores.nucleus_mass_T is not None
        np.testing.assert_array_equal(np.isinf(scores.processed_logprobs_T), np.isinf(chosen_T))
        finite = np.isfinite(chosen_T)
        np.testing.assert_allclose(scores.processed_logprobs_T[finite], chosen_T[finite], atol=1e-3)
        np.testing.assert_allclose(scores.nucleus_mass_T, mass_T, atol=1e-3)


def processed(logits_TV: np.ndarray, sampling: Sampling) -> tuple[np.ndarray, np.ndarray]:
    """(processed logprobs (T, V), kept mass (T,)) written the plain way, one position after another, in float64."""
    out, masses = [], []
    for z_V in logits_TV.astype(np.float64):
        p_V = np.exp(z_V / sampling.temperature - (z_V / sampling.temperature).max())
        p_V /= p_V.sum()
        order = np.argsort(-p_V, kind="stable")
        kept = order[: sampling.top_k] if sampling.top_k else order
        before = np.concatenate([[0], np.cumsum(p_V[kept] / p_V[kept].sum())[:-1]])
        kept = kept[before < sampling.top_p] if sampling.top_p < 1 else kept
        kept = kept[p_V[kept] >= sampling.min_p * p_V.max()]
        row = np.full_like(p_V, -np.inf)
        row[kept] = np.log(p_V[kept] / p_V[kept].sum())
        out.append(row)
        masses.append(p_V[kept].sum())
    return np.array(out), np.array(masses)


# -- the public API ----------------------------------------------------------------------------------------------------


def test_text_in_text_out(backend: BaseBackend) -> None:
    one = backend.generate("The capital of France is", max_length=6, do_sample=False)
    assert isinstance(one, str)
    many = backend.generate(["The capital of France is", "Once upon a time"], max_length=6, do_sample=False)
    assert many[0] == one and len(many) == 2
    assert backend.generate(backend.encode("The capital of France is"), max_length=6, do_sample=False) == one
    assert backend.generate("Hello", max_length=6, seed=3) == backend.generate("Hello", max_length=6, seed=3)


def test_generate_with_logits_and_probabilities(backend: BaseBackend) -> None:
    result = backend.generate(
        "The capital of France is", max_length=5, temperature=0.7, return_logits=True, return_probs=True
    )
    assert set(result) == {"text", "token_ids", "logprobs", "finish_reason", "logits", "probs"}
    shape = (len(result["token_ids"]), backend.info.vocab_size)
    assert result["logits"].shape == result["probs"].shape == shape
    np.testing.assert_allclose(result["probs"].sum(-1), 1, atol=1e-4)
    rows = backend.generate(["The capital of France is", "Two"], max_length=3, return_logits=True)
    assert len(rows) == 2 and "probs" not in rows[0]


def test_logits_and_probabilities_of_a_given_response(backend: BaseBackend) -> None:
    logits = backend.get_logits("The capital of France is", " Paris, of course")
    ids = backend.get_tokenizer().encode(" Paris, of course", add_special_tokens=False)
    assert (
        isinstance(logits, np.ndarray)
        and logits.shape == (len(ids), backend.info.vocab_size)
        and logits.dtype == np.float32
    )
    several = backend.get_logits(["The capital of France is", "One plus one is"], [" Paris, of course", " two"])
    np.testing.assert_allclose(several[0], logits, atol=5e-3)
    probs = backend.get_probabilities("The capital of France is", " Paris, of course", temperature=2.0)
    np.testing.assert_allclose(probs, np.exp(log_softmax(logits / 2)), atol=1e-4)


def test_encode_and_decode(backend: BaseBackend) -> None:
    assert backend.decode(backend.encode("Hello, world!")) == "Hello, world!"
    ids = backend.encode(["Hello", "World"])
    assert isinstance(ids, list) and all(isinstance(i, int) for i in ids[0])
    assert backend.decode(ids) == ["Hello", "World"]
    assert backend.get_tokenizer().padding_side == "left"
    assert backend.is_loaded()


def test_wrong_input_is_one_sentence(backend: BaseBackend) -> None:
    empty = np.zeros(0, np.int32)
    with pytest.raises(UsageError, match=r"prompt .* is empty"):
        backend.generate("")
    with pytest.raises(UsageError, match="context holds"):
        backend.generate(np.ones(backend.info.max_len, np.int32))
    with pytest.raises(UsageError, match="no tokens to score"):
        list(backend.score([Rollout(request_id="a", sample=0, prompt_ids=np.ones(2, np.int32), token_ids_T=empty)]))
    with pytest.raises(UsageError, match="1 prompt but 2 responses"):
        backend.get_logits(["a"], ["b", "c"])
    with pytest.raises(ValueError, match="top_p"):
        backend.generate("Hello", top_p=0.0)
    if not backend.supports_gradients:
        with pytest.raises(ValueError, match="gives no gradients"):
            backend.get_logits("a", "b", compute_gradients=True)
    assert isinstance(backend.generate("Still alive", max_length=2), str)


def test_a_backend_must_be_loaded(backend: BaseBackend) -> None:
    fresh = type(backend)(backend.config)
    assert not fresh.is_loaded()
    with pytest.raises(EngineError, match=r"call backend\.load"):
        fresh.generate("Hello")
    fresh.close()


def test_a_stream_may_be_left_early(backend: BaseBackend) -> None:
    requests = requests_for(backend, CHAT, max_new_tokens=8)
    for _ in backend.complete(requests):
        break
    assert len(complete(backend, requests[:2])) == 2
