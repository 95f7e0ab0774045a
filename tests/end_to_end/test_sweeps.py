"""Many jobs from one command: a folder each, one that fails does not stop the rest, again does what is missing."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from rl_onoff.pipeline.engines import Slot
from rl_onoff.run import run_steps
from tests.end_to_end.conftest import FAKE, SMALL, environment, rl_onoff, token_ids
from tests.running import config_of
from tests.tracking.test_tracking import log_files, records

SWEEP = ("-m", *SMALL, "model=fake-a,fake-b", "sampling.temperature=0.5,1.0", "experiment=generate", "sweep_dir=sweep")


BUG = """
from rl_onoff.pipeline import conclude
def broken(*_):
    raise RuntimeError('a bug')
conclude.summarise = broken
def reward(text, answer, meta):
    return 1.0
"""


def folders(tmp_path):
    return {folder.name: folder for folder in (tmp_path / "sweep").iterdir() if folder.is_dir()}


def test_every_combination_has_a_folder_and_again_does_what_is_missing(tmp_path):
    rl_onoff(*SWEEP, cwd=tmp_path)
    jobs = folders(tmp_path)
    assert len(jobs) == 4 and all("model.name=fake-" in name and "sampling.temperature=" in name for name in jobs)
    ids = {name: token_ids(folder) for name, folder in jobs.items()}
    assert len({str(found) for found in ids.values()}) == 4, "each job is of its own"

    gone = next(iter(jobs))
    next(jobs[gone].glob("completions/part-*")).unlink()
    said = rl_onoff(*SWEEP, cwd=tmp_path).stdout
    assert said.count("4 of 4 responses found on disk") == 3
    assert {name: token_ids(folder) for name, folder in folders(tmp_path).items()} == ids


def test_a_job_that_fails_does_not_stop_the_others(tmp_path):
    done = rl_onoff(
        "-m", *SMALL, "experiment=generate", "sampling.top_p=0.9,0,1.0", "sweep_dir=sweep", cwd=tmp_path, code=2
    )
    assert sum(1 for folder in folders(tmp_path).values() if (folder / "completions").exists()) == 2
    assert "failed and the sweep goes on: sampling.top_p is 0.0" in done.stdout
    assert done.stderr.startswith("rl-onoff: sampling.top_p is 0.0") and len(done.stderr.splitlines()) == 1


def test_an_error_nobody_foresaw_does_not_stop_the_others_either(tmp_path):
    (tmp_path / "mine.py").write_text("def reward(text, answer, meta):\n    return 1.0\nraise SystemError('a bug')\n")
    (tmp_path / "fine.py").write_text("def reward(text, answer, meta):\n    return 1.0\n")
    (tmp_path / "bug.py").write_text(BUG)
    jobs = "reward.function=mine.py:reward,fine.py:reward,bug.py:reward"
    done = rl_onoff("-m", *SMALL, "experiment=generate", jobs, "sweep_dir=sweep", cwd=tmp_path, code=2)
    assert "2 jobs of the sweep failed, the first because: mine.py of reward.function" in done.stderr
    assert "RuntimeError: a bug" in done.stdout and "Error executing job" not in done.stderr
    assert len(list((tmp_path / "sweep").glob("*/metrics.json"))) == 1


def loads(*arguments: str, cwd: Path) -> int:
    """How many engines the log of a sweep says were loaded."""
    done = rl_onoff(
        "-m",
        "backend=fake",
        "reward=none",
        "tracking=none",
        "data.limit=2",
        "sampling.max_new_tokens=4",
        *arguments,
        cwd=cwd,
    )
    return (done.stdout + done.stderr).count("INFO loading fake")


EIGHT = ("sampling.temperature=0.5,0.7,0.9,1.0", "sampling.top_p=0.9,1.0")
MODELS, TEMPERATURES = "model=one,two", "sampling.temperature=0.5,0.7,0.9,1.0"


def test_jobs_that_want_the_same_engine_share_it(tmp_path: Path) -> None:
    assert loads("model=fake", *EIGHT, "experiment=generate", "sweep_dir=sweep", cwd=tmp_path) == 1
    assert len(list((tmp_path / "sweep").glob("*/metrics.json"))) == 8


@pytest.mark.parametrize("order", [(MODELS, TEMPERATURES), (TEMPERATURES, MODELS)], ids=["models first", "models last"])
def test_whatever_the_order_of_the_overrides(order: tuple[str, str], tmp_path: Path) -> None:
    assert loads(*order, "sweep_dir=sweep", cwd=tmp_path) == 2
    assert len(list((tmp_path / "sweep").glob("*/metrics.json"))) == 8


def test_jobs_that_need_two_engines_take_turns(tmp_path: Path) -> None:
    """Each samples with one engine and scores with another: two loads and one W&B run a job, all the same."""
    pair = ("experiment=onoff", "target=fake", "target.noise=0.3", "model=fake", "sampling.temperature=0.5,0.7,1.0")
    assert loads(*pair, "tracking=wandb", "sweep_dir=sweep", cwd=tmp_path) == 2
    for job in folders(tmp_path).values():
        assert len(list(job.glob("wandb/offline-run-*"))) == 1
        values = json.loads((job / "metrics.json").read_text())["values"]
        assert "generate/tokens_per_s" in values, "what was found before the job had to wait"
        assert values["onoff/kl_k3"] == values["onoff/fake-fake-auto-target/kl_k3"] > values["onoff/kl_k3_floor"]


ALONE = """
from rl_onoff.backends.fake.backend import FakeBackend
from rl_onoff.errors import EngineError
score = FakeBackend._score
def fails(self, responses, want):
    if len(responses) == 1 and self.config.noise:
        raise EngineError('alone')
    yield from score(self, responses, want)
