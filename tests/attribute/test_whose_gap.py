"""The ladder says whose error the gap is: it makes the truth where the run has none, and checks it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rl_onoff.rundir.table import RunDir
from tests.running import rewrite, run_in

FAKE = ("experiment=onoff", "backend=fake", "backend.rounding=0.1", "data.limit=20", "sampling.max_new_tokens=32")
TRAINER = ("target=fake", "target.rounding=0.07", "score.name=trainer")
TRUTH = "+target@targets.truth=fake"


def climbed(folder: RunDir, *overrides: str) -> dict:
    run_in(folder.path, "experiment=attribute", *overrides)
    return folder.read_json("attribution.json")


def share(found: dict) -> float:
    return found["whose_error"]["overall"]["metrics"]["error_share_behaviour"]["value"]


def test_the_truth_is_made_checked_and_found_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = run_in(tmp_path / "run", *FAKE, *TRAINER)
    found = climbed(folder)
    assert share(found) == pytest.approx(100 / 149, abs=0.08) and found["whose_error"]["target"] == "trainer"
    said = "two thirds of the gap is the sampler's error, a third trainer's, and the two are unrelated"
    assert said in found["sentence"] and "In float64 the truth differs by 0 nats" in found["sentence"]
    assert "trainer" in folder.score_names() and "truth" not in " ".join(folder.score_names())
    values = folder.read_json("metrics.json")["values"]
    assert values["attribute/error_share_behaviour"] == share(found)
    with caplog.at_level("INFO"):
        assert climbed(folder) == found
    assert not any("loading" in line for line in caplog.messages)


def test_a_truth_that_the_run_has_is_taken(tmp_path: Path) -> None:
    folder = run_in(tmp_path / "run", *FAKE, *TRAINER, TRUTH)
    found = climbed(folder, "attribute.target=trainer")
    compared = folder.read_json("metrics.json")["comparisons"]["trainer"]["whose_error"]["overall"]
    assert share(found) == compared["metrics"]["error_share_behaviour"]["value"]  # all 20 responses are on the ladder
    assert (
        "Whose error it is was not asked: truth is the truth itself"
        in climbed(folder, "attribute.target=truth")["truth"]
    )


def test_logprobs_of_another_kind_are_set_right_first(tmp_path: Path) -> None:
    """Declared raw, but scaled: measured against raw ones the sampler would be off by whole nats."""
    drawn = ("sampling.temperature=0.7", "backend.logprob_kind=scaled")
    folder = run_in(tmp_path / "run", *FAKE, *TRAINER, *drawn)
    rewrite(folder.completions, lambda row: row | {"logprob_kind": "raw"})
    found = climbed(folder)["whose_error"]["overall"]["metrics"]
    assert found["error_behaviour"]["value"] == pytest.approx(0.1 / 12**0.5 / 0.7, rel=0.3)
    assert found["error_target"]["value"] == pytest.approx(0.07 / 12**0.5 / 0.7, rel=0.3)


def test_tokens_that_one_side_lacks_are_left_out(tmp_path: Path) -> None:
    folder = run_in(tmp_path / "run", *FAKE, *TRAINER)
    names = ("token_ids", "logprobs", "processed_logprobs", "nucleus_mass")
    rewrite(folder.scores("trainer"), lambda row: row | {name: row[name][:-1] for name in names})
    found, total = climbed(folder), sum(len(row["token_ids"]) for row in folder.completions.rows())
    assert found["whose_error"]["overall"]["counts"]["tokens"] == total - 20
    assert share(found) == pytest.approx(100 / 149, abs=0.08)


def test_other_weights_have_no_common_truth(tmp_path: Path) -> None:
    folder = run_in(tmp_path / "run", *FAKE, *TRAINER, "target.model_name=other")
    found = climbed(folder)
    assert found["whose_error"] is None and "the sides have different weights" in found["sentence"]


def test_bfloat16_against_a_truth_that_float64_bears_out(tiny_llama: str, tmp_path: Path) -> None:
    engines = (f"model.name={tiny_llama}", "model.dtype=bfloat16", "target=huggingface", "score.name=eager")
    small = ("target.attn_implementation=eager", "data.limit=12", "sampling.max_new_tokens=24")
    folder = run_in(tmp_path / "run", "experiment=onoff", *engines, *small)
    found = climbed(folder, "attribute.truth_check=2", "attribute.rungs=[noise]")
    q = {row["request_id"]: row["logprobs"].astype(float) for row in folder.completions.rows()}
    p = {row["request_id"]: row["logprobs"].astype(float) for row in folder.scores("eager").rows()}
    tables = {path.name: path for path in (folder.path / "scores/attribute").iterdir()}
    by_type = {RunDir(folder.path).scores(f"attribute/{name}").record()["engine"]["dtype"]: name for name in tables}
    t, t64 = (
        {row["request_id"]: row["logprobs"].astype(float) for row in folder.scores(f"attribute/{by_type[x]}").rows()}
        for x in ("float32", "float64")
    )
    assert len(t64) == 2 and len(t) == 12
    off = np.concatenate([t[i] - t64[i] for i in t64])
    assert 0 < np.abs(off).max() < 1e-4 and f"{np.abs(off).max():.1g} at most" in found["truth"]
    e_q, e_p = (np.concatenate([side[i] - t[i] for i in t]) for side in (q, p))
    m = found["whose_error"]["overall"]["metrics"]
    assert m["error_behaviour"]["value"] == pytest.approx(np.mean(e_q**2) ** 0.5)
    assert m["error_correlation"]["value"] == pytest.approx(
        np.sum(e_q * e_p) / np.sqrt(np.sum(e_q**2) * np.sum(e_p**2))
    )
    assert 0.001 < m["error_target"]["value"] < 0.2
