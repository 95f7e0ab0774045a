"""What runs inside SGLang's scheduler process: token statistics on the engine's own logits, and our sampler.

SGLang (written against 0.5.23) calls `run_scheduler` as its scheduler's main function; hooks are put in place there,
before the engine's modules are used. A request tells the hooks what it wants in its id (`Job`). Statistics ride back on
the engine's `customized_info`, full logits in a memory-mapped file.

An exception that leaves a hook would end the scheduler, and with it the caller: every hook catches its own and reports
it with the request. Never change SGLang's logits in place.

Shapes: R rows of a step, T response tokens, V vocabulary, D hidden size.
"""

from __future__ import annotations

import itertools
import logging
import traceback
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from rl_onoff.backends.sglang import sampler as sglang_sampler
from rl_onoff.backends.sglang.job import INFO, Job
from rl_onoff.backends.token_stats import chunk_rows, token_stats
from rl_onoff.types import TokenScores, copy_rows

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

UNFINISHED = 4096  # responses whose rows are kept while they wait for their last chunk; aborted ones drop out of it


class Rows:
    """The statistics of one response, filled in by position as chunks of its prefill are computed."""

    def __init__(self, job: Job):
        self._job = job
        self._columns: dict[str, np.ndarray] = {}
        self._filled = np.zeros(job.num_tokens, bool)

    def put(self, first: int, stats: TokenScores, logits_RV: Tensor) -> None:
        """Rows from response position `first` on; those before the response and after it are dropped."""
        start, end = max(first, 0), min(first + len(stats.token_ids_T), self._job.num_tokens)
        if start >= end:
            return
        here, there = slice(start, end), slice(start - first, end - first)
        copy_rows(stats[there], self._columns, start, self._job.num_tokens)
        if self._job.logits_file:
            shape = self._job.num_tokens, logits_RV.shape[-1]
            file = np.memmap(self._job.logits_file, np.float32, "r+", shape=shape)
            file[here] = logits_RV[there].float().cpu().numpy()
        self._filled[here] = True

    @property
    def complete(self) -> bool:
        return bool(self._filled.all())

    def columns(self) -> dict[str, np.ndarray]:
        return self._columns


class Step:
    """One forward pass that holds requests to be scored: which rows of it belong to which response."""

    unfinished: ClassVar[OrderedDict[str, Rows]] = (
        OrderedDict()
    )  # of this process, by request id: chunks come in several steps

    def __init__(self, batch: Any, reports: bool):
        self.jobs = [Job.of(rid) for rid in batch.rids]
        self.reports = reports  # False on all but one tensor-parallel rank: they only take part in the LM head
        self.errors: str | None = None
        self._rids = batch.rids
        # of each request: rows with a logprob, and the response position of the first
        self._counts = [
            n - s for n, s in zip(batch.extend_seq_lens_cpu, batch.extend_logprob_start_lens_cpu, strict=True)
        ]
        starts = [p + s for p, s in zip(batch.extend_prefix_lens_cpu, batch.extend_logprob_start_lens_cpu, strict=True)]
        self._first = [start - (job.prompt_len - 1) if job else 0 for start, job in zip(starts, self.jobs, strict=True)]
        self._ends = list(itertools.accumulate(self._counts))
        reached = [p + n for p, n in zip(batch.extend_prefix_lens_cpu, batch.extend_seq_lens_cpu, strict=True)]
        # a chunk that is not the last gives nothing back, even when the one token after it has no row to wait for
        self._last = [
            job is not None and end >= job.prompt_len + job.num_tokens
            for end, job in zip(reached, self.jobs, strict=True)
        ]

    def add(self, lo: int, hi: int, logits_RV: Tensor, token_ids_R: Tensor) -> np.ndarray:
        """Take in the logits of logprob rows [lo, hi) of the step; returns the logprobs of their tokens."""
        # (where a request's rows are kept, what it wants, its rows among the hi - lo, response position of the first)
        pieces = []
        for i, (end, count) in enumerate(zip(self._ends, self._counts, strict=True)):
            start = end - count
            a, b = max(lo, start), min(hi, end)
            job = self.jobs[i]
            if a < b and job is not None and job.num_tokens:
                pieces.append((self._rows(i, job), job.want, slice(a - lo, b - lo), self._first[i] + a - start))
        wants = [want for _, want, _, _ in pieces]
        whole = token_stats(logits_RV, token_ids_R, wants[0]) if all(want == wants[0] for want in wants) else None
        logprobs_R = np.empty(hi - lo, np.float32)
        for kept, want, rows, first in pieces:
            stats = whole[rows] if whole else token_stats(logits_RV[rows], token_ids_R[rows], want)
            logprobs_R[rows] = stats.logprobs_T
            kept.put(first, stats, logits_RV[rows])
        return logprobs_R

    def _rows(self, i: int, job: Job) -> Rows:
        rid = self._rids[i]
        if rid not in self.unfinished:
            self.unfinished[rid] = Rows(job)
            while len(self.unfinished) > UNFINISHED:
                self.unfinished.popitem(last=False)
        return self.unfinished[rid]

    def info(self) -> list[dict[str, Any] | None]:
        """What each request of the step gets back: its statistics, with its last chunk."""
        infos: list[dict[str, Any] | None] = []
        for rid, job, last in zip(self._rids, self.jobs, self._last, strict=True):
            if self.errors and job and job.num_tokens:
                infos.append({"error": self.errors})
                self.unfinished.pop(rid, None)
            else:
                rows = self.unfinished.pop(rid, None) if last else None
                infos.append(rows.columns() if rows is not None and rows.complete else None)
        return infos


