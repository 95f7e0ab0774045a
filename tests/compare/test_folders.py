"""Run folders against each other, without an engine; kinds of logprobs; the sampler's view."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rl_onoff.compare import as_kind
from rl_onoff.errors import NotComparableError, UsageError
from rl_onoff.pipeline.compare_inputs import own_scores
from rl_onoff.rundir import join
from rl_onoff.rundir.files import read_shard
from rl_onoff.rundir.join import joined
from rl_onoff.rundir.table import Row, RunDir, scores_of
from rl_onoff.types import LogprobKind, Sampling
from tests.running import rewrite, run_in

FAKE = ("backend=fake", "sampling.max_new_tokens=24", "data.limit=5")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunDir, RunDir]:
    """What one policy sampled, and a folder in which another policy scored the same responses."""
    path = tmp_path_factory.mktemp("folders")
    sampled = run_in(path / "sampled", "experiment=analyse", *FAKE)
    rows = [{"request_id": r["request_id"], "sample": r["sample"], "prompt_ids": r["prompt_ids"].tolist(),
             "token_ids": r["token_ids"].tolist()} for r in sampled.completions.rows()]  # fmt: skip
    (path / "given.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    noisy = ("backend=fake", "backend.noise=0.2", f"score.responses={path / 'given.jsonl'}", "score.name=noisy")
    scored = run_in(path / "scored", "experiment=score", *noisy)
    return sampled, scored


def test_two_folders(folders: tuple[RunDir, RunDir], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sampled, scored = folders
    with caplog.at_level("INFO"):
        here = run_in(
            tmp_path / "run", "experiment=compare", f"compare.behaviour={sampled.path}", f"compare.target={scored.path}"
        )
    assert not any("loading" in message for message in caplog.messages)
    found = here.read_json("metrics.json")["comparisons"]
    assert set(found) == {"fake-smollm2-auto", "noisy"}
    p = {row["request_id"]: row["logprobs"] for row in scored.scores("noisy").rows()}
    l_N = np.concatenate(
        [p[row["request_id"]].astype(np.float64) - row["logprobs"] for row in sampled.completions.rows()]
    )
    assert found["noisy"]["overall"]["kl_k3"]["value"] == pytest.approx(np.mean(np.exp(l_N) - l_N - 1), rel=1e-6)
    assert "kl_forward_topk" in found["noisy"]["overall"]  # the behaviour's own scores came along
    assert not (here.path / "completions").exists() and (here.path / "report.html").exists()


def test_rows_meet_whatever_their_order_and_no_part_of_a_shard_is_read_for_one_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, chance = RunDir(tmp_path), np.random.default_rng(0)
    for table in (run.completions, run.scores("mine")):
        with table.writer(max_rows=50) as out:
            for i in chance.permutation(300):
                out.append(
                    {"request_id": str(i), "sample": 0, "token_ids": np.array([i]), "logprobs": np.array([-i - 1.0])}
                )
    num_read = 0

    def counted(shard: Path, columns: list[str] | None = None, numbers: list[int] | None = None) -> Iterator[Row]:
        nonlocal num_read
        num_read += numbers is not None
        return read_shard(shard, columns, numbers)

    monkeypatch.setattr(join, "read_shard", counted)
    joined = list(join.beside(run.completions.rows(), {"mine": run.scores("mine")}))
    assert len(joined) == 300 and num_read == 6, "once a shard"
    for row, found in joined:
        assert found["mine"] is not None and found["mine"].token_ids_T[0] == row["token_ids"][0]
    monkeypatch.setattr(join, "BLOCK_BYTES", 1)
    again = list(join.beside(run.completions.rows(), {"mine": run.scores("mine")}))
    assert len(again) == 300 and num_read == 6 + 300, "a block is as large as the memory allows"
    assert all(
        found == {"none": None} for _, found in join.beside(run.completions.rows(), {"none": run.scores("none")})
    )


def test_a_folder_and_one_of_its_scores(folders: tuple[RunDir, RunDir], tmp_path: Path) -> None:
    sampled, scored = folders
    here = run_in(
        tmp_path / "run",
        "experiment=compare",
        f"compare.behaviour={sampled.path}",
        f"compare.target={scored.path}:noisy",
    )
    assert "noisy" in here.read_json("metrics.json")["comparisons"]
    with pytest.raises(UsageError, match=r"no scores 'quiet' but noisy: set compare.target="):
        run_in(
            tmp_path / "run",
            "experiment=compare",
            f"compare.behaviour={sampled.path}",
            f"compare.target={scored.path}:quiet",
        )


@pytest.mark.parametrize(
    ("behaviour", "words"),
    [
        ("nowhere", "compare.behaviour=nowhere does not exist"),
        ("pyproject.toml", "is neither a run folder nor one of .jsonl, .parquet"),
        ("docs", "docs has no responses: set compare.behaviour to a run folder that sampled"),
    ],
)
def test_places_that_hold_nothing(behaviour: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    with pytest.raises(UsageError, match=words):
        run_in(tmp_path / "run", "experiment=compare", f"compare.behaviour={behaviour}")


def test_nothing_in_common(folders: tuple[RunDir, RunDir], tmp_path: Path) -> None:
    sampled, scored = folders
    other = RunDir(shutil.copytree(scored.path, tmp_path / "other"))
    rewrite(other.scores("noisy"), lambda row: row | {"request_id": f"other-{row['request_id']}"})
    with pytest.raises(UsageError, match=r"no response in common \(ids .* here and other-.* there\)"):
        run_in(
            tmp_path / "run", "experiment=compare", f"compare.behaviour={sampled.path}", f"compare.target={other.path}"
        )


def test_other_ids(folders: tuple[RunDir, RunDir], tmp_path: Path) -> None:
    sampled, scored = folders
    other = RunDir(shutil.copytree(scored.path, tmp_path / "other"))
    rewrite(other.scores("noisy"), lambda row: row | {"token_ids": (row["token_ids"] + 1) % 257})
    sentence = "Not comparable: .*score the very token ids that were sampled, with the same tokenizer"
    with pytest.raises(NotComparableError, match=sentence) as caught:
        run_in(
            tmp_path / "run", "experiment=compare", f"compare.behaviour={sampled.path}", f"compare.target={other.path}"
        )
    assert caught.value.exit_code == 3
    comparison = RunDir(tmp_path / "run").read_json("metrics.json")["comparisons"]["noisy"]
    assert comparison["comparable"] is False and comparison["overall"] == {}


def test_other_tokenizers(folders: tuple[RunDir, RunDir], tmp_path: Path) -> None:
    sampled, scored = folders
    other = RunDir(shutil.copytree(scored.path, tmp_path / "other"))
    table = other.scores("noisy")
    table.describe(tokenizer={i: f"<{i}>" for i in table.record()["tokenizer"]})
    with pytest.raises(
        UsageError, match=r"noisy and the behaviour have different tokenizers \(id 0 is '<0>' there and"
    ):
        run_in(
            tmp_path / "run", "experiment=compare", f"compare.behaviour={sampled.path}", f"compare.target={other.path}"
        )


def test_logprobs_of_other_kinds(tmp_path: Path) -> None:
    rows = [{"id": "a", "token_ids": [1, 2], "logprobs": [-1.0, -2.0], "logprob_kind": "processed"}]
    others = [{"id": "a", "token_ids": [1, 2], "logprobs": [-1.0, -2.0], "logprob_kind": "raw"}]
    for name, content in (("q.jsonl", rows), ("p.jsonl", others)):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in content))
    files = (f"compare.behaviour={tmp_path / 'q.jsonl'}", f"compare.target={tmp_path / 'p.jsonl'}")
    with pytest.raises(UsageError, match="logprobs of response a/0 are processed and the target's are raw"):
        run_in(tmp_path / "run", "experiment=compare", *files)
    run_in(tmp_path / "told", "experiment=compare", *files, "compare.target_kind=processed")


# -- the sampler's view ------------------------------------------------------------------------------------------------

SAMPLER = ("sampling.temperature=0.8", "sampling.top_p=0.7", "sampling.top_k=40", "sampling.min_p=0.02")


def kept(logits_TV: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(log of the scaled distribution, which tokens the sampler keeps), by sorting rows: not the code under test."""
    z_TV = logits_TV.astype(np.float64) / 0.8
    keep_TV = np.zeros(z_TV.shape, bool)
    for t, z_V in enumerate(z_TV):
        order = np.argsort(-z_V)[:40]
        p = np.exp(z_V[order] - z_V.max())
        p /= p.sum()
        nucleus = order[: int(np.searchsorted(np.cumsum(p), 0.7)) + 1]
        keep_TV[t, nucleus[np.exp(z_V[nucleus] - z_V.max()) >= 0.02]] = True
    most_T1 = z_TV.max(-1, keepdims=True)
    return z_TV - np.log(np.exp(z_TV - most_T1).sum(-1, keepdims=True)) - most_T1, keep_TV


