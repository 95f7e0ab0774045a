"""The ladder of causes on the page."""

from __future__ import annotations

from rl_onoff.analysis_config import Rung
from rl_onoff.attribution.ladder import Attribution
from rl_onoff.attribution.state import Row
from rl_onoff.report import write_report


def test_the_ladder_is_shown(page, sample_run, tmp_path):
    rows = [
        Row(
            rung=Rung.transform,
            changed="the target's <b>scaled</b> logprobs",
            before=0.2,
            after=0.01,
            share=0.95,
            verdict="the main cause: the <i>sampler</i>",
        ),
        Row(rung=Rung.dtype, changed="float32", verdict="not tried: both sides are in float32"),
    ]
    found = Attribution(target="<trainer>", gap=0.2, floor=0.0, left=0.01, rows=rows, responses=3, tokens=30)
    page.open(write_report(tmp_path / "report.html", sample_run(3).report(attribution=found.to_dict())))
    cells = [
        [cell.text for cell in row.find_elements("css selector", "th, td")] for row in page.all("#attribution tbody tr")
    ]
    assert cells[0][1:] == ["0.2", "0.01", "95 %", rows[0].verdict]
    assert "the target's <b>scaled</b> logprobs" in cells[0][0]
    assert cells[1][1:] == ["–", "–", "–", "not tried: both sides are in float32"]
    assert (
        page.find("#attribution h2").text == "Why <trainer> differs"
        and found.sentence() in page.find("#attribution").text
    )
    assert page.errors() == []


def test_without_a_ladder_there_is_no_section(page, sample_run, tmp_path):
    page.open(write_report(tmp_path / "report.html", sample_run(3).report()))
    assert page.find("#attribution").text == ""
