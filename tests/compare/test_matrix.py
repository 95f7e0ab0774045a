"""N policies against N: the numbers, the files, how often an engine is loaded, and going on."""

from __future__ import annotations

import csv
import html
import json
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from rl_onoff.compare import Comparison, Estimate, verdict
from rl_onoff.compare.comparison import Summary
from rl_onoff.compare.metrics import Thresholds
from rl_onoff.errors import UsageError
from rl_onoff.report.tables import Matrix
from rl_onoff.rundir.table import RunDir
from rl_onoff.types import LogprobKind
from tests.conftest import ROOT
from tests.running import run_in

NAMES = ("plain", "near", "far")
POLICIES = (*(f"+backend@policies.{name}=fake" for name in NAMES), "policies.near.noise=0.05", "policies.far.noise=0.5")
MATRIX = ("experiment=matrix", *POLICIES, "data.limit=5", "sampling.max_new_tokens=24")


def test_every_cell_and_every_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level("INFO"):
        folder = run_in(tmp_path / "run", *MATRIX)
    assert (
        sum("loading" in message for message in caplog.messages) == 2 * len(NAMES) - 1
    )  # the last to sample is the first to score
    with (folder.path / "matrix.csv").open() as file:
        cells = {(row["sampled"], row["scored"]): row for row in csv.DictReader(file)}
    assert set(cells) == {(a, b) for a in NAMES for b in NAMES}
    for (a, b), cell in cells.items():
        sub = RunDir(folder.path / a)
        p = {row["request_id"]: row["logprobs"] for row in sub.scores(b).rows()}
        per_response = [p[row["request_id"]].astype(np.float64) - row["logprobs"] for row in sub.completions.rows()]
        l_N, w_S = np.concatenate(per_response), np.exp([part.sum() for part in per_response])
        assert float(cell["kl_k3"]) == pytest.approx(np.mean(np.exp(l_N) - l_N - 1), rel=1e-6, abs=1e-15)
        assert float(cell["logprob_diff_max"]) == pytest.approx(np.abs(l_N).max(), rel=1e-6)
        assert float(cell["ess_token"]) == pytest.approx(
            np.exp(l_N).sum() ** 2 / (len(l_N) * np.exp(2 * l_N).sum()), rel=1e-6
        )
        assert float(cell["ess_seq"]) == pytest.approx(w_S.sum() ** 2 / (len(w_S) * (w_S**2).sum()), rel=1e-6)
        assert (float(cell["kl_k3"]) < 1e-12) == (a == b)
        assert int(cell["tokens"]) == len(l_N) and int(cell["responses"]) == 5
    found = json.loads((folder.path / "metrics.json").read_text())
    worst = max(float(cell["kl_k3"]) for cell in cells.values())
    assert found["values"]["matrix/kl_k3_max"] == pytest.approx(worst)
    assert found["values"]["matrix/plain/far/kl_k3"] == pytest.approx(float(cells["plain", "far"]["kl_k3"]))
    assert len(found["matrix"]["cells"]) == 9 and "furthest apart" in found["matrix"]["verdict"]
    said = capsys.readouterr().out
    assert "KL, k3 estimate (nats)" in said and "effective sample, sequences" in said and "matrix.html" in said
    page = (folder.path / "matrix.html").read_text()
    assert (
        html.escape(found["matrix"]["verdict"]) in page and 'href="near/report.html"' in page and "<script" not in page
    )
    assert all((folder.path / name / "report.html").exists() for name in NAMES)


def test_a_matrix_goes_on_where_it_stopped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = run_in(tmp_path / "run", *MATRIX)
    before = (folder.path / "matrix.csv").read_text()
    for shard in RunDir(folder.path / "near").scores("plain").shards():
        shard.unlink()
    with caplog.at_level("INFO"):
        run_in(folder.path, *MATRIX)
    assert [message for message in caplog.messages if "loading" in message] == ["loading fake with smollm2"]
    assert (folder.path / "matrix.csv").read_text() == before


