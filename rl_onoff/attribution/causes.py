"""The rungs: each says what can be changed in a state of the ladder, or why it does not apply. A rung never judges.

A rung gives candidates, states with one change more, of which the ladder takes the one with the smallest gap; or its
own row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rl_onoff.attribution.result import MOST, ROUNDING, Row
from rl_onoff.attribution.state import Case, NotTried, State, gap
from rl_onoff.backends.engine_config import EngineConfig
from rl_onoff.config import Rung
from rl_onoff.models.resolve import different_tensors
from rl_onoff.rundir.join import TRANSFORM
from rl_onoff.rundir.provenance import texts_tokenizer
from rl_onoff.rundir.table import differences
from rl_onoff.types import FinishReason, LogprobKind, Sampling

OTHER_WEIGHTS = "the weights: behaviour and target are different models"
SAME_IDS = "the tokens both sides hold"


@dataclass(frozen=True, slots=True)
class Candidate:
    """A change that may explain the gap."""

    state: State
    changed: str = ""  # in words, where more is known than the rung's own
    detail: str = ""  # the cause in words, where more is known than the rung's own
    least: float = 0.0  # share of the gap below which the change is not kept, where that is more than usual


Attempt = Callable[[Case, State], list[Candidate] | Row]


@dataclass(frozen=True, slots=True)
class Cause:
    """A rung of the ladder: the cause and the change in words, and the attempt."""

    rung: Rung
    words: str
    change: str
    attempt: Attempt


LADDER: list[Cause] = []


def cause(words: str, change: str) -> Callable[[Attempt], Attempt]:
    """Put an attempt on the ladder, after those above it in this file; its name is that of its Rung."""

    def add(attempt: Attempt) -> Attempt:
        LADDER.append(Cause(Rung[attempt.__name__], words, change, attempt))
        return attempt

    return add


@cause("noise: one engine repeats itself no better", "the target's engine scores again, one response at a time")
def noise(case: Case, state: State) -> Row:
    """Sets the floor: the target's engine against itself, in batches and alone."""
    alone, batched = case.rescore(state.target, alone=True), state.p
    if state.ids_differ() or "backend" not in case.this.folder.scores(case.name).record().get("config", {}):
        batched = case.rescore(state.target)  # the table was not made of these ids, or not by this engine
    measured, whole = gap(batched.as_kind(LogprobKind.raw), alone.as_kind(LogprobKind.raw)), state.gap()
    case.floor = max(measured, ROUNDING)
    share = min(1.0, case.floor / whole) if whole > 0 else 1.0
    said = "the gap is not above the noise floor" if whole <= case.floor else "the gap is above the noise floor"
    return Row(rung=Rung.noise, after=measured, share=share, verdict=said)


@cause("the last token: it is there on one side only, or is treated differently", "the last tokens left out")
def end_token(case: Case, state: State) -> list[Candidate]:
    if differ := state.ids_differ():
        q, p = ({key: side.rows[key].token_ids_T.tolist() for key in differ} for side in (state.q, state.p))
        ends = [key for key in differ if q[key][: len(p[key])] == p[key] or p[key][: len(q[key])] == q[key]]
        if not ends:
            raise NotTried("the sides differ in more than their last tokens")
        detail = f"the last token: {len(ends)} of {len(state.q.rows)} responses have it on one side only"
        return [Candidate(replace(state, same_ids_only=True), SAME_IDS, detail)]
    by_itself = (FinishReason.eos, FinishReason.stop)
    ended = frozenset(key for key, rollout in case.rollouts.items() if rollout.finish_reason in by_itself)
    if not ended:
        raise NotTried("both sides hold the same ids, and no response is known to have ended by itself")
    detail = f"the last token: the gap sits in the end of the {len(ended)} responses that ended by themselves"
    return [Candidate(replace(state, without_last=ended), "their last tokens left out", detail, least=MOST)]


