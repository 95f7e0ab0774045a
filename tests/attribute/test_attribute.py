"""A planted mismatch is found and named, and nothing is named where there is none."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rl_onoff.analysis_config import Rung
from rl_onoff.attribution import state
from rl_onoff.attribution.state import gap
from rl_onoff.errors import UsageError
from rl_onoff.rundir.table import RunDir
from rl_onoff.types import TokenScores
from tests.running import rewrite, run_in

FAKE = ("backend=fake", "target=fake", "sampling.max_new_tokens=24", "data.limit=6")
LABELLED_RAW = {"logprob_kind": "raw"}


def climb(folder: RunDir, *overrides: str) -> dict[str, Any]:
    """The ladder on a run folder; what it wrote, with its rows by rung."""
    run_in(folder.path, "experiment=attribute", *overrides)
    found = folder.read_json("attribution.json")
    return {**found, "rows": {row["rung"]: row for row in found["rows"]}}


def main_cause(found: dict[str, Any]) -> str:
    shares = {name: row["share"] for name, row in found["rows"].items() if row["share"] is not None and name != "noise"}
    return max(shares, key=shares.__getitem__)


def k3(q: np.ndarray, p: np.ndarray) -> float:
    l_N = p.astype(np.float64) - q.astype(np.float64)
    return float(np.mean(np.exp(l_N) - l_N - 1))


def both(folder: RunDir, target: str, column: str = "logprobs") -> tuple[np.ndarray, np.ndarray]:
    """All logprobs of the behaviour and of a target, token by token, read without the code under test."""
    p = {row["request_id"]: row[column] for row in folder.scores(target).rows()}
    rows = list(folder.completions.rows())
    return np.concatenate([row["logprobs"] for row in rows]), np.concatenate([p[row["request_id"]] for row in rows])


def test_every_rung_has_a_row(tmp_path: Path) -> None:
    found = climb(run_in(tmp_path / "run", "experiment=onoff", *FAKE, "target.noise=0.3"), *FAKE, "target.noise=0.3")
    assert list(found["rows"]) == [rung.value for rung in Rung]
    assert all(row["verdict"] for row in found["rows"].values())


def test_temperature_with_logprobs_that_are_scaled_but_called_raw(tmp_path: Path) -> None:
    folder = run_in(
        tmp_path / "run",
        "experiment=onoff",
        *FAKE,
        "target.noise=0.02",
        "sampling.temperature=0.7",
        "backend.logprob_kind=scaled",
    )
    rewrite(folder.completions, lambda row: row | LABELLED_RAW)
    found = climb(folder, *FAKE, "target.noise=0.02")
    assert main_cause(found) == "transform"
    row = found["rows"]["transform"]
    assert row["share"] > 0.9 and "declared raw are scaled" in row["verdict"] and "temperature 0.7" in row["verdict"]
    target = next(name for name in folder.score_names() if name.endswith("target"))
    assert found["gap"] == pytest.approx(k3(*both(folder, target)), rel=1e-6)
    # nothing is cut off, so the processed logprobs that were stored are the scaled ones
    assert row["after"] == pytest.approx(k3(*both(folder, target, "processed_logprobs")), rel=1e-5)
    assert row["share"] == pytest.approx(
        1 - row["after"] / found["gap"], rel=1e-6
    )  # the fake engine repeats itself exactly
    assert "sampling transform" in found["sentence"]


def test_top_p_with_logprobs_that_are_processed_but_called_raw(tmp_path: Path) -> None:
    folder = run_in(
        tmp_path / "run",
        "experiment=onoff",
        *FAKE,
        "sampling.top_p=0.8",
        "backend.logprob_kind=processed",
        "target.noise=0.001",
    )
    rewrite(folder.completions, lambda row: row | LABELLED_RAW)
    found = climb(folder, *FAKE, "target.noise=0.001", "attribute.target=fake-smollm2-auto-target")
    assert main_cause(found) == "transform"
    assert "declared raw are processed" in found["rows"]["transform"]["verdict"] and "top_p 0.8" in found["sentence"]


@pytest.fixture(scope="module")
def sampled(tiny_llama: str, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A tiny model's samples, whose random tokens are seldom what its tokenizer would make of their text."""
    engines = (f"model.name={tiny_llama}", "model.dtype=float32", "+backend@targets.again=huggingface")
    small = ("data.limit=6", "sampling.max_new_tokens=48", "targets.again.attn_implementation=eager")
    return run_in(tmp_path_factory.mktemp("sampled") / "run", "experiment=onoff", *engines, *small)


