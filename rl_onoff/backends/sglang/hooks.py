"""What runs inside SGLang's scheduler process: token statistics on the engine's own logits, and our sampler.

SGLang (written against 0.5.23) calls `run_scheduler` as its scheduler's main function; hooks are put in place there,
before the engine's modules are used. A request tells the hooks what it wants in its id (`Job`). Statistics ride back on
the engine's `customized_info`, full logits in a memory-mapped file.

Our sampler draws from the same distribution, and with the same random numbers, as on every other engine. SGLang's own
honours seeds only in deterministic mode, which it refuses on a CPU; takes top-p of the whole distribution and not of
what top-k left; stops at an assertion when min-p meets a seed; and hashes a token's place in the sorted vocabulary, so
that what it draws depends on who else is in the batch.

An exception that leaves a hook would end the scheduler, and with it the caller: every hook catches its own and reports
it with the request. Never change SGLang's logits in place.

Shapes: R rows of a step, T response tokens, V vocabulary, D hidden size, K likeliest tokens.
"""

from __future__ import annotations

import itertools
import logging
import traceback
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import msgspec
import numpy as np

from rl_onoff.backends.sampler import pick
from rl_onoff.backends.sglang.layers import LayerJob, StepLayers
from rl_onoff.backends.token_stats import PartialScores, Span, StatsBuffer, chunk_rows
from rl_onoff.errors import EngineError
from rl_onoff.types import Want

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

INFO = "rl_onoff"  # key of what the hooks send back in meta_info
PREFIX = "rl_onoff "  # of the ids of our requests
UNFINISHED = 4096  # responses whose rows are kept while they wait for their last chunk; aborted ones drop out of it
BLOCK = 128  # random numbers made at a time

_numbers = itertools.count()
_step: Step | None = None  # the forward pass under way in this process, when it scores
_layers: StepLayers | None = None  # of this process, once they were asked for
_keys_R: np.ndarray | None = None  # for the sampling under way in this process
_error = ""  # what failed in the sampling under way


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One request's order: a response to be drawn, or one to be scored. Carried in the request's id, the one thing that
    SGLang hands through untouched."""

    prompt_len: int
    seed: int | None = None  # to generate: the seed of the response
    num_tokens: int = 0  # to score: how many tokens the response has
    want: Want | None = None  # to score
    logits_file: str | None = None  # where to write the full logits: float32 (T, V)
    layers: LayerJob | None = None  # to score: what the hidden states are for

    def rid(self) -> str:
        """A new request id. None is the beginning of another: SGLang aborts by prefix."""
        return f"{PREFIX}{next(_numbers):012d} {msgspec.json.encode(self).decode()}"

    @staticmethod
    @lru_cache(maxsize=8192)
    def of(rid: str) -> Job | None:
        """The job in a request's id; None for a request that is not ours."""
        return msgspec.json.decode(rid.split(" ", 2)[2], type=Job) if rid.startswith(PREFIX) else None


class Step:
    """One forward pass that holds requests to be scored: which rows of it belong to which response."""

    # of this process, by request id: chunks come in several steps
    unfinished: ClassVar[OrderedDict[str, PartialScores]] = OrderedDict()

    def __init__(self, batch: Any, jobs: list[Any], reports: bool):
        self.reports = reports  # False on all but one tensor-parallel rank: they only take part in the LM head
        self.error = ""
        self._requests: list[tuple[str, Job, bool]] = []  # (id, job, this is its last chunk)
        self._spans: list[Span] = []  # of the rows with a logprob
        row = 0
        lens = batch.extend_prefix_lens_cpu, batch.extend_seq_lens_cpu, batch.extend_logprob_start_lens_cpu
        for rid, job, cached, num_tokens, start in zip(batch.rids, jobs, *lens, strict=True):
            # a chunk that is not the last gives nothing back, even when the one token after it has no row to wait for
            self._requests.append((rid, job, cached + num_tokens >= job.prompt_len + job.num_tokens))
            end = row + num_tokens - start
            if reports and job.want is not None:
                file = Path(job.logits_file) if job.logits_file else None
                scores = self.unfinished.setdefault(rid, PartialScores(job.num_tokens, job.want, file))
                self.unfinished.move_to_end(rid)
                self._spans.append(Span(scores, row, end, cached + start - (job.prompt_len - 1)))
            row = end
        while len(self.unfinished) > max(UNFINISHED, len(jobs)):
            self.unfinished.popitem(last=False)
        wants = [span.scores.want for span in self._spans]
        # several after an abandoned call
        self._buffers = [StatsBuffer(row, want) for i, want in enumerate(wants) if want not in wants[:i]]

    def add(self, at: int, logits_RV: Tensor, token_ids_R: Tensor) -> Tensor:
        """Take in the logits of logprob rows from number `at` of the step on; returns the logprobs of their tokens."""
        for span in self._spans:
            span.write_logits(at, logits_RV)
        return [buffer.add(logits_RV, token_ids_R) for buffer in self._buffers][-1]

    def infos(self) -> list[dict[str, Any] | None]:
        """What each request of the step gets back: its statistics, with its last chunk."""
        infos: list[dict[str, Any] | None] = []
        for buffer in self._buffers:
            if buffer.complete:
                scores = buffer.scores()
                for span in self._spans:
                    if span.scores.want == buffer.want:
                        span.put(scores)
        for rid, job, last in self._requests:
            scores = self.unfinished.pop(rid, None) if last or self.error else None
            info = scores.arrays if scores is not None and scores.complete else None
            if info is not None and job.layers is not None and _layers is not None and not self.error:
                try:
                    info = info | _layers.found(rid)
                except EngineError:
                    self.error = traceback.format_exc()
            infos.append({"error": self.error} if self.error and job.want is not None else info)
        return infos


