"""What the page says of data that should be doubted, and of tokens that nobody sampled."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from rl_onoff.report import ReportInput, ReportResponse, write_report
from rl_onoff.types import Rollout, TokenScores

HOSTILE = "</script><img src=x onerror='window.ran = 1'>\u202e"


def response(name, behaviour, target, mask=None, words="abcdefgh"):
    """A response of which both sides' logprobs are said; token t has id t."""
    ids_T = np.arange(len(behaviour))
    sides = [TokenScores(token_ids_T=ids_T, logprobs_T=np.array(x, np.float32)) for x in (behaviour, target)]
    tokens = [f" {word}" for word in words[: len(ids_T)]]
    mask_T = None if mask is None else np.array(mask, bool)
    rollout = Rollout(request_id=name, sample=0, text="".join(tokens), token_ids_T=ids_T, mask_T=mask_T)
    return ReportResponse(rollout=rollout, prompt="?", tokens=tokens, behaviour=sides[0], targets=sides[1:])


def report(responses, *comparisons, verdict="Close."):
    return ReportInput(title="t", verdict=verdict, policies=[], responses=responses, comparisons=comparisons)


# Of the second, third and last token the file says fillings: 0 and −9999 and NaN. Of the rest, l is −0.5, 0.25, 1.
BEHAVIOUR, TARGET = [-1.0, 0.0, -9999.0, -2.0, -3.0, np.nan], [-1.5, -7.0, -1.0, -1.75, -2.0, -4.0]
MASK = [1, 0, 0, 1, 1, 0]
SPANS = """const has = (e, name) => e.classList.contains(name);
    return [...document.querySelectorAll(`.response[data-r="${arguments[0]}"] .token`)].map(
      (e) => [has(e, "unsampled"), has(e, "plus") - has(e, "minus"), e.title])"""


@pytest.fixture
def masked(page, tmp_path):
    responses = [response("tools", BEHAVIOUR, TARGET, MASK), response("plain", [-1.0, -1.0], [-1.125, -1.0])]
    return page.open(write_report(tmp_path / "masked.html", report(responses)), "#tokens")


def test_tokens_that_nobody_sampled_are_dimmed_and_have_no_colour(masked):
    said = "not sampled by the policy: context only"
    signs = [-1, 0, 0, 1, 1, 0]
    wanted = [[not sampled, sign, "" if sampled else said] for sampled, sign in zip(MASK, signs, strict=True)]
    assert masked.js(SPANS, 0) == wanted
    assert masked.js(SPANS, 1) == [[False, -1, ""], [False, 0, ""]]
    masked.set("colour", "logprob1")
    assert masked.js(SPANS, 0) == [[not sampled, -sampled, "" if sampled else said] for sampled in MASK]
    ink = "return getComputedStyle(document.querySelector(arguments[0])).color"
    assert masked.js(ink, ".token.unsampled") == masked.js(ink, "#legend .note") != masked.js(ink, ".token")
    assert said in masked.find("#legend").text
    masked.choose(0, 2)
    assert said in masked.find("#panel").text and said in masked.find("#announce").get_attribute("textContent")
    assert masked.all("#panel [data-is]") == [] and masked.errors() == []


def test_tokens_that_nobody_sampled_count_in_no_number(masked):
    """l of the response's sampled tokens: mean (−0.5 + 0.25 + 1) / 3 = 0.25, worst 1; 3 + 2 tokens in all."""
    chips = dict(zip(masked.ids(), masked.texts(".chips"), strict=True))
    assert chips["tools sample 0"] == "3 sampled tokens3 of contextworst |ℓ| 1mean ℓ 0.25"
    assert chips["plain sample 0"] == "2 tokensworst |ℓ| 0.125mean ℓ −0.0625"
    assert masked.find("#size").text == "2 responses · 5 response tokens"
    masked.tab("worst")
    assert masked.texts("#worst tbody td:nth-child(3)") == ["+1", "−0.5", "+0.25", "−0.125"]
    masked.tab("tokens")
    masked.choose(0, 3)
    assert masked.number("l") == 0.25


def test_a_file_without_masks_says_nothing_of_them(tmp_path):
    sides = BEHAVIOUR[3:5], TARGET[3:5]
    index = [
        write_report(tmp_path / f"{mask}.html", report([response("a", *sides, mask)])).read_text()
        for mask in (None, [1, 0])
    ]
    said = [text.partition('id="index">')[2].partition("</script>")[0] for text in index]
    assert '"context"' not in said[0] and '"context":[1]' in said[1]
    with pytest.raises(ValueError, match="a mask has 1 entries for a response of 2 tokens"):
        write_report(tmp_path / "short.html", report([response("a", *sides, [1])]))


def finding(**changes):
    said = {"check": "sentinels", "what": "-9999 stands where a logprob should: 3 tokens of 1 of 2 responses"}
    said |= {"fix": "mask the tokens that have no logprob", "responses": 1, "tokens": 3, "fatal": False}
    return said | {"example": "b/0 at token 1"} | changes


