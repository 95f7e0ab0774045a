"""Model text is shown and never run, whatever is in it."""

from __future__ import annotations

import numpy as np
import pytest

from rl_onoff.compare import Metric
from rl_onoff.report import ReportInput, ReportResponse, write_report
from rl_onoff.types import Rollout, TokenScores

ATTACKS = [
    "<script>window.ran = 1</script>",
    "</script><script>window.ran = 2</script>",
    "<img src=x onerror='window.ran = 3'>",
    "<!--<script>",
    "]]>--></textarea></title><svg onload='window.ran = 4'>",
    "${window.ran = 5}`'\"\\",
    "a\u2028b\u2029c\x00d\x1b[31m\u202eevil\u200b",
    "lone \ud800 and \udfff",
    "\ufffd",
    "👩‍👩‍👧 مرحبا 你好",
    "&lt;b&gt; &amp; &#60;",
    "  two\t\n\n lines \r\n",
]
EDGES = [0.0, -np.inf, np.nan, -1e-30, -80.0]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    num = len(ATTACKS)
    logprobs_T = np.resize(EDGES, num).astype(np.float32)
    view = TokenScores(
        token_ids_T=np.arange(num),
        logprobs_T=logprobs_T,
        entropy_T=np.resize([0.0, np.nan, 3.0], num),
        rank_T=np.full(num, 70_000),
        top_ids_TK=np.stack([np.arange(num), np.full(num, -1)], axis=1),
        top_logprobs_TK=np.stack([logprobs_T, np.full(num, np.nan)], axis=1),
    )
    responses = (
        ReportResponse(
            rollout=Rollout(
                request_id=attack, sample=0, text="".join(ATTACKS), token_ids_T=np.arange(num), reward=float("nan")
            ),
            prompt=attack, tokens=ATTACKS, behaviour=view, targets=[view], groups={attack: attack},
        )
        for attack in ATTACKS
    )  # fmt: skip
    value = {"value": float("nan"), "lo": float("-inf"), "hi": np.float64(2)}
    hostile = ReportInput(
        title=ATTACKS[1],
        verdict=ATTACKS[1],
        policies=[{"name": ATTACKS[1], ATTACKS[0]: ATTACKS[2]}, {"engine": "\ud800"}],
        responses=responses,
        comparisons=[{"overall": {ATTACKS[1]: value}, "counts": {ATTACKS[0]: 3}}],
        metrics={ATTACKS[1]: Metric(ATTACKS[0], "nats", "lower", ATTACKS[2], 3, 0.1, family=ATTACKS[4])},
        token_text=lambda i: ATTACKS[i] if i else "\ufffd",
    )
    return write_report(tmp_path_factory.mktemp("hostile") / "report.html", hostile)


def test_nothing_runs(page, report):
    page.open(report)
    for name in ("overview", "metrics", "worst", "tokens"):
        page.tab(name)
    page.find(".token").click()
    page.wait(lambda: page.find("#panel.open"))
    assert page.js("return window.ran ?? null") is None
    assert page.js("return document.querySelectorAll('img, #list script, #panel script, main svg[onload]').length") == 0
    assert page.find("#verdict").text == ATTACKS[1] and page.chrome.title == ATTACKS[1]
    assert page.errors() == []


def test_text_is_shown_as_it_is(page, report):
    page.open(report)
    page.tab("tokens")
    page.set("sort", "id")
    tokens = page.js("return [...document.querySelector('.tokens').children].map((e) => e.textContent)")
    assert tokens[:6] == ATTACKS[:6] and tokens[8:11] == ATTACKS[8:11]
    assert tokens[6] == "a⟨2028⟩b⟨2029⟩c⟨0000⟩d⟨001B⟩[31m⟨202E⟩evil⟨200B⟩"
    assert tokens[7] == "lone ⟨D800⟩ and ⟨DFFF⟩"
    assert tokens[11] == "  two→\t↵\n↵\n lines ⟨000D⟩↵\n"
    page.set("search", "window.ran = 3")
    assert page.count() == len(ATTACKS)


def test_infinite_and_missing_numbers(page, report):
    page.open(report)
    page.tab("tokens")
    page.set("sort", "id")
    shown = []
    for t in range(5):
        page.all(".tokens")[0].find_elements("css selector", ".token")[t].click()
        shown.append([page.texts(f'#panel [data-is="{what}"]') for what in ("logprob0", "l", "entropy0", "rank0")])
    logprobs = [row[0] for row in shown]
    assert logprobs == [["0"], ["−∞"], [], ["−1.000e−30"], ["−80"]]
    assert shown[0][1:] == [["0"], ["0"], ["70,000"]]
    assert shown[1][1] == ["–"] and shown[1][2] == []
    assert page.errors() == []


def test_the_file_is_ascii_and_asks_nothing_of_the_network(report):
    text = report.read_bytes().decode("ascii")
    assert "http://" not in text.replace("http://www.w3.org/2000/svg", "") and "https://" not in text
    assert text.count("</script>") == text.count("<script") and "default-src 'none'" in text
