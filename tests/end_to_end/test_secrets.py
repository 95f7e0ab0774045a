"""Secrets come from the environment alone: a literal one is refused, and one that an interpolation brings is in no file
of a run."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.end_to_end.conftest import SMALL, refused, rl_onoff
from tests.tracking.test_tracking import log_files, state

GIVEN, ENVIRON = "hf_qXw93kTzLm", "key_7RbVn2YpJd"


def assert_absent(folder: Path, *secrets: str, least: int = 5) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > least
    for path in files:
        content = path.read_bytes()
        assert not [secret for secret in secrets if secret.encode() in content], path
        assert not [secret for secret in secrets if secret in str(path)], path


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ([f"+backend.engine_kwargs.hf_token={GIVEN}"], "backend.engine_kwargs.hf_token"),
        ([f"backend.engine_kwargs.hf_token={GIVEN}"], "backend.engine_kwargs.hf_token"),
        ([f"++target.engine_kwargs.apiKey='{GIVEN}'"], "target.engine_kwargs.apiKey"),
        ([f"+backend.engine_kwargs.more={{password: {GIVEN}}}"], "backend.engine_kwargs.more.password"),
        (["+backend.engine_kwargs.password=12345678"], "backend.engine_kwargs.password"),
        ([f"+backend.engine_kwargs.credentials=[me,{GIVEN}]"], "backend.engine_kwargs.credentials"),
        (["-m", f"+backend.engine_kwargs.hf_token={GIVEN},{ENVIRON}"], "backend.engine_kwargs.hf_token"),
        ([f"+backend.engine_kwargs.hf_token=~{GIVEN}"], "backend.engine_kwargs.hf_token"),  # Hydra cannot read it
        ([f"data.path=https://me:{GIVEN}@host/rows.jsonl"], "data.path"),
        (["-m", f"+hydra.sweeper.storage=postgresql://me:{GIVEN}@host/db", "sampling.n=1,2"], "hydra.sweeper.storage"),
        ([f"pool.runtime_env={{env_vars: {{HF_TOKEN: {GIVEN}}}}}"], "pool.runtime_env.env_vars.HF_TOKEN"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_a_literal_secret_is_refused_before_anything_is_written(typed, name, refused_here, tmp_path):
    sentence = refused_here(*SMALL, *typed, cwd=tmp_path)
    variable = name.rpartition(".")[2].upper()
    assert f"{name} is a literal secret: export it and set '" in sentence
    assert f"{name}=${{oc.env:{variable}}}'" in sentence
    assert GIVEN not in sentence and "12345678" not in sentence
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "typed", ["experiment=mine", "-m experiment=mine sampling.n=1,2", "-m experiment=mine,generate"]
)
def test_a_literal_secret_in_a_file_of_the_users_own_is_refused_too(typed, tmp_path):
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    own = {"stages": ["generate"], "backend": {"engine_kwargs": {"hf_token": GIVEN}}}
    (tmp_path / "conf" / "experiment" / "mine.yaml").write_text(f"# @package _global_\n{yaml.safe_dump(own)}")
    folders = ("run_dir=out/run", "sweep_dir=out/sweep")
    done = rl_onoff("-cd", str(tmp_path / "conf"), *SMALL, *typed.split(), *folders, cwd=tmp_path, code=2)
    last = done.stderr.splitlines()[-1]
    assert last.startswith(
        "rl-onoff: backend.engine_kwargs.hf_token is a literal secret: export it and set '++backend."
    )
    assert GIVEN not in done.stdout + done.stderr and "Traceback" not in done.stdout + done.stderr
    if (tmp_path / "out").exists():
        assert_absent(tmp_path / "out", GIVEN, least=-1)


def test_a_run_keeps_no_secret_of_the_environment(tmp_path):
    (tmp_path / "mine.py").write_text("def reward(text, answer, meta):\n    return 1.0\n")
    pointed_at = ("+backend.engine_kwargs.x_token=${oc.env:MINE}", "+backend.engine_kwargs.header=${oc.env:MY_API_KEY}")
    options = (*SMALL, "tracking=wandb", "run_dir=run", "reward.function=mine.py:reward", *pointed_at)
    environ = {"MINE": GIVEN, "MY_API_KEY": ENVIRON, "HOME": str(tmp_path), "WANDB_MODE": "offline"}
    rl_onoff(*options, cwd=tmp_path, **environ)
    assert_absent(tmp_path / "run", GIVEN, ENVIRON)
    hydra = tmp_path / "run" / ".hydra"
    assert set(pointed_at) < set(yaml.safe_load((hydra / "overrides.yaml").read_text()))
    kwargs = {"x_token": "${oc.env:MINE}", "header": "${oc.env:MY_API_KEY}"}
    assert yaml.safe_load((hydra / "config.yaml").read_text())["backend"]["engine_kwargs"] == kwargs
    [file] = log_files(tmp_path / "run")
    assert state(file)["config"]["backend"]["engine_kwargs"] == {"x_token": "***", "header": "***"}
    said = rl_onoff(*options, cwd=tmp_path, **{**environ, "MINE": "another-secret"}).stdout
    assert "4 of 4 responses found on disk" in said, "another secret is no other config"


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


def test_a_sweep_over_secrets_keeps_none_in_the_names_of_its_folders(tmp_path):
    jobs = "+backend.engine_kwargs.hf_token=${oc.env:MINE},${oc.env:MY_API_KEY}"
    environ = {"MINE": GIVEN, "MY_API_KEY": ENVIRON}
    rl_onoff("-m", *SMALL, "experiment=generate", jobs, "sweep_dir=sweep", cwd=tmp_path, **environ)
    assert_absent(tmp_path / "sweep", GIVEN, ENVIRON)
    names = {path.parent.name for path in (tmp_path / "sweep").glob("*/metrics.json")}
    assert names == {f"+backend.engine_kwargs.hf_token=$_{{oc.env_:{name}_}}" for name in environ}  # Hydra's \\ is a _


def test_the_files_hydra_would_write_are_there_and_complete(tmp_path):
    rl_onoff(*SMALL, "experiment=generate", "run_dir=run", cwd=tmp_path)
    files = {path.stem: yaml.safe_load(path.read_text()) for path in (tmp_path / "run" / ".hydra").iterdir()}
    assert set(files) == {"config", "hydra", "overrides"}
    assert files["config"]["backend"]["model_name"] == "${model.name}" and files["config"]["sampling"]["n"] == 1
    assert files["hydra"]["hydra"]["mode"] == "RUN"
    assert files["overrides"][:2] == ["backend=fake", "model.name=fake"]


def test_an_interpolation_without_its_variable_is_one_sentence(tmp_path):
    sentence = refused(*SMALL, "+backend.engine_kwargs.hf_token=${oc.env:NOT_EXPORTED}", cwd=tmp_path)
    assert "NOT_EXPORTED" in sentence
