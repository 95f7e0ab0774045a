from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

import pytest

from rl_onoff.cli import doctor
from tests.conftest import ROOT, SGLANG_PYTHON


@pytest.mark.vllm
@pytest.mark.sglang
def test_what_is_here(capsys, monkeypatch) -> None:
    monkeypatch.setenv("RL_ONOFF_SGLANG_PYTHON", SGLANG_PYTHON)
    assert doctor.command([]) == 0
    said = capsys.readouterr().out
    for name in ("python", "pool=ray", "gpus", "wandb", "cache"):
        assert name in said
    for name in ("huggingface", "vllm", "sglang"):
        assert f"ok  {name} " in said
    assert "tested with" not in said, "every version here is one that the package's metadata allows"


def test_what_is_missing_comes_with_what_fixes_it(tmp_path: Path) -> None:
    venv.create(tmp_path / "bare", symlinks=True)  # an interpreter that has none of the engines
    line = doctor._package("sglang", "sglang", str(tmp_path / "bare/bin/python"), "pip install it")
    assert not line.fine and "not installed" in line.found and line.fix == "pip install it"
    broken = doctor._package("sglang", "sglang", str(tmp_path / "nothing"), "pip install it")
    assert not broken.fine and broken.fix == "pip install it"
    assert doctor._package("huggingface", "transformers", sys.executable, "").fine


def test_a_version_that_the_package_was_not_made_for(tmp_path: Path) -> None:
    venv.create(tmp_path / "old", symlinks=True)
    (site,) = (tmp_path / "old/lib").glob("python*/site-packages")
    (site / "vllm.py").write_text("")
    (site / "vllm-0.1.dist-info").mkdir()
    (site / "vllm-0.1.dist-info/METADATA").write_text("Name: vllm\nVersion: 0.1\n")
    line = doctor._package("vllm", "vllm", str(tmp_path / "old/bin/python"), "")
    assert line.fine and line.found.startswith("0.1 under") and "tested with" in line.found and ">=0.32" in line.found
    (site / "vllm.py").write_text("raise OSError('no such library')")
    line = doctor._package("vllm", "vllm", str(tmp_path / "old/bin/python"), "pip install it")
    assert line == doctor.Line(False, "vllm", "0.1 does not import: no such library", "pip install it")


# -- another interpreter -----------------------------------------------------------------------------------------------


@pytest.mark.sglang
def test_the_interpreter_of_an_engine(capsys, monkeypatch, tmp_path) -> None:
    (tmp_path / "numpy.py").write_text("a file in the working folder is no package")
    monkeypatch.chdir(tmp_path)
    assert doctor.command([f"target.python={SGLANG_PYTHON}"]) == 0
    said = capsys.readouterr().out
    assert "ok  worker " in said and "msgspec" in said and "ok  sglang " in said
    assert f"-> target=sglang target.python={SGLANG_PYTHON}\n" in said
    assert "--  vllm " in said and "pip install 'vllm" not in said, "an environment that has an engine needs no other"


def test_an_interpreter_without_anything(capsys, tmp_path) -> None:
    venv.create(tmp_path / "bare", symlinks=True)
    python = tmp_path / "bare/bin/python"
    assert doctor.command([f"backend.python={python}"]) == 1
    said = capsys.readouterr().out
    assert (
        "lacks msgspec, numpy, psutil" in said
        and f"{python} -m pip install 'msgspec>=0.19' 'numpy>=2' 'psutil>=6'" in said
    )
    assert "--  sglang " in said and f"{python} -m pip install 'sglang" in said


def test_an_interpreter_whose_packages_are_broken(tmp_path) -> None:
    """Each is there, but a worker cannot be imported with them."""
    venv.create(tmp_path / "broken", symlinks=True)
    (site,) = (tmp_path / "broken/lib").glob("python*/site-packages")
    for name in doctor.WORKER:
        (site / f"{name}.py").write_text("")
        (site / f"{name}-1.0.dist-info").mkdir()
        (site / f"{name}-1.0.dist-info/METADATA").write_text(f"Name: {name}\nVersion: 1.0\n")
    lines = {line.what: line for line in doctor.findings_of(str(tmp_path / "broken/bin/python"))}
    assert lines["python"].fine and not lines["worker"].fine
    assert "cannot be imported" in lines["worker"].found and "msgspec>=0.19" in lines["worker"].fix


@pytest.mark.parametrize(
    ("python", "found", "fix"),
    [
        ("/nowhere/python", "cannot be run (No such file or directory)", "set backend.python to a Python interpreter"),
        ("/bin/echo", "is no Python interpreter", "set backend.python to a Python interpreter"),
        ("/usr", "is a folder", "as /usr/bin/python"),
        ("~/venv/bin/python", "/nowhere/venv/bin/python cannot be run", "set backend.python to a Python interpreter"),
    ],
)
def test_what_is_no_interpreter(python, found, fix, capsys, monkeypatch) -> None:
    monkeypatch.setenv("HOME", "/nowhere")  # a shell leaves a ~ behind a = alone
    assert doctor.command([f"backend.python={python}"]) == 1
    said = capsys.readouterr().out
    assert found in said and fix in said and len(said.splitlines()) == 2


def test_an_interpreter_that_hangs(tmp_path, monkeypatch) -> None:
    (tmp_path / "python").write_text("#!/bin/sh\nexec sleep 60\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(doctor, "PYTHON_SECONDS", 1.0)
    (line,) = doctor.findings_of(str(tmp_path / "python"))
    assert not line.fine and "gave no answer in 1 s" in line.found


def test_what_stands_after_doctor(capsys) -> None:
    assert doctor.command(["--help"]) == 0
    said = capsys.readouterr().out
    assert len(said.splitlines()) == 2 and "backend.python=/path/to/python" in said
    for words in (["backend=vllm"], ["backend.python="], ["backend.python=python", "x"], ["sglang"]):
        assert doctor.command(words) == 2
        said = capsys.readouterr()
        assert len(said.err.splitlines()) == 1 and not said.out and f"doctor does not take '{words[-1]}'" in said.err


def test_the_command_line_has_it() -> None:
    for words, code in ((["-h"], 0), (["sglang"], 2)):
        done = subprocess.run(
            [sys.executable, "-m", "rl_onoff", "doctor", *words], cwd=ROOT, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == code and "doctor" in done.stdout + done.stderr and "Traceback" not in done.stderr
