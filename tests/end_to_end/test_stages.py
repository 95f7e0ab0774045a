"""What a run leaves on disk, and that running again adds only what is missing."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time
import venv
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from rl_onoff.backends.fake.backend import FakeBackend
from rl_onoff.rundir.table import COMPLETIONS, score_columns
from tests.conftest import ROOT
from tests.end_to_end.conftest import COMMAND, FAKE, SMALL, environment, refused, rl_onoff, table, token_ids
from tests.running import run_in

SCORES = "fake-fake-auto"


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> tuple[Path, str]:
    """One finished run and what it printed; the tests below only read it."""
    folder = tmp_path_factory.mktemp("done")
    return folder / "run", rl_onoff(*SMALL, "sampling.n=2", "run_dir=run", cwd=folder).stdout


def test_a_refused_command_leaves_the_config_of_the_rows_alone(tmp_path):
    rl_onoff(*SMALL, "experiment=generate", "run_dir=run", cwd=tmp_path)
    before = {file.name: file.read_text() for file in (tmp_path / "run" / ".hydra").iterdir()}
    said = refused(*SMALL, "experiment=generate", "run_dir=run", "sampling.temperature=0.5", cwd=tmp_path)
    assert "holds rows of another config (sampling.temperature: 1.0 -> 0.5)" in said
    assert {file.name: file.read_text() for file in (tmp_path / "run" / ".hydra").iterdir()} == before


def test_analyse_says_what_it_found(done):
    run_dir, said = done
    for words in ("tokens/s", "mean logprob", "mean entropy", "perplexity", str(run_dir)):
        assert words in said
    assert {"completions", "scores", "metrics.json", "run.log", ".hydra"} <= {path.name for path in run_dir.iterdir()}
    assert json.loads((run_dir / "metrics.json").read_text())


def test_rows_are_those_asked_for_and_join(done):
    run_dir, _ = done
    responses, scores = table(run_dir / "completions"), table(run_dir / "scores" / SCORES)
    assert len(responses) == len(scores) == 8
    keys = ["request_id", "sample"]
    assert responses[keys].equals(scores[keys])
    for response, score in zip(responses.itertuples(), scores.itertuples(), strict=True):
        length = len(response.token_ids)
        assert response.token_ids.tolist() == score.token_ids.tolist()
        for name in (
            "logprobs",
            "entropy",
            "logsumexp",
            "rank",
            "top_ids",
            "top_logprobs",
            "processed_logprobs",
            "nucleus_mass",
        ):
            assert len(getattr(score, name)) == length, name
        np.testing.assert_allclose(response.logprobs, score.logprobs, atol=1e-5)  # one engine, temperature 1


def test_every_column_is_documented(done):
    run_dir, _ = done
    page = (ROOT / "docs/run_folder.md").read_text()
    for name, columns in (("completions", COMPLETIONS), ("scores", score_columns())):
        section = page.split(f"## {name}")[1].split("\n## ")[0]
        documented = re.findall(r"^\| `(\w+)` \| ([^|]+?) \|", section, re.MULTILINE)
        assert documented == list(columns.items()), name
    for path in run_dir.iterdir():
        assert f"`{path.name}" in page, path.name


def test_raising_n_or_the_limit_adds_only_what_is_missing(tmp_path):
    rl_onoff(*SMALL, "run_dir=run", "experiment=generate", cwd=tmp_path)
    first = token_ids(tmp_path / "run")
    said = rl_onoff(*SMALL, "run_dir=run", "sampling.n=3", "data.limit=5", cwd=tmp_path).stdout
    after = token_ids(tmp_path / "run")
    assert "4 of 15 responses found on disk" in said
    assert len(after) == 15 and all(after[key] == ids for key, ids in first.items())
    assert len(table(tmp_path / "run" / "scores" / SCORES)) == 15
    rl_onoff(*SMALL, "run_dir=fresh", "sampling.n=3", "data.limit=5", "experiment=generate", cwd=tmp_path)
    assert token_ids(tmp_path / "fresh") == after, "what is added is what a single run would have made"


def test_another_config_is_refused_with_the_difference_and_changes_nothing(done):
    run_dir, _ = done
    before = {path: path.read_bytes() for path in run_dir.rglob("*.parquet")}
    sentence = refused(*SMALL, "sampling.n=2", "sampling.temperature=0.7", f"run_dir={run_dir}", cwd=run_dir.parent)
    assert "sampling.temperature: 1.0 -> 0.7" in sentence and "set run_dir to a new folder" in sentence
    assert {path: path.read_bytes() for path in run_dir.rglob("*.parquet")} == before


def test_score_reads_an_earlier_run(tmp_path):
    rl_onoff(*SMALL, "run_dir=run", "experiment=generate", cwd=tmp_path)
    rl_onoff(*SMALL, "run_dir=run", "experiment=score", "score.name=mine", "backend.noise=0.1", cwd=tmp_path)
    responses, scores = table(tmp_path / "run" / "completions"), table(tmp_path / "run" / "scores" / "mine")
    assert [ids.tolist() for ids in responses.token_ids] == [ids.tolist() for ids in scores.token_ids]
    assert not np.allclose(np.concatenate(responses.logprobs), np.concatenate(scores.logprobs), atol=1e-3), (
        "another policy"
    )


def test_acceptance_is_judged_again_without_its_options(tmp_path):
    options = ("sampling.seed=${oc.env:SEED,3}", "target=fake", "target.noise=0.1", "acceptance.tokens=8")
    again = ("experiment=acceptance", "run_dir=run")
    rl_onoff(*FAKE, *again, *options, cwd=tmp_path)
    first = json.loads((tmp_path / "run/acceptance.json").read_text())
    done = rl_onoff(*again, "acceptance.k3=1e-4", cwd=tmp_path, code=4)
    assert "taken from the command before: " in done.stdout and "acceptance.tokens=8" in done.stdout
    second = json.loads((tmp_path / "run/acceptance.json").read_text())
    assert first["accepted"] and second["failed"] == ["truth"]
    assert [line["value"] for line in second["lines"]] == [line["value"] for line in first["lines"]]
    said = refused(*again, "backend.noise=0.3", cwd=tmp_path)
    assert "acceptance/drawn holds rows of another config (backend.noise: 0.0 -> 0.3)" in said
    said = refused(*again, "target=truth", cwd=tmp_path)  # an engine chosen anew has none of the other's options
    assert "acceptance/truth_greedy holds rows of another config" in said and "noise: 0.1 -> null" in said
    for folder in ("run_dir=new", "run_dir=~nobody_here/run"):  # what was refused is not taken up again
        refused("experiment=acceptance", *FAKE, folder, "target=truth", "target.dtype=bfloat16", cwd=tmp_path)
        rl_onoff("experiment=acceptance", *FAKE, folder, *options[1:], cwd=tmp_path)
    rl_onoff(*again, cwd=tmp_path, code=4)
    assert "rows of another config (seed: 3 -> 4" in refused(*again, cwd=tmp_path, SEED="4")


def test_two_names_of_one_engine_both_have_scores(tmp_path):
    """One config under three names, the sampler's own among them: none vanishes, and all say the same."""
    one = [f"+target@targets.{name}=fake" for name in ("one", "two")]
    small = [option.replace("model=", "model.name=") for option in SMALL]
    other = ("+target@targets.other=fake", "targets.other.noise=0.3")
    run = run_in(tmp_path / "run", *small, "experiment=onoff", *one, *other)
    tables = {name: table(run.path / "scores" / name) for name in (SCORES, "one", "two", "other")}
    assert set(run.score_names()) == set(tables) == set(run.read_json("metrics.json")["comparisons"])
    for name in ("one", "two"):
        pd.testing.assert_frame_equal(tables[name], tables[SCORES])
    assert not np.allclose(np.concatenate(tables["other"].logprobs), np.concatenate(tables["one"].logprobs), atol=1e-3)


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory) -> str:
    """The interpreter of an environment without any package."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, with_pip=False, symlinks=True)
    return str(folder / "bin" / "python")


MATRIX = ("experiment=matrix", "+backend@policies.a=fake", "+backend@policies.b=fake", "policies.b.noise=0.3")


LACKS = (
    "{0} lacks the package torch, which fake needs: BARE -m pip install torch, or set {1} to the interpreter of an"
    " environment that has it"
)
LATER = {  # an option that is wrong, the rest of the command -> what is said
    "policies.b.python=/nowhere/python": (
        MATRIX, "{0} cannot be run (No such file or directory): set {1} to a Python interpreter"
    ),
    "policies.b.python=/bin/echo": (
        MATRIX, "{0} cannot be run (it is no Python interpreter): set {1} to a Python interpreter"
    ),
    "policies.b.python=BARE": (MATRIX, LACKS),
    "target.python=BARE": (("experiment=onoff", "target=fake", "target.noise=0.3"), LACKS),
    "targets.far.python=BARE": (("experiment=onoff", "+target@targets.far=fake"), LACKS),
    "target.model_name=./nowhere": (
        ("stages=[generate,score,attribute]", "target=huggingface"),
        "model.name=./nowhere does not exist: set model.name to an existing folder or .gguf file, or to a hub id",
    ),
}  # fmt: skip


@pytest.mark.parametrize("wrong", LATER)
def test_what_a_later_step_lacks_is_said_before_any_engine_loads(
    wrong, bare_python, refused_here, tmp_path, monkeypatch
):
    monkeypatch.setattr(FakeBackend, "load", lambda self: pytest.fail("an engine was loaded"))
    rest, sentence = LATER[wrong]
    said = sentence.format(wrong, wrong.partition("=")[0]).replace("BARE", bare_python)
    assert refused_here(*SMALL, *rest, wrong.replace("BARE", bare_python), cwd=tmp_path) == said


@pytest.mark.parametrize(
    ("package", "install"), [("sglang", "pip install 'rl-onoff[sglang]'"), ("nowhere", "pip install nowhere")]
)
def test_an_engine_that_is_not_installed_is_said_with_what_brings_it(
    package, install, refused_here, tmp_path, monkeypatch
):
    """A folder of the package's name in the working folder is not the package."""
    (tmp_path / package).mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(
        sys, "path", [entry for entry in sys.path if not (Path(entry) / package / "__init__.py").exists()]
    )
    monkeypatch.setattr(FakeBackend, "package", package)
    assert refused_here(*SMALL, *MATRIX, cwd=tmp_path) == (
        f"policies.a is fake, which needs the package {package}: {install}, or set policies.a.python to the interpreter"
        " of an environment that has it"
    )


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_score_reads_responses_made_elsewhere(kind, tmp_path):
    rows = pd.DataFrame({"prompt": ["one", "two"], "response": ["first answer", "second"], "id": ["a", "b"]})
    file = tmp_path / f"rollouts.{kind}"
    rows.to_parquet(file) if kind == "parquet" else rows.to_json(file, orient="records", lines=True)
    for _ in range(2):  # again is nothing new
        rl_onoff(*FAKE, "experiment=score", f"score.responses={file.name}", "run_dir=run", cwd=tmp_path)
    scores = table(tmp_path / "run" / "scores" / SCORES)
    assert scores.request_id.tolist() == ["a", "b"]
    assert [bytes(ids.tolist()).decode() for ids in scores.token_ids] == ["first answer", "second"]


