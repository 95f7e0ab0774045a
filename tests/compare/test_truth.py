"""Whose error a gap is, in runs that have a truth among their targets or policies."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from rl_onoff.rundir.provenance import is_truth
from rl_onoff.rundir.table import RunDir
from tests.conftest import ROOT
from tests.running import rewrite, run_in

SMALL = ("data.limit=20", "sampling.max_new_tokens=32")
SAMPLER = ("experiment=onoff", "backend=fake", "backend.rounding=0.1", *SMALL)
TRAINER = ("+target@targets.trainer=fake", "targets.trainer.rounding=0.07")
TRUTH = ("+target@targets.truth=fake",)


def error_of(folder: RunDir, target: str = "trainer") -> dict[str, float]:
    """The sums of squares, worked out from the rows without the code under test."""
    sides = [folder.completions, folder.scores(target), folder.scores("truth")]
    rows = [{row["request_id"]: row for row in table.rows()} for table in sides]
    masks = {i: row["mask"] if row["mask"] is not None else slice(None) for i, row in rows[0].items()}
    q, p, t = (np.concatenate([of[i]["logprobs"].astype(float)[masks[i]] for i in masks]) for of in rows)
    return {"qq": np.mean((q - t) ** 2), "pp": np.mean((p - t) ** 2), "gap": np.mean((p - q) ** 2), "n": len(q)}


def check(folder: RunDir) -> None:
    found = folder.read_json("metrics.json")["comparisons"]["trainer"]["whose_error"]
    m, expected = found["overall"]["metrics"], error_of(folder)
    assert found["truth"] == "truth" and found["overall"]["counts"]["tokens"] == expected["n"]
    assert m["error_behaviour"]["value"] == pytest.approx(expected["qq"] ** 0.5, rel=1e-9)
    assert m["error_target"]["value"] == pytest.approx(expected["pp"] ** 0.5, rel=1e-9)
    assert m["error_share_target"]["value"] == pytest.approx(expected["pp"] / expected["gap"], rel=1e-9)
    lo, hi = (m["error_share_behaviour"][end] for end in ("lo", "hi"))
    assert lo < 100 / 149 < hi  # rounding to steps of 0.1 and 0.07


def test_a_truth_among_the_targets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run_in(tmp_path / "run", *SAMPLER, *TRAINER, *TRUTH)
    check(folder)
    found = folder.read_json("metrics.json")
    said = "two thirds of the gap is the sampler's error, a third trainer's, and the two are unrelated"
    assert said in found["verdict"] and "Against truth, which is in float32" in found["verdict"]
    assert found["comparisons"]["truth"]["whose_error"] is None
    assert found["values"]["onoff/trainer/error_share_behaviour"] == pytest.approx(2 / 3, abs=0.1)
    out = capsys.readouterr().out
    assert said in out and "sampler's share of the gap" in out
    page = (folder.path / "report.html").read_text()
    assert '"by_probability"' in page


def test_neither_another_truth_nor_the_sampler_itself_is_judged(tmp_path: Path) -> None:
    twins = ("+target@targets.exact=fake", *TRUTH)
    folder = run_in(tmp_path / "run", *SAMPLER, *twins)
    found = folder.read_json("metrics.json")
    errors = {name: each["whose_error"] for name, each in found["comparisons"].items()}
    assert errors.pop("exact") is None and errors.pop("truth") is None and len(errors) == 1  # the sampler's own scores
    assert "root mean square" not in found["verdict"]
    assert not any("error_share" in name for name in found["values"])


@pytest.mark.parametrize(("target", "named"), [((), True), (("target.rounding=0.05",), False)])
def test_a_truth_alone_is_named(target: tuple[str, ...], named: bool, tmp_path: Path) -> None:
    folder = run_in(tmp_path / "run", *SAMPLER, "target=fake", "score.name=exact", *target)
    assert folder.read_json("metrics.json")["verdict"].startswith("exact: ") is named


def test_masked_tokens_and_those_set_aside_have_no_error(tmp_path: Path) -> None:
    folder = run_in(tmp_path / "run", *SAMPLER, *TRAINER, *TRUTH)

    def masked(row: dict) -> dict:
        mask = np.arange(len(row["token_ids"])) % 5 > 1
        return row | {"mask": mask, "logprobs": np.where(mask, row["logprobs"], np.float32(0))}

    rewrite(folder.completions, masked)
    run_in(folder.path, "experiment=compare")
    check(folder)
    first = next(folder.completions.rows())["request_id"]
    nan = np.float32(np.nan)
    rewrite(folder.completions, lambda r: r | {"logprobs": r["logprobs"] + nan} if r["request_id"] == first else r)
    run_in(folder.path, "experiment=compare")
    found = folder.read_json("metrics.json")["comparisons"]["trainer"]
    assert found["set_aside"] == [f"{first}/0"] and found["whose_error"]["overall"]["counts"]["responses"] == 19


@pytest.mark.parametrize(
    "others",
    [
        (),  # no truth
        (*TRUTH, "targets.truth.noise=0.01"),  # no truth either
        (*TRUTH, "targets.truth.model_name=other"),  # a truth about other weights
    ],
)
def test_without_a_truth_about_these_weights_nothing_is_said(others: tuple[str, ...], tmp_path: Path) -> None:
    found = run_in(tmp_path / "run", *SAMPLER, *TRAINER, *others).read_json("metrics.json")
    assert all(comparison["whose_error"] is None for comparison in found["comparisons"].values())
    assert "Against" not in found["verdict"] and not any("error_" in name for name in found["values"])


def test_a_target_with_other_weights_is_left_out(tmp_path: Path) -> None:
    stale = ("+target@targets.stale=fake", "targets.stale.model_name=other")
    found = run_in(tmp_path / "run", *SAMPLER, *TRAINER, *TRUTH, *stale).read_json("metrics.json")
    assert found["comparisons"]["stale"]["whose_error"] is None and found["comparisons"]["trainer"]["whose_error"]
    assert "a third trainer's" in found["verdict"]


def test_processed_logprobs_are_measured_against_processed_ones(tmp_path: Path) -> None:
    cut = ("backend.logprob_kind=processed", "sampling.temperature=0.7")
    folder = run_in(tmp_path / "run", *SAMPLER, *TRAINER, *TRUTH, *cut)
    found = folder.read_json("metrics.json")["comparisons"]["trainer"]["whose_error"]["overall"]["metrics"]
    # an error of the logits is 1 / 0.7 times as large at temperature 0.7; a raw truth would be off by whole nats
    assert found["error_behaviour"]["value"] == pytest.approx(0.1 / 12**0.5 / 0.7, rel=0.15)


def test_every_cell_of_a_matrix_with_a_truth(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policies = [f"+backend@policies.{name}=fake" for name in ("a", "b", "truth")]
    sizes = ("policies.a.rounding=0.1", "policies.b.rounding=0.07")
    folder = run_in(tmp_path / "run", "experiment=matrix", *policies, *sizes, *SMALL)
    with (folder.path / "matrix.csv").open() as file:
        cells = {(row["sampled"], row["scored"]): row for row in csv.DictReader(file)}
    assert float(cells["a", "b"]["error_share_behaviour"]) == pytest.approx(100 / 149, abs=0.08)
    assert float(cells["b", "a"]["error_share_target"]) == pytest.approx(100 / 149, abs=0.08)
    assert float(cells["truth", "a"]["error_share_target"]) == 1 and cells["a", "truth"]["error_share_target"] == ""
    assert float(cells["a", "b"]["error_correlation_lo"]) < 0 < float(cells["a", "b"]["error_correlation_hi"])
    page, out = (folder.path / "matrix.html").read_text(), capsys.readouterr().out
    shares = "{:.0%} / {:.0%}".format(*(float(cells["a", "b"][f"error_share_{x}"]) for x in ("behaviour", "target")))
    assert shares in page and shares in out and "whose error: who sampled / who scored" in out
    found = json.loads((folder.path / "metrics.json").read_text())["values"]
    assert found["matrix/truth/a/error_share_target"] == 1
    script, study = ROOT / "experiments/whose_error/make_figure.py", tmp_path / "study"
    subprocess.run([sys.executable, str(script), str(folder.path), "--out", str(study)], check=True)
    assert f"| a | b | {float(cells['a', 'b']['kl_k3']):.2g} |" in (study / "table.md").read_text()
    names = [text.text for text in ElementTree.parse(study / "errors.svg").iter("{http://www.w3.org/2000/svg}text")]
    assert names[-2:] == ["a", "b"]


@pytest.mark.parametrize(
    ("engine", "options", "dtype", "truth"),
    [
        ("huggingface.HuggingFaceBackend", {}, "float32", True),
        ("huggingface.HuggingFaceBackend", {"attn_implementation": "eager"}, "float32", True),
        ("huggingface.HuggingFaceBackend", {}, "bfloat16", False),
        ("huggingface.HuggingFaceBackend", {"engine_kwargs": {"quantization_config": {}}}, "float32", False),
        ("vllm.VLLMBackend", {}, "float32", False),
        ("elsewhere.Backend", {}, "float32", False),
    ],
)
def test_which_scores_are_a_truth(engine: str, options: dict, dtype: str, truth: bool) -> None:
    backend = {"_target_": f"rl_onoff.backends.{engine}", "model_name": "m", **options}
    assert is_truth({"config": {"backend": backend}, "engine": {"dtype": dtype}}) is truth
    assert not is_truth({"config": {"file": "rollouts.jsonl"}})
