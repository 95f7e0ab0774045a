"""The values in a row of a rollout file as arrays and numbers, checked; what is wrong with one names its role."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from rl_onoff.data.prompts import MAX_ID

PER_TOKEN = {  # role -> what its values are called
    "token_ids": "token ids", "prompt_ids": "prompt ids", "mask": "mask values", "behaviour": "behaviour logprobs",
    "target": "target logprobs",
}  # fmt: skip
LOGPROBS = ("behaviour", "target")


class Wrong(ValueError):
    """What a row has that cannot be, and the role of the column that has it."""

    def __init__(self, what: str, role: str):
        super().__init__(what)
        self.role = role


def whole(value: Any, role: str) -> int:
    """A whole number from 0."""
    if getattr(value, "ndim", None) == 0:
        value = value.item()
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if number and 0 <= value <= MAX_ID and value == int(value):
        return int(value)
    raise Wrong(f"{value!r} as its {role} where a whole number from 0 is wanted", role)


def ids(value: Any, role: str) -> np.ndarray:
    """Whole numbers as float64, which holds every int32, so that fractions are seen."""
    found = numbers(value, role)
    if not ((found == np.floor(found)) & (np.abs(found) <= MAX_ID)).all():
        raise Wrong(f"{PER_TOKEN[role]} that are not all whole numbers below 2^31", role)
    return found


def numbers(value: Any, role: str) -> np.ndarray:
    """A list, an array or a tensor of numbers, as float64; None among logprobs is NaN."""
    bools, nothing = (bool, np.bool_), (type(None),) if role in LOGPROBS else ()
    known = (int, float, np.integer, np.floating, *nothing, *(bools if role == "mask" else ()))
    unknown = () if role == "mask" else bools
    if hasattr(value, "detach"):  # a torch tensor; numpy has no bfloat16
        value = value.detach().cpu().double().numpy()
    is_array = isinstance(value, np.ndarray) and value.ndim == 1
    types = {value.dtype.type} if is_array else set(map(type, value)) if isinstance(value, list) else {str}
    if all(issubclass(each, known) and not issubclass(each, unknown) for each in types):
        try:
            return np.asarray(value, np.float64)
        except OverflowError:  # a number of JSON may have any number of digits
            pass
    raise Wrong(f"{PER_TOKEN.get(role, role)} that are not a list of numbers", role)


def number(value: Any) -> float | None:
    """A reward or the like where there is one."""
    if getattr(value, "ndim", None) == 0:
        value = value.item()
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and abs(value) <= sys.float_info.max else None


def total(value: Any) -> float | None:
    """A reward that is one number, or one a token, of which all but the last are often 0."""
    if isinstance(value, list) or getattr(value, "ndim", 0) == 1:
        try:
            return number(float(numbers(value, "reward").sum()))
        except Wrong:
            return None
    return number(value)
