"""A gap taken apart by the errors of its two sides against a truth."""

from __future__ import annotations

import numpy as np
import pytest

from rl_onoff.compare import WhoseError, whose_error
from rl_onoff.compare.truth import EDGES


def planted(q_size: float, p_size: float, correlation: float, responses: int = 60, tokens: int = 50) -> WhoseError:
    """q = t + noise_a and p = t + noise_b, of these sizes and with this correlation."""
    rng, rows = np.random.default_rng(0), []
    for _ in range(responses):
        t_T, a_T, b_T = -rng.exponential(2, tokens), *rng.normal(size=(2, tokens))
        b_T = correlation * a_T + np.sqrt(1 - correlation**2) * b_T
        rows.append((t_T + q_size * a_T, t_T + p_size * b_T, t_T))
    found = whose_error("truth", "trainer", rows)
    assert found is not None
    return found


def values(found: WhoseError) -> dict[str, float]:
    return {name.removeprefix("error_"): estimate.value for name, estimate in found.overall.metrics.items()}


def test_numbers_worked_by_hand() -> None:
    t_T = np.log([0.5, 0.25, 0.75])
    q_T, p_T = t_T + np.array([0.3, -0.1, 0.0]), t_T + np.array([0.1, 0.1, -0.2])
    found = whose_error("truth", "trainer", [(q_T[:2], p_T[:2], t_T[:2]), (q_T[2:], p_T[2:], t_T[2:])])
    assert found is not None
    # Σ e_q² = 0.09 + 0.01, Σ e_p² = 0.01 + 0.01 + 0.04, Σ e_q e_p = 0.03 − 0.01, Σ (p − q)² = 0.04 + 0.04 + 0.04
    expected = {"behaviour": (0.1 / 3) ** 0.5, "target": (0.06 / 3) ** 0.5, "gap": (0.12 / 3) ** 0.5}
    expected |= {"correlation": 0.02 / (0.1 * 0.06) ** 0.5}
    expected |= {"share_behaviour": 0.1 / 0.12, "share_target": 0.06 / 0.12, "share_together": -0.04 / 0.12}
    assert values(found) == pytest.approx(expected)
    assert found.overall.counts == {"tokens": 3, "responses": 2, "left_out": 0}
    # 0.5 and 0.75 are in [0.5, 0.9), 0.25 in [0.1, 0.5)
    assert [(x.start, x.end, x.counts["tokens"]) for x in found.by_probability] == [(0.1, 0.5, 1), (0.5, 0.9, 2)]
    assert found.by_probability[1].metrics["error_target"].value == pytest.approx((0.05 / 2) ** 0.5)
    assert found.by_probability[0].metrics["error_share_together"].value == pytest.approx(0.02 / 0.04)


@pytest.mark.parametrize("correlation", [-0.5, 0.0, 0.3, 0.8])
@pytest.mark.parametrize(("q_size", "p_size"), [(0.02, 0.02), (0.05, 0.01)])
def test_planted_errors_are_found(q_size: float, p_size: float, correlation: float) -> None:
    found = planted(q_size, p_size, correlation, responses=200)
    m, gap = found.overall.metrics, q_size**2 + p_size**2 - 2 * correlation * q_size * p_size
    expected = {"behaviour": q_size, "target": p_size, "correlation": correlation, "gap": gap**0.5}
    expected |= {"share_behaviour": q_size**2 / gap, "share_target": p_size**2 / gap}
    expected |= {"share_together": -2 * correlation * q_size * p_size / gap}
    for name, value in expected.items():
        estimate = m[f"error_{name}"]
        assert estimate.lo is not None and estimate.hi is not None
        half = (estimate.hi - estimate.lo) / 2
        assert estimate.value == pytest.approx(value, abs=2 * half) and half < 0.08 * max(1, abs(value)), name
    assert sum(m[f"error_share_{part}"].value for part in ("behaviour", "target", "together")) == pytest.approx(1)


def test_unlikely_tokens_are_told_apart() -> None:
    """Noise in unlikely tokens alone is found there, whatever it does to the probability that each side gives."""
    rng, rows = np.random.default_rng(0), []
    for _ in range(40):
        t_T = np.log(rng.choice([5e-5, 0.05, 0.95], 30))
        rows.append((t_T + np.where(t_T < np.log(0.01), 0.5, 0.001) * rng.normal(size=30), t_T + 0.001, t_T))
    found = whose_error("truth", "trainer", rows)
    assert found is not None
    sizes = {x.start: x.metrics["error_behaviour"].value for x in found.by_probability}
    assert sizes == pytest.approx({0.0: 0.5, 0.01: 0.001, 0.9: 0.001}, rel=0.1)
    assert set(sizes) <= set(EDGES.tolist())


def test_tokens_without_a_finite_logprob_are_left_out_and_counted() -> None:
    t_T = np.full(4, -1.0)
    rows = [(t_T + 0.1, t_T + np.array([0.0, -np.inf, np.nan, 0.2]), t_T), (np.full(2, -np.inf),) * 3]
    found = whose_error("truth", "trainer", rows)
    assert found is not None and found.overall.counts == {"tokens": 2, "responses": 1, "left_out": 4}
    assert values(found)["share_target"] == pytest.approx(0.04 / 0.02)
    assert "Left out: 4 tokens without a finite logprob." in found.sentence()


def test_without_a_gap_or_tokens_there_is_nothing_to_say() -> None:
    t_T = np.full(4, -1.0)
    assert whose_error("truth", "trainer", [(t_T + 0.1, t_T + 0.1, t_T)]) is None
    assert whose_error("truth", "trainer", []) is None
    assert whose_error("truth", "trainer", [(t_T[:0],) * 3]) is None


def test_an_exact_side_has_no_share_and_no_correlation() -> None:
    t_T = np.full(4, -1.0)
    found = whose_error("truth", "trainer", [(t_T, t_T + np.array([0.1, -0.1, 0.1, 0.2]), t_T)] * 12)
    assert found is not None and values(found)["share_target"] == 1 and np.isnan(values(found)["correlation"])
    assert "almost none of the gap is the sampler's error, nearly all trainer's" in found.sentence()
    assert "correlation" not in found.values() and "nan" not in found.sentence()


def test_what_may_be_claimed() -> None:
    unrelated = planted(0.1, 0.07, 0.0).sentence()
    assert "two thirds of the gap is the sampler's error, a third trainer's, and the two are unrelated" in unrelated
    assert "nats (root mean square) and trainer by 0.07:" in unrelated and "; correlation" in unrelated
    related = planted(0.1, 0.1, 0.6).sentence()
    assert "related and cancel in part, so no share of the gap is one side's alone" in related
    assert "related and add up" in planted(0.1, 0.1, -0.6).sentence()
    assert "too few responses (9) to say whose the gap is" in planted(0.1, 0.07, 0.0, responses=9).sentence()
    assert "the intervals are too wide" in planted(0.1, 0.07, 0.0, responses=12, tokens=3).sentence()
    near = planted(1e-5, 2e-5, 0.0)
    assert not near.told and "whose error it is cannot be told" in near.sentence()
