"""Metrics over training steps on the page: the chart, the departure, and the way into a step's responses."""

from __future__ import annotations

import numpy as np
import pytest
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys

from rl_onoff.report import ReportInput, ReportResponse, write_report
from rl_onoff.types import Rollout, TokenScores

K3 = [0.001, 0.002, 0.0015, 0.4, 0.3]
STEPS = [0, 10, 20, 30, 40]
HOSTILE = "<img src=x onerror='window.ran = 1'>"
DEPARTURE = {
    "step": 30,
    "k3": 0.4,
    "band": [0.001, 0.002],
    "sentence": f"From step 30 on {HOSTILE} k3 is over its band.",
}


def response(step, sample):
    """Sample 1 of a step is the worse one, and its third token is its worst."""
    tokens = [" a", " b", " c", " d"]
    q_T = np.full(4, -1.0, np.float32)
    p_T = q_T - np.array([0.125, 0, 2.0 * sample, 0.25], np.float32)
    sides = [TokenScores(token_ids_T=np.arange(4), logprobs_T=x_T) for x_T in (q_T, p_T)]
    rollout = Rollout(request_id=f"step-{step}", sample=sample, text=" a b c d", token_ids_T=np.arange(4))
    return ReportResponse(rollout=rollout, prompt="?", tokens=tokens, behaviour=sides[0], targets=sides[1:])


def entry(k3, **where):
    """What a comparison says of one step; its responses are two, and a third is not in the page."""
    (step,) = where.values()
    values = {"kl_k3": k3, "ess_token": 1 - k3, "logprob_diff_mean": "NaN", "entropy_target": 2.0, "reward": k3 / 2}
    metrics = {name: {"value": value, "lo": None, "hi": None} for name, value in values.items()}
    metrics["kl_k3"] |= {"lo": k3 / 2, "hi": k3 * 2}
    worst = [(f"step-{step}", 1, 0.5), (f"step-{step}", 0, 0.25), (HOSTILE, 7, 0.125)]
    worst = [{"request_id": name, "sample": sample, "mean_abs_l": size} for name, sample, size in worst]
    return {**where, "metrics": metrics, "counts": {"responses": 3, "tokens": 1200}, "worst": worst}


def comparison(**changes):
    overall = {"kl_k3": {"value": 0.14, "lo": 0.1, "hi": 0.2}}
    steps = [entry(k3, step=step) for k3, step in zip(K3, STEPS, strict=True)]
    return {"name": "trainer", "overall": overall, "steps": steps, "departure": DEPARTURE, **changes}


def opened(page, path, *comparisons):
    responses = [response(step, sample) for step in STEPS for sample in (0, 1)]
    report = ReportInput(title="t", verdict="Off.", policies=[], responses=responses, comparisons=comparisons)
    return page.open(write_report(path, report))


CURSOR = (
    "return [...document.querySelectorAll('.cursor')].map((e) => [e.getAttribute('visibility'), +e.getAttribute('x1')])"
)
DOTS = "return [...document.querySelectorAll('#steps .dot')].map((e) => +e.getAttribute(arguments[0]))"


def show(page, metric):
    select = "document.querySelector('#steps select')"
    page.js(f"const s = {select}; s.value = arguments[0]; s.dispatchEvent(new Event('change'))", metric)


def test_k3_over_steps_with_its_interval_and_the_departure(page, tmp_path):
    opened(page, tmp_path / "steps.html", comparison())
    assert page.find("#steps .warning").text == DEPARTURE["sentence"]
    assert page.texts("#steps figure h3") == ["k3 KL by step"]
    across, down = (np.array(page.js(DOTS, axis)) for axis in ("cx", "cy"))
    assert np.diff(across) == pytest.approx(across[1] - across[0])  # steps true to scale
    fall = (down[0] - down) / (down[0] - down[3])
    assert fall == pytest.approx((np.array(K3) - K3[0]) / (K3[3] - K3[0]), abs=1e-6)
    assert page.texts("#steps .dot title")[3] == "k3 KL, step 30: 0.4"
    band = page.find("#steps .band").get_attribute("d")
    assert len(band.replace("L", "M").split("M")) == 11  # five lower and five upper ends
    mark = page.find("#steps .departure")
    assert float(mark.get_attribute("x1")) == pytest.approx(across[3]) and page.texts("#steps .usual title")
    assert page.js(CURSOR) == [["visible", pytest.approx(across[3])]]
    assert page.find(".step-worst h3").text == "Worst responses of step 30"
    assert page.find(".step-worst .note").text == "3 responses · 1,200 tokens"
    page.js("document.querySelector('#steps .numbers').open = true")
    rows = page.wait(lambda: page.texts("#steps .numbers tbody tr"))
    assert rows[3] == "3031,2000.4[0.2, 0.8]"
    assert page.js("return window.ran ?? null") is None and page.errors() == []


