"""Token statistics through SGLang's public API alone: slow, for when our code inside the engine does not fit its
version.

The API gives log-probabilities, as Python tuples: the whole vocabulary is asked for at every position. It gives no
logits, and so no logsumexp; but it gives hidden states, and the LM head's weights lie in the model's folder: hidden
state times the row of the chosen token is that token's logit, and logit minus log-probability is the logsumexp. That
holds for a head that is a plain matrix product, which is checked with every response.
"""

from __future__ import annotations

import fnmatch
import logging
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from rl_onoff.backends.sglang.hooks import INFO
from rl_onoff.backends.token_stats import stats_of_hidden
from rl_onoff.errors import EngineError
from rl_onoff.types import Rollout, TokenScores, Want

log = logging.getLogger(__name__)

MAX_VALUES = 2**22  # log-probabilities asked for at a time; as Python tuples they take a hundred bytes each
HEADS = ("lm_head.weight", "embed_tokens.weight", "wte.weight")  # names the LM head ends in, the tied ones last
TOLERANCE = 0.5  # nats by which the logits of two tokens may miss the difference of their log-probabilities


def check(meta: dict[str, Any]) -> None:
    """Raise for a request that SGLang gave up, or that our code inside it failed on."""
    reason = meta.get("finish_reason") or {}
    if reason.get("type") == "abort":
        raise EngineError(f"SGLang gave a request up: {reason.get('message')}")
    if reason.get("matched") == "NaN happened":
        why = "the model's logits are not numbers (SGLang: NaN happened)"
        raise EngineError(f"{why}: set backend.dtype=float32 or another model")
    for info in meta.get(INFO) or ():
        if info and (error := info.get("error") or info.get("sampler_error")):
            fix = "set backend.in_engine_stats=false" if "error" in info else "report it with the worker's log"
            raise EngineError(f"our code inside SGLang failed ({error.strip().splitlines()[-1]}): {fix}")


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

    def score(self, response: Rollout, want: Want) -> TokenScores:
        import torch

        positions, token_ids_T = range(len(response.token_ids_T)), torch.from_numpy(response.token_ids_T)
        rows = max(1, MAX_VALUES // self._vocab_size)
        scores = stats_of_hidden(positions, partial(self._logits, response), token_ids_T, want, rows=rows).scores()
        if self._head_VD is None:
            scores = replace(scores, logsumexp_T=np.full_like(scores.logsumexp_T, np.nan))
        return scores.of(response)

    def _logits(self, response: Rollout, at: range) -> Any:
        """Logits (R, V) at the positions that give these response tokens; log-probabilities where there is no head."""
        import torch

        meta = self._engine.generate(
            input_ids=[*response.prompt_ids.tolist(), *response.token_ids_T[: at.stop].tolist()], return_logprob=True,
            sampling_params={"max_new_tokens": 1, "temperature": 0.0}, token_ids_logprob=list(range(self._vocab_size)),
            logprob_start_len=len(response.prompt_ids) + at.start - 1, return_hidden_states=self._head_VD is not None,
        )["meta_info"]  # fmt: skip
        check(meta)
        logprobs_RV = torch.empty(len(at), self._vocab_size)
        # the first entry is a placeholder
        for row_V, values in zip(logprobs_RV.numpy(), meta["input_token_ids_logprobs"][1:], strict=True):
            row_V[:] = np.fromiter((value[0] for value in values), np.float32, self._vocab_size)
        if self._head_VD is None:
            return logprobs_RV
        # of the prefill: one row for every token that was not cached, the last of which gives the token after these
        hidden_RD = torch.from_numpy(np.asarray(meta["hidden_states"][0], np.float32)[-len(at) - 1 : -1])
        ids_R, likeliest_R = torch.from_numpy(response.token_ids_T[at]).long(), logprobs_RV.argmax(-1)
        other_R = torch.where(likeliest_R == ids_R, logprobs_RV.argmin(-1), likeliest_R)
        ids_R2 = torch.stack([ids_R, other_R], -1)
        logits_R2 = (hidden_RD[:, None] * self._head_VD[ids_R2].float()).sum(-1)
        logsumexp_R2 = logits_R2 - logprobs_RV.gather(-1, ids_R2)
        miss = float((logsumexp_R2[:, 0] - logsumexp_R2[:, 1]).abs().max())
        if miss > TOLERANCE:
            self._no_logsumexp(f"its LM head is no plain matrix product, by {miss:.2g}")
            return logprobs_RV
        return logprobs_RV + logsumexp_R2[:, :1]


def lm_head(folder: str, vocab_size: int) -> Any:
    """The LM head (V, D) among a model folder's safetensors; None when there is none that fits."""
    from safetensors import safe_open

    for end in HEADS:
        for file in sorted(Path(folder).glob("*.safetensors")):
            with safe_open(file, "pt") as tensors:
                for name in fnmatch.filter(tensors.keys(), f"*{end}"):
                    weights_VD = tensors.get_tensor(name)
                    if weights_VD.ndim == 2 and len(weights_VD) >= vocab_size:
                        return weights_VD
    return None
