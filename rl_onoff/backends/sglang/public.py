"""Token statistics through SGLang's public API alone: slow, for when our code inside the engine does not fit its
version.

The API gives log-probabilities, as Python tuples: the whole vocabulary is asked for at every position. It gives no
logits, and so no logsumexp; but it gives hidden states, and the LM head's weights lie in the model's folder: hidden
state times the row of the chosen token is that token's logit, and logit minus log-probability is the logsumexp. That
holds for a head that is a plain matrix product, which is checked with every response.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rl_onoff.backends.sglang.requests import Emit, check
from rl_onoff.types import Rollout, TokenScores, Want

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

MAX_VALUES = 2**22  # log-probabilities asked for at a time; as Python tuples they take a hundred bytes each
HEADS = ("lm_head.weight", "embed_tokens.weight", "wte.weight")  # names the LM head ends in, the tied ones last
TOLERANCE = 0.5  # nats by which the logits of two tokens may miss the difference of their log-probabilities


class PublicScorer:
    """Scores one response at a time."""

    def __init__(self, engine: Any):
        self._engine = engine
        model = engine.tokenizer_manager.model_config
        self._vocab_size = model.vocab_size
        self._head_VD = lm_head(model.model_path, model.vocab_size)
        if self._head_VD is None:
            self._no_logsumexp(f"no LM head was found in {model.model_path}")

    def _no_logsumexp(self, why: str) -> None:
        self._head_VD = None
        log.warning(
            "SGLang's public API gives no logsumexp for this model (%s): logsumexp is NaN, and full logits are "
            "log-probabilities, which differ from logits by a constant in each row", why,
        )  # fmt: skip

    async def score(self, response: Rollout, want: Want, emit: Emit) -> None:
        import torch

        from rl_onoff.backends.token_stats import token_stats

        rows = max(1, MAX_VALUES // self._vocab_size)
        parts = []
        for start in range(0, len(response.token_ids_T), rows):
            token_ids_R = response.token_ids_T[start : start + rows]
            logprobs_RV, hidden_RD = await self._rows(response, start, start + len(token_ids_R))
            logsumexp_R = self._logsumexp(logprobs_RV, hidden_RD, token_ids_R)
            logits_RV = logprobs_RV if logsumexp_R is None else logprobs_RV + logsumexp_R[:, None]
            part = token_stats(logits_RV, torch.from_numpy(token_ids_R), want)
            if logsumexp_R is None:
                part = replace(part, logsumexp_T=np.full(len(token_ids_R), np.nan, np.float32))
            parts.append(part)
        emit(TokenScores.collect(parts, len(response.token_ids_T)).of(response))

    async def _rows(self, response: Rollout, start: int, end: int) -> tuple[Tensor, np.ndarray | None]:
        """Log-probabilities (R, V) and hidden states (R, D) at the positions that give response tokens [start, end)."""
        import torch

        first = len(response.prompt_ids) + start
        output = await self._engine.async_generate(
            input_ids=np.concatenate([response.prompt_ids, response.token_ids_T[:end]]).tolist(),
            sampling_params={"max_new_tokens": 1, "temperature": 0.0},
            return_logprob=True,
            logprob_start_len=first - 1,
            token_ids_logprob=list(range(self._vocab_size)),
            return_hidden_states=self._head_VD is not None,
        )
        meta = output["meta_info"]
        check(meta)
        entries = meta["input_token_ids_logprobs"][1:]  # the first is a placeholder
        logprobs_RV = np.empty((end - start, self._vocab_size), np.float32)
        for row, values in zip(logprobs_RV, entries, strict=True):
            row[:] = np.fromiter((value[0] for value in values), np.float32, self._vocab_size)
        hidden_RD = None
        if self._head_VD is not None:
            # of the prefill: one row for every token that was not cached, the last of which gives the token after `end`
            hidden_RD = np.asarray(meta["hidden_states"][0], np.float32)[-(end - start) - 1 : -1]
        return torch.from_numpy(logprobs_RV), hidden_RD

    def _logsumexp(self, logprobs_RV: Tensor, hidden_RD: np.ndarray | None, token_ids_R: np.ndarray) -> Tensor | None:
        if self._head_VD is None or hidden_RD is None:
            return None
        import torch

        ids_R = torch.from_numpy(token_ids_R).long()
        other_R = torch.where(logprobs_RV.argmax(-1) == ids_R, logprobs_RV.argmin(-1), logprobs_RV.argmax(-1))
        hidden = torch.from_numpy(hidden_RD)

        def logsumexp_R(of_R: Tensor) -> Tensor:
            logits_R = (hidden * self._head_VD[of_R].float()).sum(-1)  # type: ignore[index]
            return logits_R - logprobs_RV.gather(-1, of_R[:, None])[:, 0]

        found_R = logsumexp_R(ids_R)
        miss = float((found_R - logsumexp_R(other_R)).abs().max())
        if miss > TOLERANCE:
            self._no_logsumexp(f"its LM head is no plain matrix product, by {miss:.2g}")
            return None
        return found_R


def lm_head(folder: str, vocab_size: int) -> Tensor | None:
    """The LM head (V, D) among a model folder's safetensors; None when there is none that fits."""
    from safetensors import safe_open

    names = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            names |= dict.fromkeys(tensors.keys(), file)
    for end in HEADS:
        for name, file in names.items():
            if name.endswith(end):
                with safe_open(file, "pt") as tensors:
                    weights_VD = tensors.get_tensor(name)
                if weights_VD.ndim == 2 and len(weights_VD) >= vocab_size:
                    return weights_VD
    return None
