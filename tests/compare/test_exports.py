"""Files made elsewhere, in the layouts of verl, TRL, prime-rl and slime: the numbers, and what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from rl_onoff.data.rollouts import Recorded, open_rollouts
from rl_onoff.errors import NotComparableError, UsageError
from rl_onoff.rundir.table import RECORD, RunDir
from rl_onoff.types import LogprobKind
from tests.running import run_in

RNG = np.random.default_rng(0)
LENGTHS = (5, 3, 8)
IDS = [RNG.integers(0, 200, n).tolist() for n in LENGTHS]
PROMPTS = [[7, 8, 9], [7, 8], [1]]
Q = [(-RNG.exponential(1, n)).astype(np.float32).tolist() for n in LENGTHS]
P = [(np.array(q) - RNG.normal(0, 0.1, len(q)) - 0.3).astype(np.float32).tolist() for q in Q]
L = np.concatenate(P).astype(np.float64) - np.concatenate(Q)


def padded(row: list[Any], value: Any, width: int = 8) -> list[Any]:
    return [*row, *[value] * (width - len(row))]


def verl(i: int) -> dict[str, Any]:
    """A rectangle: prompts padded on the left, responses on the right."""
    n, m = LENGTHS[i], len(PROMPTS[i])
    return {
        "uid": f"row-{i}",
        "prompts": [0] * (4 - m) + PROMPTS[i],
        "responses": padded(IDS[i], 0),
        "response_mask": padded([1] * n, 0),
        "attention_mask": [0] * (4 - m) + [1] * m + padded([1] * n, 0),
        "rollout_log_probs": padded(Q[i], -1.0),
        "old_log_probs": padded(P[i], 0.0),
        "data_source": "gsm8k",
    }


def trl(i: int) -> dict[str, Any]:
    return {
        "prompt_ids": PROMPTS[i],
        "completion_ids": padded(IDS[i], 0),
        "completion_mask": padded([1] * LENGTHS[i], 0),
        "sampling_per_token_logps": padded(Q[i], 0.0),
        "old_per_token_logps": padded(P[i], 0.0),
        "completion": "text",
    }


def prime_rl(i: int) -> dict[str, Any]:
    """The trainer's packed batch: one list of ids, with a mask that leaves the prompt out."""
    m = len(PROMPTS[i])
    return {
        "input_ids": PROMPTS[i] + IDS[i],
        "loss_mask": [False] * m + [True] * LENGTHS[i],
        "inference_logprobs": [0.0] * m + Q[i],
        "trainer_logprobs": [0.0] * m + P[i],
    }


def slime(i: int) -> dict[str, Any]:
    """The response's logprobs beside the ids of prompt and response."""
    return {
        "tokens": PROMPTS[i] + IDS[i],
        "response_length": LENGTHS[i],
        "loss_mask": [1] * LENGTHS[i],
        "rollout_log_probs": Q[i],
        "old_log_probs": P[i],
    }


def ours(i: int) -> dict[str, Any]:
    return {
        "request_id": f"row-{i}",
        "token_ids": IDS[i],
        "logprobs": Q[i],
        "target_logprobs": P[i],
        "logprob_kind": "raw",
        "pieces": [f" t{x}" for x in IDS[i]],
    }


def rows_of(folder: Path, *rows: dict[str, Any]) -> list[Recorded]:
    return list(open_rollouts(write(folder / "x.jsonl", list(rows)), key="compare.behaviour", columns={}).rows())


