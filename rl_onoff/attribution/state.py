"""The case under investigation: the two sides as they stand, and a way to score the same ids again."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from rl_onoff.analysis_config import Rung
from rl_onoff.backends.engine_config import EngineConfig
from rl_onoff.compare import as_kind
from rl_onoff.compare.metrics import token_terms
from rl_onoff.pipeline.stages import Run
from rl_onoff.redaction import masked
from rl_onoff.rundir.join import SCORES, sampler_of
from rl_onoff.rundir.table import Table, rollout_of, row_of_scores, scores_of
from rl_onoff.types import Key, LayerWant, LogprobKind, Rollout, Sampling, TokenScores, Want

COMPLETIONS = ("request_id", "sample", "prompt_ids", "token_ids", "logprobs", "logprob_kind", "mask", "finish_reason")
MOST = 0.5  # least share of the gap that is called the main cause
NOISE = "the noise of the target's engine (its scores alone against its scores in batches)"  # not the verdict's floor
ROUNDING = 1e-11  # nats a token: what float32 logprobs cannot resolve; no floor is lower


class NotTried(Exception):
    """A rung does not apply; the message says why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One rung. `before`, `after` and `share` are None where it was not tried, and `verdict` says why."""

    rung: Rung
    changed: str = ""  # what was changed; the words of the rung's change where it says nothing better
    before: float | None = None
    after: float | None = None
    share: float | None = None
    verdict: str
    switch: str = ""  # which, of a row of the rung `switches`

    @property
    def name(self) -> str:
        return self.switch or self.rung.value


@dataclass(frozen=True, slots=True)
class Side:
    """Where one side's logprobs come from: what was reported while sampling, or a table of scores."""

    rows: dict[Key, TokenScores]
    engine: EngineConfig | None  # None: not one of ours, or not recorded
    sampler: Sampling | None = None
    reported: bool = False

    def as_kind(self, kind: LogprobKind) -> dict[Key, TokenScores]:
        """The logprobs as ones of `kind`; reported ones are taken as they are, since their label is on trial."""
        return {key: row if self.reported else as_kind(row, kind, self.sampler) for key, row in self.rows.items()}


def scored(table: Table, keys: Collection[Key], engine: EngineConfig | None = None) -> Side:
    """What a table says of these responses; rows of all other responses are let go as they pass."""
    rows = (row for row in table.rows(SCORES) if (row["request_id"], row["sample"]) in keys)
    return Side({scores.key: scores for scores in map(scores_of, rows)}, engine, sampler_of(table))


def chosen_rollouts(completions: Table, scores: Table, limit: int | None) -> dict[Key, Rollout]:
    """The same `limit` responses every time, in whatever order they lie on disk: keys are read first, then rows."""
    rows = completions.rows(["request_id", "sample", "logprob_kind"])
    keys = {(row["request_id"], row["sample"]) for row in rows if row["logprob_kind"] is not None} & scores.keys()
    digests = {key: hashlib.blake2b(f"{key[1]} {key[0]}".encode(), digest_size=8).digest() for key in sorted(keys)}
    chosen = dict.fromkeys(sorted(digests, key=digests.__getitem__)[:limit])
    rows = (row for row in completions.rows(COMPLETIONS) if (row["request_id"], row["sample"]) in chosen)
    found = {rollout.key: rollout for rollout in map(rollout_of, rows)}
    told = {key: rollout.logprobs_T for key, rollout in found.items() if rollout.logprobs_T is not None}
    usable = {key for key, logprobs_T in told.items() if len(logprobs_T) and not np.isnan(logprobs_T).any()}
    return {key: found[key] for key in chosen if key in usable}


@dataclass(frozen=True, kw_only=True, slots=True)
class State:
    """The two sides with every change that was kept."""

    behaviour: Side
    target: Side
    kind: LogprobKind
    replays: bool = False  # the target's routers choose the behaviour's experts
    same_ids_only: bool = False  # compare up to the first token in which the ids differ
    without_last: frozenset[Key] = frozenset()  # responses whose last token is left out
    without: frozenset[Key] = frozenset()  # responses that are left out
    masks: Mapping[Key, np.ndarray]  # of the responses that hold tokens which the policy did not sample

    @classmethod
    def of(cls, rollouts: Mapping[Key, Rollout], table: Table, engines: Mapping[str, EngineConfig | None]) -> State:
        """The two sides before any change: what was reported while sampling, and what a table of scores says."""
        rows = {}
        for key, rollout in rollouts.items():
            assert rollout.logprobs_T is not None
            rows[key] = TokenScores(token_ids_T=rollout.token_ids_T, logprobs_T=rollout.logprobs_T)
        behaviour = Side(rows, engines.get("behaviour"), reported=True)
        kind = next(iter(rollouts.values())).kind or LogprobKind.raw
        masks = {key: rollout.mask_T for key, rollout in rollouts.items() if rollout.mask_T is not None}
        target = scored(table, rollouts.keys(), engines.get("target"))
        return cls(behaviour=behaviour, target=target, kind=kind, masks=masks)

    @property
    def engines(self) -> dict[str, EngineConfig]:
        """The engines that are recorded, by side."""
        sides = {"behaviour": self.behaviour.engine, "target": self.target.engine}
        return {who: engine for who, engine in sides.items() if engine is not None}

    def gap(self) -> float:
        return gap(*self.sides())

    def sides(self) -> tuple[dict[Key, TokenScores], dict[Key, TokenScores]]:
        """The tokens of both sides that are compared."""
        q, p = self.behaviour.as_kind(self.kind), self.target.as_kind(self.kind)
        for key in self.without:
            q.pop(key, None)
        for key in q.keys() & p.keys():
            mask_T = self.masks.get(key)
            if mask_T is not None and len(mask_T) == len(q[key].token_ids_T) == len(p[key].token_ids_T):
                q[key], p[key] = q[key][mask_T], p[key][mask_T]
            if self.same_ids_only:
                ours, theirs = q[key].token_ids_T, p[key].token_ids_T
                width = min(len(ours), len(theirs))
                same = int(np.append(ours[:width] == theirs[:width], False).argmin())  # ids shared from the start
                q[key], p[key] = q[key][:same], p[key][:same]
            if key in self.without_last:
                q[key], p[key] = q[key][:-1], p[key][:-1]
        return q, p

    def ids_differ(self) -> list[Key]:
        """Responses of which the two sides hold different ids."""
        q, p = self.behaviour.rows, self.target.rows
        return [key for key in q.keys() & p.keys() if not np.array_equal(q[key].token_ids_T, p[key].token_ids_T)]


