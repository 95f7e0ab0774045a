"""The switches of vLLM and SGLang that a CPU can turn: planted ones are found, and of those without effect it is said
that they change nothing. Each engine is loaded as few times as that takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from rl_onoff.backends import SGLangBackendConfig, create_backend
from rl_onoff.backends.engine_config import EngineConfig
from rl_onoff.backends.huggingface.config import HuggingFaceBackendConfig
from tests.backends.conftest import MAX_LEN, vllm_on_a_gpu
from tests.backends.test_contract import random_responses
from tests.conftest import ROOT, SGLANG_PYTHON


@pytest.mark.vllm
def test_planted_in_vllm(tiny_llama: str, tmp_path: Path) -> None:
    """In one process, which imports vLLM once. HuggingFace samples, with its LM head in float32: a second cause."""
    planted = vllm_on_a_gpu(kv_cache_dtype="fp8", enable_chunked_prefill=True)
    kwargs = planted.pop("engine_kwargs")
    options = {"worker": False, "max_model_len": MAX_LEN, **planted}
    command = [
        sys.executable, "-m", "rl_onoff", "experiment=onoff", "stages=[generate,score,attribute]", "run_dir=run",
        "tracking=none", "reward=none", "data.limit=6", "sampling.max_new_tokens=16", "score.own=false",
        f"model.name={tiny_llama}", "model.dtype=bfloat16", "backend.head_dtype=float32", "+target@targets.vllm=vllm",
        *(f"targets.vllm.{name}={value}" for name, value in options.items()),
        *(f"+targets.vllm.engine_kwargs.{name}={value}" for name, value in kwargs.items()),
        "attribute.rungs=[noise,switches,lm_head]", "attribute.truth_check=0",
        "attribute.switches=[prefix_cache,chunked_prefill,kv_cache]",
    ]  # fmt: skip
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "run/attribution.json").read_text())["rows"]
    rows = {row["switch"] or row["rung"]: row for row in found}
    assert {rows[name]["verdict"] for name in ("prefix_cache", "chunked_prefill")} == {"changes nothing"}, found
    assert rows["kv_cache"]["share"] > 0.5 and "the main cause: kv_cache" in rows["kv_cache"]["verdict"], found
    assert rows["lm_head"]["after"] < 0.5 * rows["lm_head"]["before"], (
        found
    )  # of what the cache leaves, its larger part


@pytest.mark.sglang
def test_turned_in_sglang(tiny_llama: str) -> None:
    """All at once: the LM head's logits are no longer numbers of bfloat16, and the scores are HuggingFace's."""
    import torch

    sglang: EngineConfig = SGLangBackendConfig(
        model_name=tiny_llama, dtype="bfloat16", python=SGLANG_PYTHON, context_length=MAX_LEN
    )
    for switch in sglang.switches:
        if switch.name in ("prefix_cache", "chunked_prefill", "batch", "lm_head"):
            turned = sglang.turned(switch)
            assert turned is not None
            sglang = turned
    huggingface = HuggingFaceBackendConfig(model_name=tiny_llama, dtype="bfloat16")
    logprobs, are_rounded = [], []
    for config in (sglang, huggingface, replace(huggingface, head_dtype="float32")):
        with create_backend(config) as backend:
            responses = random_responses(backend, 24)
            scores = {one.request_id: one for one in backend.score(responses)}
            assert config is not sglang or not backend.info.caches_prompts
        rows = [scores[response.request_id] for response in responses]
        logprobs.append(torch.cat([torch.from_numpy(row.logprobs_T) for row in rows]))
        logits = logprobs[-1] + torch.cat([torch.from_numpy(row.logsumexp_T) for row in rows])
        are_rounded.append(((logits - logits.bfloat16().float()).abs() < 1e-4).float().mean().item())
    assert are_rounded[0] < 0.2 and are_rounded[1] > 0.99 and are_rounded[2] < 0.2, are_rounded
    assert (logprobs[0] - logprobs[2]).abs().mean() < 0.02
