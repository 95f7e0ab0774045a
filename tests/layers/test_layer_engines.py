"""vLLM and SGLang against HuggingFace: errors of rounding at every point show that every row goes to its response."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.conftest import SGLANG_PYTHON

Look = Callable[..., dict[str, Any]]
Make = Callable[..., str]

CHUNKS = "+backend.engine_kwargs={enable_chunked_prefill: true, max_num_batched_tokens: 48, max_num_seqs: 4}"

NO_DENSE_LAYER = {"mlp_only_layers": []}  # SGLang 0.5.23 does not know that option, and leaves the experts unset

SMALL_CHUNKS = "+backend.engine_kwargs={chunked_prefill_size: 48}"


def check_equal(found: dict[str, Any]) -> None:
    """Not more than rounding, at every token of every point, in attention and MLP too."""
    assert found["parting"] is None, found["sentence"]
    assert [row["max"] for row in found["points"] + found["inside"] if not row["max"] < 1e-4] == []
    assert [row["median"] for row in found["points"] + found["inside"] if not row["median"] < 1e-5] == []
    assert found["nats"]["max"] < 2e-3
    assert found["routers"] is None or found["routers"]["same"] == 1


@pytest.mark.vllm
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("options", [(), (CHUNKS,)], ids=["whole", "chunks"])
def test_vllm_has_the_states_of_huggingface(look: Look, made: Make, options: tuple[str, ...], family: str) -> None:
    model = made(family)
    check_equal(look(model, model, "backend=vllm", *options))


@pytest.mark.vllm
def test_a_fault_in_vllm_is_named_against_huggingface(look: Look, made: Make) -> None:
    other = made("llama", lambda weights: weights["model.layers.2.self_attn.o_proj.weight"].mul_(1.1))
    found = look(other, made("llama"), "backend=vllm")
    assert (found["parting"]["where"], found["parting"]["layer"]) == ("attention", 2)


@pytest.mark.sglang
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("options", [(), (SMALL_CHUNKS,)], ids=["whole", "chunks"])
def test_sglang_has_the_states_of_huggingface(look: Look, made: Make, options: tuple[str, ...], family: str) -> None:
    model = made(family, **NO_DENSE_LAYER) if family == "qwen3_moe" else made(family)
    check_equal(look(model, model, "backend=sglang", f"backend.python={SGLANG_PYTHON}", *options))