def around_forward(original: Callable[..., Any], runner: Any, forward_batch: Any, *args: Any, **kwargs: Any) -> Any:
    """ModelRunner.forward: knows the requests, which the logits' code below does not."""
    global _step, _layers
    try:
        jobs = [Job.of(rid) for rid in forward_batch.rids or ()]
        scores = forward_batch.return_logprob and forward_batch.forward_mode.is_extend()
        if scores and all(jobs) and any(job and job.want for job in jobs):
            from sglang.srt.runtime_context import get_parallel

            _step = Step(forward_batch, jobs, reports=get_parallel().tp_rank == 0)
            if any(job and job.layers for job in jobs):
                _layers = _layers or StepLayers(runner)
                _layers.begin(forward_batch, [job and job.layers for job in jobs])
    except Exception:
        log.exception("cannot read SGLang's batch")
        if _step is not None:
            _step.error = traceback.format_exc()
    try:
        output = original(runner, forward_batch, *args, **kwargs)
    finally:
        step, _step = _step, None
        if _layers is not None:
            _layers.end()
    if step is not None and step.reports:
        try:
            _give_back(output.logits_output, step.infos())
        except Exception:
            log.exception("cannot hand on the statistics")
    return output


def around_input_logprobs(original: Callable[..., Any], processor: Any, *args: Any, **kwargs: Any) -> Any:
    """InputLogprobProcessor.forward: instead of one pass of SGLang's and one of ours, the LM head runs once, in
    chunks."""
    step, metadata = _step, kwargs.get("logits_metadata")
    asks_more = metadata is None or metadata.extend_return_top_logprob or metadata.extend_token_ids_logprob
    if step is None or metadata is None or args or asks_more:
        return original(processor, *args, **kwargs)
    import torch
    from sglang.srt.layers.logprob_processor import LogprobResult

    states_RD, lm_head = kwargs["pruned_states"], kwargs["lm_head"]
    sampled, logprobs = [], []
    token_ids_R = metadata.extend_input_logprob_token_ids_gpu
    of_sample = np.asarray(metadata.sample_indices_cpu)
    of_logprob = np.asarray(metadata.input_logprob_indices_cpu)
    size = chunk_rows(getattr(lm_head, "num_embeddings", 2**17), states_RD.device.type)
    for start in range(0, len(states_RD), size):
        end = min(start + size, len(states_RD))
        # on every rank alike and outside the `try`: it is collective, and the rest of the engine needs it
        logits_RV = kwargs["get_logits_fn"](states_RD[start:end], lm_head, metadata, use_logits_buffer=False)
        a, b = np.searchsorted(of_sample, (start, end))
        if a < b:
            sampled.append(logits_RV[kwargs["sample_indices"][a:b] - start])
        lo, hi = np.searchsorted(of_logprob, (start, end))
        values = torch.zeros(hi - lo, device=states_RD.device)
        if lo < hi and step.reports and not step.error:
            try:
                rows = of_logprob[lo:hi] - start
                together = rows[-1] - rows[0] == hi - lo - 1
                mine = slice(rows[0], rows[-1] + 1) if together else kwargs["input_logprob_indices"][lo:hi] - start
                values = step.add(int(lo), logits_RV[mine], token_ids_R[lo:hi])
            except Exception:
                step.error = traceback.format_exc()
        logprobs.append(values)
    return LogprobResult(token_logprobs=torch.cat(logprobs)), torch.cat(sampled)


def _give_back(logits_output: Any, infos: list[Any]) -> None:
    logits_output.customized_info = {**(logits_output.customized_info or {}), INFO: infos}


