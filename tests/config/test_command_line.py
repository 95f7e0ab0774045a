"""What a user sees before anything runs: help, the composed config, shell completion."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from rl_onoff import __version__
from rl_onoff.cli.main import CONF
from tests.conftest import ROOT

MODULE = [sys.executable, "-m", "rl_onoff"]
SCRIPT = [str(Path(sys.executable).with_name("rl-onoff"))]
EITHER = pytest.mark.parametrize("command", [MODULE, SCRIPT], ids=["python -m rl_onoff", "rl-onoff"])


def said(command: list[str], *arguments: str, cwd: Path, **environ: str) -> str:
    """What it prints; it must succeed and complain about nothing."""
    done = subprocess.run(
        [*command, *arguments], cwd=cwd, env={**os.environ, **environ}, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def five_commands(text: str) -> list[list[str]]:
    lines = [line.strip() for line in text.splitlines() if line.startswith("  rl-onoff ")]
    return [shlex.split(line)[1:] for line in lines]


@EITHER
def test_help_explains_the_groups_and_shows_five_commands(command, tmp_path):
    text = said(command, "--help", cwd=tmp_path)
    for group in sorted(folder.name for folder in CONF.iterdir() if folder.is_dir() and folder.name != "score"):
        line = next(line for line in text.splitlines() if line.startswith(f"  {group} "))
        assert len(line.split()) > 3
    for group in ("experiment", "backend", "target", "sampling", "reward", "tracking"):
        for file in (CONF / group).glob("*.yaml"):
            assert re.search(rf"\b{file.stem}\b", text), f"{group}={file.stem}"
    assert len(five_commands(text)) == 5
    assert "docs/configuration.md" in text and "run_dir=" in text
    assert not list(tmp_path.iterdir()), "help leaves no folder behind"


def test_each_of_the_five_commands_parses(tmp_path):
    for command in five_commands(said(MODULE, "--help", cwd=tmp_path)):
        sweep = "-m" in command
        once = [argument.split(",")[0] for argument in command if argument != "-m"]
        config = yaml.safe_load(said(MODULE, *once, "--cfg", "job", cwd=tmp_path))
        assert config["stages"] and config["model"]["name"]
        assert not sweep or len(once) >= 2


def commands_of(page: str) -> list[list[str]]:
    """The commands in a page's blocks of code, as a shell would split them."""
    blocks = re.findall(r"^```\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("rl-onoff ")]


@pytest.mark.parametrize("command", commands_of("docs/sweeps.md"), ids=lambda command: " ".join(command)[:60])
def test_every_command_about_sweeps_composes(command: list[str], tmp_path: Path) -> None:
    """Launcher and sweeper too; `--cfg` takes one value of each option."""
    once = [re.sub(r"=(interval|choice)\((.*?)[,)].*", r"=\2", argument) for argument in command if argument != "-m"]
    once = [argument if "[" in argument or "{" in argument else argument.partition(",")[0] for argument in once]
    config = yaml.safe_load(said(MODULE, *once, "--cfg", "all", cwd=tmp_path))
    chosen = dict(argument.partition("=")[::2] for argument in once)
    assert chosen.get("hydra/launcher", "shared_engine") == config["hydra"]["runtime"]["choices"]["hydra/launcher"]
    assert chosen.get("hydra/sweeper", "basic") == config["hydra"]["runtime"]["choices"]["hydra/sweeper"]
    for name, value in chosen.items():
        if name.startswith("hydra.launcher.") and value.isdigit():
            assert config["hydra"]["launcher"][name.removeprefix("hydra.launcher.")] == int(value)


def test_the_other_launchers_options_compose(tmp_path: Path) -> None:
    more = ["+hydra.launcher.additional_parameters={mail-type: END}", "hydra.launcher.setup=[module load cuda]"]
    launcher = yaml.safe_load(said(MODULE, "hydra/launcher=submitit_slurm", *more, "--cfg", "hydra", cwd=tmp_path))[
        "hydra"
    ]["launcher"]
    assert launcher["additional_parameters"] == {"mail-type": "END"} and launcher["setup"] == ["module load cuda"]


@EITHER
def test_cfg_job_shows_the_whole_config(command, tmp_path):
    config = yaml.safe_load(
        said(command, "--cfg", "job", "--resolve", "backend=fake", "model=some/model", "sampling.n=3", cwd=tmp_path)
    )
    assert config["backend"]["_target_"] == "rl_onoff.backends.fake.FakeBackend"
    assert config["backend"]["model_name"] == "some/model"
    assert config["sampling"]["n"] == 3
    assert "hydra" not in config


@EITHER
def test_version_is_ours(command, tmp_path):
    assert said(command, "--version", cwd=tmp_path) == f"rl_onoff {__version__}\n"


@EITHER
def test_info_shows_where_the_config_comes_from(command, tmp_path):
    text = said(command, "--info", "defaults", cwd=tmp_path)
    assert "schema/backend/huggingface" in text and "experiment/analyse" in text
    assert str(CONF) in said(command, "--info", "searchpath", cwd=tmp_path)


@pytest.mark.parametrize(
    ("typed", "want"),
    [
        ("backend=", "backend=fake backend=hugging"),
        ("sampling.t", "sampling.temperature="),
        ("backend=vllm backend.t", "backend.tp_size="),
    ],
)
def test_completion_knows_groups_and_fields(typed, want, tmp_path):
    line = f"rl-onoff {typed}"
    assert want in said(SCRIPT, "-sc", "query=bash", cwd=tmp_path, COMP_LINE=line, COMP_POINT=str(len(line)))


@EITHER
def test_completion_works_in_a_shell_once_installed(command, tmp_path):
    script = f"""
        eval "$({shlex.join(command)} -sc install=bash)"
        COMP_LINE="rl-onoff backend=hug" COMP_POINT=20 COMP_CWORD=1
        hydra_bash_completion
        echo "${{COMPREPLY[@]}}"
        complete -p rl-onoff"""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    shown, registered = said(["bash", "-c", script], cwd=tmp_path, PATH=path).splitlines()
    assert shown.strip() == "backend=huggingface"
    assert "hydra_bash_completion" in registered
