"""Many jobs from one command: each has its folder, one that fails does not stop the others, again does what is missing."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pandas as pd
import pytest

from rl_onoff.backends import FakeBackendConfig
from rl_onoff.slot import SharedSlot
from rl_onoff.sweeps.turns import NotItsTurn, Turn
from tests.end_to_end.conftest import FAKE, SMALL, rl_onoff, token_ids

SWEEP = ("-m", *SMALL, "model=fake-a,fake-b", "sampling.temperature=0.5,1.0", "experiment=generate", "sweep_dir=sweep")


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
    assert said.count("4 of 4 responses are there already") == 3
    assert {name: token_ids(folder) for name, folder in folders(tmp_path).items()} == ids


def test_a_job_that_fails_does_not_stop_the_others(tmp_path):
    done = rl_onoff("-m", *SMALL, "experiment=generate", "sampling.top_p=0.9,0,1.0", "sweep_dir=sweep", cwd=tmp_path, code=2)
    assert sum(1 for folder in folders(tmp_path).values() if (folder / "completions").exists()) == 2
    assert "failed and the sweep goes on: sampling.top_p is 0.0" in done.stdout
    assert done.stderr.startswith("rl-onoff: sampling.top_p is 0.0") and len(done.stderr.splitlines()) == 1


def test_an_error_nobody_foresaw_does_not_stop_the_others_either(tmp_path):
    (tmp_path / "mine.py").write_text("def reward(text, answer, meta):\n    return 1.0\nraise SystemError('a bug')\n")
    (tmp_path / "fine.py").write_text("def reward(text, answer, meta):\n    return 1.0\n")
    (tmp_path / "bug.py").write_text("from rl_onoff import run\ndef broken(*_):\n    raise RuntimeError('a bug')\nrun.summarise = broken\n"
                                     "def reward(text, answer, meta):\n    return 1.0\n")  # fmt: skip
    jobs = "reward.function=mine.py:reward,fine.py:reward,bug.py:reward"
    done = rl_onoff("-m", *SMALL, "experiment=generate", jobs, "sweep_dir=sweep", cwd=tmp_path, code=2)
    assert "2 jobs of the sweep failed, the first because: mine.py of reward.function" in done.stderr
    assert "RuntimeError: a bug" in done.stdout and "Error executing job" not in done.stderr
    assert len(list((tmp_path / "sweep").glob("*/metrics.json"))) == 1


def loads(*arguments: str, cwd: Path) -> int:
    """How many engines the log of a sweep says were loaded."""
    done = rl_onoff("-m", "backend=fake", "reward=none", "tracking=none", "data.limit=2", "sampling.max_new_tokens=4", *arguments, cwd=cwd)
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


def test_an_engine_that_may_be_broken_is_not_shared() -> None:
    one, other = (FakeBackendConfig(model_name=name) for name in ("one", "other"))
    slot = SharedSlot(Turn())
    with slot.job():
        backend = slot.get(one)
    with pytest.raises(NotItsTurn), slot.job():
        slot.get(other)
    assert slot.get(one) is backend and backend.is_loaded()
    with pytest.raises(RuntimeError), slot.job():
        raise RuntimeError
    assert not backend.is_loaded()
    assert slot.get(other).is_loaded()
    slot.end()


def test_a_table_ends_the_sweep(tmp_path: Path) -> None:
    jobs = ("experiment=onoff", "target=fake", "target.noise=0.0,0.3", "sampling.top_p=1.0,0", "sweep_dir=sweep")
    said = rl_onoff("-m", *SMALL, *jobs, cwd=tmp_path, code=2).stdout
    assert "sweep       sweep (2 failed, 2 done)" in said or "sweep       sweep (2 done, 2 failed)" in said
    assert re.search(r"target\.noise +sampling\.top_p +responses .* k3 KL +noise floor +verdict\n", said)
    rows = pd.read_csv(tmp_path / "sweep" / "sweep.csv")
    assert list(rows.columns[:6]) == ["folder", "target.noise", "sampling.top_p", "status", "error", "verdict"]
    assert rows["status"].tolist() == ["failed", "done", "failed", "done"] and rows["target.noise"].tolist() == [0, 0, 0.3, 0.3]
    assert rows["error"][0].startswith("sampling.top_p is 0.0") and rows["verdict"][3] == "Off-policy"
    assert set(rows["folder"]) == set(folders(tmp_path)), "named by what was swept alone"
    assert all(name.count(",") == 1 for name in rows["folder"])

    rl_onoff("-m", *SMALL, *jobs[:3], "sampling.top_p=1.0,0.5", "sweep_dir=sweep", cwd=tmp_path)
    rows = pd.read_csv(tmp_path / "sweep" / "sweep.csv")
    assert len(rows) == 6, "jobs of an earlier sweep stay in the table"


def test_a_refused_job_costs_the_others_no_engine(tmp_path: Path) -> None:
    small = ("data.limit=2", "sampling.max_new_tokens=4", "sweep_dir=sweep")
    done = rl_onoff("-m", *FAKE, *small, "backend.worker=true", "data.prompt=question,nothing,null", cwd=tmp_path, code=2)
    text = done.stdout + done.stderr
    assert "the sweep goes on" in text and text.count("loading fake") == 1
    assert len(list((tmp_path / "sweep").glob("*/metrics.json"))) == 2
