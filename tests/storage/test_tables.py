"""The rows on disk: whole shards whatever happens, nothing lost, nothing twice, one writer at a time."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from rl_onoff.errors import OnOffError, UsageError
from rl_onoff.rundir.files import read_shard, whole, write_shard
from rl_onoff.rundir.table import (
    COMPLETIONS,
    RECORD,
    RunDir,
    Table,
    Writer,
    differences,
    rollout_of,
    row_of_rollout,
    row_of_scores,
    scores_of,
)
from rl_onoff.types import FinishReason, LogprobKind, Rollout, TokenScores
from tests.conftest import ROOT


def completion(i: int, sample: int = 0, length: int = 5) -> dict:
    """A completions row of which nothing is null but the reward."""
    ids = np.arange(i, i + length, dtype=np.int32)
    return {
        "request_id": f"r{i}",
        "sample": sample,
        "prompt": "p",
        "prompt_ids": ids,
        "token_ids": ids,
        "text": f"t{i}",
        "logprobs": -ids.astype(np.float32),
        "logprob_kind": "raw",
        "finish_reason": "length",
        "reward": None,
        "meta": "{}",
    }


def score(i: int, length: int = 3, top_k: int = 2) -> dict:
    floats = np.linspace(-1, 0, length, dtype=np.float32)
    return {
        "request_id": f"r{i}",
        "sample": 0,
        "token_ids": np.arange(length, dtype=np.int32),
        "logprobs": floats,
        "logprob_kind": "raw",
        "entropy": floats,
        "logsumexp": floats,
        "rank": np.ones(length, np.int32),
        "top_ids": np.ones((length, top_k), np.int32),
        "top_logprobs": np.ones((length, top_k), np.float32),
    }


def filled(path: Path, count: int = 6, **writer) -> Table:
    table = RunDir(path).completions
    with table.writer(**writer) as out:
        for i in range(count):
            out.append(completion(i))
    return table


# -- reading back ------------------------------------------------------------------------------------------------------


def test_rows_come_back_as_they_were(tmp_path):
    run = RunDir(tmp_path)
    rows = list(filled(tmp_path, 70, max_rows=30).rows())  # more than a batch, in three shards
    assert [row["request_id"] for row in rows] == [f"r{i}" for i in range(70)]
    for name, want in completion(69).items():
        np.testing.assert_array_equal(rows[69][name], want)
    assert rows[69]["token_ids"].dtype == np.int32 and rows[69]["logprobs"].dtype == np.float32
    with run.scores("mine").writer() as out:
        out.append(score(0))
        out.append(score(1, top_k=0))
    first, second = run.scores("mine").rows()
    assert first["top_ids"].shape == (3, 2) and second["top_ids"].shape == (3, 0)
    assert first["logits"] is None and first["processed_logprobs"] is None
    assert run.score_names() == ["mine"]


def test_rollouts_and_scores_come_back_as_they_were(tmp_path):
    run, ids = RunDir(tmp_path), np.arange(3, dtype=np.int32)
    floats = -ids.astype(np.float32)
    rollouts = [
        Rollout(
            request_id="a",
            sample=1,
            prompt_ids=ids[:2],
            token_ids_T=ids,
            logprobs_T=floats,
            kind=LogprobKind.scaled,
            text="t",
            finish_reason=FinishReason.eos,
            reward=0.5,
            meta={"answer": "é"},
        ),
        Rollout(request_id="b", sample=0, token_ids_T=ids[:0]),
    ]
    scores = [
        TokenScores(request_id="a", sample=1, token_ids_T=ids, logprobs_T=floats, kind=LogprobKind.processed),
        TokenScores(
            token_ids_T=ids,
            logprobs_T=floats,
            entropy_T=floats,
            logsumexp_T=floats,
            rank_T=ids,
            top_ids_TK=np.ones((3, 2), np.int32),
            top_logprobs_TK=np.ones((3, 2), np.float32),
            processed_logprobs_T=floats,
            nucleus_mass_T=floats,
            logits_TV=np.ones((3, 4), np.float32),
        ),
    ]
    with run.completions.writer() as out:
        for rollout in rollouts:
            out.append(row_of_rollout(rollout, "the prompt"))
    with run.scores("mine").writer() as out:
        for each in scores:
            out.append(row_of_scores(each))
    assert [row["prompt"] for row in run.completions.rows()] == ["the prompt"] * 2
    for found, wanted in zip(map(rollout_of, run.completions.rows()), rollouts, strict=True):
        same_fields(found, wanted)
    for found, wanted in zip(map(scores_of, run.scores("mine").rows()), scores, strict=True):
        same_fields(found, wanted)
    (first, _) = map(rollout_of, run.completions.rows(["request_id", "sample", "token_ids"]))
    same_fields(first, Rollout(request_id="a", sample=1, token_ids_T=ids))


def same_fields(found: object, wanted: object) -> None:
    for field in dataclasses.fields(wanted):
        one, other = getattr(found, field.name), getattr(wanted, field.name)
        np.testing.assert_equal(one, other, err_msg=field.name)
        assert getattr(one, "dtype", None) == getattr(other, "dtype", None), field.name


def test_only_the_columns_asked_for_are_read(tmp_path):
    assert next(filled(tmp_path).rows(["sample", "text"])) == {"sample": 0, "text": "t0"}
    assert filled(tmp_path / "other").keys() == {(f"r{i}", 0) for i in range(6)}


def test_pandas_alone_reads_the_folder(tmp_path):
    table = filled(tmp_path, max_rows=2)
    table.claim({"a": 1})
    frame = pd.read_parquet(table.path)
    assert len(table.shards()) == 3 and len(frame) == 6
    assert list(frame.columns) == list(COMPLETIONS)


def test_a_shard_is_closed_when_it_is_old_enough(tmp_path):
    table = RunDir(tmp_path).completions
    with table.writer(max_seconds=0.0) as out:
        out.append(completion(0))
        assert table.keys() == {("r0", 0)}, "before the writer is closed"


def test_a_shard_is_closed_when_it_is_large_enough(tmp_path):
    table = RunDir(tmp_path).scores("mine")
    with table.writer(max_bytes=5_000) as out:
        for i in range(6):
            out.append(score(i, length=100, top_k=2))  # 400 bytes in each of five columns, 800 in each of two
    assert [pq.read_metadata(shard).num_rows for shard in table.shards()] == [2, 2, 2]


def test_some_rows_of_a_shard_are_read_alone(tmp_path):
    table = filled(tmp_path, 70)
    [shard] = table.shards()
    rows = list(read_shard(shard, numbers=[0, 40, 69]))
    assert sorted(row["request_id"] for row in rows) == ["r0", "r40", "r69"]
    for row in rows:
        np.testing.assert_array_equal(row["token_ids"], completion(int(row["request_id"][1:]))["token_ids"])


def test_the_millionth_shard_comes_last(tmp_path):
    table = filled(tmp_path, 1)
    table.shards()[0].rename(table.path / "part-999999.parquet")
    for i in (1, 2):
        with table.writer() as out:
            out.append(completion(i))
    assert [row["request_id"] for row in table.rows()] == ["r0", "r1", "r2"]


def test_what_is_held_is_written_whatever_ends_the_stage(tmp_path):
    table = RunDir(tmp_path).completions
    with pytest.raises(KeyboardInterrupt), table.writer() as out:
        out.append(completion(0))
        raise KeyboardInterrupt
    assert table.keys() == {("r0", 0)}


# -- killed ------------------------------------------------------------------------------------------------------------

WRITER = """
import sys
from tests.storage.test_tables import completion
from rl_onoff.rundir.table import RunDir
table = RunDir(sys.argv[1]).completions
with table.writer(max_rows=3) as out:
    for i in range(int(sys.argv[2])):
        if (f"r{i}", 0) not in table.keys():
            out.append(completion(i, length=20_000))
