"""Metrics of the sampled tokens: worked by hand, against closed forms, and as properties of any input."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from rl_onoff.compare import METRICS
from rl_onoff.compare.metrics import Thresholds, cumulative_l, log_ratios, token_terms
from tests.metrics.at_once import chosen_token_metrics, effective_sample_size

LN2 = np.log(2)


def test_by_hand():
    # Two responses: (½, ¼) under q and (¼, ½) under p; then one token ½ under both.
    q_N, p_N = np.log([0.5, 0.25, 0.5]), np.log([0.25, 0.5, 0.5])
    m = chosen_token_metrics(q_N, p_N, np.array([2, 1]))  # l = −ln 2, ln 2, 0; rho = ½, 2, 1
    expected = {
        "kl": 0.0,
        "kl_k2": LN2**2 / 3,
        "kl_k3": ((0.5 - 1 + LN2) + (2 - 1 - LN2)) / 3,
        "logprob_diff_mean": 2 * LN2 / 3,
        "logprob_diff_max": LN2,
        "logprob_diff_p50": LN2,
        "prob_diff_mean": 0.5 / 3,
        "prob_diff_max": 0.25,
        "prob_diff_std": np.std([0.25, 0.25, 0]),
        "prob_pearson": np.corrcoef([0.5, 0.25, 0.5], [0.25, 0.5, 0.5])[0, 1],
        "mult_prob_error": 5 / 3,
        "ppl_behaviour": (np.sqrt(8) + 2) / 2,
        "ppl_target": (np.sqrt(8) + 2) / 2,
        "log_ppl_diff_mean": 0.0,
        "log_ppl_diff_abs": 0.0,
        "ppl_ratio": 1.0,
        "chi2_token": (0.25 + 4 + 1) / 3 - 1,
        "chi2_seq": 0.0,
        "is_ratio_mean_token": 3.5 / 3,
        "is_ratio_std_token": np.std([0.5, 2, 1]),
        "is_ratio_min_token": 0.5,
        "is_ratio_max_token": 2.0,
        "ess_token": 3.5**2 / (3 * 5.25),
        "ess_seq": 1.0,
        "ess_token_clamped": 3.5**2 / (3 * 5.25),
        "fraction_outside": 2 / 3,
        "masked_fraction_token_tis": 0.0,
        "masked_fraction_geometric": 0.0,
    }
    for name, value in expected.items():
        assert m[name] == pytest.approx(value, abs=1e-12), name
    assert set(m) - {name for name in m if name.startswith("_")} <= set(METRICS)


def test_signs_by_hand():
    """The target finds the one token half as likely: k1 is positive, and the target's perplexity is the larger."""
    m = chosen_token_metrics(np.log([0.5]), np.log([0.25]), np.array([1]))
    assert m["kl"] == pytest.approx(LN2) and m["kl_k3"] == pytest.approx(LN2 - 0.5)
    assert (
        m["ppl_behaviour"] == pytest.approx(2)
        and m["ppl_target"] == pytest.approx(4)
        and m["ppl_ratio"] == pytest.approx(2)
    )
    assert m["log_ppl_diff_mean"] == m["log_ppl_diff_min"] == pytest.approx(LN2)
    assert m["is_ratio_max_seq"] == pytest.approx(0.5) and m["chi2_seq"] == pytest.approx(-0.75)


def test_sequence_rules_by_hand():
    # Ratios of the responses: 4, ¼, 1.21 (geometric mean 1.1), 1.
    p_N = np.log([4, 0.25, 1.1, 1.1, 1.0]) - 3
    m = chosen_token_metrics(np.full(5, -3.0), p_N, np.array([1, 1, 2, 1]), Thresholds(geometric_cap=1.2))
    assert m["masked_fraction_sequence_tis"] == 0.25  # the 4
    assert m["masked_fraction_sequence_mask"] == 0.5  # 4 and ¼
    assert m["masked_fraction_geometric"] == 0.5
    assert m["is_ratio_mean_seq"] == pytest.approx((4 + 0.25 + 1.21 + 1) / 4)
    assert m["is_ratio_max_seq"] == pytest.approx(4) and m["is_ratio_min_seq"] == pytest.approx(0.25)
    assert m["chi2_seq"] == pytest.approx(np.mean(np.square([4, 0.25, 1.21, 1])) - 1)
    assert m["log_ppl_diff_max"] == pytest.approx(np.log(4)) and m["log_ppl_diff_min"] == pytest.approx(-np.log(4))
    assert m["ess_seq"] == pytest.approx(effective_sample_size(np.array([4, 0.25, 1.21, 1])))
    assert m["ess_seq_clamped"] == pytest.approx(effective_sample_size(np.array([2, 0.5, 1.21, 1])))


def test_clip_range_is_two_sided():
    p_N = np.log([0.85, 1.25, 1.15]) - 2
    assert chosen_token_metrics(np.full(3, -2.0), p_N, np.array([3]))["fraction_outside"] == pytest.approx(1 / 3)
    for eps_low, eps_high, share in ((0.1, 0.1, 1), (0.1, 0.3, 1 / 3), (0.3, 0.1, 2 / 3)):
        uneven = Thresholds(eps_low=eps_low, eps_high=eps_high)
        assert chosen_token_metrics(np.full(3, -2.0), p_N, np.array([3]), uneven)["fraction_outside"] == pytest.approx(
            share
        )


