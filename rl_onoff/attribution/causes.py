"""The rungs: each says what can be changed in a state of the ladder, or why it does not apply. A rung never judges: it
gives candidates, states with one change more, of which the ladder takes the one with the smallest gap; or its own row.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from rl_onoff.analysis_config import Rung
from rl_onoff.attribution.state import MOST, NOISE, ROUNDING, Case, NotTried, Row, State, gap
from rl_onoff.backends.engine_config import EngineConfig
from rl_onoff.errors import plural
from rl_onoff.models.resolve import different_tensors, num_experts
from rl_onoff.pipeline.engines import unseen
from rl_onoff.rundir.join import TRANSFORM
from rl_onoff.rundir.provenance import texts_tokenizer
from rl_onoff.rundir.table import differences
from rl_onoff.types import FinishReason, LogprobKind, Sampling

OTHER_WEIGHTS = "the weights: behaviour and target are different models"
SAME_IDS = "the tokens both sides hold"
PRECISE = "both sides are in float32"


@dataclass(frozen=True, slots=True)
class Candidate:
    """A change that may explain the gap."""

    state: State
    changed: str = ""  # in words, where more is known than the rung's own
    detail: str = ""  # the cause in words, where more is known than the rung's own
    least: float = 0.0  # share of the gap below which the change is not kept, where that is more than usual
    base: State | None = None  # without the change, where that is not the ladder's own state


Attempt = Callable[[Case, State], list[Candidate] | Row]
LADDER: dict[Rung, tuple[str, str, Attempt]] = {}  # the cause and the change in words, and the attempt


def cause(words: str, change: str) -> Callable[[Attempt], Attempt]:
    """Put an attempt on the ladder, after those above it in this file; its name is that of its Rung."""

    def add(attempt: Attempt) -> Attempt:
        LADDER[Rung[attempt.__name__]] = words, change, attempt
        return attempt

    return add


@cause("noise: its engine repeats itself no better", "the target's engine scores again, one response at a time")
def noise(case: Case, state: State) -> Row:
    """Sets the floor: the target's engine against itself, in batches and alone."""
    alone, batched = case.rescore(state.target.engine, alone=True), state.target
    if state.ids_differ() or "backend" not in case.records["target"].get("config", {}):
        batched = case.rescore(state.target.engine)  # the table was not made of these ids, or not by this engine
    measured, whole = gap(batched.as_kind(LogprobKind.raw), alone.as_kind(LogprobKind.raw)), state.gap()
    case.floor = max(measured, ROUNDING)
    share = min(1.0, case.floor / whole) if whole > 0 else 1.0
    said = f"the gap is {'not ' if whole <= case.floor else ''}above {NOISE}"
    return Row(rung=Rung.noise, after=measured, share=share, verdict=said)


@cause("the last token: it is there on one side only, or is treated differently", "the last tokens left out")
def end_token(case: Case, state: State) -> list[Candidate]:
    if differ := state.ids_differ():
        sides = (state.behaviour.rows, state.target.rows)
        q, p = ({key: rows[key].token_ids_T.tolist() for key in differ} for rows in sides)
        ends = [key for key in differ if q[key][: len(p[key])] == p[key] or p[key][: len(q[key])] == q[key]]
        if not ends:
            raise NotTried("the sides differ in more than their last tokens")
        detail = f"the last token: {len(ends)} of {plural(len(sides[0]), 'response')} have it on one side only"
        return [Candidate(replace(state, same_ids_only=True), SAME_IDS, detail)]
    by_itself = (FinishReason.eos, FinishReason.stop)
    ended = frozenset(key for key, rollout in case.rollouts.items() if rollout.finish_reason in by_itself)
    if not ended:
        raise NotTried("both sides hold the same ids, and no response is known to have ended by itself")
    detail = f"the last token: the gap sits in the end of the {plural(len(ended), 'response')} that ended by themselves"
    return [Candidate(replace(state, without_last=ended), "their last tokens left out", detail, least=MOST)]