@cause("re-tokenised text: the target scored other ids than were sampled", "the text tokenised again")
def retokenised(case: Case, state: State) -> list[Candidate] | Row:
    """Whether the target holds the text's ids; else how many responses tokenising the text again would change."""
    q, total, before = state.q.rows, len(state.q.rows), state.gap()
    if unfit := frozenset(key for key, row in q.items() if len(row.logprobs_T) != len(row.token_ids_T)):
        detail = (
            f"re-tokenised text: {len(unfit)} of {total} responses have not as many logprobs as ids, so the ids are "
            "not the sampled ones"
        )
        if len(unfit) == total:
            return Row(rung=Rung.retokenised, before=before, share=1.0, verdict=f"the main cause: {detail}")
        return [Candidate(replace(state, without=unfit), "the responses whose logprobs fit their ids", detail)]
    folder, engines = case.this.folder, [engine for engine in (state.behaviour, state.target) if engine is not None]
    records = [folder.completions.record(), folder.scores(case.name).record()]
    tokenizer = texts_tokenizer(records, case.this.config.compare.tokenizer, engines)
    differ = state.ids_differ()
    if tokenizer is None and differ:
        return [Candidate(replace(state, same_ids_only=True), SAME_IDS, f"other ids in {len(differ)} responses")]
    if tokenizer is None:
        raise NotTried("both sides hold the same ids, and no tokenizer is known: set compare.tokenizer")
    again = {key: encode_again(tokenizer, row.token_ids_T.tolist()) for key, row in q.items()}
    if differ:
        special, exact = set(tokenizer.all_special_ids), 0
        for key in differ:
            ids = (state.p.rows[key].token_ids_T.tolist(), again[key])
            theirs, text = ([i for i in side if i not in special] for side in ids)
            exact += theirs == text
        held = f"{len(differ)} of {total} responses"
        detail = f"re-tokenised text: the target holds other ids in {held}, and {exact} of them are the text's"
        if not exact:
            detail = f"other ids: the target holds them in {held}, and they are not the text tokenised again"
        return [Candidate(replace(state, same_ids_only=True), SAME_IDS, detail)]
    changed = sum(again[key] != row.token_ids_T.tolist() for key, row in q.items())
    said = f"both sides hold the same ids; tokenising the text again would change {changed} of {total} responses"
    return Row(rung=Rung.retokenised, before=before, after=before, share=0.0, verdict=f"not the cause: {said}")


def encode_again(tokenizer: Any, ids: Sequence[int]) -> list[int]:
    """Ids of the text of ids: what a trainer has that keeps text."""
    return list(tokenizer.encode(tokenizer.decode(ids, skip_special_tokens=False), add_special_tokens=False))


@cause("the sampling transform: logprobs of one kind are taken for another", "other kinds of logprobs")
def transform(case: Case, state: State) -> list[Candidate]:
    sampler = case.sampler
    if not sampler.truncates and sampler.temperature in (0, 1):
        raise NotTried(f"at temperature {sampler.temperature:g} with nothing cut off all kinds of logprobs are one")
    known = all(row.processed_logprobs_T is not None for row in state.p.rows.values())
    p = state.p if known else case.rescore(state.target)
    how = ", ".join(f"{n} {getattr(sampler, n):g}" for n in TRANSFORM if getattr(sampler, n) != getattr(Sampling(), n))
    candidates = []
    for kind in [kind for kind in LogprobKind if kind is not state.kind]:
        detail = f"the sampling transform: logprobs declared {state.kind.value} are {kind.value} ones ({how})"
        candidates.append(Candidate(replace(state, kind=kind, p=p), f"the target's {kind.value} logprobs", detail))
    return candidates


@cause(
    "decoding: the engine reports other logprobs while it samples than when it scores, by its kernels, its cache, or a "
    "transform that it does not declare",
    "the behaviour's own prefill in place of what it reported while sampling",
)
def decode(case: Case, state: State) -> list[Candidate]:
    return [Candidate(replace(state, q=case.own or case.rescore(state.behaviour)))]


