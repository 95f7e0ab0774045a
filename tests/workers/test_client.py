"""An engine in a process of its own: streams, errors, deaths, and nothing left behind."""

from __future__ import annotations

import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from rl_onoff.backends import FakeBackendConfig, create_backend
from rl_onoff.errors import EngineDiedError, EngineError, MissingDependencyError, UsageError
from rl_onoff.types import Rollout, SampleRequest, Sampling, Want, sample_requests
from rl_onoff.workers import process, wire
from rl_onoff.workers.client import WorkerClient
from tests.conftest import ROOT
from tests.workers.tiny_backend import TinyBackend, generate


def tiny(worker: bool = True, python: str | None = None, **engine_kwargs) -> TinyBackend:
    return TinyBackend(FakeBackendConfig(model_name="tiny", worker=worker, python=python, engine_kwargs=engine_kwargs))


def request(id: str, num_tokens: int = 4, n: int = 1) -> list[SampleRequest]:
    return sample_requests(id=id, prompt_ids=np.arange(num_tokens), sampling=Sampling(n=n, seed=7))


def response(sample: int, num_tokens: int) -> Rollout:
    ids = np.arange(num_tokens, dtype=np.int32)
    return Rollout(request_id="r", sample=sample, prompt_ids=ids[:3], token_ids_T=ids)


def gone(pid: int, seconds: float = 10) -> bool:
    until = time.monotonic() + seconds
    while psutil.pid_exists(pid) and process.alive(psutil.Process(pid)) and time.monotonic() < until:
        time.sleep(0.05)
    return not psutil.pid_exists(pid) or not process.alive(psutil.Process(pid))


@pytest.fixture(autouse=True)
def nothing_left(tmp_path_factory, monkeypatch):
    """Every test leaves as many files, processes and descriptors as it found."""
    tmp_path_factory.getbasetemp()  # pytest's own is not to be below ours
    temporary = tempfile.mkdtemp(prefix="t-", dir="/tmp")  # ours alone: others may start workers at the same time
    monkeypatch.setattr(tempfile, "tempdir", temporary)
    monkeypatch.setenv("TMPDIR", temporary)

    def state():
        return (
            os.listdir(temporary),
            {child.pid for child in psutil.Process().children(recursive=True) if process.alive(child)},
            len(os.listdir("/proc/self/fd")),
        )

    before = state()
    yield
    try:
        assert state() == before
    finally:
        shutil.rmtree(temporary)


@pytest.fixture
def engine_file(tmp_path):
    return tmp_path / "engine"


def engine_of(file: Path) -> tuple[int, Path]:
    pid, memory = file.read_text().split()
    return int(pid), Path("/dev/shm") / memory


def test_completions_are_those_of_the_same_backend_in_this_process():
    requests = [request("a", 5, n=2), request("b", 100_000)]
    with tiny(worker=False) as here, tiny() as there:
        ours, theirs = list(generate(here._core, requests)), list(generate(there._core, requests))
    assert len(ours) == len(theirs) == 3
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine.key, mine.text, mine.kind, mine.finish_reason) == (
            other.key,
            other.text,
            other.kind,
            other.finish_reason,
        )
        for name in ("token_ids_T", "logprobs_T"):
            a, b = getattr(mine, name), getattr(other, name)
            assert a.dtype == b.dtype and np.array_equal(a, b)


def test_results_come_while_the_worker_goes_on():
    with tiny() as backend:
        stream = generate(backend._core, [request("a"), request("hang")])
        assert next(stream).request_id == "a"
        stream.close()


def test_big_arrays_arrive_whole_and_are_the_readers_own():
    with tiny() as backend:
        scores = list(backend.score([response(sample, 300) for sample in range(3)], Want(full_logits=True, top_k=2)))
    for s in scores:
        assert s.logits_TV.shape == (300, 50_000) and (s.logits_TV == s.sample).all() and s.top_ids_TK.shape == (300, 2)
        s.logits_TV[0, 0] = s.logprobs_T[0] = 5  # both may be written to
        assert s.logprobs_T.base is not s.logits_TV.base  # keeping the small one does not keep the big one alive


