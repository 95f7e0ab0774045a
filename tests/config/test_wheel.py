"""What a user installs: the wheel holds the config tree and every data file, and works from anywhere."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from the working tree with what the dev extra brings, so without a network."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_every_file_of_the_package_and_the_config_tree(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    list_files = ["git", "ls-files", "rl_onoff", "hydra_plugins", "conf"]
    tracked = subprocess.run(list_files, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    wanted = {f"rl_onoff/{name}" if name.startswith("conf/") else name for name in tracked}
    assert not wanted - names
    for name in (
        "conf/config.yaml",
        "data/problems.jsonl",
        "report/page/page.html",
        "report/page/matrix.html",
        "backends/configs/vllm_default.yaml",
    ):
        assert f"rl_onoff/{name}" in names
    assert not [name for name in names if name.startswith(("tests/", "conf/", "benchmarks/"))]


def test_an_installed_wheel_works_from_another_directory(wheel, tmp_path):
    clean, elsewhere = tmp_path / "clean", tmp_path / "elsewhere"
    elsewhere.mkdir()
    # A fresh environment that sees this one's dependencies, but not this checkout: its .pth file is not followed from
    # there.
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(clean)], check=True, timeout=60)
    python = clean / "bin" / "python"
    site = Path(
        subprocess.check_output(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
        ).strip()
    )
    install = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        str(python),
        "install",
        "--no-deps",
        "--no-index",
        "--quiet",
        str(wheel),
    ]
    subprocess.run([*install, "--disable-pip-version-check"], check=True, timeout=120)
    dependencies = Path(yaml.__file__).parents[1]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {
        "PYTHONPATH": str(dependencies)
    }

    where = "import rl_onoff, rl_onoff.cli.main; print(rl_onoff.__file__, rl_onoff.cli.main.CONF)"
    found = subprocess.check_output([python, "-c", where], cwd=elsewhere, env=env, text=True).split()
    assert found == [str(site / "rl_onoff/__init__.py"), str(site / "rl_onoff/conf")]

    command = [str(clean / "bin" / "rl-onoff"), "--cfg", "job", "backend=fake", "data.limit=3"]
    done = subprocess.run(command, cwd=elsewhere, env=env, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert yaml.safe_load(done.stdout)["data"]["limit"] == 3
    jobs = [
        command[0],
        "-m",
        "backend=fake",
        "model=fake",
        "tracking=none",
        "data.limit=1,2",
        "experiment=generate",
        "sweep_dir=sweep",
    ]
    done = subprocess.run(jobs, cwd=elsewhere, env=env, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, ""), "the launcher is there too"

    imports = "from rl_onoff.config import DataConfig; from rl_onoff.data.prompts import load_rows"
    rows = f"{imports}; print(len(load_rows(DataConfig())))"
    assert int(subprocess.check_output([python, "-c", rows], cwd=elsewhere, env=env, text=True)) >= 100
