"""Wrong arguments of the public API, and limits of an engine: a ValueError of one sentence, before anything is
loaded."""

from __future__ import annotations

import numpy as np
import pytest

from rl_onoff.backends import backend_class, create_backend, engine_configs
from rl_onoff.errors import UsageError
from rl_onoff.types import Rollout, Sampling, sample_requests


def refused(call, *arguments, **named) -> str:
    with pytest.raises(ValueError) as caught:
        call(*arguments, **named)
    assert isinstance(caught.value, UsageError) and "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def fake():
    with create_backend({"backend_type": "fake", "model_name": "m"}) as backend:
        yield backend


@pytest.mark.parametrize(
    ("named", "words"),
    [
        ({"temperature": "hot"}, "temperature is 'hot' but must be a number"),
        ({"temperature": -1}, "temperature is -1 but must be a number from 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": True}, "temperature is True"),
        ({"top_p": 2}, "top_p is 2 but must be above 0 and at most 1"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_k": 1.5}, "top_k is 1.5"),
        ({"max_length": 0}, "max_length is 0 but must be a whole number from 1 on: pass max_length=512"),
        ({"max_length": "9"}, "max_length is '9'"),
        ({"stop_strings": "END"}, r"stop_strings is 'END' but must be a list of non-empty strings"),
        ({"stop_strings": [""]}, "stop_strings is ['']"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": None}, "seed is None"),
    ],
)
def test_wrong_arguments_of_generate(named, words, fake):
    assert words in refused(fake.generate, "x", **named)


def test_arguments_of_numpy_are_as_good(fake):
    named = {
        "max_length": np.int64(3),
        "temperature": np.float32(0.5),
        "top_k": np.int32(5),
        "top_p": np.float64(0.5),
        "seed": np.int64(1),
    }
    assert isinstance(fake.generate("x", **named), str)


@pytest.mark.parametrize(
    "prompts", [None, 3, ["a", None], [1.5], [[1.5]], [1, "a"], {"a": 1}, b"a", [{"role": "user"}]], ids=repr
)
def test_prompts_that_are_none(prompts, fake):
    assert "text" in refused(fake.generate, prompts)


@pytest.mark.parametrize(
    "prompts",
    ["a", ["a", "b"], [97, 98], [[97], [98, 99]], (97, 98), np.array([97, 98]), [np.array([97])], []],
    ids=repr,
)
def test_prompts_in_every_form(prompts, fake):
    fake.generate(prompts, max_length=2)


@pytest.mark.parametrize("greedy", [{"temperature": 0}, {"do_sample": False}], ids=str)
def test_probabilities_of_greedy_decoding(greedy, fake):
    result = fake.generate("x", max_length=3, return_probs=True, **greedy)
    np.testing.assert_allclose(result["probs"].sum(-1), 1, atol=1e-5)
    assert result["probs"].argmax(-1).tolist() == result["token_ids"]
    assert 0 < result["probs"].max() < 0.999, "of temperature 1"


def test_the_other_calls(fake):
    assert "temperature is 0 but" in refused(fake.get_probabilities, "a", "b", temperature=0)
    assert "temperature is 'x' but" in refused(fake.get_probabilities, "a", "b", temperature="x")
    assert "responses holds None" in refused(fake.get_logits, "a", None)
    assert "text holds None" in refused(fake.encode, None)
    assert "token_ids holds None" in refused(fake.decode, None)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model": "m"}, "unknown key 'model' in the backend's config: did you mean model_name?"),
        ({"type": "vllm", "model_name": "m"}, "did you mean backend_type?"),
        ({"model_name": "m", "device": "cpu"}, "options of the engine go under backend_specific"),
        (
            {"backend_type": "hf", "model_name": "m"},
            "did you mean huggingface? choose one of fake, huggingface, sglang, vllm",
        ),
        ({"backend_type": "VLLM", "model_name": "m"}, "did you mean vllm?"),
        (
            {"backend_type": None, "model_name": "m"},
            "there is no backend None: choose one of fake, huggingface, sglang, vllm",
        ),
        ({"backend_type": "huggingface"}, "set model_name to"),
        ({"model_name": 3}, "set model_name to"),
        ({"model_name": "m", "backend_specific": ["cpu"]}, "must be a mapping of the engine's options"),
        (
            {"model_name": "m", "backend_specific": {"devise": "cpu"}},
            "huggingface has no option 'devise': did you mean device?",
        ),
        ({"model_name": "m", "backend_specific": {"tp_size": "2"}}, "tp_size is '2' but must be of type int or None"),
        ({"model_name": "m", "backend_specific": {"logprob_kind": "rawer"}}, "must be one of raw, scaled, processed"),
        (
            {"model_name": "m", "backend_specific": {"torch_dtype": "bf16"}},
            "backend.torch_dtype is 'bf16' but must be one of auto",
        ),
        ("huggingface", "a config is a mapping"),
    ],
)
def test_wrong_configs(config, words):
    assert words in refused(create_backend, config)


