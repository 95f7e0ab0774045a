"""Any change to a row of any format is an answer or one sentence, never a traceback or a number without a word."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rl_onoff.data.formats import FORMATS
from rl_onoff.data.rollouts import load_responses, open_rollouts
from rl_onoff.errors import NotComparableError, UsageError
from tests.data.rollouts import make

FILES = Path(make.__file__).parent
NUMBERS = st.one_of(st.integers(-3, 9), st.floats(), st.floats(-9, 0), st.sampled_from([10**400, 2**31, True, None]))
VALUES = st.recursive(
    st.one_of(st.none(), NUMBERS, st.text(max_size=3), st.lists(NUMBERS, max_size=7)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["score", "weight", "nodes", "role", "content", "0"]), inner, max_size=2),
    ),
    max_leaves=4,
)


def lines(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (FILES / name).read_text().splitlines()]


BASES = {
    "verl": lines("verl.jsonl"),
    "trl": [{name: column[i].tolist() for name, column in make.trl().items() if column.ndim} for i in range(3)],
    "prime-rl": lines("prime-rl/step_9/rank_0.jsonl"),
    "verifiers": lines("verifiers/step_3/train/gsm8k/traces.jsonl"),
    "nemo-rl": lines("nemo-rl/train_data_step8.jsonl"),
    "open-instruct": lines("open-instruct/run_rollouts_000000.jsonl"),
    "skyrl": [
        {name: column[i].tolist() for name, column in make.skyrl(False).items() if column is not None} for i in range(3)
    ],
    "slime": [make.slime(5)],
    "slime-train": [
        json.loads(json.dumps(make.slime_train(version), default=torch.Tensor.tolist)) for version in (1, 2)
    ],
    "verl-text": lines("verl-text/1.jsonl"),
    "trl-text": [{"step": 1, "prompt": "a", "completion": "b", "length": 1.0, "advantage": 0.5}],
    "trl-dataset": lines("trl-dataset.jsonl"),
    "skyrl-text": lines("skyrl-text/global_step_4_evals/gsm8k.jsonl"),
    "roll-text": lines("roll-text/rollout_dump_data.step_3.jsonl"),
    "areal-text": lines("areal-text/6/0.jsonl"),
}


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a row, but of a long list only the first two."""
    inner = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    return [path, *(found for key, each in inner for found in places(each, (*path, key)))]


@st.composite
def changed(draw: st.DrawFn, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rows = copy.deepcopy(rows)
    for _ in range(draw(st.integers(0, 2))):
        path = draw(st.sampled_from([path for path in places(rows) if len(path) > 1]))
        holder: Any = rows
        for key in path[:-1]:
            holder = holder[key]
        if isinstance(holder, dict) and draw(st.booleans()):
            del holder[path[-1]]
        else:
            holder[path[-1]] = draw(VALUES)
    return rows


def holds_no_number(value: Any) -> bool:
    """Whether a list in a row, at any depth, holds null or NaN."""
    if isinstance(value, dict):
        return any(map(holds_no_number, value.values()))
    if isinstance(value, list):
        return any(each is None or each != each or holds_no_number(each) for each in value)
    return False


class Letters:
    """A tokenizer of one token a letter."""

    chat_template, bos_token_id, all_special_ids, name_or_path = "x", None, (), "letters"

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}

    def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> str:
        return "".join(message["content"] for message in messages)

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(map(chr, (i for i in ids if i < 0xD800)))


def test_every_format_is_here() -> None:
    assert BASES.keys() == {format.name for format in FORMATS}


@pytest.mark.parametrize("name", BASES)
def test_any_row_is_an_answer_or_one_sentence(name: str, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    read_plainly = []

    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    @given(changed(BASES[name]))
    def check(rows: list[dict[str, Any]]) -> None:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        for scoring in (True, False):
            try:
                if scoring:
                    found = list(load_responses(str(path), Letters(), format=name))
                else:
                    file = open_rollouts(str(path), key="compare.behaviour", columns={}, format=name)
                    found = [row.rollout for row in file.rows()]
            except (UsageError, NotComparableError) as error:
                assert len(str(error).splitlines()) == 1
                continue
            for rollout in found:
                assert rollout.token_ids_T.dtype == np.int32 and (rollout.token_ids_T >= 0).all()
                assert (rollout.prompt_ids >= 0).all() and isinstance(rollout.meta.get("step", 0), int)
                json.dumps(dict(rollout.meta), allow_nan=False)
                if rollout.logprobs_T is not None:
                    mask_T = np.ones(len(rollout.token_ids_T), bool) if rollout.mask_T is None else rollout.mask_T
                    assert rollout.logprobs_T.shape == mask_T.shape == rollout.token_ids_T.shape
                    assert not rollout.logprobs_T[~mask_T].any() and (rollout.mask_T is None) is bool(mask_T.all())
                    may_be_nan = any(holds_no_number(row) for row in rows)  # which the checks of a comparison set aside
                    assert may_be_nan or not np.isnan(rollout.logprobs_T[mask_T]).any()
            read_plainly.append(rows == BASES[name])

    check()
    assert any(read_plainly), "the rows as they are were read"
