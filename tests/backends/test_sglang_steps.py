"""Rows of SGLang's forward passes, without SGLang: which responses they belong to."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from rl_onoff.backends.sglang import hooks
from rl_onoff.types import Want


def test_what_a_step_holds_is_not_taken_for_aborted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hooks, "UNFINISHED", 2)
    monkeypatch.setattr(hooks.Step, "unfinished", type(hooks.Step.unfinished)())

    def step(*names: str) -> None:
        jobs = [hooks.Job(prompt_len=1, num_tokens=9, want=Want())] * len(names)
        lens = {"extend_prefix_lens_cpu": 0, "extend_seq_lens_cpu": 4, "extend_logprob_start_lens_cpu": 0}
        hooks.Step(SimpleNamespace(rids=names, **{name: [n] * len(names) for name, n in lens.items()}), jobs, True)

    step("a", "b")
    step("a", "c")
    assert list(hooks.Step.unfinished) == ["a", "c"]
    step("c", "d", "e")
    assert list(hooks.Step.unfinished) == ["c", "d", "e"]
