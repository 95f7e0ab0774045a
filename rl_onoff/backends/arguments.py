"""What the public API was given, checked by the names it has there: one sentence, not a TypeError from inside."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rl_onoff.errors import UsageError


def is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)


def is_whole(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def check_arguments(max_length: Any, temperature: Any, top_k: Any, top_p: Any, stop_strings: Any, seed: Any) -> None:
    """Refuse what `generate` cannot sample with."""
    texts = isinstance(stop_strings, list | tuple) and all(isinstance(text, str) and text for text in stop_strings)
    warm = is_number(temperature) and 0 <= temperature < math.inf
    checks = (
        (is_whole(max_length) and max_length >= 1, "max_length", max_length, "a whole number from 1 on", "100"),
        (warm, "temperature", temperature, "a number from 0 (greedy) on", "1.0"),
        (top_k is None or (is_whole(top_k) and top_k >= 0), "top_k", top_k, "a whole number from 0 on, or None", "50"),
        (
            top_p is None or (is_number(top_p) and 0 < top_p <= 1),
            "top_p",
            top_p,
            "above 0 and at most 1, or None",
            "0.9",
        ),
        (
            stop_strings is None or texts,
            "stop_strings",
            stop_strings,
            "a list of non-empty strings, or None",
            "['END']",
        ),
        (is_whole(seed) and 0 <= seed < 2**63, "seed", seed, "a whole number from 0 to 2^63 - 1", "0"),
    )
    for fine, name, value, want, example in checks:
        if not fine:
            raise UsageError(f"{name} is {value!r} but must be {want}: pass {name}={example}, for example")


def as_batch(value: Any, name: str) -> tuple[list[Any], bool]:
    """(list of items, whether a single one was given); an item is a text or a list of token ids."""
    if isinstance(value, str):
        return [value], True
    if hasattr(value, "tolist"):
        value = value.tolist()
    items = list(value) if isinstance(value, Sequence) and not isinstance(value, bytes) else [value]
    if items and all(is_whole(item) for item in items) and isinstance(value, Sequence):
        return [items], True
    for item in items:
        if not (isinstance(item, Sequence) or hasattr(item, "tolist")) or isinstance(item, bytes | Mapping):
            raise UsageError(f"{name} holds {item!r}: pass a text, a list of token ids, or a list of these")
    return items, False


def token_ids_of(ids: Any) -> np.ndarray:
    """A list of token ids as the engines take it."""
    array = np.asarray(ids)
    if array.size and (array.ndim != 1 or array.dtype.kind not in "iu"):
        raise UsageError(f"{ids!r} is neither a text nor a list of token ids: pass those that backend.encode gives")
    return array.astype(np.int32)
