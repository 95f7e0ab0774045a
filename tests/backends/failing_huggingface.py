"""HuggingFace, but a rank fails on command: the request ids `rank 0` and `rank 1` say which."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rl_onoff.backends.huggingface.backend import HuggingFaceBackend
from rl_onoff.types import Rollout, TokenScores, Want


class FailingHuggingFace(HuggingFaceBackend):
    def _score_batch(self, batch: Sequence[Rollout], want: Want) -> Iterable[TokenScores]:
        me = "rank 0" if self._ranks.leads else "rank 1"
        if any(rollout.request_id == me for rollout in batch):
            raise RuntimeError(f"{me} is out of memory")
        return super()._score_batch(batch, want)
