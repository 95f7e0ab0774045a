"""W&B as it really behaves here: no login, no network, and what a run leaves in its folder, read with wandb's own
reader."""

import inspect
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import hydra
import numpy as np
import pytest

from rl_onoff.config import TrackingConfig, TrackingMode
from rl_onoff.errors import UsageError
from rl_onoff.tracking import NoTracker, Tracker, WandbTracker

CONFIG = {"model": {"name": "smollm2", "token": "hunter2"}, "sampling": {"n": 4, "temperature": 0.8}}
LONG_KEY = "fake0secret0value0" * 3  # long enough to pass for a key


def started(run_dir, *, config=CONFIG, group="sweep-7", job_type="generate", **options) -> WandbTracker:
    tracker = WandbTracker(TrackingConfig(**options))
    tracker.start(config=config, run_dir=run_dir, group=group, job_type=job_type)
    return tracker


def warnings(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "rl_onoff.tracking"]


def log_files(run_dir: Path) -> list[Path]:
    return sorted(run_dir.glob("wandb/offline-run-*/*.wandb"))


def inspect_run(file: Path, *options: str) -> str:
    """wandb's own reader: `wandb leet inspect`, since 0.31 has none in Python."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", *options, str(file)]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout


def records(file: Path, kind: str) -> list[dict]:
    """What was written, in its order."""
    lines = [json.loads(line) for line in inspect_run(file).splitlines()]
    return [line[kind] for line in lines if line["type"] == kind]


def state(file: Path) -> dict:
    """What the records add up to: config, summary, exit code."""
    return json.loads(inspect_run(file, "--summary"))


def assert_absent(secrets, *folders):
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    assert files
    for path in files:
        content = path.read_bytes()
        assert not [secret for secret in secrets if secret.encode() in content], path


def test_an_offline_run_is_read_back(run_dir, capfd):
    tracker = started(run_dir, tags=["demo"], table_rows=2)
    for done in (10, 20):
        tracker.log({"progress/responses": done, "progress/tokens_per_s": 5.0 * done})
    tracker.summary({"score/logprob_mean": -1.25, "reward/accuracy": None, "score/kind": "raw"})
    tracker.histogram("score/logprob_histogram", np.array([1, 2, 3]), np.array([-3.0, -2.0, -1.0, 0.0]))
    rows = ((f"q{i}", i if i else "many", None if i else np.float32(0.5), i == 0) for i in range(5))
    tracker.table("responses/table", ["question", "answer", "reward", "stopped"], rows, 5)
    assert next(rows)[0] == "q2", "rows beyond the cap are never made"
    page = run_dir / "report.html"
    page.write_text("<!doctype html><p>report</p>")
    tracker.html("report/page", page)
    where = tracker.where
    tracker.close(failed=False)

    [file] = log_files(run_dir)
    assert where == tracker.where
    assert str(file.parent) in where
    everything, run = state(file), records(file, "run")[0]
    assert everything["config"]["sampling"] == {"n": 4, "temperature": 0.8}
    assert (run["project"], run["run_group"], run["job_type"]) == ("rl_onoff", "sweep-7", "generate")
    assert (run["display_name"], run["tags"], everything["exit_code"]) == ("12-00-00", ["demo"], 0)
    history = [row["item"] for row in records(file, "history")]
    assert [row["progress/tokens_per_s"] for row in history if "progress/responses" in row] == [50, 100]
    steps = {metric.get("glob_name"): metric.get("step_metric") for metric in records(file, "metric")}
    assert steps["progress/*"] == "progress/responses"
    summary = everything["summary"]
    assert summary["score/logprob_mean"] == -1.25
    assert summary["score/kind"] == "raw"
    assert summary["progress/responses"] == {"max": 20}
    assert summary["progress/tokens_per_s"] == {"mean": 75}
    assert "reward/accuracy" not in summary
    assert summary["score/logprob_histogram"] == {"_type": "histogram", "values": [1, 2, 3], "bins": [-3, -2, -1, 0]}
    assert (summary["responses/table_shown"], summary["responses/table_total"]) == (2, 5)
    table = json.loads((file.parent / "files" / summary["responses/table"]["path"]).read_text())
    assert table["columns"] == ["question", "answer", "reward", "stopped"]
    assert table["data"] == [["q0", "many", 0.5, True], ["q1", "1", None, False]]
    assert (file.parent / "files" / summary["report/page"]["path"]).read_text() == page.read_text()
    assert not [path for path in (run_dir.parents[1] / "home").rglob("staging/*") if path.is_file()], (
        "all of it lies in the run folder"
    )
    assert capfd.readouterr() == ("", ""), "nothing on the terminal: its lines would tear a progress bar"


def test_a_failed_run_says_so(run_dir):
    started(run_dir).close(failed=True)
    assert records(log_files(run_dir)[0], "exit") == [{"exit_code": 1}]


def test_the_same_folder_goes_on_with_the_same_run(run_dir):
    started(run_dir).close(failed=True)
    time.sleep(1.1)  # wandb names folders by the second
    started(run_dir, config={**CONFIG, "stages": ["score"]}, job_type="score").close(failed=False)
    first, second = (records(file, "run")[0] for file in log_files(run_dir))
    assert first["run_id"] == second["run_id"] == (run_dir / "wandb" / "run_id").read_text().strip()
    assert second["resume"] is True


def test_two_jobs_in_one_process_are_two_runs(run_dir):
    """Hydra's own sweeper runs its jobs in one process; the first here is not even closed."""
    other = run_dir.parent / "1"
    other.mkdir()
    first, second = started(run_dir), started(other)
    first.log({"progress/responses": 1})
    second.log({"progress/responses": 2})
    first.close(failed=False)
    second.close(failed=False)
    assert [
        records(log_files(folder)[0], "history")[0]["item"]["progress/responses"] for folder in (run_dir, other)
    ] == [1, 2]


