"""Metrics over training steps, and the first step that leaves the band of the steps before it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

STEP_METRICS = (
    "kl_k3", "kl", "logprob_diff_mean", "ess_token", "fraction_outside", "entropy_behaviour", "entropy_target",
)  # fmt: skip
BEFORE = 3  # steps that make a band
SPREAD = 4.0  # robust standard deviations of log k3 that the band reaches above their median
LEAST = 0.4  # least half-width of the band: a factor of 1.5


def departure(steps: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The first step whose k3, interval and all, lies above the band of all steps before it; None where none does.

    The band is around the median of log k3, 4 robust standard deviations (1.4826 × the median absolute deviation) or a
    factor of 1.5 wide, whichever is more.
    """
    k3 = [step["metrics"]["kl_k3"] for step in steps]
    logs = np.log([max(each["value"], 1e-12) for each in k3])
    for i in range(BEFORE, len(steps)):
        middle = float(np.median(logs[:i]))
        half = max(SPREAD * 1.4826 * float(np.median(np.abs(logs[:i] - middle))), LEAST)
        low, high = float(np.exp(middle - half)), float(np.exp(middle + half))
        if (k3[i]["value"] if k3[i]["lo"] is None else k3[i]["lo"]) > high:
            step, value = steps[i]["step"], k3[i]["value"]
            said = f"Step {step:g} is the first to leave the band of the steps before it: k3 {value:.2g}"
            sentence = f"{said}, where {low:.2g} to {high:.2g} was usual."
            return {"step": step, "k3": value, "band": [low, high], "sentence": sentence}
    return None
