"""A model's name is settled before anything is loaded, and a wrong one is one sentence that names model.name."""

from pathlib import Path

import pytest
from huggingface_hub import errors as hub

from rl_onoff.backends import create_backend
from rl_onoff.errors import UsageError
from rl_onoff.models import resolve as models


def test_hub_ids_stay_as_they_are():
    for name in ("gpt2", "Qwen/Qwen2.5-0.5B-Instruct", "a/b_c-d.e", "HuggingFaceTB/SmolLM2-135M-Instruct", "llama"):
        assert models.resolve(name, revision="main") == models.ModelFiles(name=name, path=name, revision="main")


def test_a_local_folder_becomes_an_absolute_path(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    for name in ("mine", "./mine", str(tmp_path / "mine")):
        assert models.resolve(name) == models.ModelFiles(name=name, path=str(tmp_path / "mine"))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("/no/such/folder", "does not exist"),
        ("./no_such_folder", "does not exist"),
        ("~/no_such_folder_at_all", "does not exist"),
        ("missing.gguf", "does not exist"),
        ("two words", "nor a hub id"),
        ("a/b/c", "nor a hub id"),
        ("-a/b", "nor a hub id"),
        ("a--b", "nor a hub id"),
        ("smollm", "did you mean model.name=smollm2"),
        ("smolm2", "did you mean model.name=smollm2"),
        ("SmolLM2", "did you mean model.name=smollm2"),
        ("SmolLM2-135M", "did you mean model.name=smollm2"),
        ("", "is empty"),
    ],
)
def test_names_that_can_be_no_model(name, words):
    with pytest.raises(UsageError, match=words) as caught:
        models.resolve(name)
    with pytest.raises(UsageError, match=words):
        models.check_name(name)
    assert "model.name" in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_without_config_and_a_file_that_is_no_gguf(tmp_path):
    with pytest.raises(UsageError, match=r"has no config\.json.*set model\.name"):
        models.resolve(str(tmp_path))
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(UsageError, match=r"is no model: set model\.name"):
        models.resolve(str(tmp_path / "model.bin"))


def test_a_folder_near_the_built_in_name_is_a_folder(tmp_path, monkeypatch):
    (tmp_path / "smollm").mkdir()
    (tmp_path / "smollm" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert models.resolve("smollm").path == str(tmp_path / "smollm")


def test_a_tokenizers_folder_needs_no_model(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text("{}")
    models.check_name(str(tmp_path), key="model.tokenizer")
    with pytest.raises(UsageError, match=r"has no config\.json"):
        models.check_name(str(tmp_path))
    with pytest.raises(UsageError, match=r"model\.tokenizer=\./no does not exist: set model\.tokenizer"):
        models.check_name("./no", key="model.tokenizer")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UsageError, match=r"holds an adapter alone: set model\.adapter to it, and model\.name"):
        models.check_name(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UsageError, match=r"holds an adapter too, .*set model\.adapter to that"):
        models.check_name(str(tmp_path))


def test_a_revision_belongs_to_a_hub_id(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UsageError, match=r"set model\.revision=null"):
        models.resolve(str(tmp_path), revision="main")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (hub.LocalEntryNotFoundError("offline"), "hub cannot be reached"),
        (hub.OfflineModeIsEnabled("offline"), "hub cannot be reached"),
        (OSError("We couldn't connect to the hub to load the files"), "hub cannot be reached"),
        (
            OSError("a/b is not a local folder and is not a valid model identifier listed on the hub"),
            "was not found on the hub",
        ),
        (OSError("You are trying to access a gated repo."), "is gated on the hub"),
        (OSError("x is not a valid git identifier (branch name, tag name or commit id)"), r"set model\.revision"),
    ],
)
def test_errors_of_the_hub_become_one_sentence(error, words):
    with pytest.raises(UsageError, match=words) as caught, models.hub_errors("a/b"):
        raise OSError("cannot load") from error
    assert "model.name=a/b" in str(caught.value)


def test_other_errors_pass_through():
    for error in (ZeroDivisionError(), ValueError("unknown dtype"), BrokenPipeError("a worker died")):
        with pytest.raises(type(error)) as caught, models.hub_errors("a/b"):
            raise error
        assert caught.value is error


def test_transformers_own_error_without_a_network(monkeypatch):
    from transformers import AutoConfig

    with (
        pytest.raises(UsageError, match=r"model\.name=rl-onoff/no-such-model .*hub"),
        models.hub_errors("rl-onoff/no-such-model"),
    ):
        AutoConfig.from_pretrained("rl-onoff/no-such-model", local_files_only=True)


@pytest.mark.parametrize(
    ("spoilt", "content", "words"),
    [
        ("model.safetensors", None, r"no file named model\.safetensors.*set another model\.name"),
        ("model.safetensors", "version https://git-lfs.github.com/spec/v1", r"header too large"),
        ("config.json", "{", r"config\.json' is not a valid JSON file"),
        ("config.json", '{"model_type": "frob"}', r"model type `frob`"),
        ("config.json", '{"model_type": "t5"}', r"is no causal language model: set model\.name"),
        ("tokenizer.json", None, r"transformers cannot load model\.name="),
    ],
)
def test_a_folder_that_holds_something_else(spoilt, content, words, smollm2, tmp_path):
    for file in Path(smollm2).iterdir():
        if file.name != spoilt:
            (tmp_path / file.name).symlink_to(file)
    if content is not None:
        (tmp_path / spoilt).write_text(content)
    backend = create_backend({"model_name": str(tmp_path)})
    with pytest.raises(UsageError, match=words) as caught:
        backend.load()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"device": "gpu"}, r"backend\.device is 'gpu', which torch does not know: set backend\.device=cuda or cpu"),
        ({"device_map": "nope"}, r"backend\.device_map"),
        ({"attn_implementation": "nope"}, r"backend\.attn_implementation"),
        ({"engine_kwargs": {"foo": 1}}, r"unexpected keyword argument 'foo'.*backend\.engine_kwargs"),
    ],
)
def test_an_option_that_transformers_refuses(options, words, tiny_llama):
    backend = create_backend({"model_name": tiny_llama, "backend_specific": options})
    with pytest.raises(UsageError, match=words):
        backend.load()