def test_a_worker_cannot_run_far_ahead_of_its_reader():
    with tiny() as backend:
        stream = backend.score([response(sample, 500) for sample in range(20)], Want(full_logits=True))  # 100 MB each
        next(stream)
        time.sleep(1)
        assert psutil.Process(backend._core.pid).memory_info().rss < 800 * 2**20
        stream.close()


def test_own_errors_arrive_as_themselves_with_the_log_as_a_note():
    with tiny() as backend:
        with pytest.raises(UsageError) as caught:
            list(generate(backend._core, [request("a"), request("usage")]))
        assert str(caught.value) == "a sentence of ours"
        assert "tiny is loading" in caught.value.__notes__[0]
        assert len(list(generate(backend._core, [request("a")]))) == 1, "the worker lives on"


def test_other_errors_become_engine_errors():
    with tiny() as backend, pytest.raises(EngineError) as caught:
        list(generate(backend._core, [request("bug")]))
    assert str(caught.value) == "KeyError: 'lost'"
    assert not isinstance(caught.value, EngineDiedError)
    assert "Traceback" in caught.value.__notes__[0]


@pytest.mark.parametrize(
    ("fail", "error", "words"),
    [
        ("missing", MissingDependencyError, "pip install"),
        ("usage", UsageError, "model.name is wrong"),
        ("bug", EngineError, "ZeroDivisionError: a bug"),
        ("exit", EngineDiedError, "exit code 3"),
    ],
)
def test_a_failed_load_is_one_named_error(fail, error, words):
    backend = tiny(fail=fail)
    with pytest.raises(error, match=words):
        backend.load()
    assert not backend.is_loaded()


def test_the_workers_death_is_told_with_what_was_in_flight():
    with tiny() as backend:
        began = time.monotonic()
        with pytest.raises(EngineDiedError, match="SIGKILL") as caught:
            list(generate(backend._core, [request("a"), request("die", n=2), request("b")]))
        assert time.monotonic() - began < 60
        assert caught.value.in_flight == (("b", 0), ("die", 0), ("die", 1))
        with pytest.raises(EngineDiedError, match="not running"):
            list(generate(backend._core, [request("a")]))


def test_a_killed_worker_is_noticed_and_takes_its_engine_along(engine_file):
    with tiny(engine=str(engine_file)) as backend:
        engine, memory = engine_of(engine_file)
        stream = generate(backend._core, [request("a"), request("hang")])
        next(stream)
        os.kill(backend._core.pid, signal.SIGKILL)
        with pytest.raises(EngineDiedError) as caught:
            next(stream)
        assert caught.value.in_flight == (("hang", 0),)
        assert gone(engine, 0) and not memory.exists()


def test_a_killed_child_of_the_engine_is_noticed(engine_file):
    with tiny(engine=str(engine_file)) as backend:
        engine, memory = engine_of(engine_file)
        stream = generate(backend._core, [request("a"), request("hang")])
        next(stream)
        began = time.monotonic()
        os.kill(engine, signal.SIGKILL)
        with pytest.raises(EngineDiedError, match=f"pid {engine}") as caught:
            next(stream)
        assert time.monotonic() - began < 60
        assert caught.value.in_flight == (("hang", 0),)
        assert not memory.exists()


def test_a_backend_can_be_loaded_again_after_a_death(engine_file):
    backend = tiny()
    with backend, pytest.raises(EngineDiedError):
        list(generate(backend._core, [request("die")]))
    with backend:
        assert len(list(generate(backend._core, [request("a")]))) == 1


@pytest.mark.parametrize("careless", ["", "leaves", "kills"])
def test_close_frees_everything(engine_file, careless):
    backend = tiny(engine=str(engine_file), careless=careless)
    backend.load()
    worker, (engine, memory) = backend._core.pid, engine_of(engine_file)
    shared = process.shared_memory([psutil.Process(worker)])
    assert memory in shared and any(path.name.startswith("sem.mp-") for path in shared)
    backend.close()
    assert gone(worker, 0) and gone(engine, 0) and not any(map(Path.exists, shared))
    backend.close()


def test_close_in_the_middle_of_work_does_not_wait_for_it(engine_file):
    backend = tiny(engine=str(engine_file))
    backend.load()
    stream = generate(backend._core, [request("a"), request("hang")])
    next(stream)
    stream.close()
    began = time.monotonic()
    backend.close()
    assert time.monotonic() - began < 60
    assert gone(engine_of(engine_file)[0], 0)


