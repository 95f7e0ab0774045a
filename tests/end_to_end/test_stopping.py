"""A run that is stopped in the middle keeps what it finished, says how to go on, and then loses and repeats nothing."""

from __future__ import annotations

import re
import shlex
import signal
import subprocess
from pathlib import Path

import pandas as pd
import pytest

from tests.end_to_end.conftest import COMMAND, FAKE, continue_command, environment, refused, rl_onoff, table, token_ids

ROWS = 50
LONG = (*FAKE, f"data.limit={ROWS}", "sampling.max_new_tokens=150", "tracking.log_every_s=0.05")


def started(*arguments: str, cwd: Path) -> subprocess.Popen[str]:
    """A run that has finished some responses and not all."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([*COMMAND, *arguments], cwd=cwd, env=environment(), text=True, **pipes)
    assert process.stdout is not None
    for line in process.stdout:
        if re.search(r"INFO generate: \d+ of", line):
            return process
    raise AssertionError(process.stderr and process.stderr.read())


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    rl_onoff(*LONG, "run_dir=run", cwd=folder)
    return folder / "run"


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_stopping_and_going_on(how, uninterrupted, tmp_path):
    process = started(*LONG, *(["run_dir=it's=mine #1 é"] if how is signal.SIGINT else []), cwd=tmp_path)
    process.send_signal(how)
    said, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in said + errors
    command = continue_command(said)
    run_dir = Path(next(word for word in shlex.split(command) if word.startswith("run_dir=")).removeprefix("run_dir="))
    before = token_ids(run_dir)
    assert 0 < len(before) < ROWS, "stopped in the middle"
    assert not list(run_dir.glob("completions/.part-*"))

    said = rl_onoff(*shlex.split(command)[1:], cwd=tmp_path).stdout
    assert f"{len(before)} of {ROWS} responses found on disk" in said
    assert token_ids(run_dir) == token_ids(uninterrupted)
    first, second = (table(path / "scores" / "fake-fake-auto") for path in (run_dir, uninterrupted))
    pd.testing.assert_frame_equal(first, second)


def test_a_killed_run_goes_on_too(uninterrupted, tmp_path):
    process = started(*LONG, "run_dir=run", cwd=tmp_path)
    process.kill()
    process.communicate(timeout=60)
    rl_onoff(*LONG, "run_dir=run", "experiment=generate", cwd=tmp_path)
    assert token_ids(tmp_path / "run") == token_ids(uninterrupted)


def test_a_stopped_sweep_goes_on_as_a_sweep(tmp_path):
    sweep = ("-m", *LONG, "experiment=generate", "sampling.seed=1,2")
    process = started(*sweep, cwd=tmp_path)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    words = shlex.split(continue_command(said))
    assert words[1] == "-m" and words[-1].startswith("sweep_dir=")
    assert "unfinished" in (tmp_path / words[-1].removeprefix("sweep_dir=") / "sweep.csv").read_text()
    rl_onoff(*words[1:], cwd=tmp_path)
    jobs = list((tmp_path / words[-1].removeprefix("sweep_dir=")).glob("*/completions"))
    assert len(jobs) == 2 and all(len(token_ids(job.parent)) == ROWS for job in jobs)


def test_two_runs_in_one_folder_at_once(tmp_path):
    process = started(*LONG, "run_dir=run", cwd=tmp_path)
    sentence = refused(*LONG, "run_dir=run", cwd=tmp_path)
    assert "another process is writing to" in sentence and "set run_dir" in sentence
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 130
