"""Measures what the lines judge: draws and scores of one engine, kept under `acceptance/` of the run folder, so that
running again measures only what is missing; and what a model's files and tokenizer say."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from rl_onoff.backends.base import BaseBackend
from rl_onoff.backends.engine_config import EngineConfig
from rl_onoff.data.requests import render
from rl_onoff.errors import UsageError
from rl_onoff.pipeline.stages import Run
from rl_onoff.rundir.provenance import changes
from rl_onoff.rundir.table import (
    COMPLETIONS,
    Row,
    Table,
    rollout_of,
    row_of_rollout,
    row_of_scores,
    score_columns,
    scores_of,
)
from rl_onoff.types import Key, Rollout, SampleRequest, TokenScores, Want, sample_requests

log = logging.getLogger(__name__)

ROUNDS = 64  # most responses that are put one behind the other until there are tokens enough
ANSWER = "It is fine."  # of an assistant, to see what a chat template puts behind it

Draw = Callable[[BaseBackend, Sequence[SampleRequest]], Iterable[Rollout]]


@dataclass(frozen=True, slots=True)
class Bench:
    """One engine, and the tables of what it drew and scored."""

    this: Run
    engine: EngineConfig
    asked: Mapping[str, Any]  # what the rows depend on, beside the engine

    def table(self, name: str, columns: Mapping[str, str] = COMPLETIONS) -> Table:
        """The table of this name; UsageError where it holds rows of another engine, or of other prompts."""
        table = Table(self.this.folder.path / "acceptance" / name, columns)
        table.claim({"backend": self.engine.what_it_computes(), **self.asked}, changes)
        return table

    def fact(self, name: str, fact: str, find: Callable[[BaseBackend], Any]) -> Any:
        """A fact in the record of the table of this name, found once."""
        table = self.table(name)
        if fact not in table.record() or not table.exists():
            table.describe(**{fact: find(self.this.slot.get(self.engine))})
        return table.record()[fact]

    def info(self, name: str) -> dict[str, Any]:
        """What the engine says about itself."""
        return self.fact(name, "engine", lambda backend: asdict(backend.info))

    def name(self, name: str) -> str | None:
        """Engine, version and dtype that made the table of this name."""
        engine = self.table(name).record().get("engine")
        return engine and "{engine} {version} ({dtype})".format(**engine)

    def rollouts(self, name: str, requests: Sequence[SampleRequest], draw: Draw) -> dict[Key, Rollout]:
        """What `draw` gives for the requests."""
        table = self.table(name)
        if missing := _missing(table, requests):
            drawn = draw(self.this.slot.get(self.engine), missing)
            log.info("acceptance: %s", name)
            self._write(table, (row_of_rollout(rollout, "") for rollout in drawn), len(missing))
        return {rollout.key: rollout for rollout in map(rollout_of, table.rows())}

    def scores(self, name: str, rollouts: Sequence[Rollout], *, alone: bool = False) -> dict[Key, TokenScores]:
        """What the engine says of the rollouts, each scored alone, or all in one batch, even where a part is there."""
        table = self.table(name, score_columns())
        if missing := _missing(table, rollouts):
            self.info(name)
            backend, keys = self.this.slot.get(self.engine), {rollout.key for rollout in missing}
            top = max(int(rollout.token_ids_T.max()) for rollout in rollouts)
            if top >= backend.info.vocab_size:
                raise UsageError(f"{self.engine.name} has no token {top}: set target to an engine of the same model")
            log.info("acceptance: %s", name)
            batches = [[rollout] for rollout in missing] if alone else [rollouts]
            found = (scores for batch in batches for scores in backend.score(batch, Want(top_k=20)))
            self._write(table, (row_of_scores(scores) for scores in found if scores.key in keys), len(missing))
        return {scores.key: scores for scores in map(scores_of, table.rows())}

    def _write(self, table: Table, rows: Iterable[Row], total: int) -> None:
        with table.writer() as writer, self.this.progress("acceptance", total) as progress:
            for row in rows:
                writer.append(row)
                progress.add(len(row["token_ids"]))


def _missing(table: Table, items: Sequence[Any]) -> list[Any]:
    done = table.keys()
    return [item for item in items if item.key not in done]


def draw_in_full(backend: BaseBackend, requests: Sequence[SampleRequest]) -> Iterator[Rollout]:
    """Responses of max_new_tokens tokens: where one ends earlier, the next goes on behind it."""
    asked, drawn = {request.key: request for request in requests}, {}
    waiting = list(requests)
    for _ in range(ROUNDS):
        ended = []
        for part in backend.complete(waiting):
            whole, request = drawn.get(part.key), asked[part.key]
            names = ("token_ids_T", "logprobs_T")
            joined = part
            if whole is not None:
                pieces = {name: np.concatenate([getattr(side, name) for side in (whole, part)]) for name in names}
                joined = replace(part, **pieces)
            drawn[part.key] = replace(joined, prompt_ids=request.prompt_ids)
            if len(joined.token_ids_T) >= request.sampling.max_new_tokens:
                yield drawn.pop(part.key)
            else:
                ended.append(part.key)
        waiting = [_rest(asked[key], drawn[key].token_ids_T) for key in ended]
    yield from drawn.values()


def _rest(request: SampleRequest, token_ids_T: np.ndarray) -> SampleRequest:
    """What is left of a request behind these tokens."""
    prompt_ids = np.concatenate([request.prompt_ids, token_ids_T])
    sampling = request.sampling.replace(max_new_tokens=request.sampling.max_new_tokens - len(token_ids_T))
    return sample_requests(id=request.request_id, prompt_ids=prompt_ids, sampling=sampling, samples=[request.sample])[0]


def draw_again(backend: BaseBackend, requests: Sequence[SampleRequest]) -> Iterator[Rollout]:
    """Responses drawn when the engine has seen the prompts, of which one token leaves as much in its cache as all."""
    list(backend.complete(replace(each, sampling=each.sampling.replace(max_new_tokens=1)) for each in requests))
    yield from draw_in_full(backend, requests)


def head_mass(backend: BaseBackend, rollouts: Sequence[Rollout], rows: Sequence[int]) -> float:
    """The most probability, at any position of the rollouts, on these rows of the LM head."""
    masses = [0.0]
    for scores in backend.score(rollouts, Want(full_logits=True)):
        assert scores.logits_TV is not None
        weights_TV = np.exp(scores.logits_TV.astype(np.float64) - scores.logits_TV.max(-1, keepdims=True))
        masses.append(float((weights_TV[:, rows].sum(-1) / weights_TV.sum(-1)).max()))
    return float(np.max(masses))


def end_tokens(backend: BaseBackend, eos_ids: Collection[int]) -> dict[str, set[int]]:
    """What ends a response, by whom: `config`, `generation config`, `tokenizer`, `template` and `engine`; a source that
    says nothing is left out."""
    tokenizer = backend.get_tokenizer()
    found: dict[str, Any] = {}
    for source, file in (("config", "config.json"), ("generation config", "generation_config.json")):
        said = backend.model_json(file)
        found[source] = said.get("eos_token_id", (said.get("text_config") or {}).get("eos_token_id"))
    found |= {"tokenizer": tokenizer.eos_token_id, "template": turn_end(tokenizer), "engine": list(eos_ids)}
    return {source: set(of) if isinstance(of, list) else {int(of)} for source, of in found.items() if of is not None}


def turn_end(tokenizer: Any) -> int | None:
    """The first special token that the chat template puts behind an answer; None where there is none."""
    messages = [{"role": "user", "content": "How are you?"}, {"role": "assistant", "content": ANSWER}]
    try:
        text = render(messages, tokenizer, {"add_generation_prompt": False}, "the conversation")
    except UsageError:  # it has no template, or one that refuses this
        return None
    behind = tokenizer(text.rpartition(ANSWER)[2], add_special_tokens=False)["input_ids"]
    special = {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", ())}
    return next((token for token in behind if token in special), None)
