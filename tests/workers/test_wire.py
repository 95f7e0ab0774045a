"""What travels to and from a worker arrives as it went: every value, shape and type, in memory that can be written
to."""

from __future__ import annotations

import dataclasses
import socket
import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from rl_onoff.types import FinishReason, LogprobKind, Rollout, SampleRequest, Sampling, TokenScores, Want
from rl_onoff.workers import wire

EXTREME = np.array([-np.inf, np.inf, np.nan, -0.0, 1e-45, np.finfo(np.float32).max], np.float32)

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
samples = st.integers(0, 2**40)
lengths = st.integers(0, 5)


def floats(*shape: int):
    return arrays(np.float32, shape, elements=st.floats(width=32))


def ids(*shape: int):
    return arrays(np.int32, shape)


samplings = st.builds(
    Sampling,
    temperature=st.floats(0, 1e30),
    top_p=st.floats(1e-300, 1),
    seed=st.integers(0, 2**63 - 1),
    stop=st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), max_size=2),
)
requests = lengths.flatmap(
    lambda n: st.builds(
        SampleRequest,
        request_id=texts,
        sample=samples,
        prompt_ids=ids(n),
        sampling=samplings,
        seed=st.integers(0, 2**31 - 1),
    )
)
rollouts = lengths.flatmap(
    lambda n: st.builds(
        Rollout,
        request_id=texts,
        sample=samples,
        prompt_ids=ids(n + 1),
        token_ids_T=ids(n),
        text=texts,
        mask_T=st.none() | arrays(np.bool_, n),
        logprobs_T=st.none() | floats(n),
        kind=st.none() | st.sampled_from(LogprobKind),
        finish_reason=st.none() | st.sampled_from(FinishReason),
        reward=st.none() | st.floats(allow_nan=False),
    )
)
scores = st.tuples(lengths, lengths, lengths).flatmap(
    lambda s: st.builds(
        TokenScores,
        request_id=texts,
        sample=samples,
        token_ids_T=ids(s[0]),
        logprobs_T=floats(s[0]),
        entropy_T=st.none() | floats(s[0]),
        logsumexp_T=floats(s[0]),
        rank_T=ids(s[0]),
        top_ids_TK=ids(s[0], s[1]),
        top_logprobs_TK=floats(s[0], s[1]),
        kind=st.sampled_from(LogprobKind),
        logits_TV=st.none() | floats(s[0], s[2]),
        processed_logprobs_T=st.none() | floats(s[0]),
        nucleus_mass_T=st.none() | floats(s[0]),
    )
)


def travelled(message: Any) -> Any:
    """The message after its way through a socket."""
    one, two = map(wire.Channel, socket.socketpair())
    sender = threading.Thread(target=one.send, args=(message,))
    sender.start()
    try:
        return two.receive()
    finally:
        sender.join()
        one.close()
        two.close()


def assert_same(one: Any, other: Any) -> None:
    assert type(one) is type(other)
    for field in dataclasses.fields(one):
        mine, theirs = getattr(one, field.name), getattr(other, field.name)
        if isinstance(mine, np.ndarray):
            assert mine.dtype == theirs.dtype and mine.shape == theirs.shape, field.name
            assert mine.tobytes() == theirs.tobytes() and theirs.flags.writeable, field.name
        else:
            assert mine == theirs and type(mine) is type(theirs), field.name


@settings(deadline=None)  # no test depends on how fast the machine is
@given(st.lists(requests, max_size=4), st.booleans())
def test_requests_come_back_as_they_went(items, last):
    back = travelled(wire.Assignment(call=3, work=items, want=None, last=last))
    assert (back.call, back.last) == (3, last)
    for before, after in zip(items, back.work, strict=True):
        assert_same(before, after)


@settings(deadline=None)  # no test depends on how fast the machine is
@given(st.lists(rollouts, max_size=4), samplings)
def test_rollouts_come_back_as_they_went(items, sampling):
    want = Want(top_k=3, sampler=sampling)
    back = travelled(wire.Assignment(call=1, work=items, want=want, last=True))
    assert back.want == want
    for before, after in zip(items, back.work, strict=True):
        assert_same(before, after)
        assert_same(before, travelled(before))


@settings(deadline=None)  # no test depends on how fast the machine is
@given(scores)
def test_scores_come_back_as_they_went(item):
    assert_same(item, travelled(item))


def extreme_scores(repeat: int) -> Any:
    n = len(EXTREME)
    ids_T = np.array([0, -1, 2**31 - 1, -(2**31), 5, 6], np.int32)
    return TokenScores(
        request_id="ü\0",
        sample=0,
        token_ids_T=ids_T,
        logprobs_T=EXTREME,
        entropy_T=EXTREME.copy(),  # an array that is there twice arrives once
        logsumexp_T=EXTREME.copy(),
        rank_T=ids_T,
        top_ids_TK=np.zeros((n, 0), np.int32),
        top_logprobs_TK=np.zeros((n, 0), np.float32),
        logits_TV=np.tile(EXTREME, (n, repeat)),
    )


@pytest.mark.parametrize("repeat", [2, wire.INLINE_BYTES], ids=["in the header", "in buffers of their own"])
def test_extreme_numbers_keep_their_bits(repeat):
    item = extreme_scores(repeat)
    assert (item.logits_TV.nbytes > wire.INLINE_BYTES) == (repeat > 2)
    assert_same(item, travelled(item))


def test_arrays_that_are_not_contiguous_arrive_whole():
    logits = np.arange(600_000, dtype=np.float32).reshape(2, 300_000).T
    item = dataclasses.replace(extreme_scores(1), logits_TV=logits)
    assert np.array_equal(travelled(item).logits_TV, logits)


def test_arrays_are_written_to_and_hold_nothing_else_in_memory():
    """Keeping a small array must not keep the full logits that came with it."""
    item: Any = extreme_scores(wire.INLINE_BYTES)
    back = travelled(item)
    back.logprobs_T[:] = back.logits_TV[:] = 7
    assert np.array_equal(back.entropy_T, EXTREME, equal_nan=True)

    def owner(array: Any) -> Any:
        while isinstance(array, np.ndarray) and array.base is not None:
            array = array.base
        return memoryview(array)

    assert owner(back.logprobs_T).nbytes == EXTREME.nbytes and owner(back.logits_TV).nbytes == item.logits_TV.nbytes


def test_a_shared_prompt_and_sampler_are_sent_once():
    sampling = Sampling(stop=["stop here" * 100])
    ids_P = np.arange(1000, dtype=np.int32)
    shared = [SampleRequest(request_id="a", sample=i, seed=i, prompt_ids=ids_P, sampling=sampling) for i in range(100)]
    back = travelled(wire.Assignment(call=1, work=shared, want=None, last=True)).work
    assert len(wire.dumped(shared)[0]) < 11_000, "4,900 of them are the prompt and the sampler"
    assert [one.key for one in back] == [("a", i) for i in range(100)]
    assert all(one.sampling == sampling and np.array_equal(one.prompt_ids, ids_P) for one in back)