def two():
    return [response("a", [-1.0, -1.0], [-1.0, -1.5]), response("b", [-1.0, -2.0, -3.0], [-1.0, -2.5, -3.0])]


OVERALL = {"kl_k3": {"value": 0.25, "lo": 0.125, "hi": 0.5}}
HISTOGRAM = {"l": {"edges": [-1.0, 0.0, 1.0], "counts": [2, 3], "below": 0, "above": 0}}


def test_rows_that_were_set_aside_are_named_and_their_example_opens(page, tmp_path):
    found = [finding(), finding(what="rows are copies", responses=1, tokens=1200, example="gone/4 at token 0")]
    compared = {"overall": OVERALL, "histograms": HISTOGRAM, "findings": found, "comparable": True}
    page.open(write_report(tmp_path / "aside.html", report(two(), compared)))
    assert page.texts("#findings li") == [
        "Set aside: -9999 stands where a logprob should: 3 tokens of 1 of 2 responses (first in b/0 at token 1). "
        "What to do: mask the tokens that have no logprob.",
        "Set aside: rows are copies: 1,200 tokens of 1 response (first in gone/4 at token 0). "
        "What to do: mask the tokens that have no logprob.",
    ]
    assert page.texts("#headline .value") == ["0.25"] and "Log-ratio of the sampled tokens" in page.texts("figure h3")
    assert page.texts("#findings button") == ["b/0 at token 1"]
    page.find("#findings button").click()
    page.wait(lambda: page.all("#panel.open"))
    assert page.chrome.current_url.endswith("#token-1-1") and page.number("l") == -0.5
    assert page.errors() == []


def test_what_was_set_aside_is_in_no_number_and_can_be_looked_at(page, tmp_path):
    """b is named as set aside, and the target of c scored other tokens than were sampled: one fewer."""
    longer = response("c", [-1.0, -2.0], [-8.0, -9.0])
    other = replace(longer, targets=[longer.targets[0][:1]])
    what = finding(what="other tokens in 1 of 3", tokens=0, example="c/0: 2 tokens under the behaviour and 1 under it")
    compared = {"overall": OVERALL, "findings": [finding(), what], "set_aside": ["b/0", "c/0"]}
    page.open(write_report(tmp_path / "aside.html", report([*two(), other], compared)), "#tokens")
    chips = dict(zip(page.ids(), page.texts(".chips"), strict=True))
    assert chips == {
        "a sample 0": "2 tokensworst |ℓ| 0.5mean ℓ −0.25",
        "b sample 0": "3 tokensset aside, in no metric",
        "c sample 0": "2 tokensset aside, in no metric",
    }
    assert page.ids()[0] == "a sample 0"
    page.set("sort", "mean")
    assert page.ids()[0] == "a sample 0"
    page.tab("worst")
    assert page.texts("#worst tbody td:nth-child(3)") == ["−0.5"]
    page.all("#findings button")[1].click()
    page.wait(lambda: page.all("#panel.open"))
    assert page.number("logprob0") == -1 and page.texts('#panel [data-is="l"]') == ["–"]
    assert page.errors() == []


@pytest.mark.parametrize("said", ["findings", "comparable"])
def test_what_cannot_be_compared_shows_the_reason_and_no_number(page, tmp_path, said):
    """Numbers that stand in the file all the same are not shown either."""
    fatal = finding(what=f"both are one {HOSTILE}", fatal=said == "findings", example=f"{HOSTILE}/0")
    steps = [{"step": i, "metrics": OVERALL, "counts": {}, "worst": []} for i in (1, 2)]
    bad = {"name": "bad", "overall": OVERALL, "histograms": HISTOGRAM, "findings": [finding(), fatal], "steps": steps}
    bad |= {"groups": {"level": {"1": {"metrics": OVERALL, "counts": {"tokens": 3}}}}, "comparable": said == "findings"}
    good = {"name": "good", "overall": OVERALL, "counts": {"tokens": 5}}
    both = two()
    page.open(write_report(tmp_path / "not.html", report(both, bad, good, verdict="Not comparable: …")))
    assert page.find("#findings li").text.startswith(
        "No number is headlined: both" if said == "findings" else "Set aside"
    )
    for name, where in (("overview", "#headline"), ("metrics", "#metric-table"), ("worst", "#worst")):
        page.tab(name)
        text = page.find(where).text
        assert "Not comparable, so no metric is shown" in text and "0.25" not in text
        assert ("both are one </script><img src=x" in text) == (said == "findings")
    page.tab("overview")
    assert (
        page.all("#headline .value")
        == page.all("#plots figure")
        == page.all("#steps *")
        == page.all("#group-table *")
        == []
    )
    assert page.texts("#all-targets tbody tr") == ["badnot comparable", "good0.25[0.125, 0.5]"]
    page.js("const s = document.getElementById('target'); s.value = '1'; s.dispatchEvent(new Event('change'))")
    page.wait(lambda: page.texts("#headline .value") == ["0.25"])
    assert page.all("#findings li") == [] and page.js("return window.ran ?? null") is None
    assert page.all("header img") == [] and page.errors() == []
