"""Our sampler inside SGLang's scheduler: the same distribution, and the same random numbers, as on every other engine.

SGLang's own (0.5.23) honours seeds only in deterministic mode, which it refuses on a CPU; takes top-p of the whole
distribution and not of what top-k left; stops at an assertion when min-p meets a seed; and hashes a token's place in
the sorted vocabulary, so that what it draws depends on who else is in the batch. Here a response's token t is drawn
with number t of a stream that depends on its seed alone, by `sampler.pick`.

Shapes: R rows (requests of the step), V vocabulary.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from rl_onoff.backends.sampler import pick
from rl_onoff.backends.sglang.requests import INFO, Job

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

BLOCK = 128  # random numbers made at a time

_keys_R: np.ndarray | None = None  # for the sampling under way in this process
_error: str | None = None


@lru_cache(maxsize=8192)
def _block(seed: int, block: int) -> np.ndarray:
    stream = np.random.Philox(seed)
    stream.advance(block * BLOCK // 4)  # a step of the counter is four numbers
    return stream.random_raw(BLOCK).view(np.int64)


def key(seed: int, position: int) -> int:
    """Number `position` of the stream that `sampler.Row.key` takes one number after the other from."""
    return int(_block(seed, position // BLOCK)[position % BLOCK])


def kept_probs(
    probs_RV: Tensor, top_k_R: Tensor | None, top_p_R: Tensor | None, min_p_R: Tensor | None, max_top_k: int | None
) -> Tensor:
    """Probabilities (after temperature) with those that the sampler cuts set to 0, not renormalised.

    Top-k, then top-p of what is left, then min-p relative to the likeliest: as `token_stats.process_logits`, but row by
    row from tensors, so that a GPU need not wait for the host.
    """
    import torch

    kept_RV = probs_RV
    if top_k_R is not None or top_p_R is not None:
        vocab_size = probs_RV.shape[-1]
        if max_top_k is not None and max_top_k < vocab_size:
            sorted_RK, order_RK = probs_RV.topk(max_top_k, -1)
        else:
            sorted_RK, order_RK = probs_RV.sort(dim=-1, descending=True, stable=True)
        if top_k_R is not None:
            kth_R1 = sorted_RK.gather(-1, top_k_R.long().clamp(1, sorted_RK.shape[-1])[:, None] - 1)
            kept_RV = torch.where(kept_RV >= kth_R1, kept_RV, 0.0)
            sorted_RK = torch.where(sorted_RK >= kth_R1, sorted_RK, 0.0)
        if top_p_R is not None:
            share_RK = sorted_RK / sorted_RK.sum(-1, keepdim=True)
            cut_RK = (share_RK.cumsum(-1) - share_RK >= top_p_R[:, None]) & (top_p_R < 1)[:, None]
            kept_RV = kept_RV.masked_fill(
                torch.zeros_like(kept_RV, dtype=torch.bool).scatter_(-1, order_RK, cut_RK), 0.0
            )
    if min_p_R is not None:
        kept_RV = torch.where(kept_RV >= kept_RV.amax(-1, keepdim=True) * min_p_R[:, None], kept_RV, 0.0)
    return kept_RV


def around_sample(
    original: Callable[..., Any], runner: Any, logits_output: Any, forward_batch: Any, *args: Any, **kwargs: Any
) -> Any:
    """ModelRunner.sample: knows the requests and how far they are, which the sampler does not."""
    global _keys_R, _error
    try:
        jobs = [Job.of(rid) for rid in forward_batch.rids]
        seeds = [(job.seed, job.prompt_len) for job in jobs if job is not None and job.seed is not None]
        _keys_R = None
        if len(seeds) == len(jobs):
            lens = _lens(forward_batch)
            # a prompt that is still being prefilled samples too, and the engine drops it: any number will do
            _keys_R = np.array(
                [key(seed, max(0, n - prompt_len)) for (seed, prompt_len), n in zip(seeds, lens, strict=True)]
            )
    except Exception:
        _error = traceback.format_exc()
    token_ids_R = original(runner, logits_output, forward_batch, *args, **kwargs)
    if _error is not None:
        log.error("our sampler failed inside SGLang:\n%s", _error)
        infos = [{"sampler_error": _error} for _ in forward_batch.rids]
        logits_output.customized_info = {**(logits_output.customized_info or {}), INFO: infos}
    _keys_R = _error = None
    return token_ids_R


def around_sample_from_probs(
    original: Callable[..., Any],
    sampler: Any,
    probs_RV: Tensor,
    info: Any,
    positions: Tensor,
    simple_sampling_case: bool,
) -> Any:
    """Sampler._sample_from_probs, which the engine calls for every step that is not greedy throughout."""
    global _error
    if _keys_R is None or info.sampling_mask_batch_indices is not None:
        return original(sampler, probs_RV, info, positions, simple_sampling_case)
    try:
        return _draw(probs_RV, info), None
    except Exception:
        _error = traceback.format_exc()
        return probs_RV.argmax(-1).int(), None  # the request is told that it failed


def _draw(probs_RV: Tensor, info: Any) -> Tensor:
    import torch

    assert _keys_R is not None
    top_k_R = info.top_ks if info.need_top_k_sampling else None
    top_p_R = info.top_ps if info.need_top_p_sampling else None
    min_p_R = info.min_ps if info.need_min_p_sampling else None
    kept_RV = kept_probs(probs_RV, top_k_R, top_p_R, min_p_R, info.max_top_k)
    token_ids_R = pick(kept_RV, torch.as_tensor(_keys_R).to(probs_RV.device, non_blocking=True))
    if top_k_R is not None:  # SGLang writes greedy as top-1, which two equal logits would make a draw
        token_ids_R = torch.where(top_k_R == 1, probs_RV.argmax(-1), token_ids_R)
    return token_ids_R.int()


def _lens(forward_batch: Any) -> Sequence[int]:
    """Tokens of every sequence so far, from the host's copy: reading the device's would make it wait."""
    lens = forward_batch.seq_lens_cpu
    return (forward_batch.seq_lens.cpu() if lens is None else lens).tolist()
