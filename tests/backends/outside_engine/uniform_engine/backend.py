"""The engine: four calls, and the tokenizer of the fake backend."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
import torch

from rl_onoff.backends import BaseBackend, EngineInfo
from rl_onoff.backends.engine import Supply
from rl_onoff.backends.fake.backend import ByteTokenizer
from rl_onoff.backends.token_stats import token_stats
from rl_onoff.types import FinishReason, LogprobKind, Rollout, Sampling, TokenScores, Want
from uniform_engine import UniformConfig


class UniformBackend(BaseBackend):
    name: ClassVar[str] = "uniform"
    package: ClassVar[str] = "torch"
    config_class = UniformConfig
    logprob_kinds = frozenset({LogprobKind.raw})
    config: UniformConfig

    def check_model(self) -> None:
        """Any name will do."""

    def _load(self) -> EngineInfo:
        self._logits_V = torch.zeros(257)
        self._logits_V[0] = self.config.bias
        return EngineInfo(engine="uniform", version="1", dtype="float32", vocab_size=257, max_len=4096, eos_ids=(256,))

    def _generate(self, supply: Supply) -> Iterator[Rollout]:
        probs_V = self._logits_V.softmax(-1).numpy().astype(np.float64)
        while requests := supply.take(1, wait=True):
            request, stream = requests[0], np.random.default_rng(requests[0].seed)
            ids = stream.choice(257, request.sampling.max_new_tokens, p=probs_V / probs_V.sum()).astype(np.int32)
            yield Rollout(
                request_id=request.request_id,
                sample=request.sample,
                token_ids_T=ids,
                logprobs_T=self._logits_V.log_softmax(-1).numpy()[ids],
                kind=LogprobKind.raw,
                finish_reason=FinishReason.length,
            )

    def _score(self, rollouts: Sequence[Rollout], want: Want) -> Iterator[TokenScores]:
        for rollout in rollouts:
            logits_TV = self._logits_V.expand(len(rollout.token_ids_T), -1)
            yield token_stats(logits_TV, torch.as_tensor(rollout.token_ids_T), want).of(rollout)

    def _close(self) -> None:
        pass

    def _load_tokenizer(self) -> ByteTokenizer:
        return ByteTokenizer()

    @staticmethod
    def sampling_args(sampling: Sampling, eos_ids: Sequence[int], seed: int) -> dict[str, Any]:
        return {"max_new_tokens": sampling.max_new_tokens, "seed": seed}
