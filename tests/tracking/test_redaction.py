"""What counts as a secret, and that it is gone from every shape a config can have."""

from pathlib import Path

import pytest

from rl_onoff.config import TrackingMode
from rl_onoff.redaction import is_secret_key, redact, redact_override, secret_values


@pytest.mark.parametrize(
    "key", ["token", "hf_token", "HF_TOKEN", "api_key", "apiKey", "WANDB_API_KEY", "password", "db.password", "client-secret",
            "+backend.engine_kwargs.hf_token", "AWS_SECRET_ACCESS_KEY", "Authorization", "credentials"],
)  # fmt: skip
def test_secret_names(key):
    assert is_secret_key(key)


@pytest.mark.parametrize(
    "key", ["max_new_tokens", "token_ids", "tokenizer", "top_k", "eos_token", "pad_token", "key", "stop_token_ids", "tokens_per_s",
            "skip_tokenizer_init", "monkey", "trust_remote_code"],
)  # fmt: skip
def test_names_that_only_look_like_secrets(key):
    assert not is_secret_key(key)


def test_redact_masks_leaves_and_keeps_the_rest():
    config = {
        "model": {"name": "m", "token": "abc", "eos_token": "</s>"},
        "engine_kwargs": {
            "use_auth_token": True,
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
    assert redact(config, {"hunter2-hunter2"}) == {
        "model": {"name": "m", "token": "***", "eos_token": "</s>"},
        "engine_kwargs": {
            "use_auth_token": True,
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
    ("argument", "want"),
    [
        ("backend.engine_kwargs.hf_token=abc", "backend.engine_kwargs.hf_token=***"),
        ("+x.api_key=a,b", "+x.api_key=***"),
        ("backend.engine_kwargs={hf_token: abc, seed: 3}", "backend.engine_kwargs={hf_token: ***, seed: 3}"),
        ("backend.engine_kwargs={'password':'a b',n:1}", "backend.engine_kwargs={'password':***,n:1}"),
        ("sampling.max_new_tokens=5", "sampling.max_new_tokens=5"),
        ("data.path=/x/secret-of-env/y", "data.path=/x/***/y"),
        ("--multirun", "--multirun"),
    ],
)
def test_redact_override(argument, want):
    assert redact_override(argument, {"secret-of-env"}) == want


def test_secret_values_come_from_the_environment_and_are_long_enough_to_be_found_again():
    environ = {
        "HF_TOKEN": "hf_abcdefgh",
        "WANDB_API_KEY": "short",
        "HOME": "/home/someone",
        "TOKENIZERS_PARALLELISM": "false-false",
    }
    assert secret_values(environ) == {"hf_abcdefgh"}
