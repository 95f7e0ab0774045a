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
from tests.backends.unpinned_sglang import UnpinnedSGLang

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
    return create_backend({"backend_type": name, "model_name": model, "backend_specific": options_of(name) | options})


@pytest.fixture(scope="session")
def adapted(request: pytest.FixtureRequest, tiny_llama: str, adapter: str) -> Iterator[BaseBackend]:
    name, how = request.param
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(Path(adapter).parent / "cache"))
        backend = started(name, tiny_llama, adapter=adapter, merge_adapter=how == "merged")
        if request.param == ("sglang", "beside"):
            backend = UnpinnedSGLang(backend.config)
        with backend:
            yield backend


WAYS = [
    pytest.param((name, how), id=f"{name}-{how}", marks=[pytest.mark.vllm, pytest.mark.sglang, ()][i])
    for i, name in enumerate(("vllm", "sglang", "huggingface"))
    for how in ("beside", "merged")
]


@pytest.mark.parametrize("adapted", WAYS, indirect=True, scope="session")
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


def huggingface(model: str, **options: Any) -> BaseBackend:
    return create_backend({"backend_type": "huggingface", "model_name": model, "backend_specific": options})


def test_gradients_reach_the_adapter_and_the_weights(tiny_llama: str, adapter: str, by_hand: Any) -> None:
    with huggingface(tiny_llama, dtype="float32", adapter=adapter) as backend:
        logits = backend.get_logits([5, 6, 7], [8, 9], compute_gradients=True)
        logits.log_softmax(-1)[0, 8].backward()
        found = dict(backend._split.whole.cpu().named_parameters())
        layer = "model.layers.0.self_attn.q_proj"
        expected = by_hand.requires_grad_(True)
        expected.zero_grad()
        import torch

        expected(torch.tensor([[5, 6, 7, 8, 9]])).logits[0, 2].log_softmax(-1)[8].backward()
        whole = expected.get_submodule(layer).weight.grad
        np.testing.assert_allclose(found[f"{layer}.base_layer.weight"].grad, whole, atol=1e-5)
        b = found[f"{layer}.lora_B.default.weight"].detach()
        np.testing.assert_allclose(found[f"{layer}.lora_A.default.weight"].grad, ALPHA / RANK * b.T @ whole, atol=1e-5)
        by_hand.requires_grad_(False)


