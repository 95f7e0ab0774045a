"""Tiny random models of four families, copies of them with one planted fault, and ids to run through them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.running import run_in

SIZES = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 256, "initializer_range": 0.2,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2, "tie_word_embeddings": True},
    "gemma2": {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "sliding_window": 64},
    "mistral": {"sliding_window": 16},
    "qwen3_moe": {  # its first layer is dense
        "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True,
        "mlp_only_layers": [0],
    },
}  # fmt: skip
Make = Callable[..., str]


@pytest.fixture(scope="session")
def made(smollm2: str, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """`made(family, change, **options)`: the folder of a family's model; `change` is given its weights by name, and
    `options` are those of its config. The same family has the same weights but for what these change."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    tokenizer, known = AutoTokenizer.from_pretrained(smollm2), dict[str, str]()

    def make(family: str, change: Callable[[dict[str, Any]], Any] | None = None, **options: Any) -> str:
        key = json.dumps([family, options])
        if change is None and key in known:
            return known[key]
        folder, common = tmp_path_factory.mktemp(family), {"vocab_size": len(tokenizer), "bos_token_id": 1}
        values = SIZES | common | FAMILIES[family] | {"eos_token_id": 2, "pad_token_id": 0} | options
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **values))
        if change is not None:
            with torch.no_grad():
                change(dict(model.named_parameters()))
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if change is None:
            known[key] = str(folder)
        return str(folder)

    return make


@pytest.fixture(scope="session")
def ids_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Responses of several lengths to prompts of several lengths, the longest of 90 tokens together."""
    rng, file = np.random.default_rng(0), tmp_path_factory.mktemp("ids") / "responses.jsonl"
    rows = [(20, 70), (12, 40), (5, 33), (31, 9), (1, 60)]
    texts = []
    for i, lengths in enumerate(rows):
        prompt, response = (rng.integers(10, 49000, length).tolist() for length in lengths)
        texts.append(json.dumps({"id": str(i), "prompt_ids": prompt, "token_ids": response}))
    file.write_text("\n".join(texts) + "\n")
    return file


@pytest.fixture
def look(ids_file: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """What layers.json says of two models, the second of them the reference."""

    def compared(model: str, reference: str, *overrides: str, run: str = "run") -> dict[str, Any]:
        target = ("target=huggingface", "target.dtype=float32", f"target.model_name={reference}")
        sides = ("model.dtype=float32", f"model.name={model}", *target, f"score.responses={ids_file}")
        folder = run_in(tmp_path / run, "experiment=layers", "stages=[layers]", *sides, *overrides)
        assert not list(folder.path.glob("layers/*/states"))  # gigabytes of a real model
        return folder.read_json("layers.json")

    return compared
