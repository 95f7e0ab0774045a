"""`old_run/` was made by the version before tables kept Rollouts and TokenScores:

experiment=onoff backend=fake model.name=x target=fake target.noise=0.1 data.limit=3 sampling.max_new_tokens=8
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from rl_onoff.backends.fake.config import FakeBackendConfig
from rl_onoff.backends.huggingface.config import HuggingFaceBackendConfig
from rl_onoff.errors import UsageError
from rl_onoff.pipeline.compare_inputs import own_scores
from rl_onoff.rundir.provenance import changes, engine_of
from rl_onoff.rundir.table import RECORD, RunDir, Table, rollout_of, scores_of
from rl_onoff.types import FinishReason, LogprobKind
from tests.running import run_in

OLD = Path(__file__).with_name("old_run")
COMMAND = ("backend=fake", "model.name=x", "target=fake", "target.noise=0.1", "sampling.max_new_tokens=8")


@pytest.fixture
def old(tmp_path: Path) -> RunDir:
    return RunDir(shutil.copytree(OLD, tmp_path / "run"))


def rewrite_record(table: Table, change) -> None:
    record = table.record()
    change(record["config"])
    (table.path / RECORD).write_text(json.dumps(record))


def test_it_is_read_back(old: RunDir) -> None:
    rollouts = {rollout.key: rollout for rollout in map(rollout_of, old.completions.rows())}
    assert set(rollouts) == {("money-01", 0), ("money-02", 0), ("money-03", 0)}
    first = rollouts["money-01", 0]
    assert first.meta["answer"] == "22" and first.finish_reason is FinishReason.length and first.reward == 0
    assert (
        first.kind is LogprobKind.raw
        and len(first.logprobs_T) == len(first.token_ids_T) == 8
        and len(first.prompt_ids) > 8
    )
    assert own_scores(old) == "fake-x-auto"
    for scores in map(scores_of, old.scores("fake-x-auto").rows()):
        assert np.array_equal(scores.token_ids_T, rollouts[scores.key].token_ids_T)
        np.testing.assert_allclose(scores.logprobs_T, rollouts[scores.key].logprobs_T, atol=1e-6)
        assert scores.top_logprobs_TK.shape == scores.top_ids_TK.shape == (8, 20) and scores.logits_TV is None


def test_it_is_compared_with_the_same_numbers(old: RunDir) -> None:
    before = old.read_json("metrics.json")
    values = run_in(old.path, *COMMAND, "experiment=compare").read_json("metrics.json")["values"]
    compared = {name: value for name, value in before["values"].items() if "tokens_per_s" not in name}
    assert len(compared) > 30
    assert {name: values[name] for name in compared} == pytest.approx(compared, rel=1e-6, abs=1e-9)


def test_it_is_continued(old: RunDir) -> None:
    before = {rollout.key: rollout.token_ids_T.tolist() for rollout in map(rollout_of, old.completions.rows())}
    run_in(old.path, *COMMAND, "experiment=onoff", "data.limit=3")
    assert len(old.completions.shards()) == 1, "nothing was missing"
    run_in(old.path, *COMMAND, "experiment=onoff", "data.limit=4")
    after = {rollout.key: rollout.token_ids_T.tolist() for rollout in map(rollout_of, old.completions.rows())}
    assert len(after) == 4 and before.items() <= after.items()
    for name in ("fake-x-auto", "fake-x-auto-target"):
        assert old.scores(name).keys() == after.keys()
    with pytest.raises(UsageError, match=r"another config \(sampling.temperature: 1.0 -> 0.5\)"):
        run_in(old.path, *COMMAND, "experiment=onoff", "sampling.temperature=0.5")


def test_an_option_that_the_record_does_not_know_counts_as_its_default(old: RunDir) -> None:
    for table in (old.completions, *map(old.scores, old.score_names())):
        rewrite_record(table, lambda config: config["backend"].pop("seed"))
    rewrite_record(old.completions, lambda config: (config["data"].pop("system"), config["sampling"].pop("min_p")))
    rewrite_record(old.scores("fake-x-auto"), lambda config: config["want"]["sampler"].pop("min_p"))
    other = old.scores("fake-x-auto-target")
    rewrite_record(other, lambda config: (config["backend"].pop("tp_size"), config["want"].pop("full_logits")))
    assert own_scores(old) == "fake-x-auto"
    run_in(old.path, *COMMAND, "experiment=onoff", "data.limit=4")
    assert len(old.completions.keys()) == 4 and own_scores(old) == "fake-x-auto"
    rewrite_record(old.completions, lambda config: config["backend"].pop("seed"))
    with pytest.raises(UsageError, match=r"another config \(backend.seed: 0 -> 3\)"):
        run_in(old.path, *COMMAND, "experiment=onoff", "data.limit=4", "backend.seed=3")


def test_the_engines_own_scores_are_known_by_a_record_that_lacks_an_option(old: RunDir) -> None:
    rewrite_record(old.completions, lambda config: config["backend"].pop("noise"))
    assert own_scores(old) == "fake-x-auto"


def test_a_second_name_of_an_option_counts_as_the_option() -> None:
    now = json.loads(
        json.dumps(HuggingFaceBackendConfig(model_name="m", dtype="float32", tp_size=2).what_it_computes())
    )
    now = {name: value for name, value in now.items() if name != "torch_dtype"}
    for before in (
        {**now, "torch_dtype": None},
        {**now, "torch_dtype": "float32"},
        {**now, "dtype": None, "torch_dtype": "float32"},
    ):
        assert changes({"backend": before}, {"backend": now}) == []
        engine = engine_of({"config": {"backend": before}}, [])
        assert isinstance(engine, HuggingFaceBackendConfig) and engine.weights_dtype == "float32"
    before = {**now, "torch_dtype": "bfloat16"}
    assert changes({"backend": before}, {"backend": now}) == ['backend.dtype: "bfloat16" -> "float32"']
    before = {**now, "tp_size": None, "tensor_parallel_size": 4}
    assert changes({"backend": before}, {"backend": now}) == ["backend.tp_size: 4 -> 2"]


def test_the_engine_of_a_record() -> None:
    record = json.loads((OLD / "completions" / RECORD).read_text())
    known = FakeBackendConfig(model_name="x", dp_size=2)
    assert engine_of(record, [FakeBackendConfig(model_name="y"), known]) is known, "it says where it runs, too"
    assert engine_of(record, []) == FakeBackendConfig(model_name="x")
    assert engine_of({"config": {"responses": "r.jsonl"}}, [known]) is None
    record["config"]["backend"]["_target_"] = "elsewhere.Backend"
    with pytest.raises(UsageError, match=r"the engine elsewhere.Backend of x is not registered here: install"):
        engine_of(record, [])
