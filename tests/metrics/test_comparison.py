"""The streaming comparison: the same numbers as all at once, refusals, intervals, and what a report reads."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from rl_onoff.compare import HEADLINES, METRICS, Estimate, Pair, as_kind, compare, headlines, judge, verdict, word_of
from rl_onoff.compare.distributions import log_softmax
from rl_onoff.compare.steps import departure
from rl_onoff.compare.tokens import percentile
from rl_onoff.errors import UsageError
from rl_onoff.types import LogprobKind, TokenScores
from tests.metrics.at_once import chosen_token_metrics

RAW, PROCESSED = LogprobKind.raw, LogprobKind.processed


def make_pair(q_T, p_T, *, name="a", ids_T=None, groups=None, kind=RAW, **both) -> Pair:
    ids_T = np.arange(len(q_T)) if ids_T is None else ids_T
    q, p = (
        TokenScores(request_id=name, token_ids_T=ids_T, logprobs_T=np.asarray(x, np.float32), kind=kind, **both)
        for x in (q_T, p_T)
    )
    return Pair(behaviour=q, target=p, groups=groups or {})


def joined(one: Pair, other: Pair) -> Pair:
    return replace(one, target=other.target)


def random_pairs(num: int, seed: int = 0, noise: float = 0.05, mean_length: int = 30) -> list[Pair]:
    rng = np.random.default_rng(seed)
    pairs = []
    for i in range(num):
        q_T = -rng.exponential(1.0, rng.integers(1, 2 * mean_length)).astype(np.float32) - 0.5
        groups = {"level": str(i % 3), "reward": "right" if i % 2 else "wrong"}
        p_T = np.minimum(q_T + noise * rng.standard_normal(len(q_T)), 0)
        pairs.append(make_pair(q_T, p_T, name=f"r{i}", groups=groups))
    return pairs


def flat(pairs: list[Pair]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return (
        np.concatenate([pair.behaviour.logprobs_T for pair in pairs]),
        np.concatenate([pair.target.logprobs_T for pair in pairs]),
        np.array([pair.num_tokens for pair in pairs]),
    )


def test_blocks_on_the_disk_change_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr("rl_onoff.compare.aggregate.BATCH_TOKENS", 100)
    pairs = random_pairs(80)
    pairs = [replace(pair, facts={"step": float(i // 16), "reward": i % 2}) for i, pair in enumerate(pairs)]
    pairs[20:22] = [make_pair([np.nan, -1], [-1, -1], name="bad"), make_pair([-1, -np.inf], [-1, -2], name="never")]
    one = compare(pairs, num_resamples=50, recorded=("target",)).to_dict()
    monkeypatch.setattr("rl_onoff.compare.aggregate.BLOCK_TOKENS", 300)
    many = compare(pairs, num_resamples=50, recorded=("target",), scratch=tmp_path).to_dict()
    curves = [found["histograms"].pop("cumulative_l") for found in (one, many)]
    assert curves[0]["num"] == curves[1]["num"]
    np.testing.assert_allclose(curves[0]["mean"], curves[1]["mean"], rtol=1e-12, atol=1e-14)
    assert many == one and one["set_aside"] == ["bad/0"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("num", [2, 3, 100, 4001])
@pytest.mark.parametrize("spread", [0, 1e-9, 1, 20])
def test_percentiles_of_parts_are_those_of_the_whole(num, spread):
    rng = np.random.default_rng(num)
    values = np.abs(rng.normal(0, 1, num)) * spread * (rng.random(num) < 0.6)
    parts = np.split(values, sorted(rng.integers(0, num + 1, 3)))
    shares = [0, 1, 50, 95, 99, 99.5, 100]
    assert percentile(lambda: iter(parts), shares).tolist() == np.percentile(values, shares).tolist()


def test_stream_equals_all_at_once(monkeypatch):
    monkeypatch.setattr("rl_onoff.compare.aggregate.BATCH_TOKENS", 100)
    pairs = random_pairs(60)
    c = compare(iter(pairs), num_resamples=50)
    for name, value in chosen_token_metrics(*flat(pairs)).items():
        assert c[name].value == pytest.approx(value, rel=1e-9, abs=1e-12), name
    right = [pair for pair in pairs if pair.groups["reward"] == "right"]
    for name, value in chosen_token_metrics(*flat(right)).items():
        assert c.groups["reward"]["right"].metrics[name].value == pytest.approx(value, rel=1e-9, abs=1e-12), name
    assert c.overall.counts["tokens"] == sum(pair.num_tokens for pair in pairs)
    for count in ("responses", "tokens"):
        assert sum(s.counts[count] for s in c.groups["level"].values()) == c.overall.counts[count]


def test_full_logits_agree_with_independent_float64():
    """From (T, V) logits in float32, everything is within 1e-6 of float64 arithmetic done otherwise."""
    rng = np.random.default_rng(1)
    pairs, kl, js, ent, k3 = [], [], [], [], []
    for _ in range(5):
        q_TV = (3 * rng.standard_normal((20, 40))).astype(np.float32)
        p_TV = (q_TV + 0.2 * rng.standard_normal((20, 40))).astype(np.float32)
        ids_T = rng.integers(40, size=20)
        sides, probs = [], []
        for x_TV in (q_TV, p_TV):
            e_TV = np.exp(x_TV.astype(np.longdouble))
            probs.append(e_TV / e_TV.sum(1, keepdims=True))
            logprobs_T = np.log(probs[-1][np.arange(20), ids_T]).astype(np.float64)
            top = {
                "top_ids_TK": np.argsort(-x_TV, axis=1)[:, :5],
                "top_logprobs_TK": -np.sort(-log_softmax(x_TV), axis=1)[:, :5],
            }
            sides.append(TokenScores(token_ids_T=ids_T, logprobs_T=logprobs_T, logits_TV=x_TV, **top))
        q, p = probs
        kl.append((q * np.log(q / p)).sum(1))
        js.append(0.5 * (q * np.log(2 * q / (p + q))).sum(1) + 0.5 * (p * np.log(2 * p / (p + q))).sum(1))
        ent.append(-(p * np.log(p)).sum(1))
        rho = (p / q)[np.arange(20), ids_T]
        k3.append(rho - 1 - np.log(rho))
        pairs.append(Pair(behaviour=sides[0], target=sides[1]))
    c = compare(pairs, num_resamples=20)
    for name, terms in (("kl_forward", kl), ("js", js), ("entropy_target", ent), ("kl_k3", k3)):
        assert c[name].value == pytest.approx(float(np.mean(terms)), abs=1e-9), name
    assert c["rank_target"].value > 1 and "kl_forward_topk" not in c


def scored(logits_TV: np.ndarray, ids_T: np.ndarray, k: int, processed: np.ndarray | None = None) -> TokenScores:
    logprobs_TV = log_softmax(logits_TV).astype(np.float32)
    order_TK = np.argsort(-logprobs_TV, axis=1)[:, :k]
    own_T = logprobs_TV[np.arange(len(ids_T)), ids_T]
    return TokenScores(
        request_id="a",
        token_ids_T=ids_T,
        logprobs_T=own_T,
        entropy_T=-(np.exp(logprobs_TV) * logprobs_TV).sum(1),
        logsumexp_T=own_T,
        rank_T=1 + (logprobs_TV > own_T[:, None]).sum(1),
        top_ids_TK=order_TK.astype(np.int32),
        top_logprobs_TK=np.take_along_axis(logprobs_TV, order_TK, axis=1),
        processed_logprobs_T=processed,
        nucleus_mass_T=None if processed is None else np.full(len(ids_T), 0.9, np.float32),
    )


def test_scores_of_two_engines():
    rng = np.random.default_rng(2)
    logits_TV, ids_T = 3 * rng.standard_normal((50, 30)), rng.integers(30, size=50)
    q, p = scored(logits_TV, ids_T, 8), scored(logits_TV + 0.3 * rng.standard_normal((50, 30)), ids_T, 10)
    c = compare([Pair(behaviour=q, target=p)])
    assert 0 < c["kl_forward_topk"].value < 0.3 and 0 < c["mass_outside_target"].value < 0.5
    assert c["entropy_diff"].value == pytest.approx(float(p.entropy_T.mean() - q.entropy_T.mean()), abs=1e-6)
    assert "entropy_target_topk" not in c and set(c.overall.metrics) <= set(METRICS)
    assert sum(c.histograms["entropy_target"]["counts"]) == 50
    assert c["kl_k3"].lo is None  # one response: no interval


def test_the_samplers_view():
    rng = np.random.default_rng(3)
    logits_TV, ids_T = 3 * rng.standard_normal((10, 30)), rng.integers(30, size=10)
    cut_T = np.where(np.arange(10) < 3, -np.inf, -1.0).astype(np.float32)
    behaviour, target = scored(logits_TV, ids_T, 5, np.full(10, -1.0, np.float32)), scored(logits_TV, ids_T, 5, cut_T)
    raw = compare([Pair(behaviour=behaviour, target=target)])
    assert raw["impossible_fraction"].value == pytest.approx(0.3) and raw["nucleus_mass_target"].value == pytest.approx(
        0.9
    )
    assert raw["kl_k3"].value == 0 and raw["nucleus_mass"].value == pytest.approx(0.9)
    c = compare([Pair(behaviour=as_kind(behaviour, PROCESSED), target=as_kind(target, PROCESSED))])
    assert c.kind is PROCESSED and c["kl"].value == pytest.approx(0.3 * 20)
    assert c.overall.counts["tokens_impossible_target"] == c.overall.counts["tokens_clamped"] == 3
    assert "3 of the sampled tokens could not have been drawn" in verdict(c)
    assert c.worst[0]["target_logprob"] is None
    assert "Infinity" not in json.dumps(c.to_dict()) and "NaN" not in json.dumps(c.to_dict())


def test_pairs_of_unlike_form_are_averaged_where_they_have_the_metric():
    with_entropy = make_pair([-1.0, -1.0], [-1.0, -1.0], entropy_T=np.array([2.0, 4.0]))
    without = make_pair([-2.0] * 3, [-2.0] * 3, name="b")
    c = compare([with_entropy, without, with_entropy], num_resamples=200)
    assert c["entropy_behaviour"].value == 3 and c.overall.counts["tokens"] == 7
    assert c["entropy_behaviour"].lo == c["entropy_behaviour"].hi == 3  # resamples without any are left out


def test_positions_by_hand():
    c = compare([make_pair([-5.0] * 5, [-4.0, -4, -4, -4, -4]), make_pair([-5.0], [-5.0], name="b")], num_resamples=100)
    assert [(b.start, b.end) for b in c.positions] == [(0, 1), (1, 2), (2, 4), (4, 5)]
    assert [b.metrics["kl"].value for b in c.positions] == [-0.5, -1, -1, -1]
    assert [b.metrics["cumulative_l"].value for b in c.positions] == [0.5, 2, 3, 5]
    assert [b.counts["tokens"] for b in c.positions] == [2, 1, 2, 1]
    assert [b.metrics["logprob_diff_max"].value for b in c.positions] == [1, 1, 1, 1]
    curve = c.histograms["cumulative_l"]
    assert curve == {"position": [0, 1, 2, 3, 4], "mean": [0.5, 2, 3, 4, 5], "num": [2, 1, 1, 1, 1]}


def test_histograms_lose_no_token():
    c = compare(random_pairs(40), num_resamples=10)
    total = c.overall.counts["tokens"]
    for name in ("l", "abs_l"):
        h = c.histograms[name]
        assert sum(h["counts"]) + h["below"] + h["above"] == total and len(h["edges"]) == len(h["counts"]) + 1
    assert np.sum(c.histograms["probabilities"]["counts"]) == total


def test_probability_grid_is_behaviour_by_target():
    counts = np.array(compare([make_pair(np.log([0.99]), np.log([0.01]))]).histograms["probabilities"]["counts"])
    assert counts[-1, 0] == 1 and counts.sum() == 1


def test_worst_are_found_and_named():
    pairs = random_pairs(20)
    pairs.append(make_pair([-1.0, -1, -1], [-6.0, -9, -1], name="bad", ids_T=np.array([5, 77, 6])))
    c = compare(pairs, num_resamples=10, num_worst=3)
    assert len(c.worst) == len(c.worst_responses) == 3
    first = c.worst[0]
    assert (first["request_id"], first["position"], first["token_id"], first["l"]) == ("bad", 1, 77, -8.0)
    assert (first["behaviour_logprob"], first["target_logprob"]) == (-1.0, -9.0)
    assert (c.worst[1]["request_id"], c.worst[1]["position"], c.worst[1]["token_id"]) == ("bad", 0, 5)
    assert c.worst_responses[0]["request_id"] == "bad" and c.worst_responses[0]["sum_l"] == -13


def test_same_seed_same_interval():
    pairs = random_pairs(30)
    one, two, other = (compare(pairs, seed=seed)["kl_k3"] for seed in (0, 0, 1))
    assert one == two and one != other and one.lo < one.value < one.hi


def test_bootstrap_covers_the_truth():
    """Of 200 data sets, the 95 % interval of k1 holds the true mean about 95 % of the time."""
    rng = np.random.default_rng(5)
    hits = 0
    for i in range(200):
        drift_S = 0.1 + 0.05 * rng.standard_normal(60)  # responses differ: resampling tokens would be too sure
        pairs = [make_pair(np.full(8, -2.0), -2.0 - drift + 0.02 * rng.standard_normal(8)) for drift in drift_S]
        kl = compare(pairs, num_resamples=400, seed=i)["kl"]
        hits += kl.lo <= 0.1 <= kl.hi
    assert 0.88 <= hits / 200 <= 0.99


def test_json_round_trip():
    data = json.loads(json.dumps(compare(random_pairs(10), num_resamples=10).to_dict(), allow_nan=False))
    assert set(data) >= {"overall", "groups", "positions", "histograms", "worst", "counts"}
    assert set(data["overall"]["kl_k3"]) == {"value", "lo", "hi"}
    assert data["groups"]["level"]["0"]["metrics"]["kl"]["value"] is not None
    assert data["overall"]["logprob_diff_p99"]["lo"] is None
    constant = compare([make_pair([-1.0, -1.0], [-1.0, -1.0])]).to_dict()
    assert constant["overall"]["prob_pearson"]["value"] is None


@pytest.mark.parametrize(
    ("pair", "reason"),
    [
        (joined(make_pair([-1], [-1]), make_pair([-1], [-1], kind=PROCESSED)), "raw and the target's are processed"),
        (make_pair([-1.0], [-1.0, -1.0], ids_T=np.array([0])), "has 2 rows for 1 token:"),
        (make_pair([-1.0], [-1.0], logits_TV=np.array([[np.nan, 1.0]])), "NaN"),
        (make_pair([-1.0], [-1.0], entropy_T=np.array([np.inf])), "inf in it"),
        (make_pair([-1.0], [-1.0], logits_TV=np.full((1, 3), -np.inf)), "every token is impossible"),
        (make_pair([-1.0], [-1.0], top_ids_TK=np.zeros((1, 2), int), top_logprobs_TK=np.zeros((1, 3))),
         "different shapes"),
    ],
)  # fmt: skip
def test_refusals_name_the_response_and_the_reason(pair, reason):
    with pytest.raises(UsageError, match=reason) as refused:
        compare([pair])
    assert "a/0" in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("pair", "reason"),
    [
        (joined(make_pair([-1, -1], [-1, -1]), make_pair([-1], [-1])), "2 tokens under the behaviour and 1"),
        (joined(make_pair([-1], [-1]), make_pair([-1], [-1], ids_T=np.array([3]))),
         "token id 0 at 0 under the behaviour and 3"),
        (make_pair([-1.0], [np.nan]), "NaN"),
        (make_pair([0.9, 3.0], [-1.0, -1.0]), "above 0"),
        (make_pair([-1.0], [-9999.0]), "-9999 stands"),
    ],
)  # fmt: skip
def test_a_row_whose_numbers_mean_nothing(pair, reason):
    """Alone it makes the comparison meaningless; among many it is set aside, and no number knows of it."""
    alone, others = compare([pair]), random_pairs(30)
    assert not alone.comparable and "kl_k3" not in alone and alone.to_dict()["overall"] == {}
    said = verdict(alone)
    assert said.startswith("Not comparable: ") and reason in said and "a/0" in said
    assert word_of(said) == "Not comparable"
    c, without = compare([*others[:9], pair, *others[9:]], num_resamples=50), compare(others, num_resamples=50)
    [finding] = c.findings
    assert c.comparable and (finding.responses, finding.fatal) == (1, False) and "a/0" in finding.example
    assert c.overall.counts == without.overall.counts | {"responses_set_aside": 1}
    assert "1 response set aside" in verdict(c)
    same, expected = c.to_dict(), without.to_dict()
    for name in ("overall", "groups", "positions", "histograms", "worst", "worst_responses"):
        assert same[name] == expected[name], name


@pytest.mark.parametrize("filling", [0.0, 1.0, -9999.0, np.nan])
def test_masked_tokens_change_no_metric_by_a_bit(filling):
    """Tokens of tools between the sampled ones, with whatever a framework writes there: as if they were not there."""
    pairs, masked = random_pairs(20), []
    for i, pair in enumerate(pairs):
        size = pair.num_tokens
        at = np.sort(np.random.default_rng(i).integers(0, size + 1, 5))
        put = {name: np.insert(getattr(pair.target, name), at, 7) for name in ("token_ids_T",)}
        sides = [
            replace(side, **put, logprobs_T=np.insert(side.logprobs_T, at, np.float32(filling)))
            for side in (pair.behaviour, pair.target)
        ]
        mask_T = np.insert(np.ones(size, bool), at, False)
        masked.append(replace(pair, behaviour=sides[0], target=sides[1], mask_T=mask_T))
    c, without = (compare(x, num_resamples=50).to_dict() for x in (masked, pairs))
    for row, plain in zip(c["worst"], without["worst"], strict=True):
        of = next(pair for pair in masked if pair.key == (row["request_id"], row["sample"]))
        assert np.flatnonzero(of.mask_T)[plain["position"]] == row["position"]
        plain["position"] = row["position"]
    assert c == without


def test_a_response_without_a_sampled_token_is_empty():
    pair = replace(make_pair([-1.0], [-2.0]), mask_T=np.zeros(1, bool))
    c = compare([pair, *random_pairs(3)], num_resamples=2)
    assert (c.overall.counts["responses"], c.overall.counts["responses_empty"]) == (3, 1)


def test_metrics_over_steps_and_the_step_that_leaves_the_band():
    pairs = []
    for step in range(1, 9):
        for pair in random_pairs(20, seed=step, noise=0.03 if step < 6 else 0.3):
            facts = {"step": step, "staleness": step % 2, "reward": step / 10}
            pairs.append(replace(pair, facts=facts))
    c = compare(pairs, num_resamples=100)
    assert [row["step"] for row in c.steps] == list(range(1, 9)) and [row["staleness"] for row in c.staleness] == [0, 1]
    for step, row in enumerate(c.steps, 1):
        alone = compare([pair for pair in pairs if pair.facts["step"] == step], num_resamples=100)
        assert row["metrics"]["kl_k3"] == alone["kl_k3"].to_dict() and row["counts"]["responses"] == 20
        assert row["metrics"]["reward"]["value"] == pytest.approx(step / 10)
        assert [w["request_id"] for w in row["worst"]] == [w["request_id"] for w in alone.worst_responses[:5]]
    assert c.departure["step"] == 6 and c.departure["band"][1] < c.departure["k3"]
    assert verdict(c).endswith(c.departure["sentence"])
    assert compare([pair for pair in pairs if pair.facts["step"] < 6], num_resamples=100).departure is None


def test_the_band_by_hand():
    def steps(*values):
        return [{"step": i, "metrics": {"kl_k3": {"value": x, "lo": x, "hi": x}}} for i, x in enumerate(values)]

    assert departure(steps(1e-3, 1e-3)) is None
    assert departure(steps(1e-3, 1e-3, 1e-3, 1.4e-3)) is None, "less than a factor of 1.5"
    assert departure(steps(1e-3, 1e-3, 1e-3, 1.6e-3))["band"] == pytest.approx(
        [1e-3 * np.exp(-0.4), 1e-3 * np.exp(0.4)]
    )
    # median of 1, 2, 4, 30 (×1e-3): 2.83e-3; deviations of the logs: 1.04, 0.35, 0.35, 2.36, their median 0.69
    found = departure(steps(1e-3, 2e-3, 4e-3, 3e-2, 1))
    assert found["step"] == 4 and found["band"][1] == pytest.approx(np.sqrt(8) * 1e-3 * 2 ** (4 * 1.4826), rel=1e-6)


def test_refuses_no_pair_and_mixed_kinds():
    with pytest.raises(UsageError, match="no response with tokens"):
        compare([])
    with pytest.raises(UsageError, match="no response with tokens"):
        compare([make_pair([], [])])
    with pytest.raises(UsageError, match="one kind at a time"):
        compare([make_pair([-1.0], [-1.0]), make_pair([-1.0], [-1.0], kind=PROCESSED)])
    assert compare([make_pair([], []), make_pair([-1.0], [-1.0])]).overall.counts["responses_empty"] == 1


def test_a_processed_logprob_does_not_join_the_raw_lists():
    lists = {"top_ids_TK": np.array([[1, 2]]), "top_logprobs_TK": np.log([[0.5, 0.3]])}
    processed = compare([make_pair([-0.1], [-0.1], kind=PROCESSED, **lists)])
    assert processed["mass_outside_target"].value == pytest.approx(0.2)
    raw = compare([make_pair(np.log([0.15]), np.log([0.15]), ids_T=np.array([7]), **lists)])
    assert raw["mass_outside_target"].value == pytest.approx(0.05)  # a raw one is one more outcome


def test_logprobs_of_another_kind_are_had_from_what_was_kept_or_refused():
    scores = scored(np.zeros((1, 3)), np.array([1]), 2)
    assert as_kind(scores, RAW) is scores
    with pytest.raises(UsageError, match=r"score\.processed=true"):
        as_kind(scores, PROCESSED)
    with pytest.raises(UsageError, match="processed and the target's are scaled"):
        as_kind(replace(scores, kind=LogprobKind.scaled), PROCESSED)


@pytest.mark.parametrize(
    ("noise", "floor", "start"),
    [
        (0.001, None, "On-policy"),
        (0.03, None, "Close:"),
        (0.5, None, "Off-policy"),
        (0.001, 1e-9, "Close:"),
        (0.03, 1e-3, "On-policy"),
    ],
)
def test_verdict(noise, floor, start):
    sentence = verdict(compare(random_pairs(50, noise=noise), num_resamples=200), floor)
    assert sentence.startswith(start) and sentence.endswith(".")


def test_a_gap_within_its_uncertainty_of_the_noise_floor_is_not_called_real():
    c = compare(random_pairs(50, noise=0.03), num_resamples=200)
    assert verdict(c, (c["kl_k3"].lo + c["kl_k3"].value) / 2).startswith("On-policy")
    assert verdict(c, c["kl_k3"].lo * 0.99).startswith("Close")


def test_verdict_says_when_the_interval_reaches_over_the_bar():
    pairs = [make_pair([-3.0] * 4, [-3.0] * 4, name=str(i)) for i in range(20)] + [
        make_pair([-3.0] * 4, [-2.6, -3, -2.2, -2.6])
    ]
    assert verdict(compare(pairs)).startswith("Close, not surely")


def test_metrics_table_is_complete():
    assert all(
        m.description and m.family and m.better in {"lower", "higher", "zero", "one", "none"} for m in METRICS.values()
    )
    assert METRICS["kl_k3"].bar == 0.015


@pytest.mark.parametrize(
    ("k3", "floor", "word"),
    [
        (5e-5, 1e-7, "Close"),  # above the noise floor, however small
        (5e-5, None, "On-policy"),
        (5e-5, 5e-5, "On-policy"),
        (7e-11, 4.5e-11, "On-policy"),  # two engines in float32: above the floor by no more than rounding
        (0.02, 1e-7, "Off-policy"),
        (0.02, 0.03, "On-policy"),
    ],
)
def test_one_function_judges_a_gap(k3, floor, word):
    assert judge(Estimate(k3), floor)[0] == judge(Estimate(k3, k3 * 0.9, k3 * 1.1), floor)[0] == word


def test_the_word_of_a_verdict():
    for noise, floor in ((0.001, None), (0.03, None), (0.5, None), (0.03, 1e-3), (0.001, 1e-9)):
        sentence = verdict(compare(random_pairs(50, noise=noise), num_resamples=200), floor)
        assert word_of(sentence) == word_of(f"Close to it: {sentence}") == sentence.partition(":")[0].partition(",")[0]
    assert word_of("The sampler against itself: what it said while sampling.") == ""


def test_every_headline_is_a_metric_with_a_label():
    assert set(HEADLINES) <= set(METRICS) and all(METRICS[name].label for name in HEADLINES)
    assert set(headlines(3)) < set(headlines(2)) < set(HEADLINES) and headlines(3)[0] == "kl_k3"
    assert len({metric.label for metric in METRICS.values() if metric.label}) == len(HEADLINES)