"""


def test_a_killed_writer_leaves_whole_shards_and_the_next_one_completes_them(tmp_path):
    table, count = RunDir(tmp_path).completions, 60
    command = [sys.executable, "-c", WRITER, str(tmp_path), str(count)]
    for kills in range(1, 4):
        process = subprocess.Popen(command, cwd=ROOT)
        before, end = len(table.shards()), time.monotonic() + 60
        while len(table.shards()) < before + 2 and time.monotonic() < end:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        assert process.wait(timeout=30) == -signal.SIGKILL
        rows = list(table.rows())
        assert len(rows) == 3 * len(table.shards()) and 3 * kills <= len(rows) < count
    subprocess.run(command, cwd=ROOT, check=True, timeout=60)
    rows = [row["request_id"] for row in table.rows()]
    assert len(rows) == count and set(rows) == {f"r{i}" for i in range(count)}
    assert not list(table.path.glob(".part-*"))


def test_an_interrupt_after_the_rename_writes_no_row_twice(tmp_path):
    """The interrupt is real: it comes at every line of writing a shard in turn, as a signal would."""
    for line in range(1, 60):
        table = RunDir(tmp_path / str(line)).completions
        seen = 0

        def interrupt(frame, event, _, line=line):
            nonlocal seen
            if frame.f_code not in (Writer.flush.__code__, write_shard.__code__, whole.__wrapped__.__code__):
                return interrupt if event == "call" else None
            if event == "line":
                seen += 1
                if seen == line:
                    sys.settrace(None)
                    raise KeyboardInterrupt
            return interrupt

        before = sys.gettrace()
        try:
            with table.writer() as out:
                out.append(completion(0))
                sys.settrace(interrupt)
                out.flush()
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(before)
        assert [row["request_id"] for row in table.rows()] == ["r0"]
        if seen < line:
            assert line > 15
            return
    raise AssertionError("flush has more lines than were tried")


# -- the disk ----------------------------------------------------------------------------------------------------------


def test_a_full_disk_is_one_sentence_and_loses_nothing(tmp_path):
    table = filled(tmp_path)
    before = [row["request_id"] for row in table.rows()]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        full = pytest.raises(OnOffError, match=r"the disk that holds .* is full .*go on with the same run_dir")
        with full as caught, table.writer() as out:
            out.append(completion(100, length=100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert caught.value.exit_code == 1 and not isinstance(caught.value, UsageError)
    assert [row["request_id"] for row in table.rows()] == before
    assert not list(table.path.glob(".*"))
    with table.writer() as out:
        out.append(completion(100, length=100_000))
    assert len(table.keys()) == 7


def test_a_damaged_shard_is_named(tmp_path):
    table = filled(tmp_path, max_rows=2)
    shard = table.shards()[1]
    content = shard.read_bytes()
    for damaged in (b"", content[: len(content) // 2], content[:4] + b"\0" * 400 + content[404:]):
        shard.write_bytes(damaged)
        with pytest.raises(OnOffError, match="cannot be read") as caught:
            list(table.rows())
        assert str(shard) in str(caught.value) and "delete it and what it held is made again" in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1
    shard.unlink()
    assert len(table.keys()) == 4
    with table.writer() as out:
        out.append(completion(2))
    assert len(table.keys()) == 5 and len(table.shards()) == 3, "the next shard's number is free"


def test_a_damaged_record_is_named(tmp_path):
    table = filled(tmp_path)
    (table.path / RECORD).write_text('{"config": ')
    with pytest.raises(OnOffError, match=rf"{RECORD} cannot be read"):
        table.claim({"a": 1})


# -- what the rows depend on -------------------------------------------------------------------------------------------


def test_rows_of_another_config_are_refused_with_the_difference(tmp_path):
    table = RunDir(tmp_path).completions
    table.claim({"a": {"b": 1, "c": "x"}, "d": None})
    table.claim({"a": {"b": 2, "c": "x"}, "d": None})  # no row yet: nothing to protect
    filled(tmp_path)
    table.describe(engine={"engine": "fake"})
    table.claim({"a": {"b": 2, "c": "x"}, "d": None})
    with pytest.raises(UsageError) as caught:
        table.claim({"a": {"b": 3, "c": "x"}, "e": [1]})
    assert "(a.b: 2 -> 3; e: null -> [1])" in str(caught.value) and "set run_dir to a new folder" in str(caught.value)
    assert table.record() == {"config": {"a": {"b": 2, "c": "x"}, "d": None}, "engine": {"engine": "fake"}}


def test_the_record_holds_no_secret(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "key_7RbVn2YpJd")
    table = filled(tmp_path)
    table.claim({"hf_token": "abc", "header": "Bearer key_7RbVn2YpJd"})
    assert table.record() == {"config": {"hf_token": "***", "header": "Bearer ***"}}
    table.claim({"hf_token": "abd", "header": "Bearer key_7RbVn2YpJd"})


def test_differences_name_leaves():
    assert differences({"a": {"b": 1}, "c": [1]}, {"a": {"b": 1}, "c": [1]}) == []
    assert differences({"a": {"b": 1}}, {"a": 2, "x": "y"}) == ['a: {"b": 1} -> 2', 'x: null -> "y"']


def test_a_key_that_is_missing_counts_as_its_default():
    defaults = {"a": {"new": 1, "many": {}}}
    assert differences({"a": {}}, {"a": {"new": 1, "many": {}}}, defaults) == []
    assert differences({"a": {"new": 1}}, {"a": {}}, defaults) == []
    assert differences({"a": {}}, {"a": {"new": 2}}, defaults) == ["a.new: 1 -> 2"]
    assert differences({"a": None}, {"a": {"new": 1}}, defaults) == ['a: null -> {"new": 1}']
    assert differences({}, {"a": {"new": 1}}, defaults) == ['a: null -> {"new": 1}'], "a group of options is no option"
    assert differences({"a": {"gone": None}}, {"a": {}}) == [] and differences({"a": {"gone": 3}}, {"a": {}}) != []


# -- one writer --------------------------------------------------------------------------------------------------------

HOLDER = """
import sys, time
from rl_onoff.rundir.table import RunDir
with RunDir(sys.argv[1]).lock():
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_folder_has_one_writer_and_a_killed_one_leaves_no_lock(tmp_path):
    run = RunDir(tmp_path / "run")
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(run.path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        with (
            pytest.raises(
                UsageError, match=r"another process is writing to .*run: wait until it is done, or set run_dir"
            ),
            run.lock(),
        ):
            raise AssertionError("two at once")
        process.kill()
    with run.lock(), pytest.raises(UsageError), RunDir(run.path).lock():
        pass
    with run.lock():
        pass


def test_small_files_are_replaced_as_a_whole(tmp_path):
    run = RunDir(tmp_path)
    for value in ({"a": 1}, {"b": [1.5, "ü"]}):
        run.write_json("metrics.json", value)
        assert run.read_json("metrics.json") == value
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.json"]
    assert run.read_json("nothing.json") is None
    with pytest.raises(ValueError, match="JSON"):
        run.write_json("metrics.json", {"a": float("nan")})
    assert json.loads((tmp_path / "metrics.json").read_text()) == {"b": [1.5, "ü"]}
    assert os.listdir(tmp_path) == ["metrics.json"]
