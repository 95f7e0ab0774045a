"""The command line as it reaches Hydra: a path is taken as it is typed, whatever its characters."""

from __future__ import annotations

import shlex

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given, settings
from hypothesis import strategies as st

from rl_onoff.cli.overrides import continue_command, flags_first, quoted, understood
from rl_onoff.config import CONF, register
from rl_onoff.errors import UsageError

PATHS = (
    "out/sampling.temperature=0.6", "out/data.limit=2,sampling.temperature=0.6", "out/a#b", "out/a%20b", "/tmp/模型",
    "it's (mine)!", "a\\'b", "back\\", "1e3", "007", "true", 'say "x"', "a;b&c", "a~b", "out/model.name='_tmp_é'",
    "out/[a]{b}", "a: b", "Ünï côdé",
)  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("sweeping", [False, True])
def test_a_path_is_taken_as_it_is_typed(path, sweeping):
    for name in ("run_dir", "sweep_dir"):
        assert OverridesParser.create().parse_override(quoted(f"{name}={path}", sweeping=sweeping)).value() == path


@pytest.mark.parametrize("path", [path for path in PATHS if "," not in path])
@pytest.mark.parametrize(
    "name",
    ["model.name", "model.tokenizer", "data.path", "score.responses", "compare.behaviour", "compare.target",
     "backend.python", "target.model_name", "targets.mine.model_name", "policies.mine.tokenizer",
     "+compare.columns.behaviour", "tracking.name"],
)  # fmt: skip
def test_every_option_that_is_a_text_takes_any_path(name, path):
    assert OverridesParser.create().parse_override(quoted(f"{name}={path}", sweeping=False)).value() == path


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1).filter(lambda text: text.strip() == text))
def test_any_folder_comes_back(text):
    """But what Hydra reads otherwise: quotes around it, an interpolation, `null`, and `~/` in front, which is the
    user's own folder."""
    if text[0] in "'\"" or text.startswith("~/") or "${" in text or text.lower() == "null":
        return
    once = quoted(f"run_dir={text}", sweeping=False)
    assert OverridesParser.create().parse_override(once).value() == text
    assert quoted(once, sweeping=False) == once


def test_the_composed_config_has_the_path():
    register()
    typed = ["model.name=/tmp/模型", "data.path=a=b#c.jsonl", "compare.target=out/sampling.n=1:name", "sweep_dir=x"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("config", understood([*typed, "run_dir=out/data.limit=2,sampling.n=1"]))
    assert config.run_dir == "out/data.limit=2,sampling.n=1" and config.backend.model_name == "/tmp/模型"
    assert config.data.path == "a=b#c.jsonl" and config.compare.target == "out/sampling.n=1:name"


@pytest.mark.parametrize(
    ("typed", "sweeping", "want"),
    [
        ("model.name=/tmp/模型,gpt2", True, "model.name='/tmp/模型',gpt2"),
        ("data.path=a=1,b=2", True, "data.path='a=1','b=2'"),
        ("data.path=x,y", True, "data.path=x,y"),
        ("data.path=x,y", False, "data.path=x,y"),  # Hydra says to add -m
        ("data.path=here=1,2", True, "data.path='here=1,2'"),  # there is such a file
        ("data.path=here,3", False, "data.path='here,3'"),
        ("tracking.name=1,2", True, "tracking.name=1,2"),
        ("data.path=choice(a,b)", True, "data.path=choice(a,b)"),
        ("data.system=Be brief, (really)", True, "data.system=Be brief, (really)"),
        ("data.system=Be brief (really)", False, "data.system='Be brief (really)'"),
        ("model.name=${oc.env:MINE}", False, "model.name=${oc.env:MINE}"),
        ("data.path='a=b'", False, "data.path='a=b'"),
        ("data.path=null", False, "data.path=null"),
        ("data.path=~/a=b.jsonl", False, "data.path='/home/me/a=b.jsonl'"),
        ("sampling.stop=[a#b]", False, "sampling.stop=[a#b]"),
        ("data.limit=3", False, "data.limit=3"),
        ("backend=fake", False, "backend=fake"),
        ("--cfg", False, "--cfg"),
    ],
)
def test_what_is_quoted_and_what_is_left_to_hydra(typed, sweeping, want, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    for name in ("here=1,2", "here,3"):
        (tmp_path / name).touch()
    assert quoted(typed, sweeping=sweeping) == want


def test_the_command_to_go_on_can_be_pasted_back():
    arguments = understood(["-m", "model.name=/tmp/it's é", "sampling.n=1,2", "sweep_dir=a=b"])
    command = continue_command(arguments, "sweep_dir=out/it's=é")
    words = shlex.split(command)
    assert words[0] == "rl-onoff" and words[1] == "-m" and words[-1] == "sweep_dir=out/it's=é" and len(words) == 5
    parsed = {o.key_or_group: o for o in OverridesParser.create().parse_overrides(understood(words[1:])[1:])}
    assert parsed["model.name"].value() == "/tmp/it's é" and parsed["sweep_dir"].value() == "out/it's=é"


def test_a_literal_secret_is_refused():
    with pytest.raises(UsageError, match="literal secret"):
        understood(["backend=fake", "+backend.engine_kwargs.hf_token=abc"])


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
