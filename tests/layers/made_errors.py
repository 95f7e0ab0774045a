"""Norms as a run gives them, made up: errors that grow as rounding does, and whatever a test changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from rl_onoff.backends.layers import points_of
from rl_onoff.layers.analysis import Layers
from rl_onoff.layers.rule import Response

NUM_LAYERS, LENGTH, PROMPT = 12, 80, 30
Change = Callable[[dict[Any, np.ndarray], dict[Any, np.ndarray]], Any]


def made(
    change: Change = lambda errors, norms: None, *, dtype: str = "bfloat16", nats: float = 0.02,
    overlap_ML: np.ndarray | None = None,
) -> Layers:  # fmt: skip
    """What is found in two responses; `change` is given relative errors (L,) and norms (L,) by point."""
    rng = np.random.default_rng(0)
    rounding = {"float32": 2e-7, "bfloat16": 4e-3}[dtype]
    sides = {who: {"engine": who, "version": "1", "dtype": dtype, "model": "m"} for who in ("backend", "target")}
    responses = []
    for _ in range(2):
        errors, norms = {}, {}
        for point in points_of(NUM_LAYERS, True):
            kind, k = point
            size = {"embeddings": 0.0, "layer": 1.05**k, "lm_head": 1.05**NUM_LAYERS}.get(kind, 1.5 * 1.05**k)
            errors[point] = rounding * size * rng.lognormal(0, 0.3, LENGTH)
            norms[point] = rng.lognormal(0, 0.2, LENGTH) * {"layer": 10.0 + k}.get(kind, 3.0)
        change(errors, norms)
        l_T = rng.normal(0, nats, LENGTH - PROMPT + 1).astype(np.float32)
        norms_PL = np.array([*norms.values()], np.float32)
        responses.append(
            Response(
                differences_PL=np.array([*errors.values()], np.float32) * norms_PL,
                norms_PL=norms_PL,
                num_prompt=PROMPT,
                logprobs_T=np.full_like(l_T, -2) + l_T,
                logprobs_target_T=np.full_like(l_T, -2),
                logsumexp_T=np.full_like(l_T, 12),
                overlap_ML=overlap_ML,
            )
        )
    return Layers.of(responses, NUM_LAYERS, sides)


def add(errors: dict[Any, np.ndarray], size: float, *, layer: int, kind: str | None, start: int = 0) -> None:
    """An error from a layer on, at positions from `start` on; `kind` is where in the layer it arises."""
    for (where, k), values_L in errors.items():
        if where == "embeddings" or k < layer or (k == layer and (where, kind) == ("attention", "mlp")):
            continue
        if k > layer or where in ("layer", "lm_head") or kind in (where, "attention"):
            values_L[start:] += size
