"""The rungs: each says what can be changed in a state of the ladder, or why it does not apply. A rung never judges.

A rung gives candidates, states with one change more, of which the ladder takes the one with the smallest gap; or its own row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from rl_onoff.attribution.result import CAUSES, CHANGES, MOST, ROUNDING, Row, gap
from rl_onoff.backends.engine_config import EngineConfig
from rl_onoff.config import Rung
from rl_onoff.models.tensors import different_tensors
from rl_onoff.rundir.provenance import texts_tokenizer
from rl_onoff.rundir.table import Key, differences
from rl_onoff.types import LogprobKind

if TYPE_CHECKING:
    from rl_onoff.attribution.ladder import Ladder, State


class NotTried(Exception):
    """A rung does not apply; the message says why."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A change that may explain the gap."""

    changed: str
    state: State
    detail: str = ""  # the cause in words, where more is known than the rung's name
    least: float = 0.0  # share of the gap below which the change is not kept, where that is more than usual


def noise(ladder: Ladder, state: State) -> Row:
    """Sets the floor: the target's engine against itself, in batches and alone."""
    alone = ladder.rescore(state.target, alone=True)
    batched = state.p
    if ids_differ(state) or not _is_recorded(ladder):
        batched = ladder.rescore(
            state.target
        )  # what lies in the table was not made of these ids, or not by this engine
    measured, whole = gap(batched.views(LogprobKind.raw), alone.views(LogprobKind.raw)), state.gap()
    ladder.floor = max(measured, ROUNDING)
    share = min(1.0, ladder.floor / whole) if whole > 0 else 1.0
    said = "the gap is not above the noise floor" if whole <= ladder.floor else "the gap is above the noise floor"
    return Row(rung=Rung.noise, changed=CHANGES[Rung.noise], after=measured, share=share, verdict=said)


def _is_recorded(ladder: Ladder) -> bool:
    return "backend" in ladder.this.folder.scores(ladder.name).record().get("config", {})


def ids_differ(state: State) -> list[Key]:
    """Responses of which the two sides hold different ids."""
    q, p = state.q.rows, state.p.rows
    return [key for key in q.keys() & p.keys() if q[key]["token_ids"].tolist() != p[key]["token_ids"].tolist()]


def end_token(ladder: Ladder, state: State) -> list[Candidate]:
    """The last tokens: on one side only, or there on both and treated differently."""
    if differ := ids_differ(state):
        ids = {key: [side.rows[key]["token_ids"].tolist() for side in (state.q, state.p)] for key in differ}
        ends = [key for key, (a, b) in ids.items() if a[: len(b)] == b or b[: len(a)] == a]
        if not ends:
            raise NotTried("the sides differ in more than their last tokens")
        detail = f"the last token: {len(ends)} of {len(state.q.rows)} responses have it on one side only"
        return [Candidate("the tokens both sides hold", replace(state, same_ids_only=True), detail)]
    ended = frozenset(key for key, reason in ladder.finish_reasons.items() if reason in ("eos", "stop"))
    if not ended:
        raise NotTried("both sides hold the same ids, and no response is known to have ended by itself")
    detail = f"the last token: the gap sits in the end of the {len(ended)} responses that ended by themselves"
    return [Candidate("their last tokens left out", replace(state, without_last=ended), detail, least=MOST)]


