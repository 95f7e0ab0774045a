"""The file itself: streamed, bounded, whole or absent."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from rl_onoff.report import ReportInput, ReportResponse, write_report
from rl_onoff.report.pack import TOP_LIMITS, pack_tokens
from rl_onoff.types import FinishReason, Rollout, TokenScores

NUM_RESPONSES, NUM_TOKENS, TOP_K = 10_000, 200, 10


def many_responses(words: list[str]):
    """10,000 responses of 200 tokens with top-10 under two policies, distributed about as a small model's."""
    rng = np.random.default_rng(0)
    kinds = [_random_views(rng, len(words)) for _ in range(64)]
    for i in range(NUM_RESPONSES):
        ids_T, behaviour, target = kinds[i % 64]
        tokens = [words[j] for j in ids_T]
        rollout = Rollout(
            request_id=f"q{i // 4}",
            sample=i % 4,
            text="".join(tokens),
            token_ids_T=ids_T,
            reward=float(i % 3 == 0),
            finish_reason=FinishReason.eos,
        )
        shown = {"prompt": f"Question {i // 4}", "tokens": tokens, "groups": {"level": str(i % 5)}}
        yield ReportResponse(rollout=rollout, behaviour=behaviour, targets=[target], **shown)


def _random_views(rng: np.random.Generator, num_words: int):
    ids_TV = (num_words * rng.random((NUM_TOKENS, 60)) ** 3).astype(np.int32)
    sharpness_T1 = np.exp(rng.normal(1.0, 1.2, (NUM_TOKENS, 1)))
    logits_TV = -np.sort(rng.exponential(4, (NUM_TOKENS, 60)), axis=1) * np.arange(60) ** 0.5 * sharpness_T1
    rows_T = np.arange(NUM_TOKENS)
    probs_TV = np.exp(logits_TV)
    probs_TV /= probs_TV.sum(axis=1, keepdims=True)
    pick_T = np.minimum((probs_TV.cumsum(axis=1) < rng.random((NUM_TOKENS, 1))).sum(axis=1), 59)
    views = []
    for noise in (0.0, 0.03):
        lp_TV = logits_TV + rng.normal(size=logits_TV.shape) * noise
        lp_TV -= np.log(np.exp(lp_TV).sum(axis=1, keepdims=True))
        order_TK = np.argsort(-lp_TV, axis=1, kind="stable")[:, :TOP_K]
        chosen_T = lp_TV[rows_T, pick_T]
        view = TokenScores(
            token_ids_T=ids_TV[rows_T, pick_T],
            logprobs_T=chosen_T,
            entropy_T=-(np.exp(lp_TV) * lp_TV).sum(axis=1),
            rank_T=1 + (lp_TV > chosen_T[:, None]).sum(axis=1),
            top_ids_TK=np.take_along_axis(ids_TV, order_TK, 1),
            top_logprobs_TK=np.take_along_axis(lp_TV, order_TK, 1),
        )
        views.append(view)
    return ids_TV[rows_T, pick_T], *views


def test_responses_without_room_are_counted_and_not_read(tmp_path):
    read = 0

    def responses():
        nonlocal read
        for response in many_responses([str(i) for i in range(50_000)]):
            read += 1
            yield response

    report = ReportInput(title="full", verdict="Full.", policies=[], responses=responses(), num_responses=NUM_RESPONSES)
    page = write_report(tmp_path / "full.html", report, budget_bytes=50_000).read_text()
    assert read < 1_000 and f'"left_out":{NUM_RESPONSES - read}' in page


