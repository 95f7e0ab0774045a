"""Sweeps that others run: Hydra's launchers in processes of their own, Optuna, and an agent of `wandb sweep`."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import psutil
import pytest
import yaml

from tests.conftest import ROOT
from tests.end_to_end.conftest import COMMAND, FAKE, SMALL, continue_command, environment, refused, rl_onoff, token_ids
from tests.end_to_end.test_sweeps import BUG
from tests.tracking.test_tracking import log_files, records

LAUNCHERS = {
    "basic": (),
    "joblib": ("hydra.launcher.n_jobs=2",),
    "submitit_local": (),
    "ray": ("hydra.launcher.ray.init.address=local",),  # not whichever cluster this machine has
}


def launched_by(launcher: str) -> tuple[str, ...]:
    return ("-m", f"hydra/launcher={launcher}", *LAUNCHERS[launcher])


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_launcher_runs_all_jobs_and_again_what_is_missing(
    launcher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINE", "hunter2hunter2")
    secret = "+backend.engine_kwargs.hf_token=${oc.env:MINE}"
    options = (*launched_by(launcher), *SMALL, secret, "experiment=generate", "sweep_dir=sweep")
    done = rl_onoff(*options, "sampling.top_p=0,0.9", cwd=tmp_path, code=2)
    assert "Traceback" not in done.stdout + done.stderr
    assert done.stderr.splitlines()[-1].startswith("rl-onoff: sampling.top_p is 0.0 but must be above 0")
    assert re.search(
        r"sampling\.top_p .*\n +0 +failed\n +0\.9 +4 .*\n\n"
        r" +sweep +sweep \(1 failed, 1 done\)\n +table +sweep/sweep\.csv\n$",
        done.stdout,
    )
    rows = pd.read_csv(tmp_path / "sweep" / "sweep.csv")
    assert rows["folder"].tolist() == ["sampling.top_p=0", "sampling.top_p=0.9"] and rows["status"].tolist() == [
        "failed",
        "done",
    ]
    assert rows["error"][0].startswith("sampling.top_p is 0.0 but")
    left = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert not [file for file in left if b"hunter2hunter2" in file.read_bytes()]
    before = token_ids(tmp_path / "sweep" / "sampling.top_p=0.9")
    shards = {file: file.stat().st_mtime_ns for file in tmp_path.glob("sweep/*/completions/part-*")}

    if launcher not in ("ray", "basic"):  # Ray's start takes long
        rl_onoff(*options, "sampling.top_p=0.9,1.0", cwd=tmp_path)  # the earlier failure is not this sweep's
        assert "4 of 4 responses found on disk" in (tmp_path / "sweep" / "sampling.top_p=0.9" / "run.log").read_text()
        assert token_ids(tmp_path / "sweep" / "sampling.top_p=0.9") == before
        assert all(file.stat().st_mtime_ns == made for file, made in shards.items())
        assert pd.read_csv(tmp_path / "sweep" / "sweep.csv")["status"].tolist() == ["failed", "done", "done"]


KILLED = """
import os
def reward(text, answer, meta):
    os.kill(os.getpid(), 9)
def fine(text, answer, meta):
    return 1.0
