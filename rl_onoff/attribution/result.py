"""Why two policies differ, as rows: what was changed, what that did to the gap, and the cause in words. No engine.

The gap is the mean k3 KL, nats a token. A rung's share is (before − after) / gap, limited to 0 … 1, where `before` is
the gap with every change kept so far and `gap` the one at the bottom of the ladder. So shares add up: a cause that an
earlier rung has taken away is not counted again. The noise rung changes nothing: its share says how large the gap is
that one engine has to itself.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from rl_onoff.compare import ON_POLICY_K3
from rl_onoff.config import Rung
from rl_onoff.report.tables import aligned, number

KEEP = 0.1  # least share of the gap for which a change is kept, and called part of the cause
MOST = 0.5  # least share that is called the main cause
ROUNDING = 1e-11  # nats a token: what float32 logprobs cannot resolve; no floor is lower
NOTHING_LEFT = 0.02  # of the gap: below this, no further rung is tried


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One rung. `before`, `after` and `share` are None where it was not tried, and `verdict` says why."""

    rung: Rung
    changed: str = ""  # what was changed; the words of the rung's change where it says nothing better
    before: float | None = None
    after: float | None = None
    share: float | None = None
    verdict: str

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "rung": self.rung.value}


def tried(rung: Rung, changed: str, before: float, after: float, whole: float, cause: str) -> Row:
    """The row of a rung that was tried; `whole` is the gap at the bottom of the ladder."""
    share = float(np.clip((before - after) / whole, 0, 1)) if whole > 0 else 0.0
    if share >= MOST:
        verdict = f"the main cause: {cause}"
    elif share >= KEEP:
        verdict = f"part of the cause: {cause}"
    else:
        verdict = "not the cause (the gap grows)" if after - before > KEEP * whole else "not the cause"
    return Row(rung=rung, changed=changed, before=before, after=after, share=share, verdict=verdict)


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
        """The main cause in one sentence, and what is left."""
        gap = f"a mean k3 KL of {self.gap:.2g} nats a token over {self.tokens:,} tokens"
        size = f"the gap between the behaviour and {self.target}, {gap},"
        if self.gap <= self.floor:
            return f"Nothing to explain: {size} is not above the noise floor of {self.floor:.2g}."
        small = f" It is under {ON_POLICY_K3:.0e}, which on-policy engines in float32 stay below."
        small = small if self.gap < ON_POLICY_K3 else ""
        noisy = self.floor > KEEP * self.gap
        after = f"{f' One engine against itself in other batches shows {self.floor:.2g}.' if noisy else ''}{small}"
        causes = [row for row in self.rows if row.rung is not Rung.noise and (row.share or 0) >= KEEP]
        if not causes and noisy:
            return f"Mostly noise: {size} is left, and no rung takes it away.{after}"
        if not causes and any(row.rung is Rung.weights and row.share is not None for row in self.rows):
            return f"Not explained: no rung takes away {size} so its cause is one that cannot be tried here.{after}"
        if not causes:
            guess = "the weights (staleness, quantisation, an adapter, a changed LM head)"
            return f"Not explained by anything that can be tried: {size} is left, which points to {guess}.{after}"
        causes.sort(key=lambda row: -(row.share or 0))
        part = "" if (causes[0].share or 0) >= MOST else "in part "
        name = causes[0].verdict.partition(": ")[2]
        shares = [f"{row.changed}: {number(row.after, 2) or 'not defined'}, {row.share:.0%} less" for row in causes]
        rest = [f"{self.left / self.gap:.0%} is left"] if self.left >= KEEP * self.gap else []
        return f"{size[0].upper()}{size[1:-1]}, comes {part}from {'; '.join([name, *shares, *rest])}.{after}"

    def to_dict(self) -> dict[str, Any]:
        numbers = {name: getattr(self, name) for name in ("target", "gap", "floor", "left", "responses", "tokens")}
        return {**numbers, "sentence": self.sentence(), "rows": [row.to_dict() for row in self.rows]}

    def values(self) -> dict[str, float]:
        """Flat numbers for W&B."""
        shares = {f"attribute/{row.rung.value}/share": row.share for row in self.rows if row.share is not None}
        return {"attribute/gap": self.gap, "attribute/floor": self.floor, "attribute/left": self.left, **shares}

    def as_text(self) -> str:
        """The ladder for a terminal."""
        rows = [["rung", "before", "after", "share", "verdict"]]
        for row in self.rows:
            share = "" if row.share is None else f"{row.share:.0%}"
            rows.append([row.rung.value, number(row.before, 2), number(row.after, 2), share, row.verdict])
        head = f"  attribution of {self.target} (k3 KL, nats a token)"
        return "\n".join([head, *aligned(rows, "<>>><"), "", f"  {self.sentence()}"])