def test_ten_thousand_responses_load_in_three_seconds(page, tmp_path):
    words = [f" w{i}" for i in range(50_000)]
    report = ReportInput(
        title="large", verdict="Large.", policies=[], responses=many_responses(words), token_text=words.__getitem__,
        comparisons=[{"name": "a", "counts": {"tokens": NUM_RESPONSES * NUM_TOKENS}}],
    )  # fmt: skip
    path = write_report(tmp_path / "large.html", report)
    assert path.stat().st_size < 60e6
    page.open(path)
    ready_ms = float(page.js("return document.documentElement.dataset.ready"))
    print(f"{path.stat().st_size / 1e6:.1f} MB, ready after {ready_ms:.0f} ms")
    assert ready_ms < 3000
    assert "10,000 responses" in page.find("#size").text
    page.tab("tokens")
    page.set("search", "question 777")
    page.wait(lambda: page.count() == 4)
    assert page.errors() == []


def test_a_small_budget_cuts_lists_first_and_then_responses(page, sample_run, tmp_path):
    run = sample_run(40)
    tokens = sum(len(r.tokens) for r in run.responses)
    sizes = []
    for budget in (10_000_000, 30 * tokens, 18 * tokens, 12 * tokens):
        sizes.append(write_report(tmp_path / f"{budget}.html", run.report(), budget_bytes=budget).stat().st_size)
    assert sizes == sorted(sizes, reverse=True)
    page.open(tmp_path / f"{18 * tokens}.html", "#tokens")
    page.find(".token").click()
    assert "to keep the file small" in page.find("#panel").text.lower()
    page.open(write_report(tmp_path / "tiny.html", run.report(), budget_bytes=3 * tokens), "#tokens")
    assert "left out here to keep the file small" in page.find("#warning").text
    assert page.count() == 32 and "40 responses" in page.find("#size").text


def test_lists_of_the_tokens_that_differ_most_are_kept_longest(sample_run):
    from rl_onoff.report import pack

    run = sample_run(8)
    limit = next(limit for limit in TOP_LIMITS if limit.share == 1 / 8)
    q_N, p_N = (
        np.concatenate([view(r).logprobs_T for r in run.responses])
        for view in (lambda r: r.behaviour, lambda r: r.targets[0])
    )
    kept_N = pack._most_different([q_N, p_N], limit.share)
    assert kept_N.sum() == len(q_N) // 8
    assert np.abs(p_N - q_N)[kept_N].min() >= np.abs(p_N - q_N)[~kept_N].max()
    assert len(pack_tokens(run.responses, limit)[0]) < len(pack_tokens(run.responses, TOP_LIMITS[0])[0]) / 2


def test_responses_are_read_one_at_a_time(sample_run, tmp_path):
    run, alive = sample_run(2), []

    class Tracked:
        count = 0

        def __init__(self):
            Tracked.count += 1
            alive.append(Tracked.count)

        def __del__(self):
            Tracked.count -= 1

    def stream():
        for i in range(300):
            response = run.responses[0]
            prompt = type("Prompt", (str,), {})(response.prompt)
            prompt.tracked = Tracked()
            yield replace(response, rollout=replace(response.rollout, request_id=str(i)), prompt=prompt)

    write_report(tmp_path / "report.html", run.report(responses=stream()))
    assert max(alive) <= 40


def test_a_failure_leaves_the_old_page(sample_run, tmp_path):
    run = sample_run(2)
    path = write_report(tmp_path / "report.html", run.report())
    old = path.read_bytes()

    def broken():
        yield run.responses[0]
        raise RuntimeError("the disk is gone")

    with pytest.raises(RuntimeError, match="the disk is gone"):
        write_report(path, run.report(responses=broken()))
    assert path.read_bytes() == old and [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_arrays_that_do_not_fit_are_refused(sample_run, tmp_path):
    run = sample_run(1)
    response = run.responses[0]
    with pytest.raises(ValueError, match="token texts"):
        write_report(tmp_path / "r.html", run.report(responses=[replace(response, tokens=response.tokens[:-1])]))
    short = replace(response, behaviour=response.behaviour[:-1], targets=())
    with pytest.raises(ValueError, match="rows for a response"):
        write_report(tmp_path / "r.html", run.report(responses=[short]))