@cause("re-tokenised text: the target scored other ids than were sampled", "the text tokenised again")
def retokenised(case: Case, state: State) -> list[Candidate] | Row:
    """Whether the target holds the text's ids; else how many responses tokenising the text again would change."""
    q, total, before = state.behaviour.rows, len(state.behaviour.rows), state.gap()
    if unfit := frozenset(key for key, row in q.items() if len(row.logprobs_T) != len(row.token_ids_T)):
        fewer = f"{len(unfit)} of {plural(total, 'response')} have not as many logprobs as ids"
        detail = f"re-tokenised text: {fewer}, so the ids are not the sampled ones"
        if len(unfit) == total:
            return Row(rung=Rung.retokenised, before=before, share=1.0, verdict=f"the main cause: {detail}")
        return [Candidate(replace(state, without=unfit), "the responses whose logprobs fit their ids", detail)]
    tokenizer = texts_tokenizer(case.records.values(), case.this.config.compare.tokenizer, state.engines.values())
    differ = state.ids_differ()
    if tokenizer is None and not differ:
        raise NotTried("both sides hold the same ids, and no tokenizer is known: set compare.tokenizer")
    if tokenizer is None:
        return [
            Candidate(replace(state, same_ids_only=True), SAME_IDS, f"other ids in {plural(len(differ), 'response')}")
        ]
    again, changed = {}, 0  # the ids of the sampled ids' text: what a trainer has that keeps text
    for key, row in q.items():
        text = tokenizer.decode(row.token_ids_T.tolist(), skip_special_tokens=False)
        again[key] = list(tokenizer.encode(text, add_special_tokens=False))
        changed += again[key] != row.token_ids_T.tolist()
    if not differ:
        would = f"tokenising the text again would change {changed} of {plural(total, 'response')}"
        said = f"not the cause: both sides hold the same ids; {would}"
        return Row(rung=Rung.retokenised, before=before, after=before, share=0.0, verdict=said)
    special, exact = set(tokenizer.all_special_ids), 0
    for key in differ:
        ids = (state.target.rows[key].token_ids_T.tolist(), again[key])
        theirs, text = ([i for i in side if i not in special] for side in ids)
        exact += theirs == text
    held = f"{len(differ)} of {plural(total, 'response')}"
    detail = f"re-tokenised text: the target holds other ids in {held}, and {exact} of them are the text's"
    if not exact:
        detail = f"other ids: the target holds them in {held}, and they are not the text tokenised again"
    return [Candidate(replace(state, same_ids_only=True), SAME_IDS, detail)]


@cause("the sampling transform: logprobs of one kind are taken for another", "other kinds of logprobs")
def transform(case: Case, state: State) -> list[Candidate]:
    sampler = case.sampler
    if not sampler.truncates and sampler.temperature in (0, 1):
        raise NotTried(f"at temperature {sampler.temperature:g} with nothing cut off all kinds of logprobs are one")
    known = all(row.processed_logprobs_T is not None for row in state.target.rows.values())
    target = state.target if known else case.rescore(state.target.engine)
    how = ", ".join(f"{n} {getattr(sampler, n):g}" for n in TRANSFORM if getattr(sampler, n) != getattr(Sampling(), n))
    candidates = []
    for kind in [kind for kind in LogprobKind if kind is not state.kind]:
        detail = f"the sampling transform: logprobs declared {state.kind.value} are {kind.value} ones ({how})"
        changed = replace(state, kind=kind, target=target)
        candidates.append(Candidate(changed, f"the target's {kind.value} logprobs", detail))
    return candidates


@cause(
    "decoding: the engine reports other logprobs while it samples than when it scores, by its kernels, its cache, or a "
    "transform that it does not declare",
    "the behaviour's own prefill in place of what it reported while sampling",
)
def decode(case: Case, state: State) -> list[Candidate]:
    return [Candidate(replace(state, behaviour=case.own or case.rescore(state.behaviour.engine)))]


