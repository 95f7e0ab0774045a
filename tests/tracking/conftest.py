"""A run folder, and a wandb that starts afresh in every test."""

import os

import pytest


@pytest.fixture
def run_dir(tmp_path, monkeypatch):
    """A run folder on a machine where nobody is logged in. wandb reads the environment once, so it is shut down after
    each test."""
    for name in [name for name in os.environ if name.startswith("WANDB_")] + ["NETRC", "WANDB_ERROR_REPORTING"]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "outputs" / "12-00-00"
    folder.mkdir(parents=True)
    yield folder
    import wandb

    wandb.teardown()
