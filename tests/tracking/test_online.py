"""An online run, against the few answers of W&B's server that wandb-core needs to begin, resume and end a run."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from rl_onoff.config import TrackingConfig, TrackingMode
from rl_onoff.errors import UsageError
from rl_onoff.tracking import WandbTracker

KEY = "fake0secret0value0" * 3


class Server(ThreadingHTTPServer):
    """Keeps the last upsert of the one run it knows; `down` makes every later answer a 503, `refusing` denies the
    upsert."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.down = self.refusing = False
        self.upserts: list[dict] = []

    def answer(self, operation: str, variables: dict) -> dict:
        project = {"id": "p", "name": "rl_onoff", "entity": {"id": "e", "name": "me"}}
        if operation == "Viewer":
            return {"viewer": {"id": "1", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}}
        if operation == "RunResumeStatus":
            resumable = {
                "historyTail": '["{\\"_step\\":1}"]',
                "eventsTail": "[]",
                "summaryMetrics": "{}",
                "config": "{}",
                "tags": [],
            }
            counts = {"historyLineCount": 2, "logLineCount": 0, "eventsLineCount": 0}
            return {
                "model": {**project, "bucket": {"id": "b", "name": variables["name"], **resumable, **counts}}
                if self.upserts
                else None
            }
        if operation == "UpsertBucket" and not self.refusing:
            self.upserts.append(variables)
            return {
                "upsertBucket": {
                    "inserted": len(self.upserts) == 1,
                    "bucket": {"id": "b", "name": variables["name"], "project": project},
                }
            }
        return {}


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        answer = {}
        if self.path == "/graphql":
            request = json.loads(body)
            data = self.server.answer(request["operationName"], request.get("variables") or {})
            answer = {"data": data} if data else {"errors": [{"message": "permission denied"}]}
        content = json.dumps(answer).encode()
        self.send_response(503 if self.server.down else 200)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args) -> None:
        pass


@pytest.fixture
def server(run_dir, monkeypatch):
    """Logged in to a server of our own."""
    with Server() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_address[1]}")
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        yield server
        server.shutdown()


def started(run_dir, **options) -> WandbTracker:
    tracker = WandbTracker(TrackingConfig(**options))
    tracker.start(config={"model": {"name": "smollm2"}}, run_dir=run_dir, group="sweep-7", job_type="generate")
    return tracker


def test_auto_is_online_when_logged_in_and_a_second_start_resumes(server, run_dir, capfd):
    for _ in range(2):
        tracker = started(run_dir)
        tracker.log({"progress/responses": 1})
        tracker.close(failed=False)
        assert tracker.where.startswith("http://127.0.0.1") and "/me/rl_onoff/runs/" in tracker.where
    begun = [upsert for upsert in server.upserts if upsert["groupName"]]
    assert [upsert["groupName"] for upsert in begun] == ["sweep-7", "sweep-7"]
    assert {upsert["name"] for upsert in server.upserts} == {(run_dir / "wandb" / "run_id").read_text().strip()}
    assert json.loads(begun[0]["config"])["model"] == {"value": {"name": "smollm2"}}
    assert capfd.readouterr() == ("", "")
    for path in run_dir.rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes(), path


def test_a_server_that_goes_away_delays_the_end_by_a_bounded_time(server, run_dir, monkeypatch):
    monkeypatch.setattr("rl_onoff.tracking.FINISH_TIMEOUT_S", 2.0)
    tracker = started(run_dir)
    server.down = True
    tracker.log({"progress/responses": 1})
    before = time.monotonic()
    tracker.close(failed=False)
    assert time.monotonic() - before < 60


@pytest.mark.parametrize("mode", [TrackingMode.auto, TrackingMode.online])
def test_a_server_that_refuses_the_run_stops_it(server, run_dir, mode):
    """Logged in, but not allowed into this project: a configured tracker must start, so auto does not go offline over
    it."""
    server.refusing = True
    with pytest.raises(UsageError, match=r"permission denied.*tracking\.mode=offline"):
        started(run_dir, mode=mode, entity="someone-else")
