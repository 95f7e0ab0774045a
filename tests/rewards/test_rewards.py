"""Judging responses, and the numbers made of the judgements."""

import itertools
import logging
import threading

import pytest

from rl_onoff.data.prompts import load_rows
from rl_onoff.errors import UsageError
from rl_onoff.rewards import Judge, last_boxed, load_reward, math_verify, summarise_rewards

RIGHT = [
    ("She has 24 apples left.", "24"),
    ("First 3, then 4, so the answer is 1/2", "0.5"),
    ("Total: $1,234.50", "1234.5"),
    ("The total is \\$45.", "45"),
    ("so that is \\boxed{3}, no, \\boxed{4}", "4"),
    ("\\[ 5 \\times 4 = 20 \\]", "20"),
    ("\\boxed{\\frac{1}{2}}, as 7 shows", "\\frac12"),
    ("\\boxed{x=5}", "5"),
    ("\\boxed{18 \\text{ cm}^2}", "18"),
    ("\\boxed{\\text{Evelyn}}", "\\text{Evelyn}"),
    ("-4", "-4"),
]
WRONG = [
    ("", "5"),
    ("I do not know.", "5"),
    ("\\boxed{", "5"),
    ("\\boxed{}", "5"),
    ("\\boxed{3} and \\boxed{4}", "3"),
    ("\\boxed{\\text{Evelyn}}", "\\text{Bob}"),
    ("5 of them, and then 6", "5"),
    ("\\boxed{" * 2000, "5"),
    ("\\boxed{9^{9^{9^9}}}", "5"),
    ("\\boxed{9999999999!}", "5"),
    ("5", ""),
]


@pytest.mark.parametrize("text, answer", RIGHT)
def test_right_answers(text, answer):
    assert math_verify(text, answer, {}) == 1.0


@pytest.mark.parametrize("text, answer", WRONG)
@pytest.mark.timeout(20)
def test_wrong_and_unreadable_answers(text, answer):
    assert math_verify(text, answer, {}) == 0.0


@pytest.mark.timeout(20)
def test_it_works_outside_the_main_thread_and_says_nothing(caplog):
    results = []

    def judge() -> None:
        results.extend([math_verify(text, answer, {}) for text, answer in (*RIGHT, *WRONG)])

    with caplog.at_level(logging.WARNING):
        thread = threading.Thread(target=judge)
        thread.start()
        thread.join()
    assert results == [1.0] * len(RIGHT) + [0.0] * len(WRONG)
    assert not caplog.records


def test_every_bundled_answer_is_recognised_and_not_taken_for_another():
    from rl_onoff.config import DataConfig

    rows = load_rows(DataConfig())
    for row, other in itertools.pairwise(rows):
        text = f"Let us think. The answer is {row.meta['answer']}."
        assert math_verify(text, row.meta["answer"], row.meta) == 1.0
        assert math_verify(text, other.meta["answer"], other.meta) == float(
            float(row.meta["answer"]) == float(other.meta["answer"])
        )


def test_the_last_box_with_its_inner_braces():
    assert last_boxed("\\boxed{a{b}c} \\boxed {d}") == "d"
    assert last_boxed("x } \\boxed{\\frac{1}{2}} and {") == "\\frac{1}{2}"
    assert last_boxed("\\boxed{1} \\boxed{2") == "1"
    assert last_boxed("none") is None


# Loading