@cause("the precision of the LM head", "LM head in float32")
def lm_head(case: Case, state: State) -> list[Candidate]:
    return _each_and_both(case, state, "an LM head in float32", _low(case), lambda engine: engine.with_float32_head())


@cause("the precision of weights and arithmetic", "float32")
def dtype(case: Case, state: State) -> list[Candidate]:
    return _each_and_both(case, state, "float32", _low(case), lambda engine: engine.with_option("dtype", "float32"))


def _low(case: Case) -> set[str]:
    """The sides in lower precision."""
    low = {who for who, name in case.dtypes.items() if name != "float32"}
    if not low:
        raise NotTried("both sides are in float32")
    return low


@cause("the split over several devices", "one device")
def tensor_parallel(case: Case, state: State) -> list[Candidate]:
    sides = (("behaviour", state.behaviour), ("target", state.target))
    split = {who for who, engine in sides if engine is not None and engine.num_devices > 1}
    if not split:
        raise NotTried("no side is split over devices")
    return _each_and_both(case, state, "one device", split, lambda engine: engine.with_option("tp_size", 1))


def _each_and_both(
    case: Case, state: State, what: str, sides: set[str], change: Callable[[EngineConfig], EngineConfig | None]
) -> list[Candidate]:
    """The change on the target, on the behaviour, and on both, as far as `sides` need it and their engines can."""
    q, p = (
        change(engine) if who in sides and engine is not None else None
        for who, engine in (("behaviour", state.behaviour), ("target", state.target))
    )
    candidates = []
    if p is not None:
        candidates.append(Candidate(replace(state, p=case.rescore(p), target=p), f"{what} in the target"))
    if q is not None:
        candidates.append(Candidate(replace(state, q=case.rescore(q), behaviour=q), f"{what} in the behaviour"))
    if len(candidates) == 2:
        both = replace(candidates[0].state, q=candidates[1].state.q, behaviour=q)
        candidates.append(Candidate(both, f"{what} on both sides"))
    if not candidates:
        raise NotTried("the engine is not recorded or cannot do that")
    return candidates


@cause("the engine: it computes something else from the same weights", "the target's weights in the behaviour's engine")
def engine(case: Case, state: State) -> list[Candidate]:
    """The target's weights and type in the behaviour's engine, with the behaviour's options."""
    if state.behaviour is None or state.target is None:
        raise NotTried("an engine is not recorded")
    dtype = None if state.target.weights_dtype == "auto" else state.target.weights_dtype
    here = state.behaviour.with_model_of(state.target).with_option("dtype", dtype)
    here = replace(here, logprob_kind=state.target.logprob_kind)
    options = differences(state.target.what_it_computes(), here.what_it_computes())
    if not options:
        raise NotTried(f"both sides are {here.name} with the same options")
    ours, theirs = here.name, state.target.name
    words, detail = f"the target's weights in {ours}", f"{theirs} and {ours} differ"
    if ours == theirs:
        words, detail = f"the behaviour's options of {ours}", f"the options of {ours} differ ({'; '.join(options)})"
    return [Candidate(replace(state, p=case.rescore(here), target=here), words, f"the engine: {detail}")]


@cause(OTHER_WEIGHTS, "the behaviour's weights in the target's engine")
def weights(case: Case, state: State) -> list[Candidate]:
    if state.behaviour is None or state.target is None:
        raise NotTried("which weights sampled is not recorded")
    here = state.target.with_model_of(state.behaviour)
    if here.what_it_computes() == state.target.what_it_computes():
        raise NotTried(f"both sides name the same weights, {here.model_name}")
    detail, ours, theirs = OTHER_WEIGHTS, state.behaviour, state.target
    names = different_tensors((ours.model_name, ours.revision), (theirs.model_name, theirs.revision))
    if names:
        more = f" and {len(names) - 3} more tensors" if len(names) > 3 else ""
        detail += f" (they differ in {', '.join(names[:3])}{more})"
    return [Candidate(replace(state, p=case.rescore(here), target=here), detail=detail)]
