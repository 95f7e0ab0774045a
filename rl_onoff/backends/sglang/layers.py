"""Hidden states inside SGLang's scheduler process: which rows of a forward pass belong to which request, and where the
residual stream is (0.5.23)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rl_onoff.backends.layers import LayerSpan, LayerWatch, States, pair_sum
from rl_onoff.errors import EngineError
from rl_onoff.types import LayerWant

if TYPE_CHECKING:
    from torch import Tensor

UNFINISHED = 256  # responses whose norms are kept while they wait for their last chunk


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerJob:
    """What one request's hidden states are for; a part of its `Job`."""

    want: LayerWant
    name: str  # of the response's file
    length: int  # positions


class StepLayers:
    """The hidden states of the requests of each forward pass of this process's model."""

    def __init__(self, runner: Any):
        self._watch = LayerWatch(runner.model, runner.model.config, lambda: self._spans, stream).__enter__()
        self._unfinished: OrderedDict[str, States] = OrderedDict()  # by request id: chunks come in several steps
        self._spans: list[LayerSpan] = []

    def begin(self, batch: Any, jobs: Sequence[LayerJob | None]) -> None:
        """The forward pass of this batch begins; `end` closes it."""
        self._watch.error, offset = "", 0
        lens = batch.extend_prefix_lens_cpu, batch.extend_seq_lens_cpu
        for rid, job, cached, num_tokens in zip(batch.rids, jobs, *lens, strict=True):
            if job is not None:
                if rid not in self._unfinished:
                    self._unfinished[rid] = self._watch.states(job.want, job.name, job.length)
                self._unfinished.move_to_end(rid)
                self._spans.append(LayerSpan(self._unfinished[rid], offset, offset + num_tokens, cached))
            offset += num_tokens
        while len(self._unfinished) > max(UNFINISHED, len(self._spans)):  # aborted ones
            self._unfinished.popitem(last=False)

    def end(self) -> None:
        self._spans = []

    def found(self, rid: str) -> dict[str, Any]:
        """What a request that is done sends back beside its statistics."""
        states = self._unfinished.pop(rid, None)
        if states is None:
            raise EngineError("hidden states are missing: their request was taken for an aborted one")
        self._watch.check([states])
        return states.found()


def stream(output: Any, given: tuple[Any, ...]) -> Tensor:
    """The residual stream after a layer. Where a model leaves the sum to its next layer, the batch among its arguments
    holds summand and residual; other models hand both on as a pair."""
    state = next((each.residual_stream for each in given if hasattr(each, "residual_stream")), None)
    if state is None or state.pending is None or isinstance(output, tuple):
        return pair_sum(output, given)
    if state.pending.owed is not None or not state.pending.update.is_plain_add:
        raise EngineError("this model's layers are no plain sums in SGLang")
    return pair_sum((state.pending.value, state.residual), given)