def retokenised(ladder: Ladder, state: State) -> list[Candidate] | Row:
    """Whether the target holds the text's ids; where it holds the sampled ones, how many responses a trainer would change."""
    folder = ladder.this.folder
    records = [folder.completions.record(), folder.scores(ladder.name).record()]
    engines = [engine for engine in (state.behaviour, state.target) if engine is not None]
    tokenizer = texts_tokenizer(records, ladder.this.config.compare.tokenizer, engines)
    differ, total = ids_differ(state), len(state.q.rows)
    unfit = frozenset(key for key, row in state.q.rows.items() if len(row["logprobs"]) != len(row["token_ids"]))
    if unfit:
        detail = f"re-tokenised text: {len(unfit)} of {total} responses have not as many logprobs as ids, which are not the sampled ones then"
        if len(unfit) == total:
            said = f"the main cause: {detail}"
            return Row(
                rung=Rung.retokenised, changed=CHANGES[Rung.retokenised], before=state.gap(), share=1.0, verdict=said
            )
        return [Candidate("the responses whose logprobs fit their ids", replace(state, without=unfit), detail)]
    if tokenizer is None:
        if differ:
            return [
                Candidate(
                    "the tokens both sides hold",
                    replace(state, same_ids_only=True),
                    f"other ids in {len(differ)} responses",
                )
            ]
        raise NotTried("both sides hold the same ids, and no tokenizer is known: set compare.tokenizer")
    again = {key: encode_again(tokenizer, row["token_ids"].tolist()) for key, row in state.q.rows.items()}
    if differ:
        theirs = {key: state.p.rows[key]["token_ids"].tolist() for key in differ}
        special = set(tokenizer.all_special_ids)
        exact = sum(_without(theirs[key], special) == _without(again[key], special) for key in differ)
        detail = f"re-tokenised text: the target holds other ids in {len(differ)} of {total} responses, and {exact} of them are the text's"
        if not exact:
            detail = f"other ids: the target holds them in {len(differ)} of {total} responses, and they are not the text tokenised again"
        return [Candidate("the tokens both sides hold", replace(state, same_ids_only=True), detail)]
    changed = sum(again[key] != row["token_ids"].tolist() for key, row in state.q.rows.items())
    said = f"not the cause: both sides hold the same ids; tokenising the text again would change {changed} of {total} responses"
    before = state.gap()
    return Row(
        rung=Rung.retokenised, changed=CHANGES[Rung.retokenised], before=before, after=before, share=0.0, verdict=said
    )


def encode_again(tokenizer: object, ids: Sequence[int]) -> list[int]:
    """Ids of the text of ids: what a trainer has that keeps text."""
    text = tokenizer.decode(list(ids), skip_special_tokens=False)  # type: ignore[attr-defined]
    return list(tokenizer.encode(text, add_special_tokens=False))  # type: ignore[attr-defined]


def _without(ids: Sequence[int], special: set[int]) -> list[int]:
    return [i for i in ids if i not in special]


def transform(ladder: Ladder, state: State) -> list[Candidate]:
    """The behaviour's logprobs taken for those of another kind."""
    sampler = ladder.sampler
    if not sampler.truncates and sampler.temperature in (0, 1):
        raise NotTried(f"at temperature {sampler.temperature:g} with nothing cut off all kinds of logprobs are one")
    p = (
        state.p
        if all(row["processed_logprobs"] is not None for row in state.p.rows.values())
        else ladder.rescore(state.target)
    )
    candidates = []
    for kind in LogprobKind:
        if kind is not state.kind:
            detail = f"the sampling transform: logprobs declared {state.kind.value} are {kind.value} ones ({describe(ladder)})"
            candidates.append(Candidate(f"the target's {kind.value} logprobs", replace(state, kind=kind, p=p), detail))
    return candidates


def describe(ladder: Ladder) -> str:
    """The sampler's transform in words."""
    names = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
    return ", ".join(
        f"{n} {getattr(ladder.sampler, n):g}" for n, none in names.items() if getattr(ladder.sampler, n) != none
    )


def decode(ladder: Ladder, state: State) -> list[Candidate]:
    """The behaviour's own prefill in place of what it reported while it sampled."""
    own = ladder.own if ladder.own is not None else ladder.rescore(state.behaviour)
    return [Candidate(CHANGES[Rung.decode], replace(state, q=own))]


def lm_head(ladder: Ladder, state: State) -> list[Candidate]:
    return _precision(ladder, state, "an LM head in float32", lambda engine: engine.with_float32_head())


def dtype(ladder: Ladder, state: State) -> list[Candidate]:
    return _precision(ladder, state, "float32", lambda engine: engine.with_dtype("float32"))


