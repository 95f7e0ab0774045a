"""What a comparison of hidden states found: numbers by point for JSON, W&B and the terminal, and a sentence."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from rl_onoff.backends.layers import ATTENTION, EMBEDDINGS, HEAD, LAYER, MLP
from rl_onoff.errors import plural
from rl_onoff.layers import rule
from rl_onoff.layers.routers import Routers
from rl_onoff.layers.rule import Errors, Growth, Parting, Response
from rl_onoff.report.tables import aligned, number

SHOWN = 12  # layers in the terminal, about


@dataclass(kw_only=True, slots=True)
class Layers:
    """What was found; `points` and `inside` have a row for each point."""

    sides: Mapping[str, Mapping[str, Any]]
    responses: int
    tokens: int  # positions of prompts and responses
    floor: float
    typical: float  # growth of a typical layer
    positions: list[dict[str, int]]
    points: list[dict[str, Any]]
    inside: list[dict[str, Any]]
    nats: dict[str, float]
    parting: Parting | None
    routers: Routers | None  # None: a dense model
    sentence: str = field(init=False)

    def __post_init__(self) -> None:
        self.sentence = " ".join([self._sentence(), *([self.routers.sentence()] if self.routers else [])])

    @classmethod
    def of(cls, responses: Sequence[Response], num_layers: int, sides: Mapping[str, Mapping[str, Any]]) -> Layers:
        """What the norms of all responses say."""
        floor = rule.FLOOR * max(rule.ROUNDING.get(side["dtype"], rule.ROUNDING["bfloat16"]) for side in sides.values())
        stream = Errors.of(responses, num_layers, inside=False)
        within = Errors.of([r for r in responses if len(r.norms_PL) != num_layers + 2], num_layers, inside=True)
        growth = Growth(stream, floor)
        apart = [np.abs(r.logprobs_T - r.logprobs_target_T).astype(np.float64) for r in responses]
        l_N = np.concatenate(apart)
        nats = {"mean": l_N.mean(), "median": np.median(l_N), "p90": np.quantile(l_N, 0.9), "max": l_N.max()}
        parting = growth.parting()
        if parting is None:
            parting = rule.head_of(responses, l_N, floor)
        elif parting.where == LAYER and within.errors_PN.size:
            parting = rule.inside_of(parting, within, floor)
        # position i gives token i + 1
        experts = [(r.overlap_ML[:, r.num_prompt - 1 :], l_T) for r, l_T in zip(responses, apart, strict=True)
                   if r.overlap_ML is not None]  # fmt: skip
        points = [row | {"growth": growth.overall(i)} for i, row in enumerate(stream.rows())]
        return cls(
            sides=sides,
            responses=len(responses),
            tokens=stream.errors_PN.shape[1],
            floor=floor,
            typical=growth.typical,
            positions=stream.positions(),
            points=points,
            inside=[row for row in within.rows() if row["point"] in (ATTENTION, MLP)],
            nats={name: float(value) for name, value in nats.items()},
            parting=parting,
            routers=Routers.of(*zip(*experts, strict=True)) if experts else None,
        )

    def _sentence(self) -> str:
        a, b = (f"{side['engine']} ({side['dtype']})" for side in (self.sides["backend"], self.sides["target"]))
        nats = f"the tokens' logprobs are {self.nats['mean']:.2g} nats apart on average"
        of, found = "median" if self.points[-1]["median"] else "p90", self.parting
        first, last = self.points[1][of], self.points[-1][of]
        if found is None:
            coarse = max((side["dtype"] for side in self.sides.values()), key=lambda dtype: rule.ROUNDING.get(dtype, 1))
            tail = " (90th percentiles)" if of == "p90" else ""
            grows = f"grows smoothly from {first:.2g} after layer 0 to {last:.2g} before the LM head{tail}"
            grows = f"{grows}, as rounding in {coarse} does" if first or last else "is 0 at every layer"
            said = f"{a} and {b} do not part: the relative error of the hidden states {grows}; {nats}."
            least = f"a fault that moves a layer by less than {(rule.JUMP - 1) * self.floor:.1g} would hide in it"
            return said if coarse == "float32" else f"{said} But {least}: set both sides to float32 to see that."
        if found.where == HEAD:
            what = f"the hidden states before it are {last:.2g} apart, but {nats}"
            return f"{a} and {b} part {found.words()}: {what}, {found.times:.2g} times what the states explain."
        at = f"at positions {found.start} to {found.end - 1}" if found.end - found.start > 1 else f"at {found.start}"
        jump = f"the relative error of the hidden states jumps from {found.before:.2g} to {found.after:.2g}"
        more = [k for k in found.jumps if k != found.layer]
        again = f" It jumps again in layer{'s' * (len(more) > 1)} {', '.join(map(str, more))}." if more else ""
        times = f"{found.times:.2g} times the growth of a typical layer"
        return f"{a} and {b} part {found.words()}: {at} {jump}, {times}; {nats}.{again}"

    def rows(self) -> list[dict[str, Any]]:
        """A row for each point of the residual stream, without positions: for W&B."""
        rows = [{name: value for name, value in row.items() if name != "by_position"} for row in self.points]
        if self.routers is None:
            return rows
        of = {
            row["layer"]: {f"experts_{name}": row[name] for name in ("same", "overlap")} for row in self.routers.layers
        }
        none = {"experts_same": None, "experts_overlap": None}
        return [row | of.get(row["layer"], none) for row in rows]

    def values(self) -> dict[str, float]:
        """Flat numbers for W&B and sweepers."""
        found = {f"layers/nats_{name}": value for name, value in self.nats.items()}
        found |= {"layers/error_first": self.points[1]["median"], "layers/error_last": self.points[-1]["median"]}
        found |= {"layers/parts": float(self.parting is not None), **(self.routers.values() if self.routers else {})}
        if self.parting is not None and self.parting.layer is not None:
            found["layers/parts_in_layer"] = self.parting.layer
        return {name: value for name, value in found.items() if value is not None}

    def to_dict(self) -> dict[str, Any]:
        constants = {
            "floor_roundings": rule.FLOOR,
            "jump": rule.JUMP,
            "head_share": rule.HEAD_SHARE,
            "min_tokens": rule.MIN_TOKENS,
        }
        return _finite(asdict(self) | {"rule": constants})

    def as_text(self) -> str:
        """Some of the layers for a terminal, and what lies inside the one in which the sides part."""
        num = len(self.points) - 2
        at = None if self.parting is None else self.parting.layer
        near = set() if at is None else {at - 1, at, at + 1}
        kept = {*range(0, num, max(1, math.ceil(num / SHOWN))), num - 1, *near}
        rows = [["after", "median", "p90", "max", "growth"]]
        for row in self.points:
            if row["point"] == LAYER and row["layer"] == at:
                rows += [_cells(part) for part in self.inside if part["layer"] == at]
            if row["point"] != LAYER or row["layer"] in kept:
                rows.append(_cells(row))
        over = f"{plural(self.tokens, 'token')} of {plural(self.responses, 'response')}"
        head = f"  layers: relative error of the hidden states, {over}"
        return "\n".join([head, *aligned(rows, "<>>>>"), "", f"  {self.sentence}"])


def _cells(row: Mapping[str, Any]) -> list[str]:
    name = {LAYER: f"layer {row['layer']}", HEAD: "norm before the LM head", EMBEDDINGS: "embeddings"}
    numbers = [number(row.get(what), 2) for what in ("median", "p90", "max", "growth")]
    return [name.get(row["point"], f"layer {row['layer']}, its {row['point']}"), *numbers]


def _finite(value: Any) -> Any:
    """JSON has no infinities: null instead."""
    if isinstance(value, Mapping):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
