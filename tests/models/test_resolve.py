"""A model's name is settled before anything is loaded, and a wrong one is one sentence that names model.name."""

import pytest
from huggingface_hub import errors as hub

from rl_onoff import models
from rl_onoff.errors import UsageError


def test_hub_ids_stay_as_they_are():
    for name in ("gpt2", "Qwen/Qwen2.5-0.5B-Instruct", "a/b_c-d.e"):
        assert models.resolve(name, revision="main") == models.ModelFiles(name=name, path=name, revision="main")
    assert not models.resolve("gpt2").is_local


def test_a_local_folder_becomes_an_absolute_path(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    for name in ("mine", "./mine", str(tmp_path / "mine")):
        found = models.resolve(name)
        assert found.path == str(tmp_path / "mine") and found.is_local and found.label == "mine"


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
        ("", "is empty"),
    ],
)
def test_names_that_can_be_no_model(name, words):
    with pytest.raises(UsageError, match=words) as caught:
        models.resolve(name)
    assert "model.name" in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_without_config_and_a_file_that_is_no_gguf(tmp_path):
    with pytest.raises(UsageError, match=r"has no config\.json.*set model\.name"):
        models.resolve(str(tmp_path))
    (tmp_path / "model.bin").write_bytes(b"")
    with pytest.raises(UsageError, match=r"is no model: set model\.name"):
        models.resolve(str(tmp_path / "model.bin"))


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
        (OSError("a/b is not a local folder and is not a valid model identifier listed on the hub"), "was not found on the hub"),
        (OSError("You are trying to access a gated repo."), "is gated on the hub"),
        (OSError("x is not a valid git identifier (branch name, tag name or commit id)"), r"set model\.revision"),
    ],
)
def test_errors_of_the_hub_become_one_sentence(error, words):
    with pytest.raises(UsageError, match=words) as caught, models.hub_errors("a/b"):
        raise OSError("cannot load") from error
    assert "model.name=a/b" in str(caught.value)


def test_other_errors_pass_through():
    with pytest.raises(ZeroDivisionError), models.hub_errors("a/b"):
        raise ZeroDivisionError
    assert models.hub_error(ValueError("unknown dtype"), "a/b") is None
    assert models.hub_error(BrokenPipeError("a worker died"), "a/b") is None


def test_transformers_own_error_without_a_network(monkeypatch):
    from transformers import AutoConfig

    with pytest.raises(UsageError, match=r"model\.name=rl-onoff/no-such-model .*hub"), models.hub_errors("rl-onoff/no-such-model"):
        AutoConfig.from_pretrained("rl-onoff/no-such-model", local_files_only=True)