def gap(q: Mapping[Key, TokenScores], p: Mapping[Key, TokenScores]) -> float:
    """Mean k3 KL, nats a token, over the tokens of the responses both sides hold; NaN without any.

    Where the sides hold different ids they are compared position by position and a missing token has logprob 0: what a
    trainer sees that puts both into padded tensors.
    """
    ours, theirs = [], []
    for key in sorted(q.keys() & p.keys()):  # in one order, or the last digit would differ between equal gaps
        a, b = q[key].logprobs_T, p[key].logprobs_T
        width = max(len(a), len(b))
        ours.append(np.pad(a, (0, width - len(a))))
        theirs.append(np.pad(b, (0, width - len(b))))
    if not sum(map(len, ours)):
        return math.nan
    return float(token_terms(np.concatenate(ours), np.concatenate(theirs))["kl_k3"].mean())


@dataclass(kw_only=True, slots=True)
class Case:
    """What the rungs are given beside a state: the run, the sampled responses, and a way to score their ids again."""

    this: Run
    rollouts: dict[Key, Rollout]
    records: Mapping[str, Mapping[str, Any]]  # of the tables of behaviour and target
    sampler: Sampling  # that drew the tokens, as far as is known
    own: Side | None  # the behaviour's own scores, where the run has them of all responses
    low: set[str]  # the sides in lower precision than float32, as far as is known
    floor: float = 0.0  # NOISE, nats a token; the noise rung sets it

    def rescore(
        self, engine: EngineConfig | None, *, alone: bool = False, most: int | None = None,
        replays: EngineConfig | None = None,
    ) -> Side:  # fmt: skip
        """What `engine` says of the sampled ids; `alone`: one response at a time, in another order; `most`: of so many
        responses; `replays`: with the experts that this engine chooses in its prefill.

        The scores lie under `scores/attribute/`, out of sight of the normal comparisons, under a name made of what they
        depend on: any later ladder that asks for the same finds them again.
        """
        if engine is None:
            raise NotTried("the engine is not recorded: set target=…, or run all of experiment=onoff in this folder")
        if not all(len(rollout.prompt_ids) for rollout in self.rollouts.values()):
            raise NotTried("the responses came without prompt ids")
        want = Want(sampler=self.sampler)
        if replays is not None:
            engine, replays = engine.with_all_layers_run(), replays.with_all_layers_run()
        # what a switch turns counts here, also where it should change no number
        placed = {name for switch in engine.switches for name in switch.options if name in engine.placement}
        computes = engine.what_it_computes() | {name: getattr(engine, name) for name in placed}
        config = {"backend": computes, "want": asdict(want)}
        config |= {"replays": replays.what_it_computes()} if replays else {}
        config = masked(config | ({"alone": True} if alone else {}))
        digest = hashlib.blake2b(json.dumps(config, sort_keys=True).encode(), digest_size=4).hexdigest()
        table = self.this.folder.scores(f"attribute/{engine.name}-{digest}")
        table.claim(config)
        done, chosen = table.keys(), dict(islice(self.rollouts.items(), most))
        missing = [rollout for key, rollout in chosen.items() if key not in done]
        if not missing:
            return scored(table, chosen.keys(), engine)
        with ExitStack() as stack:
            if replays:
                for left in self.this.folder.path.glob(".experts-*"):  # by a run that was killed
                    shutil.rmtree(left, ignore_errors=True)
                folder = stack.enter_context(TemporaryDirectory(prefix=".experts-", dir=self.this.folder.path))
                experts = LayerWant(folder=str(Path(folder).absolute()), writes=True, states=False)
                with self.this.progress("attribute", len(missing)) as progress:
                    for scores in self.this.slot.get(replays).score(missing, Want(layers=experts)):
                        progress.add(len(scores.token_ids_T))
                want = replace(want, layers=replace(experts, writes=False))
            backend = self.this.slot.get(engine)
            table.describe(engine=asdict(backend.info))
            with table.writer() as writer, self.this.progress("attribute", len(missing)) as progress:
                for window in [[one] for one in reversed(missing)] if alone else [missing]:
                    for scores in backend.score(window, want):
                        writer.append(row_of_scores(scores))
                        progress.add(len(scores.token_ids_T))
        return scored(table, chosen.keys(), engine)
