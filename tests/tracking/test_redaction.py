"""What counts as a secret, that a literal one is refused, and that it is gone from every shape a config can have."""

from pathlib import Path

import pytest

from rl_onoff.config import TrackingMode
from rl_onoff.errors import UsageError
from rl_onoff.redaction import masked, masked_text, refuse_literals, secret_key, secrets_of_environment


@pytest.fixture(autouse=True)
def no_other_secrets(monkeypatch):
    monkeypatch.setattr("os.environ", {"MY_API_KEY": "hunter2-hunter2", "SHORT_TOKEN": "abc", "HOME": "/home/someone"})


@pytest.mark.parametrize(
    "key",
    [
        "token",
        "hf_token",
        "HF_TOKEN",
        "api_key",
        "apiKey",
        "WANDB_API_KEY",
        "password",
        "db.password",
        "client-secret",
        "+backend.engine_kwargs.hf_token",
        "AWS_SECRET_ACCESS_KEY",
        "Authorization",
        "credentials",
    ],
)
def test_secret_names(key):
    assert secret_key(key) == key


@pytest.mark.parametrize(
    "key",
    [
        "max_new_tokens",
        "token_ids",
        "tokenizer",
        "top_k",
        "eos_token",
        "pad_token",
        "key",
        "stop_token_ids",
        "tokens_per_s",
        "skip_tokenizer_init",
        "monkey",
        "trust_remote_code",
    ],
)
def test_names_that_only_look_like_secrets(key):
    assert not secret_key(key)


def test_masked_leaves_are_secrets_and_the_rest_is_kept():
    config = {
        "model": {"name": "m", "token": "abc", "eos_token": "</s>"},
        "engine_kwargs": {
            "use_auth_token": True,
            "max_token": 3,
            "password": 1234,
            "credentials": {"user": "u", "keys": ["k1"]},
            "api_key": None,
        },
        "headers": ["Bearer hunter2-hunter2"],
        "proxy": "http://me:pw@proxy:3128/x",
        "mode": TrackingMode.auto,
        "path": Path("/a/b"),
        "n": 4,
    }
    before = repr(config)
    assert masked(config) == {
        "model": {"name": "m", "token": "***", "eos_token": "</s>"},
        "engine_kwargs": {
            "use_auth_token": True,
            "max_token": 3,
            "password": "***",
            "credentials": {"user": "***", "keys": ["***"]},
            "api_key": None,
        },
        "headers": ["Bearer ***"],
        "proxy": "http://***@proxy:3128/x",
        "mode": "auto",
        "path": "/a/b",
        "n": 4,
    }
    assert repr(config) == before, "the config itself is untouched"


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"a": {"hf_token": "abc"}}, "a.hf_token"),
        ({"a": [{"password": 1234}]}, "a.password"),
        ({"credentials": {"user": "${oc.env:ME}", "keys": ["k1"]}}, "credentials.keys"),
        ({"proxy": "http://me:pw@proxy:3128/x"}, "proxy"),
    ],
)
def test_a_literal_is_refused_by_its_name(config, name):
    with pytest.raises(UsageError, match=rf"^{name} is a literal secret: export it and set '{name}=\$\{{oc\.env:"):
        refuse_literals(config)


def test_what_is_no_literal():
    refuse_literals(
        {
            "hf_token": "${oc.env:MINE}",
            "authorization": "Bearer ${oc.env:MINE}",
            "password": None,
            "use_auth_token": True,
            "api_key": "",
            "secret": "???",
            "eos_token": "</s>",
            "n_token": 3,
            "at": "me@host",
            "proxy": "http://proxy:3128",
            "token": {"n": 3},
        }
    )


def test_the_environments_secrets_are_taken_out_of_a_text_where_they_are_long_enough_to_be_found_again():
    assert secrets_of_environment() == {"hunter2-hunter2", "abc"}
    assert (
        masked_text("abc: hunter2-hunter2 at http://me:pw@host", secrets_of_environment())
        == "abc: *** at http://***@host"
    )