def test_other_metrics_over_steps(page, tmp_path):
    opened(page, tmp_path / "steps.html", comparison())
    offered = page.js("return [...document.querySelectorAll('#steps option')].map((e) => e.value)")
    assert offered == ["kl_k3", "ess_token", "entropy", "reward"]  # what no step has a number for is not offered
    show(page, "ess_token")
    assert page.texts("#steps figure h3") == ["Effective sample size by step"]
    assert page.texts("#steps .dot title")[3] == "Effective sample size, step 30: 0.6"
    assert page.all("#steps .usual") == [] and len(page.all("#steps .departure")) == 1
    show(page, "entropy")
    assert page.texts("#steps .dot title")[0] == "target, step 0: 2"
    show(page, "reward")
    assert page.texts("#steps .dot title")[3] == "Reward, step 30: 0.2"
    assert page.errors() == []


def test_a_click_on_a_step_opens_its_worst_response(page, tmp_path):
    opened(page, tmp_path / "steps.html", comparison())
    dot = page.all("#steps .dot")[1]
    ActionChains(page.chrome).move_to_element(dot).click().perform()
    assert page.find(".step-worst h3").text == "Worst responses of step 10"
    assert page.texts(".step-worst tbody tr") == ["step-10/10.5", "step-10/00.25", f"{HOSTILE}/70.125"]
    assert page.texts(".step-worst button") == ["step-10/1", "step-10/0"]  # the third is not in the page
    page.find(".step-worst button").click()
    page.wait(lambda: page.all("#panel.open"))
    assert page.find("#tokens").is_displayed()
    assert page.chrome.current_url.endswith("#token-3-2") and page.number("l") == -2
    assert page.js("return window.ran ?? null") is None and page.errors() == []


def test_steps_by_keyboard(page, tmp_path):
    opened(page, tmp_path / "steps.html", comparison())
    slider = "#steps [role=slider]"
    page.js("document.querySelector(arguments[0]).focus()", slider)
    keys = lambda *sequence: ActionChains(page.chrome).send_keys(*sequence).perform()  # noqa: E731
    said = lambda: page.find(slider).get_attribute("aria-valuetext")  # noqa: E731
    assert page.find(slider).get_attribute("aria-label") == "k3 KL by step"
    assert said() == "step 30: k3 KL 0.4 [0.2, 0.8]"
    keys(Keys.ARROW_LEFT)
    assert said() == "step 20: k3 KL 0.0015 [7.50e−4, 0.003]"
    assert page.find(".step-worst h3").text == "Worst responses of step 20"
    keys(Keys.END, Keys.ARROW_RIGHT)
    assert said().startswith("step 40") and page.find(slider).get_attribute("aria-valuenow") == "4"
    keys(Keys.HOME, Keys.ARROW_LEFT)
    assert (
        said().startswith("step 0")
        and page.js("return getComputedStyle(document.activeElement).outlineStyle") == "solid"
    )
    keys(Keys.ENTER)
    assert page.js("return document.activeElement.textContent") == "step-0/1"
    keys(Keys.ENTER)
    page.wait(lambda: page.all("#panel.open"))
    assert page.chrome.current_url.endswith("#token-1-2")
    assert page.errors() == []


def test_staleness_has_a_chart_of_its_own(page, tmp_path):
    staleness = [entry(k3, staleness=age) for k3, age in ((0.01, 0), (0.1, 1))]
    opened(page, tmp_path / "stale.html", comparison(staleness=staleness, departure=None))
    assert page.texts("#steps figure h3") == ["k3 KL by step", "k3 KL by staleness"]
    assert page.all("#steps .departure") == page.all("#steps .warning") == page.all("#steps .usual") == []
    assert page.find(".step-worst h3").text == "Worst responses of step 30"  # the largest k3
    ActionChains(page.chrome).move_to_element(page.all("#steps .dot")[-1]).click().perform()
    assert page.find(".step-worst h3").text == "Worst responses of staleness 1"
    assert [visible for visible, _ in page.js(CURSOR)] == ["hidden", "visible"]
    show(page, "ess_token")
    assert page.find(".step-worst h3").text == "Worst responses of staleness 1"
    assert page.texts("#steps figure:nth-child(2) .dot title") == [
        "Effective sample size, staleness 0: 0.99", "Effective sample size, staleness 1: 0.9",
    ]  # fmt: skip
    ticks = page.texts("#steps figure:nth-child(2) text[text-anchor=middle].tick")
    assert ticks == ["0", "1"] and page.errors() == []


@pytest.mark.parametrize("width", [360, 800, 1280])
def test_the_charts_do_not_stick_out(page, tmp_path, width):
    page.chrome.set_window_size(width, 900)
    long = {**DEPARTURE, "sentence": "long" * 200}
    opened(
        page, tmp_path / "wide.html", comparison(departure=long, findings=[{"what": "y" * 300, "example": "x" * 300}])
    )
    assert len(page.all("#steps figure")) == len(page.all("#findings li")) == 1
    assert page.js("return document.documentElement.scrollWidth <= document.documentElement.clientWidth")


@pytest.mark.parametrize("changes", [{"steps": []}, {"steps": None}, {"steps": [entry(0.1, step=3)]}, {"metrics": {}}])
def test_no_section_where_there_are_no_steps_to_compare(page, tmp_path, changes):
    bare = changes.pop("metrics", None)
    if bare is not None:
        changes = {"steps": [{"step": 1}, {"step": 2, "metrics": bare}], "staleness": None}
    opened(page, tmp_path / "few.html", comparison(departure=None, **changes))
    assert page.all("#steps *") == [] and page.texts("#headline .value") == ["0.14"]
    assert page.errors() == []