def test_the_run_folder_as_an_artifact(run_dir):
    (run_dir / ".hydra").mkdir()
    for name in (".hydra/config.yaml", "metrics.json", "run.log"):
        (run_dir / name).write_text("x")
    tracker = started(run_dir, artifact=True)
    tracker.artifact(run_dir)
    tracker.close(failed=False)
    [artifact] = records(log_files(run_dir)[0], "artifact")
    contents = artifact["manifest"]["contents"]
    assert [entry["path"] for entry in contents] == [".hydra/config.yaml", "metrics.json"]
    assert all(entry["local_path"].startswith(str(run_dir)) for entry in contents)


def test_no_artifact_unless_asked(run_dir):
    tracker = started(run_dir)
    tracker.artifact(run_dir)
    tracker.close(failed=False)
    assert records(log_files(run_dir)[0], "artifact") == []


def test_a_report_too_large_stays_on_disk(run_dir, monkeypatch, caplog):
    monkeypatch.setattr("rl_onoff.tracking.MAX_HTML_BYTES", 10)
    page = run_dir / "report.html"
    page.write_text("<p>longer than ten bytes")
    tracker = started(run_dir)
    tracker.html("report/page", page)
    tracker.close(failed=False)
    assert "stays on disk only" in caplog.text
    assert records(log_files(run_dir)[0], "history") == []


# --- secrets ----------------------------------------------------------------------------------------------------------


def test_no_secret_in_any_file(run_dir, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "fake-secret-value")
    monkeypatch.setenv("HF_TOKEN", "hf_fake_secret_value")
    tracker = started(run_dir, config={**CONFIG, "headers": "Bearer hf_fake_secret_value"})
    tracker.log({"progress/responses": 1})
    tracker.close(failed=False)
    assert_absent(["fake-secret-value", "hf_fake_secret_value", "hunter2"], run_dir, run_dir.parents[1] / "home")
    [file] = log_files(run_dir)
    config = state(file)["config"]
    assert config["model"] == {"name": "smollm2", "token": "***"}
    assert config["headers"] == "Bearer ***"