def test_estimators_meet_the_exact_kl():
    """Over 10⁶ draws from q, k1, k2 (to third order) and k3 estimate KL(q‖p); E rho = 1 and E rho² − 1 = χ²."""
    rng = np.random.default_rng(0)
    q_V = rng.dirichlet(np.ones(8))
    p_V = q_V * np.exp(0.1 * rng.standard_normal(8))
    p_V /= p_V.sum()
    drawn_N = rng.choice(8, size=1_000_000, p=q_V)
    m = chosen_token_metrics(np.log(q_V)[drawn_N], np.log(p_V)[drawn_N], np.full(1000, 1000))
    exact = float(np.sum(q_V * np.log(q_V / p_V)))
    ratio_V = p_V / q_V
    error = {
        name: 5 * np.sqrt(float(q_V @ f**2 - (q_V @ f) ** 2) / 1e6)
        for name, f in (("kl", np.log(ratio_V)), ("w", ratio_V))
    }
    k3_V, k2_V = ratio_V - 1 - np.log(ratio_V), 0.5 * np.log(ratio_V) ** 2
    assert abs(m["kl"] - exact) < error["kl"]
    assert abs(m["kl_k3"] - exact) < 5 * np.sqrt(float(q_V @ k3_V**2 - exact**2) / 1e6)
    assert m["kl_k2"] == pytest.approx(float(q_V @ k2_V), rel=0.01)
    assert m["kl_k2"] == pytest.approx(exact, rel=0.1)
    assert abs(m["is_ratio_mean_token"] - 1) < error["w"]
    assert m["chi2_token"] == pytest.approx(float(q_V @ ratio_V**2) - 1, abs=3 * error["w"])


def test_k3_keeps_its_digits_near_zero():
    """exp(l) − l − 1 at l = 1e-7 is lost to rounding when summed naively; a noise floor lives down there."""
    m = chosen_token_metrics(np.full(10, -1.0), np.full(10, -1.0 + 1e-7), np.array([10]))
    assert m["kl_k3"] == pytest.approx(0.5e-14, rel=1e-2)
    assert m["chi2_token"] == pytest.approx(2e-7, rel=1e-6)


def test_tiny_weights_keep_their_ess():
    """Long responses of a bad policy all have ratios near e^−20: ESS and deviation must not be rounding noise."""
    sum_S = np.array([-19.0, -18, -17, -16])
    m, w = chosen_token_metrics(np.full(4, -30.0), sum_S - 30, np.ones(4, int)), np.exp(sum_S)
    assert m["ess_seq"] == pytest.approx(effective_sample_size(w), rel=1e-6)
    assert m["is_ratio_std_seq"] == pytest.approx(w.std(), rel=1e-6)


def test_impossible_tokens_are_floored_and_counted():
    q_N = np.array([-1.0, -np.inf, -np.inf, -1.0])
    p_N = np.array([-np.inf, -1.0, -np.inf, -1.0])
    assert log_ratios(q_N, p_N).tolist() == [-20, 20, 0, 0]
    terms = token_terms(q_N, p_N)
    assert terms["_tokens_impossible_target"].sum() == 2 and terms["_tokens_impossible_behaviour"].sum() == 2
    assert terms["_tokens_clamped"].tolist() == [1, 1, 0, 0]
    assert terms["prob_diff_mean"] == pytest.approx([np.exp(-1), np.exp(-1), 0, 0])
    assert all(np.isfinite(value) for value in chosen_token_metrics(q_N, p_N, np.array([4])).values())


def test_finite_gaps_over_the_clamp_stay_exact_where_nothing_is_exponentiated():
    terms = token_terms(np.array([-1.0]), np.array([-51.0]))
    assert terms["kl"][0] == 50 and terms["kl_k3"][0] == pytest.approx(49) and terms["_tokens_clamped"][0] == 1
    assert terms["mult_prob_error"][0] == pytest.approx(np.exp(20))


def test_cumulative_l_starts_again_with_every_response():
    assert cumulative_l(np.array([1.0, 2, 3, 4, 5]), np.array([2, 3])).tolist() == [1, 3, 3, 7, 12]


logprobs = arrays(np.float64, 12, elements=st.floats(-60, 0) | st.just(-np.inf))


@settings(deadline=None, max_examples=300)
@given(logprobs, logprobs)
def test_bounds_hold_for_any_logprobs(q_N, p_N):
    m = chosen_token_metrics(q_N, p_N, np.array([1, 4, 7]))
    assert m["kl_k3"] >= 0 and m["kl_k2"] >= 0 and m["mult_prob_error"] >= 1
    for name in ("ess_token", "ess_seq", "ess_token_clamped", "ess_seq_clamped"):
        assert 0 < m[name] <= 1
    assert m["is_ratio_min_token"] * (1 - 1e-9) <= m["is_ratio_mean_token"] <= m["is_ratio_max_token"] * (1 + 1e-9)
    assert all(np.isfinite(value) for name, value in m.items() if name != "prob_pearson")


@settings(deadline=None, max_examples=50)
@given(logprobs)
def test_a_policy_is_on_policy_with_itself(q_N):
    m = chosen_token_metrics(q_N, q_N, np.array([5, 7]))
    assert m["kl"] == m["kl_k2"] == m["kl_k3"] == m["logprob_diff_max"] == m["chi2_seq"] == m["fraction_outside"] == 0
    assert m["ess_token"] == m["ess_seq"] == m["is_ratio_max_seq"] == 1
