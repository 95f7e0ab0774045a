"""Token statistics through vLLM's public API: whole-vocabulary logits of every position, as Python lists.

Slow (it handles every number of the vocabulary as an object) and only a fallback, for a vLLM whose insides have moved.
The engine must have been started with `logprobs_mode="raw_logits"` and `max_logprobs=-1`: from logits everything
follows, while logprobs have lost their logsumexp.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from rl_onoff.backends.token_stats import chunk_rows, token_stats
from rl_onoff.types import Rollout, TokenScores, Want

PARAMS: dict[str, Any] = {
    "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": -1, "logprobs": -1, "flat_logprobs": True,
    "detokenize": False,
}  # fmt: skip


def stats(output: Any, response: Rollout, want: Want, vocab_size: int) -> TokenScores:
    """Statistics from the RequestOutput of `prompt + response[:-1]`; the last row is that of the sampled token."""
    import torch

    prompt, sampled = output.prompt_logprobs, output.outputs[0].logprobs
    first = len(response.prompt_ids)  # prompt_logprobs[i] tells of token i, given those before it
    rows = [(prompt, position) for position in range(first, first + len(response.token_ids_T) - 1)] + [(sampled, 0)]
    size = chunk_rows(vocab_size, "cpu")
    parts = []
    for at in range(0, len(rows), size):
        logits_RV = torch.from_numpy(
            np.stack([_logits(flat, position, vocab_size) for flat, position in rows[at : at + size]])
        )
        ids_R = torch.from_numpy(np.ascontiguousarray(response.token_ids_T[at : at + size]))
        parts.append(token_stats(logits_RV, ids_R, want))
    return TokenScores.collect(parts, len(rows))


def _logits(flat: Any, position: int, vocab_size: int) -> np.ndarray:
    """One position of a FlatLogprobs, by token id."""
    entries = slice(flat.start_indices[position], flat.end_indices[position])
    logits_V = np.full(vocab_size, -np.inf, np.float32)
    logits_V[np.array(flat.token_ids[entries], np.int64)] = np.array(flat.logprobs[entries], np.float32)
    return logits_V
