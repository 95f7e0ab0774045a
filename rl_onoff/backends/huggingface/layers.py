"""Hidden states in a HuggingFace model: which rows of a padded batch belong to which response."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

from rl_onoff.backends.huggingface.model import SplitModel
from rl_onoff.backends.layers import LayerSpan, LayerWatch, first_of, states_name
from rl_onoff.types import Rollout, TokenScores, Want

ScoreBatch = Callable[[Sequence[Rollout], Want], Iterable[TokenScores]]


def scores_and_layers(
    model: SplitModel, batches: Sequence[list[Rollout]], score: ScoreBatch, want: Want
) -> Iterator[TokenScores]:
    """Scores with what `want.layers` asks for, a padded batch at a time."""
    assert want.layers is not None
    for batch in batches if model.splits else ([one] for some in batches for one in some):
        spans: list[LayerSpan] = []
        with LayerWatch(model.whole, model.whole.config, lambda spans=spans: spans, first_of) as watch:
            width = max(rollout.num_tokens for rollout in batch) - 1
            for i, rollout in enumerate(batch):
                length = rollout.num_tokens - 1
                states = watch.states(want.layers, states_name(rollout), length)
                spans.append(LayerSpan(states, i * width, i * width + length, 0))
            scores = score(batch, want)
            watch.check(span.states for span in spans)
        for span, found in zip(spans, scores, strict=True):
            yield replace(found, **span.states.found())
