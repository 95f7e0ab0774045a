"""Whose error the gap is, drawn by the token's probability."""

from __future__ import annotations

import numpy as np
import pytest

from rl_onoff.attribution.ladder import Attribution
from rl_onoff.compare import WhoseError, whose_error
from rl_onoff.report import write_report


@pytest.fixture(scope="module")
def found() -> WhoseError:
    rng, rows = np.random.default_rng(0), []
    for _ in range(20):
        t_T, a_T, b_T = -rng.exponential(2, 40), *rng.normal(size=(2, 40))
        rows.append((t_T + 0.1 * a_T, t_T + 0.07 * b_T, t_T))
    error = whose_error("truth", "trainer", rows)
    assert error is not None
    return error


def figures(page, title: str) -> list:
    return [figure for figure in page.all("#plots figure") if figure.find_element("css selector", "h3").text == title]


def test_both_errors_are_drawn_with_their_numbers(page, sample_run, found, tmp_path):
    run = sample_run(12)
    run.comparisons[0]["whose_error"] = {"by_probability": [
        {"start": x.start, "end": x.end, "counts": x.counts, "metrics": {n: e.to_dict() for n, e in x.metrics.items()}}
        for x in found.by_probability
    ]}  # fmt: skip
    page.open(write_report(tmp_path / "report.html", run.report()))
    (figure,) = figures(page, "Whose error, by probability")
    assert len(figure.find_elements("css selector", "path.line")) == 3
    assert len(figure.find_elements("css selector", "path.band")) == 3
    figure.find_element("css selector", "summary").click()
    rows = page.wait(lambda: figure.find_elements("css selector", "tbody tr"))
    heads = [head.text for head in figure.find_elements("css selector", "thead th")]
    assert heads == ["from probability", "to", "tokens", "behaviour", "target", "gap"]
    assert len(rows) == len(found.by_probability)
    cells = [cell.text for cell in rows[-1].find_elements("css selector", "th, td")]
    last = found.by_probability[-1]
    assert cells[:3] == ["0.99", "1", str(last.counts["tokens"])]
    assert float(cells[3]) == pytest.approx(last.metrics["error_behaviour"].value, rel=1e-3)
    assert page.errors() == []


def test_the_ladders_are_drawn_for_the_target_it_explains(page, sample_run, found, tmp_path):
    run = sample_run(12)
    run.comparisons[0]["name"] = "trainer"
    ladder = Attribution(
        target="trainer", gap=0.2, floor=0, left=0.2, rows=[], responses=3, tokens=30, whose_error=found
    )
    page.open(write_report(tmp_path / "report.html", run.report(attribution=ladder.to_dict())))
    assert len(figures(page, "Whose error, by probability")) == 1
    assert "two thirds of the gap is the sampler's error" in page.find("#attribution").text
    run.comparisons[0]["name"] = "another"
    page.open(write_report(tmp_path / "report.html", run.report(attribution=ladder.to_dict())))
    assert figures(page, "Whose error, by probability") == []
