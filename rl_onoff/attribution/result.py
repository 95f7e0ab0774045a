"""Why two policies differ, as rows: what was changed, what it did to the gap, and the cause in words. Numbers only, no engine.

The gap is the mean k3 KL, nats a token. A rung's share is (before − after) / gap, limited to 0 … 1, where `before` is the gap with
every change kept so far and `gap` the one at the bottom of the ladder. So shares add up: a cause that an earlier rung has taken
away is not counted again. The noise rung changes nothing: its share says how large the gap is that one engine has to itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from rl_onoff.compare import ON_POLICY_K3
from rl_onoff.compare.metrics import token_terms
from rl_onoff.config import Rung
from rl_onoff.rundir.table import Key

KEEP = 0.1  # least share of the gap for which a change is kept, and called part of the cause
MOST = 0.5  # least share that is called the main cause
ROUNDING = 1e-11  # nats a token: what float32 logprobs cannot resolve; no floor is lower
NOTHING_LEFT = 0.02  # of the gap: below this, no further rung is tried

CAUSES: dict[Rung, str] = {
    Rung.noise: "noise: one engine repeats itself no better",
    Rung.end_token: "the last token: it is there on one side only, or is treated differently",
    Rung.retokenised: "re-tokenised text: the target scored other ids than were sampled",
    Rung.transform: "the sampling transform: logprobs of one kind are taken for another",
    Rung.decode: "decoding: the engine reports other logprobs while it samples than when it scores, by its kernels, its cache, or a "
                 "transform that it does not declare",
    Rung.lm_head: "the precision of the LM head",
    Rung.dtype: "the precision of weights and arithmetic",
    Rung.tensor_parallel: "the split over several devices",
    Rung.engine: "the engine: it computes something else from the same weights",
    Rung.weights: "the weights: behaviour and target are different models",
}  # fmt: skip
CHANGES: dict[Rung, str] = {
    Rung.noise: "the target's engine scores again, one response at a time",
    Rung.end_token: "the last tokens left out",
    Rung.retokenised: "the text tokenised again",
    Rung.transform: "other kinds of logprobs",
    Rung.decode: "the behaviour's own prefill in place of what it reported while sampling",
    Rung.lm_head: "LM head in float32",
    Rung.dtype: "float32",
    Rung.tensor_parallel: "one device",
    Rung.engine: "the target's weights in the behaviour's engine",
    Rung.weights: "the behaviour's weights in the target's engine",
}


class View(NamedTuple):
    """What one side holds of a response."""

    token_ids_T: np.ndarray
    logprobs_T: np.ndarray


Views = Mapping[Key, View]


def gap(q: Views, p: Views) -> float:
    """Mean k3 KL over the tokens of the responses both sides hold; NaN without any.

    Where the sides hold different ids they are compared position by position and a missing token has logprob 0: what a trainer
    sees that puts both into padded tensors.
    """
    ours, theirs = [], []
    for key in q.keys() & p.keys():
        a, b = q[key].logprobs_T, p[key].logprobs_T
        width = max(len(a), len(b))
        ours.append(np.pad(a, (0, width - len(a))))
        theirs.append(np.pad(b, (0, width - len(b))))
    if not sum(map(len, ours)):
        return math.nan
    return float(token_terms(np.concatenate(ours), np.concatenate(theirs))["kl_k3"].mean())


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One rung. `after` and `share` are None where it was not tried, and `verdict` says why."""

    rung: Rung
    changed: str
    before: float | None = None
    after: float | None = None
    share: float | None = None
    verdict: str

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "rung": self.rung.value}


