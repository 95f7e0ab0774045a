"""Climb the ladder of causes: try one change at a time, score again where it needs an engine, and keep what explains the gap.

Rungs' scores lie under `scores/attribute/`, out of sight of the normal comparisons, each under a name made of what it computes:
they are found again by any later ladder that asks for the same.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import takewhile
from typing import TYPE_CHECKING

from rl_onoff.attribution.causes import LADDER, Candidate, NotTried
from rl_onoff.attribution.result import KEEP, NOTHING_LEFT, ROUNDING, Attribution, Row, View, Views, gap, skipped, tried
from rl_onoff.backends.engine_config import EngineConfig
from rl_onoff.config import Rung
from rl_onoff.errors import OnOffError, UsageError
from rl_onoff.pipeline.compare_inputs import own_scores
from rl_onoff.redaction import masked
from rl_onoff.rundir.join import sampler_of, scored_as
from rl_onoff.rundir.provenance import engine_of, sampling_of
from rl_onoff.rundir.table import Key, Table, row_of_scores
from rl_onoff.rundir.table import Row as StoredRow
from rl_onoff.types import LogprobKind, Rollout, Sampling, Want

if TYPE_CHECKING:
    from rl_onoff.pipeline.context import Run

log = logging.getLogger(__name__)

COLUMNS = ("request_id", "sample", "token_ids", "logprobs", "logprob_kind", "processed_logprobs", "nucleus_mass")


@dataclass(frozen=True, slots=True)
class Source:
    """Where one side's logprobs come from: rows as they were sampled (`reported`), or rows of a table of scores."""

    rows: dict[Key, StoredRow]
    sampler: Sampling | None = None
    reported: bool = False

    def views(self, kind: LogprobKind) -> Views:
        """The logprobs as ones of `kind`. What was reported while sampling is taken as it is: its label is on trial."""
        if self.reported:
            return {key: View(row["token_ids"], row["logprobs"]) for key, row in self.rows.items()}
        return {key: View(row["token_ids"], scored_as(row, kind, self.sampler)) for key, row in self.rows.items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class State:
    """The two sides with every change that was kept."""

    q: Source
    p: Source
    kind: LogprobKind
    behaviour: EngineConfig | None  # None: not one of ours, or not recorded
    target: EngineConfig | None
    same_ids_only: bool = False  # compare up to the first token in which the ids differ
    without_last: frozenset[Key] = frozenset()  # responses whose last token is left out
    without: frozenset[Key] = frozenset()  # responses that are left out

    def gap(self) -> float:
        q, p = dict(self.q.views(self.kind)), dict(self.p.views(self.kind))
        for key in q.keys() & p.keys():
            if key in self.without:
                del q[key]
                continue
            if self.same_ids_only:
                same = common_prefix(q[key].token_ids_T, p[key].token_ids_T)
                q[key], p[key] = (View(side.token_ids_T[:same], side.logprobs_T[:same]) for side in (q[key], p[key]))
            if key in self.without_last:
                q[key], p[key] = (View(side.token_ids_T[:-1], side.logprobs_T[:-1]) for side in (q[key], p[key]))
        return gap(q, p)


def common_prefix(a: Iterable[int], b: Iterable[int]) -> int:
    """How many tokens two lists of ids share from the start."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


@dataclass(slots=True)
class Ladder:
    """What the rungs are given: the run, the two sides' first state, and a way to score again."""

    this: Run
    name: str  # of the target's scores
    responses: list[Rollout]
    finish_reasons: dict[Key, str | None]
    sampler: Sampling  # that drew the tokens, as far as is known
    own: Source | None  # the behaviour's own scores, where the run has them
    dtypes: dict[str, str]  # of behaviour and target, as the engines said
    floor: float = 0.0
    rows: list[Row] = field(default_factory=list)

    def rescore(self, engine: EngineConfig | None, *, alone: bool = False) -> Source:
        """What `engine` says of the sampled ids, from disk where it said so before; `alone`: one response at a time, in another order."""
        if engine is None:
            raise NotTried(
                "the engine that it needs is not recorded: set target=…, or run the whole of experiment=onoff in this folder"
            )
        if not all(len(response.prompt_ids) for response in self.responses):
            raise NotTried("the responses came without prompt ids")
        want = Want(sampler=self.sampler)
        config = masked(
            {"backend": engine.what_it_computes(), "want": asdict(want), **({"alone": True} if alone else {})}
        )
        digest = hashlib.blake2b(json.dumps(config, sort_keys=True).encode(), digest_size=4).hexdigest()
        table = self.this.folder.scores(f"attribute/{engine.name}-{digest}")
        table.claim(config)
        self._score(table, engine, want, alone)
        keys = {response.key for response in self.responses}
        return Source(_rows(table, keys), self.sampler)

    def _score(self, table: Table, engine: EngineConfig, want: Want, alone: bool) -> None:
        done = table.keys()
        missing = [response for response in self.responses if response.key not in done]
        if not missing:
            return
        backend = self.this.slot.get(engine)
        table.describe(engine=asdict(backend.info))
        windows = [[response] for response in reversed(missing)] if alone else [missing]
        with table.writer() as writer, self.this.progress("attribute", len(missing)) as progress:
            for window in windows:
                for scores in backend.score(window, want):
                    writer.append(row_of_scores(scores))
                    progress.add(len(scores.token_ids_T))

    def climb(self, state: State, rungs: Sequence[Rung]) -> Attribution:
        """Every rung in turn, from the state that the earlier ones left."""
        whole = state.gap()
        for rung in LADDER:
            if rungs and rung not in rungs:
                continue
            log.info("attribute: %s", rung.value)
            if rung is not Rung.noise and whole <= self.floor:
                self.rows.append(skipped(rung, "the gap is not above the noise floor"))
            elif rung is not Rung.noise and state.gap() <= max(NOTHING_LEFT * whole, ROUNDING):
                self.rows.append(skipped(rung, "nothing is left to explain"))
            else:
                state = self._try(rung, state, whole)
        tokens = sum(len(response.token_ids_T) for response in self.responses)
        return Attribution(
            target=self.name,
            gap=whole,
            floor=self.floor,
            left=state.gap(),
            rows=self.rows,
            responses=len(self.responses),
            tokens=tokens,
        )

    def _try(self, rung: Rung, state: State, whole: float) -> State:
        """Try one rung: its best candidate becomes a row, and the next state if it explains enough."""
        try:
            found = LADDER[rung](self, state)
            if isinstance(found, Row):
                self.rows.append(found)
                return state
            best, after = self._best(found)
        except NotTried as reason:
            self.rows.append(skipped(rung, str(reason)))
            return state
        except (
            OnOffError
        ) as error:  # an engine that is not installed, or cannot do this: the other rungs can still be tried
            self.rows.append(skipped(rung, f"it failed ({error})"))
            return state
        before = state.gap()
        row = tried(rung, best.changed, before, after, whole, best.detail)
        self.rows.append(row)
        assert row.share is not None
        return best.state if row.share >= max(KEEP, best.least) else state

    def _best(self, candidates: Sequence[Candidate]) -> tuple[Candidate, float]:
        gaps = []
        for candidate in candidates:
            try:
                gaps.append((candidate.state.gap(), candidate))
            except UsageError as error:
                log.info("attribute: %s cannot be tried: %s", candidate.changed, error)
        if not gaps:
            raise NotTried("what was kept of the scores does not allow it")
        gaps = [item for item in gaps if not math.isnan(item[0])]
        if not gaps:
            raise NotTried("it would leave no token to compare")
        after, best = min(gaps, key=lambda item: item[0])
        return best, after


def run_attribute(this: Run, known: Sequence[EngineConfig]) -> Attribution:
    """Explain the gap between the run's behaviour and one target; writes attribution.json."""
    config, folder = this.config.attribute, this.folder
    if not folder.completions.exists() or not folder.score_names():
        raise UsageError(
            f"{folder.path} has no scored responses to explain: set run_dir to the folder of an earlier experiment=onoff, or "
            "stages=[generate,score,attribute] to do all of it"
        )
    name, own_name = _target(this), own_scores(folder)
    table, record = folder.scores(name), folder.completions.record()
    completions = {
        (row["request_id"], row["sample"]): row
        for row in folder.completions.rows()
        if row["logprobs"] is not None and len(row["token_ids"])
    }
    keys = _chosen(sorted(completions.keys() & table.keys()), config.limit)
    if not keys:
        raise UsageError(
            f"{folder.path} has no responses with logprobs that {name} has scored: score it with experiment=score first"
        )
    q = Source({key: completions[key] for key in keys}, reported=True)
    own = (
        Source(_rows(folder.scores(own_name), set(keys)), sampler_of(folder.scores(own_name)))
        if own_name not in (None, name)
        else None
    )
    behaviour, target = engine_of(record, known), engine_of(table.record(), known) or this.config.target
    engines = {"behaviour": (behaviour, record), "target": (target, table.record())}
    ladder = Ladder(
        this=this,
        name=name,
        responses=[_response(completions[key]) for key in keys],
        finish_reasons={key: completions[key]["finish_reason"] for key in keys},
        sampler=(sampling_of(record) or this.config.sampling).replace(n=1),
        own=own if own is not None and set(own.rows) == set(keys) else None,
        dtypes={
            who: said.get("engine", {}).get("dtype") or (e.weights_dtype if e else "")
            for who, (e, said) in engines.items()
        },
    )
    kind = LogprobKind(completions[keys[0]]["logprob_kind"])
    state = State(
        q=q, p=Source(_rows(table, set(keys)), sampler_of(table)), kind=kind, behaviour=behaviour, target=target
    )
    found = ladder.climb(state, config.rungs)
    folder.write_json("attribution.json", found.to_dict())
    return found


def _target(this: Run) -> str:
    """Name of the scores to explain: the one that was asked for, else the furthest."""
    folder, asked, names = this.folder, this.config.attribute.target, this.folder.score_names()
    if asked is not None:
        if asked not in names:
            raise UsageError(
                f"{folder.path} has no scores {asked!r} but {', '.join(names)}: set attribute.target to one of them"
            )
        return asked
    others = [name for name in names if name != own_scores(folder)] or names
    if len(others) == 1:
        return others[0]
    rows = (row for row in folder.completions.rows(COLUMNS[:5]) if row["logprobs"] is not None)
    q = Source({(row["request_id"], row["sample"]): row for row in rows}, reported=True)
    kind = LogprobKind(next(iter(q.rows.values()))["logprob_kind"]) if q.rows else LogprobKind.raw
    gaps = {}
    for name in others:
        p = Source(_rows(folder.scores(name), set(q.rows)), sampler_of(folder.scores(name)))
        gaps[name] = State(q=q, p=p, kind=kind, behaviour=None, target=None).gap()
    return max(gaps, key=gaps.__getitem__)


def _rows(table: Table, keys: set[Key]) -> dict[Key, StoredRow]:
    return {key: row for row in table.rows(COLUMNS) if (key := (row["request_id"], row["sample"])) in keys}


def _chosen(keys: Sequence[Key], limit: int | None) -> list[Key]:
    """The same `limit` responses every time, whatever order they lie in on disk."""
    return sorted(keys, key=lambda key: hashlib.blake2b(f"{key[1]} {key[0]}".encode(), digest_size=8).digest())[:limit]


def _response(row: StoredRow) -> Rollout:
    return Rollout(
        request_id=row["request_id"], sample=row["sample"], prompt_ids=row["prompt_ids"], token_ids_T=row["token_ids"]
    )
