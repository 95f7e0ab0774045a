"""What runs inside SGLang's scheduler process: token statistics on the engine's own logits, and our sampler.

SGLang (written against 0.5.23) calls `run_scheduler` as its scheduler's main function; hooks are put in place there,
before the engine's modules are used. A request tells the hooks what it wants in its id (`Job`). Statistics ride back on
the engine's `customized_info`, full logits in a memory-mapped file.

An exception that leaves a hook would end the scheduler, and with it the caller: every hook catches its own and reports
it with the request. Never change SGLang's logits in place.

Shapes: R rows of a step, T response tokens, V vocabulary, D hidden size.
"""

from __future__ import annotations

import logging
import traceback
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from rl_onoff.backends.sglang import sampler as sglang_sampler
from rl_onoff.backends.sglang.requests import INFO, Job
from rl_onoff.backends.token_stats import PartialScores, Span, chunk_rows, token_stats
from rl_onoff.types import Want

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

UNFINISHED = 4096  # responses whose rows are kept while they wait for their last chunk; aborted ones drop out of it


class Step:
    """One forward pass that holds requests to be scored: which rows of it belong to which response."""

    # of this process, by request id: chunks come in several steps
    unfinished: ClassVar[OrderedDict[str, PartialScores]] = OrderedDict()

    def __init__(self, batch: Any, reports: bool):
        self.reports = reports  # False on all but one tensor-parallel rank: they only take part in the LM head
        self.errors: str | None = None
        self._requests: list[tuple[str, Job, bool]] = []  # (id, job, this is its last chunk)
        self._spans: list[Span] = []  # of the rows with a logprob
        row = 0
        lens = batch.extend_prefix_lens_cpu, batch.extend_seq_lens_cpu, batch.extend_logprob_start_lens_cpu
        for rid, cached, num_tokens, start in zip(batch.rids, *lens, strict=True):
            job = Job.of(rid)
            assert job is not None
            # a chunk that is not the last gives nothing back, even when the one token after it has no row to wait for
            self._requests.append((rid, job, cached + num_tokens >= job.prompt_len + job.num_tokens))
            end = row + num_tokens - start
            if reports and job.num_tokens:
                file = Path(job.logits_file) if job.logits_file else None
                scores = self.unfinished.setdefault(rid, PartialScores(job.num_tokens, job.want, file))
                self._spans.append(Span(scores, row, end, cached + start - (job.prompt_len - 1)))
            row = end
        while len(self.unfinished) > UNFINISHED:
            self.unfinished.popitem(last=False)

    def add(self, at: int, logits_RV: Tensor, token_ids_R: Tensor) -> np.ndarray:
        """Take in the logits of logprob rows from number `at` of the step on; returns the logprobs of their tokens."""
        logprobs_R = np.zeros(len(token_ids_R), np.float32)
        wants: list[Want] = []  # one, but for what is left of a call that was abandoned
        for span in self._spans:
            if span.scores.want not in wants:
                wants.append(span.scores.want)
        for want in wants:
            stats = token_stats(logits_RV, token_ids_R, want)
            logprobs_R = stats.logprobs_T
            for span in self._spans:
                if span.scores.want == want:
                    span.put(at, stats, logits_RV)
        return logprobs_R

    def info(self) -> list[dict[str, Any] | None]:
        """What each request of the step gets back: its statistics, with its last chunk."""
        infos: list[dict[str, Any] | None] = []
        for rid, job, last in self._requests:
            scores = self.unfinished.pop(rid, None) if last or self.errors else None
            if self.errors and job.num_tokens:
                infos.append({"error": self.errors})
            else:
                infos.append(scores.arrays if scores is not None and scores.complete else None)
        return infos


_step: Step | None = None  # the forward pass under way in this process, when it scores


def around_forward(original: Callable[..., Any], runner: Any, forward_batch: Any, *args: Any, **kwargs: Any) -> Any:
    """ModelRunner.forward: knows the requests, which the logits' code below does not."""
    global _step
    try:
        scores = forward_batch.return_logprob and forward_batch.forward_mode.is_extend()
        jobs = [Job.of(rid) for rid in forward_batch.rids or ()]
        if scores and all(jobs) and any(job and job.num_tokens for job in jobs):
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
    """InputLogprobProcessor.forward: instead of one pass of SGLang's and one of ours, the LM head runs once, in
    chunks."""
    metadata = kwargs.get("logits_metadata")
    asks_more = metadata is None or metadata.extend_return_top_logprob or metadata.extend_token_ids_logprob
    if _step is None or args or asks_more:
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
    of_sample = np.asarray(logits_metadata.sample_indices_cpu)
    of_logprob = np.asarray(logits_metadata.input_logprob_indices_cpu)
    size = chunk_rows(getattr(lm_head, "num_embeddings", 2**17), pruned_states.device.type)
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
                mine = slice(rows[0], rows[-1] + 1) if together else input_logprob_indices[lo:hi] - start
                values = step.add(int(lo), logits_RV[mine], token_ids_R[lo:hi])
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
