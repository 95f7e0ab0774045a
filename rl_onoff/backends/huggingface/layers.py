"""Hidden states in a HuggingFace model: which rows of a padded batch belong to which response."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

from rl_onoff.backends.huggingface.model import SplitModel
from rl_onoff.backends.layers import LayerSpan, LayerWatch, first_of, states_name
from rl_onoff.types import Rollout, TokenScores, Want

Batches = Callable[[Iterable[Rollout]], Iterator[list[Rollout]]]
ScoreBatch = Callable[[Sequence[Rollout], Want, bool], list[TokenScores]]


def scores_and_layers(
    model: SplitModel, cut: Batches, score: ScoreBatch, rollouts: Sequence[Rollout], want: Want
) -> Iterator[TokenScores]:
    """Scores with what `want.layers` asks for, a batch at a time; no prompt is shared."""
    assert want.layers is not None
    waiting = sorted(rollouts, key=lambda rollout: rollout.num_tokens)
    for batch in cut(waiting) if model.splits else ([rollout] for rollout in waiting):
        spans: list[LayerSpan] = []
        with LayerWatch(model.whole, model.whole.config, lambda spans=spans: spans, first_of) as watch:
            width = max(rollout.num_tokens for rollout in batch) - 1
            for i, rollout in enumerate(batch):
                length = rollout.num_tokens - 1
                states = watch.states(want.layers, states_name(rollout), length)
                spans.append(LayerSpan(states, i * width, i * width + length, 0))
            scores = score(batch, want, False)
            watch.check(span.states for span in spans)
        for span, found in zip(spans, scores, strict=True):
            yield found if want.layers.writes else replace(found, layers=span.states.norms)