def test_an_abandoned_call_does_not_disturb_the_next():
    with tiny() as backend:
        for _ in backend.score([response(sample, 300) for sample in range(20)], Want(full_logits=True)):
            break
        assert [c.request_id for c in generate(backend._core, [request("a"), request("b")])] == ["a", "b"]


def test_a_call_that_another_one_displaced_says_so():
    with tiny(seconds=0.05) as backend:
        first = generate(backend._core, [request(str(i)) for i in range(10)])
        next(first)
        assert [c.request_id for c in generate(backend._core, [request("a")])] == ["a"]
        with pytest.raises(EngineError, match="another call"):
            next(first)


def test_warnings_of_the_package_reach_the_parent(caplog):
    with tiny() as backend, caplog.at_level(logging.WARNING):
        list(generate(backend._core, [request("warn")]))
    assert [(r.name, r.getMessage()) for r in caplog.records] == [("rl_onoff.tiny", "look here")]


def test_a_cancel_that_crosses_with_the_end_of_its_call_is_ignored():
    with tiny() as backend:
        backend._core._worker.channel.send(wire.Cancel(0))
        assert len(list(generate(backend._core, [request("a")]))) == 1


def test_the_same_interpreter_by_its_path():
    with tiny(python=sys.executable) as backend:
        assert backend.info.version == sys.executable
        assert len(list(generate(backend._core, [request("a")]))) == 1


def test_an_interpreter_that_is_not_there():
    with pytest.raises(UsageError, match=r"backend\.python=/nowhere/python cannot be run"):
        tiny(python="/nowhere/python").load()


def test_a_program_that_is_no_python():
    with pytest.raises(UsageError, match=r"backend\.python=\S*true cannot run a worker"):
        tiny(python="/bin/true").load()


def fake_python(tmp_path: Path, body: str) -> str:
    file = tmp_path / "python"
    file.write_text(f"#!{sys.executable}\n{body}")
    file.chmod(0o755)
    return str(file)


def test_an_interpreter_without_our_dependencies(tmp_path):
    python = fake_python(tmp_path, "import msgspec_that_is_not_there\n")
    with pytest.raises(
        MissingDependencyError, match=r"backend\.python=\S+ cannot run a worker of rl_onoff \(ModuleNotFoundError"
    ):
        tiny(python=python).load()


def test_another_version_of_the_protocol_is_one_sentence(tmp_path):
    python = fake_python(
        tmp_path,
        f"import os, sys, time\nos.write(int(sys.argv[3]), {(wire.PREAMBLE % 99).encode()!r})\ntime.sleep(60)\n",
    )
    with pytest.raises(EngineError, match="speaks version 99 of the worker protocol and this process version 4"):
        tiny(python=python).load()


def test_an_interpreter_that_says_nothing_is_not_waited_for_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr("rl_onoff.workers.client.HELLO_SECONDS", 1.0)
    with pytest.raises(UsageError, match="it said nothing"):
        tiny(python=fake_python(tmp_path, "import time\ntime.sleep(60)\n")).load()


def test_what_cannot_be_sent_is_refused():
    with pytest.raises(UsageError, match="engine_kwargs may only hold plain values"):
        tiny(thing=object()).load()


def test_a_backend_that_a_worker_cannot_import_is_refused(monkeypatch):
    monkeypatch.setattr(TinyBackend, "__module__", "__main__")
    with pytest.raises(UsageError, match="TinyBackend is defined in __main__, which a worker cannot import"):
        tiny().load()


def test_a_load_that_takes_long_is_not_silent(monkeypatch, caplog):
    monkeypatch.setattr("rl_onoff.workers.client.STILL_SECONDS", 0.5)
    caplog.set_level(logging.INFO)
    with tiny(load_seconds=1.8) as backend:
        said = [record.message for record in caplog.records if "still loading" in record.message]
        log_file = Path(said[0].rpartition("tail -f ")[2])
        assert "tiny is loading" in log_file.read_text()
        assert list(generate(backend._core, [request("a")]))
    assert 2 <= len(said) <= 4 and re.match(r"still loading fake after \d s; what it says: tail -f /", said[0])


