"""Hidden states inside vLLM: which rows of a step's flattened tokens belong to which job, and what it found."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from rl_onoff.backends.layers import HEAD, LayerSpan, LayerWatch, States, pair_sum
from rl_onoff.types import LayerWant

if TYPE_CHECKING:
    from torch import Tensor

Batch = Iterator[tuple[Mapping[str, Any], int, int, int]]  # job, position of its first scheduled token, count, offset


class StepLayers:
    """The hidden states of the jobs of each step, while a call asks for them."""

    _watch: LayerWatch | None = None

    def __init__(self, model: Any, config: Any, coming: Callable[[], Batch]):
        self._model, self._config, self._coming = model, config, coming  # coming: the batch of the step that begins

    def begin(self, want: LayerWant | None) -> None:
        """Watch from now on; with None no longer."""
        if self._watch is not None:
            self._watch.__exit__()
        self._want, self._states = want, dict[int, States]()  # by job number
        self._watch = want and LayerWatch(self._model, self._config, self._spans, pair_sum).__enter__()

    def _spans(self) -> Iterator[LayerSpan]:
        for job, first, num_tokens, offset in self._coming():
            if job["number"] not in self._states:
                assert self._watch is not None and self._want is not None
                self._states[job["number"]] = self._watch.states(self._want, job["states"], job["length"])
            yield LayerSpan(self._states[job["number"]], offset, offset + num_tokens, first)

    def last(self, hidden_ND: Tensor) -> None:
        """What the LM head is given: vLLM calls the body's `forward`, past the hooks of its `__call__`."""
        if self._watch is not None:
            self._watch.take((HEAD, self._watch.num_layers - 1), hidden_ND)

    def found(self, number: int) -> dict[str, Any]:
        """What a job's scores are to hold beside its statistics."""
        if self._watch is None:
            return {}
        states = self._states.pop(number, None)
        self._watch.check([states] if states is not None else [])
        return {} if states is None else states.found()