"""


def test_a_job_that_is_killed_does_not_stop_the_others(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(KILLED)
    small = [option for option in SMALL if not option.startswith("reward=")]
    jobs = "reward.function=mine.py:reward,mine.py:fine"
    done = rl_onoff(
        *launched_by("submitit_local"), *small, "experiment=generate", jobs, "sweep_dir=sweep", cwd=tmp_path, code=1
    )
    last = done.stderr.splitlines()[-1]
    assert last.startswith("rl-onoff: the launcher lost a job (") and "sweep_dir=sweep does what is missing" in last
    assert "Traceback" not in done.stdout + done.stderr
    status = pd.read_csv(tmp_path / "sweep" / "sweep.csv").set_index("folder")["status"]
    assert status["reward.function=mine.py_:reward"] == "unfinished"
    assert status["reward.function=mine.py_:fine"] == "done", "waited for, although the first one is lost"


@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_stopping_a_launcher_leaves_nothing_behind(launcher: str, tmp_path: Path) -> None:
    sweep = (
        *launched_by(launcher),
        *FAKE,
        "data.limit=100",
        "sampling.max_new_tokens=1000",
        "experiment=generate",
        "sampling.seed=1,2",
    )
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(
        [*COMMAND, *sweep, "sweep_dir=sweep"], cwd=tmp_path, env=environment(), text=True, **pipes
    )
    end = time.monotonic() + 60
    while not any("INFO loading fake" in file.read_text() for file in tmp_path.glob("sweep/*/run.log")):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.1)
    started = psutil.Process(process.pid).children(recursive=True)
    assert started
    process.send_signal(signal.SIGINT)
    said, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in said + errors
    words = shlex.split(continue_command(said))
    assert words[1] == "-m" and words[-1] == "sweep_dir=sweep" and f"hydra/launcher={launcher}" in words
    assert not psutil.wait_procs(started, timeout=10)[1]


def test_an_error_nobody_foresaw_comes_home_as_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "bug.py").write_text(BUG)
    options = (*SMALL, "experiment=generate", "reward.function=bug.py:reward", "sweep_dir=sweep", "sampling.seed=1,2")
    done = rl_onoff(*launched_by("joblib"), *options, cwd=tmp_path, code=1, HYDRA_FULL_ERROR="1")
    last = done.stderr.splitlines()[-1]
    assert re.fullmatch(
        r"rl-onoff: 2 jobs of the sweep failed, the first because: RuntimeError: a bug \(more in sweep/.*/error\.txt\)",
        last,
    )
    assert "in broken" in done.stderr, "HYDRA_FULL_ERROR shows where"
    assert "in broken" in (tmp_path / "sweep" / "sampling.seed=1" / "error.txt").read_text()


# -- Optuna ------------------------------------------------------------------------------------------------------------


def optuna(*arguments: str) -> tuple[str, ...]:
    return (
        "-m",
        "hydra/sweeper=optuna",
        "hydra.sweeper.n_jobs=1",
        "hydra.sweeper.sampler.seed=1",
        *SMALL,
        *arguments,
        "sweep_dir=sweep",
    )


def test_optuna_minimises_with_one_engine_and_goes_on(tmp_path: Path) -> None:
    command = optuna(
        "hydra.sweeper.n_trials=4",
        "sampling.temperature=interval(0.3,1.5)",
        "metric=generate/perplexity",
        "experiment=analyse",
    )
    done = rl_onoff(*command, cwd=tmp_path)
    assert (done.stdout + done.stderr).count("INFO loading fake") == 1
    found = yaml.safe_load((tmp_path / "sweep" / "optimization_results.yaml").read_text())
    values = {
        folder.parent.name: json.loads(folder.read_text())["values"] for folder in tmp_path.glob("sweep/*/metrics.json")
    }
    assert len(values) == 4 and found["best_value"] == min(each["generate/perplexity"] for each in values.values())
    assert f"sampling.temperature={found['best_params']['sampling.temperature']}" in values
    assert "generate/perplexity" in done.stdout.splitlines()[-8], "the table shows what was asked for"

    again = rl_onoff(*command, cwd=tmp_path)
    assert again.stdout.count("4 of 4 responses found on disk") == 4 and "INFO loading" not in again.stdout


def test_a_trial_that_fails_does_not_stop_optuna(tmp_path: Path) -> None:
    command = optuna(
        "hydra.sweeper.n_trials=4",
        "sampling.top_p=choice(0.5,0)",
        "metric=onoff/kl_k3",
        "target=fake",
        "target.noise=0.3",
    )
    done = rl_onoff(*command, cwd=tmp_path, code=2)
    assert (
        done.stderr.splitlines()[-1].startswith("rl-onoff: sampling.top_p is 0.0")
        and "Traceback" not in done.stdout + done.stderr
    )
    assert yaml.safe_load((tmp_path / "sweep" / "optimization_results.yaml").read_text())["best_params"] == {
        "sampling.top_p": 0.5
    }
    command = optuna("hydra.sweeper.n_trials=2", "sampling.top_p=choice(0,-1)", "metric=onoff/kl_k3")
    done = rl_onoff(*command, cwd=tmp_path, code=2)
    assert "Traceback" not in done.stdout + done.stderr, "not Optuna's, when no trial is left"


REFUSED = {
    "metric=null": "this sweeper needs the name of the number it optimises: set metric=onoff/kl_k3, for example",
    "metric=onoff/kl_k33": "metric=onoff/kl_k33 is no number of a run: set metric=onoff/kl_k3",
    "metric=onof/kl_k3": "score, onoff, matrix, attribute, layers, acceptance: set metric=onoff/kl_k3",
    "metric=kl": "set metric=onoff/kl_k3",
    "metric=matrix/kl_k3_max": "a number that this experiment does not find: set experiment=matrix, or another metric",
}


@pytest.mark.parametrize("metric", REFUSED)
def test_a_metric_that_cannot_be_is_refused_before_the_first_trial(metric: str, refused_here, tmp_path: Path) -> None:
    assert refused_here(*optuna("sampling.temperature=interval(0.3,1.5)", metric), cwd=tmp_path).endswith(
        REFUSED[metric]
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("launcher", ["shared_engine", "joblib"])
def test_a_metric_that_no_run_has_ends_the_first_trial(launcher: str, tmp_path: Path) -> None:
    options = (
        "hydra.sweeper.n_trials=3",
        "sampling.temperature=interval(0.3,1.5)",
        "metric=score/fake-fake-aut/perplexity",
    )
    done = rl_onoff(*optuna(*options, f"hydra/launcher={launcher}"), cwd=tmp_path, code=2)
    assert done.stderr.splitlines()[-1].endswith("set metric=score/fake-fake-auto/perplexity, for example")
    assert "Traceback" not in done.stdout + done.stderr and len(list(tmp_path.glob("sweep/*/metrics.json"))) == 1


def test_optunas_database(tmp_path: Path) -> None:
    study = ("hydra.sweeper.storage=sqlite:///study.db", "hydra.sweeper.study_name=mine", "hydra.sweeper.n_trials=1")
    for trials in (1, 2):
        rl_onoff(
            *optuna(
                *study,
                f"hydra.sweeper.sampler.seed={trials}",
                "sampling.temperature=interval(0.3,1.5)",
                "metric=onoff/kl_k3",
            ),
            cwd=tmp_path,
        )
        assert len(list(tmp_path.glob("sweep/*/metrics.json"))) == trials


# -- W&B ---------------------------------------------------------------------------------------------------------------


def test_wandb_sweep(tmp_path: Path) -> None:
    """What an agent does with the shipped YAML, with wandb's own functions, but for asking the server what to try."""
    from wandb.sdk.launch.sweeps import utils
    from wandb.sdk.lib.config_util import save_config_file_from_dict

    config = utils.load_sweep_config(str(ROOT / "docs/wandb_sweep.yaml"))
    assert config is not None and config["metric"] == {"name": "onoff/kl_k3", "goal": "minimize"}
    chosen = {
        name: {"value": {"sampling.temperature": 0.5, "sampling.top_p": 0.9}[name]} for name in config["parameters"]
    }
    macros = {
        **utils.create_sweep_command_args({"args": chosen}),
        "env": ["/usr/bin/env"],
        "program": [config["program"]],
    }
    command = []
    for word in utils.create_sweep_command(config["command"]):
        command += macros[word[2:-1]] if word.startswith("${") and word.endswith("}") else [word]
    save_config_file_from_dict(str(tmp_path / "parameters.yaml"), chosen)
    agent = {
        "WANDB_SWEEP_ID": "sweep123",
        "WANDB_RUN_ID": "run4567",
        "WANDB_PROJECT": "theirs",
        "WANDB_MODE": "offline",
    }
    agent |= {"WANDB_SWEEP_PARAM_PATH": str(tmp_path / "parameters.yaml"), "WANDB_DIR": str(tmp_path)}
    agent["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    small = ("target=fake", *(option for option in SMALL if not option.startswith("tracking=")))
    for _ in range(2):  # a run that is given again, as after preemption, goes on
        done = subprocess.run(
            [*command, *small], cwd=tmp_path, env=environment(**agent), capture_output=True, text=True, timeout=120
        )
        assert (done.returncode, done.stderr) == (0, ""), "nothing of ours is ignored with a warning"
    assert "4 of 4 responses found on disk" in done.stdout
    folder = tmp_path / "outputs/wandb/sweep123/run4567"
    assert "onoff/kl_k3" in json.loads((folder / "metrics.json").read_text())["values"]
    (run, *_) = records(log_files(folder)[0], "run")
    text = json.dumps(run)
    assert '"run4567"' in text and '"sweep123"' in text and '"theirs"' in text
    assert "sampling.temperature" in text, "the sweep's own plots need its parameters by their names"


def test_without_the_plugin_a_launcher_says_what_brings_it(tmp_path: Path) -> None:
    assert "pip install 'rl-onoff[launchers]'" in refused(
        "-m", *SMALL, "hydra/launcher=nowhere", "sampling.n=1,2", cwd=tmp_path
    )