@lru_cache(maxsize=8192)
def keys(seed: int, block: int) -> np.ndarray:
    """A block of the stream that `sampler.Row.key` takes one number after the other from."""
    stream = np.random.Philox(seed)
    stream.advance(block * BLOCK // 4)  # a step of the counter is four numbers
    return stream.random_raw(BLOCK).view(np.int64)


def around_sample(
    original: Callable[..., Any], runner: Any, logits_output: Any, forward_batch: Any, *args: Any, **kwargs: Any
) -> Any:
    """ModelRunner.sample: knows the requests and how far they are, which the sampler does not. Token t of a response is
    drawn with number t of a stream that depends on the response's seed alone."""
    global _keys_R, _error
    try:
        jobs: list[Any] = [Job.of(rid) for rid in forward_batch.rids]
        if all(job is not None and job.seed is not None for job in jobs):
            lens = forward_batch.seq_lens_cpu  # reading the device's own would make it wait
            lens = (forward_batch.seq_lens.cpu() if lens is None else lens).tolist()
            # a prompt that is still being prefilled samples too, and the engine drops it: any number will do
            drawn = [max(0, length - job.prompt_len) for length, job in zip(lens, jobs, strict=True)]
            _keys_R = np.array([keys(job.seed, at // BLOCK)[at % BLOCK] for job, at in zip(jobs, drawn, strict=True)])
    except Exception:
        _error = traceback.format_exc()
    token_ids_R = original(runner, logits_output, forward_batch, *args, **kwargs)
    if _error:
        log.error("our sampler failed inside SGLang:\n%s", _error)
        _give_back(logits_output, [{"sampler_error": _error} for _ in forward_batch.rids])
    _keys_R, _error = None, ""
    return token_ids_R


def around_sample_from_probs(
    original: Callable[..., Any], sampler: Any, probs_RV: Tensor, info: Any, *args: Any, **kwargs: Any
) -> Any:
    """Sampler._sample_from_probs, which the engine calls for every step that is not greedy throughout."""
    global _error
    if _keys_R is None or info.sampling_mask_batch_indices is not None:
        return original(sampler, probs_RV, info, *args, **kwargs)
    import torch

    try:
        token_ids_R = pick(kept_probs(probs_RV, info), torch.as_tensor(_keys_R).to(probs_RV.device, non_blocking=True))
        if info.need_top_k_sampling:  # SGLang writes greedy as top-1, which two equal logits would make a draw
            token_ids_R = torch.where(info.top_ks == 1, probs_RV.argmax(-1), token_ids_R)
        return token_ids_R.int(), None
    except Exception:
        _error = traceback.format_exc()
        return probs_RV.argmax(-1).int(), None  # the request is told that it failed


def kept_probs(probs_RV: Tensor, info: Any) -> Tensor:
    """Probabilities (after temperature) with those that the sampler cuts set to 0, not renormalised.

    Top-k, then top-p of what is left, then min-p relative to the likeliest: as `token_stats.process_logits`, but row by
    row from tensors, so that a GPU need not wait for the host.
    """
    import torch

    kept_RV = probs_RV
    if info.need_top_k_sampling or info.need_top_p_sampling:
        if info.max_top_k is not None and info.max_top_k < probs_RV.shape[-1]:
            sorted_RK, order_RK = probs_RV.topk(info.max_top_k, -1)
        else:
            sorted_RK, order_RK = probs_RV.sort(dim=-1, descending=True, stable=True)
        kth_R1 = sorted_RK.gather(-1, info.top_ks.long().clamp(1, sorted_RK.shape[-1])[:, None] - 1)
        kept_RV = torch.where(kept_RV >= kth_R1, kept_RV, 0.0)
        if info.need_top_p_sampling:
            sorted_RK = torch.where(sorted_RK >= kth_R1, sorted_RK, 0.0)
            share_RK = sorted_RK / sorted_RK.sum(-1, keepdim=True)
            cut_RK = (share_RK.cumsum(-1) - share_RK >= info.top_ps[:, None]) & (info.top_ps < 1)[:, None]
            outside_RV = torch.zeros_like(kept_RV, dtype=torch.bool).scatter_(-1, order_RK, cut_RK)
            kept_RV = kept_RV.masked_fill(outside_RV, 0.0)
    if info.need_min_p_sampling:
        kept_RV = torch.where(kept_RV >= kept_RV.amax(-1, keepdim=True) * info.min_ps[:, None], kept_RV, 0.0)
    return kept_RV


def run_scheduler(*args: Any, **kwargs: Any) -> None:
    """The main function of SGLang's scheduler process, with our hooks in place."""
    from sglang.srt.managers.scheduler import run_scheduler_process
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    for target, hook in {
        "model_executor.model_runner.ModelRunner.forward": around_forward,
        "layers.logprob_processor.InputLogprobProcessor.forward": around_input_logprobs,
        "model_executor.model_runner.ModelRunner.sample": around_sample,
        "layers.sampler.Sampler._sample_from_probs": around_sample_from_probs,
    }.items():
        HookRegistry.register(f"sglang.srt.{target}", hook, HookType.AROUND)
    run_scheduler_process(*args, **kwargs)  # applies them; one that finds its target gone is logged and left out