@cause("merging: the sum of weight and adapter is rounded to the weights' type", "the adapter beside the weights")
def merge(case: Case, state: State) -> list[Candidate]:
    what, otherwise = "the adapter beside the weights", "no side has an adapter merged into weights of low precision"
    engines = {who: engine for who, engine in state.engines.items() if engine.adapter and engine.merge_adapter}
    beside = {who: engine.with_option("merge_adapter", False) for who, engine in engines.items()}
    return _on_each(case, state, what, beside.keys() & case.low, otherwise, beside.get)


@cause("a switch of the engine", "a switch of the engine")
def switches(case: Case, state: State) -> list[Candidate]:
    raise NotTried("there is no switch of these engines that applies here")


@cause("the precision of the LM head", "LM head in float32")
def lm_head(case: Case, state: State) -> list[Candidate]:
    turned = _turned(case, state)["lm_head"]
    return _on_each(case, state, "an LM head in float32", case.low, PRECISE, turned.get)


@cause("the experts: for the same tokens the routers choose others", "the behaviour's experts replayed in the target")
def experts(case: Case, state: State) -> list[Candidate]:
    """The target with the experts that the behaviour's engine chooses in a prefill of the same ids."""
    ours, theirs = state.behaviour.engine, state.target.engine
    if ours is None or theirs is None:
        raise NotTried("an engine is not recorded")
    if not all(num_experts(engine.model_name, engine.revision) for engine in (ours, theirs)):
        raise NotTried("the model is no mixture of experts")
    if why := unseen("behaviour", ours) or unseen("target", theirs):
        raise NotTried(why.partition(": set ")[0])
    detail = "the experts: for the same tokens the routers choose others than the behaviour's do in its prefill"
    if theirs.with_model_of(ours).what_it_computes() != theirs.what_it_computes():
        detail += ", with other weights"
    eager = theirs.with_all_layers_run()
    base = None if eager == theirs else replace(state, target=case.rescore(eager))
    return [Candidate(_with(case, replace(state, replays=True), target=theirs), detail=detail, base=base)]


@cause("the precision of weights and arithmetic", "float32")
def dtype(case: Case, state: State) -> list[Candidate]:
    exact = {who: engine.with_option("dtype", "float32") for who, engine in state.engines.items()}
    return _on_each(case, state, "float32", case.low, PRECISE, exact.get)


@cause("the split over several devices", "one device")
def tensor_parallel(case: Case, state: State) -> list[Candidate]:
    split, otherwise = [who for who, x in state.engines.items() if x.num_devices > 1], "no side is split over devices"
    joined = {who: engine.with_option("tp_size", 1) for who, engine in state.engines.items()}
    return _on_each(case, state, "one device", split, otherwise, joined.get)


def _on_each(
    case: Case, state: State, what: str, sides: Collection[str], otherwise: str, change: Callable[[str], Any]
) -> list[Candidate]:
    """The change on the target, on the behaviour, and on both, as far as `sides` need it and their engines can. One on
    the behaviour is held against the behaviour's own prefill: that sampling reports other logprobs is no part of it.
    """
    if not sides:
        raise NotTried(otherwise)
    changed = {who: other for who in ("target", "behaviour") if who in sides and (other := change(who)) is not None}
    if not changed:
        raise NotTried("the engine is not recorded or cannot do that")
    ways = {f"{what} in the {who}": {who: other} for who, other in changed.items()}
    ways |= {f"{what} on both sides": changed} if len(changed) > 1 else {}
    base = state
    if "behaviour" in changed and state.behaviour.reported:
        base = replace(state, behaviour=case.own or case.rescore(state.behaviour.engine))
    bases = {words: base if "behaviour" in way else state for words, way in ways.items()}
    return [Candidate(_with(case, state, **way), words, base=bases[words]) for words, way in ways.items()]


def _with(case: Case, state: State, **engines: EngineConfig) -> State:
    """With other engines on these sides. A target that replays experts replays those of the new behaviour."""
    used = state.engines | engines
    replays = used.get("behaviour") if state.replays else None
    sides = {"behaviour": case.rescore(engines["behaviour"])} if "behaviour" in engines else {}
    if "target" in engines or replays is not None:
        sides["target"] = case.rescore(used.get("target"), replays=replays)
    return replace(state, **sides)


