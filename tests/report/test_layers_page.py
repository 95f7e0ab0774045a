"""The layers on the page: the sentence, the growth curve and the heat map."""

from __future__ import annotations

import numpy as np

from rl_onoff.report import write_report
from tests.layers.made_errors import LENGTH, NUM_LAYERS, add, made


def test_the_layers_are_shown(page, sample_run, tmp_path):
    found = made(lambda errors, norms: add(errors, 0.3, layer=7, kind="mlp", start=16))
    page.open(write_report(tmp_path / "report.html", sample_run(3).report(layers=found.to_dict())))
    assert found.sentence in page.find("#layers").text
    titles = page.texts("#layers .cell title")
    assert len(titles) == (NUM_LAYERS + 1) * len(found.positions)  # nothing differs after the embeddings
    assert sum("layer 7, positions 16 to 31: 0.3" in title for title in titles) == 1
    faint, strong = (page.find(f"#layers .cell:nth-of-type({n})").get_attribute("fill-opacity") for n in (2, 13 * 8))
    assert float(faint) < float(strong)
    assert len(page.all("#layers .dot.s1")) == NUM_LAYERS + 1
    marks = [float(mark.get_attribute("x1")) for mark in page.all("#layers .departure")]
    assert marks[0] == float(page.all("#layers .dot.s1")[7].get_attribute("cx"))
    page.find("#layers summary").click()
    rows = page.wait(lambda: page.texts("#layers details tbody th"))  # a toggle event follows the click
    assert rows[8:11] == ["layer 7, its attention", "layer 7, its mlp", "layer 7"] and len(rows) == NUM_LAYERS + 4
    assert page.errors() == []


def test_the_experts_of_a_mixture_are_shown(page, sample_run, tmp_path):
    overlap_ML = np.full((NUM_LAYERS, LENGTH), np.nan, np.float32)
    overlap_ML[3:], overlap_ML[5, ::2] = 1, 0.5
    found = made(overlap_ML=overlap_ML)
    page.open(write_report(tmp_path / "report.html", sample_run(3).report(layers=found.to_dict())))
    assert "The routers choose the same experts in each of their 9 layers for 51.0% of the tokens" in found.sentence
    assert found.sentence in page.find("#layers").text
    titles = page.texts("#layers figure:last-child .dot title")
    assert len(titles) == 2 * 9 and {"overlap, layer 3: 1", "same set, layer 5: 0.5098"} <= set(titles)
    page.find("#layers figure:last-child summary").click()
    assert page.wait(lambda: page.texts("#layers figure:last-child tbody th")) == ["0", "1"]
    assert page.errors() == []


def test_a_page_without_layers_and_one_without_differences(page, sample_run, tmp_path):
    page.open(write_report(tmp_path / "report.html", sample_run(3).report()))
    assert page.find("#layers").text == ""
    same = made(lambda errors, norms: [values.fill(0) for values in errors.values()], dtype="float32", nats=0)
    page.open(write_report(tmp_path / "report.html", sample_run(3).report(layers=same.to_dict())))
    assert "is 0 at every layer" in page.find("#layers").text and not page.all("#layers figure")
    assert page.errors() == []