def tried(rung: Rung, changed: str, before: float, after: float, whole: float, detail: str = "") -> Row:
    """The row of a rung that was tried; `whole` is the gap at the bottom of the ladder."""
    share = float(np.clip((before - after) / whole, 0, 1)) if whole > 0 else 0.0
    cause = detail or CAUSES[rung]
    if share >= MOST:
        verdict = f"the main cause: {cause}"
    elif share >= KEEP:
        verdict = f"part of the cause: {cause}"
    else:
        verdict = "not the cause (the gap grows)" if after - before > KEEP * whole else "not the cause"
    return Row(rung=rung, changed=changed, before=before, after=after, share=share, verdict=verdict)


def skipped(rung: Rung, why: str) -> Row:
    return Row(rung=rung, changed=CHANGES[rung], verdict=f"not tried: {why}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Attribution:
    """The whole ladder of one target."""

    target: str
    gap: float  # before any change
    floor: float
    left: float  # after every change that was kept
    rows: list[Row]
    responses: int
    tokens: int

    def sentence(self) -> str:
        """The main cause in one sentence."""
        size = f"the gap between the behaviour and {self.target}, a mean k3 KL of {self.gap:.2g} nats a token over {self.tokens:,} tokens,"
        if self.gap <= self.floor:
            return f"Nothing to explain: {size} is not above the noise floor of {self.floor:.2g}."
        small = (
            f" It is under {ON_POLICY_K3:.0e}, which on-policy engines in float32 stay below."
            if self.gap < ON_POLICY_K3
            else ""
        )
        noise = (
            f" One engine against itself in other batches shows {self.floor:.2g}."
            if self.floor > KEEP * self.gap
            else ""
        )
        causes = [row for row in self.rows if row.rung is not Rung.noise and (row.share or 0) >= KEEP]
        if not causes:
            if noise:
                return f"Mostly noise: {size} is left, and no rung takes it away.{noise}{small}"
            if self._tried(Rung.weights):
                return f"Not explained: no rung takes away {size} so its cause is one that cannot be tried here.{small}"
            return (
                f"Not explained by anything that can be tried: {size} is left, which points to the weights (staleness, quantisation, "
                f"an adapter, a changed LM head).{small}"
            )
        main = max(causes, key=lambda row: row.share or 0)
        said = f"{size[0].upper()}{size[1:-1]}, comes {'' if (main.share or 0) >= MOST else 'in part '}from "
        said += f"{main.verdict.partition(': ')[2]}; {main.changed}: {_number(main.after)}, {main.share:.0%} less"
        for row in causes:
            if row is not main:
                said += f"; {row.changed}: {_number(row.after)}, {row.share:.0%} less"
        rest = self.left / self.gap
        return f"{said}{f'; {rest:.0%} is left' if rest >= KEEP else ''}.{noise}{small}"

    def _tried(self, rung: Rung) -> bool:
        return any(row.rung is rung and row.share is not None for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        numbers = {name: getattr(self, name) for name in ("target", "gap", "floor", "left", "responses", "tokens")}
        return {**numbers, "sentence": self.sentence(), "rows": [row.to_dict() for row in self.rows]}

    def values(self) -> dict[str, float]:
        """Flat numbers for W&B."""
        shares = {f"attribute/{row.rung.value}/share": row.share for row in self.rows if row.share is not None}
        return {"attribute/gap": self.gap, "attribute/floor": self.floor, "attribute/left": self.left, **shares}

    def as_text(self) -> str:
        """The ladder for a terminal."""
        lines = [
            f"  attribution of {self.target} (k3 KL, nats a token)",
            f"    {'rung':<16}{'before':>10}{'after':>10}{'share':>7}  verdict",
        ]
        for row in self.rows:
            numbers = [("" if x is None else f"{x:.2g}") for x in (row.before, row.after)]
            share = "" if row.share is None else f"{row.share:.0%}"
            lines.append(f"    {row.rung.value:<16}{numbers[0]:>10}{numbers[1]:>10}{share:>7}  {row.verdict}")
        return "\n".join([*lines, "", f"  {self.sentence()}"])


def _number(value: float | None) -> str:
    return "not defined" if value is None else f"{value:.2g}"
