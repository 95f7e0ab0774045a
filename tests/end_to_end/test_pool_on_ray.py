"""`rl-onoff pool=ray` where no cluster runs: it starts one, and nothing of it is left, however the run ends."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import time
import uuid
from pathlib import Path

import psutil
import pytest

from tests.end_to_end.conftest import COMMAND, FAKE, continue_command, environment, refused, rl_onoff, token_ids

pytestmark = pytest.mark.ray

ROWS = 40
LONG = (*FAKE, f"data.limit={ROWS}", "sampling.max_new_tokens=150", "tracking.log_every_s=0.05", "experiment=generate")
ON_RAY = ("pool=ray", "pool.address=local", "backend.dp_size=2")  # not a cluster that happens to run on this machine
MARK = "RL_ONOFF_TEST_MARK"


def marked(mark: str) -> list[str]:
    """The living processes that were started, by whomever, under this mark."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(f"{process.pid} {process.name()}")
        except psutil.Error:
            continue
    return found


def gone(mark: str, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while marked(mark) and time.monotonic() < end:
        time.sleep(0.1)
    return not marked(mark)


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> Path:
    """The run without Ray."""
    folder = tmp_path_factory.mktemp("here")
    rl_onoff(*LONG, "run_dir=run", cwd=folder)
    return folder / "run"


def test_a_run_on_ray_is_the_run_and_leaves_no_process(here, tmp_path):
    mark = uuid.uuid4().hex
    done = rl_onoff(*LONG, *ON_RAY, "run_dir=run", cwd=tmp_path, **{MARK: mark})
    assert gone(mark, 5), marked(mark)
    assert (
        "starting a Ray cluster on this machine" in done.stdout
        and "starting 2 replicas" in done.stdout
        and not done.stderr
    )
    assert token_ids(tmp_path / "run") == token_ids(here)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_run_leaves_no_process_and_goes_on_without_ray(how, here, tmp_path):
    mark = uuid.uuid4().hex
    process = subprocess.Popen(
        [*COMMAND, *LONG, *ON_RAY, "run_dir=run"],
        cwd=tmp_path,
        env=environment(**{MARK: mark}),
        text=True,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    said = ""
    while not re.search(r"INFO generate: \d+ of", said):
        said += process.stdout.readline()
    if how is signal.SIGINT:
        os.killpg(process.pid, how)  # as a terminal does: everybody gets it
    else:
        process.send_signal(how)
    rest, errors = process.communicate(timeout=60)
    assert gone(mark, 15), marked(mark)
    if how is signal.SIGINT:
        assert process.returncode == 130 and "Traceback" not in said + rest + errors
        assert 0 < len(token_ids(tmp_path / "run")) < ROWS
        rl_onoff(*(word for word in shlex.split(continue_command(rest))[1:] if word not in ON_RAY), cwd=tmp_path)
        assert token_ids(tmp_path / "run") == token_ids(here)


def test_no_cluster_is_one_sentence(tmp_path):
    sentence = refused(*FAKE, "pool=ray", "pool.address=127.0.0.1:9", cwd=tmp_path, code=1)
    fix = "set pool.address to one that runs, or to null to start one for this run"
    assert sentence == f"no Ray cluster answers at 127.0.0.1:9: {fix}"