def test_configs_that_look_odd_and_are_right():
    create_backend(
        {
            "model_name": "m",
            "backend_specific": {"device_map": {"": 0}, "engine_kwargs": {"a": [1]}, "logprob_kind": "scaled"},
        }
    )
    create_backend(
        {
            "backend_type": "vllm",
            "model_name": "m",
            "backend_specific": {"gpu_memory_utilization": 1, "max_model_len": None},
        }
    )


@pytest.mark.parametrize("name", engine_configs())
def test_samplers_that_every_engine_has(name):
    backend = create_backend({"backend_type": name, "model_name": "m"})
    for sampling in (
        Sampling(),
        Sampling(temperature=0),
        Sampling(top_p=0.9, top_k=5),
        Sampling(min_p=0.1),
        Sampling(stop=["a"]),
    ):
        backend.check_sampling(sampling)
    assert not backend.is_loaded()


@pytest.mark.parametrize(
    ("name", "sampling", "words"),
    [
        (
            "vllm",
            Sampling(temperature=3),
            "sampling.temperature is 3 but vLLM takes 0 (greedy) or 0.01 to 2.0: set sampling.temperature=1",
        ),
        ("vllm", Sampling(temperature=0.001), "sampling.temperature is 0.001"),
        ("vllm", Sampling(min_p=0.1, top_p=0.9), "set sampling.min_p=0 or sampling.top_p=1"),
        (
            "sglang",
            Sampling(stop=[str(i) for i in range(33)]),
            "sampling.stop has 33 strings but SGLang takes at most 32",
        ),
    ],
)
def test_samplers_an_engine_does_not_have(name, sampling, words):
    backend = create_backend({"backend_type": name, "model_name": "m"})
    assert words in refused(backend.check_sampling, sampling)


@pytest.mark.parametrize("name", engine_configs())
def test_models_that_cannot_be_there(name):
    for model in ("./no-such-folder", "smollm", "no.gguf"):
        backend = backend_class(engine_configs()[name]()._target_)(engine_configs()[name](model_name=model))
        if name == "fake":  # whose model is a name alone
            backend.check_model()
        else:
            assert f"model.name={model}" in refused(backend.check_model)


def test_requests_of_one_id_are_refused():
    ids = np.array([1, 2], np.int32)
    with create_backend({"backend_type": "fake", "model_name": "fake"}) as backend:
        with pytest.raises(UsageError, match=r"'a' \(sample 0\) is there twice"):
            list(backend.complete([sample_requests(id="a", prompt_ids=ids, sampling=Sampling(max_new_tokens=1))] * 2))
        with pytest.raises(UsageError, match=r"'a' \(sample 0\) is there twice"):
            list(backend.score([Rollout(request_id="a", sample=0, prompt_ids=ids, token_ids_T=ids)] * 2))


def test_sglang_multiplies_in_float32_on_a_gpu_where_that_is_asked_for(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    config = engine_configs()["sglang"]
    assert config(dtype="float32").environment()["TRITON_F32_DEFAULT"] == "ieee"
    assert "TRITON_F32_DEFAULT" not in config(dtype="bfloat16").environment()
