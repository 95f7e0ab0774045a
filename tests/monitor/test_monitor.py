"""The monitor: every form of input, the numbers of `compare`, what it keeps, and what it says of bad numbers."""

import json
import subprocess
import sys
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from rl_onoff.compare import HEADLINES, Pair, compare
from rl_onoff.errors import UsageError
from rl_onoff.monitor import Monitor
from rl_onoff.rundir.table import RunDir, rollout_of, scores_of
from rl_onoff.types import TokenScores

IDS = [[5, 6, 7, 8], [9, 5]]
Q = [[-1.0, -0.5, -2.0, -0.25], [-0.5, -3.0]]
P = [[-1.25, -0.5, -1.5, -0.5], [-0.75, -2.0]]
ROWS = {"token_ids": IDS, "behaviour_logprobs": Q, "target_logprobs": P}


def padded(fill: float, rows: Sequence[Sequence[float]]) -> np.ndarray:
    return np.array([row + [fill] * (4 - len(row)) for row in rows])


RECTANGLE = {
    "token_ids": padded(0, IDS).astype(int), "behaviour_logprobs": padded(0, Q), "target_logprobs": padded(0, P),
    "mask": padded(0, [[1] * 4, [1] * 2]),
}  # fmt: skip
FORMS = {
    "lists": ROWS,
    "arrays": {name: [np.array(row) for row in rows] for name, rows in ROWS.items()},
    "tensors": {name: [torch.tensor(row) for row in rows] for name, rows in ROWS.items()},
    "a rectangle": RECTANGLE,
    "a rectangle of torch": {name: torch.as_tensor(rows) for name, rows in RECTANGLE.items()},
    "bfloat16": {
        name: torch.as_tensor(rows).bfloat16() if "logprobs" in name else rows for name, rows in RECTANGLE.items()
    },
}


def expected() -> dict[str, float]:
    pairs = []
    for ids, *sides in zip(IDS, Q, P, strict=True):
        q, p = (TokenScores(token_ids_T=np.array(ids), logprobs_T=np.array(side)) for side in sides)
        pairs.append(Pair(behaviour=q, target=p))
    found = compare(pairs, num_resamples=0)
    return {
        f"onoff/{name}": found[name].value for name in HEADLINES if name in found and np.isfinite(found[name].value)
    }


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_numbers_of_compare(tmp_path, form):
    with Monitor(tmp_path) as monitor:
        found = monitor.add(step=1, **FORMS[form])
    counts = {"onoff/responses": 2, "onoff/tokens": 6, "onoff/set_aside": 0, "onoff/comparable": 1}
    assert found == pytest.approx(counts | expected())
    assert all(type(value) is float for value in found.values())


def test_a_step_in_parts_is_the_step(tmp_path):
    with Monitor(tmp_path) as monitor:
        for i in range(2):  # one response at a time, which needs no list around it
            found = monitor.add(step=1, **{name: rows[i] for name, rows in ROWS.items()})
    assert found["onoff/tokens"] == 6 and found["onoff/kl_k3"] == pytest.approx(expected()["onoff/kl_k3"])
    lines = [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    assert [line["onoff/tokens"] for line in lines] == [4, 6] and lines[-1] == {"step": 1, **found}


@pytest.mark.parametrize("filling", [0.0, 1.0, -9999.0, None])
def test_masked_tokens_change_no_metric_by_a_bit(tmp_path, filling):
    ids, q, p = ([[9, *row] if i else [row[0], 0, 0, *row[1:]] for i, row in enumerate(rows)] for rows in (IDS, Q, P))
    for rows in (q, p):
        rows[0][1:3], rows[1][0] = [filling] * 2, filling
    mask = [[1, 0, 0, 1, 1, 1], [0, 1, 1]]
    with Monitor(tmp_path / "a") as one, Monitor(tmp_path / "b") as two:
        masked = one.add(step=1, token_ids=ids, behaviour_logprobs=q, target_logprobs=p, mask=mask)
        assert masked == two.add(step=1, **ROWS)
    rows = {r.request_id: r for r in map(rollout_of, RunDir(tmp_path / "a").completions.rows())}
    assert {len(row.token_ids_T) for row in rows.values()} == {6, 3}


def test_what_is_kept_is_bounded_and_a_later_monitor_goes_on(tmp_path):
    rng = np.random.default_rng(0)

    def train(monitor: Monitor, steps: range) -> None:
        for step in steps:
            q = -rng.exponential(1, (8, 5))
            monitor.add(
                step=step, token_ids=np.ones((8, 5), int), behaviour_logprobs=q, target_logprobs=q * 1.01,
                rewards=range(8), weight_version=step - 1,
            )  # fmt: skip

    with Monitor(tmp_path, keep=4, max_responses=12) as monitor:
        train(monitor, range(1, 4))
    with Monitor(tmp_path, keep=4, max_responses=12) as monitor:
        train(monitor, range(4, 10))
    rollouts = [rollout_of(row) for row in RunDir(tmp_path).completions.rows()]
    scores = {s.key for s in map(scores_of, RunDir(tmp_path).scores("trainer").rows())}
    assert len(rollouts) == 12 == len({r.key for r in rollouts}) and scores == {r.key for r in rollouts}
    kept = [rollout.meta["step"] for rollout in rollouts]
    assert kept.count(1) == 4 and set(kept) > {1, 2, 3, 4}, "fewer of each step as the room goes"
    assert all(rollout.meta["weight_version"] == rollout.meta["step"] - 1 for rollout in rollouts)
    assert len((tmp_path / "steps.jsonl").read_text().splitlines()) == 9


def test_a_training_loop_that_fails_loses_no_row(tmp_path):
    loop = f"monitor = Monitor({str(tmp_path)!r})\nmonitor.add(step=1, **{ROWS!r})\n1 / 0"
    code = f"from rl_onoff.monitor import Monitor\n{loop}"
    assert subprocess.run([sys.executable, "-c", code], stderr=subprocess.DEVNULL).returncode == 1
    assert len(list(RunDir(tmp_path).completions.rows())) == 2


def test_numbers_that_mean_nothing(tmp_path, caplog):
    ids, q = np.ones((4, 50), int), -np.random.default_rng(0).exponential(1, (4, 50))
    with Monitor(tmp_path) as monitor:
        for step in (1, 2):
            found = monitor.add(step=step, token_ids=ids, behaviour_logprobs=np.exp(q), target_logprobs=q)
            assert found["onoff/comparable"] == 0 and "onoff/kl_k3" not in found
    assert caplog.text.count("look like probabilities") == 1
    assert "probabilities" in json.loads((tmp_path / "steps.jsonl").read_text().splitlines()[0])["findings"][0]["fix"]


def test_a_bad_row_is_set_aside(tmp_path):
    q = [row[:] for row in Q] * 10
    q[3] = [-1.0, 7.0]
    with Monitor(tmp_path) as monitor:
        found = monitor.add(step=1, token_ids=IDS * 10, behaviour_logprobs=q, target_logprobs=P * 10)
    assert (found["onoff/set_aside"], found["onoff/comparable"]) == (1, 1) and np.isfinite(found["onoff/kl_k3"])


@pytest.mark.parametrize("name", ["behaviour_logprobs", "target_logprobs", "mask"])
def test_columns_of_other_lengths_are_refused(tmp_path, name):
    with Monitor(tmp_path) as monitor, pytest.raises(UsageError, match=name):
        monitor.add(step=1, **{**ROWS, name: [[1.0], [1.0]]})
