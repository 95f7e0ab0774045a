"""Switches of vLLM and SGLang that a CPU can turn: the planted one is found, and the engine takes all others."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import SGLANG_PYTHON
from tests.running import run_in

RUNGS = ("attribute.rungs=[noise,decode,switches]", "attribute.target=target", "attribute.truth_check=0")


def rows_of(engine: str, tiny_llama: str, path: Path, planted: str, switches: str) -> dict[str, dict]:
    """The ladder's rows where `planted` is an option of the target alone."""
    model = (f"model.name={tiny_llama}", "model.dtype=bfloat16", "data.limit=6", "sampling.max_new_tokens=16")
    options = [f"backend={engine}", f"+target@targets.target={engine}", f"+targets.target.engine_kwargs.{planted}"]
    for side in ("backend", "targets.target"):
        limit = "max_model_len" if engine == "vllm" else "context_length"
        options += [f"{side}.{limit}=512"] + ([f"{side}.python={SGLANG_PYTHON}"] if engine == "sglang" else [])
    folder = run_in(path / "run", "experiment=onoff", *model, *options)
    run_in(folder.path, "experiment=attribute", *RUNGS, f"attribute.switches=[{switches}]", *options)
    return {row["switch"] or row["rung"]: row for row in folder.read_json("attribution.json")["rows"]}


@pytest.mark.vllm
def test_vllms_key_value_cache(tiny_llama: str, tmp_path: Path) -> None:
    rows = rows_of("vllm", tiny_llama, tmp_path, "kv_cache_dtype=fp8", "prefix_cache,kv_cache")
    assert rows["kv_cache"]["share"] > 0.5, rows
    assert rows["prefix_cache"]["share"] is not None, rows


@pytest.mark.sglang
def test_sglangs_prefix_cache(tiny_llama: str, tmp_path: Path) -> None:
    rows = rows_of("sglang", tiny_llama, tmp_path, "enable_fp32_lm_head=true", "prefix_cache,chunked_prefill,batch")
    assert all(row["share"] is not None for name, row in rows.items() if name not in ("noise", "decode")), rows