def test_a_load_that_is_quick_says_nothing_of_it(caplog):
    caplog.set_level(logging.INFO)
    with tiny():
        pass
    assert "still loading" not in caplog.text


def test_the_log_is_kept_where_it_is_wanted(tmp_path, monkeypatch):
    monkeypatch.setenv(process.LOG_FOLDER, str(tmp_path / "logs"))
    with tiny() as backend, pytest.raises(EngineError) as caught:
        list(generate(backend._core, [request("bug")]))
    (log,) = (tmp_path / "logs").glob("tiny-*.log")
    assert "Traceback" in log.read_text() and str(log) in caught.value.__notes__[0]


def test_the_child_sees_this_package_but_not_its_neighbours(tmp_path):
    worker = process.WorkerProcess(TinyBackend, FakeBackendConfig(model_name="tiny"))
    try:
        (path,) = (worker._folder / "path",)
        assert {p.name for p in path.iterdir()} == {"rl_onoff", "tests"}
    finally:
        worker.close(0)


def test_the_fake_backend_in_a_worker_gives_what_it_gives_here():
    requests = [
        sample_requests(
            id=str(i), prompt_ids=np.arange(6, dtype=np.int32) + i, sampling=Sampling(max_new_tokens=9, n=2)
        )
        for i in range(5)
    ]
    results = []
    for worker in (False, True):
        with create_backend(FakeBackendConfig(model_name="fake", worker=worker)) as backend:
            completions = list(backend.complete(requests))
            results.append(
                (
                    completions,
                    list(backend.score(completions, Want(top_k=3, full_logits=True, sampler=Sampling(top_p=0.9)))),
                )
            )
    for here, there in zip(*(completions + scores for completions, scores in results), strict=True):
        for name in here.__dataclass_fields__:
            np.testing.assert_array_equal(getattr(here, name), getattr(there, name))


PARENT = """
import sys, time
import numpy as np
from tests.workers.tiny_backend import TinyBackend, generate
from rl_onoff.backends import FakeBackendConfig
from rl_onoff.types import Sampling, sample_requests

if __name__ == "__main__":
    with TinyBackend(FakeBackendConfig(model_name="tiny", engine_kwargs={"engine": sys.argv[1]})) as backend:
        print(backend._core.pid, flush=True)
        ids = np.arange(3, dtype=np.int32)
        requests = [sample_requests(id=i, prompt_ids=ids, sampling=Sampling()) for i in ("a", "hang")]
        for c in generate(backend._core, requests):
            print("got", c.request_id, flush=True)
"""


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGKILL, signal.SIGTERM])
def test_nothing_outlives_the_parent(engine_file, sign):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(engine_file)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )
    worker = int(parent.stdout.readline())
    assert parent.stdout.readline() == "got a\n"
    engine, _ = engine_of(engine_file)
    shared = process.shared_memory([psutil.Process(worker), psutil.Process(engine)])
    assert len(shared) == 2
    os.killpg(parent.pid, sign)  # as a terminal does
    parent.wait(60)
    assert gone(worker) and gone(engine)
    deadline = time.monotonic() + 60
    while any(map(Path.exists, shared)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(Path.exists, shared))
    if sign == signal.SIGINT:
        assert "KeyboardInterrupt" in parent.stderr.read()
    parent.stdout.close()
    parent.stderr.close()


def test_an_interrupt_leaves_the_host_usable_or_says_to_load_again():
    with tiny(seconds=0.2) as backend:
        stream = generate(backend._core, [request(str(i)) for i in range(20)])
        next(stream)
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        old = signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        try:
            with pytest.raises(KeyboardInterrupt):
                list(stream)
        finally:
            signal.signal(signal.SIGALRM, old)
        assert [c.request_id for c in generate(backend._core, [request("a")])] == ["a"]
        backend._core._worker.channel.torn = True
        with pytest.raises(EngineError, match="interrupted in the middle"):
            list(generate(backend._core, [request("a")]))


def test_host_is_a_core_of_its_own():
    host = WorkerClient(TinyBackend, FakeBackendConfig(model_name="tiny"))
    assert host.pid is None
    assert host._load().engine == "tiny"
    assert next(host._score([response(0, 5)], Want())).key == ("r", 0)
    host._close()
    host._close()