def test_merging_into_bfloat16_loses_part_of_the_update(
    tiny_llama: str, adapter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights are the sums rounded once, and the loss is no smaller than that rounding."""
    import torch
    from safetensors.torch import load_file

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with huggingface(tiny_llama, dtype="bfloat16", adapter=adapter, merge_adapter=True) as merged:
        tensors, base = load_file(f"{adapter}/adapter_model.safetensors"), load_file(f"{tiny_llama}/model.safetensors")
        for name, weight in merged._split.whole.named_parameters():
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            if f"{stem}.lora_A.weight" in tensors:
                a, b = (tensors[f"{stem}.lora_{which}.weight"] for which in "AB")
                expected = (base[name].bfloat16().float() + ALPHA / RANK * (b @ a)).bfloat16()
                # the product's last bit differs between ways to multiply, and seldom turns a rounding
                weight = weight.cpu()
                assert (weight != expected).float().mean() < 1e-3
                assert torch.allclose(weight.float(), expected.float(), rtol=2**-7)
        rollouts = random_responses(merged, 16)
        lossy = {one.request_id: one.logprobs_T for one in merged.score(rollouts)}
    with huggingface(tiny_llama, dtype="bfloat16", adapter=adapter) as beside:
        exact = {one.request_id: one.logprobs_T for one in beside.score(rollouts)}
    assert np.mean([np.abs(lossy[key] - exact[key]).mean() for key in exact]) > 1e-3
    assert len(list((tmp_path / "rl_onoff/models").glob("tiny_llama*+tiny_lora-bfloat16-*"))) == 1


@pytest.mark.parametrize(
    ("options", "changed", "said"),
    [
        ({}, {}, "no adapter_config.json, so it is no adapter"),
        ({"peft_type": "IA3"}, {}, "an adapter of the type IA3, not LORA"),
        ({}, {"adapter": "nowhere/at/all"}, "neither a folder here nor a hub id"),
        ({}, {"tp_size": 2}, "set model.merge_adapter=true, or backend.tp_size=1"),
    ],
)
def test_refused_before_weights_load(
    tiny_llama: str, tmp_path: Path, options: dict[str, Any], changed: dict[str, Any], said: str
) -> None:
    folder = make_adapter(tmp_path / "lora", tiny_llama, **options)
    if "adapter_config" in said:
        Path(folder, "adapter_config.json").unlink()
    backend = huggingface(tiny_llama, **{"adapter": folder, **changed})
    with pytest.raises(UsageError, match=said):
        backend.check_model()
    with pytest.raises(UsageError, match=said):
        backend.load()


def test_an_adapter_of_another_model_is_refused(
    tiny_llama: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from safetensors.torch import load_file, save_file

    folder = make_adapter(tmp_path / "lora", tiny_llama, base_model_name_or_path="Qwen/Qwen3-0.6B")
    backend = create_backend(
        {"backend_type": "vllm", "model_name": "Qwen/Qwen3-1.7B", "backend_specific": {"adapter": folder}}
    )
    with pytest.raises(UsageError, match=r"was trained on Qwen/Qwen3-0.6B.*: set model.name=Qwen/Qwen3-0.6B"):
        backend.check_model()
    huggingface(tiny_llama, adapter=folder).check_model()  # the same shapes under another name: a doubt, said once
    huggingface(tiny_llama, adapter=folder).check_model()
    assert caplog.text.count("was trained on Qwen/Qwen3-0.6B") == 1
    file = Path(folder) / "adapter_model.safetensors"
    tensors = load_file(file)
    first = next(name for name in tensors if "0.mlp.up_proj.lora_A" in name)
    save_file(tensors | {first: tensors[first][:, :-2].contiguous()}, file)
    with pytest.raises(UsageError, match=r"layers\.0\.mlp.up_proj is 128 by 64 there, and 128 by 62 in the adapter"):
        huggingface(tiny_llama, adapter=folder).check_model()
    save_file(tensors | {first.replace(".0.", ".7."): tensors[first].clone()}, file)
    with pytest.raises(UsageError, match=r"there is no model.layers.7.mlp.up_proj"):
        huggingface(tiny_llama, adapter=folder).check_model()
    save_file({name: tensor for name, tensor in tensors.items() if "up_proj" not in name}, file)
    with pytest.raises(UsageError, match="do not have the same layers"), huggingface(tiny_llama, adapter=folder):
        pass


def test_what_an_engine_would_pass_over_is_refused(tiny_llama: str, adapter: str, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    for i, (name, options, said) in enumerate(
        [
            ("vllm", {"init_lora_weights": "pissa_niter_4"}, "init_lora_weights=pissa_niter_4"),
            ("sglang", {"use_rslora": True}, "use_rslora"),
            ("sglang", {"alpha_pattern": {"q_proj": 3}}, "alpha_pattern"),
        ]
    ):
        folder = make_adapter(tmp_path / str(i), tiny_llama, **options)
        with pytest.raises(UsageError, match=f"has {said}: set model.merge_adapter=true"):
            started(name, tiny_llama, adapter=folder).check_model()
        started(name, tiny_llama, adapter=folder, merge_adapter=True).check_model()
    tensors = load_file(f"{adapter}/adapter_model.safetensors")
    shutil.copy(f"{adapter}/adapter_config.json", tmp_path / "0")
    for place in ("lm_head", "model.layers.0.mlp.experts.3.up_proj"):
        more = {f"base_model.model.{place}.lora_A.weight": torch.ones(RANK, 64)}
        save_file(tensors | more, tmp_path / "0/adapter_model.safetensors")
        with pytest.raises(UsageError, match=rf"decoder's linear layers alone, and model.adapter=.* has .*{place}"):
            started("vllm", tiny_llama, adapter=str(tmp_path / "0")).check_model()
    with pytest.raises(UsageError, match="fake takes no adapters"):
        create_backend({"backend_type": "fake", "model_name": "x", "backend_specific": {"adapter": adapter}}).load()


def test_without_peft_what_it_does_is_refused(tiny_llama: str, adapter: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "peft", None)  # Python's own way to say that a module is not there
    with pytest.raises(MissingDependencyError, match=r"pip install 'rl-onoff\[lora\]'"):
        huggingface(tiny_llama, adapter=adapter).check_model()
    with pytest.raises(MissingDependencyError, match="peft"):
        started("vllm", tiny_llama, adapter=adapter, merge_adapter=True).check_model()
    started("vllm", tiny_llama, adapter=adapter).check_model()  # vLLM has a LoRA of its own


@pytest.mark.sglang
def test_sglang_without_a_gpu_refuses_an_adapter_beside_the_weights(tiny_llama: str, adapter: str) -> None:
    import torch

    if torch.cuda.is_available():
        return
    with pytest.raises(UsageError, match=r"cannot be done without a GPU: set model.merge_adapter=true"):
        started("sglang", tiny_llama, adapter=adapter).load()


def test_what_only_huggingface_computes_and_what_cannot_be_merged(
    tiny_llama: str, adapter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An LM head with an adapter: computed beside the weights; merged, unless the head is the embeddings too."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    generator = torch.Generator().manual_seed(1)
    for tied in (False, True):
        model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32, tie_word_embeddings=tied)
        folder = tmp_path / f"model-{tied}"
        shutil.copytree(tiny_llama, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
        model.save_pretrained(folder)
        lora = make_adapter(tmp_path / f"lora-{tied}", tiny_llama, target_modules=["q_proj", "lm_head"])
        file = Path(lora) / "adapter_model.safetensors"
        a, b = torch.randn(RANK, 64, generator=generator), torch.randn(len(model.lm_head.weight), RANK) / 50
        head = {"base_model.model.lm_head.lora_A.weight": a, "base_model.model.lm_head.lora_B.weight": b}
        save_file({name: x for name, x in load_file(file).items() if "q_proj" in name} | head, file)
        with torch.no_grad():
            for i, layer in enumerate(model.model.layers):
                stem = f"base_model.model.model.layers.{i}.self_attn.q_proj.lora_"
                q_a, q_b = (load_file(file)[f"{stem}{which}.weight"] for which in "AB")
                layer.self_attn.q_proj.weight.add_(ALPHA / RANK * q_b @ q_a)
            model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight + ALPHA / RANK * b @ a)
        for merge in (False, True):
            backend = huggingface(str(folder), dtype="float32", adapter=lora, merge_adapter=merge)
            if merge and tied:
                with pytest.raises(UsageError, match=r"one tensor in this model: set model\.merge_adapter=false"):
                    backend.load()
                continue
            with backend:
                by_id = {one.request_id: one for one in random_responses(backend, 4)}
                for scores in backend.score(by_id.values()):
                    expected = chosen(model.eval(), by_id[scores.request_id])
                    assert np.abs(scores.logprobs_T - expected).max() < TOLERANCE
