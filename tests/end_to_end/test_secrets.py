"""No secret in any file of a run, whichever way it came in."""

from __future__ import annotations

import contextlib
from pathlib import Path

import yaml

from rl_onoff.rundir.table import RunDir
from tests.end_to_end.conftest import SMALL, rl_onoff

GIVEN, ENVIRON = "hf_qXw93kTzLm", "key_7RbVn2YpJd"


def assert_absent(folder: Path, *secrets: str) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 5
    for path in files:
        content = path.read_bytes()
        assert not [secret for secret in secrets if secret.encode() in content], path
        assert not [secret for secret in secrets if secret in str(path)], path


def test_a_run_keeps_no_secret(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import logging, os\n"
        "def reward(text, answer, meta):\n"
        f"    logging.getLogger('some.library').warning('logging in with %s and %s', '{GIVEN}', os.environ['MY_API_KEY'])\n"
        "    return 1.0\n"
    )
    rl_onoff(
        *SMALL, "tracking=wandb", "run_dir=run", f"+backend.engine_kwargs.hf_token={GIVEN}", "reward.function=mine.py:reward",
        "+backend.engine_kwargs.header=${oc.env:MY_API_KEY}", f"+backend.engine_kwargs.more={{password: {GIVEN}}}",
        cwd=tmp_path, MY_API_KEY=ENVIRON, HOME=str(tmp_path), WANDB_MODE="offline",
    )  # fmt: skip
    assert_absent(tmp_path / "run", GIVEN, ENVIRON)
    assert "logging in with *** and ***" in (tmp_path / "run" / "run.log").read_text()
    overrides = yaml.safe_load((tmp_path / "run" / ".hydra" / "overrides.yaml").read_text())
    assert (
        "+backend.engine_kwargs.hf_token=***" in overrides
        and "+backend.engine_kwargs.header=${oc.env:MY_API_KEY}" in overrides
    )


def test_a_sweep_keeps_no_secret(tmp_path):
    secret = f"+backend.engine_kwargs.hf_token={GIVEN}"
    rl_onoff("-m", *SMALL, "experiment=generate", "sampling.n=1,2", secret, "sweep_dir=sweep", cwd=tmp_path)
    assert_absent(tmp_path / "sweep", GIVEN)
    assert yaml.safe_load((tmp_path / "sweep" / "multirun.yaml").read_text())["sampling"]["n"] == 1


def test_a_sweep_whose_folders_are_taken_keeps_no_secret(tmp_path):
    with contextlib.ExitStack() as taken:
        for n in (1, 2):
            taken.enter_context(RunDir(tmp_path / "sweep" / f"sampling.n={n}").lock())
        secret = f"+backend.engine_kwargs.hf_token={GIVEN}"
        rl_onoff("-m", *SMALL, "experiment=generate", "sampling.n=1,2", secret, "sweep_dir=sweep", cwd=tmp_path, code=2)
    assert all("another process is writing" in error.read_text() for error in tmp_path.glob("sweep/*/error.txt"))
    assert GIVEN not in (tmp_path / "sweep" / "multirun.yaml").read_text()


def test_an_error_that_quotes_a_secret_is_written_down_without_it(tmp_path):
    (tmp_path / "refuses.py").write_text(
        "from rl_onoff.backends.fake.backend import FakeBackend\n"
        "def load(self):\n    raise TypeError(f'no such keyword: {self.config.engine_kwargs}')\n"
        "FakeBackend._load = load\n"
        "def reward(text, answer, meta):\n    return 1.0\n"
    )
    jobs = ("experiment=generate", "sampling.n=1,2", "reward.function=refuses.py:reward", "sweep_dir=sweep")
    pointed_at = "+backend.engine_kwargs.hf_token=${oc.env:MINE}"  # a name in the environment that says nothing
    done = rl_onoff("-m", *SMALL, *jobs, pointed_at, cwd=tmp_path, code=1, MINE=GIVEN)
    assert_absent(tmp_path / "sweep", GIVEN)
    assert "no such keyword: {'hf_token': '***'}" in (tmp_path / "sweep" / "sweep.csv").read_text()
    assert GIVEN not in done.stdout + done.stderr


def test_another_secret_is_no_other_config(tmp_path):
    for secret in (GIVEN, ENVIRON):
        rl_onoff(
            *SMALL, "experiment=generate", f"+backend.engine_kwargs.hf_token={secret}", "run_dir=run", cwd=tmp_path
        )


def test_the_files_hydra_would_write_are_there_and_complete(tmp_path):
    rl_onoff(*SMALL, "experiment=generate", "run_dir=run", cwd=tmp_path)
    files = {path.stem: yaml.safe_load(path.read_text()) for path in (tmp_path / "run" / ".hydra").iterdir()}
    assert set(files) == {"config", "hydra", "overrides"}
    assert files["config"]["backend"]["model_name"] == "${model.name}" and files["config"]["sampling"]["n"] == 1
    assert files["hydra"]["hydra"]["mode"] == "RUN"
    assert files["overrides"][:2] == ["backend=fake", "model.name=fake"]
