"""The question the project is named for, on three engines: each samples, each scores, and in float32 they agree."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

from tests.conftest import SGLANG_PYTHON


def test_three_engines_agree_in_float32(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, "-m", "rl_onoff", "experiment=matrix", "policies=engines", "data.limit=6", "sampling.max_new_tokens=24",
         "tracking=none", f"run_dir={run_dir}"],
        capture_output=True, text=True, env={**os.environ, "RL_ONOFF_SGLANG_PYTHON": SGLANG_PYTHON},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    cells = list(csv.DictReader((run_dir / "matrix.csv").open()))
    assert len(cells) == 9
    for cell in cells:
        assert 0 <= float(cell["kl_k3"]) < 1e-4, cell
        assert float(cell["logprob_diff_max"]) < 1e-3, cell
        assert float(cell["ess_token"]) > 0.999, cell
    assert "furthest apart" in done.stdout
    json.loads((run_dir / "metrics.json").read_text())
    again = subprocess.run(
        [sys.executable, "-m", "rl_onoff", "experiment=matrix", "policies=engines", "data.limit=6", "sampling.max_new_tokens=24",
         "tracking=none", f"run_dir={run_dir}"],
        capture_output=True, text=True, env={**os.environ, "RL_ONOFF_SGLANG_PYTHON": SGLANG_PYTHON},
    )  # fmt: skip
    assert again.returncode == 0 and "loading" not in again.stderr  # everything is on disk: no engine starts