@pytest.fixture(scope="module")
def processed(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    target = ("backend.logprob_kind=processed", "target=fake", "target.noise=0.5", "score.full_logits=true")
    return run_in(tmp_path_factory.mktemp("processed") / "run", "experiment=onoff", *FAKE, *SAMPLER, *target)


def test_processed_logprobs_are_compared_with_processed_ones(processed: RunDir) -> None:
    name = next(name for name in processed.score_names() if name.endswith("target"))
    own = next(name for name in processed.score_names() if name != name.removesuffix("-target") + "-target")
    scores = {row["request_id"]: row for row in processed.scores(name).rows()}
    owns = {row["request_id"]: row for row in processed.scores(own).rows()}
    l_N, masses, own_masses = [], [], []
    for row in processed.completions.rows():
        assert row["logprob_kind"] == "processed"
        at = np.arange(len(row["token_ids"])), row["token_ids"]
        scaled_TV, keep_TV = kept(scores[row["request_id"]]["logits"])
        mass_T = np.where(keep_TV, np.exp(scaled_TV), 0).sum(-1)
        with np.errstate(divide="ignore"):
            p_T = np.where(keep_TV[at], scaled_TV[at] - np.log(mass_T), -np.inf)
        l_N.append(np.where(np.isneginf(p_T), -20.0, p_T - row["logprobs"].astype(np.float64)))
        masses.append(mass_T)
        own_TV, own_keep_TV = kept(owns[row["request_id"]]["logits"])
        assert own_keep_TV[at].all()  # the sampler could draw what it drew
        own_masses.append(np.where(own_keep_TV, np.exp(own_TV), 0).sum(-1))
    l_N = np.concatenate(l_N)
    found = processed.read_json("metrics.json")["comparisons"][name]
    impossible = int((l_N == -20).sum())
    assert impossible > 3 and found["counts"]["tokens_impossible_target"] == impossible
    assert found["overall"]["impossible_fraction"]["value"] == pytest.approx(impossible / len(l_N))
    assert found["overall"]["kl_k3"]["value"] == pytest.approx(np.mean(np.exp(l_N) - l_N - 1), rel=1e-5)
    assert found["overall"]["nucleus_mass"]["value"] == pytest.approx(np.concatenate(own_masses).mean(), rel=1e-5)
    assert found["overall"]["nucleus_mass_target"]["value"] == pytest.approx(np.concatenate(masses).mean(), rel=1e-5)
    assert found["kind"] == "processed"


def test_scaled_logprobs_from_processed_ones(processed: RunDir) -> None:
    scores = scores_of(next(iter(processed.scores(processed.score_names()[0]).rows())))
    sampler = Sampling(temperature=0.8, top_p=0.7, top_k=40, min_p=0.02)
    at = np.arange(len(scores.token_ids_T)), scores.token_ids_T
    scaled = as_kind(scores, LogprobKind.scaled, sampler)
    np.testing.assert_allclose(scaled.logprobs_T, kept(scores.logits_TV)[0][at], atol=1e-5)
    assert as_kind(scores, LogprobKind.raw, sampler) is scores
    impossible = replace(scores, processed_logprobs_T=np.full(len(scores.token_ids_T), -np.inf))
    with pytest.raises(UsageError, match="could not have drawn"):
        as_kind(impossible, LogprobKind.scaled, sampler)
    with pytest.raises(UsageError, match=r"score the tokens with score.processed=true"):
        as_kind(replace(scores, processed_logprobs_T=None), LogprobKind.processed, sampler)


def test_the_page_compares_logprobs_of_one_kind_as_the_metrics_do(processed: RunDir) -> None:
    name = next(name for name in processed.score_names() if name.endswith("target"))
    found = list(joined(processed, [name], own_scores(processed)))
    assert found and all(one.behaviour.kind is one.targets[name].kind is LogprobKind.processed for one in found)
    l_N = np.concatenate([one.targets[name].logprobs_T - one.behaviour.logprobs_T for one in found])
    k3 = processed.read_json("metrics.json")["comparisons"][name]["overall"]["kl_k3"]["value"]
    l_N = np.where(np.isneginf(l_N), -20, l_N.astype(np.float64))
    assert np.mean(np.exp(l_N) - l_N - 1) == pytest.approx(k3, rel=1e-5)


def test_another_sampler_than_the_one_that_drew(processed: RunDir, tmp_path: Path) -> None:
    other = RunDir(shutil.copytree(processed.path, tmp_path / "other"))
    table = next(other.scores(name) for name in other.score_names() if name.endswith("target"))
    record = table.record()
    record["config"]["want"]["sampler"]["temperature"] = 0.5
    (table.path / "_made_with.json").write_text(json.dumps(record))
    with pytest.raises(UsageError, match="under another sampler than the one that drew the tokens"):
        run_in(other.path, "experiment=compare")


@pytest.mark.parametrize("kind", ["raw", "processed"])
def test_raw_logprobs_of_tokens_drawn_otherwise_are_said_to_be(tmp_path: Path, kind: str) -> None:
    engines = (
        "experiment=onoff",
        "backend=fake",
        "model.name=fake",
        "target=fake",
        "target.noise=0.3",
        f"backend.logprob_kind={kind}",
    )
    sampler = ("data.limit=4", "sampling.max_new_tokens=8", "sampling.temperature=0.5", "sampling.top_k=5")
    run = run_in(tmp_path / "run", *engines, *sampler)
    verdict = run.read_json("metrics.json")["verdict"]
    assert ("drawn with temperature=0.5, top_k=5, but these are raw logprobs" in verdict) is (kind == "raw")
    assert "rough with so few responses" in verdict
