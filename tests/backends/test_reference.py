"""The examples of the backends' reference, as a user would type them; only the model's name and the device differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from rl_onoff.backends import BaseBackend, HuggingFaceBackendConfig, VLLMBackendConfig, create_backend
from rl_onoff.backends.config import BackendConfig
from rl_onoff.backends.vllm.backend import VLLMBackend
from rl_onoff.errors import UsageError


def test_quick_start(backend: BaseBackend) -> None:
    response = backend.generate("The future of AI is")
    assert isinstance(response, str) and response


def test_text_generation(backend: BaseBackend) -> None:
    response = backend.generate("The capital of France is", max_length=8)
    assert isinstance(response, str)
    responses = backend.generate(["The capital of France is", "The capital of Germany is"], max_length=8)
    assert len(responses) == 2 and all(isinstance(text, str) for text in responses)


def test_generation_parameters(backend: BaseBackend) -> None:
    assert backend.generate("Once upon a time", max_length=20, temperature=0.8, top_k=50, top_p=0.9, do_sample=True)
    greedy = backend.generate("The answer is", max_length=10, do_sample=False)
    assert greedy == backend.generate("The answer is", max_length=10, do_sample=False)
    story = backend.generate("Write a story:", max_length=30, stop_strings=["\n\n", "THE END"])
    assert "\n\n" not in story and "THE END" not in story


def test_logits_and_probabilities(backend: BaseBackend) -> None:
    result = backend.generate("The capital of France is", max_length=10, return_logits=True)
    assert isinstance(result["text"], str)
    assert result["logits"].shape[0] <= 10 and result["logits"].shape[1] == backend.info.vocab_size
    prompt = "The capital of France is"
    response = "Paris"
    logits = backend.get_logits(prompt, response)
    assert logits.shape == (len(backend.encode(response)), backend.info.vocab_size)
    probs = backend.get_probabilities(prompt, response, temperature=1.0)
    assert probs.shape == logits.shape
    np.testing.assert_allclose(probs.sum(-1), 1, atol=1e-4)


def test_tokenization(backend: BaseBackend) -> None:
    token_ids = backend.encode("Hello, world!")
    assert all(isinstance(i, int) for i in token_ids)
    assert backend.decode(token_ids) == "Hello, world!"
    token_ids_list = backend.encode(["Hello", "World"])
    assert backend.decode(token_ids_list) == ["Hello", "World"]


def test_gradients(backend: BaseBackend) -> None:
    if not backend.supports_gradients:
        with pytest.raises(UsageError, match="gives no gradients"):
            backend.generate("The capital of France is", max_length=10, compute_gradients=True)
        return
    result = backend.generate("The capital of France is", max_length=10, compute_gradients=True)
    result["logits"].sum().backward()
    logits = backend.get_logits("The capital of France is", "Paris", compute_gradients=True)
    logits.sum().backward()


# -- configuration, without loading anything ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["huggingface", "vllm", "sglang"])
def test_default_config_files(name: str) -> None:
    config = BackendConfig.from_file(f"rl_onoff/backends/configs/{name}_default.yaml")
    backend = create_backend(config)
    assert config.backend_type == backend.name == name and not backend.is_loaded()


def test_a_backend_section_of_an_experiment_config(tmp_path: Path) -> None:
    file = tmp_path / "experiment_config.yaml"
    file.write_text(
        "backend:\n  backend_type: vllm\n  model_name: gpt2\n  backend_specific:\n    tensor_parallel_size: 2\n    "
        "max_model_len: 2048\n"
    )
    backend = create_backend(yaml.safe_load(file.read_text()).get("backend", {}))
    assert isinstance(backend, VLLMBackend) and backend.config.num_devices == 2


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("huggingface", {"device": "cpu", "torch_dtype": "float16", "device_map": "auto", "tp_size": 2}),
        ("huggingface", {"device": None, "torch_dtype": None, "device_map": None, "tp_size": None}),
        ("vllm", {"tensor_parallel_size": 2, "gpu_memory_utilization": 0.9, "max_model_len": 2048}),
        ("sglang", {"tp_size": 2, "mem_fraction_static": 0.85, "context_length": 2048}),
    ],
)
def test_documented_options(name: str, options: dict[str, Any]) -> None:
    backend = create_backend({"backend_type": name, "model_name": "gpt2", "backend_specific": options})
    assert all(getattr(backend.config, key) == value for key, value in options.items())


def test_errors_of_the_configuration() -> None:
    with pytest.raises(ValueError, match="huggingface, sglang, vllm"):
        create_backend({"backend_type": "tensorrt", "model_name": "gpt2"})
    with pytest.raises(ValueError, match="no option 'devise'"):
        create_backend({"backend_type": "huggingface", "model_name": "gpt2", "backend_specific": {"devise": "cpu"}})
    with pytest.raises(ValueError, match="no model was named"):
        create_backend({"backend_type": "vllm"})
    with pytest.raises(ValueError, match="takes a VLLMBackendConfig, not a HuggingFaceBackendConfig"):
        VLLMBackend(HuggingFaceBackendConfig(model_name="gpt2"))
    with pytest.raises(ValueError, match="takes a HuggingFaceBackendConfig"):
        BackendConfig(backend_type="huggingface", model_name="gpt2", backend_config=VLLMBackendConfig())
    with pytest.raises(ValueError, match="one option with two values"):
        create_backend(
            {
                "backend_type": "vllm",
                "model_name": "gpt2",
                "backend_specific": {"tp_size": 2, "tensor_parallel_size": 3},
            }
        )
    with pytest.raises(ValueError, match="decided elsewhere"):
        create_backend(
            {"backend_type": "vllm", "model_name": "gpt2", "backend_specific": {"engine_kwargs": {"seed": 3}}}
        )
    with pytest.raises(ValueError, match="cannot report scaled logprobs"):
        create_backend({"backend_type": "vllm", "model_name": "gpt2", "backend_specific": {"logprob_kind": "scaled"}})
    with pytest.raises(ValueError, match="no config file"):
        BackendConfig.from_file("nowhere.yaml")


def test_a_missing_engine_is_an_import_error_that_names_the_extra(
    smollm2: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "vllm", None)  # Python's own way to say that a module is not there
    backend = create_backend({"backend_type": "vllm", "model_name": smollm2, "backend_specific": {"worker": False}})
    with pytest.raises(ImportError, match=r"rl-onoff\[vllm\]"):
        backend.load()
