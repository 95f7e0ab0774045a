"""Files that a trainer wrote, from the command line: the step at which it began, what cannot be compared, the gate.

The numbers are those of SmolLM2's rollouts (tests/compare/rollouts.npz), written as a trainer writes them.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from rl_onoff.monitor import Monitor
from tests.conftest import ROOT
from tests.end_to_end.conftest import refused, rl_onoff

FILE = np.load(ROOT / "tests/compare/rollouts.npz")
COMPARE = ("experiment=compare", "tracking=none", "run_dir=run")


def rows(num: int = 120) -> list[dict]:
    """Responses over 8 steps: in bfloat16 as drawn, and in float32."""
    ends = np.cumsum(FILE["lengths_1.0"])[:-1]
    ids, q, p = (np.split(FILE[f"{name}_1.0"].astype(float), ends) for name in ("ids", "drawn", "f32"))
    return [
        {"step": 1 + i * 8 // num, "responses": ids[i].astype(int).tolist(), "rollout_log_probs": q[i].tolist(),
         "old_log_probs": p[i].tolist(), "reward": float(i % 2)}
        for i in range(num)
    ]  # fmt: skip


def write(folder: Path, given: list[dict]) -> Path:
    """Step files, as most trainers write them."""
    for step in {row["step"] for row in given}:
        file = folder / "rollouts" / f"{step}.jsonl"
        file.parent.mkdir(exist_ok=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in given if row["step"] == step))
    return folder / "rollouts"


def found(folder: Path) -> dict:
    return json.loads((folder / "run" / "metrics.json").read_text())


def test_the_step_at_which_sampler_and_trainer_parted_is_named(tmp_path):
    given = rows()
    for row in given[75:]:  # steps 6 to 8: weights that did not arrive
        noise = np.random.default_rng(len(row["responses"])).normal(0, 0.5, len(row["responses"]))
        row["old_log_probs"] = np.minimum(np.array(row["old_log_probs"]) + noise, 0).tolist()
    done = rl_onoff(*COMPARE, f"compare.behaviour={write(tmp_path, given)}", cwd=tmp_path)
    [comparison] = found(tmp_path)["comparisons"].values()
    assert [row["step"] for row in comparison["steps"]] == list(range(1, 9))
    assert comparison["departure"]["step"] == 6 and comparison["comparable"] and comparison["findings"] == []
    assert "Step 6 is the first to leave the band" in done.stdout and "Step 6" in found(tmp_path)["verdict"]
    assert sum(row["counts"]["responses"] for row in comparison["steps"]) == 120


def shifted(given: list[dict]) -> str:
    for row in given:
        row["rollout_log_probs"] = np.roll(row["rollout_log_probs"], 1).tolist()
    return "shifted by +1"


def probabilities(given: list[dict]) -> str:
    for row in given:
        row["old_log_probs"] = np.exp(row["old_log_probs"]).tolist()
    return "probabilities"


def copied(given: list[dict]) -> str:
    for row in given:
        row["old_log_probs"] = row["rollout_log_probs"]
    return "one is a copy of the other"


@pytest.mark.parametrize("plant", [shifted, probabilities, copied])
def test_what_cannot_be_compared_ends_with_3_and_no_kl(tmp_path, plant):
    given = rows()
    words = plant(given)
    sentence = rl_onoff(*COMPARE, f"compare.behaviour={write(tmp_path, given)}", cwd=tmp_path, code=3).stderr
    last = sentence.strip().splitlines()[-1]
    assert last.startswith("rl-onoff: Not comparable: ") and words in last and "Traceback" not in sentence
    told = found(tmp_path)
    [comparison] = told["comparisons"].values()
    assert told["verdict"].startswith("Not comparable: ") and comparison["overall"] == {}
    assert not [name for name in told["values"] if "kl" in name]
    assert any(finding["fatal"] for finding in comparison["findings"])
    assert "Not comparable" in (tmp_path / "run" / "report.html").read_text()


def test_a_row_with_a_fault_is_set_aside_and_said(tmp_path):
    given = rows()
    given[40]["rollout_log_probs"][3] = None
    given[50]["old_log_probs"][0] = -9999.0
    done = rl_onoff(*COMPARE, f"compare.behaviour={write(tmp_path, given)}", cwd=tmp_path)
    [comparison] = found(tmp_path)["comparisons"].values()
    assert {finding["check"] for finding in comparison["findings"]} == {"no_numbers", "sentinels"}
    assert comparison["counts"]["responses"] == 118 and comparison["counts"]["responses_set_aside"] == 2
    assert done.stdout.count("set aside, ") == 2 and "2 responses set aside" in done.stdout


@pytest.mark.parametrize(
    ("metric", "bar", "code"),
    [("kl_k3", 1e-9, 4), ("kl_k3", 0.015, 0), ("ess_token", 0.5, 0), ("ess_token", 1.5, 4), ("ppl_ratio", 1e-9, 4)],
)
def test_the_gate(tmp_path, metric, bar, code):
    gate = (f"compare.fail_above={bar}", f"compare.fail_metric={metric}")
    done = rl_onoff(*COMPARE, f"compare.behaviour={write(tmp_path, rows())}", *gate, cwd=tmp_path, code=code)
    assert "kl_k3" in str(found(tmp_path)["values"]) and (tmp_path / "run" / "report.html").exists()
    if code:
        assert done.stderr.strip().splitlines()[-1].startswith(f"rl-onoff: {metric} of ")


def test_a_bar_for_a_metric_that_the_file_has_not_lets_nothing_pass(tmp_path):
    gate = ("compare.fail_above=0.5", "compare.fail_metric=argmax_agreement")
    done = rl_onoff(*COMPARE, f"compare.behaviour={write(tmp_path, rows())}", *gate, cwd=tmp_path, code=4)
    assert "argmax_agreement was not measured of " in done.stderr and "kl_k3" in done.stderr


def test_a_bar_for_no_metric_is_refused_before_anything_is_read(tmp_path):
    sentence = refused(*COMPARE, "compare.behaviour=no.jsonl", "compare.fail_metric=kl_k4", cwd=tmp_path)
    assert "compare.fail_metric=kl" in sentence


def test_a_monitors_folder_opens(tmp_path):
    with Monitor(tmp_path / "run", keep=20) as monitor:
        for step in range(1, 9):
            of = [row for row in rows() if row["step"] == step]
            monitor.add(
                step=step, token_ids=[row["responses"] for row in of], rewards=[row["reward"] for row in of],
                behaviour_logprobs=[row["rollout_log_probs"] for row in of], weight_version=step - 1,
                target_logprobs=[row["old_log_probs"] for row in of],
            )  # fmt: skip
    rl_onoff(*COMPARE, cwd=tmp_path)
    comparison = found(tmp_path)["comparisons"]["trainer"]
    assert len(comparison["steps"]) == 8 and comparison["counts"]["responses"] == 120
    assert [row["staleness"] for row in comparison["staleness"]] == [1]


def test_an_impossible_token_is_a_fact_and_a_row_without_logprobs_is_said(tmp_path):
    given = rows()
    given[4]["rollout_log_probs"][2] = given[9]["old_log_probs"][1] = -np.inf
    given[0]["rollout_log_probs"] = None
    done = rl_onoff(*COMPARE, f"compare.behaviour={write(tmp_path, given)}", cwd=tmp_path)
    [comparison] = found(tmp_path)["comparisons"].values()
    assert comparison["counts"]["tokens_impossible_target"] == 1 and comparison["counts"]["responses"] == 119
    assert "1 response came without logprobs" in done.stderr + done.stdout
    assert "could not have been drawn by the target's sampler" in done.stdout


SCORE = ("experiment=score", "backend=fake", "model=fake", "tracking=none", "score.responses=r.jsonl")
PAST = "token ids lie past the last row of the target's model in 1 of"


@pytest.mark.parametrize("logprobs", [True, False])
def test_ids_that_the_model_has_no_row_for_are_not_scored_and_said(tmp_path, logprobs):
    given = [{"prompt_ids": [1, 2], "token_ids": ids} for ids in ([5, 6], [5, 999_999], [7, 8])]
    given = [row | {"logprobs": [-1.0, -2.0], "logprob_kind": "raw"} for row in given] if logprobs else given
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given))
    done = rl_onoff(*SCORE, "run_dir=run", cwd=tmp_path)
    assert (
        f"not scored: {PAST} 3 responses (first in 0/1: token id 999999 in its response, and 257 rows)" in done.stdout
    )
    assert found(tmp_path)["values"]["score/fake-fake-auto/responses"] == 2
    [recorded] = json.loads((tmp_path / "run/scores/fake-fake-auto/_made_with.json").read_text())["findings"]
    if logprobs:
        comparison = found(tmp_path)["comparisons"]["fake-fake-auto"]
        assert comparison["findings"] == [recorded] and recorded["check"] == "outside_vocab"
        assert comparison["counts"]["responses_set_aside"] == 1 and comparison["set_aside"] == ["0/1"]
        assert done.stdout.count("set aside, ") == 1 and "1 response set aside" in done.stdout
        assert "token ids lie past the last row" in (tmp_path / "run/report.html").read_text()
    assert not recorded["fatal"] and recorded["responses"] == 1


def test_ids_that_the_model_has_no_row_for_in_many_responses(tmp_path):
    (tmp_path / "r.jsonl").write_text(json.dumps({"prompt_ids": [1, 300], "token_ids": [5]}))
    last = rl_onoff(*SCORE, "run_dir=run", cwd=tmp_path, code=3).stderr.splitlines()[-1]
    assert last.startswith(f"rl-onoff: Not comparable: {PAST} 1 response (first in 0/0: token id 300 in its prompt")
    assert "set model to the one that sampled" in last


def worded(num: int, others: int) -> list[dict]:
    """Responses of bytes with their text, some with the ids of another tokenizer."""
    texts = [f"The answer to question {i} is {i * i}." for i in range(num)]
    made = [[(b + 100 * (i < others)) % 256 for b in text.encode()] for i, text in enumerate(texts)]
    logprobs = [(-np.random.default_rng(i).exponential(8, len(ids))).tolist() for i, ids in enumerate(made)]
    return [
        {"prompt_ids": [1], "token_ids": ids, "response": text, "logprobs": of_ids, "logprob_kind": "raw"}
        for ids, text, of_ids in zip(made, texts, logprobs, strict=True)
    ]  # fmt: skip


def test_ids_of_another_tokenizer_are_found_before_a_model_loads(tmp_path):
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in worded(20, others=3)))
    done = rl_onoff(*SCORE, "run_dir=run", cwd=tmp_path, code=3)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("rl-onoff: Not comparable: the token ids are not those of the text beside them in 3 of 20")
    assert "the text is 'The answer to question 0'" in last and "set model" in last
    assert "loading fake" not in done.stdout + done.stderr and not list((tmp_path / "run").glob("scores/*"))


def test_a_row_with_ids_of_another_tokenizer_is_set_aside(tmp_path):
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in worded(20, others=1)))
    done = rl_onoff(*SCORE, "run_dir=run", cwd=tmp_path)
    [finding] = found(tmp_path)["comparisons"]["fake-fake-auto"]["findings"]
    assert (finding["check"], finding["responses"], finding["fatal"]) == ("other_text", 1, False)
    assert found(tmp_path)["comparisons"]["fake-fake-auto"]["counts"]["responses"] == 19
    assert "r.jsonl: the token ids are not those of the text beside them in 1 of 20" in done.stdout


@pytest.mark.parametrize(("num", "code"), [(2, 0), (120, 3)])
def test_texts_of_a_file_are_looked_at_where_its_tokenizer_is_named(tmp_path, num, code):
    from rl_onoff.models.resolve import load_tokenizer

    given, tokenizer = rows(), load_tokenizer("smollm2")
    for i, row in enumerate(given):
        read = np.array(row["responses"])
        row["response"] = tokenizer.decode(read + 7 * (read >= 400) * (i < num))
    file = f"compare.behaviour={write(tmp_path, given)}"
    rl_onoff(*COMPARE, file, cwd=tmp_path)
    [comparison] = found(tmp_path)["comparisons"].values()
    assert comparison["findings"] == [], "nothing reads the ids"
    done = rl_onoff(*COMPARE, file, "compare.tokenizer=smollm2", cwd=tmp_path, code=code)
    [comparison] = found(tmp_path)["comparisons"].values()
    [finding] = comparison["findings"]
    assert (finding["check"], finding["responses"], finding["fatal"]) == ("other_text", num, code == 3)
    assert (done.stdout + done.stderr).count("the token ids are not those of the text beside them") == 1


@pytest.mark.parametrize(("num", "code"), [(2, 0), (120, 3)])
def test_ids_past_a_tokenizers_last_token_are_found_without_any_text(tmp_path, num, code):
    given = rows()
    for row in given[:num]:
        row["responses"] = [*row["responses"][:-1], 60_000]
    file = f"compare.behaviour={write(tmp_path, given)}"
    rl_onoff(*COMPARE, file, "compare.tokenizer=smollm2", cwd=tmp_path, code=code)
    [comparison] = found(tmp_path)["comparisons"].values()
    [finding] = comparison["findings"]
    assert (finding["check"], finding["responses"], finding["fatal"]) == ("outside_tokenizer", num, code == 3)
    assert "token id 60000 in its response" in finding["example"]
