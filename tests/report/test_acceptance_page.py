"""The list of checks of a model on an engine on the page."""

from __future__ import annotations

from rl_onoff.acceptance.accept import Acceptance
from rl_onoff.acceptance.lines import NOT_TRIED, Line, judged
from rl_onoff.analysis_config import Check
from rl_onoff.report import write_report


def test_the_list_is_shown_above_the_fold(page, sample_run, tmp_path):
    lines = [judged(check, 0.0, 0.015, "a sentence that says what was found of this check, and how") for check in Check]
    lines[2] = judged(Check.eos, 1, 0, "not everywhere 7 '<im_end>'")
    lines[7] = Line(check=Check.cache, outcome=NOT_TRIED, said="the engine keeps no prompts")
    found = Acceptance(model="<smollm2>", engine="vllm 0.11 (bfloat16)", truth=None, lines=lines)
    page.open(write_report(tmp_path / "report.html", sample_run(3).report(acceptance=found.to_dict())))
    rows = [
        [cell.text for cell in row.find_elements("css selector", "th, td")] for row in page.all("#acceptance tbody tr")
    ]
    assert [row[0] for row in rows] == [check.value.replace("_", " ") for check in Check]
    assert rows[0][1:] == ["pass", "0", "0.015", lines[0].said]
    assert rows[2][1:4] == ["fail", "1", "0"]
    assert rows[2][4] == f"{lines[2].said}\nWhat to do: {lines[2].fix}."
    assert rows[7][1:] == ["not tried", "–", "–", lines[7].said]
    assert page.find("#acceptance h2").text == "Not fit to be trained: <smollm2> on vllm 0.11 (bfloat16)"
    bottom = page.js("return document.querySelector('#acceptance table').getBoundingClientRect().bottom")
    assert 0 < bottom < page.js("return innerHeight")
    assert page.errors() == []


def test_a_page_without_a_list_and_one_of_a_sound_engine(page, sample_run, tmp_path):
    page.open(write_report(tmp_path / "report.html", sample_run(3).report()))
    assert page.find("#acceptance").text == ""
    found = Acceptance(model="a", engine="b", truth="c", lines=[judged(Check.eos, 0, 0, "all say 2")])
    page.open(write_report(tmp_path / "report.html", sample_run(3).report(acceptance=found.to_dict())))
    assert page.find("#acceptance h2").text == "Fit to be trained: a on b"
    assert "What to do" not in page.find("#acceptance").text
    assert page.errors() == []
