from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from rl_onoff.backends import BaseBackend, create_backend
from tests.conftest import SGLANG_PYTHON

BACKENDS = ("vllm", "sglang", "fake", "huggingface")  # in the order in which they are started
MAX_LEN = 512
CHUNK = 32  # tokens of a prompt that SGLang takes in at once
TEXT = (
    "The quick brown fox jumps over the lazy dog, and 12 + 30 = 42.\nHowever, nobody knows why; see also the appendix. "
)


def options_of(name: str) -> dict[str, Any]:
    """How a backend is started in the tests: in float32, so that numbers can be compared tightly."""
    options: dict[str, Any] = {"dtype": "float32"}
    if name == "vllm":
        options |= {"max_model_len": MAX_LEN, "enforce_eager": True, **vllm_on_a_gpu()}
    if name == "sglang":
        options |= {
            "python": SGLANG_PYTHON,
            "context_length": MAX_LEN,
            "engine_kwargs": {"chunked_prefill_size": CHUNK},
        }
    return options


def vllm_on_a_gpu(**engine_kwargs: Any) -> dict[str, Any]:
    """Options of vLLM with which several engines of the tests fit on one card, in float32, which FlashAttention does
    not know; on a CPU nothing but `engine_kwargs`."""
    import torch

    if not torch.cuda.is_available():
        return {"engine_kwargs": engine_kwargs}
    return {"gpu_memory_utilization": 0.15, "engine_kwargs": {"attention_backend": "TRITON_ATTN", **engine_kwargs}}


@pytest.fixture(scope="session")
def backend(request: pytest.FixtureRequest, tiny_llama: str) -> Iterator[BaseBackend]:
    """The backend of that name, loaded once for all tests that use it, with the tiny model (the fake has one of its
    own)."""
    name = request.param
    model = "tiny" if name == "fake" else tiny_llama  # the name seeds the fake: a folder's changes from run to run
    with create_backend({"backend_type": name, "model_name": model, "backend_specific": options_of(name)}) as loaded:
        yield loaded


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test of `backend` runs on every backend, or on those that its file names in ON."""
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", getattr(metafunc.module, "ON", BACKENDS), indirect=True, scope="session")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Bring the tests of one engine together, whatever their file, so that it is started once and runs no longer than
    it must."""

    def engine(item: pytest.Item) -> int:
        name = getattr(getattr(item, "callspec", None), "params", {}).get("backend")
        return BACKENDS.index(name) if name else len(BACKENDS)

    here = [i for i, item in enumerate(items) if item.path.parent.name == "backends"]
    for place, item in zip(here, sorted((items[i] for i in here), key=engine), strict=True):
        items[place] = item


@pytest.fixture(scope="session")
def reference(tiny_llama: str) -> Any:
    """The measure of all engines: a plain float32 model of Transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
