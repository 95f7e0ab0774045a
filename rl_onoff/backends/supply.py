"""Work that is handed to an engine while it works, so that its batches stay full to the end of a run."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import islice
from typing import Protocol, TypeVar

from rl_onoff.types import Request

Item = TypeVar("Item")
Draw = tuple[Request, int]  # one response to sample: the request, and which of its samples


class Supply(Protocol):
    """Where an engine gets what it samples."""

    def take(self, most: int | None = None, *, wait: bool) -> list[Draw]:
        """Up to `most` draws (None: all that are there). Nothing: there are none now; after a `wait`, none will come."""
        ...


class Given:
    """A supply that is there from the start."""

    def __init__(self, requests: Iterable[Request]) -> None:
        self._draws = deque(draws_of(requests))

    def take(self, most: int | None = None, *, wait: bool) -> list[Draw]:
        return taken(self._draws, most)


def taken(draws: deque[Draw], most: int | None) -> list[Draw]:
    """The first `most` draws (None: all), taken out."""
    number = len(draws) if most is None else min(max(most, 0), len(draws))
    return [draws.popleft() for _ in range(number)]


def whole(items: Iterable[Item]) -> Callable[[int, bool], Iterable[Item]]:
    """What an engine's loop takes from, where all that it is to do is there."""
    items = iter(items)
    return lambda most, wait: islice(items, max(most, 0))


def draws_of(requests: Iterable[Request]) -> list[Draw]:
    return [(request, sample) for request in requests for sample in request.sample_indices]


def requests_of(draws: Iterable[Draw]) -> list[Request]:
    """The draws as requests again, each with the samples that are among them."""
    samples: dict[int, list[int]] = {}
    requests: dict[int, Request] = {}
    for request, sample in draws:
        requests[id(request)] = request
        samples.setdefault(id(request), []).append(sample)
    return [replace(request, samples=tuple(samples[number])) for number, request in requests.items()]
