"""Whether the routers of a mixture of experts choose the same experts on two sides, and what hangs on it. Arrays in,
numbers and a sentence out.

Row t tells of response token t: which experts were chosen at the position before it, whose hidden state gives its
logits. The experts of earlier positions, prompt included, reach it through the attention, and are not counted.

Shapes: M layers, T tokens of a response.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from rl_onoff.compare.comparison import Estimate, Sums

RESAMPLES = 1000  # of the responses, for the intervals


@dataclass(frozen=True, kw_only=True, slots=True)
class Routers:
    """How far two sides' routers agree, over the tokens of all responses."""

    tokens: int
    same: float  # share of the tokens with the same set of experts in every layer
    overlap: float  # share of the chosen experts that both sides chose, over tokens and layers
    layers: list[dict[str, Any]]  # the two of each layer that has a router
    nats: dict[str, Estimate]  # mean |Δ logprob| of the tokens with the `same` experts, and of the `other` ones
    by_layers: list[dict[str, Any]]  # the same by the number of layers whose sets differ: 0, 1, 2 to 3, 4 to 7, …

    @classmethod
    def of(cls, overlaps: Sequence[np.ndarray], differences: Sequence[np.ndarray]) -> Self | None:
        """What overlaps (M, T) and |Δ logprob| (T,), a response each, say; None where no layer has a router."""
        there_M = np.array([~np.isnan(overlap_MT).all(1) for overlap_MT in overlaps]).any(0)
        if not there_M.any():
            return None
        overlap_MN, l_N = np.concatenate(overlaps, 1, dtype=np.float64)[there_M], np.concatenate(differences)
        num_N = (overlap_MN != 1).sum(0)  # of layers
        terms: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        parts = np.split(num_N == 0, np.cumsum([len(l_T) for l_T in differences])[:-1])
        for name, masks in (("same", parts), ("other", [~mask_T for mask_T in parts])):
            sums = [l_T[mask_T].sum(dtype=np.float64) for l_T, mask_T in zip(differences, masks, strict=True)]
            terms[name] = np.array(sums), np.array([mask_T.sum() for mask_T in masks])
        buckets_N = np.frexp(num_N)[1]
        buckets = {i: buckets_N == i for i in np.unique(buckets_N).tolist()}
        return cls(
            tokens=len(l_N), same=float((num_N == 0).mean()), overlap=float(overlap_MN.mean()),
            layers=[
                {"layer": int(k), "same": float((row_N == 1).mean()), "overlap": float(row_N.mean())}
                for k, row_N in zip(np.flatnonzero(there_M), overlap_MN, strict=True)
            ],
            nats=Sums.of([terms]).estimates(RESAMPLES, 0, {}, dict),
            by_layers=[
                {"start": (1 << i) >> 1, "end": 1 << i, "tokens": int(here_N.sum()), "nats": float(l_N[here_N].mean())}
                for i, here_N in buckets.items()
            ],
        )  # fmt: skip

    def sentence(self) -> str:
        num = len(self.layers)
        layers = f"in each of their {num} layers" if num > 1 else f"in layer {self.layers[0]['layer']}"
        if self.same == 1:
            return f"The routers choose the same experts for every token {layers}."
        least = min(self.layers, key=lambda row: row["overlap"])
        said = f"The routers choose the same experts {layers} for {self.same:.1%} of the tokens"
        said += f" (overlap {self.overlap:.3f}, least in layer {least['layer']}: {least['overlap']:.3f})"
        same, other = (_words(self.nats[name]) if name in self.nats else "" for name in ("same", "other"))
        told = f"the logprobs of tokens with other experts somewhere are {other} nats apart on average"
        return f"{said}; {told}{f', of those with the same {same}' if same else ''}."

    def values(self) -> dict[str, float]:
        """Flat numbers for W&B and sweepers."""
        nats = {f"layers/nats_{name}_experts": x.value for name, x in self.nats.items()}
        return {"layers/experts_same": self.same, "layers/experts_overlap": self.overlap, **nats}


def _words(x: Estimate) -> str:
    return f"{x.value:.2g}" if x.lo is None else f"{x.value:.2g} (95 % interval {x.lo:.2g} to {x.hi:.2g})"
