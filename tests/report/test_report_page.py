"""What a reader sees and does, in a real browser: numbers, filters, order, pages, keys, dark mode."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys

from rl_onoff.compare import METRICS
from rl_onoff.report import ReportInput, write_report
from rl_onoff.types import FinishReason, TokenScores


@pytest.fixture(scope="module")
def run(sample_run):
    return sample_run(45)


@pytest.fixture(scope="module")
def report(run, tmp_path_factory):
    return write_report(tmp_path_factory.mktemp("report") / "report.html", run.report())


@pytest.fixture(autouse=True)
def no_console_error(page):
    yield
    assert page.errors() == []


TOP_IDS = (
    "return [...document.querySelectorAll(`#panel .s${arguments[0]} tbody tr[data-id]`)].map((row) => +row.dataset.id)"
)
ALL_TOKENS = """return [...document.querySelectorAll('.response')].map(
    (card) => [+card.dataset.r, card.querySelector('.tokens').textContent])"""


def worst_of(run, v=0):
    return [np.abs(r.targets[v].logprobs_T - r.behaviour.logprobs_T).max() for r in run.responses]


def heading(response):
    return f"{response.rollout.request_id} sample {response.rollout.sample}"


def number(text):
    return float(text.replace("−", "-").replace(",", ""))


def test_verdict_policies_metrics_and_plots_are_shown(page, run, report):
    page.open(report)
    assert page.find("#verdict").text == run.verdict
    assert "sampled vLLM" in page.find("#policies").text and "scored HuggingFace" in page.find("#policies").text
    k3 = run.comparisons[0]["overall"]["kl_k3"]
    assert number(page.find("#headline .value").text) == pytest.approx(k3["value"], rel=1e-3)
    wanted = {
        "p against q",
        "Log-ratio of the sampled tokens",
        "Drift with length",
        "Effective sample size",
        "Entropy by position",
    }
    assert wanted <= set(page.texts("figure h3"))
    assert page.js(
        "return [...document.querySelectorAll('figure svg')]"
        ".every((s) => s.getAttribute('aria-label') && s.children.length > 3)"
    )
    page.tab("metrics")
    row = next(row for row in page.all("#metric-table tr") if row.text.startswith("kl_k3")).text
    low, high = (number(x) for x in re.findall(r"\[(.*), (.*)\]", row)[0])
    assert (low, high) == (pytest.approx(k3["lo"], rel=1e-3), pytest.approx(k3["hi"], rel=1e-3))
    assert "meets the bar: < 0.015" in row
    assert len(page.all("#metric-table tbody tr")) > len(run.comparisons[0]["overall"])


def test_the_headlines_are_those_of_the_metrics(page, run, report):
    page.open(report)
    measured = run.comparisons[0]["overall"]
    ranked = sorted(METRICS, key=lambda name: -METRICS[name].headline)
    wanted = [name for name in ranked if METRICS[name].headline and name in measured][:6]
    assert page.texts("#headline .name") == wanted and wanted[0] == "kl_k3"
    families = list(dict.fromkeys(METRICS[name].family for name in METRICS if name in measured))
    assert page.texts("#metric-table tr.family th") == families


def test_a_clicked_token_shows_its_numbers(page, run, report):
    page.open(report)
    page.tab("tokens")
    r = int(np.argmax(worst_of(run)))
    response = run.responses[r]
    behaviour, target = response.behaviour, response.targets[0]
    for t in (int(np.argmax(np.abs(target.logprobs_T - behaviour.logprobs_T))), 0, len(response.tokens) - 1):
        page.choose(r, t)
        for side, view in (("0", behaviour), ("1", target)):
            assert page.number("logprob" + side) == pytest.approx(view.logprobs_T[t], rel=1e-6)
            assert page.number("probability" + side) == pytest.approx(np.exp(view.logprobs_T[t]), rel=1e-6)
            assert page.number("rank" + side) == view.rank_T[t]
            assert page.number("entropy" + side) == pytest.approx(view.entropy_T[t], abs=1.3e-4)
            assert page.js(TOP_IDS, side)[:10] == view.top_ids_TK[t].tolist()
            shares = [float(text.split()[0].lstrip("<")) / 100 for text in page.texts(f"#panel .s{side} td.share")]
            assert shares[:10] == pytest.approx(np.exp(view.top_logprobs_TK[t].astype(float)), rel=0.06, abs=6e-4)
            assert (
                int(page.find(f"#panel .s{side} .sampled").get_attribute("data-id")) == response.rollout.token_ids_T[t]
            )
        ratio = float(target.logprobs_T[t]) - float(behaviour.logprobs_T[t])
        assert page.number("l") == pytest.approx(ratio, abs=1e-9)
        assert page.number("rho") == pytest.approx(np.exp(ratio), rel=1e-9)
        assert f"Token {t + 1}," in page.find("#announce").get_attribute("textContent")


def test_every_token_of_every_response_is_there(page, run, report):
    page.open(report)
    page.tab("tokens")
    page.set("sort", "id")
    seen = {}
    while True:
        seen |= dict(page.js(ALL_TOKENS))
        button = page.find("#pager [aria-label='Next page']")
        if button.get_attribute("disabled"):
            break
        before = page.turn()
        button.click()
        page.wait(lambda before=before: page.turn() != before)
    assert seen == {r: response.rollout.text.replace("\n", "↵\n") for r, response in enumerate(run.responses)}


def test_order(page, run, report):
    page.open(report)
    page.tab("tokens")
    worst = np.array(worst_of(run))
    names = [heading(r) for r in run.responses]
    assert page.ids() == [names[i] for i in np.argsort(-worst, kind="stable")[:10]]
    page.set("sort", "id")
    assert page.ids() == names[:10]
    page.set("sort", "longest")
    lengths = [len(r.tokens) for r in run.responses]
    assert page.ids() == [names[i] for i in np.argsort(-np.array(lengths), kind="stable")[:10]]
    page.set("sort", "low")
    assert all("reward 0" in text for text in page.texts(".response .chips"))


def test_filters(page, run, report):
    page.open(report)
    page.tab("tokens")

    def expect(condition):
        assert page.count() == sum(map(condition, run.responses)) > 0
        assert set(page.ids()) <= {heading(r) for r in run.responses if condition(r)}

    page.set("search", "wanjiru")
    expect(lambda r: "Wanjiru" in r.prompt + r.rollout.text)
    page.set("reward", "right")
    expect(lambda r: "Wanjiru" in r.prompt + r.rollout.text and r.rollout.reward > 0)
    page.set("reward", "")
    page.set("group:level", "1")  # the second of its values
    expect(lambda r: "Wanjiru" in r.prompt + r.rollout.text and r.groups["level"] == "2")
    page.set("search", "")
    page.set("group:level", "")
    page.set("finish", "length")
    expect(lambda r: r.rollout.finish_reason is FinishReason.length)
    page.set("finish", "")
    worst = dict(zip(map(heading, run.responses), worst_of(run), strict=True))
    page.set("least", "0.5")
    expect(lambda r: worst[heading(r)] >= 0.5)
    page.set("search", "no such words")
    assert page.count() == 0 and "No response passes the filters" in page.find("#list").text


def test_pages(page, run, report):
    page.open(report)
    page.tab("tokens")
    first = page.ids()
    before = page.turn()
    page.find("#pager [aria-label='Last page']").click()
    page.wait(lambda: page.turn() != before)
    assert len(page.ids()) == len(run.responses) % 10 and "page 5 of 5" in page.find("#pager").text
    before = page.turn()
    page.find("#pager [aria-label='First page']").click()
    page.wait(lambda: page.turn() != before)
    assert page.ids() == first


def test_colours_follow_the_choice(page, run, report):
    page.open(report)
    page.tab("tokens")
    r = int(np.argmax(worst_of(run)))
    response = run.responses[r]
    ratio = response.targets[0].logprobs_T.astype(float) - response.behaviour.logprobs_T
    sign = "e.classList.contains('plus') - e.classList.contains('minus')"
    classes = f"return [...document.querySelectorAll('.response[data-r=\"{r}\"] .token')].map((e) => {sign})"
    assert page.js(classes) == np.sign(ratio).astype(int).tolist()
    page.set("colour", "rank1")
    assert page.js(classes) == (-(response.targets[0].rank_T > 1).astype(int)).tolist()
    page.set("colour", "entropy0")
    assert all(x >= 0 for x in page.js(classes))
    label = page.find(f'.response[data-r="{r}"] .token').get_attribute("aria-label")
    assert "entropy" in label and number(label.split()[-1]) == pytest.approx(
        response.behaviour.entropy_T[0], rel=2e-3, abs=2e-4
    )


def test_keyboard_alone(page, run, report):
    page.open(report)
    keys = lambda *sequence: ActionChains(page.chrome).send_keys(*sequence).perform()  # noqa: E731
    focus = lambda: page.js("const e = document.activeElement; return [e.id || e.className, e.dataset.t ?? null]")  # noqa: E731
    keys(Keys.TAB)
    assert page.js("return document.activeElement.textContent") == "Skip to content"
    keys(Keys.TAB)
    assert focus()[0] == "tab-overview"
    keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert (
        focus()[0] == "tab-tokens" and page.find("#tokens").is_displayed() and not page.find("#overview").is_displayed()
    )
    for _ in range(40):
        keys(Keys.TAB)
        if focus()[1] is not None:
            break
    assert focus() == ["token minus" if "minus" in focus()[0] else "token plus", "0"]
    assert page.js("return getComputedStyle(document.activeElement).outlineStyle") == "solid"
    keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_LEFT)
    assert focus()[1] == "1" and not page.all("#panel.open")
    keys(Keys.ENTER)
    assert page.find("#panel.open header .note").text.startswith("token 2 of ")
    keys(Keys.ARROW_RIGHT)
    assert page.find("#panel.open header .note").text.startswith("token 3 of ")
    keys(Keys.ARROW_DOWN)
    assert int(focus()[1]) > 8
    keys(Keys.ARROW_UP, Keys.END)
    length = page.js("return document.activeElement.parentElement.children.length")
    assert focus()[1] == str(length - 1)
    keys(Keys.ESCAPE)
    assert not page.all("#panel.open") and focus()[1] == str(length - 1)


def test_roles_and_labels(page, report):
    page.open(report)
    page.tab("tokens")
    assert page.js("return document.documentElement.lang") == "en"
    unnamed = """return [...document.querySelectorAll("button, select, input")].filter(
        (e) => !(e.getAttribute("aria-label") || e.closest("label")?.textContent || e.textContent).trim()
    ).map((e) => e.outerHTML)"""
    assert page.js(unnamed) == []
    for tab in page.all("[role=tab]"):
        panel = page.find("#" + tab.get_attribute("aria-controls"))
        assert (
            panel.get_attribute("aria-labelledby") == tab.get_attribute("id")
            and panel.get_attribute("role") == "tabpanel"
        )
    assert page.js("return [...document.querySelectorAll('thead th')].every((h) => h.scope === 'col')")
    assert page.find("#announce").get_attribute("aria-live") == "polite"
    assert page.js("return document.querySelectorAll('.tokens [tabindex=\"0\"]').length") == 10  # one stop a response


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_both_schemes(page, report, scheme):
    page.chrome.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    page.open(report)
    page.tab("tokens")
    page.find(".token").click()
    contrasts = page.js("""
        const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
        const layers = (e) => (e ? [...layers(e.parentElement), getComputedStyle(e).backgroundColor] : []);
        const seen = (colours) => {
          canvas.clearRect(0, 0, 1, 1);
          for (const c of colours) { canvas.fillStyle = c; canvas.fillRect(0, 0, 1, 1); }
          return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
        };
        const light = (rgb) => rgb.map((v) => v / 255)
          .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
          .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
        const contrast = (e) => {
          const ink = light(seen([...layers(e), getComputedStyle(e).color]));
          const [a, b] = [ink, light(seen(layers(e)))].sort((x, y) => y - x);
          return (a + 0.05) / (b + 0.05);
        };
        const css = "h1, h3, .note, .token, .chips li, #panel td, #panel th, #panel caption, .ratio strong, .role, "
          + "select, [role=tab]";
        const name = (e) => e.className + " " + e.textContent.slice(0, 20);
        return [...document.querySelectorAll(css)].filter((e) => e.offsetParent).map((e) => [contrast(e), name(e)]);
    """)
    page.chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert len(contrasts) > 100
    assert min(contrasts)[0] >= 4.5, min(contrasts)


@pytest.mark.parametrize("width", [800, 1280])
def test_nothing_sticks_out(page, report, width):
    page.chrome.set_window_size(width, 900)
    page.open(report)
    for name in ("overview", "metrics", "tokens", "worst"):
        page.tab(name)
        assert page.js("return document.documentElement.scrollWidth <= document.documentElement.clientWidth"), name
    page.tab("tokens")
    page.find(".token").click()
    assert page.js("return document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    box = "return document.querySelector(arguments[0]).getBoundingClientRect().toJSON()"
    panel, token = page.js(box, "#panel"), page.js(box, ".token[aria-selected=true]")
    assert token["bottom"] <= panel["top"] or token["right"] <= panel["left"]


def test_a_worst_token_leads_to_its_place(page, run, report):
    page.open(report)
    page.tab("tokens")
    page.set("search", "no such words")
    page.tab("worst")
    ratios = [
        (abs(float(p) - float(q)), r, t)
        for r, response in enumerate(run.responses)
        for t, (p, q) in enumerate(zip(response.targets[0].logprobs_T, response.behaviour.logprobs_T, strict=True))
    ]
    size, r, t = sorted(ratios, reverse=True)[2]
    row = page.all("#worst tbody tr")[2]
    assert abs(number(row.find_elements("css selector", "td")[2].text)) == pytest.approx(size, rel=1e-3)
    row.find_element("css selector", "button").click()
    page.wait(lambda: page.all("#panel.open"))
    assert abs(page.number("l")) == pytest.approx(size, rel=1e-6)
    assert page.js(
        "return [+document.activeElement.closest('.response').dataset.r, +document.activeElement.dataset.t]"
    ) == [r, t]
    assert page.chrome.current_url.endswith(f"#token-{r}-{t}")
    page.open(report, f"#token-{r}-{t}")
    assert abs(page.number("l")) == pytest.approx(size, rel=1e-6)


def test_several_targets(page, sample_run, tmp_path):
    run = sample_run(25, (0.1, 0.01, 0.5))
    page.open(write_report(tmp_path / "several.html", run.report()))
    assert len(page.all("#all-targets tbody tr")) == 3
    page.tab("tokens")
    page.js("const s = document.getElementById('target'); s.value = '2'; s.dispatchEvent(new Event('change'))")
    worst = np.array(worst_of(run, 2))
    page.wait(lambda: page.ids()[0] == heading(run.responses[int(worst.argmax())]))
    r = int(worst.argmax())
    page.choose(r, 4)
    for name, view in (("0", run.responses[r].behaviour), ("1", run.responses[r].targets[2])):
        assert page.number("logprob" + name) == pytest.approx(view.logprobs_T[4], rel=1e-6)
    assert len(page.all("#panel .others tbody tr, #panel table.others tr")) >= 3
    page.tab("overview")
    k3 = run.comparisons[2]["overall"]["kl_k3"]["value"]
    assert number(page.find("#headline .value").text) == pytest.approx(k3, rel=1e-3)


def test_a_sampler_that_gave_logprobs_alone(page, sample_run, tmp_path):
    """What an engine reports while it samples has no lists; the lists of two scorers then stand for themselves."""
    run = sample_run(6, (0.1, 1.5))
    bare_of = lambda r: TokenScores(token_ids_T=r.rollout.token_ids_T, logprobs_T=r.behaviour.logprobs_T)  # noqa: E731
    bare = [replace(r, behaviour=bare_of(r)) for r in run.responses]
    page.open(write_report(tmp_path / "bare.html", run.report(responses=bare)))
    page.tab("tokens")
    page.js("const s = document.getElementById('target'); s.value = '1'; s.dispatchEvent(new Event('change'))")
    page.wait(lambda: page.all("#legend .scale"))
    for r, t in ((0, 3), (4, 20)):
        target = bare[r].targets[1]
        page.choose(r, t)
        assert len(page.all("#panel .top-list")) == 1 and page.js(TOP_IDS, "1")[:10] == target.top_ids_TK[t].tolist()
        shares = [float(text.split()[0].lstrip("<")) / 100 for text in page.texts("#panel .s1 td.share")]
        assert shares[:10] == pytest.approx(np.exp(target.top_logprobs_TK[t].astype(float)), rel=0.06, abs=6e-4)
        assert page.number("l") == pytest.approx(
            float(target.logprobs_T[t]) - float(bare[r].behaviour.logprobs_T[t]), abs=1e-9
        )


@pytest.mark.parametrize("which", ["behaviour", "target"])
def test_one_policy_alone(page, sample_run, tmp_path, which):
    run = sample_run(12, (0.1,))
    views = {"targets": ()} if which == "behaviour" else {"behaviour": None}
    responses = [replace(r, **views) for r in run.responses]
    alone = run.report(verdict="Sampled only.", policies=[{"engine": "vLLM"}], comparisons=[], responses=responses)
    page.open(write_report(tmp_path / "one.html", alone))
    page.tab("tokens")
    lowest = [(r.behaviour or r.targets[0]).logprobs_T.min() for r in responses]
    assert page.ids()[0] == heading(responses[int(np.argmin(lowest))])
    page.choose(int(np.argmin(lowest)), 0)
    assert len(page.all("#panel .top-list")) == 1 and not page.all("#panel .ratio")
    page.tab("worst")
    assert len(page.all("#worst tbody tr")) == 25


def test_a_run_without_responses(page, tmp_path):
    empty = ReportInput(title="none", verdict="Nothing was sampled.", policies=[], responses=[])
    page.open(write_report(tmp_path / "none.html", empty))
    page.tab("tokens")
    assert "no responses" in page.find("#list").text
