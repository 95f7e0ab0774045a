"""Climb the ladder of causes: try one change at a time and keep what explains the gap.

The gap is the mean k3 KL, nats a token. A rung's share is (before − after) / gap, limited to 0 … 1, where `before` is
the gap with every change kept so far and `gap` the one at the bottom of the ladder. So shares add up: a cause that an
earlier rung has taken away is not counted again. The noise rung changes nothing: its share says how large the gap is
that the target's engine has to itself.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import numpy as np

from rl_onoff.analysis_config import Rung
from rl_onoff.attribution.causes import Attempt, steps
from rl_onoff.attribution.state import MOST, NOISE, ROUNDING, Case, NotTried, Row, State, chosen_rollouts, scored
from rl_onoff.attribution.truth import errors_of
from rl_onoff.backends import engine_configs
from rl_onoff.backends.engine_config import EngineConfig
from rl_onoff.compare import ON_POLICY_K3, WhoseError
from rl_onoff.errors import OnOffError, UsageError, nearest, plural
from rl_onoff.pipeline.compare_inputs import own_scores
from rl_onoff.pipeline.stages import Run
from rl_onoff.report.tables import aligned, number
from rl_onoff.rundir.provenance import engine_of, sampling_of

KEEP = 0.1  # least share of the gap for which a change is kept, and called part of the cause
SAME_ENGINES = (Rung.end_token, Rung.retokenised, Rung.transform)  # change which tokens and logprobs are compared
COMPUTED = {Rung.decode, Rung.switches, Rung.lm_head, Rung.dtype, Rung.engine}  # what else than weights it may be
NOTHING_LEFT = 0.02  # of the gap: below this, no further rung is tried

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Attribution:
    """The whole ladder of one target: why two policies differ."""

    target: str
    gap: float  # before any change
    floor: float
    left: float  # after every change that was kept
    responses: int
    tokens: int
    rows: list[Row]
    whose_error: WhoseError | None = None
    truth: str = ""  # what the truth is worth, or why there is none

    def sentence(self) -> str:
        """The main cause in one sentence, what is left, and whose error the gap is."""
        whose = self.whose_error.sentence() if self.whose_error else ""
        return " ".join(filter(None, (self._cause(), whose, self.truth)))

    def _cause(self) -> str:
        gap = f"a mean k3 KL of {self.gap:.2g} nats a token over {plural(self.tokens, 'token')}"
        size = f"the gap between the behaviour and {self.target}, {gap},"
        if self.gap <= self.floor:
            return f"Nothing to explain: {size} is not above {NOISE}, {self.floor:.2g}."
        noisy = self.floor > KEEP * self.gap
        after = f" {NOISE[0].upper()}{NOISE[1:]} is {self.floor:.2g}." if noisy else ""
        if self.gap < ON_POLICY_K3:
            after += f" The gap is under {ON_POLICY_K3:.0e}, which on-policy engines in float32 stay below."
        causes = [row for row in self.rows if row.rung is not Rung.noise and (row.share or 0) >= KEEP]
        if not causes and noisy:
            return f"Mostly noise: {size} is left, and no rung takes it away.{after}"
        if not causes and any(row.rung is Rung.weights and row.share is not None for row in self.rows):
            return f"Not explained: no rung takes away {size} so its cause is one that cannot be tried here.{after}"
        tried = [row for row in self.rows if row.rung is not Rung.noise and row.share is not None]
        if not causes and not {row.rung for row in tried} & COMPUTED:
            names = f"by {', '.join(row.name for row in tried)}" if tried else "since nothing could be tried"
            return f"Not explained {names}: {size} is left, why others were not tried stands beside them.{after}"
        if not causes:
            guess = "the weights (staleness, quantisation, an adapter, a changed LM head)"
            return f"Not explained by anything that can be tried: {size} is left, which points to {guess}.{after}"
        causes.sort(key=lambda row: -(row.share or 0))
        part = "" if (causes[0].share or 0) >= MOST else "in part "
        leading = [row for row in causes if (row.share or 0) > (causes[0].share or 0) / 2]
        said = [" and from ".join(row.verdict.partition(": ")[2] for row in leading)]
        said += [f"{row.changed}: {number(row.after, 2) or 'not defined'}, {row.share:.0%} less" for row in causes]
        said += [f"{self.left / self.gap:.0%} is left"] if self.left >= KEEP * self.gap else []
        return f"{size[0].upper()}{size[1:-1]}, comes {part}from {'; '.join(said)}.{after}"

    def to_dict(self) -> dict[str, Any]:
        found = msgspec.json.decode(msgspec.json.encode(self))  # where NaN is null
        rows = found.pop("rows")
        return {**found, "sentence": self.sentence(), "rows": rows}

    def values(self) -> dict[str, float]:
        """Flat numbers for W&B."""
        shares = {f"attribute/{row.name}/share": row.share for row in self.rows if row.share is not None}
        errors = self.whose_error.values() if self.whose_error else {}
        shares |= {f"attribute/{name}": value for name, value in errors.items()}
        return {"attribute/gap": self.gap, "attribute/floor": self.floor, "attribute/left": self.left, **shares}

    def as_text(self) -> str:
        """The ladder for a terminal."""
        rows = [["rung", "before", "after", "share", "verdict"]]
        for row in self.rows:
            share = "" if row.share is None else f"{row.share:.0%}"
            rows.append([row.name, number(row.before, 2), number(row.after, 2), share, row.verdict])
        head = f"  attribution of {self.target} (k3 KL, nats a token)"
        return "\n".join([head, *aligned(rows, "<>>><"), "", f"  {self.sentence()}"])


def run_attribute(this: Run, known: Sequence[EngineConfig]) -> Attribution:
    """Explain the gap between the run's behaviour and one target; writes attribution.json."""
    config, folder = this.config.attribute, this.folder
    if not folder.completions.exists() or not folder.score_names():
        raise UsageError(
            f"{folder.path} has no scored responses to explain: set run_dir to the folder of an earlier "
            "experiment=onoff, or stages=[generate,score,attribute] to do all of it"
        )
    name, own_name = _target(this), own_scores(folder)
    table = folder.scores(name)
    records = {"behaviour": folder.completions.record(), "target": table.record()}
    rollouts = chosen_rollouts(folder.completions, table, config.limit)
    if not rollouts:
        raise UsageError(
            f"{folder.path} has no responses with logprobs that {name} has scored: score it with experiment=score first"
        )
    engines = {who: engine_of(record, known) for who, record in records.items()}
    engines["target"] = engines["target"] or this.config.target
    state = State.of(rollouts, table, engines)
    own = None if own_name in (None, name) else scored(folder.scores(own_name), rollouts.keys(), engines["behaviour"])
    dtypes = {who: engine.weights_dtype for who, engine in state.engines.items()}
    dtypes |= {who: said for who, record in records.items() if (said := record.get("engine", {}).get("dtype"))}
    case = Case(
        this=this,
        rollouts=rollouts,
        records=records,
        sampler=(sampling_of(records["behaviour"]) or this.config.sampling).replace(n=1),
        own=own if own is not None and own.rows.keys() == rollouts.keys() else None,
        low={who for who in records if dtypes.get(who) != "float32"},
    )
    rows, whole, as_made = [], state.gap(), state
    all_names = {switch.name for schema in engine_configs().values() for switch in schema.switches} - {"lm_head"}
    if unknown := set(config.switches) - all_names:  # the LM head is a rung of its own
        fix = nearest(min(unknown), all_names) or ",".join(sorted(all_names))
        why = f"attribute.switches has {min(unknown)!r}, which is no engine's switch"
        raise UsageError(f"{why}: set attribute.switches=[{fix}]")
    for rung, switch, words, change, attempt in steps(case, state, config.switches):
        if config.rungs and rung not in config.rungs:
            continue
        log.info("attribute: %s", switch or rung.value)
        try:
            if rung is not Rung.noise and whole <= case.floor:
                raise NotTried(f"the gap is not above {NOISE}")
            if rung is not Rung.noise and state.gap() <= max(NOTHING_LEFT * whole, ROUNDING):
                raise NotTried("nothing is left to explain")
            row, state = _try(rung, attempt, words, case, state, whole)
        except NotTried as reason:
            row = Row(rung=rung, verdict=f"not tried: {reason}")
        except OnOffError as error:  # an engine is not installed, or cannot do this: later rungs can still be tried
            row = Row(rung=rung, verdict=f"not tried: it failed ({error})")
        rows.append(replace(row, changed=row.changed or change, switch=switch))
        as_made = state if rung in SAME_ENGINES else as_made
    error, truth = errors_of(case, as_made, name)
    tokens = sum(len(rollout.token_ids_T) for rollout in rollouts.values())
    found = Attribution(
        target=name, gap=whole, floor=case.floor, left=state.gap(), responses=len(rollouts), tokens=tokens, rows=rows,
        whose_error=error, truth=truth,
    )  # fmt: skip
    earlier, file = folder.read_json("attribution.json") or {"rows": []}, folder.path / "attribution.json"
    lost = {row.get("switch") or row["rung"] for row in earlier["rows"]} - {row.name for row in rows}
    if lost or earlier.get("target", name) != name:
        of = f"{earlier['target']}{', with ' + ', '.join(sorted(lost)) if lost else ''}"
        log.warning("%s held the ladder of %s, which this one replaces; its scores are kept", file, of)
    folder.write_json("attribution.json", found.to_dict())
    return found


