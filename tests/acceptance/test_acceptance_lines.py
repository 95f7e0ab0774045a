"""Each line from numbers worked by hand: where it passes, and a fault that makes it fail."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rl_onoff.acceptance.lines import (
    eos_line,
    greedy_line,
    head_line,
    k3_line,
    round_trip_line,
    sampling_line,
    template_line,
)
from rl_onoff.analysis_config import Check
from rl_onoff.types import TokenScores


def test_prompts_sent_as_the_template_says() -> None:
    line = template_line([[1, 5, 6], [1, 7]], [[1, 5, 6], [1, 7]], 1, template=True)
    assert (line.outcome, line.value, line.bar) == ("pass", 0, 0) and "1 BOS (id 1)" in line.said
    line = template_line([[5, 6]], [[5, 6]], None, template=True)
    assert line.outcome == "pass" and "BOS" not in line.said


@pytest.mark.parametrize(
    ("sent", "told", "value", "says"),
    [
        ([[1, 5, 6], [1, 7]], [[1, 5, 6], [7]], 1, "1 of 2 prompts sent otherwise"),  # the template forgets BOS
        ([[1, 5], [1, 7]], [[1, 1, 5], [1, 1, 7]], 2, "2 BOS"),  # the template adds what the tokenizer adds
        ([[1, 1, 5], [1, 1, 7]], [[1, 1, 5], [1, 1, 7]], 2, "2 BOS"),  # both sides alike, and still wrong
    ],
)
def test_prompts_that_are_not(sent: list[list[int]], told: list[list[int]], value: int, says: str) -> None:
    line = template_line(sent, told, 1, template=True)
    assert (line.outcome, line.value) == ("fail", value) and says in line.said


def test_a_tokenizer_without_a_template() -> None:
    assert template_line([[5]], [[5]], None, template=None).outcome == "pass", "plain text was asked for"
    line = template_line([[5]], [[5]], None, template=False)
    assert line.outcome == "fail" and line.fix is not None and "set data.chat_template=false" in line.fix


def test_a_round_trip() -> None:
    assert round_trip_line([[1, 2], [3]], [[1, 2], [3]]).outcome == "pass"
    line = round_trip_line([[1, 2], [3]], [[1, 2], [4, 5]])
    assert (line.outcome, line.value) == ("fail", 1) and line.fix is not None and "train on ids" in line.fix


LLAMA3 = {"config": {1}, "generation config": {1, 9}, "tokenizer": {9}, "template": {9}, "engine": {1, 9}}


def test_what_ends_a_response() -> None:
    assert eos_line(LLAMA3, {}).outcome == "pass"
    assert eos_line({"tokenizer": {256}, "engine": {256}}, {}).outcome == "pass", "an engine without files"
    without = {source: ids for source, ids in LLAMA3.items() if source != "generation config"}
    assert eos_line(without | {"config": {1, 9}}, {}).outcome == "pass"


@pytest.mark.parametrize(
    ("changed", "wrong"),
    [
        ({"template": {7}}, {7}),  # ChatML's <|im_end|>, at which a base model does not stop
        ({"template": {7}, "engine": {1, 7, 9}}, {7}),  # this engine stops there, another one need not
        ({"generation config": {5}, "engine": {5, 9}}, {1, 9}),
        ({"generation config": {1}, "engine": {1, 9}}, {9}),  # the tokenizer's is not in it
        ({"engine": {1}}, {9}),
        ({"engine": set()}, {1, 9}),
    ],
)
def test_what_does_not_end_it_everywhere(changed: dict[str, set[int]], wrong: set[int]) -> None:
    line = eos_line(LLAMA3 | changed, {7: "<|im_end|>"})
    assert (line.outcome, line.value, line.bar) == ("fail", len(wrong), 0)
    assert line.said.endswith(
        "not everywhere " + ", ".join(f"{i} {'<|im_end|>' if i == 7 else ''!r}" for i in sorted(wrong))
    )


def drawn(ids: list[int], probs: list[float]) -> TokenScores:
    """What the same distribution says at every position of these draws."""
    logprobs = np.log(np.array(probs))
    order = np.argsort(-logprobs, kind="stable")
    entropy = -float((np.exp(logprobs) * logprobs).sum())
    return TokenScores(
        token_ids_T=np.array(ids, np.int32),
        logprobs_T=logprobs[ids].astype(np.float32),
        entropy_T=np.full(len(ids), entropy, np.float32),
        top_logprobs_TK=np.tile(logprobs[order], (len(ids), 1)).astype(np.float32),
    )


def test_draws_from_the_whole_distribution() -> None:
    # 3 of 4 draws are the likelier token, as they should be: the mean logprob is minus the entropy
    line = sampling_line({}, [drawn([0, 0, 0, 1] * 50, [0.75, 0.25])], 5.0)
    assert line.outcome == "pass" and line.value == pytest.approx(0, abs=1e-4)
    # 8 of 10: 10 of 200 draws too many, each worth ln 3 nats; one draw varies by 3/16 of (ln 3)²
    line = sampling_line({}, [drawn([0, 0, 0, 0, 1] * 40, [0.75, 0.25])], 5.0)
    assert line.value == pytest.approx(10 / math.sqrt(200 * 3 / 16), rel=1e-3) and line.outcome == "pass"


def test_draws_that_were_cut_or_cooled() -> None:
    said = {"temperature": 0.6, "top_k": 50, "top_p": 1.0, "repetition_penalty": 1.1, "bos_token_id": 1}
    line = sampling_line(said, [drawn([0] * 200, [0.75, 0.25])], 5.0)  # top-k 1, silently
    assert line.value == pytest.approx(50 / math.sqrt(200 * 3 / 16), rel=1e-3) and line.outcome == "fail"
    assert "draws with temperature=0.6, top_k=50, repetition_penalty=1.1;" in line.said, "top_p=1 cuts nothing"
    hot = sampling_line({}, [drawn([0, 1] * 100, [0.75, 0.25])], 5.0)
    assert hot.outcome == "fail" and "-0.27 nats" in hot.said


def test_draws_of_a_model_without_doubts_or_with_masked_tokens() -> None:
    certain = drawn([0] * 1000, [1 - 1e-7, 1e-7])
    assert sampling_line({}, [certain], 5.0).outcome == "pass"
    with np.errstate(divide="ignore", invalid="ignore"):
        masked = drawn([0, 0, 0, 1] * 50, [0.75, 0.25, 0.0])
    entropy = drawn([0], [0.75, 0.25]).entropy_T
    assert entropy is not None
    masked.entropy_T[:] = entropy[0]  # type: ignore[index]
    assert sampling_line({}, [masked], 5.0).value == pytest.approx(0, abs=1e-4)


def said(*logprobs: float, ids: list[int] | None = None) -> TokenScores:
    ids_T = np.array(range(len(logprobs)) if ids is None else ids, np.int32)
    return TokenScores(token_ids_T=ids_T, logprobs_T=np.array(logprobs, np.float32))


def test_a_logprob_said_twice() -> None:
    pairs = [(said(-1.0, -2.0), said(-1.0, -2.5)), (said(-3.0), said(-3.0))]
    line = k3_line(Check.decode, pairs, 0.05, "once and again")
    assert line.outcome == "pass" and line.value == pytest.approx((math.exp(-0.5) + 0.5 - 1) / 3)
    assert line.said == "once and again: mean |Δ| 0.17, worst 0.5 of 3 tokens"
    assert k3_line(Check.decode, pairs, 0.03, "").outcome == "fail"


def test_only_what_both_have_is_compared() -> None:
    longer, other = said(-1.0, -2.0, -3.0), said(-1.5, -9.0, ids=[0, 7])
    line = k3_line(Check.cache, [(longer, other)], 1.0, "draws")
    assert line.value == pytest.approx(math.exp(-0.5) + 0.5 - 1) and "of 1 token" in line.said
    line = k3_line(Check.cache, [(longer, said(-1.0, ids=[7]))], 1e9, "draws")
    assert (line.outcome, line.value) == ("fail", None) and "no token to compare" in line.said


def test_a_logprob_that_is_no_number_fails() -> None:
    line = k3_line(Check.truth, [(said(-1.0, math.nan), said(-1.0, -1.0))], 1e9, "")
    assert (line.outcome, line.value) == ("fail", None)
    line = k3_line(Check.truth, [(said(-1.0), said(-math.inf))], 1.0, "")
    assert line.outcome == "fail" and line.value == pytest.approx(math.exp(-20) + 20 - 1)


def greedy(ranks: list[int], behind: list[float]) -> TokenScores:
    """Scores of greedy tokens: their ranks, and how many nats each is behind the likeliest."""
    top = np.full((len(ranks), 1), -0.5, np.float32)
    return TokenScores(
        token_ids_T=np.arange(len(ranks)),
        logprobs_T=top[:, 0] - np.array(behind, np.float32),
        rank_T=np.array(ranks),
        top_logprobs_TK=top,
    )


def test_greedy_ids() -> None:
    line = greedy_line([greedy([1, 1, 1, 1], [0] * 4)], 0.5)
    assert (line.outcome, line.value) == ("pass", 0) and "1 of 1 prompt with" in line.said
    # parts at its second token, by 0.1 nats; what follows is another text and does not count
    parted = greedy([1, 2, 7, 1], [0, 0.1, 4.0, 0])
    line = greedy_line([greedy([1, 1], [0, 0]), parted], 0.5)
    assert line.outcome == "pass" and line.value == pytest.approx(0.1)
    assert "1 of 2 prompts" in line.said and "62% of the tokens" in line.said
    assert greedy_line([greedy([3, 1], [0.7, 0])], 0.5).outcome == "fail"


def test_rows_of_the_head_that_no_token_has() -> None:
    assert head_line([], 0.0, 64, 1e-4).outcome == "pass"
    line = head_line([300, 301], 1e-3, 64, 1e-4)
    assert (line.outcome, line.value) == ("fail", 1e-3) and "2 rows of the LM head, from 300 on" in line.said
