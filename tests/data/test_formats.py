"""Files as trainers write them: what is recognised, the right ids, masks and logprobs, steps, and what is refused."""

from __future__ import annotations

import json
import logging
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rl_onoff.data.formats import FORMATS
from rl_onoff.data.rollouts import Recorded, load_responses, open_rollouts
from rl_onoff.data.sources import step_of
from rl_onoff.errors import UsageError
from rl_onoff.types import LogprobKind
from tests.data.rollouts.make import IDS, MASKS, PROMPTS, RESPONSES, REWARDS, TEXTS, P, Q
from tests.running import run_in

FILES = Path(__file__).parent / "rollouts"
SAMPLED = [[t for t, m in enumerate(mask) if m] for mask in MASKS]
BOTH = {  # file -> (format, kind, step) of those with the logprobs of sampler and trainer
    "verl.pt": ("verl", "processed", None),
    "verl.jsonl": ("verl", "processed", None),
    "trl.pt": ("trl", "processed", None),
    "prime-rl/step_9": ("prime-rl", "processed", 9),
    "slime-train.pt": ("slime-train", "scaled", 5),
    "slime-train_5_0.pt": ("slime-train", "scaled", 5),
    "nemo-rl/train_data_step8.jsonl": ("nemo-rl", "processed", 8),
    "skyrl-global_step_6_training_input.pkl": ("skyrl", "raw", 6),
    "skyrl-global_step_6_older.pkl": ("skyrl", "raw", 6),
}
ONE = {  # of the sampler alone
    "verifiers": ("verifiers", "processed", 3),
    "verifiers/step_3/train/gsm8k/traces.jsonl": ("verifiers", "processed", 3),
    "slime/10.pt": ("slime", "scaled", 10),
    "nemo-rl-skipped.jsonl": ("nemo-rl", "processed", None),
    "open-instruct": ("open-instruct", "processed", 7),
}
TEXT = {  # file -> (format, step)
    "verl-text/2.jsonl": ("verl-text", 2),
    "trl-dataset.jsonl": ("trl-dataset", None),
    "skyrl-text": ("skyrl-text", 4),
    "roll-text": ("roll-text", 3),
    "areal-text": ("areal-text", 6),
}


@pytest.fixture(scope="module")
def tokenizer(smollm2):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smollm2)


def opened(name: str, key: str = "compare.behaviour", **options: Any) -> list[Recorded]:
    return list(open_rollouts(str(FILES / name), key=key, columns={}, **options).rows())


def ids_of(row: Recorded) -> list[int]:
    return row.rollout.token_ids_T.tolist()


def mask_of(row: Recorded) -> np.ndarray:
    """Which tokens of a response were sampled."""
    return np.ones(len(row.rollout.token_ids_T), bool) if row.rollout.mask_T is None else row.rollout.mask_T