def test_a_reward_of_a_module_and_one_of_a_file(tmp_path, monkeypatch):
    assert load_reward("rl_onoff.rewards:math_verify")("It is 4", "4", {}) == 1.0
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(
        "from dataclasses import dataclass\n@dataclass\nclass A:\n    x: int = 1\n"
        "def length(text, answer, meta): return len(text) > 2\n"
    )
    reward, why = Judge(load_reward("mine.py:length"))("abc", {"answer": ""}, ("a", 0))
    assert reward == 1.0 and isinstance(reward, float) and why is None
    assert load_reward(f"{tmp_path}/mine.py:length")("a", "", {}) == 0.0


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("nothing", "names no function"),
        (":x", "names no function"),
        ("rl_onoff.rewards:", "names no function"),
        ("no_such_package.x:f", r"cannot be imported \(ModuleNotFoundError"),
        ("missing.py:f", "does not exist"),
        ("broken.py:f", r"cannot be imported \(SyntaxError"),
        ("mine.py:f", "has no function 'f' but length: set reward.function=mine.py:length"),
        ("mine.py:NUMBER", "has no function 'NUMBER'"),
        ("mine.py:lenght", "set reward.function=mine.py:length"),
        ("mine:length", "names a file without its ending: set reward.function=mine.py:length"),
        ("./mine:length", r"set reward.function=./mine.py:length"),
        ("mine.py", "set reward.function=mine.py:NAME"),
        ("mine.length", "set reward.function=mine.py:length"),
        ("some.module.f", "set reward.function=some.module:f"),
        (
            "few.py:f",
            r"cannot be called with \(text, answer, meta\): too many positional arguments: give it these three",
        ),
        ("more.py:f", r"cannot be called with \(text, answer, meta\): missing a required argument"),
        ("empty.py:f", "has no function 'f' but none at all"),
    ],
)
def test_a_reward_that_cannot_be_loaded(tmp_path, monkeypatch, spec, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("import math\nNUMBER = 3\ndef length(text, answer, meta): return len(text)\n")
    (tmp_path / "broken.py").write_text("def f(:\n")
    (tmp_path / "empty.py").write_text("")
    (tmp_path / "few.py").write_text("def f(text): return 1.0\n")
    (tmp_path / "more.py").write_text("def f(text, answer, meta, more): return 1.0\n")
    with pytest.raises(UsageError, match=words) as caught:
        load_reward(spec)
    assert "reward.function" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("return None", "returned None"),
        ("return 'one'", "returned 'one'"),
        ("return float('nan')", "returned nan"),
        ("raise KeyError('x')", "KeyError: 'x'"),
    ],
)
def test_a_reward_that_does_not_give_a_number(tmp_path, body, words, caplog):
    (tmp_path / "mine.py").write_text(f"def f(text, answer, meta):\n    {body}\n")
    value, why = Judge(load_reward(f"{tmp_path}/mine.py:f"))("a", {"answer": "b"}, ("a", 0))
    assert value is None and words in str(why)
    assert words in caplog.text and "fix reward.function, or set reward=none" in caplog.text


def failing(every: int, calls: itertools.count):
    def reward(text, answer, meta):
        if next(calls) % every == 0:
            raise KeyError(text)
        return 1

    return reward


def warnings_of(caplog, reward, num_responses: int) -> list[str]:
    judge = Judge(reward)
    with caplog.at_level(logging.WARNING):
        found = [judge("text", {"answer": "1"}, (str(i), 0)) for i in range(num_responses)]
        judge.conclude()
    assert judge.judged == num_responses and judge.failed == sum(why == "KeyError: 'text'" for _, why in found)
    assert all((value is None) != (why is None) for value, why in found)
    return [record.getMessage() for record in caplog.records]


def test_a_reward_that_fails_now_and_then_is_told_at_its_first_failure_and_at_the_end(caplog):
    first, last = warnings_of(caplog, failing(3, itertools.count(1)), 100)
    assert "the reward failed on response ('2', 0), which is kept without one" in first and "'text'" in first
    assert "failed on 33 of 100 responses" in last and "reward.function" in last


def test_what_is_not_judged_does_not_fail(caplog):
    assert Judge(None)("text", {"answer": "1"}, ("a", 0)) == (None, None)
    assert Judge(failing(1, itertools.count()))("text", {}, ("a", 0)) == (None, None)
    assert warnings_of(caplog, lambda *_: 0.5, 3) == []


# Numbers


@pytest.mark.parametrize(
    ("num_samples", "num_correct", "k"), [(5, 2, 1), (5, 2, 4), (6, 0, 2), (6, 6, 4), (4, 1, 4), (8, 3, 2)]
)
def test_pass_at_k_is_the_mean_over_all_choices(num_samples, num_correct, k):
    rewards = [1.0] * num_correct + [0.0] * (num_samples - num_correct)
    draws = list(itertools.combinations(rewards, k))
    assert summarise_rewards({"a": rewards})[f"pass@{k}"] == pytest.approx(sum(map(any, draws)) / len(draws))


def test_the_summary_gives_every_prompt_equal_weight():
    summary = summarise_rewards({"a": [1.0, 0.0, 0.0, 0.0], "b": [1.0, 1.0, 0.5, 1.0, 0.0], "c": []})
    assert summary["num_prompts"] == 2 and summary["num_responses"] == 9
    assert summary["reward_mean"] == pytest.approx((0.25 + 0.7) / 2)
    assert summary["accuracy"] == summary["pass@1"] == pytest.approx((0.25 + 0.6) / 2)
    assert summary["pass@2"] == pytest.approx((3 / 6 + 9 / 10) / 2) and summary["pass@4"] == 1.0
    assert "pass@8" not in summary
    assert summarise_rewards({}) == {}
    assert summarise_rewards({"a": [1.0, 0.9, 2.0]})["accuracy"] == pytest.approx(2 / 3)