FakeBackend._score = fails
def reward(text, answer, meta):
    return 1.0
"""


def test_jobs_that_do_again_what_failed_come_to_an_end(tmp_path: Path) -> None:
    """A rung that fails leaves nothing on disk, and its job takes no other step again for it."""
    (tmp_path / "alone.py").write_text(ALONE)
    stages = ("stages=[generate,score,attribute]", "score.own=false", "reward.function=alone.py:reward")
    stages = (*stages, "target=fake", "target.noise=0.3")
    done = rl_onoff("-m", *SMALL, *stages, "sampling.temperature=0.5,0.7,1.0", "sweep_dir=sweep", cwd=tmp_path)
    assert "sweep (3 done)" in done.stdout
    found = [json.loads((job / "attribution.json").read_text()) for job in folders(tmp_path).values()]
    assert len(found) == 3 and all("it failed (alone)" in json.dumps(one) for one in found)


def test_an_engine_that_may_be_broken_is_not_shared(tmp_path: Path) -> None:
    """The engine stays loaded between the steps of two jobs, and is loaded again after a step that failed."""
    config = config_of("backend=fake", "target=fake", "target.noise=0.3", "data.limit=1", "experiment=onoff")
    slot = Slot()
    fine, fails = (run_steps(config, tmp_path / name, slot) for name in ("fine", "fails"))
    wanted = [next(steps) for steps in (fine, fine, fine, fails, fails)]  # twice before anything, then before scoring
    assert wanted == [config.backend] * 5
    backend = slot.get(config.backend)
    assert backend.is_loaded()
    with pytest.raises(RuntimeError):
        fails.throw(RuntimeError())
    assert not backend.is_loaded()
    assert next(fine) == config.target
    assert slot.get(config.backend).is_loaded() and slot.get(config.backend) is not backend
    fine.close()


TAKES_THE_FIRST = """
import fcntl
from pathlib import Path
held = []
def reward(text, answer, meta):
    if Path('sweep/sampling.temperature=1.0').exists() and not held:  # the second job samples, the first one waits
        held.append(open('sweep/sampling.temperature=0.5/.lock', 'ab'))
        fcntl.flock(held[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
    return 1.0
"""
STOPS = """
import os, signal
from pathlib import Path
def reward(text, answer, meta):
    if Path('sweep/sampling.temperature=1.0').exists():
        os.kill(os.getpid(), signal.SIGINT)
    return 1.0
"""
PAIR = ("experiment=onoff", "target=fake", "target.noise=0.3", "sampling.temperature=0.5,1.0", "sweep_dir=sweep")


def test_a_job_whose_folder_is_taken_while_it_waits_fails_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(TAKES_THE_FIRST)
    done = rl_onoff("-m", *SMALL, *PAIR, "reward.function=mine.py:reward", cwd=tmp_path, code=2)
    assert "sweep (1 failed, 1 done)" in done.stdout
    assert done.stderr.startswith("rl-onoff: another process is writing to") and len(done.stderr.splitlines()) == 1


def test_ctrl_c_ends_the_trackers_of_the_jobs_that_wait_too(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(STOPS)
    offline = ("tracking=wandb", "tracking.mode=offline")
    rl_onoff("-m", *SMALL, *PAIR, *offline, "reward.function=mine.py:reward", cwd=tmp_path, code=130)
    jobs = folders(tmp_path)
    assert len(jobs) == 2
    for job in jobs.values():
        (file,) = log_files(job)
        assert [end["exit_code"] for end in records(file, "exit")] == [1], "ended as failed"


def test_a_table_ends_the_sweep(tmp_path: Path) -> None:
    jobs = ("experiment=onoff", "target=fake", "target.noise=0.0,0.3", "sampling.top_p=1.0,0", "sweep_dir=sweep")
    said = rl_onoff("-m", *SMALL, *jobs, cwd=tmp_path, code=2).stdout
    assert "sweep       sweep (2 failed, 2 done)" in said or "sweep       sweep (2 done, 2 failed)" in said
    assert re.search(r"target\.noise +sampling\.top_p +responses .* k3 KL +sampler's noise floor +verdict\n", said)
    rows = pd.read_csv(tmp_path / "sweep" / "sweep.csv")
    assert list(rows.columns[:6]) == ["folder", "target.noise", "sampling.top_p", "status", "error", "verdict"]
    assert rows["status"].tolist() == ["failed", "done", "failed", "done"] and rows["target.noise"].tolist() == [
        0,
        0,
        0.3,
        0.3,
    ]
    assert rows["error"][0].startswith("sampling.top_p is 0.0") and rows["verdict"][3] == "Off-policy"
    assert set(rows["folder"]) == set(folders(tmp_path)), "named by what was swept alone"
    assert all(name.count(",") == 1 for name in rows["folder"])

    rl_onoff("-m", *SMALL, *jobs[:3], "sampling.top_p=1.0,0.5", "sweep_dir=sweep", cwd=tmp_path)
    rows = pd.read_csv(tmp_path / "sweep" / "sweep.csv")
    assert len(rows) == 6, "jobs of an earlier sweep stay in the table"

    rl_onoff("-m", *SMALL, *jobs[:2], "target.noise=0.5", "sampling.top_p=1.0", "sweep_dir=sweep", cwd=tmp_path)
    assert "sampling.top_p=1.0,target.noise=0.5" in folders(tmp_path), (
        "named as the others are, though nothing is swept"
    )
    rl_onoff("-m", *SMALL, "experiment=generate", "sampling.top_p=0.7", "sweep_dir=other", cwd=tmp_path)
    rl_onoff("-m", *SMALL, "experiment=generate", "sampling.top_p=0.8", "sweep_dir=other", cwd=tmp_path)
    assert len(pd.read_csv(tmp_path / "other" / "sweep.csv")) == 2, "a sweep of one job has a name of its own too"


def test_a_command_after_a_sweep_in_one_process_knows_nothing_of_it(tmp_path: Path) -> None:
    small = [*SMALL, "experiment=generate"]
    commands = [["-m", *small, "sampling.n=1,2", "sweep_dir=sweep"], [*small, "run_dir=run"]]
    run = f"import sys\nfrom rl_onoff.cli.main import main\nfor command in {commands}:\n"
    run += "    sys.argv = ['rl-onoff', *command]\n    main()\n"
    done = subprocess.run(
        [sys.executable, "-c", run], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and done.stdout.count("sweep.csv") == 1, done.stdout + done.stderr
    assert done.stdout.rstrip().endswith(str(tmp_path / "run"))


def test_a_sweep_that_is_refused_fails_no_job_of_the_one_that_runs(tmp_path: Path) -> None:
    """It says so in the folder that it may not write to."""
    (tmp_path / "other.py").write_text(
        "from pathlib import Path\n"
        "def reward(text, answer, meta):\n"
        "    for folder in Path('sweep').glob('sampling.n=*'):\n"
        "        if not (folder / 'metrics.json').exists():\n"
        "            (folder / 'error.txt').write_text('another process is writing\\nexit code 2\\n')\n"
        "    return 1.0\n"
    )
    small = (
        "backend=fake",
        "model=fake",
        "tracking=none",
        "data.limit=2",
        "sampling.max_new_tokens=4",
        "experiment=generate",
    )
    done = rl_onoff("-m", *small, "reward.function=other.py:reward", "sampling.n=1,2", "sweep_dir=sweep", cwd=tmp_path)
    assert not list(tmp_path.glob("sweep/*/error.txt")) and "sweep (2 done)" in done.stdout


def test_a_refused_job_costs_the_others_no_engine(tmp_path: Path) -> None:
    small = ("data.limit=2", "sampling.max_new_tokens=4", "sweep_dir=sweep")
    done = rl_onoff(
        "-m", *FAKE, *small, "backend.worker=true", "data.prompt=question,nothing,null", cwd=tmp_path, code=2
    )
    text = done.stdout + done.stderr
    assert "the sweep goes on" in text and text.count("loading fake") == 1
    assert len(list((tmp_path / "sweep").glob("*/metrics.json"))) == 2
