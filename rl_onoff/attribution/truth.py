"""The truth that the errors of both sides are measured against: a forward pass in float32, checked in float64."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from rl_onoff.attribution.state import Case, NotTried, Side, State, scored
from rl_onoff.backends import engine_configs
from rl_onoff.backends.engine_config import EngineConfig
from rl_onoff.compare import WhoseError, whose_error
from rl_onoff.errors import OnOffError, one_line, plural
from rl_onoff.pipeline.engines import default_name
from rl_onoff.rundir.provenance import is_truth, same_weights


def errors_of(case: Case, state: State, target: str) -> tuple[WhoseError | None, str]:
    """Whose error the gap of a state is, and in words what the truth is worth, or why there is none."""
    try:
        name, truth, t = _truth(case, state, target)
        sides = (*state.sides(), replace(state, target=t).sides()[1])
        rows = ([side[key] for side in sides] for key in case.rollouts if all(key in side for side in sides))
        found = whose_error(name, target, (
            (q.logprobs_T, p.logprobs_T, t.logprobs_T[: len(p.logprobs_T)]) for q, p, t in rows
            if np.array_equal(q.token_ids_T, p.token_ids_T)
            and np.array_equal(q.token_ids_T, t.token_ids_T[: len(q.token_ids_T)])
        ))  # fmt: skip
        return found, _checked(case, truth, t) if found else ""
    except NotTried as reason:
        return None, f"Whose error it is was not asked: {reason}."
    except (OnOffError, RuntimeError) as error:  # torch's "out of memory" is a RuntimeError: float32 may not fit
        return None, f"Whose error it is could not be told: {one_line(error)}."


def _truth(case: Case, state: State, target: str) -> tuple[str, EngineConfig, Side]:
    """Name, engine and scores of the truth: those of a table that the run has, else made now."""
    engines, folder = list(state.engines.values()), case.this.folder
    if not engines:
        raise NotTried("no engine is recorded")
    if len({(engine.model_name, engine.revision, engine.adapter) for engine in engines}) > 1:
        raise NotTried("the sides have different weights")
    if is_truth(case.records["target"]):
        raise NotTried(f"{target} is the truth itself, a forward pass in float32")
    schema = engine_configs()[engines[0].reference]
    base = next((engine for engine in engines if isinstance(engine, schema)), schema())
    exact = {option: getattr(schema(), option) for option in schema.inexact}
    truth = replace(base.with_model_of(engines[0]), **exact, merge_adapter=False).with_option("dtype", "float32")
    for name in folder.score_names():
        record = folder.scores(name).record()
        if is_truth(record) and all(same_weights(record, other) for other in case.records.values()):
            t = scored(folder.scores(name), case.rollouts.keys(), truth)
            if t.rows.keys() == case.rollouts.keys():
                return name, truth, t
    return default_name(truth), truth, case.rescore(truth)


def _checked(case: Case, truth: EngineConfig, t: Side) -> str:
    """How far the truth is from the same in float64, on a few responses."""
    if not (most := case.this.config.attribute.truth_check):
        return ""
    try:
        exact = case.rescore(truth.with_option("dtype", "float64"), most=most).rows
    except (OnOffError, RuntimeError) as error:
        return f"The truth was not checked in float64: {one_line(error)}."
    error_N = np.concatenate([t.rows[key].logprobs_T - row.logprobs_T.astype(np.float64) for key, row in exact.items()])
    size = f"{np.sqrt(np.mean(error_N**2)):.1g} nats (root mean square), {np.abs(error_N).max():.1g} at most"
    return f"In float64 the truth differs by {size}, over {plural(len(error_N), 'token')}."
