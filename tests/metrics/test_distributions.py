"""Metrics of whole distributions: against independent arithmetic, and the bounds that the top-k variant must keep."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl_onoff.compare import distributions
from rl_onoff.compare.distributions import by_rows, distribution_terms, log_softmax, topk_terms
from rl_onoff.errors import UsageError


def top(logprobs_TV: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    ids_TK = np.argsort(-logprobs_TV, axis=1, kind="stable")[:, :k]
    return ids_TK, np.take_along_axis(logprobs_TV, ids_TK, axis=1)


def random_logits(seed: int, T: int, V: int, noise: float) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    logits_TV = 3 * rng.standard_normal((T, V))
    return logits_TV, logits_TV + noise * rng.standard_normal((T, V))


def test_by_hand():
    terms = distribution_terms(np.log([[0.5, 0.25, 0.25]]), np.log([[0.25, 0.25, 0.5]]), np.array([0]), k=2)
    assert terms["kl_forward"][0] == pytest.approx(0.25 * math.log(2))
    assert terms["kl_reverse"][0] == pytest.approx(0.25 * math.log(2))
    assert terms["tv"][0] == pytest.approx(0.25)
    assert terms["js"][0] == pytest.approx(0.5 * math.log(0.5 / 0.375) + 0.25 * math.log(0.25 / 0.375))
    assert terms["entropy_behaviour"][0] == pytest.approx(1.5 * math.log(2))
    assert terms["entropy_diff"][0] == pytest.approx(0)
    assert terms["argmax_agreement"][0] == 0
    assert (terms["rank_behaviour"][0], terms["rank_target"][0]) == (1, 2)


def test_agrees_with_plain_python():
    q_logits_TV, p_logits_TV = random_logits(0, 4, 50, 0.5)
    terms = distribution_terms(q_logits_TV.astype(np.float32), p_logits_TV.astype(np.float32), k=10)
    for t in range(4):
        q, p = ([math.exp(x) for x in np.float32(row[t]).tolist()] for row in (q_logits_TV, p_logits_TV))
        q, p = [x / math.fsum(q) for x in q], [x / math.fsum(p) for x in p]
        kl = lambda a, b: math.fsum(x * math.log(x / y) for x, y in zip(a, b, strict=True))  # noqa: E731
        m = [(x + y) / 2 for x, y in zip(q, p, strict=True)]
        best = [set(sorted(range(50), key=lambda i: -d[i])[:10]) for d in (q, p)]
        assert terms["kl_forward"][t] == pytest.approx(kl(q, p), abs=1e-12)
        assert terms["kl_reverse"][t] == pytest.approx(kl(p, q), abs=1e-12)
        assert terms["js"][t] == pytest.approx((kl(q, m) + kl(p, m)) / 2, abs=1e-12)
        assert terms["entropy_target"][t] == pytest.approx(-math.fsum(x * math.log(x) for x in p), abs=1e-12)
        assert terms["topk_jaccard"][t] == len(best[0] & best[1]) / len(best[0] | best[1])


def test_impossible_outcomes_are_counted_not_infinite():
    q_TV, p_TV = np.log([[0.5, 0.5], [0.5, 0.5]]), np.array([[0.0, -np.inf], [-0.7, -0.7]])
    terms = distribution_terms(q_TV, p_TV)
    assert terms["_tokens_infinite_kl"].tolist() == [1, 0]
    assert terms["kl_forward"][0] == pytest.approx(0.5 * math.log(0.5) + 0.5 * 20)
    assert terms["entropy_target"][0] == 0
    assert all(np.isfinite(term).all() for term in terms.values())


def test_different_vocabularies_are_refused():
    with pytest.raises(UsageError, match="same vocabulary"):
        distribution_terms(np.zeros((2, 5)), np.zeros((2, 6)))


def test_topk_by_hand():
    # Shared id: 7. Ids 1 and 2 are on one side only: they go to the rest. The sampled token is 9, in neither list.
    terms = topk_terms(
        np.array([[7, 1]]),
        np.log([[0.5, 0.2]]),
        np.array([[2, 7]]),
        np.log([[0.4, 0.3]]),
        np.array([9]),
        np.log([0.1]),
        np.log([0.2]),
    )
    q, p = np.array([0.5, 0.1, 0.4]), np.array([0.3, 0.2, 0.5])
    assert terms["kl_forward_topk"][0] == pytest.approx(np.sum(q * np.log(q / p)))
    assert terms["kl_reverse_topk"][0] == pytest.approx(np.sum(p * np.log(p / q)))
    assert terms["tv_topk"][0] == pytest.approx(0.2)
    assert (terms["mass_outside_behaviour"][0], terms["mass_outside_target"][0]) == pytest.approx((0.4, 0.5))
    assert terms["topk_jaccard"][0] == pytest.approx(1 / 3)
    assert terms["argmax_agreement"][0] == 0


@pytest.mark.parametrize("column", [0, 1])
def test_a_sampled_token_already_listed_is_not_counted_twice(column):
    ids, logs = np.array([[3, 5]]), np.log([[0.6, 0.3]])
    listed = topk_terms(ids, logs, ids, logs, ids[:, column], logs[:, column], logs[:, column])
    assert listed["mass_outside_behaviour"][0] == pytest.approx(0.1)
    assert listed["kl_forward_topk"][0] == pytest.approx(0, abs=1e-15) and listed["topk_jaccard"][0] == 1


def test_lists_of_unlike_width_and_padding():
    terms = topk_terms(np.array([[4, 2, -1]]), np.log([[0.5, 0.3, 1e-9]]), np.array([[4]]), np.log([[0.5]]))
    assert terms["topk_jaccard"][0] == 1  # both have 4 first; judged on the shorter width
    assert terms["mass_outside_behaviour"][0] == pytest.approx(0.5)
    long, short = (np.array([[4, 2]]), np.log([[0.5, 0.3]])), (np.array([[2]]), np.log([[0.6]]))
    for lists in ((*long, *short), (*short, *long)):  # 2 is shared, but only one side has it first
        terms = topk_terms(*lists, np.array([4]), np.log([0.5]), np.log([0.1]))
        assert terms["topk_jaccard"][0] == 0 and terms["tv_topk"][0] > 0


def test_nothing_shared_leaves_one_bucket():
    terms = topk_terms(np.array([[1]]), np.log([[0.9]]), np.array([[2]]), np.log([[0.9]]))
    assert (
        terms["kl_forward_topk"][0] == 0 and terms["mass_outside_behaviour"][0] == 1 and terms["topk_jaccard"][0] == 0
    )


def test_float32_rounding_makes_no_divergence_of_its_own():
    """1 − Σ of 64 float32 probabilities is off by ~1e-7: that must not read as a gap between equal policies."""
    q_TV, _ = random_logits(1, 200, 64, 0)
    logq_TV = log_softmax(6 * q_TV).astype(np.float32)
    ids_TK, logs_TK = top(logq_TV, 60)
    nudged_TK = np.nextafter(logs_TK, np.float32(0))
    terms = topk_terms(ids_TK, logs_TK, ids_TK, nudged_TK)
    assert terms["kl_forward_topk"].max() < 1e-7 and terms["_tokens_infinite_kl"].sum() == 0


@settings(deadline=None, max_examples=200)
@given(
    seed=st.integers(0, 2**32),
    k=st.integers(1, 12),
    other_k=st.integers(1, 12),
    noise=st.floats(0, 3),
    sampled=st.booleans(),
)
def test_topk_is_a_lower_bound_and_divergences_behave(seed, k, other_k, noise, sampled):
    logq_TV, logp_TV = (log_softmax(x) for x in random_logits(seed, 5, 12, noise))
    exact, mirrored = distribution_terms(logq_TV, logp_TV), distribution_terms(logp_TV, logq_TV)
    ids_T = np.arange(5)
    own = (ids_T, logq_TV[ids_T, ids_T], logp_TV[ids_T, ids_T]) if sampled else ()
    coarse = topk_terms(*top(logq_TV, k), *top(logp_TV, other_k), *own)
    for name in ("kl_forward", "kl_reverse", "js", "tv"):
        assert (coarse[f"{name}_topk"] <= exact[name] + 1e-9).all(), name
        assert (coarse[f"{name}_topk"] >= 0).all() and (exact[name] >= 0).all()
    assert (coarse["entropy_behaviour_topk"] <= exact["entropy_behaviour"] + 1e-9).all()
    np.testing.assert_allclose(exact["js"], mirrored["js"], atol=1e-12)
    np.testing.assert_allclose(exact["kl_forward"], mirrored["kl_reverse"], atol=1e-12)
    assert (exact["js"] <= math.log(2)).all() and (exact["tv"] <= 1 + 1e-12).all()


def test_topk_of_the_whole_vocabulary_is_exact():
    logq_TV, logp_TV = (log_softmax(x) for x in random_logits(3, 20, 16, 1.0))
    exact, coarse = distribution_terms(logq_TV, logp_TV), topk_terms(*top(logq_TV, 16), *top(logp_TV, 16))
    np.testing.assert_allclose(coarse["kl_forward_topk"], exact["kl_forward"], atol=1e-9)
    np.testing.assert_allclose(coarse["entropy_target_topk"], exact["entropy_target"], atol=1e-9)


def test_row_chunks_change_nothing(monkeypatch):
    logits = random_logits(4, 23, 16, 1.0)
    whole = distribution_terms(*logits, np.arange(23) % 16)
    monkeypatch.setattr(distributions, "CHUNK", 50)
    for name, term in by_rows(distribution_terms, *logits, np.arange(23) % 16).items():
        np.testing.assert_array_equal(term, whole[name])
