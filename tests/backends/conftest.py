from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from rl_onoff.backends import BaseBackend, create_backend
from tests.conftest import SGLANG_PYTHON

BACKENDS = ("fake", "huggingface", "vllm", "sglang")


def options_of(name: str) -> dict[str, Any]:
    """How a backend is started in the tests: float32, so that numbers can be compared tightly."""
    options: dict[str, Any] = {"dtype": "float32"}
    if name == "vllm":
        options |= {"max_model_len": 1024, "enforce_eager": True}
    if name == "sglang":
        options |= {"python": SGLANG_PYTHON, "context_length": 1024}
    return options


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request: pytest.FixtureRequest, smollm2: str) -> Iterator[BaseBackend]:
    """Every backend in turn, loaded, with the built-in model in float32 (the fake has a model of its own)."""
    built = create_backend(
        {"backend_type": request.param, "model_name": smollm2, "backend_specific": options_of(request.param)}
    )
    with built as loaded:
        yield loaded


@pytest.fixture(scope="session")
def reference(smollm2: str) -> Any:
    """The measure of all engines: a plain float32 model of Transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
