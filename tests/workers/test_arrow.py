"""What travels between nodes arrives as it went: every value, shape and type, and memory of its own."""

from __future__ import annotations

import dataclasses
import pickle

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from rl_onoff.types import Completion, FinishReason, LogprobKind, Request, Response, Sampling, TokenScores
from rl_onoff.workers.arrow import batch_of, items_of

EXTREME = np.array([-np.inf, np.inf, np.nan, -0.0, 1e-45, np.finfo(np.float32).max], np.float32)

names = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
samples = st.integers(0, 2**40)
lengths = st.integers(0, 5)


def floats(*shape: int):
    return arrays(np.float32, shape, elements=st.floats(width=32))


def ids(*shape: int):
    return arrays(np.int32, shape)


samplings = st.builds(
    Sampling, temperature=st.floats(0, 1e30), top_p=st.floats(1e-300, 1), seed=st.integers(0, 2**63 - 1),
    stop=st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), max_size=2),
)  # fmt: skip
requests = lengths.flatmap(
    lambda n: st.builds(
        Request,
        id=names,
        prompt_ids=ids(n),
        sampling=samplings,
        samples=st.none() | st.lists(st.integers(0, 9)).map(tuple),
    )
)
responses = lengths.flatmap(
    lambda n: st.builds(Response, request_id=names, sample=samples, prompt_ids=ids(n + 1), token_ids_T=ids(n))
)
completions = lengths.flatmap(
    lambda n: st.builds(
        Completion, request_id=names, sample=samples, token_ids_T=ids(n), text=names, logprobs_T=floats(n),
        kind=st.sampled_from(LogprobKind), finish_reason=st.sampled_from(FinishReason),
    )
)  # fmt: skip
scores = st.tuples(lengths, lengths, lengths).flatmap(
    lambda s: st.builds(
        TokenScores, request_id=names, sample=samples, token_ids_T=ids(s[0]), logprobs_T=floats(s[0]), entropy_T=floats(s[0]),
        logsumexp_T=floats(s[0]), rank_T=ids(s[0]), top_ids_TK=ids(s[0], s[1]), top_logprobs_TK=floats(s[0], s[1]),
        kind=st.sampled_from(LogprobKind), processed_logprobs_T=st.none() | floats(s[0]), nucleus_mass_T=st.none() | floats(s[0]),
        logits_TV=st.none() | floats(s[0], s[2]),
    )
)  # fmt: skip


def travelled(items: list) -> list:
    """The items after the way that Ray sends them: pickled, with the buffers beside it, read-only."""
    buffers: list[pickle.PickleBuffer] = []
    sent = pickle.dumps(batch_of(items), protocol=5, buffer_callback=buffers.append)
    return items_of(pickle.loads(sent, buffers=[bytes(buffer) for buffer in buffers]))


def assert_same(one: object, other: object) -> None:
    assert type(one) is type(other)
    for field in dataclasses.fields(one):  # type: ignore[arg-type]
        mine, theirs = getattr(one, field.name), getattr(other, field.name)
        if isinstance(mine, np.ndarray):
            assert mine.dtype == theirs.dtype and mine.shape == theirs.shape and mine.tobytes() == theirs.tobytes(), (
                field.name
            )
        else:
            assert mine == theirs and type(mine) is type(theirs), field.name


@pytest.mark.parametrize("kind", [requests, responses, completions, scores])
def test_everything_comes_back_as_it_went(kind):
    @given(st.lists(kind, min_size=1, max_size=4))
    def check(items):
        for before, after in zip(items, travelled(items), strict=True):
            assert_same(before, after)

    check()


def test_extreme_numbers_keep_their_bits():
    n = len(EXTREME)
    ids_T = np.array([0, -1, 2**31 - 1, -(2**31), 5, 6], np.int32)
    item = TokenScores(
        request_id="ü\0", sample=0, token_ids_T=ids_T, logprobs_T=EXTREME, entropy_T=EXTREME, logsumexp_T=EXTREME, rank_T=ids_T,
        top_ids_TK=np.zeros((n, 0), np.int32), top_logprobs_TK=np.zeros((n, 0), np.float32), logits_TV=np.tile(EXTREME, (n, 2)),
    )  # fmt: skip
    (back,) = travelled([item])
    assert_same(item, back)


def test_arrays_are_written_to_and_hold_nothing_else_in_memory():
    item = Response(
        request_id="a", sample=0, prompt_ids=np.arange(3, dtype=np.int32), token_ids_T=np.arange(2, dtype=np.int32)
    )
    one, two = travelled([item, item])
    one.token_ids_T[:] = 7
    assert one.token_ids_T.base is None and two.token_ids_T.tolist() == [0, 1]


def test_text_and_meta_stay_and_a_shared_sampler_is_sent_once():
    sampling = Sampling(stop=["stop here" * 100])
    ids_P = np.arange(3, dtype=np.int32)
    batch = batch_of(
        [
            Request(id=str(i), prompt_ids=ids_P, sampling=sampling, prompt="text", meta={"not": object()})
            for i in range(100)
        ]
    )
    assert not {"prompt", "meta"} & set(batch.schema.names) and batch.get_total_buffer_size() < 10_000
    back = items_of(batch)
    assert back[0].sampling == sampling and back[0].sampling is back[99].sampling


def test_numbers_are_flat_columns_of_32_bits():
    batch = batch_of(
        [Response(request_id="a", sample=0, prompt_ids=np.arange(3, dtype=np.int32), token_ids_T=np.zeros(0, np.int32))]
    )
    assert batch.schema.field("prompt_ids").type == pa.large_list(pa.int32())