def test_a_users_own_reward_from_a_file(tmp_path):
    (tmp_path / "mine.py").write_text("def length(text, answer, meta):\n    return len(text) / 100\n")
    rl_onoff(*SMALL, "reward.function=mine.py:length", "experiment=generate", "run_dir=run", cwd=tmp_path)
    responses = table(tmp_path / "run" / "completions")
    assert responses.reward.tolist() == [len(text) / 100 for text in responses.text]


def test_tracking_offline_leaves_a_run_to_upload(tmp_path):
    offline = {"HOME": str(tmp_path), "WANDB_MODE": "offline"}
    said = rl_onoff(*SMALL, "tracking=wandb", "run_dir=run", cwd=tmp_path, **offline).stdout
    assert "wandb sync" in said
    assert len(list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))) == 1
    assert not (tmp_path / "wandb").exists()


# -- progress ----------------------------------------------------------------------------------------------------------


LONGER = (*FAKE, "data.limit=30", "sampling.max_new_tokens=100", "experiment=generate")


def test_progress_is_plain_lines_where_there_is_no_terminal(tmp_path):
    done = rl_onoff(*LONGER, "tracking.log_every_s=0.1", cwd=tmp_path)
    lines = re.findall(r"INFO generate: (\d+) of 30 responses, [\d,.]+ tokens/s, \d:\d\d:\d\d left", done.stdout)
    assert len(lines) >= 2 and lines[-1] == "30"
    assert "\r" not in done.stdout and done.stderr == ""


def test_progress_is_a_bar_on_a_terminal(tmp_path):
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    process = subprocess.Popen(
        [*COMMAND, *LONGER], cwd=tmp_path, env=environment(), stdout=subprocess.DEVNULL, stderr=theirs
    )
    os.close(theirs)
    shown, end = b"", time.monotonic() + 60
    while time.monotonic() < end:
        try:
            piece = os.read(ours, 4096)
        except OSError:  # the other end is closed
            break
        shown += piece
        if not piece:
            break
    os.close(ours)
    assert process.wait(timeout=30) == 0
    text = shown.decode()
    assert re.search(r"generate: 100%.*30/30 \[\d\d:\d\d<\d\d:\d\d,.*response/s, [\d.]+ tokens/s\]", text), text
