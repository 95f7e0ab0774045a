"""Command lines that Hydra answers with its own usage, or with a traceback: one sentence with what to type instead."""

from __future__ import annotations

import pytest

from rl_onoff.config_errors import flag_sentence, flags_first


@pytest.mark.parametrize(
    ("typed", "mend"),
    [
        ("--data.limit=3", "write data.limit=3"),
        ("--data.limit 3 backend=fake", "write data.limit=3"),
        ("--data-limit=3", "write data.limit=3"),
        ("-data.limit=3", "write data.limit=3"),
        ("--limit 3", "write data.limit=3"),
        ("-n 4", "write sampling.n=4"),
        ("--model gpt2", "write model=gpt2"),
        ("--temprature=0.5", "write NAME=VALUE"),
        ("--sampling.temprature=0.5", "write sampling.temperature=0.5"),
        ("backend=fake --shuffle", "write data.shuffle=VALUE"),
        ("--hf_token=abc", "write NAME=VALUE"),
        ("+backend.x=1 --backend.engine_kwargs.hf_token=abc", "write NAME=VALUE"),
        ("data.limit =3", "write NAME=VALUE, without blanks"),
        ("tracking=false", "did you mean tracking=none"),
        ("reward=no", "did you mean reward=none"),
        ("backend=1", "set backend to one of fake huggingface sglang vllm"),
    ],
)
def test_what_to_type_instead(typed, mend):
    sentence = flag_sentence(typed.split())
    assert sentence is not None and mend in sentence and "\n" not in sentence
    assert "abc" not in sentence


@pytest.mark.parametrize(
    "typed",
    [
        "", "-m model=a,b", "--multirun model=a,b", "--mult model=a,b", "--cfg job --resolve", "-c job", "-cd conf backend=fake", "-h",
        "--help", "--package model --cfg job", "-sc install=bash", "-sc query=bash", "--info defaults", "--hydra-help", "--version",
        "doctor", "data.path=--x", "target=null", "policies=null", "~target", "+backend@targets.mine=fake", "sampling.n=1", "tracking=none",
        "model=gpt2",
    ],
)  # fmt: skip
def test_a_right_command_line_is_left_alone(typed):
    assert flag_sentence(typed.split()) is None


@pytest.mark.parametrize(
    ("typed", "ordered"),
    [
        ("a=1 -m b=1,2", "-m a=1 b=1,2"),
        ("a=1 --multirun b=1,2 --resolve", "--multirun --resolve a=1 b=1,2"),
        ("a=1 --cfg job b=2", "--cfg job a=1 b=2"),
        ("a=1 -cd folder b=2 -m", "-cd folder -m a=1 b=2"),
        ("a=1 --info", "a=1 --info"),
        ("a=1 --cfg", "--cfg a=1"),
        ("doctor", "doctor"),
        ("", ""),
    ],
)
def test_flags_may_stand_anywhere(typed, ordered):
    assert flags_first(typed.split()) == ordered.split()
