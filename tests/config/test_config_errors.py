"""Command lines that Hydra answers with its own usage, or with a traceback: one sentence with what to type instead."""

from __future__ import annotations

import pytest
from hydra import compose, initialize_config_dir

from rl_onoff.cli.main import CONF
from rl_onoff.cli.overrides import config_sentence, flag_sentence, target_sentence
from rl_onoff.config import register


@pytest.mark.parametrize(
    ("typed", "fix"),
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
        ("tracking=false", "did you mean tracking=none"),
        ("reward=no", "did you mean reward=none"),
        ("tracking=null", "did you mean tracking=none"),
        ("target=null", "set target to one of fake huggingface self"),
        ("policies=null", "set policies to one of dtypes engines"),
        ("-sampling.temp=0.7", "write sampling.temperature=0.7"),
        ("Qwen/Qwen2.5-0.5B-Instruct", "write model=Qwen/Qwen2.5-0.5B-Instruct"),
        ("-m backend=fake ./my-checkpoint", "write model=./my-checkpoint"),
        ("/models/mine backend=fake", "write model=/models/mine"),
        ("data/mine.jsonl", "write data.path=data/mine.jsonl"),
        ("backend=1", "set backend to one of fake huggingface sglang vllm"),
    ],
)
def test_what_to_type_instead(typed, fix):
    sentence = flag_sentence(typed.split())
    assert sentence is not None and fix in sentence and "\n" not in sentence
    assert "abc" not in sentence


@pytest.mark.parametrize(
    "typed",
    [
        "", "-m model=a,b", "--multirun model=a,b", "--mult model=a,b", "--cfg job --resolve", "-c job",
        "-cd conf backend=fake", "-h", "--help", "--package model --cfg job", "-sc install=bash", "-sc query=bash",
        "--info defaults", "--hydra-help", "--version",
        "doctor", "data.path=--x", "~target", "+backend@targets.mine=fake", "sampling.n=1", "tracking=none",
        "model=gpt2", "-cd my/conf", "--config-dir my/conf", "--experimental-rerun outputs/config.pickle",
        "-m hydra/launcher=joblib",
        "~hydra/launcher", "run_dir=outputs/x",
    ],
)  # fmt: skip
def test_a_right_command_line_is_left_alone(typed):
    assert flag_sentence(typed.split()) is None


def error_of(*typed: str) -> Exception:
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"), pytest.raises(Exception) as caught:
        compose("config", list(typed))
    return caught.value


@pytest.mark.parametrize(
    "typed", ["target.dtype=float32", "+target.dtype=float32", "target.engine_kwargs.x=1", "++target.model_name=gpt2"]
)
@pytest.mark.parametrize("first", ["backend=fake", "target=self"])
def test_an_option_of_a_target_that_is_not_there(first, typed):
    assert (
        target_sentence(error_of(first, typed), [first, typed])
        == f"{typed} needs an engine that scores: add target=huggingface"
    )


def test_an_assertion_about_something_else_is_not_taken_for_it():
    assert target_sentence(AssertionError("x"), ["target.dtype=float32"]) is None
    assert target_sentence(AssertionError("Unexpected type for root: NoneType"), ["backend=fake"]) is None
    assert target_sentence(ValueError("Unexpected type for root: NoneType"), ["target.dtype=float32"]) is None


@pytest.mark.parametrize(
    ("typed", "fix"),
    [
        ("targets.f32.dtype=float32", "an engine of that name: add '+target@targets.f32=huggingface'"),
        ("+targets.f32.dtype=float32", "an engine of that name: add '+target@targets.f32=huggingface'"),
        ("targets.f32.engine_kwargs.x=1", "an engine of that name: add '+target@targets.f32=huggingface'"),
        ("targets.f32=vllm", "an engine of that name: add '+target@targets.f32=vllm'"),
        ("policies.mine.dtype=float32", "an engine of that name: add '+backend@policies.mine=huggingface'"),
    ],
)
def test_an_option_of_an_engine_that_has_no_name_yet(typed, fix):
    assert config_sentence(error_of(typed)) == f"{typed} needs {fix}"


@pytest.mark.parametrize(
    ("typed", "fix"),
    [
        (
            "+target@targets.f32=huggingface targets.f32.dtyp=1",
            "there is no option targets.f32.dtyp: did you mean targets.f32.dtype?",
        ),
        ("target=huggingface target.dtyp=1", "there is no option target.dtyp: did you mean target.dtype"),
        ("+target@targets.f32=fake targets.f32.attn=1", "there is no option targets.f32.attn; an engine's own"),
        (
            "backend=fake backend.attn_implementation=eager",
            "there is no option backend.attn_implementation; an engine's own",
        ),
        (
            "backend=huggingface backend.attn=eager",
            "there is no option backend.attn: did you mean backend.attn_implementation?",
        ),
        (
            "backend=fake backend.temperature=0",
            "there is no option backend.temperature: did you mean sampling.temperature?",
        ),
        ("sampling.temp=0.7", "there is no option sampling.temp: did you mean sampling.temperature?"),
        ("sampling.t=0.7", "there is no option sampling.t; an engine's own"),
        ("data.lim=3", "there is no option data.lim: did you mean data.limit?"),
        ("model.n=3", "there is no option model.n: did you mean sampling.n?"),
    ],
)
def test_an_option_that_is_not_there(typed, fix):
    assert config_sentence(error_of(*typed.split())).startswith(fix)
