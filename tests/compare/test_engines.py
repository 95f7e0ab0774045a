"""The three engines, the same weights, float32: each samples, each scores, and every cell is on-policy."""

from __future__ import annotations

from pathlib import Path

import pytest

from rl_onoff.compare import ON_POLICY_K3
from tests.conftest import SGLANG_PYTHON
from tests.running import run_in

pytestmark = [pytest.mark.vllm, pytest.mark.sglang]

ENGINES = ("huggingface", "vllm", "sglang")


@pytest.mark.timeout(1200)
def test_the_matrix_of_huggingface_vllm_and_sglang(
    smollm2: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RL_ONOFF_SGLANG_PYTHON", SGLANG_PYTHON)
    small = (
        "policies.vllm.max_model_len=1024",
        "policies.vllm.enforce_eager=true",
        "policies.sglang.context_length=1024",
    )
    folder = run_in(
        tmp_path / "run", "experiment=matrix", "policies=engines", *small, "data.limit=4", "sampling.max_new_tokens=32"
    )
    found = folder.read_json("metrics.json")["matrix"]
    assert found["policies"] == list(ENGINES)
    cells = {(cell["sampled"], cell["scored"]): cell for cell in found["cells"]}
    assert set(cells) == {(a, b) for a in ENGINES for b in ENGINES}
    for pair, cell in cells.items():
        assert cell["kl_k3"] < ON_POLICY_K3, pair
        assert cell["logprob_diff_max"] < 1e-3, pair
        assert cell["ess_token"] > 0.999 and cell["ess_seq"] > 0.99, pair
        assert cell["responses"] == 4
    assert found["verdict"].startswith("On-policy")