def test_a_policys_folder_is_a_run_folder(tmp_path: Path) -> None:
    folder = run_in(tmp_path / "run", *MATRIX)
    sub = run_in(folder.path / "near", "experiment=compare")
    assert set(sub.read_json("metrics.json")["comparisons"]) == set(NAMES)
    run_in(sub.path, "experiment=attribute", "attribute.target=far")
    assert sub.read_json("attribution.json")["target"] == "far"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ((), "needs two policies or more and has 0: set policies=engines, policies=dtypes"),
        (
            ("+backend@policies.scores=fake", "+backend@policies.b=fake"),
            "the policy 'scores' cannot be the name of a folder",
        ),
    ],
)
def test_policies_that_are_refused(overrides: tuple[str, ...], words: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=words):
        run_in(tmp_path / "run", "experiment=matrix", *overrides)


def test_the_studys_table_and_plot(tmp_path: Path) -> None:
    folder = run_in(tmp_path / "run", *MATRIX)
    script = ROOT / "experiments/engine_mismatch/make_figures.py"
    subprocess.run(
        [sys.executable, str(script), str(folder.path), "--out", str(tmp_path / "out")], check=True, capture_output=True
    )
    table = (tmp_path / "out" / "table.md").read_text()
    assert sum("(noise floor)" in line for line in table.splitlines()) == 3 and "5 responses of each policy" in table
    plot = ElementTree.parse(tmp_path / "out" / "matrix.svg")
    k3 = json.loads((folder.path / "metrics.json").read_text())["values"]["matrix/plain/far/kl_k3"]
    assert f"{k3:.2g}" in [text.text for text in plot.iter("{http://www.w3.org/2000/svg}text")]


def matrix_of(k3_12: float, k3_21: float, floor: float) -> Matrix:
    """Two policies whose cells have these mean k3 KLs."""

    def cell(k3: float) -> Comparison:
        metrics = {"kl_k3": Estimate(k3, 0.9 * k3, 1.1 * k3), "ess_token": Estimate(1 - k3), "ess_seq": Estimate(1.0)}
        metrics["logprob_diff_max"] = Estimate(k3**0.5)
        summary = Summary(metrics=metrics, counts={"tokens": 100, "responses": 5})
        return Comparison(kind=LogprobKind.raw, overall=summary, groups={}, positions=[], histograms={}, worst=[],
                          worst_responses=[], thresholds=Thresholds())  # fmt: skip

    cells = {("a", "a"): floor, ("a", "b"): k3_12, ("b", "a"): k3_21, ("b", "b"): floor}
    return Matrix(["a", "b"], {pair: cell(k3) for pair, k3 in cells.items()})


def shades(matrix: Matrix) -> list[str]:
    """How strong the colour of every cell of the first table is, as the page says."""
    page = matrix.page(dict.fromkeys(matrix.names, ""))
    table = page.partition("<tbody>")[2].partition("</tbody>")[0]
    return [(re.findall(r"var\(--heat\), ([\d.]+)", cell) or ["0"])[0] for cell in table.split("<td")[1:]]


def test_a_cells_colour_is_that_of_its_verdict() -> None:
    """1e-10 nats between engines in float32 is no alarm, however much larger than the table's smallest number."""
    assert shades(matrix_of(7e-11, 3e-11, 1e-11)) == ["0", "0", "0", "0"]
    off = shades(matrix_of(0.2, 0.002, 1e-11))
    assert off[0] == off[3] == "0" and float(off[1]) > 2 * float(off[2]) > 0


def test_the_matrix_judges_as_a_run_does() -> None:
    matrix = matrix_of(5e-5, 1e-8, 1e-7)
    assert matrix.verdict().startswith("Close: ") and matrix.word("a", "b") == "Close"
    assert verdict(matrix.cells["a", "b"], matrix.floor).startswith("Close: ")
    assert matrix.word("b", "a") == "On-policy"
