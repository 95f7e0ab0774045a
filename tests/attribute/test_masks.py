"""Tokens that a mask leaves out are in no gap that the ladder explains."""

import json

import numpy as np

from rl_onoff.attribution.state import State, chosen_rollouts
from tests.running import run_in


def test_masked_tokens_and_rows_without_numbers_are_in_no_gap(tmp_path):
    rng, files = np.random.default_rng(0), {"plain": [], "masked": []}
    for i in range(6):
        q = -rng.exponential(1, 20)
        row = {"id": str(i), "responses": list(range(20)), "rollout_log_probs": q.tolist()}
        row["old_log_probs"] = (q * np.exp(rng.normal(0, 0.1, 20))).tolist()
        files["plain"].append(row)
        put = {"responses": 7, "rollout_log_probs": 0.0, "old_log_probs": -3.0}
        tools = {name: row[name][:5] + [value] * 4 + row[name][5:] for name, value in put.items()}
        files["masked"].append({**row, **tools, "response_mask": [1] * 5 + [0] * 4 + [1] * 15})
    files["masked"].append(files["masked"][0] | {"id": "x", "rollout_log_probs": [None] * 24})
    gaps = {}
    for name, rows in files.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        run = run_in(tmp_path / name, "experiment=compare", f"compare.behaviour={tmp_path / name}.jsonl")
        table = run.scores(run.score_names()[0])
        rollouts = chosen_rollouts(run.completions, table, None)
        assert len(rollouts) == 6
        gaps[name] = State.of(rollouts, table, {}).gap()
        [comparison] = run.read_json("metrics.json")["comparisons"].values()
        assert np.isclose(gaps[name], comparison["overall"]["kl_k3"]["value"], rtol=1e-6)
    assert np.isclose(gaps["plain"], gaps["masked"], rtol=1e-12)