def _try(rung: Rung, attempt: Attempt, words: str, case: Case, state: State, whole: float) -> tuple[Row, State]:
    """The row of a rung, and the state that its best candidate leaves, or the old one where it explains too little."""
    found = attempt(case, state)
    if isinstance(found, Row):
        return found, state
    gaps = []
    for candidate in found:
        try:
            base = candidate.base or state
            gaps.append((candidate.state.gap(), base.gap(), candidate))
        except UsageError as error:
            log.info("attribute: %s cannot be tried: %s", candidate.changed, error)
    if not gaps:
        raise NotTried("what was kept of the scores does not allow it")
    gaps = [item for item in gaps if not math.isnan(item[0] + item[1])]
    if not gaps:
        raise NotTried("it would leave no token to compare")
    now = state.gap()
    after, without, best = min(gaps, key=lambda item: item[0] - min(now, item[1]))
    before = min(now, without)  # a change explains what it takes from both
    share = float(np.clip((before - after) / whole, 0, 1)) if whole > 0 else 0.0
    verdict = "not the cause (the gap grows)" if after - before > KEEP * whole else "not the cause"
    verdict = "changes nothing" if rung is Rung.switches and abs(after - without) <= ROUNDING else verdict
    if share >= KEEP:
        verdict = f"{'the main cause' if share >= MOST else 'part of the cause'}: {best.detail or words}"
    row = Row(rung=rung, changed=best.changed, before=before, after=after, share=share, verdict=verdict)
    return row, best.state if share >= max(KEEP, best.least) else state


def _target(this: Run) -> str:
    """Name of the scores to explain: the one that was asked for, else the furthest."""
    folder, config, names = this.folder, this.config.attribute, this.folder.score_names()
    if config.target is not None and config.target not in names:
        raise UsageError(
            f"{folder.path} has no scores {config.target!r} but {', '.join(names)}: set attribute.target to one of them"
        )
    if config.target is not None:
        return config.target
    gaps = {name: 0.0 for name in names if name != own_scores(folder)} or dict.fromkeys(names, 0.0)
    for name in gaps if len(gaps) > 1 else ():
        if rollouts := chosen_rollouts(folder.completions, folder.scores(name), config.limit):
            gaps[name] = State.of(rollouts, folder.scores(name), {}).gap()
    return max(gaps, key=gaps.__getitem__)