@pytest.mark.parametrize("name", [*BOTH, *ONE])
def test_sampled_tokens_are_compared_with_their_numbers(name: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    file = open_rollouts(str(FILES / name), key="compare.behaviour", columns={})
    rows = list(file.rows())
    format, kind, step = (BOTH | ONE)[name]
    assert file.format.name == format and file.assumed_kind("behaviour", LogprobKind.raw, "x").value == kind
    assert len(rows) == 3 and ("target" in file.columns) is (name in BOTH)
    for i, row in enumerate(rows):
        kept = SAMPLED[i]
        assert row.rollout.prompt_ids.tolist() == PROMPTS[i] or format not in ("verl", "trl", "skyrl", "open-instruct")
        has_mask, sampled_T = name != "open-instruct", mask_of(row)  # whose file has no mask, and no tool's tokens
        assert ids_of(row) == (IDS[i] if has_mask else [IDS[i][t] for t in kept])
        assert sampled_T.tolist() == ([bool(m) for m in MASKS[i]] if has_mask else [True] * len(kept))
        assert (row.rollout.mask_T is None) is bool(sampled_T.all())
        assert row.rollout.token_ids_T[sampled_T].tolist() == [IDS[i][t] for t in kept]
        assert row.rollout.logprobs_T is not None and row.rollout.logprobs_T.dtype == np.float32
        assert row.rollout.logprobs_T[sampled_T].tolist() == [Q[i][t] for t in kept]
        assert not row.rollout.logprobs_T[~sampled_T].any()
        if name in BOTH:
            assert row.target_T is not None and row.target_T[sampled_T].tolist() == [P[i][t] for t in kept]
            assert not row.target_T[~sampled_T].any()
        else:
            assert row.target_T is None
        assert row.rollout.meta.get("step") == step
    assert len({row.rollout.key for row in rows}) == 3
    said = [text for text in caplog.messages if ": read as " in text]
    where = "" if step is None else f", step {step}"
    assert len(said) == 1 and f"read as {format} (" in said[0]
    tokens = "11 tokens, 2 of them masked" if name != "open-instruct" else f"{sum(map(len, SAMPLED))} tokens"
    assert f"3 responses{where}, {tokens}" in said[0]


@pytest.mark.parametrize("name", [*BOTH, *ONE])
def test_a_tools_tokens_are_context_for_scoring(name: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    found = list(load_responses(str(FILES / name)))
    masked = name != "open-instruct"  # whose file has no mask, and here no tool's tokens
    for i, rollout in enumerate(found):
        kept = range(len(IDS[i])) if masked else SAMPLED[i]
        assert rollout.prompt_ids.tolist() == PROMPTS[i] and rollout.token_ids_T.tolist() == [IDS[i][t] for t in kept]
        mask = None if rollout.mask_T is None else rollout.mask_T.tolist()
        assert mask == ([bool(m) for m in MASKS[i]] if masked and i == 1 else None)
        assert rollout.logprobs_T is not None
        sampled = rollout.logprobs_T if rollout.mask_T is None else rollout.logprobs_T[rollout.mask_T]
        assert sampled.tolist() == [Q[i][t] for t in SAMPLED[i]]
        assert rollout.mask_T is None or set(rollout.logprobs_T[~rollout.mask_T].tolist()) == {0.0}
        assert rollout.kind is not None and rollout.kind.value == (BOTH | ONE)[name][1]
    assert len(found) == 3 and ("2 of them masked" in caplog.text) is masked


@pytest.mark.parametrize(
    "name", ["verl.pt", "prime-rl/step_9", "slime/10.pt", "nemo-rl-skipped.jsonl", "open-instruct"]
)
def test_rewards(name: str) -> None:
    assert [row.rollout.reward for row in opened(name)] == REWARDS


def test_what_a_row_is_called_and_what_else_it_tells() -> None:
    names = {
        "verl.jsonl": ["row-0", "row-1", "row-2"], "verl.pt": ["0", "1", "2"], "trl.pt": ["0", "1", "2"],
        "prime-rl/step_9": ["9/0/0", "9/0/1", "9/0/2"], "slime/10.pt": ["10/0", "10/1", "10/2"],
        "slime-train.pt": ["5/0", "5/1", "5/2"], "slime-train_5_0.pt": ["5/0/0", "5/0/1", "5/0/2"],
        "open-instruct": ["7/0", "7/0", "7/1"], "verifiers": ["t0", "t0", "t1"],
    }  # fmt: skip
    for name, wanted in names.items():
        assert [row.rollout.request_id for row in opened(name)] == wanted, name
    (first, *_, last) = opened("slime/10.pt")
    assert first.rollout.meta == {"step": 10, "weight_version": 3}
    assert opened("prime-rl/step_9")[0].rollout.meta == {"data_source": "gsm8k", "step": 9}
    (given, *_) = load_responses(str(FILES / "slime/10.pt"))
    assert given.meta == {"question": TEXTS[0][0], "answer": "4", "step": 10, "weight_version": 3}
    assert given.text == RESPONSES[0] and last.rollout.text == RESPONSES[2]


@pytest.mark.parametrize("name", TEXT)
def test_text_is_scored_after_tokenising_once_and_never_compared(
    name: str, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    format, step = TEXT[name]
    found = list(load_responses(str(FILES / name), tokenizer, chat_template=True))
    assert f"{Path(name).name} is text, which is tokenised once" in caplog.text
    for (prompt, text), rollout, reward in zip(TEXTS, found, REWARDS, strict=True):
        shown = tokenizer.decode(rollout.prompt_ids)
        chat = format in ("trl-dataset", "roll-text")  # whose prompts went through the chat template
        assert (
            shown.endswith(f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n")
            if chat
            else shown == prompt
        )
        assert rollout.text == text == tokenizer.decode(rollout.token_ids_T) and rollout.logprobs_T is None
        assert rollout.reward == (None if format == "trl-dataset" else reward) and rollout.meta.get("step") == step
        assert rollout.meta["question"] == prompt
    with pytest.raises(UsageError, match=r"text without token ids and logprobs.*set score\.responses=.*rollouts\.md"):
        opened(name)


def test_a_folder_of_step_files_is_one_input_in_the_order_of_its_steps(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    rows = opened("prime-rl")
    assert [row.rollout.request_id for row in rows] == [f"{step}/0/{i}" for step in (9, 10) for i in range(3)]
    assert [row.rollout.meta["step"] for row in rows] == [9, 9, 9, 10, 10, 10]
    assert "prime-rl: read as prime-rl (prime-rl's token export): 2 files, 6 responses, steps 9 to 10" in caplog.text
    assert [row.rollout.meta["step"] for row in opened("slime")] == [2] * 3 + [10] * 3, "without eval_2.pt"


def test_text_of_several_steps(tokenizer: Any) -> None:
    found = list(load_responses(str(FILES / "verl-text"), tokenizer))
    assert [given.key for given in found[:3]] == [("1/0", 0), ("1/0", 1), ("1/2", 0)]
    assert [given.meta["step"] for given in found] == [1, 1, 1, 2, 2, 2, 10, 10, 10]


@pytest.mark.parametrize(
    ("path", "step"),
    [
        ("7.jsonl", 7), ("completions_00005.parquet", 5), ("train_data_step8.jsonl", 8), ("step_3/rank_0.jsonl", 3),
        ("global_step_6_training_input.pkl", 6), ("step_3/train/gsm8k/traces.jsonl", 3), ("rollouts.jsonl", None),
        ("debug_5_rank_0.pt", 5), ("run-1.5b/12.jsonl", 12), ("6/130.jsonl", 130), ("gsm8k.jsonl", None),
    ],
)  # fmt: skip
def test_the_step_in_a_path(path: str, step: int | None) -> None:
    assert step_of(path) == step


def test_a_tables_folder_keeps_apart_what_its_files_number_anew(tmp_path: Path) -> None:
    for step in (10, 9):
        row = {"token_ids": [step], "logprobs": [-1.0], "target_logprobs": [-2.0]}
        (tmp_path / f"{step}.jsonl").write_text(f"{json.dumps(row)}\n{json.dumps(row | {'id': 'a'})}\n")
    rows = list(open_rollouts(str(tmp_path), key="compare.behaviour", columns={}).rows())
    assert [row.rollout.request_id for row in rows] == ["9/0", "9/a", "10/0", "10/a"]
    assert [row.rollout.meta for row in rows] == [{"step": 9}] * 2 + [{"step": 10}] * 2


def test_a_single_tables_name_tells_no_step(tmp_path: Path) -> None:
    path = tmp_path / "rollouts-2.jsonl"
    path.write_text(json.dumps({"token_ids": [1], "logprobs": [-1.0], "weight_version": "7"}))
    (row,) = open_rollouts(str(path), key="compare.target", columns={}).rows()
    assert row.rollout.meta == {"weight_version": 7}


def test_files_of_two_kinds_are_refused(tmp_path: Path) -> None:
    shutil.copy(FILES / "verl.jsonl", tmp_path / "1.jsonl")
    shutil.copy(FILES / "nemo-rl-skipped.jsonl", tmp_path / "2.jsonl")
    with pytest.raises(UsageError, match=r"2\.jsonl is not read as verl like the files before it: set compare\.behav"):
        list(open_rollouts(str(tmp_path), key="compare.behaviour", columns={}).rows())
    with pytest.raises(UsageError, match=r"the folder compare\.behaviour=.* holds no \.jsonl, .* file"):
        (tmp_path / "empty").mkdir()
        open_rollouts(str(tmp_path / "empty"), key="compare.behaviour", columns={})


def test_the_format_can_be_said() -> None:
    found = opened("verl.jsonl", format="columns")[1]
    assert ids_of(found) == IDS[1] and found.rollout.token_ids_T[mask_of(found)].tolist() == [31, 32, 33, 2]
    with pytest.raises(UsageError, match=r"compare\.format is 'nemorl', .*: set compare\.format=nemo-rl"):
        opened("verl.jsonl", format="nemorl")
    with pytest.raises(UsageError, match=r"line 1 of verl\.jsonl has"):
        opened("verl.jsonl", format="slime")


def test_a_tables_columns_groups_and_kind_can_be_named_in_a_format_of_columns(tmp_path: Path) -> None:
    row = json.loads((FILES / "verl.jsonl").read_text().splitlines()[0])
    row |= {"vllm": row.pop("rollout_log_probs"), "level": 3, "sample": 2, "logprob_kind": "raw"}
    (tmp_path / "x.jsonl").write_text(json.dumps(row))
    file = open_rollouts(str(tmp_path / "x.jsonl"), key="compare.behaviour", columns={"behaviour": "vllm"})
    (found,) = file.rows()
    assert file.format.name == "verl" and found.rollout.key == ("row-0", 2) and found.rollout.meta == {"level": 3}
    assert found.rollout.logprobs_T is not None and found.rollout.logprobs_T.tolist() == Q[0]
    assert found.rollout.kind is LogprobKind.raw
    with pytest.raises(
        UsageError, match=r"is read as slime: leave compare\.columns out, or set compare\.format=columns"
    ):
        open_rollouts(str(FILES / "slime/2.pt"), key="compare.behaviour", columns={"behaviour": "x"})


def test_a_trainer_that_skipped_its_logprobs_is_said(caplog: pytest.LogCaptureFixture) -> None:
    file = open_rollouts(str(FILES / "nemo-rl-skipped.jsonl"), key="compare.behaviour", columns={})
    assert "target" not in file.columns and "prev_logprobs are all 0 in its first 3 responses" in caplog.text


def test_numbers_that_are_null_are_kept_where_they_count_and_text_is_refused(tmp_path: Path) -> None:
    row = json.loads((FILES / "prime-rl/step_9/rank_0.jsonl").read_text().splitlines()[1])
    path = tmp_path / "x.jsonl"
    for t in (0, 2):  # a sampled token, and one of a tool
        row["inference_logprobs"][len(PROMPTS[1]) + t] = None
    path.write_text(json.dumps(row))
    (found,) = open_rollouts(str(path), key="compare.behaviour", columns={}).rows()
    assert found.rollout.logprobs_T is not None and mask_of(found).tolist() == [bool(m) for m in MASKS[1]]
    np.testing.assert_array_equal(found.rollout.logprobs_T, [np.nan, *Q[1][1:2], 0, 0, *Q[1][4:]])
    row["inference_logprobs"][len(PROMPTS[1])] = "-0.5"
    path.write_text(json.dumps(row))
    with pytest.raises(UsageError, match=r"line 1 of x\.jsonl has behaviour logprobs that are not a list of numbers"):
        list(open_rollouts(str(path), key="compare.behaviour", columns={}).rows())


class Evil:
    def __reduce__(self) -> Any:
        return print, ("run",)


@pytest.mark.parametrize("ending", ["pt", "pkl"])
def test_a_pickle_runs_no_code(ending: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    path = tmp_path / f"x.{ending}"
    if ending == "pt":
        torch.save({"samples": [Evil()]}, path)
    else:
        path.write_bytes(pickle.dumps({"samples": [Evil()]}))
    for content in (path.read_bytes(), path.read_bytes()[:20], b"", b"\x80\x04."):
        path.write_bytes(content)
        with pytest.raises(UsageError, match=r"x\.\w+ does not open as tensors .*to_parquet") as caught:
            open_rollouts(str(path), key="compare.behaviour", columns={})
        assert len(str(caught.value).splitlines()) == 1
    assert "run" not in capsys.readouterr().out


@pytest.mark.parametrize("protocol", range(2, 6))
def test_tables_in_pickles_of_every_protocol(protocol: int, tmp_path: Path) -> None:
    import torch

    row = {
        "id": "a", "token_ids": np.array([4, 5]), "logprobs": torch.tensor([-1.0, -2.0], dtype=torch.bfloat16),
        "target_logprobs": [np.float32(-0.5), -0.25], "reward": np.float64(0.5), "step": torch.tensor(3),
        "tags": {"x"}, "raw": b"bytes",
    }  # fmt: skip
    (tmp_path / "x.pkl").write_bytes(pickle.dumps([row], protocol=protocol))
    torch.save([row], tmp_path / "x.pt")  # which knows its own protocol alone
    for path in tmp_path.iterdir():
        (found,) = open_rollouts(str(path), key="compare.behaviour", columns={}).rows()
        assert ids_of(found) == [4, 5] and found.rollout.logprobs_T is not None and found.target_T is not None
        assert found.rollout.logprobs_T.tolist() == [-1, -2] and found.target_T.tolist() == [-0.5, -0.25]
        assert (found.rollout.reward, found.rollout.meta) == (0.5, {"step": 3})


def test_open_instruct_rows_with_a_tools_output_need_a_mask(tmp_path: Path) -> None:
    row = json.loads((FILES / "open-instruct/run_rollouts_000000.jsonl").read_text().splitlines()[0])
    row["request_info"] = {"tool_calleds": True}
    (tmp_path / "x.jsonl").write_text(json.dumps(row))
    with pytest.raises(UsageError, match="a tool's output in its response and no mask"):
        open_rollouts(str(tmp_path / "x.jsonl"), key="compare.behaviour", columns={})


@pytest.mark.parametrize("name", ["prime-rl", "skyrl-global_step_6_training_input.pkl"])
def test_a_run_compares_the_two_columns(name: str, tmp_path: Path) -> None:
    folder = run_in(tmp_path / "run", "experiment=compare", f"compare.behaviour={FILES / name}")
    (comparison,) = folder.read_json("metrics.json")["comparisons"].values()
    l = np.array([P[i][t] - Q[i][t] for i in range(3) for t in SAMPLED[i]])  # noqa: E741 - of the papers
    assert comparison["overall"]["kl_k3"]["value"] == pytest.approx(np.mean(np.exp(l) - l - 1), rel=1e-6)
    run_in(tmp_path / "run", "experiment=compare", f"compare.behaviour={FILES / name}")  # the same content


def test_a_run_scores_a_folder(tmp_path: Path) -> None:
    options = ("experiment=score", "backend=fake", "model.name=x", f"score.responses={FILES / 'slime'}")
    folder = run_in(tmp_path / "run", *options)
    assert len(list(folder.completions.rows())) == 6
    assert {json.loads(row["meta"])["step"] for row in folder.completions.rows()} == {2, 10}
    shutil.copytree(FILES / "slime", tmp_path / "slime")
    options = ("experiment=score", "backend=fake", "model.name=x", f"score.responses={tmp_path / 'slime'}")
    run_in(tmp_path / "other", *options)
    (tmp_path / "slime/10.pt").rename(tmp_path / "slime/11.pt")
    with pytest.raises(UsageError, match=r"other/completions holds rows of another config \(content: "):
        run_in(tmp_path / "other", *options)


def test_rollouts_that_are_too_many_to_hold_are_read_again(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    def read() -> list[Any]:
        return [(r.key, r.token_ids_T.tolist(), r.kind) for r in load_responses(str(FILES / "slime"))]

    held, warnings = read(), caplog.messages[:]
    caplog.clear()
    monkeypatch.setattr("rl_onoff.data.rollouts.KEPT_BYTES", 0)
    assert read() == held and caplog.messages == warnings


def test_files_of_one_step_go_on_numbering(tmp_path: Path) -> None:
    for rank in (0, 1):
        row = {"prompt_ids": [rank + 1], "token_ids": [rank], "step": 4, "logprobs": [-1.0]}
        (tmp_path / f"rank_{rank}.jsonl").write_text(json.dumps(row))
    assert [given.key for given in load_responses(str(tmp_path))] == [("4/0", 0), ("4/1", 0)]
    found = open_rollouts(str(tmp_path), key="compare.behaviour", columns={}).rows()
    assert [row.rollout.key for row in found] == [("4/0", 0), ("4/1", 0)]


def test_every_format_has_a_file_here_and_a_row_in_the_docs() -> None:
    read = {format for format, *_ in (*BOTH.values(), *ONE.values(), *TEXT.values())} | {"trl-text"}
    assert {format.name for format in FORMATS} == read
    page = (Path(__file__).parents[2] / "docs/rollouts.md").read_text()
    assert all(f"`{name}`" in page for name in read)


READ = """
import sys
from rl_onoff.data.rollouts import open_rollouts
for _ in open_rollouts(sys.argv[1], key="compare.behaviour", columns={}).rows():
    pass
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_memory_does_not_grow_with_the_rows(ending: str, tmp_path: Path) -> None:
    import pandas as pd

    rows = [
        {"token_ids": list(range(500)), "logprobs": [-0.123456] * 500, "target_logprobs": [-0.2] * 500, "id": str(i)}
        for i in range(100)
    ]
    peaks = []
    for times in (1, 16):
        path = tmp_path / f"{times}.{ending}"
        many = [row | {"id": f"{row['id']}-{k}"} for k in range(times) for row in rows]
        if ending == "jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in many))
        else:
            pd.DataFrame(many).to_parquet(path, row_group_size=500)
        result = subprocess.run([sys.executable, "-c", READ, str(path)], capture_output=True, text=True, check=True)
        peaks.append(int(result.stdout) / 1024)
    assert peaks[1] - peaks[0] < 20, (
        f"{peaks} MB for 250 and 4,000 rows of 1,500 numbers: held, they are 48 MB of floats"
    )
