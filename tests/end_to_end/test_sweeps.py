"""Many jobs from one command: each has its folder, one that fails does not stop the others, again does what is missing."""

from __future__ import annotations

from pathlib import Path

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


def test_jobs_that_want_the_same_engine_share_it(tmp_path: Path) -> None:
    done = rl_onoff("-m", *FAKE, "data.limit=2", "sampling.max_new_tokens=4", "sampling.temperature=0.5,0.7,1.0", cwd=tmp_path)
    assert (done.stdout + done.stderr).count("loading fake") == 1
    done = rl_onoff(
        "-m", "backend=fake", "model=one,two", "reward=none", "tracking=none", "data.limit=2", "sampling.max_new_tokens=4",
        "sampling.temperature=0.5,1.0", cwd=tmp_path,
    )  # fmt: skip
    assert (done.stdout + done.stderr).count("loading fake") == 2


def test_a_refused_job_costs_the_others_no_engine(tmp_path: Path) -> None:
    small = ("data.limit=2", "sampling.max_new_tokens=4", "sweep_dir=sweep")
    done = rl_onoff("-m", *FAKE, *small, "backend.worker=true", "data.prompt=question,nothing,null", cwd=tmp_path, code=2)
    text = done.stdout + done.stderr
    assert "the sweep goes on" in text and text.count("loading fake") == 1
    assert len(list((tmp_path / "sweep").glob("*/metrics.json"))) == 2