# --- where it goes, and when it may not start -------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["fake-secret-value", LONG_KEY])
@pytest.mark.parametrize("mode", list(TrackingMode))
def test_a_login_that_does_not_work(run_dir, monkeypatch, caplog, mode, key):
    """A key of the wrong form, and one for a server that takes the connection and never answers: bounded, never a
    hang."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", key)
        monkeypatch.setenv("WANDB_HTTP_TIMEOUT", "2")  # 10 without it
        before = time.monotonic()
        if mode is TrackingMode.online:
            with pytest.raises(UsageError, match=r"wandb login.*tracking\.mode=offline"):
                started(run_dir, mode=mode)
        else:
            tracker = started(run_dir, mode=mode)
            assert "offline" in tracker.where
            tracker.close(failed=False)
            assert ("there is a login but it does not work" in caplog.text) == (mode is TrackingMode.auto)
            assert_absent([key], run_dir)
        assert time.monotonic() - before < 60


def test_online_without_a_login_is_refused(run_dir):
    with pytest.raises(UsageError, match=r"not logged in.*wandb login.*tracking\.mode=offline"):
        started(run_dir, mode=TrackingMode.online)
    assert list(run_dir.iterdir()) == []


def test_auto_without_a_login_is_offline_and_silent(run_dir, caplog):
    tracker = started(run_dir)
    tracker.close(failed=False)
    assert "wandb sync" in tracker.where
    assert warnings(caplog) == []


@pytest.mark.parametrize(("mode", "files"), [("offline", 1), ("dryrun", 1), ("disabled", 0)])
def test_auto_follows_wandb_mode(run_dir, monkeypatch, mode, files):
    monkeypatch.setenv("WANDB_MODE", mode)
    tracker = started(run_dir, artifact=True)
    tracker.log({"progress/responses": 1})
    tracker.table("responses/table", ["a"], [[1]], 1)
    tracker.artifact(run_dir)
    assert bool(tracker.where) == bool(files)
    tracker.close(failed=False)
    assert len(log_files(run_dir)) == files


@pytest.mark.parametrize("mode", ["online", "sometimes"])
def test_a_wandb_mode_that_cannot_be_followed_is_refused(run_dir, monkeypatch, mode):
    monkeypatch.setenv("WANDB_MODE", mode)
    with pytest.raises(UsageError, match=r"tracking\.mode=offline"):
        started(run_dir)


def test_what_wandb_refuses_is_one_sentence(run_dir):
    with pytest.raises(UsageError, match="tracking=none") as caught:
        started(run_dir, project="a/b")
    assert "\n" not in str(caught.value)


# --- after the start --------------------------------------------------------------------------------------------------


def service_pids() -> list[int]:
    """wandb-core processes that are children of this one."""
    children = Path(f"/proc/{os.getpid()}/task").glob("*/children")
    pids = [int(pid) for file in children for pid in file.read_text().split()]
    return [pid for pid in pids if b"wandb-core" in Path(f"/proc/{pid}/cmdline").read_bytes()]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds wandb's service process in /proc")
def test_when_wandbs_service_is_killed_the_run_goes_on(run_dir, caplog):
    tracker = started(run_dir)
    tracker.log({"progress/responses": 1})
    for pid in service_pids():
        os.kill(pid, signal.SIGKILL)
    time.sleep(1.1)  # the connection notices, and the next run's folder is named by another second
    before = time.monotonic()
    for done in range(3):
        tracker.log({"progress/responses": done})
    tracker.summary({"score/logprob_mean": -1.0})
    tracker.table("responses/table", ["a"], [[1]], 1)
    tracker.close(failed=False)
    assert time.monotonic() - before < 60
    assert sum("log failed" in line for line in warnings(caplog)) == 1
    started(run_dir).close(failed=False)  # a sweep's next job in this process is tracked again
    assert len(records(log_files(run_dir)[-1], "exit")) == 1


def test_failing_calls_warn_once_a_kind(run_dir, caplog):
    tracker = started(run_dir)
    tracker.close(failed=False)
    for _ in range(3):
        tracker.log({"progress/responses": 1})
        tracker.summary({"score/logprob_mean": -1.0})
        tracker.html("report/page", run_dir / "missing.html")
    tracker.close(failed=False)
    assert [line.split()[1] for line in warnings(caplog)] == ["log", "summary", "html"]


def test_before_start_every_call_does_nothing(run_dir):
    tracker = WandbTracker(TrackingConfig())
    tracker.log({"progress/responses": 1})
    tracker.close(failed=True)
    assert tracker.where == ""


# --- the interface ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tracker", [NoTracker, WandbTracker])
def test_trackers_have_the_protocols_methods_with_its_signatures(tracker):
    methods = {
        name: method
        for name, method in vars(Tracker).items()
        if inspect.isfunction(method) and not name.startswith("_")
    }
    assert set(methods) >= {"start", "log", "summary", "histogram", "table", "html", "artifact", "close"}
    for name, method in methods.items():
        assert inspect.signature(getattr(tracker, name)) == inspect.signature(method), name
    assert isinstance(tracker.where, property)


@pytest.mark.parametrize("tracker", [NoTracker, WandbTracker])
def test_hydra_builds_it_from_its_target(tracker):
    config = TrackingConfig(_target_=f"rl_onoff.tracking.{tracker.__name__}")
    built = hydra.utils.instantiate({"_target_": config._target_}, config)
    assert type(built) is tracker
    assert built.config.project == "rl_onoff"


def test_importing_tracking_imports_no_wandb():
    code = "import sys, rl_onoff.tracking; sys.exit('wandb' in sys.modules or 'numpy' in sys.modules and 0)"
    subprocess.run([sys.executable, "-c", code], check=True)