_step: Step | None = None  # the forward pass under way in this process, when it scores


def around_forward(original: Callable[..., Any], runner: Any, forward_batch: Any, *args: Any, **kwargs: Any) -> Any:
    """ModelRunner.forward: knows the requests, which the logits' code below does not."""
    global _step
    try:
        scores = forward_batch.return_logprob and forward_batch.forward_mode.is_extend()
        rids = forward_batch.rids or ()
        if scores and any((job := Job.of(rid)) and job.num_tokens for rid in rids) and all(Job.of(rid) for rid in rids):
            _step = Step(forward_batch, reports=_rank() == 0)
    except Exception:
        log.error("cannot read SGLang's batch:\n%s", traceback.format_exc())
    try:
        output = original(runner, forward_batch, *args, **kwargs)
    finally:
        step, _step = _step, None
    if step is not None and step.reports:
        try:
            logits_output = output.logits_output
            logits_output.customized_info = {**(logits_output.customized_info or {}), INFO: step.info()}
        except Exception:
            log.error("cannot hand on the statistics:\n%s", traceback.format_exc())
    return output


def around_input_logprobs(original: Callable[..., Any], processor: Any, *args: Any, **kwargs: Any) -> Any:
    """InputLogprobProcessor.forward: instead of one pass of SGLang's and one of ours, the LM head runs once, in chunks."""
    metadata = kwargs.get("logits_metadata")
    if (
        _step is None
        or args
        or metadata is None
        or metadata.extend_return_top_logprob
        or metadata.extend_token_ids_logprob
    ):
        return original(processor, *args, **kwargs)
    return _input_logprobs(_step, **kwargs)


def _input_logprobs(
    step: Step,
    *,
    pruned_states: Tensor,
    sample_indices: Tensor,
    input_logprob_indices: Tensor,
    lm_head: Any,
    get_logits_fn: Callable[..., Tensor],
    logits_metadata: Any,
    **_: Any,
) -> tuple[Any, Tensor]:
    import torch
    from sglang.srt.layers.logprob_processor import LogprobResult

    sampled, logprobs = [], []
    token_ids_R = logits_metadata.extend_input_logprob_token_ids_gpu
    of_sample, of_logprob = (
        np.asarray(logits_metadata.sample_indices_cpu),
        np.asarray(logits_metadata.input_logprob_indices_cpu),
    )
    size = chunk_rows(
        lm_head.num_embeddings if hasattr(lm_head, "num_embeddings") else 2**17, pruned_states.device.type
    )
    for start in range(0, len(pruned_states), size):
        end = min(start + size, len(pruned_states))
        # on every rank alike and outside the `try`: it is collective, and the rest of the engine needs it
        logits_RV = get_logits_fn(pruned_states[start:end], lm_head, logits_metadata, use_logits_buffer=False)
        a, b = np.searchsorted(of_sample, (start, end))
        if a < b:
            sampled.append(logits_RV[sample_indices[a:b] - start])
        lo, hi = np.searchsorted(of_logprob, (start, end))
        values = np.zeros(hi - lo, np.float32)
        if lo < hi and step.reports and not step.errors:
            try:
                rows = of_logprob[lo:hi] - start
                together = rows[-1] - rows[0] == hi - lo - 1
                mine_RV = (
                    logits_RV[rows[0] : rows[-1] + 1] if together else logits_RV[input_logprob_indices[lo:hi] - start]
                )
                values = step.add(int(lo), int(hi), mine_RV, token_ids_R[lo:hi])
            except Exception:
                step.errors = traceback.format_exc()
        logprobs.append(torch.from_numpy(values))
    return LogprobResult(token_logprobs=torch.cat(logprobs).to(pruned_states.device)), torch.cat(sampled)


def _rank() -> int:
    from sglang.srt.runtime_context import get_parallel

    return get_parallel().tp_rank


def run_scheduler(*args: Any, **kwargs: Any) -> None:
    """The main function of SGLang's scheduler process, with our hooks in place."""
    from sglang.srt.managers.scheduler import run_scheduler_process
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    hooks = {
        "sglang.srt.model_executor.model_runner.ModelRunner.forward": around_forward,
        "sglang.srt.layers.logprob_processor.InputLogprobProcessor.forward": around_input_logprobs,
        "sglang.srt.model_executor.model_runner.ModelRunner.sample": sglang_sampler.around_sample,
        "sglang.srt.layers.sampler.Sampler._sample_from_probs": sglang_sampler.around_sample_from_probs,
    }
    for target, hook in hooks.items():
        HookRegistry.register(target, hook, HookType.AROUND)
    run_scheduler_process(*args, **kwargs)  # applies them; one that finds its target gone is logged and left out


def engine_class() -> type:
    """SGLang's Engine with schedulers of ours."""
    from sglang.srt.entrypoints.engine import Engine

    return type("ProbedEngine", (Engine,), {"run_scheduler_process_func": staticmethod(run_scheduler)})
