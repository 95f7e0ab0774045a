"""An engine that dies in the middle: the error comes in time, nothing finished is lost, and the same command finishes
the rest."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import psutil

from tests.end_to_end.conftest import COMMAND, FAKE, environment, rl_onoff, table

RUN = (
    *FAKE,
    "backend.worker=true",
    "data.limit=50",
    "sampling.n=4",
    "sampling.max_new_tokens=200",
    "experiment=generate",
)


def test_a_killed_engine_costs_only_what_was_in_flight(tmp_path: Path) -> None:
    whole = rl_onoff(*RUN, "run_dir=whole", cwd=tmp_path)
    assert "200 of 200" in whole.stdout + whole.stderr
    process = subprocess.Popen(
        [*COMMAND, *RUN, "run_dir=run", "tracking.log_every_s=0.2"],
        cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    said = []
    for line in process.stdout:  # until some are done
        said.append(line)
        if "generate:" in line:
            break
    (worker,) = psutil.Process(process.pid).children()
    worker.kill()
    killed = time.monotonic()
    said.append(process.communicate(timeout=120)[0])
    assert time.monotonic() - killed < 60
    text = "".join(said)
    assert process.returncode == 1 and "Traceback" not in text
    sentence = next(line for line in text.splitlines() if line.startswith("rl-onoff: "))
    assert "killed by SIGKILL" in sentence
    assert 0 < len(table(tmp_path / "run" / "completions")) < 200
    rl_onoff(*RUN, "run_dir=run", cwd=tmp_path)
    expected, got = table(tmp_path / "whole" / "completions"), table(tmp_path / "run" / "completions")
    assert got["token_ids"].map(list).tolist() == expected["token_ids"].map(list).tolist()