def _turned(case: Case, state: State) -> defaultdict[str, dict[str, EngineConfig]]:
    """Name of a switch -> the sides that it applies to, with their engines so turned."""
    found: defaultdict[str, dict[str, EngineConfig]] = defaultdict(dict)
    for who, engine in state.engines.items():
        for switch in engine.switches:
            if (switch.when != "low" or who in case.low) and (turned := engine.turned(switch)) is not None:
                found[switch.name][who] = turned
    return found


def steps(case: Case, state: State, asked: Collection[str]) -> Iterator[tuple[Rung, str, str, str, Attempt]]:
    """The ladder: rung, switch, the cause and the change in words, and the attempt; a step for each switch that applies
    to a side, of those `asked` for, but for the LM head's, which is a rung of its own.
    """
    changes = {switch.name: switch.change for engine in state.engines.values() for switch in engine.switches}
    names = [name for name in changes if name in _turned(case, state) and name != "lm_head"]

    def turn(name: str, case: Case, state: State) -> list[Candidate]:
        turned = _turned(case, state)[name]
        return _on_each(case, state, changes[name], turned, "it is turned already", turned.get)

    for rung, found in LADDER.items():
        turns = [name for name in names if not asked or name in asked] if rung is Rung.switches else []
        for name in turns:
            yield rung, name, f"{name} ({changes[name]})", changes[name], partial(turn, name)
        if not turns:
            yield rung, "", *found


@cause("the engine: it computes something else from the same weights", "the target's weights in the behaviour's engine")
def engine(case: Case, state: State) -> list[Candidate]:
    """The target's weights and type in the behaviour's engine, with the behaviour's options."""
    ours, theirs = state.behaviour.engine, state.target.engine
    if ours is None or theirs is None:
        raise NotTried("an engine is not recorded")
    dtype = None if theirs.weights_dtype == "auto" else theirs.weights_dtype
    here = ours.with_model_of(theirs).with_option("dtype", dtype)
    here = replace(here, logprob_kind=theirs.logprob_kind)
    here = here.with_all_layers_run() if state.replays else here
    options = differences(theirs.what_it_computes(), here.what_it_computes())
    if not options:
        raise NotTried(f"both sides are {here.name} with the same options")
    words, detail = f"the target's weights in {ours.name}", f"{theirs.name} and {ours.name} differ"
    if ours.name == theirs.name:
        words, detail = f"the behaviour's options of {ours.name}", f"the options of {ours.name} differ"
        detail += f" ({'; '.join(options)})"
    return [Candidate(_with(case, state, target=here), words, f"the engine: {detail}")]


@cause(OTHER_WEIGHTS, "the behaviour's weights in the target's engine")
def weights(case: Case, state: State) -> list[Candidate]:
    ours, theirs = state.behaviour.engine, state.target.engine
    if ours is None or theirs is None:
        raise NotTried("which weights sampled is not recorded")
    here = theirs.with_model_of(ours)
    if here.what_it_computes() == theirs.what_it_computes():
        raise NotTried(f"both sides name the same weights, {here.model_name}")
    detail = OTHER_WEIGHTS
    if (ours.adapter, ours.merge_adapter) != (theirs.adapter, theirs.merge_adapter):
        sides = {"behaviour": ours, "target": theirs}.items()
        had = [f"{x.adapter}{', merged,' if x.merge_adapter else ''} on the {who}" for who, x in sides if x.adapter]
        detail += f" (the adapter {' and '.join(had)})" if had else ""
    elif names := different_tensors((ours.model_name, ours.revision), (theirs.model_name, theirs.revision)):
        more = f" and {len(names) - 3} more tensors" if len(names) > 3 else ""
        detail += f" (they differ in {', '.join(names[:3])}{more})"
    return [Candidate(_with(case, state, target=here), detail=detail)]
