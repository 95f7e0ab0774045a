"""The command line as a user runs it, in a process of its own and in a folder of its own, with the fake engine."""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import pytest

from tests.conftest import ROOT
from tests.end_to_end.forking import Server

COMMAND = [sys.executable, "-m", "rl_onoff"]
FAKE = ("backend=fake", "model=fake", "reward=none", "tracking=none")  # no model, no judge, no W&B: a second or two
SMALL = (*FAKE, "data.limit=4", "sampling.max_new_tokens=8")


def environment(**changes: str) -> dict[str, str]:
    """This process's, with one thread for torch and without what changes how errors look."""
    kept = {name: value for name, value in os.environ.items() if name != "HYDRA_FULL_ERROR"}
    return {**kept, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **changes}


server = Server()


@pytest.fixture(scope="session", autouse=True)
def _the_server_ends() -> Iterator[None]:
    yield
    server.close()


def rl_onoff(*arguments: str, cwd: Path, code: int = 0, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run it to its end, in a fork of a process that has imported everything; the exit code must be `code`."""
    done = server.run(arguments, cwd, environment(**environ), timeout=120)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def refused(*arguments: str, cwd: Path, code: int = 2, **environ: str) -> str:
    """The one sentence it ends with, after the name; there is nothing else on stderr, and no traceback anywhere."""
    done = rl_onoff(*arguments, cwd=cwd, code=code, **environ)
    return one_sentence(done.stdout, done.stderr)


def one_sentence(stdout: str, stderr: str) -> str:
    assert "Traceback" not in stdout + stderr
    lines = stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("rl-onoff: "), stderr
    return lines[0].removeprefix("rl-onoff: ")


@pytest.fixture
def refused_here(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Callable[..., str]]:
    """`refused` without a process of its own: the same `main`, for the many commands that end before anything is
    loaded."""
    from rl_onoff.cli.main import main

    root = logging.getLogger()
    handlers, level, raises, on_term = (
        list(root.handlers),
        root.level,
        logging.raiseExceptions,
        signal.getsignal(signal.SIGTERM),
    )

    def call(*arguments: str, cwd: Path, code: int = 2) -> str:
        monkeypatch.chdir(cwd)
        monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
        monkeypatch.setattr(sys, "argv", ["rl-onoff", *arguments])
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            main()
        sys.stdout.flush()
        shown = capfd.readouterr()
        assert caught.value.code == code, shown
        return one_sentence(shown.out, shown.err)

    yield call
    for handler in root.handlers[:]:
        root.removeHandler(handler)
        if handler not in handlers:
            handler.close()
    for handler in handlers:
        root.addHandler(handler)
    root.setLevel(level)
    logging.raiseExceptions = raises
    signal.signal(signal.SIGTERM, on_term)


def table(folder: Path) -> pd.DataFrame:
    """A table by its key, in an order that does not depend on when a row was written."""
    return pd.read_parquet(folder).sort_values(["request_id", "sample"]).reset_index(drop=True)


def token_ids(run_dir: Path) -> dict[tuple[str, int], list[int]]:
    """The sampled ids by (request id, sample); a repeated row is an error."""
    rows = table(run_dir / "completions")
    found = {(row.request_id, row.sample): row.token_ids.tolist() for row in rows.itertuples()}
    assert len(found) == len(rows), "a row is there twice"
    return found


def continue_command(text: str) -> str:
    """What a stopped run says to type."""
    found = re.search(r"To go on: (rl-onoff .*)", text)
    assert found, text
    return found[1]
