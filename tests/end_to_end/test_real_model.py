"""The main job on the built-in model, as the README's commands do it, only shorter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tests.conftest import ROOT

SHARED = ROOT.parent / "shared" / "data"


def rl_onoff(*arguments: str) -> str:
    done = subprocess.run([sys.executable, "-m", "rl_onoff", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def with_bin() -> dict[str, str]:
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def test_the_demo(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    said = rl_onoff(
        "experiment=onoff",
        "model.dtype=bfloat16",
        "target=huggingface",
        "target.dtype=float32",
        "data.limit=3",
        "sampling.max_new_tokens=16",
        f"run_dir={run_dir}",
    )
    for words in (
        "tokens/s",
        "mean logprob",
        "mean entropy",
        "perplexity",
        "accuracy",
        "KL, k3 estimate",
        "report.html",
        "wandb sync",
    ):
        assert words in said
    responses = pd.read_parquet(run_dir / "completions")
    assert len(responses) == 3 and (responses["token_ids"].map(len) == responses["logprobs"].map(len)).all()
    scores = pd.read_parquet(run_dir / "scores" / "huggingface-smollm2-float32")
    joined = responses.merge(scores, on=["request_id", "sample"], suffixes=("", "_target"))
    assert len(joined) == 3
    l_N = np.concatenate([p - q for p, q in zip(joined["logprobs_target"], joined["logprobs"], strict=True)]).astype(
        np.float64
    )
    metrics = json.loads((run_dir / "metrics.json").read_text())
    k3 = metrics["values"]["onoff/huggingface-smollm2-float32/kl_k3"]
    assert k3 == pytest.approx(np.mean(np.exp(l_N) - l_N - 1), rel=1e-6)
    assert 0 < k3 < 0.05  # bfloat16 is near float32, and not the same
    own = metrics["comparisons"]["huggingface-smollm2-bfloat16"]["overall"]["kl_k3"]["value"]
    assert own < 0.05
    assert (run_dir / "report.html").stat().st_size > 50_000
    (offline,) = (run_dir / "wandb").glob("offline-run-*/run-*.wandb")
    inspected = subprocess.run(
        ["wandb", "leet", "inspect", "--json", "--summary", str(offline)],
        capture_output=True,
        text=True,
        env=with_bin(),
    )
    for name in (
        "onoff/huggingface-smollm2-float32/kl_k3",
        "kl_k3_lo",
        "worst_tokens",
        "generate/logprob",
        "entropy_target",
    ):
        assert name in inspected.stdout, inspected.stdout + inspected.stderr


def verl_file(folder: Path, name: str) -> Path:
    """MATH-500 or AIME 2025 where they lie beside the project, else two rows in the same layout."""
    if (SHARED / name).exists():
        return SHARED / name
    rows = [
        {
            "data_source": "made",
            "prompt": [{"role": "user", "content": f"What is {i} + {i}?"}],
            "ability": "math",
            "reward_model": {"ground_truth": str(2 * i), "style": "rule"},
            "extra_info": {"index": i, "split": "test"},
        }
        for i in range(2)
    ]
    pd.DataFrame(rows).to_parquet(folder / name)
    return folder / name


@pytest.mark.parametrize("name", ["math500.parquet", "aime2025.parquet"])
def test_real_problems(name: str, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    said = rl_onoff(
        "model=smollm2",
        f"data.path={verl_file(tmp_path, name)}",
        "sampling.n=4",
        "sampling.temperature=0.8",
        "experiment=analyse",
        "data.limit=2",
        "sampling.max_new_tokens=12",
        "tracking=none",
        f"run_dir={run_dir}",
    )
    assert "pass@4" in said
    responses = pd.read_parquet(run_dir / "completions")
    assert len(responses) == 8 and responses["reward"].notna().all()
    assert responses.groupby("request_id")["sample"].apply(sorted).tolist() == [[0, 1, 2, 3]] * 2
    assert all(prompt.count("<|im_start|>user") == 1 for prompt in responses["prompt"])