def copy_of(folder: RunDir, path: Path) -> RunDir:
    shutil.copytree(folder.path, path)
    return RunDir(path)


def test_text_that_was_tokenised_again(sampled: RunDir, tiny_llama: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(tiny_llama), AutoModelForCausalLM.from_pretrained(tiny_llama)
    folder = copy_of(sampled, tmp_path / "run")
    prompts = {row["request_id"]: row["prompt_ids"] for row in folder.completions.rows()}

    def score_the_text(row: dict[str, Any]) -> dict[str, Any]:
        ids = tokenizer.encode(tokenizer.decode(row["token_ids"]), add_special_tokens=False)
        import torch

        sequence = torch.tensor([[*prompts[row["request_id"]].tolist(), *ids]])
        with torch.no_grad():
            logprobs = model(sequence).logits[0].log_softmax(-1)
        at = len(sequence[0]) - len(ids)
        chosen = logprobs[at - 1 : -1].gather(-1, torch.tensor(ids)[:, None])[:, 0].numpy()
        small = dict.fromkeys(
            ("entropy", "logsumexp", "rank", "top_ids", "top_logprobs", "processed_logprobs", "nucleus_mass")
        )
        return row | small | {"token_ids": np.array(ids, np.int32), "logprobs": chosen}

    rewrite(folder.scores("again"), score_the_text)
    changed = sum(
        a["token_ids"].tolist() != b["token_ids"].tolist()
        for a, b in zip(
            sorted(folder.completions.rows(), key=by_id), sorted(folder.scores("again").rows(), key=by_id), strict=True
        )
    )
    assert changed >= 3
    found = climb(folder, "attribute.target=again")
    assert main_cause(found) == "retokenised" and found["rows"]["retokenised"]["share"] > 0.9
    assert f"other ids in {changed} of 6 responses, and {changed} of them are the text's" in found["sentence"]
    assert found["gap"] > 0.01 and found["left"] < 1e-6


def by_id(row: dict[str, Any]) -> str:
    return row["request_id"]


def test_without_a_mismatch_nothing_is_named(sampled: RunDir, tmp_path: Path) -> None:
    found = climb(copy_of(sampled, tmp_path / "run"), "attribute.target=again")
    assert found["gap"] < 1e-11
    assert found["sentence"].startswith("Nothing to explain")
    assert all(row["share"] is None for name, row in found["rows"].items() if name != "noise")


def test_an_end_token_that_one_side_lacks(tmp_path: Path) -> None:
    folder = run_in(
        tmp_path / "run", "experiment=onoff", *FAKE, "target.noise=0.01", "data.limit=12", "sampling.max_new_tokens=200"
    )
    name = next(name for name in folder.score_names() if name.endswith("target"))

    def without_last(row: dict[str, Any]) -> dict[str, Any]:
        return row | {key: row[key][:-1] for key in ("token_ids", "logprobs", "processed_logprobs", "nucleus_mass")}

    rewrite(folder.scores(name), without_last)
    found = climb(folder, *FAKE, "target.noise=0.01", f"attribute.target={name}")
    assert main_cause(found) == "end_token" and "12 of 12 responses have it on one side only" in found["sentence"]


@pytest.fixture(scope="module")
def noisy_head(tiny_llama: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny model with a perturbed LM head."""
    import torch
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("noisy_head")
    shutil.copytree(tiny_llama, folder, dirs_exist_ok=True)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    torch.manual_seed(1)
    with torch.no_grad():
        model.lm_head.weight.add_(0.03 * torch.randn_like(model.lm_head.weight))
    model.save_pretrained(folder)
    return str(folder)


def test_a_perturbed_lm_head(
    tiny_llama: str, noisy_head: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engines = (
        f"model.name={tiny_llama}",
        "model.dtype=float32",
        "target=huggingface",
        f"target.model_name={noisy_head}",
    )
    folder = run_in(tmp_path / "run", "experiment=onoff", *engines, "data.limit=6", "sampling.max_new_tokens=16")
    with caplog.at_level("INFO"):
        found = climb(folder, *engines, "attribute.switches=[quantisation]")  # no side has that one to turn
    assert main_cause(found) == "weights" and found["rows"]["weights"]["share"] > 0.99
    assert "they differ in lm_head.weight)" in found["sentence"] and "comes from the weights" in found["sentence"]
    others = [
        row["share"]
        for name, row in found["rows"].items()
        if name not in ("weights", "noise") and row["share"] is not None
    ]
    assert max(others) < 0.05
    assert (
        sum("loading" in line for line in caplog.messages) == 2
    )  # the target for the floor, its engine with the other weights


def test_precision_is_found_in_head_and_body(tiny_llama: str, tmp_path: Path) -> None:
    engines = (f"model.name={tiny_llama}", "model.dtype=bfloat16", "target=huggingface", "target.dtype=float32")
    folder = run_in(tmp_path / "run", "experiment=onoff", *engines, "data.limit=6", "sampling.max_new_tokens=16")
    found = climb(folder, *engines)
    shares = {name: found["rows"][name]["share"] or 0 for name in ("lm_head", "dtype")}
    assert sum(shares.values()) > 0.9 and found["left"] < 1e-6
    assert found["rows"]["lm_head"]["share"] is not None


def test_a_ladder_is_climbed_again_without_an_engine(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    overrides = (*FAKE, "target.noise=0.3")
    folder = run_in(tmp_path / "run", "experiment=onoff", *overrides)
    first = climb(folder, *overrides)
    before = folder.score_names()
    with caplog.at_level("INFO"):
        assert climb(folder, *overrides) == first
    assert not any("loading" in line for line in caplog.messages)
    assert before == folder.score_names() and all("attribute" not in name for name in before)
    assert set(json.loads((folder.path / "metrics.json").read_text())["comparisons"]) == set(before)


def test_a_ladder_that_replaces_another_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = run_in(tmp_path / "run", "experiment=onoff", *FAKE, "target.noise=0.3", "score.name=target")
    own = next(name for name in folder.score_names() if name != "target")

    def warned(*overrides: str) -> list[str]:
        caplog.clear()
        climb(folder, *overrides)
        return [line for line in caplog.messages if "replaces" in line]

    assert not warned("attribute.rungs=[noise,engine]") and not warned("attribute.rungs=[noise,dtype,engine]")
    (said,) = warned("attribute.rungs=[engine]")
    assert said.endswith("held the ladder of target, with dtype, noise, which this one replaces; its scores are kept")
    (said,) = warned("attribute.rungs=[engine]", f"attribute.target={own}")
    assert "held the ladder of target, which this one replaces" in said


def test_the_engines_are_found_in_the_records(tmp_path: Path) -> None:
    folder = run_in(tmp_path / "run", "experiment=onoff", *FAKE, "target.noise=0.3")
    found = climb(folder)  # no backend=fake here
    assert main_cause(found) == "engine" and "noise: 0.3 -> 0.0" in found["sentence"]


def test_asking_for_scores_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no scored responses to explain: set run_dir"):
        climb(RunDir(tmp_path))
    folder = run_in(tmp_path / "run", "experiment=onoff", *FAKE, "target.noise=0.3")
    with pytest.raises(UsageError, match="no scores 'nothing' but"):
        climb(folder, "attribute.target=nothing")


def test_the_gap_of_sides_with_other_lengths() -> None:
    q = {("a", 0): TokenScores(token_ids_T=np.array([1, 2]), logprobs_T=np.array([-1.0, -2.0]))}
    p = {("a", 0): TokenScores(token_ids_T=np.array([1]), logprobs_T=np.array([-1.5]))}
    l_T = np.array([-0.5, 2.0])  # the missing token has logprob 0
    assert gap(q, p) == pytest.approx(np.mean(np.exp(l_T) - l_T - 1))
    assert np.isnan(gap(q, {}))


def test_sampled_ids_that_were_replaced_by_the_texts(sampled: RunDir, tiny_llama: str, tmp_path: Path) -> None:
    """The logprobs are the sampler's, the ids are not: both tables hold the text's."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    folder = copy_of(sampled, tmp_path / "run")
    fitting = 0

    def encode(row: dict[str, Any]) -> dict[str, Any]:
        nonlocal fitting
        ids = np.array(tokenizer.encode(tokenizer.decode(row["token_ids"]), add_special_tokens=False), np.int32)
        fitting += len(ids) == len(row["token_ids"])
        return row | {"token_ids": ids}

    rewrite(folder.completions, encode)
    shutil.rmtree(folder.path / "scores")
    run_in(
        folder.path,
        "experiment=score",
        f"model.name={tiny_llama}",
        "model.dtype=float32",
        "score.name=again",
        "stages=[score]",
    )
    found = climb(folder)
    assert main_cause(found) == "retokenised" and "re-tokenised text" in found["sentence"]
    assert f"{6 - fitting} of 6 responses have not as many logprobs as ids" in found["sentence"]


def test_a_head_in_float32(tiny_llama: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from rl_onoff.backends import create_backend
    from rl_onoff.types import Response

    prompt, ids = np.array([5, 6, 7], np.int32), np.array([8, 9, 10], np.int32)
    scores = {}
    for head in (None, "float32"):
        options = {"dtype": "bfloat16", "head_dtype": head, "device": "cpu"}
        with create_backend(
            {"backend_type": "huggingface", "model_name": tiny_llama, "backend_specific": options}
        ) as backend:
            (scored,) = backend.score([Response(request_id="a", sample=0, prompt_ids=prompt, token_ids_T=ids)])
            scores[head] = scored.logprobs_T
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16)
    with torch.no_grad():
        hidden = model.model(torch.tensor([[*prompt, *ids[:-1]]])).last_hidden_state[0, 2:].float()
        logprobs = (hidden @ model.lm_head.weight.float().T).log_softmax(-1)
    np.testing.assert_allclose(scores["float32"], logprobs[range(3), ids.tolist()].numpy(), atol=2e-5)
    assert np.abs(scores["float32"] - scores[None]).max() > 1e-3


def test_files_without_any_engine(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [(rng.integers(0, 200, 20).tolist(), (-rng.exponential(1, 20)).tolist()) for _ in range(8)]
    ours = [{"token_ids": ids, "logprobs": q, "logprob_kind": "raw"} for ids, q in rows]
    theirs = [
        {"token_ids": ids[:-1], "logprobs": (np.array(q)[:-1] + rng.normal(0, 0.01, 19)).tolist()} for ids, q in rows
    ]
    for name, content in (("rollouts", ours), ("trainer", theirs)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    files = (f"compare.behaviour={tmp_path / 'rollouts.jsonl'}", f"compare.target={tmp_path / 'trainer.jsonl'}")
    found = climb(RunDir(tmp_path / "run"), *files)
    assert main_cause(found) == "end_token" and "8 of 8 responses have it on one side only" in found["sentence"]
    assert "is not recorded" in found["rows"]["noise"]["verdict"]
    told = RunDir(tmp_path / "run").read_json("metrics.json")  # ids that differ are not compared
    assert told["verdict"].startswith("Not comparable: the two sides hold other tokens in 8 of 8")
    assert not [name for name in told["values"] if name.startswith("onoff/")]


def test_a_ladder_holds_the_responses_it_chose_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys are read first: of a run of any size no more than `attribute.limit` rows become rollouts or scores."""
    folder = run_in(tmp_path / "run", "experiment=onoff", *FAKE, "target.noise=0.3", "data.limit=30", "sampling.n=2")
    made: dict[str, set[tuple[str, int]]] = {"rollout_of": set(), "scores_of": set()}

    def counted(name: str) -> None:
        original = getattr(state, name)

        def make(row: dict[str, Any]) -> Any:
            made[name].add((row["request_id"], row["sample"]))
            return original(row)

        monkeypatch.setattr(state, name, make)

    for name in made:
        counted(name)
    found = climb(folder, *FAKE, "target.noise=0.3", "attribute.limit=4")
    assert found["responses"] == 4 and main_cause(found) == "engine"
    assert made["rollout_of"] == made["scores_of"] and len(made["rollout_of"]) == 4


def test_memory_of_the_choice_does_not_grow_with_the_run(tmp_path: Path) -> None:
    folder, length = RunDir(tmp_path), 500
    for table in (folder.completions, folder.scores("target")):
        with table.writer() as writer:
            for i in range(2000):
                row = {"request_id": str(i), "sample": 0, "token_ids": np.arange(length, dtype=np.int32)}
                writer.append(row | {"logprobs": np.full(length, -1.0, np.float32), "logprob_kind": "raw"})
    tracemalloc.start()
    chosen = state.chosen_rollouts(folder.completions, folder.scores("target"), 16)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(chosen) == 16 and peak < 2_000_000, peak  # the run's arrays alone are 8 MB