def _precision(
    ladder: Ladder, state: State, what: str, change: Callable[[EngineConfig], EngineConfig | None]
) -> list[Candidate]:
    low = {who for who, name in ladder.dtypes.items() if name != "float32"}
    if not low:
        raise NotTried("both sides are in float32")
    return _each_and_both(ladder, state, what, low, change)


def tensor_parallel(ladder: Ladder, state: State) -> list[Candidate]:
    split = {
        who for who in ("behaviour", "target") if (engine := getattr(state, who)) is not None and engine.num_devices > 1
    }
    if not split:
        raise NotTried("no side is split over devices")
    return _each_and_both(ladder, state, "one device", split, lambda engine: engine.on_one_device())


def _each_and_both(
    ladder: Ladder, state: State, what: str, sides: set[str], change: Callable[[EngineConfig], EngineConfig | None]
) -> list[Candidate]:
    """The change on the target, on the behaviour, and on both, as far as `sides` need it and their engines can."""
    changed = {who: change(engine) for who in sides if (engine := getattr(state, who)) is not None}
    engines = {who: engine for who, engine in changed.items() if engine is not None}
    if not engines:
        raise NotTried("the engine is not recorded or cannot do that")
    states, candidates = {}, []
    if "target" in engines:
        states["target"] = replace(state, p=ladder.rescore(engines["target"]), target=engines["target"])
    if "behaviour" in engines:
        states["behaviour"] = replace(state, q=ladder.rescore(engines["behaviour"]), behaviour=engines["behaviour"])
    if len(states) == 2:
        states["both"] = replace(states["target"], q=states["behaviour"].q, behaviour=engines["behaviour"])
    for who, changed_state in states.items():
        words = {
            "target": f"{what} in the target",
            "behaviour": f"{what} in the behaviour",
            "both": f"{what} on both sides",
        }
        candidates.append(Candidate(words[who], changed_state))
    return candidates


def engine(ladder: Ladder, state: State) -> list[Candidate]:
    """The target's weights and type in the behaviour's engine, with its options."""
    if state.behaviour is None or state.target is None:
        raise NotTried("an engine is not recorded")
    dtype = None if state.target.weights_dtype == "auto" else state.target.weights_dtype
    here = replace(
        state.behaviour.with_model_of(state.target).with_dtype(dtype), logprob_kind=state.target.logprob_kind
    )
    options = differences(state.target.what_it_computes(), here.what_it_computes())
    if not options:
        raise NotTried(f"both sides are {here.name} with the same options")
    ours, theirs = here.name, state.target.name
    cause = f"{theirs} and {ours} differ" if ours != theirs else f"the options of {ours} differ ({'; '.join(options)})"
    words = f"the target's weights in {ours}" if ours != theirs else f"the behaviour's options of {ours}"
    return [Candidate(words, replace(state, p=ladder.rescore(here), target=here), f"the engine: {cause}")]


def weights(ladder: Ladder, state: State) -> list[Candidate]:
    """The behaviour's weights in the target's engine."""
    if state.behaviour is None or state.target is None:
        raise NotTried("which weights sampled is not recorded")
    here = state.target.with_model_of(state.behaviour)
    if here.what_it_computes() == state.target.what_it_computes():
        raise NotTried(f"both sides name the same weights, {here.model_name}")
    detail = CAUSES[Rung.weights]
    ours, theirs = state.behaviour, state.target
    names = different_tensors((ours.model_name, ours.revision), (theirs.model_name, theirs.revision))
    if names:
        detail += (
            f" (they differ in {', '.join(names[:3])}{f' and {len(names) - 3} more tensors' if len(names) > 3 else ''})"
        )
    return [Candidate(CHANGES[Rung.weights], replace(state, p=ladder.rescore(here), target=here), detail)]


LADDER: dict[Rung, Callable[[Ladder, State], list[Candidate] | Row]] = {
    Rung.noise: noise,
    Rung.end_token: end_token,
    Rung.retokenised: retokenised,
    Rung.transform: transform,
    Rung.decode: decode,
    Rung.lm_head: lm_head,
    Rung.dtype: dtype,
    Rung.tensor_parallel: tensor_parallel,
    Rung.engine: engine,
    Rung.weights: weights,
}
