"""Climb the ladder of causes: try one change at a time and keep what explains the gap."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace

from rl_onoff.attribution.causes import LADDER, Cause
from rl_onoff.attribution.result import KEEP, NOTHING_LEFT, ROUNDING, Attribution, Row, tried
from rl_onoff.attribution.state import Case, NotTried, State, chosen_rollouts, sampled, scored
from rl_onoff.backends.engine_config import EngineConfig
from rl_onoff.config import Rung
from rl_onoff.errors import OnOffError, UsageError
from rl_onoff.pipeline.compare_inputs import own_scores
from rl_onoff.pipeline.stages import Run
from rl_onoff.rundir.provenance import engine_of, sampling_of
from rl_onoff.types import LogprobKind

log = logging.getLogger(__name__)


def climb(case: Case, state: State, rungs: Sequence[Rung]) -> Attribution:
    """Every rung in turn (all of them where none is named), from the state that the earlier ones left."""
    whole, rows = state.gap(), []
    for cause in LADDER:
        if rungs and cause.rung not in rungs:
            continue
        log.info("attribute: %s", cause.rung.value)
        try:
            if cause.rung is not Rung.noise:
                if whole <= case.floor:
                    raise NotTried("the gap is not above the noise floor")
                if state.gap() <= max(NOTHING_LEFT * whole, ROUNDING):
                    raise NotTried("nothing is left to explain")
            row, state = _try(cause, case, state, whole)
        except NotTried as reason:
            row = Row(rung=cause.rung, verdict=f"not tried: {reason}")
        except OnOffError as error:  # an engine is not installed, or cannot do this: later rungs can still be tried
            row = Row(rung=cause.rung, verdict=f"not tried: it failed ({error})")
        rows.append(replace(row, changed=row.changed or cause.change))
    return Attribution(
        target=case.name,
        gap=whole,
        floor=case.floor,
        left=state.gap(),
        rows=rows,
        responses=len(case.rollouts),
        tokens=sum(len(rollout.token_ids_T) for rollout in case.rollouts.values()),
    )


def _try(cause: Cause, case: Case, state: State, whole: float) -> tuple[Row, State]:
    """The row of a rung, and the state that its best candidate leaves, or the old one where it explains too little."""
    found = cause.attempt(case, state)
    if isinstance(found, Row):
        return found, state
    gaps = []
    for candidate in found:
        try:
            gaps.append((candidate, candidate.state.gap()))
        except UsageError as error:
            log.info("attribute: %s cannot be tried: %s", candidate.changed, error)
    if not gaps:
        raise NotTried("what was kept of the scores does not allow it")
    gaps = [item for item in gaps if not math.isnan(item[1])]
    if not gaps:
        raise NotTried("it would leave no token to compare")
    best, after = min(gaps, key=lambda item: item[1])
    row = tried(cause.rung, best.changed, state.gap(), after, whole, best.detail or cause.words)
    return row, best.state if (row.share or 0) >= max(KEEP, best.least) else state


def run_attribute(this: Run, known: Sequence[EngineConfig]) -> Attribution:
    """Explain the gap between the run's behaviour and one target; writes attribution.json."""
    config, folder = this.config.attribute, this.folder
    if not folder.completions.exists() or not folder.score_names():
        raise UsageError(
            f"{folder.path} has no scored responses to explain: set run_dir to the folder of an earlier "
            "experiment=onoff, or stages=[generate,score,attribute] to do all of it"
        )
    name, own_name = _target(this), own_scores(folder)
    table, record = folder.scores(name), folder.completions.record()
    rollouts = chosen_rollouts(folder.completions, table, config.limit)
    if not rollouts:
        raise UsageError(
            f"{folder.path} has no responses with logprobs that {name} has scored: score it with experiment=score first"
        )
    own = None if own_name in (None, name) else scored(folder.scores(own_name), rollouts.keys())
    engines = {
        "behaviour": (engine_of(record, known), record),
        "target": (engine_of(table.record(), known) or this.config.target, table.record()),
    }
    case = Case(
        this=this,
        name=name,
        rollouts=rollouts,
        sampler=(sampling_of(record) or this.config.sampling).replace(n=1),
        own=own if own is not None and own.rows.keys() == rollouts.keys() else None,
        dtypes={
            who: said.get("engine", {}).get("dtype") or (engine.weights_dtype if engine else "")
            for who, (engine, said) in engines.items()
        },
    )
    state = State(
        q=sampled(rollouts),
        p=scored(table, rollouts.keys()),
        kind=next(iter(rollouts.values())).kind or LogprobKind.raw,
        behaviour=engines["behaviour"][0],
        target=engines["target"][0],
    )
    found = climb(case, state, config.rungs)
    folder.write_json("attribution.json", found.to_dict())
    return found


def _target(this: Run) -> str:
    """Name of the scores to explain: the one that was asked for, else the furthest."""
    folder, config, names = this.folder, this.config.attribute, this.folder.score_names()
    if config.target is not None:
        if config.target not in names:
            raise UsageError(
                f"{folder.path} has no scores {config.target!r} but {', '.join(names)}: set attribute.target to one "
                "of them"
            )
        return config.target
    gaps = {name: 0.0 for name in names if name != own_scores(folder)} or dict.fromkeys(names, 0.0)
    for name in gaps if len(gaps) > 1 else ():
        table = folder.scores(name)
        if rollouts := chosen_rollouts(folder.completions, table, config.limit):
            kind = next(iter(rollouts.values())).kind or LogprobKind.raw
            p = scored(table, rollouts.keys())
            gaps[name] = State(q=sampled(rollouts), p=p, kind=kind, behaviour=None, target=None).gap()
    return max(gaps, key=gaps.__getitem__)
