"""A LoRA adapter is a part of a policy: every engine computes it beside the weights and merged into them, as a plain
float32 forward pass says whose weights were added to by hand; and what cannot be computed is refused before weights
load."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rl_onoff.backends import BaseBackend, create_backend
from rl_onoff.errors import MissingDependencyError, UsageError
from rl_onoff.types import Rollout, Sampling, sample_requests
from tests.backends.conftest import options_of
from tests.backends.test_contract import TOLERANCE, random_responses

RANK, ALPHA = 4, 12
MODULES = {"self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"), "mlp": ("gate_proj", "up_proj", "down_proj")}


def make_adapter(folder: Path, model: str, **options: Any) -> str:
    """An adapter of all linear layers of a tiny Llama, of random matrices; written without PEFT."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    folder.mkdir()
    generator, tensors = torch.Generator().manual_seed(0), {}
    with safe_open(Path(model) / "model.safetensors", "pt") as weights:
        for name in weights.keys():  # noqa: SIM118
            if name.removesuffix(".weight").endswith("_proj"):
                rows, columns = weights.get_slice(name).get_shape()
                stem = f"base_model.model.{name.removesuffix('.weight')}"
                tensors[f"{stem}.lora_A.weight"] = 0.05 * torch.randn(RANK, columns, generator=generator)
                tensors[f"{stem}.lora_B.weight"] = 0.05 * torch.randn(rows, RANK, generator=generator)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": ALPHA, "lora_dropout": 0.1}
    config |= {"target_modules": [name for names in MODULES.values() for name in names], "bias": "none"}
    config |= {"base_model_name_or_path": model, "inference_mode": True, **options}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.fixture(scope="session")
def adapter(tiny_llama: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_adapter(tmp_path_factory.mktemp("adapters") / "tiny_lora", tiny_llama)


@pytest.fixture(scope="session")
def by_hand(adapter: str, tiny_llama: str) -> Any:
    """The float32 model with alpha / rank × B A added to its weights here."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    model, found = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval(), 0
    tensors = load_file(Path(adapter) / "adapter_model.safetensors")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            if f"{stem}.lora_A.weight" in tensors:
                a, b = (tensors[f"{stem}.lora_{which}.weight"].double() for which in "AB")
                weight.copy_(weight.double() + ALPHA / RANK * (b @ a))
                found += 1
    assert 2 * found == len(tensors) == 28
    return model


def logits_of(model: Any, rollout: Rollout) -> np.ndarray:
    import torch

    ids = torch.tensor(np.concatenate([rollout.prompt_ids, rollout.token_ids_T])[None].astype(np.int64))
    with torch.no_grad():
        return model(ids).logits[0, len(rollout.prompt_ids) - 1 : -1].numpy()


def chosen(model: Any, rollout: Rollout) -> np.ndarray:
    logits = logits_of(model, rollout).astype(np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return logprobs[np.arange(len(logprobs)), rollout.token_ids_T]


def started(name: str, model: str, **options: Any) -> BaseBackend:
    return create_backend(
        {"backend_type": name, "model_name": model, "backend_specific": options_of(name) | options}
    )


@pytest.fixture(scope="session", params=["beside", "merged"])
def adapted(request: pytest.FixtureRequest, tiny_llama: str, adapter: str) -> Iterator[BaseBackend]:
    name, how = request.param
    with started(name, tiny_llama, adapter=adapter, merge_adapter=how == "merged") as backend:
        yield backend


WAYS = [(name, how) for name in ("vllm", "sglang", "huggingface") for how in ("beside", "merged")]


@pytest.mark.parametrize("adapted", WAYS, ids=map("-".join, WAYS), indirect=True, scope="session")
def test_scores_and_samples_are_those_of_weights_added_to_by_hand(
    adapted: BaseBackend, by_hand: Any, reference: Any
) -> None:
    rollouts = random_responses(adapted, 24)
    scores = {one.request_id: one.logprobs_T for one in adapted.score(rollouts)}
    expected = {one.request_id: chosen(by_hand, one) for one in rollouts}
    worst = max(float(np.abs(scores[key] - expected[key]).max()) for key in expected)
    effect = np.mean([np.abs(chosen(reference, one) - expected[one.request_id]).mean() for one in rollouts])
    assert worst < TOLERANCE < effect / 500
    prompts = [one.prompt_ids for one in rollouts[:6]]
    requests = [
        request
        for i, ids in enumerate(prompts)
        for request in sample_requests(id=str(i), prompt_ids=ids, sampling=Sampling(max_new_tokens=16))
    ]
    for rollout in adapted.complete(requests):
        assert np.abs(rollout.logprobs_T - chosen(by_hand, rollout)).max() < TOLERANCE
