"""An engine of another package: installed beside rl_onoff, known by its name, without a change in this repository."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

PACKAGE = Path(__file__).with_name("outside_engine")


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Where the package is installed, as the environment that sees it."""
    folder = tmp_path_factory.mktemp("outside")
    source = shutil.copytree(PACKAGE, folder / "source")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", str(folder / "site"), str(source)], check=True, capture_output=True, text=True)
    path = os.pathsep.join([str(folder / "site"), str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path}


def test_it_samples_and_scores_from_the_command_line(installed, tmp_path):
    options = [
        "backend=uniform",
        "target=uniform",
        "target.bias=1.0",
        "model.name=any",
        "experiment=onoff",
        "score.name=biased",
    ]
    sizes = [
        "data.limit=3",
        "sampling.max_new_tokens=50",
        "sampling.n=4",
        "score.full_logits=true",
        "tracking=none",
        f"run_dir={tmp_path}/run",
    ]
    command = [sys.executable, "-m", "rl_onoff", *options, *sizes]
    done = subprocess.run(command, env=installed, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    values = json.loads((tmp_path / "run" / "metrics.json").read_text())["values"]
    exact = np.log((256 + np.e) / 257) - 1 / 257  # KL of the uniform distribution from the biased one, in closed form
    assert abs(values["onoff/biased/kl_forward"] - exact) < 1e-6


def test_its_own_options_are_checked(installed, tmp_path):
    command = [sys.executable, "-m", "rl_onoff", "backend=uniform", "backend.bais=1", "model.name=any"]
    done = subprocess.run(command, env=installed, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 2 and "backend.bias" in done.stderr


def test_it_runs_in_a_worker_from_python(installed):
    script = """
from rl_onoff.backends import create_backend
config = {"backend_type": "uniform", "model_name": "any", "backend_specific": {"worker": True}}
with create_backend(config) as backend:
    print(backend.get_logits("a", "bc").shape)
"""
    done = subprocess.run([sys.executable, "-c", script], env=installed, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "(2, 257)", done.stderr
