"""Every engine passes with a sound model in float32, and all lines that apply to the engine are tried."""

from __future__ import annotations

from pathlib import Path

import pytest

from rl_onoff.analysis_config import Check
from rl_onoff.compare import ON_POLICY_K3
from tests.conftest import SGLANG_PYTHON
from tests.running import run_in

OPTIONS = {
    "huggingface": [],
    "vllm": ["backend.max_model_len=512", "backend.enforce_eager=true"],
    "sglang": ["backend.context_length=512", f"backend.python={SGLANG_PYTHON}"],
}
SMALL = ("acceptance.prompts=4", "acceptance.tokens=24", "acceptance.long_tokens=200")


@pytest.mark.parametrize("backend", OPTIONS)
def test_an_engine_in_float32_is_accepted(backend: str, tiny_llama: str, tmp_path: Path) -> None:
    model = ("model.dtype=float32", f"model.name={tiny_llama}", f"backend={backend}")
    folder = run_in(tmp_path, "experiment=acceptance", *model, *OPTIONS[backend], *SMALL)
    found = folder.read_json("acceptance.json")
    lines = {line["check"]: line for line in found["lines"]}
    assert found["accepted"] and found["not_tried"] == (["cache"] if backend == "huggingface" else [])
    assert found["engine"].startswith(f"{backend} ") and found["truth"].startswith("huggingface ")
    for check in (Check.decode, Check.decode_long, Check.batch, Check.cache, Check.truth):
        assert (lines[check.value]["value"] or 0) < ON_POLICY_K3, check
    assert lines["greedy"]["value"] < 1e-3
    assert "64 tokens" in lines["decode_long"]["said"] and "96 tokens" in lines["decode"]["said"]