LAYOUTS = (verl, trl, prime_rl, slime, ours)


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    if path.suffix == ".parquet":
        pd.DataFrame(rows).to_parquet(path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def metrics(folder: RunDir, target: str) -> dict[str, float]:
    overall = folder.read_json("metrics.json")["comparisons"][target]["overall"]
    return {name: value["value"] for name, value in overall.items()}


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_one_file_with_both_logprobs(layout: Any, ending: str, tmp_path: Path) -> None:
    file = write(tmp_path / f"rollouts.{ending}", [layout(i) for i in range(3)])
    folder = run_in(tmp_path / "run", "experiment=compare", f"compare.behaviour={file}")
    (name,) = folder.read_json("metrics.json")["comparisons"]
    assert name in layout(0) and "log" in name
    found = metrics(folder, name)
    assert found["kl_k3"] == pytest.approx(np.mean(np.exp(L) - L - 1), rel=1e-6)
    assert found["logprob_diff_max"] == pytest.approx(np.abs(L).max(), rel=1e-6)
    sums = np.array([np.sum(np.array(p, np.float64) - q) for p, q in zip(P, Q, strict=True)])
    assert found["ess_seq"] == pytest.approx(np.exp(sums).sum() ** 2 / (3 * np.exp(2 * sums).sum()), rel=1e-5)
    rows = {row["request_id"]: row for row in folder.completions.rows()}
    assert sorted(row["token_ids"].tolist() for row in rows.values()) == sorted(IDS)
    if layout is not ours:
        assert sorted(row["prompt_ids"].tolist() for row in rows.values()) == sorted(PROMPTS) or layout is prime_rl
    page = (folder.path / "report.html").read_text()
    assert "how on-policy?" in page


def test_two_files(tmp_path: Path) -> None:
    q = write(
        tmp_path / "rollouts.jsonl", [{k: v for k, v in verl(i).items() if k != "old_log_probs"} for i in range(3)]
    )
    p = write(
        tmp_path / "trainer.parquet", [{"id": f"row-{i}", "token_ids": IDS[i], "logprobs": P[i]} for i in (2, 0, 1)]
    )
    folder = run_in(tmp_path / "run", "experiment=compare", f"compare.behaviour={q}", f"compare.target={p}")
    assert metrics(folder, "trainer")["kl_k3"] == pytest.approx(np.mean(np.exp(L) - L - 1), rel=1e-6)


def test_two_files_whose_columns_have_other_names(tmp_path: Path) -> None:
    q = write(tmp_path / "q.jsonl", [{"name": f"x{i}", "toks": IDS[i], "lp_vllm": Q[i]} for i in range(3)])
    p = write(tmp_path / "p.jsonl", [{"name": f"x{i}", "token_ids": IDS[i], "lp_fsdp": P[i]} for i in range(3)])
    columns = "{id: name, token_ids: toks, behaviour: lp_vllm, target: lp_fsdp}"
    files = (f"compare.behaviour={q}", f"compare.target={p}", f"+compare.columns={columns}")
    assert metrics(run_in(tmp_path / "run", "experiment=compare", *files), "p")["kl"] == pytest.approx(
        np.mean(-L), rel=1e-6
    )


def test_columns_that_have_other_names(tmp_path: Path) -> None:
    rows = [{"name": f"x{i}", "toks": IDS[i], "lp_vllm": Q[i], "lp_fsdp": P[i]} for i in range(3)]
    file = write(tmp_path / "x.jsonl", rows)
    with pytest.raises(
        UsageError, match=r"no column with lists of token ids but name, toks, .*: set \+compare.columns.token_ids"
    ):
        run_in(tmp_path / "run", "experiment=compare", f"compare.behaviour={file}")
    columns = "{id: name, token_ids: toks, behaviour: lp_vllm, target: lp_fsdp}"
    folder = run_in(tmp_path / "run", "experiment=compare", f"compare.behaviour={file}", f"+compare.columns={columns}")
    assert metrics(folder, "lp_fsdp")["kl_k3"] == pytest.approx(np.mean(np.exp(L) - L - 1), rel=1e-6)
    with pytest.raises(UsageError, match=r"compare.columns has 'ids', which is none of id, sample, token_ids"):
        run_in(tmp_path / "other", "experiment=compare", f"compare.behaviour={file}", "+compare.columns.ids=toks")


def test_pieces_stand_for_a_tokenizer(tmp_path: Path) -> None:
    file = write(tmp_path / "x.jsonl", [ours(i) for i in range(3)])
    folder = run_in(tmp_path / "run", "experiment=compare", f"compare.behaviour={file}")
    assert folder.completions.record()["pieces"] == {str(i): f" t{i}" for ids in IDS for i in ids}


def test_a_file_whose_content_changed_is_not_taken_for_the_one_before(tmp_path: Path) -> None:
    file = write(tmp_path / "x.jsonl", [ours(i) for i in range(3)])
    command = ("experiment=compare", f"compare.behaviour={file}")
    run_in(tmp_path / "run", *command)
    os.utime(file, (1, 1))
    run_in(tmp_path / "run", *command)  # the same content
    stat, text = os.stat(file), Path(file).read_text()
    Path(file).write_text(text.replace("t1", "t2"))
    os.utime(file, (stat.st_atime, stat.st_mtime))
    assert os.stat(file).st_size == stat.st_size
    with pytest.raises(UsageError, match=r"holds rows of another config \(content: "):
        run_in(tmp_path / "run", *command)


def test_a_folder_that_kept_size_and_time_of_its_file_is_continued_with_the_same_file(tmp_path: Path) -> None:
    file = write(tmp_path / "x.jsonl", [ours(i) | {"messages": [{"role": "user", "content": "a"}]} for i in range(3)])
    command = ("experiment=compare", f"compare.behaviour={file}")
    folder, stat = run_in(tmp_path / "run", *command), os.stat(file)
    for table in (folder.completions, folder.scores("target_logprobs")):
        record = table.record()
        del record["config"]["content"], record["config"]["columns"]["prompt"]
        record["config"] |= {"bytes": stat.st_size, "changed": int(stat.st_mtime)}
        (table.path / RECORD).write_text(json.dumps(record))
    run_in(tmp_path / "run", *command)
    os.utime(file, (1, 1))
    with pytest.raises(UsageError, match=r"holds rows of another config \(changed: \d+ -> 1\)"):
        run_in(tmp_path / "run", *command)


def test_an_empty_response_has_no_tokens(tmp_path: Path) -> None:
    empty = {
        "uid": "empty",
        "prompts": [0, 7, 8, 9],
        "responses": [],
        "attention_mask": [0, 1, 1, 1],
        "rollout_log_probs": [],
        "old_log_probs": [],
    }
    full = {name: value for name, value in verl(0).items() if name not in ("response_mask", "data_source")}
    first, second = rows_of(tmp_path, full, empty)
    assert first.rollout.token_ids_T.tolist() == IDS[0] and first.rollout.prompt_ids.tolist() == PROMPTS[0]
    assert len(second.rollout.token_ids_T) == 0 and second.rollout.prompt_ids.tolist() == [7, 8, 9]
    part = {"tokens": [7, 8, 9], "response_length": 0, "rollout_log_probs": [], "old_log_probs": []}
    for row in (part, {**part, "loss_mask": []}):
        (found,) = rows_of(tmp_path, row)
        assert len(found.rollout.token_ids_T) == 0 and found.rollout.prompt_ids.tolist() == [7, 8, 9]


def test_what_a_row_holds(tmp_path: Path) -> None:
    row = {
        "request_id": "a",
        "sample": 2,
        "prompt_ids": [1],
        "token_ids": [4, 5, 6],
        "loss_mask": [1, 0, 1],
        "logprobs": [-1.0, 0.0, -2.0],
        "target_logprobs": [-1.5, 0.0, -2.5],
        "logprob_kind": "scaled",
        "pieces": ["x", "y", "z"],
        "prompt": "p",
        "text": "t",
        "reward": 1,
        "level": 3,
    }
    (found,) = rows_of(tmp_path, row)
    rollout = found.rollout
    assert (rollout.key, rollout.token_ids_T.tolist(), rollout.prompt_ids.tolist()) == (("a", 2), [4, 5, 6], [1])
    assert rollout.mask_T.tolist() == [True, False, True] and rollout.token_ids_T[rollout.mask_T].tolist() == [4, 6]
    assert rollout.logprobs_T.tolist() == [-1, 0, -2] and found.target_T.tolist() == [-1.5, 0, -2.5]
    assert (rollout.kind, rollout.text, rollout.reward, rollout.meta) == (LogprobKind.scaled, "t", 1.0, {"level": 3})
    assert (found.prompt, found.pieces) == ("p", ["x", "y", "z"])


TOOL = (90, 91, 92)


def with_tool(row: list[Any], i: int, filling: list[Any]) -> list[Any]:
    """What belongs to response i, with a tool's three tokens after its second and one more before its last."""
    return [*row[:2], *filling[:3], *row[2 : LENGTHS[i] - 1], filling[0], *row[LENGTHS[i] - 1 :]]


def rectangle_with_tool(i: int) -> dict[str, Any]:
    ids, mask = with_tool(IDS[i], i, list(TOOL)), with_tool([1] * LENGTHS[i], i, [0] * 3)
    return verl(i) | {
        "responses": padded(ids, 0, 16),
        "response_mask": padded(mask, 0, 16),
        "attention_mask": verl(i)["attention_mask"][:4] + padded([1] * len(ids), 0, 16),
        "rollout_log_probs": padded(with_tool(Q[i], i, [-1.0, 0.0, -9999.0]), -1.0, 16),
        "old_log_probs": padded(with_tool(P[i], i, [-20.0, 1.0, -3.0]), 0.0, 16),
    }


def list_with_tool(i: int) -> dict[str, Any]:
    """The packed batch of prime-rl."""
    before = len(PROMPTS[i])
    return {
        "input_ids": PROMPTS[i] + with_tool(IDS[i], i, list(TOOL)),
        "loss_mask": [False] * before + with_tool([True] * LENGTHS[i], i, [False] * 3),
        "inference_logprobs": [0.0] * before + with_tool(Q[i], i, [0.0, None, 0.0]),
        "trainer_logprobs": [0.0] * before + with_tool(P[i], i, [-20.0, None, -3.0]),
    }


@pytest.mark.parametrize(("plain", "with_tools"), [(verl, rectangle_with_tool), (prime_rl, list_with_tool)])
def test_a_tools_tokens_change_no_metric_by_a_bit(plain: Any, with_tools: Any, tmp_path: Path) -> None:
    found, folders = [], []
    for name, layout in (("plain", plain), ("tools", with_tools)):
        file = write(tmp_path / f"{name}.jsonl", [layout(i) for i in range(3)])
        folders.append(run_in(tmp_path / name, "experiment=compare", f"compare.behaviour={file}"))
        found += folders[-1].read_json("metrics.json")["comparisons"].values()
    without, masked = found
    ours, theirs = (folder.read_json("metrics.json")["values"] for folder in folders)
    means = [name for name in ours if name.endswith(("logprob_mean", "perplexity"))]
    assert len(means) == 4 and [ours[name] for name in means] == [theirs[name] for name in means]
    # the positions of the worst tokens count a tool's tokens too
    moved = [masked.pop("worst"), without.pop("worst")]
    assert masked == without and masked["findings"] == [] and masked["counts"]["tokens"] == sum(LENGTHS)
    rows = {row["request_id"]: row for row in folders[1].completions.rows()}
    assert all(row["mask"] is None for row in folders[0].completions.rows())
    for i, row in enumerate(rows.values()):
        assert row["token_ids"].tolist() == with_tool(IDS[i], i, list(TOOL)) and not row["logprobs"][~row["mask"]].any()
        assert row["token_ids"][row["mask"]].tolist() == IDS[i] and row["logprobs"][row["mask"]].tolist() == Q[i]
    for with_tool_s, plain_s in zip(*moved, strict=True):
        places = np.flatnonzero(rows[with_tool_s["request_id"]]["mask"])
        assert with_tool_s == plain_s | {"position": places[plain_s["position"]]}


@pytest.mark.parametrize("nothing", [None, float("nan")])
@pytest.mark.parametrize("column", ["logprobs", "target_logprobs"])
def test_a_logprob_that_is_missing_sets_its_response_aside(column: str, nothing: Any, tmp_path: Path) -> None:
    ids = RNG.integers(0, 200, (12, 6))
    q = -RNG.exponential(1, (12, 6))
    rows = [{"id": f"r{i}", "token_ids": ids[i].tolist(), "logprobs": q[i].tolist(), "logprob_kind": "raw",
             "target_logprobs": (q[i] - RNG.exponential(0.1, 6)).tolist()} for i in range(12)]  # fmt: skip
    found = []
    missing = [*rows[4][column][:3], nothing, *rows[4][column][4:]]
    for name, some in (("bad", [*rows[:4], rows[4] | {column: missing}, *rows[5:]]), ("good", rows[:4] + rows[5:])):
        file = write(tmp_path / f"{name}.jsonl", some)
        folder = run_in(tmp_path / name, "experiment=compare", f"compare.behaviour={file}")
        found += folder.read_json("metrics.json")["comparisons"].values()
    bad, good = found
    [finding] = bad["findings"]
    assert (finding["check"], finding["responses"], finding["tokens"]) == ("no_numbers", 1, 1)
    assert finding["example"] == "r4/0 at token 3" and not finding["fatal"] and bad["comparable"]
    assert bad["counts"] == good["counts"] | {"responses_set_aside": 1} and good["counts"]["responses"] == 11
    for name in ("overall", "groups", "positions", "histograms", "worst", "worst_responses"):
        assert bad[name] == good[name], name


def test_a_target_file_that_masks_what_the_behaviour_sampled_gives_no_number_for_it(tmp_path: Path) -> None:
    """The 0 in place of a masked logprob never stands beside a sampled token's."""
    q = write(tmp_path / "q.jsonl", [{"id": f"r{i}", "token_ids": IDS[i], "logprobs": Q[i]} for i in range(3)])
    rows = [{"id": f"r{i}", "token_ids": IDS[i], "logprobs": P[i], "loss_mask": [1] * LENGTHS[i]} for i in range(3)]
    rows[2]["loss_mask"][1] = 0
    files = (f"compare.behaviour={q}", f"compare.target={write(tmp_path / 'p.jsonl', rows)}")
    folder = run_in(tmp_path / "run", "experiment=compare", *files)
    (comparison,) = folder.read_json("metrics.json")["comparisons"].values()
    [finding] = comparison["findings"]
    assert (finding["check"], finding["example"]) == ("no_numbers", "r2/0 at token 1")
    assert comparison["counts"]["responses_set_aside"] == 1 and comparison["counts"]["tokens"] == sum(LENGTHS[:2])


def test_a_row_without_the_targets_logprobs_is_named(tmp_path: Path) -> None:
    file = write(tmp_path / "x.jsonl", [ours(0), ours(1) | {"target_logprobs": None}])
    with pytest.raises(
        UsageError, match=r"response 0 to 'row-1' in x.jsonl has no logprobs: fill column target_logprobs"
    ):
        run_in(tmp_path / "run", "experiment=compare", f"compare.behaviour={file}")


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"token_ids": [1, 2], "logprobs": [-1.0]}], "1 behaviour logprobs for 2 token ids"),
        ([{"token_ids": [1, 2], "logprobs": [-1.0, "-1.0"]}], "behaviour logprobs that are not a list of numbers"),
        ([{"token_ids": [1, 2], "completion_mask": [1], "logprobs": [-1.0, -1.0]}], "1 mask values for 2 token ids"),
        ([{"token_ids": [1, 2], "logprobs": [-1.0, -1.0], "logprob_kind": "natural"}], "unknown kind 'natural'"),
        (
            [{"id": "a", "sample": 0, "token_ids": [1, 2], "logprobs": [-1.0, -1.0]}] * 2,
            "id 'a' and sample 0 of an earlier row",
        ),
        ([{"token_ids": [1, 4.7], "logprobs": [-1.0, -1.0]}], "token ids that are not all whole numbers"),
        ([{"token_ids": [1, 2], "logprobs": [-1.0, -1.0], "sample": "first"}], "'first' as its sample"),
        ([{"token_ids": [1, 2], "logprobs": [-1.0, -1.0], "sample": 1.5}], "1.5 as its sample"),
        ([{"token_ids": [1, 2], "logprobs": [-1.0, -1.0], "id": 1.5}], "1.5 as its id"),
        ([{"token_ids": [1, -2], "logprobs": [-1.0, -1.0]}], "a negative token id"),
        ([{"token_ids": [1, 2], "logprobs": [-1.0, True]}], "logprobs that are not a list of numbers"),
        ([{"token_ids": [1, 2]}], "no column with logprobs"),
        ([{"token_ids": [1, 2], "logprobs": [-1.0, -1.0]}], "one column with logprobs, logprobs: set compare.target"),
    ],
)
def test_what_is_refused(rows: list[dict[str, Any]], words: str, tmp_path: Path) -> None:
    rows = [
        row | ({} if "one column" in words or "no column" in words else {"old_log_probs": [-1.0, -1.0]}) for row in rows
    ]
    with pytest.raises(UsageError, match=words):
        run_in(tmp_path / "run", "experiment=compare", f"compare.behaviour={write(tmp_path / 'x.jsonl', rows)}")


@pytest.mark.parametrize("nothing", [None, float("nan")])
def test_a_file_in_which_every_response_lacks_a_logprob_is_not_comparable(nothing: Any, tmp_path: Path) -> None:
    row = {"token_ids": [1, 2], "logprobs": [-1.0, nothing], "old_log_probs": [-1.0, -1.0]}
    file = write(tmp_path / "x.jsonl", [row])
    with pytest.raises(NotComparableError, match=r"Not comparable: the logprobs hold NaN.* 0/0 at token 1") as caught:
        run_in(tmp_path / "run", "experiment=compare", f"compare.behaviour={file}")
    assert caught.value.exit_code == 3


def test_a_response_in_a_list_with_its_prompt_needs_a_length(tmp_path: Path) -> None:
    row = slime(0)
    del row["response_length"], row["loss_mask"]
    with pytest.raises(UsageError, match="5 behaviour logprobs for 8 token ids"):
        list(open_rollouts(write(tmp_path / "x.jsonl", [row]), key="k", columns={}).rows())
